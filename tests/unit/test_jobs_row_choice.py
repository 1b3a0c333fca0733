"""Bad rows that a job puts up with, and rows kept for validation: from the stored report to the trainer's files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.job_bench import PROJECT, Bench
from tests.unit.bad_rows import ASSISTANT, USER, line
from tunewright.clock import wall_s
from tunewright.datasets.checking.check import check
from tunewright.datasets.records import File
from tunewright.datasets.report import Problem
from tunewright.errors import InvalidRequest
from tunewright.files_on_disk import sha256_of
from tunewright.ids import new_id
from tunewright.jobs.preparation import Preparation
from tunewright.jobs.records import Job
from tunewright.jobs.service import CreateJob
from tunewright.jobs.spec import RowChoice, TrainingSpec

BAD = line({"messages": [{**USER, "role": "human"}, ASSISTANT]})


def good(n: int) -> bytes:
    return line({"messages": [{"role": "user", "content": f"Question {n}?"}, ASSISTANT]})


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "home", max_line_bytes=2000)
    yield bench
    bench.storage.close()


def preparation(bench: Bench) -> Preparation:
    return Preparation(bench.storage, bench.blobs, bench.bases, bench.home, bench.settings)  # type: ignore[arg-type]


def keep(bench: Bench, data: bytes, *, report: str = "record") -> str:
    """Store a checked file, bad rows and all; its problems in the `record`, in a `blob`, or `nowhere`."""
    path, problems = bench.home.temporary / "data", bench.home.temporary / "problems"
    path.write_bytes(data)
    found = check(path, "fine-tune", bench.settings, problems_to=problems)
    file = File(
        id=new_id("file"),
        project_id=PROJECT,
        filename="rows.jsonl",
        purpose="fine-tune",
        size_bytes=len(data),
        sha256=sha256_of(path),
        created_at=wall_s(),
        status="processed" if found.ok else "error",
        kind=found.kind,
        rows=found.rows,
        report=msgspec.to_builtins(found) | ({} if report == "record" else {"problems": []}),
    )
    bench.blobs.put_file(f"files/{PROJECT}/{file.id}", path)
    if report == "blob":
        bench.blobs.put_file(f"reports/{PROJECT}/{file.id}.jsonl", problems)
    with bench.storage.write() as tx:
        tx.files.insert(file)
    return file.id


def create(bench: Bench, training_file: str, **fields: Any) -> Job:
    return bench.jobs.create(PROJECT, CreateJob(model="tiny", training_file=training_file, seed=5, **fields))


def spec_of(bench: Bench, job: Job) -> tuple[TrainingSpec, RowChoice]:
    """The spec of a job that has gone through its preparation."""
    prepared = preparation(bench).prepare(job)
    job = msgspec.structs.replace(job, hyperparameters=msgspec.to_builtins(prepared.hyperparameters))
    return preparation(bench).spec(job), prepared.choice


def not_blank(path: str | None) -> dict[int, bytes]:
    """Line number -> line, of the lines that hold something."""
    assert path is not None
    lines = Path(path).read_bytes().split(b"\n")
    return {number: line for number, line in enumerate(lines, 1) if line}


DATA = good(1) + BAD + b"\n" + good(4) + b'{"messages": \n' + BAD + good(7) + b"x" * 3000 + b"\n" + good(9)
BAD_LINES = (2, 5, 6, 8)


@pytest.mark.parametrize("report", ["record", "blob", "nowhere"])
def test_bad_rows_are_named_to_the_trainer(bench: Bench, report: str) -> None:
    job = create(bench, keep(bench, DATA, report=report), max_bad_rows=4)
    spec, choice = spec_of(bench, job)
    assert spec.skip_lines is not None
    assert msgspec.json.decode(Path(spec.skip_lines).read_bytes(), type=RowChoice) == choice
    assert (choice.train.skip, choice.train.rows, choice.validation) == (BAD_LINES, 4, None)
    assert Path(spec.training_data).read_bytes() == DATA
    assert spec.training_sha256 == sha256_of(Path(spec.training_data))
    left = {path.name for path in Path(spec.training_data).parent.iterdir()}
    assert left == {"train.jsonl", "skip.json"}


def test_a_report_that_is_not_the_files_own_is_not_believed(bench: Bench) -> None:
    file_id = keep(bench, DATA, report="nowhere")
    problem = Problem(code="invalid_role", severity="error", message="x", line=1)
    for content in (msgspec.json.encode(problem) + b"\n", b"not a report\n", b""):
        path = bench.home.temporary / "wrong"
        path.write_bytes(content)
        bench.blobs.put_file(f"reports/{PROJECT}/{file_id}.jsonl", path)
        _, choice = spec_of(bench, create(bench, file_id, max_bad_rows=4))
        assert choice.train.skip == BAD_LINES


def test_a_later_check_that_finds_more_bad_rows_is_not_waved_through(bench: Bench) -> None:
    file_id = keep(bench, DATA, report="nowhere")
    with bench.storage.write() as tx:
        file = tx.files.get(PROJECT, file_id)
        assert file is not None
        tx.files.delete(PROJECT, file_id)
        tx.files.insert(msgspec.structs.replace(file, report=file.report | {"bad_rows": 1}))
    job = create(bench, file_id, max_bad_rows=1)
    with pytest.raises(InvalidRequest) as caught:
        preparation(bench).prepare(job)
    assert (caught.value.code, caught.value.values["found"]) == ("too_many_bad_rows", 4)


def test_bad_rows_of_both_files(bench: Bench) -> None:
    validation = good(20) + BAD + good(21)
    job = create(bench, keep(bench, DATA), validation_file=keep(bench, validation), max_bad_ratio=0.5)
    spec, choice = spec_of(bench, job)
    assert choice.train.skip == BAD_LINES
    assert choice.validation is not None
    assert (choice.validation.skip, choice.validation.rows) == ((2,), 2)
    assert spec.validation_data is not None and Path(spec.validation_data).read_bytes() == validation


def test_good_files_come_without_a_list(bench: Bench) -> None:
    spec, choice = spec_of(bench, create(bench, keep(bench, good(1) + good(2)), max_bad_rows=5))
    assert spec.skip_lines is None and choice.train.rows == 2
    assert not (Path(spec.training_data).parent / "skip.json").exists()


def test_what_is_left_must_be_enough(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "home", min_training_rows=3)
    job = create(bench, keep(bench, good(1) + good(2) + BAD), max_bad_rows=1)
    with pytest.raises(InvalidRequest) as caught:
        preparation(bench).prepare(job)
    assert (caught.value.code, caught.value.values["rows"]) == ("too_few_rows", 2)
    bench.storage.close()


def test_a_split_keeps_line_numbers_and_loses_no_row(bench: Bench) -> None:
    rows = [good(n) for n in range(40)]
    data = b"\xef\xbb\xbf" + b"".join(rows) + b"".join(rows).replace(b"\n", b"\r\n") + BAD + b"y" * 3000
    spec, choice = spec_of(bench, create(bench, keep(bench, data), validation_split=0.25, max_bad_rows=2))
    train, validation = not_blank(spec.training_data), not_blank(spec.validation_data)
    assert choice.validation is not None and choice.validation.skip == ()
    assert choice.train.skip == (81, 82) == tuple(number for number in train if number > 80)
    assert not train.keys() & validation.keys()
    assert sorted(train.keys() | validation.keys()) == list(range(1, 83))
    for number, row in (train | validation).items():
        assert number > 80 or row + b"\n" == rows[(number - 1) % 40]
    assert {n % 40 for n in validation} == {n % 40 for n in validation if n <= 40}
    assert not {n % 40 for n in validation} & {n % 40 for n in train if n <= 80}, (
        "a repeated row is never on both sides"
    )
    assert (len(train) - 2, len(validation)) == (choice.train.rows, choice.validation.rows)
    assert 0.1 < len(validation) / 80 < 0.4
    assert spec.training_sha256 == sha256_of(Path(spec.training_data))
    assert spec.validation_sha256 == sha256_of(Path(str(spec.validation_data)))
    assert not (Path(spec.training_data).parent / "unsplit.jsonl").exists()


def test_a_split_is_the_same_whenever_it_is_made(bench: Bench) -> None:
    file_id = keep(bench, b"".join(good(n) for n in range(50)))
    job = create(bench, file_id, validation_split=0.2)
    spec, choice = spec_of(bench, job)
    assert spec.skip_lines is None
    Path(spec.training_data).unlink()
    again, _ = spec_of(bench, job)
    assert again == spec and Path(spec.training_data).is_file()
    other = bench.jobs.create(PROJECT, CreateJob(model="tiny", training_file=file_id, seed=6, validation_split=0.2))
    assert spec_of(bench, other)[1] != choice


def test_files_of_a_split_that_were_cut_short_are_made_again(bench: Bench) -> None:
    job = create(bench, keep(bench, b"".join(good(n) for n in range(50)) + BAD), validation_split=0.2, max_bad_rows=1)
    spec, _ = spec_of(bench, job)
    whole = Path(spec.training_data).read_bytes()
    job = msgspec.structs.replace(job, hyperparameters=msgspec.to_builtins(spec.hyperparameters))
    Path(spec.training_data).write_bytes(whole[:100])
    assert preparation(bench).spec(job) == spec
    assert Path(spec.training_data).read_bytes() == whole
    Path(str(spec.skip_lines)).write_bytes(b"{")
    assert preparation(bench).spec(job) == spec


def test_a_split_that_leaves_a_side_empty_is_refused(bench: Bench) -> None:
    job = create(bench, keep(bench, good(1) * 30), validation_split=0.5)
    with pytest.raises(InvalidRequest) as caught:
        preparation(bench).prepare(job)
    assert (caught.value.code, caught.value.param) == ("split_leaves_nothing", "validation_split")
    assert list((bench.home.jobs / job.id / "data").glob(".*")) == []


def test_a_job_tells_of_validation_rows_that_it_trains_on(bench: Bench) -> None:
    orders = json.dumps({"messages": [USER, ASSISTANT], "fake": {"steps": 2, "sleep_s": 0}}).encode() + b"\n"
    train = orders + b"".join(good(n) for n in range(30))
    validation = b"".join(good(n) for n in (28, 29, 30, 31))
    job = create(bench, keep(bench, train), validation_file=keep(bench, validation))
    assert bench.until_over(job.id).status == "succeeded"
    [told] = [event for event in bench.events(job.id) if event.code == "validation_leak"]
    assert told.values == {"found": 2, "rows": 4} and told.level == "warn"
    bench.close()


def test_a_job_tells_what_it_leaves_out_and_repeats_it_at_its_end(bench: Bench) -> None:
    orders = json.dumps({"messages": [USER, ASSISTANT], "fake": {"steps": 2, "sleep_s": 0}}).encode() + b"\n"
    data = orders + b"".join(good(n) for n in range(30)) + BAD
    job = create(bench, keep(bench, data), validation_split=0.2, max_bad_rows=1)
    assert bench.until_over(job.id).status == "succeeded"
    told = {event.code: event for event in bench.events(job.id) if event.type == "message"}
    assert told["bad_rows_left_out"].values == {"rows": 1} and told["bad_rows_left_out"].level == "warn"
    values = told["validation_split"].values
    assert values["validation"] + values["train"] == 31 and values["validation"] > 0
    assert told["queued"].values == {"rows": values["train"]}
    assert told["succeeded"].values == {"used": 3, "skipped": 0, "cut": 0}, "as the trainer counted them"
    assert told["succeeded"].data == {"rows": bench.job(job.id).rows}
    bench.close()
