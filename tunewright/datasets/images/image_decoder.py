"""The parent's side of the decoding process: started when needed, killed when it takes too long, started again."""

import os
import select
import subprocess
import sys
import threading
from pathlib import Path

import msgspec

from tunewright.clock import mono_s
from tunewright.datasets.images.image_records import Decoded, Order
from tunewright.errors import Unavailable
from tunewright.i18n import mark
from tunewright.worker_environment import worker_environment

IMAGE_LIMIT_S = 10.0
_START_LIMIT_S = 60.0
_MAX_ANSWER_BYTES = 1 << 16


class Decoder:
    """Decodes one image at a time in a child process; several threads take turns. Leaving its block ends the child."""

    def __init__(self, *, limit_s: float = IMAGE_LIMIT_S) -> None:
        self._limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The child's, if it runs."""
        return None if self._process is None else self._process.pid

    def decode(self, path: Path, target: Path) -> Decoded:
        """What the image at `path` is; `target` is written if its bytes had to change.

        A child that dies of an image (out of memory or CPU time) or thinks for too long is that image's fault: `error` is
        `image_too_large`. Raises Unavailable(`image_decoder_failed`) if no child can be started.
        """
        order = Order(path=str(path), target=str(target))
        with self._lock:
            for _ in range(2):
                process = self._running()
                died_of = self._ask(process, order)
                if isinstance(died_of, Decoded):
                    return died_of
                self._end()
                if died_of == "late":
                    break  # not a second ten seconds
            target.unlink(missing_ok=True)
            return Decoded(error="image_too_large")

    def close(self) -> None:
        """End the child. A later `decode` starts another."""
        with self._lock:
            self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tunewright.datasets.images.image_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=worker_environment() | {"MALLOC_ARENA_MAX": "1"},
                bufsize=0,
            )
        except OSError:
            raise _no_decoder() from None
        if not isinstance(self._answer(self._process, _START_LIMIT_S), Decoded):
            self._end()
            raise _no_decoder()
        return self._process

    def _ask(self, process: subprocess.Popen[bytes], order: Order) -> Decoded | str:
        body = msgspec.json.encode(order)
        try:
            os.write(process.stdin.fileno(), len(body).to_bytes(4, "big") + body)  # type: ignore[union-attr]
        except OSError:
            return "dead"
        return self._answer(process, self._limit_s)

    def _answer(self, process: subprocess.Popen[bytes], limit_s: float) -> Decoded | str:
        """`late` or `dead` if none comes."""
        deadline_s = mono_s() + limit_s
        data = b""
        descriptor = process.stdout.fileno()  # type: ignore[union-attr]
        waiting = select.poll()  # select() fails above 1024 open files
        waiting.register(descriptor, select.POLLIN)
        while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big"):
            left_s = deadline_s - mono_s()
            if left_s <= 0 or not waiting.poll(left_s * 1000):
                return "late"
            piece = os.read(descriptor, _MAX_ANSWER_BYTES)
            if not piece or len(data) + len(piece) > _MAX_ANSWER_BYTES:
                return "dead"
            data += piece
        try:
            return msgspec.json.decode(data[4:], type=Decoded)
        except msgspec.DecodeError:
            return "dead"

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _no_decoder() -> Unavailable:
    return Unavailable("image_decoder_failed", mark("The process that decodes images could not be started"))
