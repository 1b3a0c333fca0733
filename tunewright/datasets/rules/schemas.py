"""JSON schemas of tools' arguments: compiled once, checked in bounded time, and what they find told in our own words.

Nothing is ever fetched: a reference to another document is a fault of the schema. Patterns may backtrack a few thousand steps,
formats are not looked at. The library's own sentences quote values, so only its keyword and place are used.
"""

from typing import Any, NamedTuple

import msgspec

from tunewright.datasets.report import Path, field_name, shown
from tunewright.errors import quote
from tunewright.i18n import mark

MAX_SCHEMA_BYTES = 1 << 16
MAX_EXPANDED = 20_000
"""Parts of a schema with every reference written out."""
MAX_WORK = 1 << 28
"""Bytes of a schema times bytes of arguments; beyond it the arguments are not compared."""
_MAX_KEPT_BYTES = 1 << 23
_BACKTRACKS = 10_000


class Schema(NamedTuple):
    """A schema to compare arguments with. `size` is about its bytes with all references written out."""

    validator: Any
    size: int


class Fault(NamedTuple):
    """What is wrong: an English template and the values for its places (besides `line` and `field`), and where.

    `path` is inside the schema, or inside the arguments.
    """

    message: str
    values: dict[str, Any]
    path: Path


_kept: dict[bytes, Schema | Fault | None] = {}
_kept_bytes = 0


def compiled(raw: bytes) -> Schema | Fault | None:
    """The schema that these bytes of JSON are (an object of type "object", without recursive references).

    A Fault if it is no valid schema; None if it is too large to be worth it. Remembered by its bytes.
    """
    global _kept_bytes
    if len(raw) > MAX_SCHEMA_BYTES:
        return None
    if raw in _kept:
        return _kept[raw]
    if _kept_bytes > _MAX_KEPT_BYTES:
        _kept.clear()
        _kept_bytes = 0
    result = _kept[raw] = _compile(raw)
    _kept_bytes += len(raw) + 1000
    return result


def _compile(raw: bytes) -> Schema | Fault | None:
    import jsonschema_rs

    schema = msgspec.json.decode(raw)
    size = _expanded(schema) * max(1, len(raw) // 100) if b'"$ref"' in raw else len(raw)
    if size > MAX_EXPANDED * 100:
        return Fault(mark("line {line}, {field} is too large with all its references ($ref) written out"), {}, ())
    patterns = jsonschema_rs.FancyRegexOptions(backtrack_limit=_BACKTRACKS, size_limit=1 << 20)
    try:
        validator = jsonschema_rs.validator_for(schema, validate_formats=False, offline=True, pattern_options=patterns)
    except jsonschema_rs.ValidationError as error:
        path = tuple(error.instance_path)
        if error.kind.name == "$ref" or isinstance(error.kind, jsonschema_rs.ValidationErrorKind.Referencing):
            return Fault(
                mark("line {line}, {field} refers by $ref or $schema to something that is not in it"), {}, path
            )
        found = schema
        for part in path:
            found = found[part]
        sentence = mark("line {line}, {field} is {found}: not valid in a JSON schema")
        return Fault(sentence, {"found": shown(found)}, path)
    except (ValueError, RecursionError):
        return Fault(mark("line {line}, {field} is not a valid JSON schema"), {}, ())
    return Schema(validator, size)


def _expanded(schema: Any) -> int:
    """How many parts the schema has if every reference inside it is written out; references go in no circle."""
    sizes: dict[str, int] = {}

    def size_of(node: Any, depth: int = 0) -> int:
        if depth > 500:
            return MAX_EXPANDED * 100
        total = 1
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            total += size_of(child, depth + 1)
        if isinstance(node, dict) and isinstance(reference := node.get("$ref"), str):
            if reference not in sizes:
                sizes[reference] = size_of(_target(schema, reference), depth + 1)
            total += sizes[reference]
        return min(total, MAX_EXPANDED * 100)

    return size_of(schema)


def _target(schema: Any, reference: str) -> Any:
    """What a reference into the same document points at, or None."""
    node = schema
    for part in reference.removeprefix("#").split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict):
            node = node.get(part)
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            return None
    return node


def mismatch(schema: Schema, arguments: dict[str, Any], length: int) -> Fault | None:
    """The first place where `arguments` (of `length` bytes) do not keep the schema, or None.

    A required argument that is missing at the top is let pass: that has a warning of its own.
    """
    if schema.size * length > MAX_WORK:
        return None
    try:
        if schema.validator.is_valid(arguments):
            return None
        for i, error in enumerate(schema.validator.iter_errors(arguments)):
            name = error.kind.name
            if i >= 20:
                return None
            if (name == "required" and not error.instance_path) or name in _UNDECIDED:
                continue
            return _explained(error.kind, name, tuple(error.instance_path))
    except (ValueError, RecursionError):
        return None
    return None


_UNDECIDED = frozenset({"backtrackLimitExceeded", "regexEngineFailure", "format", "$ref"})


def _explained(kind: Any, name: str, path: Path) -> Fault:
    place = {"argument": quote(field_name(path)) if path else "{}"}
    if name == "type":
        sentence = mark("line {line}, {field}: {argument} must be of type {expected}, as the tool {name} says")
        return Fault(sentence, {**place, "expected": " | ".join(kind.types)}, path)
    if name == "enum":
        options = ", ".join(shown(option) for option in kind.options[:5]) + (", …" if len(kind.options) > 5 else "")
        sentence = mark("line {line}, {field}: {argument} must be one of {expected}, as the tool {name} says")
        return Fault(sentence, {**place, "expected": options}, path)
    if name == "required":
        sentence = mark("line {line}, {field}: {argument} lacks {absent}, which the tool {name} requires")
        return Fault(sentence, {**place, "absent": quote(kind.property)}, path)
    if name in ("additionalProperties", "unevaluatedProperties"):
        unexpected = ", ".join(quote(key) for key in kind.unexpected[:3])
        sentence = mark("line {line}, {field}: {argument} holds {unexpected}, which the tool {name} does not allow")
        return Fault(sentence, {**place, "unexpected": unexpected}, path)
    limit = getattr(kind, "limit", None)
    name = "additionalProperties" if name == "falseSchema" else name
    rule = name if limit is None else f"{name} {limit}"
    sentence = mark('line {line}, {field}: {argument} breaks the rule "{rule}" of the tool {name}')
    return Fault(sentence, {**place, "rule": rule}, path)
