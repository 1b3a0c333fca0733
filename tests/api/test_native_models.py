"""The ranges of hyperparameters, as the API tells them and as creation takes them."""

from typing import Any

import httpx
import pytest

from tests.api.test_jobs import ready_model
from tests.api.world import World
from tunewright.errors import InvalidRequest
from tunewright.jobs.hyperparameters import parse, resolve


async def told(client: httpx.AsyncClient, name: str = "tiny", language: str = "en") -> dict[tuple[str, str], Any]:
    answer = await client.get(f"/api/v1/models/{name}/hyperparameters", headers={"Accept-Language": language})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["model"], body["base"]) == (name, "tiny")
    return {(each["method"], each["training_type"]): each["hyperparameters"] for each in body["trainings"]}


async def test_what_is_told_is_what_is_taken(client: httpx.AsyncClient) -> None:
    trainings = await told(client)
    assert set(trainings) == {("supervised", "lora"), ("dpo", "lora")}
    for (method, training_type), shown in trainings.items():
        assert ("beta" in [each["name"] for each in shown]) == (method == "dpo")
        for each in shown:
            if "least" not in each:
                continue
            step = 1 if each["type"] == "integer" else 1e-6
            inside = [each["most"], each["least"] if each["least_included"] else each["least"] + step]
            outside = [each["most"] + step, each["least"] - step if each["least_included"] else each["least"]]
            for value in inside:
                assert parse({each["name"]: value}, method=method, context_tokens=2048)[each["name"]] == value
            for value in outside:
                with pytest.raises(InvalidRequest):
                    parse({each["name"]: value}, method=method, context_tokens=2048)
        for rows in (1, 5000):
            run = resolve({}, rows=rows, training_type=training_type, method=method, context_tokens=2048)
            for each in shown:
                if each["default"] is not None:
                    assert getattr(run, each["name"]) == each["default"], "the default is what auto becomes"


async def test_early_stopping_is_a_switch_or_an_object(client: httpx.AsyncClient) -> None:
    shown = {each["name"]: each for each in (await told(client))["supervised", "lora"]}["early_stopping"]
    assert shown["type"] == "boolean" and shown["auto"] == "off"
    most = {name: field["most"] for name, field in shown["fields"].items()}
    usual = {name: field["default"] for name, field in shown["fields"].items()}
    for given, kept in ((True, usual), (most, most), ({}, usual)):
        assert parse({"early_stopping": given}, method="dpo", context_tokens=64)["early_stopping"] == kept
    assert "early_stopping" not in parse({"early_stopping": False}, method="dpo", context_tokens=64)
    with pytest.raises(InvalidRequest):
        parse({"early_stopping": {"patience": most["patience"] + 1}}, method="dpo", context_tokens=64)


async def test_rules_are_sentences_in_both_languages(client: httpx.AsyncClient) -> None:
    english, chinese = await told(client), await told(client, language="zh")
    rules = {each["name"]: each["auto"] for each in english["supervised", "lora"]}
    assert rules["learning_rate_multiplier"] == "1, which is a learning rate of 0.0002"
    assert rules["lora_rank"] == "always 16" and rules["n_epochs"].startswith("3, or as many")
    for training, shown in chinese.items():
        for each, of_english in zip(shown, english[training], strict=True):
            assert each["auto"] != of_english["auto"] and {**each, "auto": ""} == {**of_english, "auto": ""}
    dpo = {each["name"]: each["auto"] for each in english["dpo", "lora"]}
    assert dpo["learning_rate_multiplier"].endswith("2e-05") and dpo["n_epochs"].startswith("2, or")


async def test_a_tuned_model_has_the_ranges_of_an_adapter(world: World, client: httpx.AsyncClient) -> None:
    name = ready_model(world)
    assert set(await told(client, name)) == {("supervised", "lora"), ("dpo", "lora")}
    async with world.client(world.other_key) as other:
        for unknown in (name, "nothing"):
            answer = await other.get(f"/api/v1/models/{unknown}/hyperparameters")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
