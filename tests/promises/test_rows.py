"""No row is lost in silence: bad ones are left out by name, others kept for validation, and the job counts them all."""

import json

from tests.live_server import LiveServer, chat_rows


def test_a_real_job_leaves_out_bad_rows_and_keeps_some_for_validation(live_server: LiveServer) -> None:
    rows = chat_rows(30)
    lines = [json.dumps(row) for row in rows]
    lines[4] = '{"messages": [{"role": "human", "content": "x"}, {"role": "assistant", "content": "y"}]}'
    lines[9] = '{"messages": [{"role": '
    data = "\n".join(lines).encode()
    with live_server.api() as api:
        form = {"purpose": "fine-tune", "on_problems": "keep"}
        file = api.post("/files", data=form, files={"file": ("rows.jsonl", data)}).json()
        assert file["status"] == "error"
        body = {"model": "tiny", "training_file": file["id"], "max_bad_rows": 1}
        assert api.post("/fine_tuning/jobs", json=body).json()["error"]["code"] == "too_many_bad_rows"
    job_id = live_server.create_job(
        file["id"], max_bad_rows=2, validation_split=0.3, seed=3, hyperparameters={"n_epochs": 1}
    )
    job = live_server.wait(job_id)
    assert job["status"] == "succeeded", job
    counts = job["rows"]
    assert (counts["skipped"], counts["cut"]) == (2, 0)
    assert counts["used"] + counts["validation"] == 28 and counts["validation"] > 0
    with live_server.api() as api:
        events = api.get(f"/fine_tuning/jobs/{job['id']}/events?limit=100").json()["data"]
    told = {event["code"]: event for event in events if event["type"] == "message"}
    assert told["bad_rows_skipped"]["message"].endswith("Lines: 5, 10")
    assert told["succeeded"]["data"] == {"rows": counts}
    assert "2 skipped" in told["succeeded"]["message"]
    measured = [event["data"]["valid_loss"] for event in events if "valid_loss" in (event["data"] or {})]
    assert len(measured) == 1 and measured[0] > 0
