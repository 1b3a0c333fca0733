"""Rows of a data file as flat arrays of tokens, and the order in which they are trained on. Pure numpy, no torch.

Conversations are laid end to end without padding; `lengths` says where one ends, and attention never crosses that line.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np

from tunewright.datasets import packed_rows
from tunewright.datasets.packed_cache import PackedCache, key_of
from tunewright.datasets.packed_rows import PackedRows
from tunewright.errors import InvalidRequest, Misconfigured
from tunewright.i18n import mark
from tunewright.jobs.spec import TrainingSpec
from tunewright.rendering.renderer import Renderer

LINES_NAMED = 10


@dataclass
class Tally:
    """Rows that something happened to: how many, and the line numbers of the first `LINES_NAMED`."""

    rows: int = 0
    tokens: int = 0
    lines: list[int] = field(default_factory=list)

    def lines_text(self) -> str:
        """'3, 8, 21' or '3, 8, 21, …' when there are more."""
        return ", ".join(map(str, self.lines)) + (", …" if self.rows > len(self.lines) else "")


@dataclass(frozen=True)
class Rows:
    """All usable rows of a file. Row i is `tokens[starts[i]:starts[i] + lengths[i]]`; `tokens` may be longer than all rows
    and lies on the disk. `n_labels` are the labels of each row: the spans `spans[first_span[i]:end_span[i]]`.

    A label is never the first token of a row, which nothing predicts. `cached`: nothing had to be tokenised.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    n_labels: np.ndarray
    spans: np.ndarray
    first_span: np.ndarray
    end_span: np.ndarray
    cut: Tally
    skipped: Tally
    cached: bool = False

    def __len__(self) -> int:
        return len(self.starts)

    def length(self, row: int) -> int:
        """Tokens of one row."""
        return int(self.lengths[row])

    def tokens_of(self, row: int) -> np.ndarray:
        """(length,) int32."""
        return self.tokens[self.starts[row] : self.starts[row] + self.lengths[row]]

    def trained_of(self, row: int) -> np.ndarray:
        """(length,) bool: which tokens of a row are labels."""
        trained = np.zeros(self.lengths[row], dtype=bool)
        for begin, end in self.spans[self.first_span[row] : self.end_span[row]]:
            trained[begin:end] = True  # what lies beyond the cut falls away
        return trained

    @property
    def n_tokens(self) -> int:
        """Tokens of one pass over the file."""
        return int(self.lengths.sum())

    @property
    def n_trained(self) -> int:
        """Labels of one pass over the file."""
        return int(self.n_labels.sum())


def read_rows(
    path: Path,
    renderer: Renderer,
    *,
    max_length: int,
    max_line_bytes: int,
    between_rows: Callable[[], None],
    param: str,
    skip_lines: frozenset[int] = frozenset(),
    cache: PackedCache | None = None,
    data_sha256: str = "",
) -> Rows:
    """Every conversation of a file as tokens, at most the first `max_length` of each.

    The lines of `skip_lines` (from 1) are left out; they and the rows that have no label left are skipped and counted. With
    a `cache`, the tokens are those kept there under `data_sha256`, or are kept there now. `between_rows` is called often
    and may raise to end the reading. Raises InvalidRequest(`nothing_to_train`) naming `param` if no row remains, and what is
    wrong with the first row that can't be rendered.
    """

    def make(folder: Path) -> None:
        packed_rows.tokenise(
            path,
            renderer.folder,
            folder,
            max_line_bytes=max_line_bytes,
            processes=packed_rows.cores(),
            between_rows=between_rows,
        )

    if cache is None:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tokens-") as folder:
            make(Path(folder))
            packed, cached = packed_rows.load(Path(folder)), False  # what is mapped outlives its name
    else:
        packed, cached = cache.use(key_of(data_sha256, renderer.hash), make, packed_rows.load, between_rows)
    return _chosen(packed, max_length, param, skip_lines, cached)


def cache_of(spec: TrainingSpec) -> PackedCache | None:
    """Where tokenised files are kept; None if the operator wants none."""
    return PackedCache(Path(spec.token_cache), spec.token_cache_bytes) if spec.token_cache else None


def _chosen(packed: PackedRows, max_length: int, param: str, skip_lines: frozenset[int], cached: bool) -> Rows:
    """The rows that this job uses of all that were tokenised."""
    left_out = np.fromiter(skip_lines, np.int64, len(skip_lines))
    chosen = ~np.isin(packed.lines, left_out)
    _refuse_unusable(packed, chosen, left_out)
    n_labels = packed.labels_within(max_length)
    usable = chosen & (n_labels > 0)
    skipped = np.unique(np.concatenate([packed.lines[~usable], packed.refused]))  # a preference row stands there twice
    if not usable.any() or packed.tokens is None:
        raise InvalidRequest(
            "nothing_to_train",
            mark("No row of the file has an assistant token to train on within the first {max_length} tokens."),
            param=param,
            max_length=max_length,
            rows=len(skipped),
        )
    lost = np.maximum(packed.lengths[usable] - max_length, 0)
    cut_lines = packed.lines[usable][lost > 0]
    return Rows(
        tokens=packed.tokens,
        starts=packed.starts[usable],
        lengths=np.minimum(packed.lengths[usable], max_length),
        n_labels=n_labels[usable],
        spans=packed.spans,
        first_span=packed.span_starts[usable],
        end_span=packed.span_ends[usable],
        cut=Tally(len(cut_lines), int(lost.sum()), cut_lines[:LINES_NAMED].tolist()),
        skipped=Tally(len(skipped), 0, skipped[:LINES_NAMED].tolist()),
        cached=cached,
    )


def _refuse_unusable(packed: PackedRows, chosen: np.ndarray, left_out: np.ndarray) -> None:
    """Raises what is wrong with the first row that the job wants and that is no conversation of text."""
    refused = packed.refused[~np.isin(packed.refused, left_out)]
    repeated = np.concatenate([np.zeros(1, bool), np.diff(packed.lines) == 0])[: len(packed.lines)]
    other = packed.lines[chosen & ((packed.images > 0) | repeated)]
    first = min([*refused[:1].tolist(), *other[:1].tolist()], default=None)
    if first is not None:
        _raise_cause(packed, first)


def _raise_cause(packed: PackedRows, line: int) -> NoReturn:
    for cause in packed.causes:
        if cause.line == line:
            kind = Misconfigured if cause.kind == Misconfigured.kind else InvalidRequest
            raise kind(cause.code, cause.message, **cause.values)
    raise InvalidRequest("wrong_format", mark("line {line} is not a chat or function row"), line=line)


def overlap(rows: Rows, others: Rows) -> int:
    """How many of `others` are, token for token, also among `rows`."""
    known = {hash(rows.tokens_of(row).tobytes()) for row in range(len(rows))}
    return sum(hash(others.tokens_of(row).tobytes()) in known for row in range(len(others)))


def epoch_order(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the rows that depends on nothing but its arguments, so a resumed job needs no state for it."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n_rows)


def micro_batches(rows: Rows, chosen: np.ndarray, token_budget: int) -> Iterator[list[int]]:
    """Split the rows of one optimizer step into groups of at most `token_budget` tokens; a longer row stands alone."""
    group: list[int] = []
    filled = 0
    for row in map(int, chosen):
        if group and filled + rows.length(row) > token_budget:
            yield group
            group, filled = [], 0
        group.append(row)
        filled += rows.length(row)
    if group:
        yield group


@dataclass(frozen=True)
class Flat:
    """Some rows end to end. Shapes: `tokens`, `positions` (T,); `predicts`, `labels` (N,), N the number of labels.

    `predicts` are the places whose *next* token is a label, `labels` those tokens, `lengths` the tokens of each row.
    """

    tokens: np.ndarray
    positions: np.ndarray
    predicts: np.ndarray
    labels: np.ndarray
    lengths: list[int]


def flatten(rows: Rows, chosen: list[int]) -> Flat:
    """Lay the chosen rows end to end, positions restarting at each."""
    tokens = np.concatenate([rows.tokens_of(row) for row in chosen]).astype(np.int64)
    trained = np.concatenate([rows.trained_of(row) for row in chosen])
    lengths = [rows.length(row) for row in chosen]
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
    places = np.flatnonzero(trained)  # never the first token of a row, so the place before is in the same row
    return Flat(tokens, positions, places - 1, tokens[places], lengths)


def count_labels(rows: Rows, chosen: np.ndarray) -> int:
    """Labels in the chosen rows."""
    return int(rows.n_labels[chosen].sum())
