"""Statistics of a data file: right, bounded, the same however a file is split."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.bad_rows import ASSISTANT, GOOD, SYSTEM, TOOL, USER, call, file, image, preference, reply
from tunewright.datasets.checking import statistics
from tunewright.datasets.checking.check import check
from tunewright.datasets.checking.statistics import MAX_BINS, Lengths, Statistics, language_of
from tunewright.datasets.report import Report


class Limits(NamedTuple):
    max_line_bytes: int = 4 * 2**20
    min_training_rows: int = 1


def checked(tmp_path: Path, data: bytes, **options: Any) -> Report:
    path = tmp_path / "data.jsonl"
    path.write_bytes(data)
    return check(path, "fine-tune", Limits(), **options)


def test_rows_turns_roles_and_characters(tmp_path: Path) -> None:
    several = {
        "messages": [SYSTEM, USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "reasoning_content": "I see"}]
    }
    calling = {"messages": [USER, call(), reply(), ASSISTANT], "tools": [TOOL]}
    bad = {"messages": [USER]}
    found = checked(tmp_path, file(GOOD, several, calling, bad)).statistics
    question, answer, arguments = len(USER["content"]), len(ASSISTANT["content"]), len('get_weather{"city": "Paris"}')
    assert {name: found[name] for name in ("rows", "messages", "turns", "with_system", "with_tools", "images")} == {
        "rows": 3,
        "messages": 11,
        "turns": 4,
        "with_system": 1,
        "with_tools": 1,
        "images": 0,
    }
    assert found["roles"] == {"user": 4, "assistant": 5, "system": 1, "tool": 1}
    assert found["kinds"] == {"chat": 2, "function": 1}
    assert found["tasks"] == {"single_turn": 1, "multi_turn": 1, "function": 1}
    assert (found["with_reasoning"], found["with_weights"]) == (1, 1)
    lengths = [
        question + answer,
        len(SYSTEM["content"]) + 2 * question + 2 * answer + 5,
        question + arguments + len("sunny") + answer,
    ]
    assert found["characters"] == found["characters_per_row"]["total"] == sum(lengths)
    assert (found["characters_per_row"]["min"], found["characters_per_row"]["max"]) == (min(lengths), max(lengths))
    trained = found["trained_characters_per_row"]
    assert trained["total"] == answer + (answer + 5) + (arguments + answer)
    assert found["bytes_per_row"]["max"] == max(len(json.dumps(row)) for row in (GOOD, several, calling))
    assert found["tools"] == {"calls": 1, "distinct": 1, "top": {"get_weather": 1}}
    assert found["system_prompts"] == {"distinct": 1, "largest_share": 1.0}
    assert found["languages"]["shares"] == {"en": 1.0}


def test_images_and_preferences(tmp_path: Path) -> None:
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
    found = checked(tmp_path, image(pixel)).statistics
    assert (found["images"], found["with_images"], found["kinds"]) == (1, 1, {"image_understanding": 1})
    assert found["characters"] == len(USER["content"]) + len(ASSISTANT["content"])
    found = checked(tmp_path, preference()).statistics
    assert (found["messages"], found["roles"]) == (3, {"user": 1, "assistant": 2})
    assert found["trained_characters_per_row"]["total"] == len("Paris.") + len("London.")


def test_less_is_counted_if_less_is_asked_for(tmp_path: Path) -> None:
    data = file(GOOD, GOOD, {"messages": [USER, {**ASSISTANT, "content": "</s>"}]})
    quick = checked(tmp_path, data, semantic=False)
    assert quick.counts == {"few_rows": 1}
    assert quick.statistics["messages"] == 6 and "languages" not in quick.statistics
    assert quick.statistics["characters"] == checked(tmp_path, data).statistics["characters"]
    bare = checked(tmp_path, data, statistics=False)
    assert bare.statistics == {} and bare.counts["duplicate_row"] == 1


@settings(max_examples=200)
@given(st.lists(st.integers(0, 1 << 22) | st.integers(0, 60), min_size=1, max_size=60), st.integers(0, 60))
def test_lengths_are_nearly_exact_and_can_be_put_together(values: list[int], cut: int) -> None:
    whole, first, second = Lengths(), Lengths(), Lengths()
    whole.add(values)
    first.add(values[:cut])
    second.add(values[cut:])
    first.settle()
    first.absorb(msgspec.json.decode(msgspec.json.encode(second), type=Lengths))
    found = whole.summary()
    assert found == first.summary()
    assert (found["total"], found["min"], found["max"]) == (sum(values), min(values), max(values))
    for percentile in statistics.PERCENTILES:
        exact = sorted(values)[-(-len(values) * percentile // 100) - 1]
        assert exact * 0.999 - 1 < found[f"p{percentile}"] <= exact
    bins = found["histogram"]
    assert sum(part["count"] for part in bins) == len(values) and len(bins) <= MAX_BINS
    assert all(before["to"] + 1 == after["from"] for before, after in pairwise(bins))
    assert bins[-1]["to"] == max(values)


def test_the_sample_of_languages_does_not_depend_on_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "SAMPLE_ROWS", 20)
    texts = {random.Random(i).getrandbits(64): ["你好" if i % 4 else "hello"] for i in range(500)}
    results = []
    for keys in (sorted(texts), sorted(texts, reverse=True), list(texts)):
        parts = [Statistics(), Statistics(), Statistics()]
        for i, key in enumerate(keys):
            if key <= parts[i % 3].sample_limit:
                parts[i % 3].add_sample(key, texts[key])
        for part in parts:
            part.settle()
        parts[0].absorb(msgspec.json.decode(msgspec.json.encode(parts[1]), type=Statistics))
        parts[0].absorb(parts[2])
        parts[0].settle()
        results.append(sorted(parts[0].languages))
    assert results == [sorted(texts)[:20]] * 3


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the capital of France?", "en"),
        ("Paris.", "en"),
        ("法国的首都是哪里？请回答 Paris 还是 London。", "zh"),
        ("フランスの首都はどこですか。東京です。", "ja"),
        ("프랑스의 수도는 어디입니까?", "ko"),
        ("Какая столица Франции?", "ru"),
        ("Quelle est la capitale du pays où habite Émile, près d'ici ?", "other"),
        ("12345 + 678 = ?", "other"),
        ("", "other"),
    ],
)
def test_languages(text: str, language: str) -> None:
    assert language_of(text) == language


def test_a_group_that_hardly_occurs_is_pointed_out(tmp_path: Path) -> None:
    rows = [{"messages": [{**USER, "content": f"What is {i} in the list?"}, ASSISTANT]} for i in range(300)]
    several = {"messages": [USER, ASSISTANT, USER, ASSISTANT]}
    chinese = {"messages": [{**USER, "content": "法国的首都是哪里？"}, {**ASSISTANT, "content": "是巴黎。"}]}
    report = checked(tmp_path, file(*rows, several, chinese))
    found = {p.values["group"]: p.values["percent"] for p in report.problems if p.code == "unbalanced_mix"}
    assert found == {"multi_turn": 0.33, "zh": 0.33}
    even = checked(tmp_path, file(*rows, *[{"messages": [*row["messages"], *row["messages"]]} for row in rows]))
    assert "unbalanced_mix" not in even.counts
    assert "few_rows" not in even.counts and "few_rows" in checked(tmp_path, file(*rows[:199])).counts
