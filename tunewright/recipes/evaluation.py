"""How far a training is, when it is measured on its validation rows, and when what was measured says to stop. Pure."""

from dataclasses import dataclass, replace

from tunewright.jobs.spec import EarlyStopping


@dataclass(frozen=True)
class Progress:
    """How far the training is: all of it lies in a checkpoint. Losses are those of the last step and evaluation.

    Margins are of preference training only. Of validation losses, `best_loss` is the lowest so far and `gained_loss` the one
    that the next has to be below by more than `min_delta`, which the last `stale` of them were not. `start_loss` is the mean of
    the first steps, far above which the last `exploded_steps` of them were (divergence.py).
    """

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    loss: float | None = None
    accuracy: float | None = None
    eval_loss: float | None = None
    eval_accuracy: float | None = None
    margin: float | None = None
    eval_margin: float | None = None
    eval_step: int = 0
    best_step: int = 0
    best_loss: float | None = None
    gained_loss: float | None = None
    stale: int = 0
    start_loss: float = 0.0
    exploded_steps: int = 0

    @property
    def evaluated(self) -> bool:
        """Whether the losses on validation rows are those of this very step."""
        return 0 < self.eval_step == self.step

    @property
    def is_best(self) -> bool:
        """Whether no earlier step had a lower validation loss."""
        return 0 < self.best_step == self.step


def is_due(step: int, steps_per_epoch: int, eval_steps: int | None) -> bool:
    """Whether the validation rows are looked at after `step`: at the end of every epoch, and every `eval_steps` steps."""
    return step % steps_per_epoch == 0 or (bool(eval_steps) and step % (eval_steps or 1) == 0)


def judged(progress: Progress, stopping: EarlyStopping | None) -> Progress:
    """`progress` right after an evaluation, whose loss is compared with the earlier ones. None is worse than any number."""
    loss, step = progress.eval_loss, progress.step
    progress = replace(progress, eval_step=step)
    if loss is not None and (progress.best_loss is None or loss < progress.best_loss):
        progress = replace(progress, best_loss=loss, best_step=step)
    margin = 0.0 if stopping is None else stopping.min_delta
    if loss is not None and (progress.gained_loss is None or loss < progress.gained_loss - margin):
        return replace(progress, gained_loss=loss, stale=0)
    return replace(progress, stale=progress.stale + 1)


def is_enough(progress: Progress, stopping: EarlyStopping | None) -> bool:
    """Whether early stopping ends the training here."""
    return stopping is not None and progress.stale >= stopping.patience


def of_validation(measured: dict[str, float | None], progress: Progress) -> dict[str, float | None]:
    """Names of the OpenAI API for what was measured at this very step; there is one evaluation, over all rows."""
    if not progress.evaluated:
        return {}
    return {f"{prefix}_{name}": value for prefix in ("valid", "full_valid") for name, value in measured.items()}
