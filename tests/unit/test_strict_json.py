"""Strict JSON: what is refused, where it says it is, and that the short cut never disagrees with the rule."""

import json
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunewright import strict_json
from tunewright.errors import InvalidRequest

GOOD = {
    "object": (b'{"a": [1, 2.5, true, false, null, "x"]}', {"a": [1, 2.5, True, False, None, "x"]}),
    "surrogate pair": (rb'"\ud83d\ude00"', "😀"),
    "escaped backslash before u0000": (rb'"\\u0000"', r"\u0000"),
    "escaped backslash before ud800": (rb'"\\ud800 \u0041"', r"\ud800 A"),
    "quotes and backslashes": (rb'{"a\"\\": "\\\"\\"}', {'a"\\': '\\"\\'}),
    "quote as a unicode escape": (rb'{"\u0022": "\u005c"}', {'"': "\\"}),
    "line separators inside a text": ('"\u2028\u2029\x85"'.encode(), "\u2028\u2029\x85"),
    "whole number over 64 bits": (b"18446744073709551617", 18446744073709551617),
    "32 characters": (b"[" + b"1" * 32 + b"]", [int("1" * 32)]),
    "long digits in a text": (b'"' + b"7" * 500 + b'"', "7" * 500),
    "depth 32": (b"[" * 32 + b"]" * 32, json.loads("[" * 32 + "]" * 32)),
    "brackets in a text": (b'"' + b"[{" * 500 + b'"', "[{" * 500),
    "brackets and quotes in a text": (rb'["' + rb"\"[{" * 500 + b'"]', ['"[{' * 500]),
    "wide but flat": (b"[" + b",".join([b'{"a":[]}'] * 500) + b"]", [{"a": []}] * 500),
    "many objects": (b"[" + b",".join([b'{"a":1}'] * 10_001) + b"]", [{"a": 1}] * 10_001),
    "same key on two levels": (b'{"a": {"a": 1}}', {"a": {"a": 1}}),
    "white space around": (b" \t\r\n1\n", 1),
    "smallest float": (b"1e-999", 0.0),
}

BAD = {
    "empty": (b"", "invalid_json", {"reason": "empty", "line": 1, "column": 1}),
    "blank": (b" \n ", "invalid_json", {"reason": "empty"}),
    "cut off in an object": (b'{"a": 1', "invalid_json", {"reason": "cut_off", "column": 8}),
    "cut off in a text": (b'{"a": "x', "invalid_json", {"reason": "cut_off", "column": 7}),
    "cut off in an escape": (rb'"\u12', "invalid_json", {}),
    "brace alone": (b"{", "invalid_json", {"reason": "cut_off"}),
    "trailing data": (b'{"a": 1} {"b": 2}', "invalid_json", {"reason": "trailing_data", "column": 10}),
    "trailing bracket": (b"{}]", "invalid_json", {"reason": "trailing_data"}),
    "trailing comma in a list": (b"[1,]", "invalid_json", {"reason": "trailing_comma"}),
    "trailing comma in an object": (b'{"a": 1, }', "invalid_json", {"reason": "trailing_comma"}),
    "single quotes": (b"{'a': 1}", "invalid_json", {"reason": "single_quotes", "column": 2}),
    "single quotes of a value": (b"{\"a\": 'x'}", "invalid_json", {"reason": "single_quotes", "column": 7}),
    "comment at the start": (b"// x\n{}", "invalid_json", {"reason": "comment"}),
    "comment inside": (b'{"a": 1, # x\n"b": 2}', "invalid_json", {"reason": "comment"}),
    "comment after": (b"{} // x", "invalid_json", {"reason": "comment"}),
    "True": (b'{"a": True}', "invalid_json", {"reason": "python_word", "found": "True", "column": 7}),
    "None": (b"[None]", "invalid_json", {"reason": "python_word", "found": "None"}),
    "no quotes around a key": (b"{a: 1}", "invalid_json", {"reason": "key"}),
    "no colon": (b'{"a" 1}', "invalid_json", {"reason": "colon"}),
    "quote inside a text": (b'{"a": "he said "no""}', "invalid_json", {"reason": "comma"}),
    "no comma on line 2": (b'{"a": 1\n"b": 2}', "invalid_json", {"reason": "comma", "line": 2, "column": 1}),
    "raw line break": (b'"a\nb"', "invalid_json", {"reason": "control_character", "line": 1, "column": 3}),
    "raw NUL": (b'"a\0b"', "invalid_json", {"reason": "control_character"}),
    "unknown escape": (rb'"\x41"', "invalid_json", {"reason": "escape"}),
    "byte order mark": (b"\xef\xbb\xbf{}", "invalid_json", {"reason": "byte_order_mark"}),
    "leading zero": (b"[01]", "invalid_json", {}),
    "bare point": (b"[.5]", "invalid_json", {"reason": "value"}),
    "column in characters, offset in bytes": (
        '["汉字", x]'.encode(), "invalid_json", {"reason": "value", "column": 8, "offset": 11},
    ),
    "NaN": (b"[NaN]", "invalid_number", {"number": "NaN"}),
    "Infinity": (b'{"a": Infinity}', "invalid_number", {"number": "Infinity"}),
    "minus Infinity": (b"-Infinity", "invalid_number", {"number": "-Infinity"}),
    "1e999": (b"[1e999]", "invalid_number", {"number": "1e999"}),
    "minus 1e999": (b"[-1e999]", "invalid_number", {}),
    "33 digits": (b"1" * 33, "invalid_number", {"length": 33, "limit": 32}),
    "33 characters of a float": (b"0." + b"1" * 31, "invalid_number", {"length": 33}),
    "5,000 digits": (b"9" * 5000, "invalid_number", {"length": 5000}),
    "depth 33": (b"[" * 33 + b"]" * 33, "nesting_too_deep", {"limit": 32}),
    "depth 33 of objects": (b'{"a":' * 33 + b"1" + b"}" * 33, "nesting_too_deep", {}),
    "depth 33 after siblings": (b"[" + b"[]," * 99 + b"[" * 32 + b"]" * 33, "nesting_too_deep", {}),
    "depth 100,000 closed": (b"[" * 100_000 + b"]" * 100_000, "nesting_too_deep", {}),
    "depth 100,000 open": (b"[" * 100_000, "nesting_too_deep", {}),
    "depth 100,000 of objects": (b'{"a":' * 100_000, "nesting_too_deep", {}),
    "duplicate key": (b'{"a": 1, "a": 2}', "duplicate_key", {"key": "a"}),
    "duplicate key, same value": (b'{"a": 1, "a": 1}', "duplicate_key", {}),
    "duplicate key deep down": (b'[{"x": [{"b": 1, "c": "\\\\", "b": 2}]}]', "duplicate_key", {"key": "b"}),
    "duplicate key by an escape": (rb'{"a": 1, "\u0061": 2}', "duplicate_key", {}),
    "duplicate empty key": (b'{"": 1, "": 2}', "duplicate_key", {"key": ""}),
    "duplicate key beside quotes in texts": (rb'{"k": "\"\"", "k": "\\\"\\"}', "duplicate_key", {}),
    "10,001 keys": (
        json.dumps({f"k{i}": i for i in range(10_001)}).encode(), "too_many_fields", {"found": 10_001, "limit": 10_000},
    ),
    "lone high surrogate": (rb'"\ud800"', "invalid_unicode", {"reason": "lone_surrogate", "line": 1, "column": 2}),
    "lone low surrogate": (rb'"x\udc00"', "invalid_unicode", {"column": 3, "offset": 2}),
    "two high surrogates": (rb'"\ud800\ud800"', "invalid_unicode", {}),
    "pair that is none": (rb'"\\ud83d\ude00"', "invalid_unicode", {"reason": "lone_surrogate", "column": 9}),
    "surrogate in a key": (rb'{"\udfff": 1}', "invalid_unicode", {}),
    "NUL": (rb'{"a": "x\u0000"}', "invalid_unicode", {"reason": "nul", "column": 9}),
    "NUL after a backslash": (rb'"\\\u0000"', "invalid_unicode", {"reason": "nul", "column": 4}),
    "byte that is not UTF-8": (b'{"a":\n"\xff"}', "invalid_unicode", {"offset": 7, "line": 2, "reason": "not_utf8"}),
    "surrogate in UTF-8": (b'"\xed\xa0\x80"', "invalid_unicode", {"offset": 1}),
    "overlong slash": (b'"\xc0\xaf"', "invalid_unicode", {"offset": 1}),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "invalid_unicode", {"offset": 0}),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_good_text_is_read(name: str) -> None:
    data, expected = GOOD[name]
    assert strict_json.loads(data) == expected


@pytest.mark.parametrize("name", BAD)
def test_bad_text_is_refused_with_its_code_and_place(name: str) -> None:
    data, code, values = BAD[name]
    with pytest.raises(InvalidRequest) as caught:
        strict_json.loads(data)
    assert (caught.value.code, {k: caught.value.values.get(k) for k in values}) == (code, values)
    english, chinese = caught.value.text("en"), caught.value.text("zh")
    assert "{" not in english and english != chinese, "each sentence fills its places and has a Chinese one"
    assert len(english) < 250


def test_bombs_of_8_megabytes_are_refused_quickly() -> None:
    size = 8 * 2**20
    bombs = [b"[" * size, b"]" * size, b'{"a":' * (size // 5), b'"' + b"\\" * size, b'"' * size, b"[" + b"9" * size]
    for bomb in bombs:
        start = time.thread_time()
        with pytest.raises(InvalidRequest):
            strict_json.loads(bomb)
        assert time.thread_time() - start < 3.0, bomb[:6]


def test_max_depth_is_a_parameter() -> None:
    assert strict_json.loads(b"[[1]]", max_depth=2) == [[1]]
    with pytest.raises(InvalidRequest, match="nesting_too_deep"):
        strict_json.loads(b"[[1]]", max_depth=1)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
)
_FRAGMENTS = st.sampled_from(
    (
        *('{"a":1', ',"a":2}', "}", "[", "]", ",", ":", '"', "\\", "\\\\", '\\"', "\\u0000", "\\ud800", "\\udc00"),
        *("u0061", "\\u0022", "\\u00e9", "1", "-0", "1e999", "NaN", "0" * 20, "9" * 33, " ", "\n", "\x00", "true", "x"),
        *("汉", '{"":[', "]}", ',"\\u0061":"\\u0022\\u0022"}', "1." + "1" * 31, "[" * 33 + "]" * 33),
    )
)


def _outcome(read: object, data: bytes) -> object:
    try:
        return read(data)  # type: ignore[operator]
    except InvalidRequest as error:
        return (error.code, error.values)


@settings(max_examples=300)
@given(st.one_of(st.binary(max_size=40), st.lists(_FRAGMENTS, max_size=12).map(lambda parts: "".join(parts).encode())))
def test_the_short_cut_agrees_with_the_rule_on_any_bytes(data: bytes) -> None:
    # repr tells 1 from 1.0 and -0.0 from 0.0, which == does not.
    assert repr(_outcome(strict_json.loads, data)) == repr(
        _outcome(lambda d: strict_json._decide(d, strict_json.MAX_DEPTH), data)
    )


@settings(max_examples=200)
@given(_VALUES, st.booleans())
def test_what_json_writes_is_read_back(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    if "\\u0000" in text or any(len(str(n)) > 32 for n in _numbers(value)):
        return
    assert strict_json.loads(text.encode()) == value


def _numbers(value: object) -> list[float]:
    if isinstance(value, dict):
        return [n for child in value.values() for n in _numbers(child)]
    if isinstance(value, list):
        return [n for child in value for n in _numbers(child)]
    return [value] if isinstance(value, (int, float)) and math.isfinite(value) else []
