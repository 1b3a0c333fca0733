"""How a text model learns which of two answers is better: direct preference optimization (DPO) of a LoRA adapter.

    loss = -log sigmoid(beta * ((pi_w - ref_w) - (pi_l - ref_l)))

pi and ref are log-probabilities of a whole answer, summed over its tokens: of the preferred answer (w) and of the other one
(l), under the model in training (pi) and under the model as it was before (ref). A step's loss is the mean over its pairs.

- The model before is the base with the adapter off, or the tuned model that the job continues from. What it says of every
  pair is computed once, before the first step, and kept in the checkpoints: two models are never in memory together.
- Both answers of a pair go through the model in one micro-batch, which computes the question once (sharing.py).
- All else is supervised training (text.py): schedule, optimizer, checkpoints, what happens when memory or disk run out.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from tunewright.jobs.spec import Finished
from tunewright.recipes import evaluation, flattened, packing, text
from tunewright.recipes.attempt import Attempt
from tunewright.recipes.evaluation import Progress
from tunewright.recipes.memory import explaining_memory

REFERENCE = "reference.safetensors"
"""A checkpoint's file of what the model before said: `train` and perhaps `validation`, float64 (rows,)."""


@dataclass
class _Sums:
    """Of the pairs so far."""

    pairs: int = 0
    loss: float = 0.0
    right: int = 0
    margin: float = 0.0

    def add(self, losses: torch.Tensor, margins: torch.Tensor) -> None:
        self.pairs += len(losses)
        self.loss += losses.sum().item()
        self.right += int((margins > 0).sum())
        self.margin += margins.sum().item()


def train(attempt: Attempt) -> Finished:
    """Train what the attempt's spec asks for; when this returns, `result/` is complete. Raises what `text.train` raises."""
    return explaining_memory(attempt, lambda: PreferenceTraining(attempt).run())


class PreferenceTraining(text.Training):
    """A training whose rows are pairs: row 2i holds the preferred answer, row 2i + 1 the other one."""

    sides = 2

    def __init__(self, attempt: Attempt, data: tuple[packing.Rows, packing.Rows | None] | None = None) -> None:
        super().__init__(attempt, data)
        self.beta = self.wanted.beta or 0.1
        self.reference: dict[str, torch.Tensor] = {}

    def _choices(self) -> dict[str, Any]:
        before = "base" if self.spec.start_adapter_path is None else "model to continue from"
        return super()._choices() | {"method": "dpo", "beta": self.beta, "reference": before}

    # --- loss ---

    def uninformed_loss(self) -> float:
        """The loss before the first step: of every two answers each is as good as the other."""
        return math.log(2)

    def _log_probabilities(self, rows: packing.Rows, group: list[int]) -> torch.Tensor:
        """log p(answer) of each row of a micro-batch, float64 (rows,)."""
        losses, _ = flattened.label_losses(self.model, packing.flatten(rows, group, self.share), self.device)
        answers = losses.split(rows.n_labels[group].tolist())
        return -torch.stack([answer.sum(dtype=torch.float64) for answer in answers])

    def _compare(self, name: str, rows: packing.Rows, group: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(losses, margins) of the pairs of a micro-batch, float64 (pairs,). `name` says which reference is theirs."""
        gains = self._log_probabilities(rows, group) - self.reference[name][group].to(self.device)
        preferred, other = gains.view(-1, 2).unbind(1)
        margins = self.beta * (preferred - other)
        return -functional.logsigmoid(margins), margins.detach()

    # --- loop ---

    def _before_first_step(self) -> None:
        self.reference["train"] = self._within_memory(lambda: self._ask_reference(self.rows))
        if (validation := self.validation) is not None:
            self.reference["validation"] = self._within_memory(lambda: self._ask_reference(validation))

    def _loop(self, progress: Progress) -> Progress:
        if not self.reference:  # no checkpoint was read, so the weights are still those of the beginning
            self._before_first_step()
        return super()._loop(progress)

    @torch.no_grad()
    def _ask_reference(self, rows: packing.Rows) -> torch.Tensor:
        """What the model says now of every row, float64 (rows,)."""
        found = torch.empty(len(rows), dtype=torch.float64)
        for group in self._micro_batches(rows, np.arange(rows.n_examples)):
            self.attempt.go_on()
            found[group] = self._log_probabilities(rows, group).cpu()
        return found

    def _step(self, progress: Progress, chosen: np.ndarray) -> Progress:
        sums = _Sums()
        self.optimizer.zero_grad()
        for group in self._micro_batches(self.rows, chosen):
            self.attempt.go_on()
            losses, margins = self._compare("train", self.rows, group)
            (losses.sum() / len(chosen)).backward()
            sums.add(losses, margins)
        self._update(progress.step, sums.loss)
        return replace(
            progress,
            step=progress.step + 1,
            tokens=progress.tokens + self.rows.only(chosen.tolist()).n_tokens,
            loss=sums.loss / sums.pairs,
            accuracy=sums.right / sums.pairs,
            margin=sums.margin / sums.pairs,
        )

    @torch.no_grad()
    def _evaluate(self, progress: Progress, rows: packing.Rows) -> Progress:
        """Mean loss, share of pairs with a positive margin, and mean margin over all validation pairs."""
        sums = _Sums()
        for group in self._micro_batches(rows, np.arange(rows.n_examples)):
            sums.add(*self._compare("validation", rows, group))
        loss, margin = sums.loss / sums.pairs, sums.margin / sums.pairs
        return replace(
            progress,
            eval_loss=loss if np.isfinite(loss) else None,
            eval_accuracy=sums.right / sums.pairs,
            eval_margin=margin if np.isfinite(margin) else None,
        )

    def _losses_before(self, examples: np.ndarray) -> np.ndarray:
        return np.full(len(examples), np.log(2))  # nothing has been gained yet

    @torch.no_grad()
    def _row_losses(self, examples: np.ndarray) -> np.ndarray:
        """Loss of each pair, float64."""
        found = np.empty(self.rows.n_examples)
        for group in self._micro_batches(self.rows, examples):
            found[np.array(group[::2]) // 2] = self._compare("train", self.rows, group)[0].cpu().numpy()
        return found[examples]

    # --- save ---

    def _write_more(self, folder: Path) -> None:
        save_file(self.reference, folder / REFERENCE)

    def _read_more(self, folder: Path) -> None:
        self.reference = load_file(folder / REFERENCE)

    def _checkpoint_metrics(self, progress: Progress) -> dict[str, float | None]:
        validation = {
            "loss": progress.eval_loss,
            "reward_accuracy": progress.eval_accuracy,
            "reward_margin": progress.eval_margin,
        }
        return {
            "step": progress.step,
            "train_loss": progress.loss,
            "train_reward_accuracy": progress.accuracy,
            "train_reward_margin": progress.margin,
        } | evaluation.of_validation(validation, progress)
