"""Event files, read here by the description of the format and not by the code that wrote them."""

import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.job_folder import ROWS, codes, metrics, next_attempt, train_here, write_job, write_rows
from tests.recipes.test_preference import dpo_job
from tests.recipes.test_text import finished
from tunewright.files_on_disk import sha256_of
from tunewright.jobs.spec import Metrics, TrainingSpec

Curves = dict[str, dict[int, float]]
"""Tag -> step -> value."""


def crc32c(content: bytes) -> int:
    """Bit by bit, as RFC 3720 describes it."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def frames(path: Path) -> Iterator[bytes]:
    """The messages of a TFRecord file, whose checksums are right."""

    def checked(content: bytes, masked: bytes) -> bytes:
        rotated = (struct.unpack("<I", masked)[0] - 0xA282EAD8) % 2**32
        assert crc32c(content) == (rotated >> 17 | rotated << 15) % 2**32
        return content

    left = path.read_bytes()
    while left:
        (length,) = struct.unpack("<Q", checked(left[:8], left[8:12]))
        yield checked(left[12 : 12 + length], left[12 + length : 16 + length])
        left = left[16 + length :]


def fields(message: bytes) -> dict[int, list[Any]]:
    """Number -> values of a protobuf message: ints, floats and bytes."""
    found: dict[int, list[Any]] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            value: Any = varint()
        else:
            size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            value, at = message[at : at + size], at + size
            if kind != 2:
                (value,) = struct.unpack({1: "<d", 5: "<f"}[kind], value)
        found.setdefault(number, []).append(value)
    return found


def read(folder: Path) -> tuple[Curves, int]:
    """What TensorBoard shows of a log directory, and how many events it forgot because a later file makes them again."""
    curves: Curves = {}
    forgotten = 0
    for path in sorted(folder.glob("*tfevents*")):
        first, *rest = map(fields, frames(path))
        assert first[3] == [b"brain.Event:2"] and first[1][0] > 1.6e9
        for event in rest:
            (step,) = event[2]
            for session in map(fields, event.get(7, [])):
                assert session == {1: [1]}, "START"
                forgotten += sum(known >= step for known in curves.get("train/loss", {}))
                curves = {tag: {s: v for s, v in curve.items() if s < step} for tag, curve in curves.items()}
            for summary in event.get(5, []):
                for value in map(fields, fields(summary)[1]):
                    curve = curves.setdefault(value[1][0].decode(), {})
                    assert step not in curve, "no step twice"
                    curve[step] = value[2][0]
    return curves, forgotten


def float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def told(found: list[Metrics], **tags: str) -> Curves:
    """What the journal says under these tags, by the name of the field, in the precision of an event file."""
    return {
        tag: {step.step: float32(value) for step in found if (value := getattr(step, field)) is not None}
        for field, tag in tags.items()
    }


def with_validation(tmp_path: Path, base: Path, **changes: Any) -> TrainingSpec:
    rows = write_rows(tmp_path / "valid.jsonl", ROWS[:3])
    validation = {"validation_data": str(rows), "validation_sha256": sha256_of(rows)}
    return write_job(tmp_path / "job", base, tensorboard=True, **validation, **changes)


SUPERVISED = {
    "loss": "train/loss",
    "accuracy": "train/accuracy",
    "learning_rate": "train/learning_rate",
    "eval_loss": "eval/loss",
    "eval_accuracy": "eval/accuracy",
}
PREFERENCE = SUPERVISED | {"reward_margin": "train/reward_margin", "eval_reward_margin": "eval/reward_margin"}


def test_the_checksum_is_the_published_one() -> None:
    assert crc32c(b"123456789") == 0xE3069283


def test_an_event_file_says_what_the_journal_says(tmp_path: Path, base: Path) -> None:
    found = metrics(train_here(with_validation(tmp_path, base)))
    curves, _ = read(tmp_path / "job" / "tensorboard")
    speeds = curves.pop("train/tokens_per_second")
    assert curves == told(found, **SUPERVISED)
    assert list(curves["train/loss"]) == list(range(1, 13)) and list(curves["eval/loss"]) == [4, 8, 12]
    first, second = found[:2]
    assert speeds[2] == pytest.approx((second.tokens - first.tokens) / (second.elapsed_s - first.elapsed_s), rel=1e-6)
    assert list(speeds) == list(curves["train/loss"])


def test_steps_that_are_made_again_are_shown_once(tmp_path: Path, base: Path) -> None:
    """Two attempts, the second of which begins a step before the first one ended, as after a death between checkpoints."""
    spec = with_validation(tmp_path, base, checkpoint_every_s=1e-6)
    first = metrics(train_here(spec, stop_at=6))
    shutil.rmtree(tmp_path / "job" / "checkpoints" / "step-6")
    second = metrics(train_here(next_attempt(spec)))
    assert second[0].step == 6 == first[-1].step
    curves, forgotten = read(tmp_path / "job" / "tensorboard")
    del curves["train/tokens_per_second"]
    assert curves == told([*first[:-1], *second], **SUPERVISED) and forgotten == 1


def test_preference_training_shows_its_margins(tmp_path: Path, base: Path) -> None:
    spec = dpo_job(tmp_path / "job", base, validate=True, tensorboard=True)
    found = metrics(train_here(spec))
    curves, _ = read(tmp_path / "job" / "tensorboard")
    del curves["train/tokens_per_second"]
    assert curves == told(found, **PREFERENCE)
    assert curves["train/reward_margin"] and curves["eval/reward_margin"]


def test_a_log_that_cannot_be_written_costs_no_training(tmp_path: Path, base: Path) -> None:
    spec = with_validation(tmp_path, base, n_epochs=1)
    (tmp_path / "job" / "tensorboard").write_bytes(b"in the way")
    found = train_here(spec)
    assert "tensorboard_ended" in codes(found) and finished(found)


def test_a_job_that_does_not_ask_has_no_log(tmp_path: Path, base: Path) -> None:
    train_here(write_job(tmp_path / "job", base, n_epochs=1))
    assert not (tmp_path / "job" / "tensorboard").exists()
