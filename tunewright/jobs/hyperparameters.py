"""What a caller may ask of a training run, and what 'auto' becomes. Pure.

`parse` runs when a job is created and refuses what can never be right; `resolve` runs once the rows are counted.

How 'auto' is resolved. Seen once with SmolLM2-135M-Instruct on 16 short identity rows, all on auto (4 epochs, 64 steps):
the loss falls from 2.4 to 0.12.

- `batch_size`: rows // 64, at least 1, at most 16. A pass over the data is then about 64 optimizer steps, whatever its size.
- `n_epochs`: 3, or as many as make 60 optimizer steps where the data is tiny, at most 10.
- `learning_rate_multiplier`: 1.0.
- `eval_steps`: validation rows are looked at once more within an epoch of at least 100 steps, as often as takes a tenth of the
  training's time at most, and after 50 steps at the earliest.
- With preference rows (dpo) `n_epochs` begins at 2 and the learning rate is a tenth: pairs are learned sooner than answers.
"""

import math
from collections.abc import Mapping
from typing import Any

from tunewright.errors import InvalidRequest, quote
from tunewright.i18n import mark
from tunewright.jobs.creation import DPO
from tunewright.jobs.ranges import Fraction, Range, Stopping, Whole, Word
from tunewright.jobs.spec import EarlyStopping, Hyperparameters

AUTO = "auto"
ONLY_DPO = frozenset({"beta"})
ONLY_LORA = frozenset({"lora_rank", "lora_alpha"})
"""Taken for a training of type full too, where they mean nothing."""
BASE_LEARNING_RATE = {"lora": 2e-4, "full": 1e-5}
"""What a multiplier of 1.0 means in supervised training, by training type."""
DPO_LEARNING_RATE = 2e-5
"""The same for preference training."""
DPO_BETA = 0.1

_USUAL_EPOCHS = {"supervised": 3, "dpo": 2}
_MOST_AUTO_EPOCHS = 10
_ENOUGH_STEPS = 60
_STEPS_PER_EPOCH = 64
_MOST_AUTO_BATCH = 16
_USUAL_LENGTH = 1024
_USUAL_RANK = 16
_USUAL_WARMUP = 0.05
_ALWAYS = mark("always {default}")
_LEAST_AUTO_EVAL_STEPS = 50
_EVALUATION_SHARE = 0.1
_FORWARD_SHARE = 1 / 3
"""Of the time that a row takes in training, what it takes to be looked at."""

Value = int | float | str | dict[str, int | float]


def parse(values: Mapping[str, Any] | None, *, method: str, context_tokens: int) -> dict[str, Value]:
    """What was asked for, checked: a number or 'auto' for each of the three public names, and the extras that were given.

    Numbers may be text, null means 'auto', 3.0 is the whole number 3. `early_stopping` is absent or has all its numbers.
    Raises InvalidRequest: `unknown_parameter` for a name that is not known (or `beta` outside dpo), `invalid_value`
    with the range for a value that is not in it.
    """
    known = ranges(method, "lora", context_tokens)
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise InvalidRequest("invalid_value", mark("hyperparameters must be an object."), param="hyperparameters")
    requested: dict[str, Value] = dict.fromkeys(("n_epochs", "batch_size", "learning_rate_multiplier"), AUTO)
    for name, value in values.items():
        range_ = known.get(name)
        if range_ is None:
            raise InvalidRequest(
                "unknown_parameter",
                mark("There is no hyperparameter {name}. Known ones: {known}."),
                param=f"hyperparameters.{quote(name)}",
                name=quote(name),
                known=", ".join(known),
            )
        if value is None or value == AUTO:
            continue
        read = range_.read(f"hyperparameters.{name}", value)
        if read is not None:
            requested[name] = read
    return requested


def resolve(
    requested: Mapping[str, Value],
    *,
    rows: int,
    training_type: str,
    method: str,
    context_tokens: int,
    validation_rows: int = 0,
) -> Hyperparameters:
    """The numbers of a run over `rows` rows. `requested` is what `parse` returned."""

    def chosen(name: str, otherwise: Any) -> Any:
        value = requested.get(name, AUTO)
        return otherwise if value == AUTO else value

    batch_size = chosen("batch_size", min(_MOST_AUTO_BATCH, max(1, rows // _STEPS_PER_EPOCH)))
    steps_per_epoch = max(1, math.ceil(rows / batch_size))
    enough = math.ceil(_ENOUGH_STEPS / steps_per_epoch)
    multiplier = float(chosen("learning_rate_multiplier", 1.0))
    rank = chosen("lora_rank", _USUAL_RANK)
    return Hyperparameters(
        n_epochs=chosen("n_epochs", min(_MOST_AUTO_EPOCHS, max(_USUAL_EPOCHS[method], enough))),
        batch_size=batch_size,
        learning_rate_multiplier=multiplier,
        learning_rate=(DPO_LEARNING_RATE if method == DPO else BASE_LEARNING_RATE[training_type]) * multiplier,
        lora_rank=rank,
        lora_alpha=chosen("lora_alpha", 2 * rank),
        max_length=chosen("max_length", min(_USUAL_LENGTH, context_tokens)),
        warmup_ratio=float(chosen("warmup_ratio", _USUAL_WARMUP)),
        weight_decay=float(chosen("weight_decay", 0.0)),
        beta=float(chosen("beta", DPO_BETA)) if method == DPO else None,
        precision=chosen("precision", AUTO),
        activation_checkpointing=chosen("activation_checkpointing", AUTO),
        micro_batch_tokens=chosen("micro_batch_tokens", None),
        eval_steps=chosen("eval_steps", _eval_steps(validation_rows, batch_size, steps_per_epoch)),
        early_stopping=EarlyStopping(**stopping) if (stopping := chosen("early_stopping", None)) else None,
    )


def _eval_steps(validation_rows: int, batch_size: int, steps_per_epoch: int) -> int | None:
    """None where the end of the epoch is soon enough."""
    if not validation_rows:
        return None
    cheap_enough = math.ceil(validation_rows * _FORWARD_SHARE / (_EVALUATION_SHARE * batch_size))
    steps = max(_LEAST_AUTO_EVAL_STEPS, cheap_enough)
    return steps if 2 * steps <= steps_per_epoch else None


def ranges(method: str, training_type: str, context_tokens: int) -> dict[str, Range]:
    """The one table of hyperparameters that a method takes: `parse` reads by it, and the API shows it."""
    dpo = method == DPO
    rate = DPO_LEARNING_RATE if dpo else BASE_LEARNING_RATE[training_type]
    found: dict[str, Range] = {
        "n_epochs": Whole(
            1,
            50,
            auto=mark("{usual}, or as many as make {steps} optimizer steps of few rows, at most {most}"),
            values={"usual": _USUAL_EPOCHS[method], "steps": _ENOUGH_STEPS, "most": _MOST_AUTO_EPOCHS},
        ),
        "batch_size": Whole(
            1,
            256,
            auto=mark("the number of rows divided by {parts}, at least 1 and at most {most}"),
            values={"parts": _STEPS_PER_EPOCH, "most": _MOST_AUTO_BATCH},
        ),
        "learning_rate_multiplier": Fraction(
            0.0,
            10.0,
            least_included=False,
            auto=mark("1, which is a learning rate of {rate}"),
            values={"rate": f"{rate:g}"},
            default=1.0,
        ),
        "lora_rank": Whole(1, 256, auto=_ALWAYS, default=_USUAL_RANK),
        "lora_alpha": Whole(1, 1024, auto=mark("twice lora_rank")),
        "max_length": Whole(
            16,
            context_tokens,
            auto=mark("{usual} tokens, or the model's context where that is shorter"),
            values={"usual": _USUAL_LENGTH},
            default=min(_USUAL_LENGTH, context_tokens),
        ),
        "warmup_ratio": Fraction(0.0, 0.5, auto=_ALWAYS, default=_USUAL_WARMUP),
        "weight_decay": Fraction(0.0, 1.0, auto=_ALWAYS, default=0.0),
        "precision": Word(
            ("float32", "bfloat16"), auto=mark("the faster one where the job runs, measured at its start")
        ),
        "activation_checkpointing": Word(("on", "off"), auto=mark("on only where memory is too small without")),
        "micro_batch_tokens": Whole(64, 65536, auto=mark("1024, or less where memory is too small")),
        "eval_steps": Whole(
            1,
            1_000_000,
            auto=mark("in long epochs as often as takes a tenth of the time, otherwise at the end of each epoch only"),
        ),
        "early_stopping": Stopping(auto=mark("off")),
        "beta": Fraction(0.0, 2.0, least_included=False, auto=_ALWAYS, default=DPO_BETA),
    }
    return {name: range_ for name, range_ in found.items() if dpo or name not in ONLY_DPO}
