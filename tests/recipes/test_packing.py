import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.recipes.job_folder import (
    ROWS,
    fork_trainer,
    losses,
    next_attempt,
    records,
    train_here,
    write_job,
    write_rows,
)
from tunewright.datasets.tokens import packed_rows
from tunewright.datasets.tokens.packed_cache import PackedCache
from tunewright.errors import InvalidRequest
from tunewright.files_on_disk import sha256_of
from tunewright.jobs.spec import Started
from tunewright.recipes import packing
from tunewright.rendering.renderer import renderer_of


def read(path: Path, base: Path, max_length: int = 128) -> packing.Rows:
    return packing.read_rows(
        path,
        renderer_of(base),
        max_length=max_length,
        max_line_bytes=2**20,
        between_rows=lambda: None,
        param="training_file",
    )


def test_rows_are_what_the_renderer_made(tmp_path: Path, base: Path) -> None:
    rows = read(write_rows(tmp_path / "rows.jsonl", ROWS), base)
    assert len(rows) == len(ROWS)
    assert rows.cut.rows == rows.skipped.rows == 0
    renderer = renderer_of(base)
    for row, (_, answer) in enumerate(ROWS):
        labels = rows.tokens_of(row)[rows.trained_of(row)]
        assert renderer.decode(labels.tolist()).strip() == answer
        assert int(labels[-1]) in renderer.stop_ids


def test_long_rows_are_cut_and_hopeless_ones_skipped_and_both_named(tmp_path: Path, base: Path) -> None:
    asked = [("hello", "yes"), ("hello", "one two three " * 40), ("hello " * 90, "no"), ("hello", "yes")]
    path = write_rows(tmp_path / "rows.jsonl", asked)
    whole = read(path, base, max_length=1000)
    rows = read(path, base, max_length=60)
    assert (len(rows), rows.cut.rows, rows.skipped.rows) == (3, 1, 1)
    assert rows.cut.lines == [2]
    assert rows.skipped.lines == [3]
    assert rows.cut.tokens == whole.length(1) - 60
    assert rows.length(1) == 60
    assert np.array_equal(rows.tokens_of(1), whole.tokens_of(1)[:60])
    assert np.array_equal(rows.trained_of(1), whole.trained_of(1)[:60])
    assert rows.n_trained == sum(rows.trained_of(row).sum() for row in range(3))


def test_a_file_without_labels_is_an_error(tmp_path: Path, base: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [("hello " * 90, "no")])
    with pytest.raises(InvalidRequest) as caught:
        read(path, base, max_length=20)
    assert caught.value.code == "nothing_to_train"
    assert caught.value.param == "training_file"


def test_only_ten_lines_are_named(tmp_path: Path, base: Path) -> None:
    asked = [("hello " * 90, "no") for _ in range(25)]
    rows = read(write_rows(tmp_path / "rows.jsonl", [*asked, ("hello", "yes")]), base, max_length=60)
    assert rows.skipped.rows == 25
    assert rows.skipped.lines_text() == "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, …"


def test_rows_that_stand_in_both_files_are_counted(tmp_path: Path, base: Path) -> None:
    training = read(write_rows(tmp_path / "a.jsonl", ROWS), base)
    fresh = [("Is it new?", "yes"), ("Is it old?", "no")]
    validation = read(write_rows(tmp_path / "b.jsonl", [*fresh, ROWS[2], ROWS[2]]), base)
    assert packing.overlap(training, validation) == 2
    assert packing.overlap(validation, read(write_rows(tmp_path / "c.jsonl", ROWS[3:]), base)) == 0


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    first = packing.epoch_order(50, seed=3, epoch=0)
    assert sorted(first) == list(range(50))
    assert np.array_equal(first, packing.epoch_order(50, seed=3, epoch=0))
    assert not np.array_equal(first, packing.epoch_order(50, seed=3, epoch=1))
    assert not np.array_equal(first, packing.epoch_order(50, seed=4, epoch=0))


def rows_of_lengths(lengths: list[int]) -> packing.Rows:
    """Rows in which all tokens but the first are labels."""
    ends = np.cumsum(lengths)
    labels = np.array(lengths) - 1
    return packing.Rows(
        tokens=np.arange(ends[-1], dtype=np.int32),
        lines=np.arange(len(lengths)) + 1,
        starts=ends - lengths,
        lengths=np.array(lengths),
        n_labels=labels,
        spans=np.array([(1, length) for length in lengths if length > 1]),
        first_span=np.cumsum(labels > 0) - (labels > 0),
        end_span=np.cumsum(labels > 0),
        cut=packing.Tally(),
        skipped=packing.Tally(),
    )


def test_micro_batches_keep_to_the_budget_and_lose_nothing() -> None:
    rows = rows_of_lengths([5, 3, 9, 2, 2, 30, 1])
    groups = list(packing.micro_batches(rows, np.array([6, 5, 4, 3, 2, 1, 0]), token_budget=10))
    assert [row for group in groups for row in group] == [6, 5, 4, 3, 2, 1, 0]
    assert [5] in groups  # longer than the budget: alone
    assert all(sum(map(rows.length, group)) <= 10 for group in groups if group != [5])


def test_flattening_keeps_rows_apart() -> None:
    rows = rows_of_lengths([4, 1, 3])
    flat = packing.flatten(rows, [2, 0])
    assert flat.lengths == [3, 4]
    assert flat.tokens.tolist() == [5, 6, 7, 0, 1, 2, 3]
    assert flat.positions.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert flat.labels.tolist() == [6, 7, 1, 2, 3]
    assert flat.predicts.tolist() == [0, 1, 3, 4, 5]
    assert packing.count_labels(rows, np.array([2, 0])) == len(flat.labels)


def test_chosen_lines_are_left_out_unseen_and_counted(tmp_path: Path, base: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    lines = path.read_bytes().splitlines()
    lines[1] = b"{broken"
    path.write_bytes(b"\n".join(lines) + b"\n")
    rows = packing.read_rows(
        path,
        renderer_of(base),
        max_length=128,
        max_line_bytes=2**20,
        between_rows=lambda: None,
        param="training_file",
        skip_lines=frozenset({2, 4}),
    )
    assert len(rows) == len(ROWS) - 2
    assert (rows.skipped.rows, rows.skipped.lines) == (2, [2, 4])


def test_image_and_preference_rows_are_not_for_the_text_trainer(tmp_path: Path, base: Path) -> None:
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    answer = [{"role": "assistant", "content": "yes"}]
    for row in (
        {"messages": [{"role": "user", "content": [image]}, *answer]},
        {"messages": [{"role": "user", "content": "hi"}], "preferred_output": answer, "non_preferred_output": answer},
    ):
        path = write_rows(tmp_path / "rows.jsonl", ROWS[:1])
        with path.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        with pytest.raises(InvalidRequest) as caught:
            read(path, base)
        assert (caught.value.code, caught.value.values["line"]) == ("wrong_format", 2)


def test_the_first_bad_row_is_named_unless_it_is_left_out(tmp_path: Path, base: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    path.write_bytes(path.read_bytes() + b"{broken\n")
    with pytest.raises(InvalidRequest) as caught:
        read(path, base)
    assert caught.value.code == "invalid_json"


def tokenisings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The data files that were tokenised from now on."""
    seen: list[Path] = []
    tokenise = packed_rows.tokenise

    def noted(data: Path, *arguments: Any, **options: Any) -> None:
        seen.append(data)
        tokenise(data, *arguments, **options)

    monkeypatch.setattr(packed_rows, "tokenise", noted)
    return seen


def test_a_file_is_tokenised_once_whatever_jobs_want_of_it(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another max_length and other lines to leave out use the same tokens; they lie on the disk, not in memory."""
    seen = tokenisings(monkeypatch)
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    options: dict[str, Any] = {
        "max_line_bytes": 2**20,
        "between_rows": lambda: None,
        "param": "training_file",
        "cache": PackedCache(tmp_path / "cache", 2**20),
        "data_sha256": sha256_of(path),
    }
    plain = read(path, base)
    first = packing.read_rows(path, renderer_of(base), max_length=128, **options)
    again = packing.read_rows(path, renderer_of(base), max_length=128, **options)
    assert (first.cached, again.cached) == (False, True)
    for rows in (first, again):
        for row in range(len(plain)):
            assert np.array_equal(rows.tokens_of(row), plain.tokens_of(row))
            assert np.array_equal(rows.trained_of(row), plain.trained_of(row))
    short = packing.read_rows(path, renderer_of(base), max_length=40, skip_lines=frozenset({1}), **options)
    assert short.cached and short.cut.rows and short.skipped.lines[0] == 1
    assert seen == [path, path]  # once without the cache, once with it
    assert isinstance(again.tokens.base, np.memmap)


def test_a_damaged_entry_is_made_anew(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tokenisings(monkeypatch)
    spec = write_job(tmp_path / "job", base, token_cache=str(tmp_path / "cache"), token_cache_bytes=2**20)
    first = losses(train_here(spec))
    (tokens,) = (tmp_path / "cache").glob("*/tokens.npy")
    data = bytearray(tokens.read_bytes())
    data[-1] ^= 1
    tokens.write_bytes(data)
    other = write_job(tmp_path / "other", base, token_cache=str(tmp_path / "cache"), token_cache_bytes=2**20)
    assert losses(train_here(other)) == first
    assert len(seen) == 2


def test_resumed_and_repeated_jobs_do_not_tokenise_again(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tokenisings(monkeypatch)
    options: dict[str, Any] = {"token_cache": str(tmp_path / "cache"), "token_cache_bytes": 2**20}
    whole = train_here(write_job(tmp_path / "whole", base))
    spec = write_job(tmp_path / "job", base, **options)
    stopped = train_here(spec, stop_at=5)
    resumed = train_here(next_attempt(spec))
    repeated = train_here(write_job(tmp_path / "repeated", base, **options))

    def tokens(records: list[Any]) -> list[str]:
        return [record.choices["tokens"] for record in records if isinstance(record, Started)]

    assert [tokens(each) for each in (whole, stopped, resumed, repeated)] == [
        ["made"],
        ["made"],
        ["cached"],
        ["cached"],
    ]
    assert len(seen) == 2
    assert losses(stopped) | losses(resumed) == losses(repeated) == losses(whole)


def test_two_trainers_at_once_share_the_work(tmp_path: Path, base: Path) -> None:
    specs = [
        write_job(tmp_path / name, base, n_epochs=1, token_cache=str(tmp_path / "cache"), token_cache_bytes=2**20)
        for name in ("one", "two")
    ]
    trainers = [fork_trainer(spec) for spec in specs]
    assert [trainer.wait(120) for trainer in trainers] == [0, 0]
    started = [record for spec in specs for record in records(spec) if isinstance(record, Started)]
    assert sorted(record.choices["tokens"] for record in started) == ["cached", "made"]
