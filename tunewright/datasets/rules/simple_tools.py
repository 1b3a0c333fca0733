"""Tools of the form that nearly all have, understood without a validator: typed properties, what is required, choices, bounds.

What is taken here is beyond doubt: `tools.check_tools` would find nothing to say of such tools, nor `schemas.mismatch` of such
arguments. What is not taken may be right all the same. A property test compares.
"""

from typing import Any, Literal, Union

import msgspec
from msgspec import UNSET, UnsetType

from tunewright import strict_json
from tunewright.datasets.rules.tools import MAX_TOOLS, NAME

MAX_BYTES = 1 << 15
_MAX_DEPTH = 4
"""Of schemas inside the schema of a tool."""
_EXACT = 1 << 53
"""Numbers beyond it are left to the validator."""
_Scalar = str | int | float | bool | None
_Type = Literal["string", "number", "integer", "boolean", "array", "object", "null"]


class _Schema(msgspec.Struct, forbid_unknown_fields=True):
    """A JSON schema of these keywords and no others."""

    type: _Type | list[_Type] | UnsetType = UNSET
    properties: dict[str, "_Schema"] | UnsetType = UNSET
    required: list[str] = []
    enum: list[str] | UnsetType = UNSET
    items: Union["_Schema", UnsetType] = UNSET
    minimum: int | float | UnsetType = UNSET
    maximum: int | float | UnsetType = UNSET
    minItems: int = 0
    maxItems: int = 1 << 30
    # Whether arguments may have more than `properties` is left to the validator; the others say nothing of what is valid.
    additionalProperties: bool | UnsetType = UNSET
    description: str | UnsetType = UNSET
    title: str | UnsetType = UNSET
    default: _Scalar | UnsetType = UNSET
    examples: list[_Scalar] | UnsetType = UNSET
    format: str | UnsetType = UNSET
    deprecated: bool | UnsetType = UNSET


class _Function(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    description: str | UnsetType | None = UNSET
    parameters: _Schema | UnsetType = UNSET
    strict: bool | UnsetType = UNSET


class _Tool(msgspec.Struct, forbid_unknown_fields=True):
    function: _Function
    type: Literal["function"] | UnsetType = UNSET


def known_tools(data: bytes, value: object) -> "dict[str, Arguments] | None":
    """Name of each tool -> the arguments it takes; `data` is what `value` was read from. None: ask `tools.check_tools`.

    Whether `data` is the JSON that `strict_json` wants is in part for the caller to say: its quotes are not counted here.
    """
    if len(data) > MAX_BYTES or b'"$' in data or strict_json.has_long_number(data):
        return None
    try:
        tools = msgspec.convert(value, list[_Tool])
    except msgspec.ValidationError:
        return None
    if len(tools) > MAX_TOOLS:
        return None
    found: dict[str, Arguments] = {}
    for tool in tools:
        function = tool.function
        schema = function.parameters
        if schema is UNSET or not NAME.fullmatch(function.name) or not _is_known(schema):
            return None
        if schema.type is not UNSET and schema.type != "object":
            return None
        found[function.name] = Arguments(schema)
    return found if len(found) == len(tools) else None


def _is_known(schema: _Schema, depth: int = 0) -> bool:
    """Whether it is a valid schema, and not a deep one."""
    if depth > _MAX_DEPTH or len(set(schema.required)) < len(schema.required):
        return False
    if isinstance(schema.type, list) and not 0 < len(set(schema.type)) == len(schema.type):
        return False
    if not (0 <= schema.minItems < _EXACT and 0 <= schema.maxItems < _EXACT):
        return False
    if not all(bound is UNSET or -_EXACT < bound < _EXACT for bound in (schema.minimum, schema.maximum)):
        return False
    inner = [] if schema.properties is UNSET else list(schema.properties.values())
    if schema.items is not UNSET:
        inner.append(schema.items)
    return all(_is_known(each, depth + 1) for each in inner)


_decode = msgspec.json.decode
_encode = msgspec.json.encode


class Arguments:
    """What a tool takes."""

    __slots__ = ("_plain", "_required", "_schemas", "_takes_numbers")

    def __init__(self, schema: _Schema) -> None:
        self._schemas: dict[str, _Schema] = {} if schema.properties is UNSET else schema.properties
        self._required = frozenset(schema.required)
        self._plain = {
            name: str for name, each in self._schemas.items() if each.type == "string" and each.enum is UNSET
        }
        """Of most properties the type is all there is to say."""
        self._takes_numbers = b'"number"' in _encode(schema)

    def take(self, text: str) -> bool:
        """Whether `text` is an object in strict JSON that keeps the schema. False may mean: not sure."""
        try:
            value = _decode(text)
        except (msgspec.DecodeError, RecursionError):
            return False
        if type(value) is not dict or not value.keys() >= self._required:
            return False
        plain, quotes = self._plain, 0
        for key, each in value.items():
            if plain.get(key) is type(each):
                quotes += 4
                continue
            schema = self._schemas.get(key)
            if schema is None or not _fits(schema, each):
                return False
        # Depth and number of keys are bounded by the schema, and integers by `_is_between`.
        if self._takes_numbers and strict_json.has_long_number(text.encode()):
            return False
        if quotes == 4 * len(value) and "\\" not in text:
            return text.count('"') == quotes
        # A repeated key was dropped, and its quotes with it.
        return "\\u00" not in text and text.count('"') == _encode(value).count(b'"')


def _fits(schema: _Schema, value: Any) -> bool:
    """Whether `value` keeps the schema."""
    if schema.enum is not UNSET and value not in schema.enum:
        return False
    kinds = schema.type
    if kinds is UNSET:
        return schema.enum is not UNSET  # a text, then
    if isinstance(kinds, str):
        kinds = (kinds,)
    kind = type(value)
    if kind is str:
        return "string" in kinds
    if kind is int or kind is float:
        return ("number" in kinds or (kind is int and "integer" in kinds)) and _is_between(schema, value)
    if kind is list:
        return "array" in kinds and _is_list(schema, value)
    if kind is dict:
        return "object" in kinds and _is_object(schema, value)
    return ("null" if value is None else "boolean") in kinds


def _is_between(schema: _Schema, value: float) -> bool:
    least = -_EXACT if schema.minimum is UNSET else schema.minimum
    most = _EXACT if schema.maximum is UNSET else schema.maximum
    return least <= value <= most


def _is_list(schema: _Schema, value: list[Any]) -> bool:
    items = schema.items
    if items is UNSET or not schema.minItems <= len(value) <= schema.maxItems:
        return False
    return all(_fits(items, each) for each in value)


def _is_object(schema: _Schema, value: dict[str, Any]) -> bool:
    properties = schema.properties
    if properties is UNSET or not value.keys() >= set(schema.required):
        return False
    return all(key in properties and _fits(properties[key], each) for key, each in value.items())
