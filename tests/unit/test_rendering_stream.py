"""Ids to text, one by one."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from tests.tiny_models import tiny_tokenizer
from tunewright.rendering.renderer import Renderer
from tunewright.rendering.tokens import Tokens

FAST = settings(max_examples=60)


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    folder = tiny_tokenizer(tmp_path_factory.mktemp("model"))
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.add_tokens([AddedToken("你们 好", special=False), AddedToken("<tool_call>", special=False)])
    tokenizer.save(path)
    return Renderer(folder)


def streamed(renderer: Renderer | Tokens, ids: list[int]) -> list[str]:
    decoder = renderer.stream_decoder()
    return [*(decoder.push(i) for i in ids), decoder.flush()]


@FAST
@given(ids=st.lists(st.integers(0, 605), max_size=40))
def test_any_ids_stream_to_what_decode_says(renderer: Renderer, ids: list[int]) -> None:
    assert "".join(streamed(renderer, ids)) == renderer.decode(ids)


@FAST
@given(text=st.text(st.characters(codec="utf-8"), max_size=30))
def test_pieces_hold_whole_characters_only(renderer: Renderer, text: str) -> None:
    text = text.replace("\N{REPLACEMENT CHARACTER}", "")
    pieces = streamed(renderer, renderer._tokens.plain_ids(text))
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces[:-1])


def test_a_cut_character_comes_out_at_the_end(renderer: Renderer) -> None:
    ids = renderer._tokens.plain_ids("龘")
    assert len(ids) == 3
    assert streamed(renderer, ids[:2]) == ["", "", "\N{REPLACEMENT CHARACTER}"]


def test_special_tokens_are_left_out_as_decode_does(renderer: Renderer) -> None:
    ids = [1, *renderer._tokens.plain_ids("hi"), 2]
    assert "".join(streamed(renderer, ids)) == renderer.decode(ids) == "hi"


@pytest.fixture(scope="module")
def sentence_piece_like() -> Tokens:
    """A vocabulary as Llama 2's: `▁` for spaces, bytes as `<0xNN>`, a space put before the text."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁helowrd你好"]
    tokenizer = Tokenizer(
        models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # type: ignore[assignment]
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    return Tokens(tokenizer.to_str(), "")


@FAST
@given(text=st.text(st.sampled_from("helo wrd你好龘😀"), max_size=20))
def test_other_vocabularies_stream_too(sentence_piece_like: Tokens, text: str) -> None:
    ids = list(sentence_piece_like.template_ids(text, first=True))
    pieces = streamed(sentence_piece_like, ids)
    assert "".join(pieces) == sentence_piece_like.decode(ids) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_no_space_is_invented_inside_a_sequence(sentence_piece_like: Tokens) -> None:
    assert [sentence_piece_like._first.id_to_token(i) for i in sentence_piece_like.plain_ids("he")] == ["h", "e"]


def test_a_token_costs_the_same_late_as_early(renderer: Renderer, tmp_path: Path) -> None:
    decoder = renderer.stream_decoder()
    for token in renderer._tokens.plain_ids("你好，今天天气怎么样？") * 2000:
        decoder.push(token)
    # What a decoder keeps must not grow with the answer.
    assert set(vars(decoder)) == {"_tokens", "_utf8"}
