"""The journal of a batch: one line for each request that was answered, appended as it is. It survives the server.

A line that a crash cut short never was: its request is asked again. So each request stands in the journal once, and the files
that are made of it hold every line once, in the order of the input.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    line: int
    ok: bool
    record: msgspec.Raw


_decode = msgspec.json.Decoder(_Entry).decode


class Journal:
    """Used by one thread at a time. `completed` and `failed` count its lines."""

    def __init__(self, path: Path) -> None:
        """Open, and cut off what was not written whole."""
        self._path = path
        self._places: dict[int, int] = {}
        """Line of the input -> where its entry begins."""
        self.completed = self.failed = 0
        whole = 0
        if path.exists():
            with path.open("rb") as stream:
                for data in stream:
                    entry = _entry(data)
                    if entry is None:
                        break
                    self._note(entry.line, entry.ok, whole)
                    whole += len(data)
        self._stream = path.open("ab")
        self._stream.truncate(whole)
        self._end = whole

    def __contains__(self, line: int) -> bool:
        return line in self._places

    def add(self, line: int, ok: bool, record: dict[str, Any]) -> None:
        """Keep an answer. Raises OSError (a full disk): then it is not kept."""
        data = msgspec.json.encode({"line": line, "ok": ok, "record": record}) + b"\n"
        try:
            self._stream.write(data)
            self._stream.flush()
        except OSError:
            self._stream = self._path.open("ab")
            self._stream.truncate(self._end)
            raise
        self._note(line, ok, self._end)
        self._end += len(data)

    def write_files(self, output: Path, errors: Path) -> None:
        """The two files of the batch; one without lines is left empty."""
        with output.open("wb") as good, errors.open("wb") as bad:
            for entry in self._in_order():
                (good if entry.ok else bad).write(bytes(entry.record) + b"\n")

    def close(self) -> None:
        """No more is to be added."""
        self._stream.close()

    def _note(self, line: int, ok: bool, place: int) -> None:
        if line not in self._places:
            self._places[line] = place
            self.completed += ok
            self.failed += not ok

    def _in_order(self) -> Iterator[_Entry]:
        with self._path.open("rb") as stream:
            for line in sorted(self._places):
                stream.seek(self._places[line])
                yield _decode(stream.readline())


def _entry(data: bytes) -> _Entry | None:
    if not data.endswith(b"\n"):
        return None
    try:
        return _decode(data)
    except msgspec.MsgspecError:
        return None
