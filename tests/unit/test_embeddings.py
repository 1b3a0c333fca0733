"""Vectors cut to a length that the base was trained for, and bases whose texts end with a token."""

from pathlib import Path
from typing import Any

import numpy
import pytest

from tunewright.completions.embeddings import EmbeddingRequest, embed_order, in_order
from tunewright.errors import InvalidRequest, Misconfigured
from tunewright.models.records import Base, Embeddings, Source


def base_of(path: Path, **way: Any) -> Base:
    return Base(
        code="tiny",
        name="tiny",
        source=Source(kind="folder"),
        licence="x",
        context_tokens=64,
        embeddings=Embeddings(**{"pooling": "last", **way}),
        path=path,
    )


def asked(**fields: Any) -> EmbeddingRequest:
    return EmbeddingRequest(**{"model": "tiny", "inputs": ("hi", (5, 6)), **fields})


def test_a_vector_is_cut_and_made_one_long_again() -> None:
    vector = numpy.array([3.0, 4.0, 12.0], "<f4").tobytes()
    whole, cut = in_order({0: vector}, None)[0], in_order({0: vector}, 2)[0]
    assert whole == vector
    assert numpy.frombuffer(cut, "<f4").tolist() == pytest.approx([0.6, 0.8])


def test_only_the_lengths_of_the_entry_are_taken(tiny_base: Path) -> None:
    base = base_of(tiny_base, dimensions=(8, 16))
    assert embed_order(base, None, asked(dimensions=8), 64).pooling == "last"
    with pytest.raises(InvalidRequest) as caught:
        embed_order(base, None, asked(dimensions=9), 64)
    assert caught.value.code == "invalid_value" and caught.value.values["expected"] == "8, 16"


def test_texts_end_with_the_token_that_the_entry_names(tiny_base: Path) -> None:
    plain = embed_order(base_of(tiny_base), None, asked(), 64).texts
    ended = embed_order(base_of(tiny_base, end="<|endoftext|>"), None, asked(), 64).texts
    assert ended == [[*text, 0] for text in plain]
    with pytest.raises(Misconfigured):
        embed_order(base_of(tiny_base, end="<|nowhere|>"), None, asked(), 64)


def test_special_tokens_in_a_text_are_text(tiny_base: Path) -> None:
    (ids,) = embed_order(base_of(tiny_base), None, asked(inputs=("<|im_end|>",)), 64).texts
    assert len(ids) > 1
