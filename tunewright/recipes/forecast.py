"""How long the rest of a training takes, from what its steps have taken. Pure: no clock and no torch.

Rows differ: attention grows with the square of their length, the output head with their labels, and each micro-batch costs
something of itself. So work is counted in units, one for the matrix products of one token through the layers; how many a
row is follows from the model's shape. What a unit and a micro-batch take is fitted to the steps that were made, the newest
ones first.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunewright.jobs.memory_estimate import sizes_of
from tunewright.jobs.spec import TrainingSpec
from tunewright.recipes import packing, receipts
from tunewright.recipes.packing import Rows

FORWARD_SHARE = 0.5
"""Part of a step's time that the same rows take without a backward pass, until it is measured."""
_ATTENTION_COST = 2.0
"""Multiply-adds of attention take so many times as long as those of the large matrix products by a guess; what is fitted
to the steps corrects it."""
_MEMORY_STEPS = 50.0
"""A step counts half as much as one that came 35 steps later."""
_SAMPLED_EXAMPLES = 1000


@dataclass(frozen=True)
class RowCost:
    """Units of a row of `n` tokens with `m` labels: n + square * n * n + label * m."""

    square: float = 0.0
    label: float = 0.0

    def of(self, rows: Rows) -> np.ndarray:
        """(examples,) float64."""
        lengths = rows.lengths.astype(np.float64)
        units = lengths + self.square * lengths**2 + self.label * rows.n_labels
        return units.reshape(-1, rows.sides).sum(1)


def row_cost(config: Mapping[str, Any]) -> RowCost:
    """What rows cost a model with this config.json; one that says nothing of its shape is taken to count tokens only."""
    try:
        sizes = sizes_of(config)
    except (KeyError, TypeError, ValueError):
        return RowCost()
    head = sizes.vocabulary * sizes.hidden
    layers = max(1.0, sizes.parameters - head)
    return RowCost(square=_ATTENTION_COST * sizes.layers * sizes.heads_width / layers, label=head / layers)


@dataclass(frozen=True)
class Sample:
    """Of some steps: micro-batches of one on average, and the part of its tokens that must be computed."""

    pieces: float
    computed: float


def sample(rows: Rows, batch_size: int, seed: int, token_budget: int, share: bool) -> Sample:
    """The first steps of the first epoch."""
    order = packing.epoch_order(rows.n_examples, seed, 0)[: batch_size * max(1, _SAMPLED_EXAMPLES // batch_size)]
    steps = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    groups = [group for step in steps for group in packing.micro_batches(rows, step, token_budget, share)]
    computed = sum(packing.layout(rows, group, share).tokens for group in groups)
    return Sample(pieces=len(groups) / len(steps), computed=computed / rows.only(order.tolist()).n_tokens)


@dataclass(frozen=True)
class Remaining:
    """What is left to do. `evaluation_units` are those of one evaluation, `saves` the checkpoints at fixed places, `look_units`
    those of the looks at rows for their receipts that are still to come."""

    units: float
    pieces: float
    evaluations: int = 0
    evaluation_units: float = 0.0
    saves: int = 0
    save_every_s: float = math.inf
    look_units: float = 0.0


class Workload:
    """All that a training does, in its order, and what of it is left after a step."""

    def __init__(self, spec: TrainingSpec, rows: Rows, validation: Rows | None, cost: RowCost) -> None:
        self._spec, self._wanted = spec, spec.hyperparameters
        self._units = cost.of(rows)
        self._look_units = float(self._units[receipts.choose(rows, spec)].sum())
        self._evaluation_units = 0.0 if validation is None else float(cost.of(validation).sum())
        self.steps_per_epoch = math.ceil(rows.n_examples / self._wanted.batch_size)
        self.total_steps = self.steps_per_epoch * self._wanted.n_epochs
        steps = np.arange(1, self.total_steps + 1)
        due = steps % self.steps_per_epoch == 0
        if self._wanted.eval_steps:
            due |= steps % self._wanted.eval_steps == 0
        self._evaluated = steps[due] if validation is not None else steps[:0]
        self._done_in_epoch: tuple[int, np.ndarray] | None = None

    def units(self, chosen: np.ndarray) -> float:
        """Of these examples."""
        return float(self._units[chosen].sum())

    def left(self, step: int, pieces_per_step: float) -> Remaining:
        """After `step` steps; `pieces_per_step` are the micro-batches of one on average. Before the first step both looks at rows
        are still to come, then the one at the end."""
        epoch, place = divmod(step, self.steps_per_epoch)
        units = float(self._units.sum()) * (self._wanted.n_epochs - epoch)
        if place:
            units -= float(self._units_in_order(epoch)[place * self._wanted.batch_size - 1])
        return Remaining(
            units=units,
            pieces=pieces_per_step * (self.total_steps - step),
            evaluations=int((self._evaluated > step).sum()),
            evaluation_units=self._evaluation_units,
            saves=self._wanted.n_epochs - epoch,
            save_every_s=self._spec.checkpoint_every_s,
            look_units=self._look_units * (2 if step == 0 else 1),
        )

    def _units_in_order(self, epoch: int) -> np.ndarray:
        if self._done_in_epoch is None or self._done_in_epoch[0] != epoch:
            order = packing.epoch_order(len(self._units), self._spec.seed, epoch)
            self._done_in_epoch = epoch, np.cumsum(self._units[order])
        return self._done_in_epoch[1]


class Forecast:
    """Learns from a training's steps, evaluations and saves; knows nothing before the first step."""

    def __init__(self) -> None:
        self._save_s = 0.0
        self._evaluation_s: float | None = None
        self._steps = 0
        self._clear()

    def step(self, units: float, pieces: int, seconds: float) -> None:
        """A step of so many units in so many micro-batches took `seconds`."""
        self._steps += 1
        if self._steps == 2:
            self._clear()  # the first step warms up, and is better than nothing only until there is a second
        fade = math.exp(-1.0 / _MEMORY_STEPS)
        values = np.array([1.0, pieces, units, seconds])
        weight = 1.0 / max(units, 1.0) ** 2  # an error of a tenth counts the same in short steps and in long ones
        self._sums = self._sums * fade + values
        self._products = self._products * fade + weight * np.outer(values, values)

    def evaluation(self, seconds: float) -> None:
        """All validation rows were looked at."""
        self._evaluation_s = seconds

    def save(self, seconds: float) -> None:
        """A checkpoint was saved."""
        self._save_s = seconds

    @property
    def pieces_per_step(self) -> float:
        """Micro-batches of the steps that were made; 0 before the first."""
        return float(self._sums[1] / max(self._sums[0], 1e-12))

    def seconds(self, units: float, pieces: float) -> float | None:
        """What so many units in so many micro-batches will take; None before the first step."""
        if self._steps == 0:
            return None
        per_piece, per_unit = self._fitted()
        _, seen_pieces, seen_units, seen_s = self._sums
        scale = seen_s / max(per_piece * seen_pieces + per_unit * seen_units, 1e-12)
        return float(scale * (per_piece * pieces + per_unit * units))

    def remaining_s(self, left: Remaining) -> float | None:
        """Until the result is published; None before the first step."""
        steps_s = self.seconds(left.units, left.pieces)
        if steps_s is None:
            return None
        evaluation_s = self._evaluation_s
        if evaluation_s is None:
            evaluation_s = FORWARD_SHARE * (self.seconds(left.evaluation_units, 0) or 0.0)
        look_s = FORWARD_SHARE * (self.seconds(left.look_units, 0) or 0.0)
        working_s = steps_s + left.evaluations * evaluation_s
        saves = left.saves + working_s / left.save_every_s + 1  # to publish the result is one save more
        return working_s + look_s + saves * self._save_s

    def _clear(self) -> None:
        self._sums = np.zeros(4)
        self._products = np.zeros((4, 4))

    def _fitted(self) -> tuple[float, float]:
        """(seconds of a micro-batch, seconds of a unit), neither negative: weighted least squares of the steps."""
        (pp, pu, ps), (uu, us) = self._products[1, 1:], self._products[2, 2:]
        determinant = pp * uu - pu * pu
        if determinant > 1e-9 * pp * uu:
            per_piece, per_unit = (ps * uu - us * pu) / determinant, (us * pp - ps * pu) / determinant
            if per_piece >= 0 and per_unit >= 0:
                return per_piece, per_unit
            if per_unit < 0:
                return ps / pp, 0.0
        return 0.0, us / uu
