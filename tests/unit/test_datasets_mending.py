"""Broken JSON: what is mended, what is left alone, and that neither takes long."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunewright import strict_json
from tunewright.datasets.mending import broken_json as mending
from tunewright.datasets.mending import patches


@pytest.mark.parametrize(
    ("text", "mended", "reasons"),
    [
        ('{"a": [1, ], }', '{"a": [1 ] }', ["trailing_comma", "trailing_comma"]),
        ('{"a": [{"b": 1} {"c": 2}]}', '{"a": [{"b": 1}, {"c": 2}]}', ["comma"]),
        ('{"a": [1, [2] [3]]}', '{"a": [1, [2], [3]]}', ["comma"]),
        ('{"a": "x" "b": 1}', '{"a": "x", "b": 1}', ["comma"]),
        ("{'a': 'it', \"b\": \"it's\"}", '{"a": "it", "b": "it\'s"}', ["single_quotes", "single_quotes"]),
        ("{'a': '{\"b\": 1}', 'c': 'don\\'t'}", '{"a": "{\\"b\\": 1}", "c": "don\'t"}', ["single_quotes"] * 4),
        ('{"a": True, "b": None, "c": FALSE}', '{"a": true, "b": null, "c": false}', ["python_word"] * 3),
        ('{"a": 1} // why', '{"a": 1} ', ["comment"]),
        ('{"a": /* why */ 1, # so\n"b": 2}', '{"a":  1, \n"b": 2}', ["comment", "comment"]),
        ('{"a": "x\ty\nz"}', '{"a": "x\\ty\\nz"}', ["control_character", "control_character"]),
        ('{"a": "x\x01汉\x1f"}', '{"a": "x\\u0001汉\\u001f"}', ["control_character", "control_character"]),
        ('\ufeff{"a": 1}', '{"a": 1}', ["byte_order_mark"]),
        ('{a: 1, b_2 : 2}', '{"a": 1, "b_2" : 2}', ["key", "key"]),
        ("{“a”：“你好”，\"b\": 1}", '{"a":"你好","b": 1}', ["single_quotes", "colon", "single_quotes", "comma"]),
        ('{"a": "it\\\'s"}', '{"a": "it\'s"}', ["escape"]),
        ('{"a": 1}{"b": 2} {"c": 3}', '{"a": 1}\n{"b": 2}\n{"c": 3}', ["trailing_data", "trailing_data"]),
        ('{"a": 1}, {"b": 2},', '{"a": 1}\n{"b": 2}', ["trailing_data", "trailing_data"]),
    ],
)  # fmt: skip
def test_faults_with_one_reading_are_mended(text: str, mended: str, reasons: list[str]) -> None:
    data = text.encode()
    patch = mending.mend(data)
    assert patch is not None
    result = patches.apply(data, patch)
    assert result is not None and result.decode() == mended
    assert [fault.reason for fault in mending.faults(data)] == reasons
    assert set(reasons) <= strict_json.SYNTAX_SENTENCES.keys()
    if "#" not in text:
        for line in result.split(b"\n"):
            strict_json.loads(line)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": "He said "hi" to"}',
        '{"a": "x""y"}',
        "{'a': 'it's'}",
        "{'a': 'x', b', 'c'}",
        '{"a": [1',
        '{"a": "x',
        '{"a": 1}}',
        '{"a" 1}',
        "[1,,2]",
        '{"a": NaN, }',
        '{"a": undefined}',
        '{"a": "\\ud800", }',
        '{"a": "\x00", }',
        '{"a": 1, "a": 2, }',
        '{"a": \\beta, }',
        '{"a": "\\alpha", }',
        '{"a": {"b": 1} {"c": 2}}',
        '{"a": 1} hello',
        '{"a": 01}',
        "",
        "hello",
        '{"a": 1}',
    ],
)
def test_what_may_mean_several_things_is_left_alone(text: str) -> None:
    assert mending.mend(text.encode()) is None
    assert mending.mend(b"\xff" + text.encode()) is None


def test_a_patch_has_at_most_so_many_edits() -> None:
    enough = "[" + "[1,]," * (mending.MAX_EDITS - 1) + "1,]"
    patch = mending.mend(enough.encode())
    assert patch is not None and len(patch.edits) == mending.MAX_EDITS
    assert mending.mend(("[" + "[1,]," * mending.MAX_EDITS + "1,]").encode()) is None


_BIG = 4 * 10**6


@pytest.mark.parametrize(
    "text",
    [
        '{"a":[' + "1," * (_BIG // 2) + "1],}",
        '{"a":["' + "x\\\\" * (_BIG // 3),
        '{"a":"' + "x" * _BIG,
        "[" * _BIG,
        "/*" * (_BIG // 2),
        "'" * _BIG,
        "“" * (_BIG // 3),
        '"' + "\\'" * (_BIG // 2) + '",',
        '{"a":"' + "\x01" * _BIG + '"}',
        "[" + "'a\\" * (_BIG // 3),
        '{"a":1 ' + "//x\n" * (_BIG // 4) + "}",
        "{" + "a" * _BIG + "}",
        '{"a":[' + '{"b":1,},' * 400_000 + "],}",
        " " * _BIG + ",",
    ],
    ids=lambda text: text[:9].encode("unicode_escape").decode(),
)
def test_the_worst_lines_of_4_mb_end_soon(text: str) -> None:
    start = time.perf_counter()
    mending.mend(text.encode())
    assert time.perf_counter() - start < 30  # about one second; a slip into quadratic time takes minutes


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(alphabet="ab 汉,:{}[]", max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet="abc", max_size=3), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=300)
@given(st.lists(_VALUES, min_size=1, max_size=3).map(lambda items: {"k": items}))
def test_a_row_written_as_python_is_the_row_again(value: object) -> None:
    data = repr(value).encode()
    patch = mending.mend(data)
    assert patch is not None
    assert json.loads(patches.apply(data, patch) or b"") == value


_SCRAPS = ["{", "}", "[", "]", ",", ":", '"a"', "'b'", " ", "1", "true", "None", "//x", "\n", "“c”", '"', "\\"]


@settings(max_examples=500)
@given(st.lists(st.sampled_from(_SCRAPS), max_size=14))
def test_what_is_offered_is_valid(parts: list[str]) -> None:
    data = "".join(parts).encode()
    patch = mending.mend(data)
    if patch is None:
        return
    result = patches.apply(data, patch)
    assert result is not None
    try:
        strict_json.loads(result)
    except Exception:
        for line in result.split(b"\n"):
            strict_json.loads(line)


@settings(max_examples=200)
@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_bytes_are_survived(data: bytes) -> None:
    mending.mend(data)
