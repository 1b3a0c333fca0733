"""Rows of a data file as flat arrays of tokens, and the order in which they are trained on. Pure numpy, no torch.

Conversations are laid end to end without padding; `lengths` says where one ends, and attention never crosses that line.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from tunewright.datasets.rows import read_conversations
from tunewright.errors import InvalidRequest
from tunewright.i18n import mark
from tunewright.rendering.renderer import Renderer

LINES_NAMED = 10


@dataclass
class Tally:
    """Rows that something happened to: how many, and the line numbers of the first `LINES_NAMED`."""

    rows: int = 0
    tokens: int = 0
    lines: list[int] = field(default_factory=list)

    def add(self, line: int, tokens: int = 0) -> None:
        """Count one row and the tokens it lost."""
        self.rows += 1
        self.tokens += tokens
        if len(self.lines) < LINES_NAMED:
            self.lines.append(line)

    def lines_text(self) -> str:
        """'3, 8, 21' or '3, 8, 21, …' when there are more."""
        return ", ".join(map(str, self.lines)) + (", …" if self.rows > len(self.lines) else "")


@dataclass(frozen=True)
class Rows:
    """All usable rows of a file. Row i is `tokens[starts[i]:starts[i + 1]]`.

    `trained[t]`: token t is a label; never true for the first token of a row, which nothing predicts.
    """

    tokens: np.ndarray
    trained: np.ndarray
    starts: np.ndarray
    cut: Tally
    skipped: Tally

    def __len__(self) -> int:
        return len(self.starts) - 1

    def length(self, row: int) -> int:
        """Tokens of one row."""
        return int(self.starts[row + 1] - self.starts[row])

    @property
    def n_tokens(self) -> int:
        """Tokens of one pass over the file."""
        return len(self.tokens)

    @property
    def n_trained(self) -> int:
        """Labels of one pass over the file."""
        return int(self.trained.sum())


def read_rows(
    path: Path,
    renderer: Renderer,
    *,
    max_length: int,
    max_line_bytes: int,
    between_rows: Callable[[], None],
    param: str,
    skip_lines: frozenset[int] = frozenset(),
) -> Rows:
    """Render every conversation of a file, keeping at most the first `max_length` tokens of each.

    The lines of `skip_lines` (from 1) are left out unseen; they and the rows that have no label left are skipped and counted. `between_rows` may raise to end the reading.
    Raises InvalidRequest(`nothing_to_train`) naming `param` if no row remains.
    """
    tokens: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    cut, skipped = Tally(), Tally()
    for line in sorted(skip_lines):
        skipped.add(line)
    for line, conversation in read_conversations(path, max_line_bytes, skip_lines):
        between_rows()
        example = renderer.example(conversation)
        labels = np.array(example.trained[:max_length], dtype=bool)
        labels[:1] = False
        if not labels.any():
            skipped.add(line)
            continue
        if len(example.tokens) > max_length:
            cut.add(line, len(example.tokens) - max_length)
        tokens.append(np.array(example.tokens[:max_length], dtype=np.int32))
        trained.append(labels)
    if not tokens:
        raise InvalidRequest(
            "nothing_to_train",
            mark("No row of the file has an assistant token to train on within the first {max_length} tokens."),
            param=param,
            max_length=max_length,
            rows=skipped.rows,
        )
    starts = np.concatenate([[0], np.cumsum([len(row) for row in tokens])])
    return Rows(np.concatenate(tokens), np.concatenate(trained), starts, cut, skipped)


def overlap(rows: Rows, others: Rows) -> int:
    """How many of `others` are, token for token, also among `rows`."""
    known = {hash(rows.tokens[start:end].tobytes()) for start, end in pairwise(rows.starts)}
    return sum(hash(others.tokens[start:end].tobytes()) in known for start, end in pairwise(others.starts))


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
    spans = [slice(int(rows.starts[row]), int(rows.starts[row + 1])) for row in chosen]
    tokens = np.concatenate([rows.tokens[span] for span in spans]).astype(np.int64)
    trained = np.concatenate([rows.trained[span] for span in spans])
    lengths = [rows.length(row) for row in chosen]
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
    places = np.flatnonzero(trained)  # never the first token of a row, so the place before is in the same row
    return Flat(tokens, positions, places - 1, tokens[places], lengths)


def count_labels(rows: Rows, chosen: np.ndarray) -> int:
    """Labels in the chosen rows."""
    return sum(int(rows.trained[rows.starts[row] : rows.starts[row + 1]].sum()) for row in chosen)
