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
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

from tunewright.errors import InvalidRequest, quote
from tunewright.i18n import mark
from tunewright.jobs.spec import EarlyStopping, Hyperparameters

AUTO = "auto"
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
_LEAST_AUTO_EVAL_STEPS = 50
_EVALUATION_SHARE = 0.1
_FORWARD_SHARE = 1 / 3
"""Of the time that a row takes in training, what it takes to be looked at."""
NEED_VALIDATION = ("early_stopping", "eval_steps")
"""Hyperparameters that mean nothing without validation rows."""

_NUMBER = re.compile(r"[+-]?[0-9]{1,15}(\.[0-9]{1,15})?")
"""Some clients send numbers as text. Plain decimals only: '1e-4' is more often a slip than a wish."""

Value = int | float | str | dict[str, int | float]
_Reader = Callable[[str, Any], int | float | dict[str, int | float] | None]


def parse(values: Mapping[str, Any] | None, *, method: str, context_tokens: int) -> dict[str, Value]:
    """What was asked for, checked: a number or 'auto' for each of the three public names, and the extras that were given.

    Numbers may be text, null means 'auto', 3.0 is the whole number 3. `early_stopping` is absent or has all its numbers.
    Raises InvalidRequest: `unknown_parameter` for a name that is not known (or `beta` outside dpo), `invalid_value`
    with the range for a value that is not in it.
    """
    readers = _readers(method, context_tokens)
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise InvalidRequest("invalid_value", mark("hyperparameters must be an object."), param="hyperparameters")
    requested: dict[str, Value] = dict.fromkeys(("n_epochs", "batch_size", "learning_rate_multiplier"), AUTO)
    for name, value in values.items():
        reader = readers.get(name)
        if reader is None:
            raise InvalidRequest(
                "unknown_parameter",
                mark("There is no hyperparameter {name}. Known ones: {known}."),
                param=f"hyperparameters.{quote(name)}",
                name=quote(name),
                known=", ".join(readers),
            )
        if value is None or value == AUTO:
            continue
        read = reader(f"hyperparameters.{name}", value)
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
        learning_rate=(DPO_LEARNING_RATE if method == "dpo" else BASE_LEARNING_RATE[training_type]) * multiplier,
        lora_rank=rank,
        lora_alpha=chosen("lora_alpha", 2 * rank),
        max_length=chosen("max_length", min(_USUAL_LENGTH, context_tokens)),
        warmup_ratio=float(chosen("warmup_ratio", _USUAL_WARMUP)),
        weight_decay=float(chosen("weight_decay", 0.0)),
        beta=float(chosen("beta", DPO_BETA)) if method == "dpo" else None,
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


def _readers(method: str, context_tokens: int) -> dict[str, _Reader]:
    readers: dict[str, _Reader] = {
        "n_epochs": partial(_whole, 1, 50),
        "batch_size": partial(_whole, 1, 256),
        "learning_rate_multiplier": partial(_fraction, 0.0, 10.0, False),
        "lora_rank": partial(_whole, 1, 256),
        "lora_alpha": partial(_whole, 1, 1024),
        "max_length": partial(_whole, 16, context_tokens),
        "warmup_ratio": partial(_fraction, 0.0, 0.5, True),
        "weight_decay": partial(_fraction, 0.0, 1.0, True),
        "eval_steps": partial(_whole, 1, 1_000_000),
        "early_stopping": _early_stopping,
    }
    if method == "dpo":
        readers["beta"] = partial(_fraction, 0.0, 2.0, False)
    return readers


def _whole(least: int, most: int, param: str, value: Any) -> int:
    number = _number(value)
    if number is None or number != number or not least <= number <= most or number != int(number):
        _refuse_whole(least, most, param, value)
    return int(number)


def _refuse_whole(least: int, most: int, param: str, value: Any) -> NoReturn:
    raise InvalidRequest(
        "invalid_value",
        mark("{field} must be a whole number from {least} to {most} or 'auto', not {value}."),
        param=param,
        field=param,
        least=least,
        most=most,
        value=quote(value),
    )


def _fraction(least: float, most: float, least_allowed: bool, param: str, value: Any) -> float:
    number = _number(value)
    if number is not None and number <= most and (number > least or (least_allowed and number == least)):
        return float(number)
    sentence = (
        mark("{field} must be a number from {least} to {most} or 'auto', not {value}.")
        if least_allowed
        else mark("{field} must be a number above {least} and at most {most} or 'auto', not {value}.")
    )
    raise InvalidRequest(
        "invalid_value", sentence, param=param, field=param, least=least, most=most, value=quote(value)
    )


def _early_stopping(param: str, value: Any) -> dict[str, int | float] | None:
    """What `EarlyStopping` is made of; None for false."""
    if value in (False, "false"):
        return None
    given = {} if value in (True, "true") else value
    readers: dict[str, Callable[[str, Any], int | float]] = {
        "patience": partial(_whole, 1, 100),
        "min_delta": partial(_fraction, 0.0, 100.0, True),
    }
    if not isinstance(given, Mapping) or not readers.keys() >= given.keys():
        raise InvalidRequest(
            "invalid_value",
            mark("{field} must be true, false or an object with patience and min_delta, not {value}."),
            param=param,
            field=param,
            value=quote(value),
        )
    found: dict[str, int | float] = {"patience": 3, "min_delta": 0.0}
    asked = {name: value for name, value in given.items() if value not in (None, AUTO)}
    return found | {name: readers[name](f"{param}.{name}", value) for name, value in asked.items()}


def _number(value: Any) -> int | float | None:
    """None if it is no number. NaN passes; it fails every comparison that follows."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value) if "." in value else int(value)
    return None
