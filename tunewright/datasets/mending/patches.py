"""Patches applied to one line: JSON Patch (add, remove, replace, move) on the row, or edits of its bytes."""

from typing import Any

import msgspec

from tunewright import strict_json
from tunewright.datasets.mending.broken_json import edited
from tunewright.datasets.report import Patch
from tunewright.errors import InvalidRequest, quote
from tunewright.i18n import mark


def apply(data: bytes, patch: Patch) -> bytes | None:
    """The line with its mend, or None if it is to be left out. There are newlines in it if it held several objects.

    Raises InvalidRequest(`patch_not_applicable`) if the patch is not for this line.
    """
    if patch.drop:
        return None
    if patch.rewrite is not None:
        return _rewritten(data, patch.rewrite)
    if patch.edits:
        edits = sorted(patch.edits, key=lambda edit: edit.offset)
        ends = [0, *(edit.offset + edit.length for edit in edits)]
        if any(edit.offset < end or edit.length < 0 for edit, end in zip(edits, ends, strict=False)) or ends[-1] > len(
            data
        ):
            raise _not_applicable()
        return edited(data, edits)
    try:
        row = strict_json.loads(data)
    except InvalidRequest:
        raise _not_applicable() from None
    for operation in patch.operations:
        row = _operated(row, operation)
    return msgspec.json.encode(row)


def _rewritten(data: bytes, name: str) -> bytes:
    """`utf8` for a line in GB18030; other rewrites are of whole files."""
    try:
        return data.decode().encode() if name != "utf8" else data.decode("gb18030").encode()
    except UnicodeDecodeError:
        raise _not_applicable() from None


def _not_applicable(where: object = "") -> InvalidRequest:
    sentence = mark("The patch does not fit the row: {place}.")
    return InvalidRequest("patch_not_applicable", sentence, place=quote(where))


def _operated(row: Any, operation: dict[str, Any]) -> Any:
    path = operation.get("path")
    name = operation.get("op")
    if name in ("add", "replace"):
        if "value" not in operation:
            raise _not_applicable(path)
        return _put(row, path, operation["value"], insert=name == "add")
    if name == "remove":
        _take(row, path)
        return row
    if name == "move":
        return _put(row, path, _take(row, operation.get("from")), insert=True)
    raise _not_applicable(name)


def _tokens(path: object) -> list[str]:
    if not isinstance(path, str) or (path and not path.startswith("/")):
        raise _not_applicable(path)
    return [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]


def _holder(row: Any, path: object) -> tuple[Any, str]:
    """The object or list in which the place is, and its last name."""
    tokens = _tokens(path)
    if not tokens:
        raise _not_applicable(path)
    node = row
    for token in tokens[:-1]:
        node = node[_index(node, token, path)] if isinstance(node, list) else _member(node, token, path)
    if not isinstance(node, (dict, list)):
        raise _not_applicable(path)
    return node, tokens[-1]


def _member(node: Any, token: str, path: object) -> Any:
    if not isinstance(node, dict) or token not in node:
        raise _not_applicable(path)
    return node[token]


def _index(node: list[Any], token: str, path: object, *, past_end: bool = False) -> int:
    if past_end and token == "-":
        return len(node)
    if not token.isascii() or not token.isdigit() or len(token) > 9 or int(token) >= len(node) + past_end:
        raise _not_applicable(path)
    return int(token)


def _put(row: Any, path: object, value: Any, *, insert: bool) -> Any:
    if path == "":
        return value
    node, token = _holder(row, path)
    if isinstance(node, list):
        index = _index(node, token, path, past_end=insert)
        node[index : index if insert else index + 1] = [value]
    elif insert or token in node:
        node[token] = value
    else:
        raise _not_applicable(path)
    return row


def _take(row: Any, path: object) -> Any:
    node, token = _holder(row, path)
    if isinstance(node, list):
        return node.pop(_index(node, token, path))
    value = _member(node, token, path)
    del node[token]
    return value
