"""`tunewright datasets ...` as a person runs it: on files, in both languages, with wrong input."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner, Result

from tests.unit.bad_rows import ASSISTANT, GOOD, USER
from tunewright.cli import app
from tunewright.models.catalogue import Catalogue
from tunewright.settings import HomeFolder

PAIR = {"prompt": USER["content"], "completion": ASSISTANT["content"]}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The commands run here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("TUNEWRIGHT_LANGUAGE", raising=False)
    return tmp_path


def run(*words: str, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["datasets", *words])
    assert result.exit_code == exit_code, (result.output, result.stderr, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def lines(*rows: object) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def put(name: str, data: bytes) -> str:
    Path(name).write_bytes(data)
    return name


def rows(name: str) -> list[Any]:
    return [json.loads(line) for line in Path(name).read_bytes().splitlines()]


def turns(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


BAD = {"messages": [{"role": "usr", "content": "Hi"}, ASSISTANT]}


# validate


def test_a_sound_file_is_found_so_in_both_languages() -> None:
    put("rows.jsonl", lines(*[turns(f"question {i}", "answer") for i in range(120)]))
    english = run("validate", "rows.jsonl").stdout
    assert "rows.jsonl" in english
    assert "chat · rows: 120" in english
    assert "✓ The file can be used. Errors: 0" in english
    assert "文件可以使用" in run("validate", "rows.jsonl", "--language", "zh").stdout


def test_the_language_of_the_settings_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEWRIGHT_LANGUAGE", "zh")
    assert "没有文件" in run("validate", "nothing.jsonl", exit_code=2).stderr
    assert "There is no file" in run("validate", "nothing.jsonl", "--language", "en", exit_code=2).stderr


def test_problems_are_grouped_with_their_places() -> None:
    put("rows.jsonl", lines(GOOD, BAD, turns("a", "b"), {**BAD, "tools": []}))
    shown = run("validate", "rows.jsonl", exit_code=1).stdout
    table = " ".join(shown.split())
    assert "✗ 2 invalid_role" in table
    assert 'line 2, messages[0].role is "usr"' in table
    assert "also in lines 4" in table
    assert "2 of 4 rows can't be used. Errors: 2" in table
    assert max(len(line) for line in shown.splitlines()) <= 80
    assert "还有第 4 行" in run("validate", "rows.jsonl", "--language", "zh", exit_code=1).stdout


def test_json_is_the_object_of_the_api() -> None:
    put("rows.jsonl", lines(GOOD, BAD))
    shown = json.loads(run("validate", "rows.jsonl", "--json", exit_code=1).stdout)
    assert (shown["object"], shown["kind"], shown["rows"], shown["status"]) == ("dataset", "chat", 2, "error")
    assert shown["filename"] == "rows.jsonl"
    assert shown["report"]["counts"]["invalid_role"] == 1
    problem = shown["report"]["problems"][0]
    assert (problem["line"], problem["pointer"], problem["code"]) == (2, "/messages/0/role", "invalid_role")
    assert problem["messages"]["zh"] != problem["messages"]["en"] == problem["message"]


def test_every_problem_can_be_written_to_a_file() -> None:
    put("rows.jsonl", lines(GOOD, BAD, BAD))
    run("validate", "rows.jsonl", "--problems", "all.jsonl", exit_code=1)
    assert [problem["line"] for problem in rows("all.jsonl") if problem["code"] == "invalid_role"] == [2, 3]
    run("validate", "rows.jsonl", "--problems", "all.csv", "--language", "zh", exit_code=1)
    listed = list(csv.DictReader(io.StringIO(Path("all.csv").read_text("utf-8"))))
    assert [row["line"] for row in listed if row["code"] == "invalid_role"] == ["2", "3"]
    assert [row["line"] for row in listed] == ["", "2", "3", "3"]
    assert "第 2 行" in listed[1]["message"]
    assert "--force" in run("validate", "rows.jsonl", "--problems", "all.csv", exit_code=2).stderr
    run("validate", "rows.jsonl", "--problems", "all.csv", "--force", exit_code=1)


def test_nothing_in_a_file_or_its_name_steers_the_terminal() -> None:
    name = "\x1b[31mred.jsonl"
    put(name, lines({**GOOD, "[bold]x[/bold]\x1b[2J\u202e": 1}))
    shown = run("validate", name).stdout
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "[bold]x[/bold]" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["validate", "nothing.jsonl"], "There is no file nothing.jsonl."),
        (["validate", "."], ". is not a file."),
        (["validate", "rows.jsonl", "--purpose", "fun"], "--purpose is fun; allowed: fine-tune,"),
        (["validate", "rows.jsonl", "--against", "nothing.jsonl"], "There is no file nothing.jsonl."),
        (["validate", "rows.jsonl", "--problems", "rows.jsonl"], "rows.jsonl can't be read and written"),
        (["convert", "rows.jsonl", "-o", "rows.jsonl", "--force"], "rows.jsonl can't be read and written"),
        (["convert", "rows.jsonl", "-o", "there.jsonl"], "there.jsonl exists; --force replaces it."),
        (["convert", "rows.jsonl", "-o", "no/where.jsonl"], "no/where.jsonl is not a place for a file."),
        (["convert", "rows.jsonl", "-o", "out.jsonl", "--style", "odd"], "--style is odd; allowed: auto, messages,"),
        (["convert", "rows.jsonl", "-o", "out.jsonl", "--format", "xls"], "--format is xls; allowed: auto, jsonl,"),
        (
            ["convert", "rows.jsonl", "-o", "out.jsonl", "--column", "prompt"],
            "--column is written FIELD=COLUMN, not prompt.",
        ),
        (["convert", "rows.jsonl", "-o", "out.jsonl", "--delimiter", ",,"], "--delimiter must be one character."),
        (["split", "rows.jsonl", "-o", "a", "--validation-out", "a"], "a can't be read and written"),
        (
            ["split", "rows.jsonl", "-o", "a", "--validation-out", "b", "--validation-ratio", "1"],
            "must be between 0 and 1.",
        ),
    ],
)
def test_a_command_that_can_not_be_meant_changes_nothing(words: list[str], said: str, folder: Path) -> None:
    put("rows.jsonl", lines(GOOD))
    put("there.jsonl", b"kept")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    result = run(*words, exit_code=2)
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert said not in run(*words, "--language", "zh", exit_code=2).stderr


# convert

STYLES = {
    "sharegpt": {"conversations": [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": "Paris."}]},
    "conversations": {"conversations": [USER, ASSISTANT]},
    "alpaca": {"instruction": USER["content"], "input": "", "output": "Paris."},
    "pairs": PAIR,
    "messages": GOOD,
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shape", ["lines", "array", "spread"])
def test_rows_of_every_style_are_converted(style: str, shape: str) -> None:
    value = STYLES[style]
    text = {
        "lines": lines(value, value),
        "array": json.dumps([value, value]).encode(),
        "spread": (json.dumps(value, indent=2) + "\n" + json.dumps(value, indent=2)).encode(),
    }[shape]
    put("given.json", text)
    shown = run("convert", "given.json", "-o", "out.jsonl").stdout
    assert "Wrote out.jsonl, rows: 2" in shown
    assert f"{style} 2" in shown
    assert rows("out.jsonl") == [GOOD, GOOD]
    run("convert", "given.json", "-o", "out2.jsonl", "--style", style)
    other = "alpaca" if style != "alpaca" else "pairs"
    assert f"is of the style {style}" in run(
        "convert", "given.json", "-o", "o", "--style", other, exit_code=1
    ).stdout or (style == "messages")


def test_rows_that_can_not_be_converted_are_named_and_nothing_is_written(folder: Path) -> None:
    put("given.jsonl", lines({**PAIR, "id": 1}, {"text": "x"}, PAIR) + b'{"prompt": 1,,}\n' + lines([1]))
    shown = " ".join(run("convert", "given.jsonl", "-o", "out.jsonl", exit_code=1).stdout.split())
    assert "2 text alone does not say what is question and what is answer" in shown
    assert "4 line 4, column 14: not valid JSON" in shown
    assert "5 this is of type array, not an object" in shown
    assert "Nothing was written: 3 of 5 rows" in shown
    assert sorted(path.name for path in folder.iterdir()) == ["given.jsonl"]
    zh = run("convert", "given.jsonl", "-o", "out.jsonl", "--skip-bad", "--language", "zh").stdout
    assert "已写入 out.jsonl，共 2 行" in zh
    assert "跳过 3 行" in zh
    assert "去掉的字段：id 1" in zh
    assert rows("out.jsonl") == [GOOD, GOOD]


def test_a_conversion_as_json() -> None:
    put("given.jsonl", lines({**PAIR, "label": 1}, PAIR))
    shown = json.loads(run("convert", "given.jsonl", "-o", "out.jsonl", "--json", exit_code=1).stdout)
    assert (shown["written"], shown["rows"], shown["skipped"], shown["styles"]) == (False, 1, 1, {"pairs": 1})
    assert shown["problems"][0]["line"] == 1
    assert shown["problems"][0]["message"] == "the field label has no place in the row"
    shown = json.loads(run("convert", "given.jsonl", "-o", "out.jsonl", "--json", "--drop", "label").stdout)
    assert (shown["written"], shown["rows"], shown["dropped"]) == (True, 2, {"label": 1})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_of_every_encoding_keep_their_texts(encoding: str, end: str) -> None:
    formula = '=HYPERLINK("http://x")'
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator=end).writerows(
        [["问题", "回答", "id", ""], ["你好，\n世界", '他说"好"', 1, ""], [formula, "北京的天气很好", 2, ""]]
    )
    put("given.csv", table.getvalue().encode(encoding))
    shown = run("convert", "given.csv", "-o", "out.jsonl").stdout
    assert ("gb18030" in shown) == (encoding == "gb18030")
    assert rows("out.jsonl") == [turns("你好，\n世界", '他说"好"'), turns(formula, "北京的天气很好")]


@pytest.mark.parametrize(("name", "delimiter"), [("a.tsv", "\t"), ("a.csv", ";"), ("a.csv", "|"), ("a.txt", "\t")])
def test_the_delimiter_is_found(name: str, delimiter: str) -> None:
    put(name, f"Prompt{delimiter}Completion{delimiter}System\na, b{delimiter}c{delimiter}\n".encode())
    run("convert", name, "-o", "out.jsonl")
    assert rows("out.jsonl") == [turns("a, b", "c")]


def test_columns_are_mapped_by_name() -> None:
    put("given.csv", b"frage,antwort,rolle,note\nq,a,s,1\nq2,,s,1\nq3,a3,,2\n")
    said = run("convert", "given.csv", "-o", "out.jsonl", exit_code=1).stderr
    assert "None of the columns has a known name (frage, antwort, rolle, note)" in said
    mapping = ["--column", "prompt=frage", "--column", "completion=antwort", "--column", "system=rolle"]
    assert "3 " in run("convert", "given.csv", "-o", "out.jsonl", *mapping, exit_code=1).stdout
    shown = run("convert", "given.csv", "-o", "out.jsonl", *mapping, "--skip-bad").stdout
    assert "note 2" in shown
    system = {"messages": [{"role": "system", "content": "s"}, *turns("q", "a")["messages"]]}
    assert rows("out.jsonl") == [system, turns("q3", "a3")]
    wrong = run("convert", "given.csv", "-o", "o", "--column", "prompt=question", exit_code=1).stderr
    assert "There is no column question for prompt; the file has: frage, antwort, rolle, note." in wrong
    assert "frage is not a field of a row" in run(
        "convert", "given.csv", "-o", "o", "--column", "frage=prompt", exit_code=1
    ).stderr  # fmt: skip


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"prompt,completion,label\n1,2,3\n", "These columns have no place in a row: label."),
        (b"prompt,prompt\n1,2\n", "Two columns have the name prompt."),
        (b'prompt,completion\na,b\n"c,d\ne,f\n', "the row that begins in line 3 can't be read"),
        (b'prompt,completion\na,"b"c\n', "the row that begins in line 2 can't be read"),
        (b"prompt,completion\na," + b"x" * 5_000_000, "the row that begins in line 2 can't be read"),
        (b"prompt,completion\ncaf\xe9 au lait,b\n", "Byte 21 of the file is neither UTF-8 nor GB18030"),
        (
            b"prompt,completion\n\xa4\xc0\xa5\x40\xac\xc9\xa5\x40,b\n",
            "Byte 18 of the file is neither UTF-8 nor GB18030",
        ),
        (b"prompt,completion\n", "The file holds no rows."),
        (b"", "The file is empty."),
        (b"\x1f\x8b\x08\x00", "The file is GZIP; that can't be converted."),
        (b"PAR1 and then nothing", "The file is not Parquet, or damaged."),
    ],
)
def test_a_table_that_can_not_be_read_is_refused_in_one_line(data: bytes, said: str, folder: Path) -> None:
    put("given.csv", data)
    result = run("convert", "given.csv", "-o", "out.jsonl", "--skip-bad", exit_code=1)
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert said not in run("convert", "given.csv", "-o", "out.jsonl", "--language", "zh", exit_code=1).stderr
    assert [path.name for path in folder.iterdir()] == ["given.csv"]


def test_a_row_with_other_cells_than_columns_is_named() -> None:
    put("given.csv", b"prompt,completion\na,b\n\nc,d,e\n")
    shown = run("convert", "given.csv", "-o", "out.jsonl", exit_code=1).stdout
    assert "4   3 cells, but the first line names 2 columns" in shown


def test_the_encoding_can_be_named() -> None:
    put("given.csv", "prompt,completion\ncafé,b\n".encode("latin-1"))
    run("convert", "given.csv", "-o", "out.jsonl", "--encoding", "latin-1")
    assert rows("out.jsonl") == [turns("café", "b")]
    assert "is not an encoding" in run("convert", "given.csv", "-o", "o", "--encoding", "odd", exit_code=1).stderr
    assert "is not ascii text" in run("convert", "given.csv", "-o", "o", "--encoding", "ascii", exit_code=1).stderr


@pytest.mark.parametrize(
    "data", [b'[{"prompt": "a", "completion": "b"}', b'[{"prompt": "a" "b"}]', b'[{"a": 1} {"b": 2}]', b"[" * 100_000]
)
def test_a_broken_array_is_refused(data: bytes) -> None:
    put("given.json", data)
    assert "the JSON that begins here can't be read" in run("convert", "given.json", "-o", "o", exit_code=1).stderr


def test_an_array_longer_than_what_is_held_of_it_keeps_its_lines() -> None:
    values = [{"prompt": f"{i}", "completion": "文" * 1000} for i in range(600)]
    values[500]["completion"] = ""
    put("given.json", json.dumps(values, ensure_ascii=False, indent=1).encode())
    shown = json.loads(run("convert", "given.json", "-o", "out.jsonl", "--skip-bad", "--json").stdout)
    assert (shown["rows"], shown["skipped"]) == (599, 1)
    assert shown["problems"][0]["line"] == 500 * 4 + 2
    assert rows("out.jsonl")[-1] == turns("599", "文" * 1000)


def test_columns_of_parquet_become_rows() -> None:
    pyarrow.parquet.write_table(
        pyarrow.table({"question": ["q1", "q2", None], "answer": ["a1", "a2", "a3"], "n": [1, 2, 3]}), "given.parquet"
    )
    said = run("convert", "given.parquet", "-o", "out.jsonl", exit_code=1).stderr
    assert "These columns have no place in a row: n." in said
    shown = run("convert", "given.parquet", "-o", "out.jsonl", "--drop", "n", exit_code=1).stdout
    assert "row" in shown and "3   no known style" in shown
    run("convert", "given.parquet", "-o", "out.jsonl", "--drop", "n", "--skip-bad")
    assert rows("out.jsonl") == [turns("q1", "a1"), turns("q2", "a2")]


def test_messages_of_parquet_are_rows_as_they_are() -> None:
    called = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    value = {
        "messages": [
            USER,
            {"role": "assistant", "tool_calls": [called]},
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
        ]
    }
    values = [{**value, "prompt_id": "x"}, {**GOOD, "prompt_id": "y"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), "given.parquet")
    assert "prompt_id 2" in run("convert", "given.parquet", "-o", "out.jsonl").stdout
    assert rows("out.jsonl") == [value, GOOD]


def test_parquet_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    put("given.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'tunewright[parquet]'" in run("convert", "given.parquet", "-o", "o", exit_code=78).stderr


# repair


def test_certain_mends_are_written_to_another_file() -> None:
    short, other = turns("a", ""), turns("c", "d")
    put("rows.jsonl", lines(other, STYLES["alpaca"], other, short))
    shown = run("repair", "rows.jsonl", "-o", "out.jsonl", exit_code=1).stdout
    assert "✓ Wrote out.jsonl. Rows mended: 1, left out: 1" in shown
    assert "✗ Rows that still have errors: 1. --drop-bad-rows" in shown
    assert rows("out.jsonl") == [other, GOOD, short]
    zh = run("repair", "rows.jsonl", "-o", "out.jsonl", "--force", "--drop-bad-rows", "--language", "zh").stdout
    assert "去掉 2 行" in zh
    assert rows("out.jsonl") == [other, GOOD]
    assert rows("rows.jsonl") == [other, STYLES["alpaca"], other, short]


def test_a_repair_can_be_of_some_codes_and_lines() -> None:
    put("rows.jsonl", lines(turns("a", "b"), STYLES["alpaca"], STYLES["alpaca"], turns("a", "b")))
    words = ["repair", "rows.jsonl", "-o", "out.jsonl", "--force", "--json"]
    found = json.loads(run(*words, "--line", "2", exit_code=1).stdout)
    assert (found["patched"], found["dropped"], found["left"]) == (1, 0, 1)
    assert rows("out.jsonl") == [turns("a", "b"), GOOD, STYLES["alpaca"], turns("a", "b")]
    found = json.loads(run(*words, "--code", "duplicate_row", exit_code=1).stdout)
    assert found["patched"] == 0
    assert rows("out.jsonl").count(turns("a", "b")) == 1


def test_an_array_is_mended_into_lines(folder: Path) -> None:
    put("rows.json", json.dumps([GOOD, turns("a", "b")], indent=1).encode())
    run("repair", "rows.json", "-o", "out.jsonl")
    assert rows("out.jsonl") == [GOOD, turns("a", "b")]
    assert sorted(path.name for path in folder.iterdir()) == ["out.jsonl", "rows.json"]


# split


def test_a_split_puts_every_row_on_one_side_and_the_same_ones_each_time() -> None:
    data = [turns(f"question {i}", "answer") for i in range(200)]
    put("rows.jsonl", b"\xef\xbb\xbf" + lines(*data, data[0]).replace(b"\n", b"\r\n\n"))
    words = ["split", "rows.jsonl", "--validation-ratio", "0.2"]
    run(*words, "-o", "a.jsonl", "--validation-out", "b.jsonl")
    train, held_out = rows("a.jsonl"), rows("b.jsonl")
    assert sorted(map(str, train + held_out)) == sorted(map(str, [*data, data[0]]))
    assert 15 <= len(held_out) <= 70
    assert (data[0] in train) != (data[0] in held_out)
    shown = json.loads(run(*words, "-o", "c.jsonl", "--validation-out", "d.jsonl", "--json").stdout)
    assert shown == {"train": len(train), "validation": len(held_out)}
    assert rows("d.jsonl") == held_out
    run(*words, "-o", "c.jsonl", "--validation-out", "d.jsonl", "--force", "--seed", "1")
    assert rows("d.jsonl") != held_out


def test_a_split_with_an_empty_side_writes_nothing(folder: Path) -> None:
    put("rows.jsonl", lines(GOOD))
    result = run("split", "rows.jsonl", "-o", "a.jsonl", "--validation-out", "b.jsonl", exit_code=1)
    assert "so one side is empty" in result.stderr
    assert [path.name for path in folder.iterdir()] == ["rows.jsonl"]


# with a base model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A home with the base `tiny`, whose context is 256 tokens."""
    from tests.tiny_models import tiny_llama

    home = HomeFolder(tmp_path_factory.mktemp("home"))
    home.create()
    Catalogue(home).add(tiny_llama(tmp_path_factory.mktemp("base") / "tiny", context=256), "tiny")
    return str(home.root)


def test_tokens_are_counted_and_rows_that_the_limit_changes_are_named(home: str) -> None:
    put("rows.jsonl", lines(GOOD, turns("Hi", "answer " * 200), turns("question " * 200, "Hi"), BAD))
    words = ["validate", "rows.jsonl", "--model", "tiny", "--home", home]
    found = json.loads(run(*words, "--json", exit_code=1).stdout)
    tokens = found["statistics"]["tokens"]
    assert (tokens["max_length"], tokens["cut"]["rows"], tokens["nothing_to_train"]["rows"]) == (256, 1, 1)
    assert found["report"]["counts"]["nothing_to_train"] == 1
    assert found["report"]["bad_rows"] == 2
    places = {problem["code"]: problem["line"] for problem in found["report"]["problems"]}
    assert (places["example_too_long"], places["nothing_to_train"], places["invalid_role"]) == (2, 3, 4)
    assert found["report"]["errors"] == 2
    shown = " ".join(run(*words, "--max-length", "100", exit_code=1).stdout.split())
    assert "rows may have up to 100" in shown
    taken = found["statistics"]["estimate"]
    assert taken["trained_tokens"] == taken["n_epochs"] * tokens["tokens_per_epoch"]
    assert f"{taken['trained_tokens']:,} tokens = text_tokens * n_epochs" in " ".join(
        run(*words, exit_code=1).stdout.split()
    )
    run(*words, "--problems", "all.jsonl", exit_code=1)
    assert [(problem["line"], problem["code"]) for problem in rows("all.jsonl")][-3:] == [
        *((2, "example_too_long"), (3, "nothing_to_train"), (4, "invalid_role")),
    ]


def test_rows_without_trained_tokens_count_beside_those_without_weight(home: str) -> None:
    silent = {"messages": [USER, {**ASSISTANT, "weight": 0}]}
    put("rows.jsonl", lines(GOOD, silent, turns("question " * 400, "Hi")))
    words = ["validate", "rows.jsonl", "--model", "tiny", "--home", home]
    report = json.loads(run(*words, "--json", exit_code=1).stdout)["report"]
    assert (report["counts"]["nothing_to_train"], report["errors"], report["bad_rows"]) == (2, 2, 2)
    assert [problem["line"] for problem in report["problems"] if problem["severity"] == "error"] == [2, 3]
    run(*words, "--problems", "all.jsonl", exit_code=1)
    assert [problem["line"] for problem in rows("all.jsonl")] == [None, 2, 3]
    assert "每行最多 256 个" in run(*words, "--language", "zh", exit_code=1).stdout


def test_a_preview_shows_which_tokens_are_trained(home: str) -> None:
    put("rows.jsonl", b"\xef\xbb\xbf" + lines(GOOD, turns("\x1b[2J", "[red]" + "long " * 300)))
    words = ["preview", "rows.jsonl", "--model", "tiny", "--home", home]
    shown = run(*words).stdout
    assert "⟨Paris.<|im_end|>⟩" in shown
    assert "<|im_start|>user" in shown
    assert "cut off (behind ✂): 0" in shown
    second = run(*words, "--line", "2", "--language", "zh").stdout
    assert "\x1b" not in second
    assert "⟨[red]long" in second
    assert "✂" in second.split("共")[0]
    found = json.loads(run(*words, "--json").stdout)
    trained = "".join(token["text"] for token in found["examples"][0]["tokens"] if token["trained"])
    assert trained.startswith("Paris.<|im_end|>")


@pytest.mark.parametrize(
    ("words", "exit_code", "said"),
    [
        (["--model", "tiny", "--line", "2"], 2, "There is no row in line 2."),
        (["--model", "tiny", "--line", "9"], 2, "There is no row in line 9."),
        (["--model", "tiny", "--line", "3"], 1, 'line 3, messages[0].role is "usr"'),
        (["--model", "other"], 78, 'There is no base model "other"'),
        (["--model", "smollm2-135m"], 1, "run: tunewright models pull smollm2-135m"),
    ],
)
def test_what_can_not_be_previewed_is_said_in_one_line(words: list[str], exit_code: int, said: str, home: str) -> None:
    put("rows.jsonl", lines(GOOD) + b"\n" + lines(BAD))
    result = run("preview", "rows.jsonl", "--home", home, *words, exit_code=exit_code)
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
