"""How many tokens a data file has for a base, and how many of them are trained: from the same arrays that trainers read.

`python -m tunewright.datasets.tokens.token_counts FOLDER` does it in a process of its own for `FOLDER/order.json` (`CountOrder`)
and leaves `FOLDER/result.json` (`TokenStatistics`): the server neither loads numpy nor gives its cores away.
"""

import errno
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from tunewright.datasets.report import MAX_PROBLEMS, MAX_WRITTEN, Problem
from tunewright.i18n import mark

if TYPE_CHECKING:
    import numpy as np

    from tunewright.datasets.tokens.packed_cache import PackedCache
    from tunewright.datasets.tokens.packed_rows import PackedRows

EXIT_DISK_FULL = 3
LINES_NAMED = 10
PACKED_PER_BYTE = 2
"""Tokens take no more than so many bytes for each byte of text; a file whose tokens would not fit is only counted."""
_PERCENTILES = (5, 25, 50, 75, 95, 99)


class Bin(msgspec.Struct, frozen=True):
    """`rows` have at least `least` and fewer than `below`."""

    least: int
    below: int
    rows: int


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """How a number is spread over the rows. All zero without rows. The bins double in width and leave no gap."""

    total: int = 0
    mean: float = 0.0
    min: int = 0
    p5: int = 0
    p25: int = 0
    p50: int = 0
    p75: int = 0
    p95: int = 0
    p99: int = 0
    max: int = 0
    histogram: list[Bin] = []


class Affected(msgspec.Struct, frozen=True, kw_only=True):
    """Rows that something happens to, the tokens that they lose by it, and the first line numbers."""

    rows: int = 0
    tokens: int = 0
    lines: list[int] = []


class TokenStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What training on the file with `max_length` does. A preference row counts with both of its answers.

    `tokens` are those of whole rows, `trained` the labels that are left once rows are cut. `tokens_per_epoch` and
    `trained_per_epoch` are of the rows that are used, as they are used. `refused` rows have no tokens: something is wrong
    with them. `counts` are all problems by code but for refused rows, `problems` the first 100 of all.
    """

    max_length: int
    renderer_hash: str
    rows: int
    images: int
    tokens: Spread
    trained: Spread
    tokens_per_epoch: int
    trained_per_epoch: int
    cut: Affected
    nothing_to_train: Affected
    refused: Affected
    counts: dict[str, int]
    problems: list[Problem]


class CountOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What to count; paths are absolute. Tokens are kept in `cache` if they fit into `cache_bytes`."""

    data: str
    data_sha256: str
    base: str
    max_length: int
    max_line_bytes: int
    cache: str
    cache_bytes: int


def count_tokens(
    path: Path,
    base: Path,
    *,
    max_length: int,
    max_line_bytes: int,
    processes: int = 0,
    progress: Callable[[int, int], None] = lambda done, size: None,
    between_rows: Callable[[], None] = lambda: None,
    cache: "PackedCache | None" = None,
    data_sha256: str = "",
    problems_to: Path | None = None,
) -> TokenStatistics:
    """Count the tokens of every row of `path` with the tokenizer and template of the folder `base`.

    `processes` 0 means all cores. `progress` gets (bytes done, bytes in all); `between_rows` may raise to end it. With a
    `cache`, the tokens are taken from there or kept there under `data_sha256`. What `max_length` does to rows is appended to
    the list `problems_to`, for every row. Raises Misconfigured for a base that can't be used, Unavailable(`tokenising_failed`).
    """
    from tunewright.datasets.tokens import packed_rows
    from tunewright.datasets.tokens.packed_cache import key_of
    from tunewright.rendering.renderer import renderer_of

    renderer_hash = renderer_of(base).hash

    def make(folder: Path) -> None:
        packed_rows.tokenise(
            path,
            base,
            folder,
            max_line_bytes=max_line_bytes,
            processes=processes or packed_rows.cores(),
            keep_tokens=cache is not None,
            between_rows=between_rows,
            progress=progress,
        )

    if cache is None:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder))
            return _statistics(packed_rows.load(Path(folder)), max_length, renderer_hash, problems_to)
    packed, _ = cache.use(key_of(data_sha256, renderer_hash), make, packed_rows.load, between_rows)
    return _statistics(packed, max_length, renderer_hash, problems_to)


def _statistics(packed: "PackedRows", max_length: int, renderer_hash: str, problems_to: Path | None) -> TokenStatistics:
    import numpy as np

    rows = _by_line(packed, max_length)
    used = rows.idle == 0
    lost = np.where(used, rows.tokens - rows.kept, 0)
    cut = lost > 0
    if problems_to is not None:
        with problems_to.open("ab") as stream:
            idle = _problems(rows.lines[~used], rows.tokens[~used], "error", max_length)
            shortened = _problems(rows.lines[cut], rows.tokens[cut], "warning", max_length)
            written = islice(chain(idle, shortened), MAX_WRITTEN)
            stream.writelines(msgspec.json.encode(problem) + b"\n" for problem in written)
    problems = [
        *_problems(rows.lines[~used][:MAX_PROBLEMS], rows.tokens[~used], "error", max_length),
        *_problems(rows.lines[cut][:MAX_PROBLEMS], rows.tokens[cut], "warning", max_length),
        *(
            Problem(code=c.code, severity="error", message=c.message, values=c.values, line=c.line)
            for c in packed.causes
        ),
    ]
    counts = {"nothing_to_train": int((~used).sum()), "example_too_long": int(cut.sum())}
    return TokenStatistics(
        max_length=max_length,
        renderer_hash=renderer_hash,
        rows=len(rows.lines),
        images=int(rows.images.sum()),
        tokens=spread(rows.tokens),
        trained=spread(rows.trained),
        tokens_per_epoch=int(rows.kept[used].sum()),
        trained_per_epoch=int(rows.trained[used].sum()),
        cut=_affected(rows.lines[cut], int(lost.sum())),
        nothing_to_train=_affected(rows.lines[~used], int(rows.tokens[~used].sum())),
        refused=_affected(packed.refused, 0),
        counts={code: count for code, count in counts.items() if count},
        problems=problems[:MAX_PROBLEMS],
    )


class _Lines(msgspec.Struct, frozen=True):
    """Arrays (lines,): what belongs to one line of the file, summed. `idle` counts its conversations without a label."""

    lines: "np.ndarray"
    tokens: "np.ndarray"
    kept: "np.ndarray"
    trained: "np.ndarray"
    idle: "np.ndarray"
    images: "np.ndarray"


def _by_line(packed: "PackedRows", max_length: int) -> _Lines:
    import numpy as np

    trained = packed.labels_within(max_length)
    kept = np.minimum(packed.lengths, max_length)
    first = np.flatnonzero(np.diff(packed.lines, prepend=0))
    if not len(first):
        return _Lines(*(np.zeros(0, np.int64) for _ in range(6)))
    return _Lines(
        lines=packed.lines[first],
        tokens=np.add.reduceat(packed.lengths, first),
        kept=np.add.reduceat(kept, first),
        trained=np.add.reduceat(trained, first),
        idle=np.add.reduceat((trained == 0).astype(np.int64), first),
        images=packed.images[first],
    )


def _problems(
    lines: "np.ndarray", tokens: "np.ndarray", severity: Literal["error", "warning"], limit: int
) -> Iterator[Problem]:
    cut = mark("line {line} has {tokens} tokens; what lies beyond {limit} will be cut")
    nothing = mark("line {line} has {tokens} tokens, and none to train on among the first {limit}")
    code, message = ("example_too_long", cut) if severity == "warning" else ("nothing_to_train", nothing)
    for line, count in zip(map(int, lines), map(int, tokens), strict=False):
        yield Problem(
            code=code,
            severity=severity,
            message=message,
            values={"line": line, "tokens": count, "limit": limit},
            line=line,
        )


def _affected(lines: "np.ndarray", tokens: int) -> Affected:
    return Affected(rows=len(lines), tokens=tokens, lines=lines[:LINES_NAMED].tolist())


def spread(values: "np.ndarray") -> Spread:
    """The spread of whole numbers from 0 on, shape (rows,)."""
    import numpy as np

    if not len(values):
        return Spread()
    # "Nearest" answers with numbers that occur, which a person can look for.
    found = np.percentile(values, _PERCENTILES, method="nearest").astype(int).tolist()
    edges = [0, *(2**n for n in range(4, max(5, int(values.max()).bit_length() + 1)))]
    counted = np.histogram(values, [*edges[:-1], edges[-1]])[0].tolist()
    return Spread(
        total=int(values.sum()),
        mean=round(float(values.mean()), 2),
        min=int(values.min()),
        max=int(values.max()),
        histogram=[Bin(a, b, n) for a, b, n in zip(edges[:-1], edges[1:], counted, strict=True)],
        **{f"p{percent}": value for percent, value in zip(_PERCENTILES, found, strict=True)},
    )


def main(arguments: list[str]) -> int:
    """Count what the order in the folder says; exit code 0 when the result is there, EXIT_DISK_FULL for want of room."""
    from tunewright.datasets.tokens.packed_cache import PackedCache
    from tunewright.datasets.tokens.token_part import end_with_stdin

    end_with_stdin()
    folder = Path(arguments[0])
    order = msgspec.json.decode((folder / "order.json").read_bytes(), type=CountOrder)
    data = Path(order.data)
    cache = PackedCache(Path(order.cache), order.cache_bytes)
    options: dict[str, Any] = {"cache": cache, "data_sha256": order.data_sha256}
    if data.stat().st_size * PACKED_PER_BYTE > order.cache_bytes:
        options = {}
    try:
        found = count_tokens(
            data, Path(order.base), max_length=order.max_length, max_line_bytes=order.max_line_bytes, **options
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return EXIT_DISK_FULL
    (folder / "result.json").write_bytes(msgspec.json.encode(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
