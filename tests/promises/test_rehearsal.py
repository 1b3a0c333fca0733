"""The dress rehearsal from the API to real trainer processes."""

import json
import resource
import time
from pathlib import Path

from tests.live_server import LiveServer, chat_rows


def rehearsal_pid(server: LiveServer, job_id: str) -> int:
    """Of its process, as soon as that has said its name: the libraries are not loaded by then."""
    path: Path = server.home / "jobs" / job_id / "rehearsal" / "trainer.json"
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return json.loads(path.read_bytes())["pid"]


def test_a_job_is_rehearsed_queued_and_trained(live_server: LiveServer) -> None:
    file_id = live_server.upload(chat_rows(12))
    job_id = live_server.create_job(
        file_id, rehearsal="always", hyperparameters={"n_epochs": 2, "batch_size": 4}, suffix="rehearsed"
    )
    job = live_server.wait(job_id)
    assert job["status"] == "succeeded", job
    found = job["rehearsal"]
    assert found["status"] == "done" and len(found["rows"]) == 8 and set(found["rows"]) <= set(range(1, 13))
    assert 10**8 < found["memory_peak_bytes"] < 10**10 and found["seconds_per_step"] > 0
    assert 0 <= found["estimated_seconds"]["least"] <= found["estimated_seconds"]["most"]
    assert found["estimated_tokens"] == job["trained_tokens"] and found["price"] is None
    folder = live_server.home / "jobs" / job_id
    assert (folder / "computing.json").read_bytes() == (folder / "rehearsal" / "computing.json").read_bytes()
    assert not set(found) & {"attempt", "failures", "wanted"}
    with live_server.api("/api/paas/v4") as api:
        assert api.get(f"/fine_tuning/jobs/{job_id}").json()["rehearsal"] == found
        events = api.get(f"/fine_tuning/jobs/{job_id}/events?limit=1000", headers={"Accept-Language": "zh"}).json()
    told = [event for event in events["data"] if event["code"] == "rehearsed"]
    assert len(told) == 1 and told[0]["message"].startswith("已用第 ") and told[0]["data"]["rehearsal"] == found


def test_memory_that_is_not_enough_is_known_before_the_queue(live_server: LiveServer) -> None:
    """The address space ends while the libraries are loaded, in the rehearsal and in its second try."""
    file_id = live_server.upload(chat_rows(12))
    job_id = live_server.create_job(file_id, rehearsal="always")
    seen: set[int] = set()
    while len(seen) < 2:
        pid = rehearsal_pid(live_server, job_id)
        if pid not in seen:
            resource.prlimit(pid, resource.RLIMIT_AS, (400 * 2**20, 400 * 2**20))
            seen.add(pid)
        time.sleep(0.005)
    job = live_server.wait(job_id)
    assert (job["status"], job["error"]["code"], job["rehearsal"]["status"]) == ("failed", "out_of_memory", "failed")
    assert job["running_at"] is None and job["error"]["suggestion"] is not None
    with live_server.api() as api:
        events = api.get(f"/fine_tuning/jobs/{job_id}/events?limit=1000").json()["data"]
        assert [event["code"] for event in events[:2]] == ["out_of_memory", "rehearsal_failed"]
        refused = api.post(
            "/fine_tuning/jobs", json={"model": "tiny", "training_file": file_id, "rehearsal": "perhaps"}
        )
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "rehearsal")
