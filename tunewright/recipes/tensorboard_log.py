"""The curves of a training for TensorBoard: an event file of each attempt in `tensorboard/` of the job's folder.

An event file is TFRecord frames around protobuf messages. Scalars need the few fields below, which are written out here: the
libraries for it bring protobuf, writer threads and a native checksum along, for two hundred bytes a step.

    frame        length (uint64), its checksum, message, its checksum; little-endian, checksums are masked CRC-32C
    Event        1 wall_time (double), 2 step (int64), 3 file_version (string), 5 Summary, 7 SessionLog
    Summary      1 value, repeated: 1 tag (string), 2 simple_value (float)
    SessionLog   1 status: START makes a reader forget what earlier files say of this step and of later ones
"""

import struct
from contextlib import suppress
from functools import cache
from io import BufferedWriter

from tunewright.clock import wall_ms
from tunewright.i18n import mark
from tunewright.jobs.spec import TENSORBOARD, Metrics
from tunewright.recipes.attempt import Attempt
from tunewright.recipes.evaluation import Progress

_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5
"""Wire types of protobuf."""
_START = 1
_CASTAGNOLI = 0x82F63B78
"""The polynomial of CRC-32C, lowest bit first."""


class TensorboardLog:
    """One attempt's event file, if the job wants any. A log that can't be written is told of and costs no training."""

    def __init__(self, attempt: Attempt, progress: Progress) -> None:
        """`progress` is where the attempt begins: steps of an earlier one after it will be made again, so they are void."""
        self._attempt = attempt
        self._before = progress.tokens, progress.elapsed_s
        self._stream: BufferedWriter | None = None
        if not attempt.spec.tensorboard:
            return
        try:
            folder = attempt.folder / TENSORBOARD
            folder.mkdir(exist_ok=True)
            self._stream = (folder / f"events.out.tfevents.{attempt.spec.attempt:06d}").open("wb")
        except OSError:
            self._give_up(progress.step)
        self._append(0, _bytes(3, b"brain.Event:2"))
        self._append(progress.step + 1, _bytes(7, _number(1, _START)))

    def add(self, metrics: Metrics) -> None:
        """Append what was measured at a step. `tokens_per_second` is over all the time since the last one, with what
        evaluating and saving took of it."""
        tokens, seconds = metrics.tokens - self._before[0], metrics.elapsed_s - self._before[1]
        self._before = metrics.tokens, metrics.elapsed_s
        scalars = {
            "train/loss": metrics.loss,
            "train/accuracy": metrics.accuracy,
            "train/reward_margin": metrics.reward_margin,
            "train/learning_rate": metrics.learning_rate,
            "train/tokens_per_second": tokens / seconds if seconds > 0 else None,
            "eval/loss": metrics.eval_loss,
            "eval/accuracy": metrics.eval_accuracy,
            "eval/reward_margin": metrics.eval_reward_margin,
        }
        values = [
            _bytes(1, _bytes(1, tag.encode()) + _key(2, _FOUR_BYTES) + struct.pack("<f", value))
            for tag, value in scalars.items()
            if value is not None
        ]
        self._append(metrics.step, _bytes(5, b"".join(values)))

    def close(self) -> None:
        """Close the file; nothing is written afterwards."""
        stream, self._stream = self._stream, None
        if stream is not None:
            with suppress(OSError):  # the rest of an event that found no room
                stream.close()

    def _append(self, step: int, content: bytes) -> None:
        if self._stream is None:
            return
        event = _key(1, _EIGHT_BYTES) + struct.pack("<d", wall_ms() / 1000) + _number(2, step) + content
        length = struct.pack("<Q", len(event))
        try:
            self._stream.write(length + _checksum(length) + event + _checksum(event))
            self._stream.flush()
        except OSError:
            self._give_up(step)

    def _give_up(self, step: int) -> None:
        self.close()
        text = mark("The TensorBoard log can't be written (is the disk full?), so it ends before step {step}.")
        self._attempt.note("tensorboard_ended", text, step=step)


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last one have the highest bit set."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def _key(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _number(field: int, value: int) -> bytes:
    return _key(field, _VARINT) + _varint(value)


def _bytes(field: int, content: bytes) -> bytes:
    return _key(field, _BYTES) + _varint(len(content)) + content


def _checksum(content: bytes) -> bytes:
    """The masked CRC-32C, four bytes."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _crc_of_bytes()[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


@cache
def _crc_of_bytes() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [crc >> 1 ^ (_CASTAGNOLI if crc & 1 else 0) for crc in table]
    return table
