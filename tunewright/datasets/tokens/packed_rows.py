"""A tokenised dataset as arrays on the disk, and the way there: parts made side by side by all cores, then joined.

A folder of it holds
    tokens.npy   (tokens,) int32: whole rows end to end, not cut (absent if only counts were wanted)
    rows.npy     (rows, 4) int64: line, tokens (-1: refused), spans, images; a preference row stands there twice
    spans.npy    (spans, 2) int32: runs of labels within a row
    refused.json the first reasons why rows were refused
Where rows end by a job's `max_length` and which lines it leaves out is decided when it is read, so all jobs share it.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from tunewright.datasets.lines import line_starts
from tunewright.datasets.tokens.token_part import REFUSED, Done, Order, Refused, write_part
from tunewright.errors import Unavailable
from tunewright.i18n import mark
from tunewright.worker_environment import worker_environment

FORMAT = 1
LEAST_PART_BYTES = 2 << 20
"""A process of its own pays from here on: it takes half a second to start."""
_POLL_S = 0.02
_COPIED_ROWS = 1 << 16
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class PackedRows:
    """The arrays of a folder, mapped. Row i is `tokens[starts[i]:starts[i] + lengths[i]]`; all but `tokens` are (rows,).

    `refused` are the lines of rows without tokens, which the other arrays leave out; `causes` the reasons of the first.
    """

    tokens: np.ndarray | None
    lines: np.ndarray
    lengths: np.ndarray
    images: np.ndarray
    spans: np.ndarray
    span_ends: np.ndarray
    refused: np.ndarray
    causes: list[Refused]

    @cached_property
    def starts(self) -> np.ndarray:
        """(rows,) where each row begins."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def span_starts(self) -> np.ndarray:
        """(rows,) the first span of each row; `span_ends` is the one after its last."""
        return np.concatenate([np.zeros(1, np.int64), self.span_ends[:-1]])[: len(self.span_ends)]

    def labels_within(self, limit: int) -> np.ndarray:
        """(rows,) int64: labels among the first `limit` tokens of each row."""
        cut = np.minimum(self.spans, limit)
        so_far = np.concatenate([np.zeros(1, np.int64), np.cumsum(cut[:, 1] - cut[:, 0], dtype=np.int64)])
        return so_far[self.span_ends] - so_far[self.span_starts]


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def load(folder: Path) -> PackedRows:
    """Map the arrays of a finished folder. Raises OSError or ValueError for one that is not whole."""
    rows = _mapped(folder / "rows.npy")
    usable = rows[:, 1] != REFUSED
    kept = rows if usable.all() else rows[usable]
    tokens = folder / "tokens.npy"
    return PackedRows(
        tokens=_mapped(tokens) if tokens.exists() else None,
        lines=kept[:, 0],
        lengths=kept[:, 1],
        images=kept[:, 3],
        spans=_mapped(folder / "spans.npy"),
        span_ends=np.cumsum(kept[:, 2]),
        refused=rows[~usable, 0],
        causes=msgspec.json.decode((folder / "refused.json").read_bytes(), type=list[Refused]),
    )


def _mapped(path: Path) -> np.ndarray:
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))  # a plain view: quicker to cut up


def tokenise(
    data: Path,
    base: Path,
    target: Path,
    *,
    max_line_bytes: int,
    processes: int,
    keep_tokens: bool = True,
    between_rows: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, size: None,
) -> None:
    """Fill the empty folder `target` with the tokens of every row of `data`, by at most `processes` processes.

    `between_rows` is called often and may raise to end the work. Raises Unavailable(`tokenising_failed`) if a process dies.
    """
    size = data.stat().st_size
    with data.open("rb") as stream:
        begin = len(_BOM) if stream.read(len(_BOM)) == _BOM else 0
        borders = line_starts(stream, begin, size, max(1, min(processes, size // LEAST_PART_BYTES)))
    folders = [target / f"part-{n}" for n in range(len(borders) - 1)]
    for folder, (start, end) in zip(folders, pairwise(borders), strict=True):
        folder.mkdir()
        order = Order(
            data=str(data), start=start, end=end, base=str(base), max_line_bytes=max_line_bytes, keep_tokens=keep_tokens
        )
        (folder / "order.json").write_bytes(msgspec.json.encode(order))
        if len(folders) == 1:
            write_part(order, folder, between_rows)
    if len(folders) > 1:
        _run(folders, size, between_rows, progress)
    _join(folders, target, keep_tokens)
    for folder in folders:
        shutil.rmtree(folder)
    progress(size, size)


def _run(
    folders: list[Path], size: int, between_rows: Callable[[], None], progress: Callable[[int, int], None]
) -> None:
    command = [sys.executable, "-P", "-m", "tunewright.datasets.tokens.token_part"]
    children: list[subprocess.Popen[bytes]] = []
    try:
        for folder in folders:
            children.append(subprocess.Popen([*command, str(folder)], stdin=subprocess.PIPE, env=worker_environment()))
        while any(child.poll() is None for child in children):
            if any(child.poll() for child in children):
                break
            between_rows()
            progress(sum(_progress_of(folder) for folder in folders), size)
            time.sleep(_POLL_S)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.communicate()
    if any(child.returncode for child in children):
        raise Unavailable(
            "tokenising_failed", mark("A process that turns rows into tokens ended too early; the log says why.")
        )


def _progress_of(folder: Path) -> int:
    try:
        return int((folder / "progress").read_bytes() or b"0")
    except (FileNotFoundError, ValueError):
        return 0


def _join(folders: Sequence[Path], target: Path, keep_tokens: bool) -> None:
    """The parts as one set of arrays, with lines counted through the whole file."""
    parts = [msgspec.json.decode((folder / "done.json").read_bytes(), type=Done) for folder in folders]
    if keep_tokens:
        with (target / "tokens.npy").open("wb") as stream:
            _write_header(stream, (sum(part.tokens for part in parts),), np.int32)
            for folder in folders:
                with (folder / "tokens.i32").open("rb") as source:
                    shutil.copyfileobj(source, stream, 1 << 20)
    with (target / "spans.npy").open("wb") as stream:
        _write_header(stream, (sum(part.spans for part in parts), 2), np.int32)
        for folder in folders:
            with (folder / "spans.i32").open("rb") as source:
                shutil.copyfileobj(source, stream, 1 << 20)
    causes: list[Refused] = []
    lines_before = 0
    with (target / "rows.npy").open("wb") as stream:
        _write_header(stream, (sum(part.rows for part in parts), 4), np.int64)
        for folder, part in zip(folders, parts, strict=True):
            _append_rows(folder / "rows.i64", stream, lines_before)
            found = msgspec.json.decode((folder / "refused.json").read_bytes(), type=list[Refused])
            causes += [_moved(cause, lines_before) for cause in found]
            lines_before += part.lines
    (target / "refused.json").write_bytes(msgspec.json.encode(causes))


def _write_header(stream: BinaryIO, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
    described = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, described)


def _append_rows(path: Path, stream: BinaryIO, lines_before: int) -> None:
    with path.open("rb") as source:
        while len(some := np.fromfile(source, np.int64, 4 * _COPIED_ROWS)):
            some[::4] += lines_before
            stream.write(some.data)


def _moved(cause: Refused, lines_before: int) -> Refused:
    values = cause.values | ({"line": cause.line + lines_before} if "line" in cause.values else {})
    return msgspec.structs.replace(cause, line=cause.line + lines_before, values=values)
