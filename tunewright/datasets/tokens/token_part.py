"""Rows of a byte range of a data file to tokens: one part of a tokenised dataset, written by one process.

`python -m tunewright.datasets.tokens.token_part FOLDER` reads `FOLDER/order.json` and writes beside it, in constant memory:

    tokens.i32    token ids, row after row (nothing if the order says that only counts are wanted)
    rows.i64      for each row: line (from 1 within the part), tokens (-1: the row was refused), spans, images
    spans.i32     runs of labels: first token and the one after the last, counted within the row
    refused.json  why rows were refused: the first `CAUSES_KEPT`
    done.json     `Done`, when all the rest is there
    progress      bytes read so far, as text

Numbers are in the machine's own byte order. The process ends when its stdin does: no part outlives who ordered it.
"""

import os
import sys
import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from tunewright import strict_json
from tunewright.datasets.lines import Line, read_lines
from tunewright.datasets.tokens.examples import examples_of, refuse_problems
from tunewright.errors import InvalidRequest, TunewrightError
from tunewright.i18n import mark
from tunewright.rendering.renderer import Renderer, renderer_of

CAUSES_KEPT = 100
REFUSED = -1
_BUFFER_BYTES = 1 << 20
_PROGRESS_EVERY = 64


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes [start, end) of `data`, both at beginnings of lines, to tokens of the renderer of `base`."""

    data: str
    start: int
    end: int
    base: str
    max_line_bytes: int
    keep_tokens: bool = True


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """Why a row has no tokens: an error's kind, code, sentence and values."""

    line: int
    kind: str
    code: str
    message: str
    values: dict[str, Any] = {}


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """Totals of a part. `lines` counts blank ones too, so that the next part knows its first line."""

    lines: int
    rows: int
    tokens: int
    spans: int


def write_part(order: Order, folder: Path, between_rows: Callable[[], None] = lambda: None) -> Done:
    """Tokenise one range into `folder`. `between_rows` may raise to end it. Raises Misconfigured for an unusable base."""
    renderer = renderer_of(Path(order.base))
    causes: list[Refused] = []
    lines = 0
    with _Writer(folder, order.keep_tokens) as writer, Path(order.data).open("rb", _BUFFER_BYTES) as stream:
        stream.seek(order.start)
        for line in read_lines(stream, order.max_line_bytes):
            if line.byte_offset >= order.end:
                break
            lines = line.number
            if lines % _PROGRESS_EVERY == 0:
                writer.note_progress(line.byte_offset - order.start)
            if line.data is not None and (not line.data or line.data.isspace()):
                continue
            between_rows()
            try:
                _write_row(writer, renderer, line, order.max_line_bytes)
            except TunewrightError as error:
                writer.add_refused(line.number)
                if len(causes) < CAUSES_KEPT:
                    causes.append(_refused(line.number, error))
        done = Done(lines=lines, rows=writer.rows, tokens=writer.tokens, spans=writer.spans)
    (folder / "refused.json").write_bytes(msgspec.json.encode(causes))
    (folder / "done.json").write_bytes(msgspec.json.encode(done))
    return done


def _write_row(writer: "_Writer", renderer: Renderer, line: Line, max_line_bytes: int) -> None:
    if line.data is None:
        sentence = mark("line {line} is longer than {limit} bytes")
        raise InvalidRequest("line_too_long", sentence, line=line.number, limit=max_line_bytes)
    value = strict_json.loads(line.data)
    # All of a row or nothing: whatever can be refused comes before the first byte is written.
    try:
        found = examples_of(value, line.number)
        examples = [renderer.example(conversation) for conversation in found.conversations]
    except TunewrightError:
        raise
    except Exception:
        # Templates are written for rows that passed the check. One that did not may do anything to them; it is refused for
        # what is wrong with it. Any other is a bug of ours.
        refuse_problems(value, line.number)
        raise
    for example in examples:
        writer.add(line.number, example.tokens, example.trained, found.images)


def _refused(line: int, error: TunewrightError) -> Refused:
    return Refused(line=line, kind=error.kind, code=error.code, message=error.message, values=error.values)


class _Writer:
    """Appends rows to the files of a part."""

    def __init__(self, folder: Path, keep_tokens: bool) -> None:
        self.rows = self.tokens = self.spans = 0
        self._keep_tokens = keep_tokens
        self._files: dict[str, BinaryIO] = {}
        for name in ("tokens.i32", "rows.i64", "spans.i32"):
            self._files[name] = (folder / name).open("wb", _BUFFER_BYTES)
        self._progress = os.open(folder / "progress", os.O_WRONLY | os.O_CREAT, 0o600)

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._progress)
        for stream in self._files.values():
            stream.close()

    def note_progress(self, size_bytes: int) -> None:
        """How far the part is."""
        os.pwrite(self._progress, b"%020d" % size_bytes, 0)

    def add(self, line: int, tokens: list[int], trained: list[bool], images: int) -> None:
        """One rendered conversation."""
        spans = label_spans(trained)
        if self._keep_tokens:
            self._files["tokens.i32"].write(array("i", tokens))
        self._files["spans.i32"].write(array("i", spans))
        self._files["rows.i64"].write(array("q", (line, len(tokens), len(spans) // 2, images)))
        self.rows += 1
        self.tokens += len(tokens)
        self.spans += len(spans) // 2

    def add_refused(self, line: int) -> None:
        """A row without tokens."""
        self._files["rows.i64"].write(array("q", (line, REFUSED, 0, 0)))
        self.rows += 1


def label_spans(trained: list[bool]) -> list[int]:
    """[begin, end, begin, end, ...] of the runs of labels. The first token is never one: nothing predicts it."""
    mask = bytes(trained)
    spans: list[int] = []
    begin = mask.find(1, 1)
    while begin >= 0:
        end = mask.find(0, begin)
        end = len(mask) if end < 0 else end
        spans += (begin, end)
        begin = mask.find(1, end)
    return spans


def main(arguments: list[str]) -> int:
    """The part of the order in the folder; exit code 0 when it is done."""
    end_with_stdin()
    folder = Path(arguments[0])
    order = msgspec.json.decode((folder / "order.json").read_bytes(), type=Order)
    write_part(order, folder)
    return 0


def end_with_stdin() -> None:
    """From now on this process ends when whoever started it closes its stdin or dies."""

    def watch() -> None:
        while os.read(0, 4096):  # not sys.stdin, whose lock would be held when the interpreter ends
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
