"""What `tunewright datasets validate` shows beside the problems, and what its advice does."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.bad_rows import ASSISTANT, PIXEL
from tests.unit.test_dataset_commands import BAD, lines, put, rows, run, turns


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The commands run here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("TUNEWRIGHT_LANGUAGE", raising=False)
    return tmp_path


def test_places_are_named_once_and_dots_mean_more() -> None:
    keys = {"role": "user", "content": "sk-" + "a1" * 12}
    put(
        "rows.jsonl",
        lines({"messages": [keys, ASSISTANT]}, {"messages": [keys, {**ASSISTANT, **keys, "role": "assistant"}]}),
    )
    shown = run("validate", "rows.jsonl").stdout
    assert "also in lines 2\n" in "\n".join(line.rstrip() for line in shown.splitlines())
    put("rows.jsonl", lines(*[BAD] * 9))
    assert "also in lines 2, 3, 4, 5, 6, 7, …" in run("validate", "rows.jsonl", exit_code=1).stdout


def test_images_are_shown_by_size_and_those_not_fetched_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(url: str) -> dict[str, Any]:
        image = {"type": "image_url", "image_url": {"url": url}}
        return {"messages": [{"role": "user", "content": [image]}, ASSISTANT]}

    put("rows.jsonl", lines(asked(PIXEL), asked("https://images.example.com/a.png"), asked(PIXEL)))
    shown = " ".join(run("validate", "rows.jsonl").stdout.split())
    assert "images different: 1 (69 bytes) · png 2 pixels, at most 256 x 256: 2" in shown
    assert "web address and not looked at: 1. --fetch-images" in shown
    statistics = json.loads(run("validate", "rows.jsonl", "--json").stdout)["statistics"]
    assert statistics["image_files"]["count"] == 2
    put("rows.jsonl", lines(asked("data:image/png;base64,iVBORw==")))
    assert "image_files" not in json.loads(run("validate", "rows.jsonl", "--json", exit_code=1).stdout)["statistics"]
    monkeypatch.setenv("TUNEWRIGHT_REMOTE_MEDIA", "off")
    put("rows.jsonl", lines(asked("https://images.example.com/a.png")))
    assert "remote_media_not_allowed" in run("validate", "rows.jsonl", exit_code=1).stdout


def test_rows_of_the_training_file_are_found_and_left_out() -> None:
    put("train.jsonl", lines(*[turns(f"question {i}", "answer") for i in range(9)]))
    put("rows.jsonl", lines(turns("question 3", "answer"), turns("another", "answer"), turns("question 5", "answer")))
    shown = " ".join(run("validate", "rows.jsonl", "--against", "train.jsonl").stdout.split())
    assert "! 2 validation_leak" in shown
    words = ["repair", "rows.jsonl", "--against", "train.jsonl", "-o", "out.jsonl"]
    assert f"tunewright datasets {' '.join(words[:4])} -o OUT" in shown
    run(*words)
    assert rows("out.jsonl") == [turns("another", "answer")]
    run(*words, "--code", "duplicate_row", "--force")
    assert len(rows("out.jsonl")) == 3
    assert "can't be read and written" in run(*words[:4], "-o", "train.jsonl", "--force", exit_code=2).stderr
