"""Rows of a data file as flat arrays of tokens, and the order in which they are trained on. Pure numpy, no torch.

Conversations are laid end to end without padding; `lengths` says where one ends, and attention never crosses that line.
What several begin with alike is laid once (sharing.py).
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import numpy as np

from tunewright.datasets.tokens import packed_rows
from tunewright.datasets.tokens.packed_cache import PackedCache, key_of
from tunewright.datasets.tokens.packed_rows import PackedRows
from tunewright.errors import InvalidRequest, Misconfigured
from tunewright.i18n import mark
from tunewright.jobs.spec import TrainingSpec
from tunewright.recipes.sharing import Layout, Together, sort_key
from tunewright.rendering.renderer import Renderer

LINES_NAMED = 10
_SORTED_AT_ONCE = 256
"""Examples: enough for some micro-batches, and files of any size are not sorted whole."""


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
    and lies on the disk. `n_labels` are the labels of each row: the spans `spans[first_span[i]:end_span[i]]`. `lines` says
    in which line of the file, from 1, each row stands.

    A label is never the first token of a row, which nothing predicts. `cached`: nothing had to be tokenised.
    """

    tokens: np.ndarray
    lines: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    n_labels: np.ndarray
    spans: np.ndarray
    first_span: np.ndarray
    end_span: np.ndarray
    cut: Tally
    skipped: Tally
    cached: bool = False
    sides: int = 1
    """2 for the rows of preference data: row 2i is the preferred answer to something, row 2i + 1 the other one."""

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def n_examples(self) -> int:
        """Lines of the file that are used: rows, or pairs of them."""
        return len(self) // self.sides

    def members(self, example: int) -> range:
        """The rows of one example."""
        return range(example * self.sides, (example + 1) * self.sides)

    def only(self, examples: Sequence[int]) -> "Rows":
        """These examples alone, in this order; one may stand there twice."""
        kept = np.array([row for example in examples for row in self.members(example)], dtype=np.int64)
        per_row = ("lines", "starts", "lengths", "n_labels", "first_span", "end_span")
        return replace(self, **{name: getattr(self, name)[kept] for name in per_row})

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
    sides: int = 1,
) -> Rows:
    """Every conversation of a file as tokens, at most the first `max_length` of each.

    `sides` is 2 for preference rows, of which both conversations or none are used. The lines of `skip_lines` (from 1) are
    left out; they and the rows that have no label left are skipped and counted. With
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
    return _chosen(packed, max_length, param, skip_lines, cached, sides)


def cache_of(spec: TrainingSpec) -> PackedCache | None:
    """Where tokenised files are kept; None if the operator wants none."""
    return PackedCache(Path(spec.token_cache), spec.token_cache_bytes) if spec.token_cache else None


def _chosen(
    packed: PackedRows, max_length: int, param: str, skip_lines: frozenset[int], cached: bool, sides: int
) -> Rows:
    """The rows that this job uses of all that were tokenised."""
    left_out = np.fromiter(skip_lines, np.int64, len(skip_lines))
    chosen = ~np.isin(packed.lines, left_out)
    _refuse_unusable(packed, chosen, left_out, sides)
    n_labels = packed.labels_within(max_length)
    usable = chosen & (n_labels > 0)
    if sides == 2:
        pairs = np.flatnonzero(chosen).reshape(-1, 2)
        usable[pairs] = usable[pairs].all(1, keepdims=True)
        for first, second in pairs[usable[pairs[:, 0]] & (packed.lengths[pairs] > max_length).any(1)]:
            # What is left of two answers may be the same, and then there is nothing to prefer.
            if _same(packed, first, second, max_length):
                usable[[first, second]] = False
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
    cut_lines = np.unique(packed.lines[usable][lost > 0])
    return Rows(
        tokens=packed.tokens,
        lines=packed.lines[usable],
        starts=packed.starts[usable],
        lengths=np.minimum(packed.lengths[usable], max_length),
        n_labels=n_labels[usable],
        spans=packed.spans,
        first_span=packed.span_starts[usable],
        end_span=packed.span_ends[usable],
        cut=Tally(len(cut_lines), int(lost.sum()), cut_lines[:LINES_NAMED].tolist()),
        skipped=Tally(len(skipped), 0, skipped[:LINES_NAMED].tolist()),
        cached=cached,
        sides=sides,
    )


def _same(packed: PackedRows, first: int, second: int, max_length: int) -> bool:
    """Whether the first `max_length` tokens of two rows are the same."""
    if packed.tokens is None:
        return False
    starts, lengths = packed.starts, np.minimum(packed.lengths, max_length)
    one, other = (packed.tokens[starts[row] : starts[row] + lengths[row]] for row in (first, second))
    return np.array_equal(one, other)


def _refuse_unusable(packed: PackedRows, chosen: np.ndarray, left_out: np.ndarray, sides: int) -> None:
    """Raises what is wrong with the first row that the job wants and that is no conversation of text, or no two of them."""
    refused = packed.refused[~np.isin(packed.refused, left_out)]
    repeated = np.concatenate([np.zeros(1, bool), np.diff(packed.lines) == 0])[: len(packed.lines)]
    if sides == 2:
        single = ~(repeated | np.concatenate([repeated[1:], np.zeros(1, bool)])[: len(repeated)])
        other = packed.lines[chosen & ((packed.images > 0) | single)]
    else:
        other = packed.lines[chosen & ((packed.images > 0) | repeated)]
    first = min([*refused[:1].tolist(), *other[:1].tolist()], default=None)
    if first is not None:
        _raise_cause(packed, first, sides)


def _raise_cause(packed: PackedRows, line: int, sides: int) -> NoReturn:
    for cause in packed.causes:
        if cause.line == line:
            kind = Misconfigured if cause.kind == Misconfigured.kind else InvalidRequest
            raise kind(cause.code, cause.message, **cause.values)
    if sides == 2:
        raise InvalidRequest("wrong_format", mark("line {line} is not a preference row of text"), line=line)
    raise InvalidRequest("wrong_format", mark("line {line} is not a chat or function row"), line=line)


def overlap(rows: Rows, others: Rows) -> int:
    """How many examples of `others` are, token for token, also among `rows`."""

    def hashes(found: Rows) -> Iterator[int]:
        for example in range(found.n_examples):
            yield hash(tuple(found.tokens_of(row).tobytes() for row in found.members(example)))

    known = set(hashes(rows))
    return sum(one in known for one in hashes(others))


def epoch_order(n_examples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the examples that depends on nothing but its arguments, so a resumed job needs no state for it."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n_examples)


def micro_batches(rows: Rows, chosen: np.ndarray, token_budget: int, share: bool = False) -> Iterator[list[int]]:
    """Split the examples of one optimizer step into groups of rows of which at most `token_budget` tokens are computed; a
    longer example stands alone, and none is torn apart. With `share`, examples that begin alike come together."""
    group: list[int] = []
    together = Together(share)
    for example in _beginnings_together(rows, chosen) if share else map(int, chosen):
        members = rows.members(example)
        for row in members:
            together.add(rows.tokens_of(row))
        if group and not together.fit(token_budget):
            yield group
            group, together = [], Together(share)
            for row in members:
                together.add(rows.tokens_of(row))
        group += members
    if group:
        yield group


def _beginnings_together(rows: Rows, chosen: np.ndarray) -> Iterator[int]:
    """The examples in another order: of every `_SORTED_AT_ONCE`, those that begin alike are neighbours."""
    for begin in range(0, len(chosen), _SORTED_AT_ONCE):
        some = chosen[begin : begin + _SORTED_AT_ONCE].tolist()
        yield from sorted(some, key=lambda example: sort_key(rows.tokens_of(rows.members(example)[0])))


def layout(rows: Rows, group: list[int], share: bool) -> Layout:
    """How these rows are laid together."""
    return _layout([rows.tokens_of(row) for row in group], share)


@dataclass(frozen=True)
class Flat:
    """Some rows end to end. Shapes: `tokens`, `positions` (T,); `predicts`, `labels` (N,), N the number of labels.

    `predicts` are the places whose *next* token is a label, row by row, `labels` those tokens. `lengths` are the tokens of each
    stretch, and `after` the stretch that each continues, -1 at a row's beginning; None if each stretch is a whole row.
    """

    tokens: np.ndarray
    positions: np.ndarray
    predicts: np.ndarray
    labels: np.ndarray
    lengths: list[int]
    after: list[int] | None = None


def flatten(rows: Rows, chosen: list[int], share: bool = False) -> Flat:
    """Lay the chosen rows end to end, positions restarting at each; with `share`, alike beginnings are laid once."""
    return lay([rows.tokens_of(row) for row in chosen], [rows.trained_of(row) for row in chosen], share)


def lay(tokens: list[np.ndarray], trained: list[np.ndarray], share: bool) -> Flat:
    """The same for rows given as their tokens and which of them are labels, which the first of a row never is."""
    laid = _layout(tokens, share)
    stretches = laid.stretches
    predicts, labels = [], []
    for own, of_row, places in zip(tokens, trained, laid.places(), strict=True):
        found = np.flatnonzero(of_row)
        predicts.append(places[found - 1])
        labels.append(own[found])
    return Flat(
        tokens=np.concatenate([tokens[one.row][one.begin : one.end] for one in stretches]).astype(np.int64),
        positions=np.concatenate([np.arange(one.begin, one.end) for one in stretches]),
        predicts=np.concatenate(predicts),
        labels=np.concatenate(labels).astype(np.int64),
        lengths=[one.end - one.begin for one in stretches],
        after=[one.after for one in stretches] if any(one.after >= 0 for one in stretches) else None,
    )


def _layout(tokens: list[np.ndarray], share: bool) -> Layout:
    together = Together(share)
    for row in tokens:
        together.add(row)
    return together.layout()


def count_labels(rows: Rows, chosen: np.ndarray) -> int:
    """Labels in the chosen rows."""
    return int(rows.n_labels[chosen].sum())
