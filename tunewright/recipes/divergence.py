"""When a training is not worth going on with: its loss stays far above where it began. Pure."""

from dataclasses import replace

from tunewright.errors import InvalidRequest
from tunewright.i18n import mark
from tunewright.recipes.evaluation import Progress

FIRST_STEPS = 5
"""Their mean loss is where a training began. More than one, for a single row may be very easy."""
MOST_EXPLODED_STEPS = 8
_FACTOR = 3.0
_LEAST = 5.0
"""Below this no loss counts as exploded: rows in a language that the base hardly knows begin about there."""


def watched(progress: Progress, *, uninformed_loss: float, multiplier: float) -> Progress:
    """`progress` right after a step, with its loss compared with those of the first steps.

    `uninformed_loss` is that of a model that knows nothing: no sound training begins higher, so a start that is higher
    exploded itself. Raises InvalidRequest(`diverged`) after the last of `MOST_EXPLODED_STEPS` steps in a row.
    """
    step, loss, start = progress.step, progress.loss or 0.0, progress.start_loss
    if step <= FIRST_STEPS:
        return replace(progress, start_loss=start + (loss - start) / step)
    limit = max(_LEAST, _FACTOR * min(start, uninformed_loss))
    exploded = progress.exploded_steps + 1 if loss > limit else 0
    if exploded < MOST_EXPLODED_STEPS:
        return replace(progress, exploded_steps=exploded)
    raise InvalidRequest(
        "diverged",
        mark(
            "The loss was above {limit} for {steps} steps, and {loss} at step {step}; it began at {start}. "
            "Lower learning_rate_multiplier (it was {multiplier})."
        ),
        param="hyperparameters.learning_rate_multiplier",
        limit=round(limit, 2),
        steps=exploded,
        loss=round(loss, 2),
        step=step,
        start=round(start, 2),
        multiplier=multiplier,
    )
