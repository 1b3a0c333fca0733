"""Preference training through both dialects, from the upload to an answer of the tuned model."""

from typing import Any

import pytest

from tests.live_server import LiveServer


def preference_rows(n: int) -> list[dict[str, Any]]:
    return [
        {
            "input": {"messages": [{"role": "user", "content": f"What is number {i}?"}]},
            "preferred_output": [{"role": "assistant", "content": "It is yes."}],
            "non_preferred_output": [{"role": "assistant", "content": f"no no {['one', 'two', 'three'][i % 3]}"}],
        }
        for i in range(n)
    ]


@pytest.mark.parametrize("prefix", ["/v1", "/api/paas/v4"])
def test_a_model_learns_what_is_preferred(live_server: LiveServer, prefix: str) -> None:
    file_id = live_server.upload(preference_rows(16))
    wanted = {"beta": "0.2", "n_epochs": 2, "learning_rate_multiplier": 10}
    body = {
        "model": "tiny",
        "training_file": file_id,
        "validation_split": 0.25,
        "seed": 3,
        "method": {"type": "dpo", "dpo": {"hyperparameters": wanted}},
    }
    with live_server.api(prefix) as api:
        refused = api.post("/fine_tuning/jobs", json=body | {"method": "supervised"})
        assert "kind_not_supported" in refused.text
        made = api.post("/fine_tuning/jobs", json=body)
        assert made.status_code == 200, made.text
        shown = made.json()["method"]["dpo"]["hyperparameters"]
        assert (shown["beta"], shown["n_epochs"], shown["batch_size"]) == (0.2, 2, "auto")
        job = live_server.wait(made.json()["id"])
        assert job["status"] == "succeeded", job
        assert job["rows"]["used"] + job["rows"]["validation"] == 16
        events = api.get(f"/fine_tuning/jobs/{job['id']}/events?limit=1000").json()["data"]
        steps = [event["data"] for event in reversed(events) if event["type"] == "metrics"]
        assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
        assert steps[-1]["loss"] < steps[0]["loss"] and steps[-1]["reward_margin"] > 0
        assert "valid_reward_accuracy" in steps[-1]
        (checkpoint, *_) = api.get(f"/fine_tuning/jobs/{job['id']}/checkpoints").json()["data"]
        assert checkpoint["metrics"]["train_reward_margin"] == steps[-1]["reward_margin"]
        question = {"model": job["fine_tuned_model"], "messages": [{"role": "user", "content": "What is number 5?"}]}
        answer = api.post("/chat/completions", json=question | {"max_tokens": 4})
        assert answer.status_code == 200, answer.text
