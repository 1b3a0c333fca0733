"""Text to token ids and back, on the `tokenizers` library alone."""

import codecs
import json
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Protocol

from tokenizers import Tokenizer

from tunewright.errors import Misconfigured
from tunewright.i18n import mark
from tunewright.rendering.template import template_unsupported


class StreamDecoder(Protocol):
    """Ids to text, one by one. The pieces joined equal `decode` of all ids."""

    def push(self, token_id: int) -> str:
        """The text that is certain now: whole characters, perhaps none."""
        ...

    def flush(self) -> str:
        """What is left at the end."""
        ...


class Tokens:
    """A tokenizer with two ways to read text: a template's, where control tokens count, and a user's, where they are text.

    `control` are the texts of added tokens that must never come from a user (the special ones and those that the
    template writes itself). Raises Misconfigured `model_folder_incomplete` for a file that is no tokenizer.
    """

    def __init__(self, tokenizer_json: str, template_text: str) -> None:
        try:
            description = json.loads(tokenizer_json)
            added = {token["content"]: token for token in description.get("added_tokens") or []}
            self.control = frozenset(
                text for text, token in added.items() if token["special"] or (text.strip() and text in template_text)
            )
            self._first = _tokenizer(description)
            inner = description | {"normalizer": _no_prefix(description.get("normalizer"))}
            inner["pre_tokenizer"] = _no_prefix(description.get("pre_tokenizer"))
            self._control = _tokenizer(inner) if inner != description else self._first
            kept = [token for text, token in added.items() if text not in self.control]
            self._plain = _tokenizer(inner | {"added_tokens": kept})
        # The library raises bare Exception for a file that it can't read.
        except Exception as error:
            raise Misconfigured(
                "model_folder_incomplete",
                mark("The model folder {folder} has no readable {name}."),
                folder="",
                name="tokenizer.json",
            ) from error
        self._special_ids = frozenset(token["id"] for token in added.values() if token["special"])
        self._control_ids = frozenset(added[text]["id"] for text in self.control)
        self._byte_level = _is_byte_level(description.get("decoder"))
        self._first_encoded = lru_cache(64)(lambda text: tuple(_ids(self._first, text)))
        self._template_encoded = lru_cache(4096)(lambda text: tuple(_ids(self._control, text)))
        self._bytes: dict[int, bytes] = {}
        vocabulary = self._first.get_vocab(with_added_tokens=True)
        self.vocabulary_size = max(vocabulary.values(), default=-1) + 1
        self.longest = max(map(len, vocabulary), default=1)

    def id_of(self, token: str) -> int | None:
        """The id of a token's text, None if the vocabulary lacks it."""
        return self._first.token_to_id(token)

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` leaves the token out."""
        return token_id in self._special_ids

    def template_ids(self, text: str, *, first: bool = False) -> tuple[int, ...]:
        """Ids of template text. `first`: it opens the sequence, where some tokenizers put a space before the text."""
        if first:
            return self._first_encoded(text)
        # Long pieces hold tool schemas, which differ from request to request.
        return self._template_encoded(text) if len(text) <= 256 else tuple(_ids(self._control, text))

    def plain_ids(self, text: str) -> list[int]:
        """Ids of a user's text: no control token is among them, whatever the text says."""
        ids = _ids(self._plain, text)
        if self._control_ids.isdisjoint(ids):
            return ids
        # A vocabulary that holds a control token as an ordinary word gives it back from plain text too:
        # character by character it can't.
        ids = [i for character in text for i in _ids(self._plain, character)]
        if self._control_ids.isdisjoint(ids):
            return ids
        raise template_unsupported(
            mark("The chat template of this base can't be used: its vocabulary makes control tokens of plain text.")
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Text without special tokens."""
        return self._first.decode(list(ids), skip_special_tokens=True)

    def stream_decoder(self) -> StreamDecoder:
        """A fresh decoder for one answer."""
        return _ByteDecoder(self) if self._byte_level else _WindowDecoder(self)

    def pieces(self, ids: Iterable[int]) -> list[str | None]:
        """The text of each token, special ones as they are written. A character of several tokens stands at the first of
        them, the others have None. Joined: the whole text."""
        found: list[str | None] = []
        decoder = self.stream_decoder()
        begun = 0
        for token_id in ids:
            special = self.is_special(token_id)
            text = decoder.flush() if special else decoder.push(token_id)
            if special and begun < len(found):
                found[begun] = text
            found.append(self._first.id_to_token(token_id) if special else None)
            if special or text:
                if not special:
                    found[begun] = text
                begun = len(found)
        if begun < len(found):
            found[begun] = decoder.flush()
        return found

    def written(self, token_id: int) -> bytes:
        """The bytes that a token stands for wherever it occurs, special ones as they are written."""
        if self._byte_level and not self.is_special(token_id):
            return self.bytes_of(token_id)
        token = self._first.id_to_token(token_id) or ""
        one_byte = _ONE_BYTE.fullmatch(token)
        return bytes([int(one_byte[1], 16)]) if one_byte else token.replace("\u2581", " ").encode()

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token of a byte-level vocabulary stands for; b'' for special and unknown ids."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._look_up(token_id)
        return known

    def _look_up(self, token_id: int) -> bytes:
        token = None if token_id in self._special_ids else self._first.id_to_token(token_id)
        if token is None:
            return b""
        if all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        return token.encode()


class _ByteDecoder:
    """Bytes of each token through an incremental UTF-8 decoder: constant work per token."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._tokens.bytes_of(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """For other vocabularies: text of a short window, with and without the newest tokens.

    The window starts with the last character already shown, because a token's spacing depends on its neighbour.
    """

    _LONGEST_CHARACTER = 4

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._shown: list[int] = []
        self._waiting: list[int] = []

    def push(self, token_id: int) -> str:
        if self._tokens.is_special(token_id):
            return ""
        self._waiting.append(token_id)
        text = self._new_text()
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._waiting) < self._LONGEST_CHARACTER:
            return ""
        return self._take(text)

    def flush(self) -> str:
        return self._take(self._new_text())

    def _new_text(self) -> str:
        before = self._tokens.decode(self._shown)
        return self._tokens.decode([*self._shown, *self._waiting])[len(before) :]

    def _take(self, text: str) -> str:
        # Whole characters only, or the window would begin inside one. A token without text (a space that the decoder
        # strips from the beginning) can't stand alone.
        self._shown = self._waiting if text else [*self._shown, *self._waiting]
        self._waiting = []
        return text


def _tokenizer(description: dict[str, Any]) -> Tokenizer:
    # The template writes bos itself and lengths are ours to decide, so these three parts stay out.
    bare = description | {"post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(bare))


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids if text else []


def _no_prefix(step: Any) -> Any:
    """A normalizer or pre-tokenizer without the invented space before the text, for text inside a sequence."""
    if not isinstance(step, dict):
        return step
    if step.get("type") == "Prepend":
        return None
    changed = dict(step)
    if "add_prefix_space" in changed:
        changed["add_prefix_space"] = False
    if "prepend_scheme" in changed:
        changed["prepend_scheme"] = "never"
    for key in ("normalizers", "pretokenizers"):
        if key in changed:
            changed[key] = [kept for part in changed[key] if (kept := _no_prefix(part)) is not None]
    return changed


def _is_byte_level(decoder: Any) -> bool:
    if not isinstance(decoder, dict):
        return False
    parts = decoder.get("decoders") or [decoder]
    return len(parts) == 1 and parts[0].get("type") == "ByteLevel"


def _byte_characters() -> dict[str, int]:
    """The alphabet of byte-level vocabularies: printable Latin-1 stands for itself, other bytes for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_characters()
_ONE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""How vocabularies that fall back to bytes write one of them; a U+2581 there is a space."""
