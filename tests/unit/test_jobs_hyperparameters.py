"""What may be asked of a run, and what 'auto' becomes."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright.errors import InvalidRequest
from tunewright.jobs.hyperparameters import BASE_LEARNING_RATE, DPO_LEARNING_RATE, parse, resolve
from tunewright.jobs.spec import EarlyStopping, Hyperparameters

AUTO = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}


def asked(method: str = "supervised", **values: Any) -> dict[str, Any]:
    return parse(values, method=method, context_tokens=2048)


def resolved(rows: int, method: str = "supervised", **values: Any) -> Hyperparameters:
    requested = asked(method, **values)
    return resolve(requested, rows=rows, training_type="lora", method=method, context_tokens=2048)


@pytest.mark.parametrize("values", [None, {}, {"n_epochs": None}, {"batch_size": "auto", "lora_rank": None}])
def test_nothing_asked_is_auto(values: dict[str, Any] | None) -> None:
    assert parse(values, method="supervised", context_tokens=2048) == AUTO


@pytest.mark.parametrize(
    ("name", "value", "meaning"),
    [
        ("n_epochs", 3, 3),
        ("n_epochs", 3.0, 3),
        ("n_epochs", "3", 3),
        ("n_epochs", 50, 50),
        ("batch_size", "256", 256),
        ("batch_size", 3.0, 3),
        ("learning_rate_multiplier", "0.5", 0.5),
        ("learning_rate_multiplier", 10, 10.0),
        ("learning_rate_multiplier", 1e-6, 1e-6),
        ("lora_rank", 256, 256),
        ("lora_alpha", 8, 8),
        ("max_length", 2048, 2048),
        ("warmup_ratio", 0, 0.0),
        ("warmup_ratio", 0.5, 0.5),
        ("weight_decay", "0.1", 0.1),
        ("precision", "bfloat16", "bfloat16"),
        ("activation_checkpointing", "off", "off"),
        ("micro_batch_tokens", "2048", 2048),
    ],
)
def test_values_that_are_taken(name: str, value: Any, meaning: float | str) -> None:
    assert asked(**{name: value})[name] == meaning
    assert type(asked(**{name: value})[name]) is type(meaning)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("n_epochs", v) for v in (0, -1, 1.5, True, False, 51, 1e9, 10**400, "x", "", "3x", "1e1", " 3", [3], {})),
        *(("n_epochs", v) for v in (float("nan"), float("inf"), float("-inf"), "nan", "٣", "AUTO")),
        *(("batch_size", v) for v in (0, 10**9, 257, 0.5, True)),
        *(("learning_rate_multiplier", v) for v in (0, -1, float("nan"), float("inf"), "1e-4", 1e6, 10.1, True, "0")),
        *(("lora_rank", v) for v in (0, 257, 7.5)),
        *(("max_length", v) for v in (15, 2049)),
        *(("warmup_ratio", v) for v in (-0.1, 0.51)),
        ("weight_decay", -1),
    ],
)
def test_values_that_are_refused_with_the_range(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        asked(**{name: value})
    error = caught.value
    assert (error.code, error.param) == ("invalid_value", f"hyperparameters.{name}")
    assert str(error.values["most"]) in error.text("en") and error.text("zh") != error.text("en")


@pytest.mark.parametrize(
    ("name", "value", "known"),
    [
        *(("precision", v, "float32, bfloat16") for v in ("bf16", "float16", 32, "", ["float32"])),
        *(("activation_checkpointing", v, "on, off") for v in (True, False, "yes", 1)),
    ],
)
def test_words_that_are_refused_with_the_known_ones(name: str, value: Any, known: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        asked(**{name: value})
    error = caught.value
    assert (error.code, error.param) == ("invalid_value", f"hyperparameters.{name}")
    assert known in error.text("en") and error.text("zh") != error.text("en")


def test_how_it_is_computed_is_left_open_or_asked_for() -> None:
    found = resolved(100)
    assert (found.precision, found.activation_checkpointing, found.micro_batch_tokens) == ("auto", "auto", None)
    found = resolved(100, precision="float32", activation_checkpointing="on", micro_batch_tokens=512)
    assert (found.precision, found.activation_checkpointing, found.micro_batch_tokens) == ("float32", "on", 512)


def test_a_long_value_is_quoted_short() -> None:
    with pytest.raises(InvalidRequest) as caught:
        asked(n_epochs="9" * 5000)
    assert len(caught.value.text()) < 200


@pytest.mark.parametrize("name", ["r", "trust_remote_code", "output_dir", "n_epoch", "", "beta"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse({name: 1}, method="supervised", context_tokens=2048)
    assert caught.value.code == "unknown_parameter"
    assert caught.value.param == f"hyperparameters.{name}" and "n_epochs" in caught.value.text()


@pytest.mark.parametrize("values", [[], "auto", 3])
def test_what_is_no_object_is_refused(values: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(values, method="supervised", context_tokens=2048)
    assert caught.value.param == "hyperparameters"


def test_pairs_are_passed_over_less_often_and_more_gently() -> None:
    pairs, rows = resolved(10_000, method="dpo"), resolved(10_000)
    assert (pairs.n_epochs, rows.n_epochs) == (2, 3)
    assert pairs.learning_rate == DPO_LEARNING_RATE < rows.learning_rate == BASE_LEARNING_RATE["lora"]
    assert resolved(10, method="dpo").n_epochs == 6  # as many as make 60 steps
    assert resolved(100, method="dpo", learning_rate_multiplier=2).learning_rate == 2 * DPO_LEARNING_RATE


def test_beta_belongs_to_dpo() -> None:
    assert resolved(100, method="dpo").beta == 0.1
    assert resolved(100, method="dpo", beta=2).beta == 2.0
    with pytest.raises(InvalidRequest):
        asked("dpo", beta=2.1)
    assert resolved(100).beta is None


@pytest.mark.parametrize(
    ("rows", "batch_size", "n_epochs"),
    [(1, 1, 10), (6, 1, 10), (16, 1, 4), (20, 1, 3), (100, 1, 3), (512, 8, 3), (1000, 15, 3), (5000, 16, 3)],
)
def test_auto(rows: int, batch_size: int, n_epochs: int) -> None:
    found = resolved(rows)
    assert (found.batch_size, found.n_epochs) == (batch_size, n_epochs)


def test_numbers_win_over_auto() -> None:
    found = resolved(16, n_epochs=2, batch_size=4, learning_rate_multiplier=0.5, lora_rank=8, max_length=64)
    assert (found.n_epochs, found.batch_size, found.lora_rank, found.lora_alpha, found.max_length) == (2, 4, 8, 16, 64)
    assert found.learning_rate == BASE_LEARNING_RATE["lora"] * 0.5


def test_a_short_context_bounds_the_length() -> None:
    found = resolve(AUTO, rows=10, training_type="lora", method="supervised", context_tokens=128)
    assert found.max_length == 128


@given(rows=st.integers(1, 10**7))
def test_auto_is_always_inside_the_ranges(rows: int) -> None:
    found = resolved(rows)
    again = asked(
        n_epochs=found.n_epochs,
        batch_size=found.batch_size,
        learning_rate_multiplier=found.learning_rate_multiplier,
        warmup_ratio=found.warmup_ratio,
    )
    assert again["n_epochs"] == found.n_epochs
    steps = -(-rows // found.batch_size) * found.n_epochs
    assert steps >= min(60, 10 * rows)


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        (True, {"patience": 3, "min_delta": 0.0}),
        ({}, {"patience": 3, "min_delta": 0.0}),
        ({"patience": "2", "min_delta": 0.5}, {"patience": 2, "min_delta": 0.5}),
        ({"min_delta": None}, {"patience": 3, "min_delta": 0.0}),
        (False, None),
        ("auto", None),
    ],
)
def test_early_stopping_in_every_spelling(value: Any, meaning: dict[str, Any] | None) -> None:
    assert asked(early_stopping=value).get("early_stopping") == meaning
    found = resolved(10, early_stopping=value).early_stopping
    assert found == (None if meaning is None else EarlyStopping(**meaning))


@pytest.mark.parametrize(
    ("value", "param"),
    [
        (3, "early_stopping"),
        ("yes", "early_stopping"),
        ([], "early_stopping"),
        ({"patients": 3}, "early_stopping"),
        ({"patience": 0}, "early_stopping.patience"),
        ({"patience": True}, "early_stopping.patience"),
        ({"min_delta": -1}, "early_stopping.min_delta"),
        ({"min_delta": float("nan")}, "early_stopping.min_delta"),
    ],
)
def test_early_stopping_that_is_refused(value: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        asked(early_stopping=value)
    assert caught.value.param == f"hyperparameters.{param}"


@pytest.mark.parametrize(
    ("rows", "validation_rows", "batch_size", "steps"),
    [
        (1000, 0, 1, None),
        (99, 5, 1, None),
        (100, 5, 1, 50),
        (10_000, 60, 1, 200),
        (10_000, 60, 10, 50),
        (1000, 200, 1, None),
    ],
)
def test_long_epochs_are_measured_within(rows: int, validation_rows: int, batch_size: int, steps: int | None) -> None:
    requested = asked(batch_size=batch_size)
    found = resolve(
        requested,
        rows=rows,
        training_type="lora",
        method="supervised",
        context_tokens=2048,
        validation_rows=validation_rows,
    )
    assert found.eval_steps == steps
