"""Row receipts: what the training did to each row. Loss under the weights before the first step, and under those published.

To look at a row takes 0.46 of what it takes in an epoch of training: CPU seconds of one LoRA step and of one pass over the same
8 rows of the starter, one thread, two runs (0.45, 0.47). With `auto` the two passes get 15 % of the training; where that is
not enough for all rows, a sample of them that depends on the seed alone.
"""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from tunewright.datasets.checking.fingerprints import contradictions
from tunewright.datasets.checking.scan import Depth, Scan
from tunewright.datasets.records import FINE_TUNE_PURPOSES
from tunewright.datasets.report import Reporter
from tunewright.files_on_disk import writing
from tunewright.jobs.receipts import RowReceipt, flags_of
from tunewright.jobs.spec import RECEIPTS, ReceiptCounts, TrainingSpec
from tunewright.recipes.packing import Rows

FORWARD_SHARE = 0.46
MOST_SHARE = 0.15
LEAST_ROWS = 50
"""So many rows have a receipt whatever that costs: less would tell nothing."""
_BEFORE = "receipts-before.npy"

Losses = Callable[[np.ndarray], np.ndarray]
"""Loss of each of these examples under the weights as they are, float64."""


class Limits(msgspec.Struct, frozen=True):
    """What the check of rows asks of settings."""

    max_line_bytes: int
    min_training_rows: int = 1


def choose(rows: Rows, spec: TrainingSpec) -> np.ndarray:
    """The examples that get a receipt, ascending; none if the job wants none."""
    examples = np.arange(rows.n_examples)
    if spec.receipts == "off":
        return examples[:0]
    affordable = MOST_SHARE * spec.hyperparameters.n_epochs / (2 * FORWARD_SHARE)
    if spec.receipts == "on" or affordable >= 1:
        return examples
    order = np.random.Generator(np.random.PCG64([spec.seed, 0x5EED])).permutation(examples)
    tokens = np.cumsum(rows.lengths.reshape(-1, rows.sides).sum(1)[order])
    return np.sort(order[: max(LEAST_ROWS, int(np.searchsorted(tokens, affordable * rows.n_tokens, side="right")))])


class Receipts:
    """Those of one training; `before` must be called until a step was made, and again by an attempt that resumes."""

    def __init__(self, spec: TrainingSpec, rows: Rows) -> None:
        self.chosen = choose(rows, spec)
        self._spec = spec
        self._rows = rows
        self._before: np.ndarray | None = None

    def before(self, losses: Losses, step: int) -> None:
        """Measure under the weights of the beginning, or read what an earlier attempt measured."""
        path = Path(self._spec.work_folder) / _BEFORE
        try:
            found = np.load(path, allow_pickle=False)
        except (OSError, ValueError):
            found = None
        if found is not None and found.shape == self.chosen.shape:
            self._before = found
        elif step == 0 and len(self.chosen):
            self._before = losses(self.chosen)
            with writing(path) as stream:
                np.save(stream, self._before, allow_pickle=False)

    def write(self, losses: Losses) -> ReceiptCounts | None:
        """Measure again and write `receipts.jsonl`; None if there are none."""
        if not len(self.chosen) or self._before is None:
            return None
        after = losses(self.chosen)
        rows, sides = self._rows, self._rows.sides
        lines = rows.lines.reshape(-1, sides)[self.chosen, 0]
        tokens = rows.lengths.reshape(-1, sides).sum(1)[self.chosen]
        trained = rows.n_labels.reshape(-1, sides).sum(1)[self.chosen]
        against = contradicting(Path(self._spec.training_data), self._spec.max_line_bytes, rows)
        never = flags_of(self._before, after)
        counts = ReceiptCounts(
            rows=len(self.chosen),
            of=rows.n_examples,
            never_learned=int(never.sum()),
            contradicting=sum(int(line) in against for line in lines),
        )
        encode = msgspec.json.Encoder().encode
        path = Path(self._spec.work_folder) / RECEIPTS
        with writing(path) as stream:
            for i in range(len(self.chosen)):
                line = int(lines[i])
                receipt = RowReceipt(
                    line=line,
                    tokens=int(tokens[i]),
                    trained_tokens=int(trained[i]),
                    loss_before=_number(self._before[i]),
                    loss_after=_number(after[i]),
                    flags=["never_learned"] * bool(never[i]) + ["contradicts"] * (line in against),
                    contradicts=against.get(line),
                )
                stream.write(encode(receipt) + b"\n")
        return counts


def contradicting(data: Path, max_line_bytes: int, rows: Rows) -> dict[int, int]:
    """Line -> another trained line with the same prompt and another answer."""
    scan = Scan(
        Reporter(), FINE_TUNE_PURPOSES[0], Limits(max_line_bytes), Depth(texts=False, compare=True, statistics=False)
    )
    with data.open("rb") as stream:
        scan.read(stream, data.stat().st_size)
    used = set(rows.lines.tolist())
    found: dict[int, int] = {}
    for again in contradictions(scan.fingerprints):
        line, first = again.line_index + 1, again.first + 1
        if line in used and first in used:
            found[line] = first
            found.setdefault(first, line)
    return found


def _number(value: np.floating) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None
