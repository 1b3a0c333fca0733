"""The five examples of the guide, laid out as it prints them, with the faults that its own sample has."""

import json
from pathlib import Path

import pytest

from tests.unit.bad_rows import ASSISTANT, PIXEL, SYSTEM, USER, file
from tests.unit.test_datasets_check import LIMITS, checked
from tunewright.datasets.checking import documents
from tunewright.datasets.checking.check import check
from tunewright.datasets.mending import patches
from tunewright.datasets.mending.repair import Choice, Repaired, repair
from tunewright.datasets.report import Problem, Report

CHAT = file({"messages": [SYSTEM, USER, ASSISTANT]}, {"messages": [USER, ASSISTANT]})

# The comma behind the first content is one too many, the one between two messages is forgotten.
FUNCTION = """{
  "messages": [
    {
      "role": "system",
      "content": "You may use functions. 可以。",
    },
    {
      "role": "user",
      "content": "Turn 'listen' round?"
    },
    {
      "role": "assistant",
      "tool_calls": [
        {
          "id": "TX92Jm8Zi",
          "type": "function",
          "function": {
            "name": "turn_round",
            "arguments": "{\\"word\\": \\"listen\\"}"
          }
        }
      ]
    },
    {
      "role": "tool",
      "content": "{\\"turned\\": \\"netsil\\"}",
      "tool_call_id": "TX92Jm8Zi"
    }
    {
      "role": "assistant",
      "content": "It is 'netsil'."
    },
    {
      "role": "user",
      "content": "Well done."
    }
  ],
  "tools": [
    {
      "type": "function",
      "function": {
        "name": "turn_round",
        "description": "Turns a word round",
        "parameters": {
          "type": "object",
          "properties": {
            "word": {
              "type": "string",
              "description": "The word"
            }
          },
          "required": ["word"]
        }
      }
    }
  ]
}
"""


def generation(url: str) -> str:
    return (
        """{
  "messages": [{
    "role": "system",
    "content": "You draw."},
    {
      "role": "user",
      "content": "一只狗"
    },
    {
      "role": "assistant",
      "content": [{
        "type": "image_url",
        "image_url": {
          "url": "URL"
        }
      }]
    }]
}
"""
    ).replace("URL", url)


def understanding(url: str) -> str:
    return (
        """{
  "messages": [{
    "role": "system",
    "content": "You see."
  },
    {
      "role": "user",
      "content": "图里是什么"
    },
    {
      "role": "user",
      "content": [
        {
          "type": "image_url",
          "image_url": {
            "url": "URL"
          }
        }]
    },
    {
      "role": "assistant",
      "content": "A note"
    },
    {
      "role": "user",
      "content":"And then"
    },
    {
      "role": "assistant",
      "content": "Nothing."
    }]
}
"""
    ).replace("URL", url)


def repaired(tmp_path: Path, data: bytes, choice: Choice | None = None) -> tuple[bytes, Repaired, Report]:
    source, target = tmp_path / "source.jsonl", tmp_path / "target.jsonl"
    source.write_bytes(data)
    counts = repair(source, target, "fine-tune", LIMITS, choice or Choice())
    return target.read_bytes(), counts, check(target, "fine-tune", LIMITS)


def errors_of(report: Report) -> list[Problem]:
    return [problem for problem in report.problems if problem.severity == "error"]


def test_the_chat_examples_are_rows_as_they_stand(tmp_path: Path) -> None:
    report = checked(tmp_path, CHAT)
    assert (report.kind, report.ok, report.rows) == ("chat", True, 2)


@pytest.mark.parametrize("layout", ["as printed", "twice", "in a list", "with a mark", "CR LF"])
def test_the_function_example_is_pointed_at_and_mended(tmp_path: Path, layout: str) -> None:
    data = FUNCTION.encode()
    text = {
        "as printed": data,
        "twice": data + b"\n" + data,
        "in a list": b"[" + data.strip() + b",\n" + data.strip() + b"]\n",
        "with a mark": b"\xef\xbb\xbf" + data,
        "CR LF": data.replace(b"\n", b"\r\n"),
    }[layout]
    report = checked(tmp_path, text)
    first, *faults = errors_of(report)
    assert (first.code, first.line) == ("not_jsonl", None)
    assert first.patch is not None and first.patch.rewrite == "one_row_per_line"
    objects = 2 if layout in ("twice", "in a list") else 1
    assert [fault.values["reason"] for fault in faults] == ["trailing_comma", "comma"] * objects
    lines = text.split(b"\n")
    for fault in faults:
        assert fault.line is not None and fault.byte_offset is not None and fault.patch is not None
        begin = sum(len(line) + 1 for line in lines[: fault.line - 1])
        (edit,) = fault.patch.edits
        assert edit.offset == fault.byte_offset - begin
        assert f"line {fault.line}, column {fault.values['column']}: not valid JSON" in fault.text()
    comma, forgotten = faults[0], faults[1]
    assert comma.byte_offset == text.index("可以。".encode()) + len("可以。".encode()) + 1
    assert lines[(comma.line or 0) - 1].decode()[comma.values["column"] - 1] == ","
    before = text[: forgotten.byte_offset].replace(b"\r", b"")
    assert before.endswith(b'"tool_call_id": "TX92Jm8Zi"\n    }')
    for fault in faults:
        number = (fault.line or 0) - 1
        assert fault.patch is not None
        lines[number] = patches.apply(lines[number], fault.patch) or b""
    mended = b"\n".join(lines).decode("utf-8-sig")
    values = json.loads(mended if layout == "in a list" else "[" + mended.replace("\n\n{", ",{") + "]")
    assert [value.keys() for value in values] == [{"messages", "tools"}] * objects

    result, counts, after = repaired(tmp_path, text)
    assert counts == Repaired(objects, 0, 0)
    assert (after.kind, after.errors, after.rows) == ("function", 0, objects)
    row = json.loads(result.split(b"\n")[0])
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert row["messages"][2]["tool_calls"][0]["function"]["arguments"] == '{"word": "listen"}'


def test_the_trailing_turn_of_the_function_example_is_a_warning(tmp_path: Path) -> None:
    choice = Choice(codes=frozenset({"not_jsonl"}))
    _, _, after = repaired(tmp_path, FUNCTION.encode(), choice)
    assert after.ok and after.counts == {"few_rows": 1, "trailing_messages_ignored": 1}


@pytest.mark.parametrize("url", ["https://images.example.com/a.jpeg", f"data:image/png;base64,{PIXEL}", PIXEL])
@pytest.mark.parametrize(("form", "kind"), [(generation, "image_generation"), (understanding, "image_understanding")])
def test_the_image_examples_become_rows(tmp_path: Path, form: object, kind: str, url: str) -> None:
    text = form(url).encode()  # type: ignore[operator]
    report = checked(tmp_path, text)
    assert [problem.code for problem in errors_of(report)] == ["not_jsonl"]
    assert (report.kind, report.rows) == (kind, 1)
    result, counts, after = repaired(tmp_path, text)
    assert counts == Repaired(1, 0, 0)
    assert (after.kind, after.errors, result.count(b"\n")) == (kind, 0, 1)
    assert json.loads(result) == json.loads(text)


def test_faults_of_rules_have_their_line_inside_the_object(tmp_path: Path) -> None:
    text = CHAT_LAID_OUT.encode()
    report = checked(tmp_path, b"\n\n" + text)
    found = {problem.code: problem for problem in report.problems}
    role = found["invalid_role"]
    assert role.line == 2 + text[: text.index(b'"human"')].count(b"\n") + 1
    assert role.byte_offset == 2 + text.index(b'"human"')
    assert f"line {role.line}, messages[0].role" in role.text()
    missing = found["missing_field"]
    assert missing.byte_offset == 2 + text.index(b'{\n      "role": "assistant"')
    assert missing.pointer == "/messages/1/content"


CHAT_LAID_OUT = """{
  "messages": [
    {
      "content": "a \\" } ] x",
      "role": "human"
    },
    {
      "role": "assistant"
    }
  ]
}
"""


def split(text: str, limit: int = 10_000, piece: int | None = None) -> list[tuple[int, int, bytes | None]]:
    import io

    stream = io.BytesIO(text.encode())
    return [(document.line, document.byte_offset, document.data) for document in documents.read(stream, limit)]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1 << 18])
def test_objects_are_told_apart_whatever_the_pieces(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_PIECE_BYTES", piece)
    text = '[\n {"a": "}\\"{"},\n{"b": [1, {"c": "\\\\"}]}\n]\n{"d": 1} {"e": 2}\n'
    found = split(text)
    assert [data for _, _, data in found] == [b'{"a": "}\\"{"}', b'{"b": [1, {"c": "\\\\"}]}', b'{"d": 1}', b'{"e": 2}']
    assert [line for line, _, _ in found] == [2, 3, 5, 5]
    for _, offset, data in found:
        assert text.encode()[offset:].startswith(data or b"?")


def test_a_broken_object_does_not_swallow_the_next() -> None:
    text = '{\n  "a": [\n    1\n}\n{\n  "b": 2\n}\n{\n  "c": "x\n}\n{\n  "d": 4\n}\n'
    assert [line for line, _, _ in split(text)] == [1, 5, 8, 11]


def test_an_object_over_the_limit_is_named_and_passed_over() -> None:
    text = '{\n "a": "' + "x" * 1000 + '"\n}\n{\n "b": 1\n}\n'
    found = split(text, limit=100)
    assert [(line, data is None) for line, _, data in found] == [(1, True), (4, False)]


def test_what_stands_between_objects_is_not_lost(tmp_path: Path) -> None:
    report = checked(tmp_path, b'{\n "messages": []\n}\nhello\n{\n "messages": []\n}\n')
    junk = [problem for problem in report.problems if problem.code == "invalid_json"]
    assert [problem.line for problem in junk] == [4]
    assert report.counts["messages_empty"] == 2
