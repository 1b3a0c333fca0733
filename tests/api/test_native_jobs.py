"""Jobs under /api/v1."""

from typing import Any

import httpx
import pytest

from tests.api.test_jobs import created
from tests.api.world import PREFIXES, World

JOBS = "/api/v1/jobs"


async def made(world: World, client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    file = await world.upload(client)
    answer = await client.post(JOBS, json={"model": "tiny", "training_file": file["id"], **fields})
    assert answer.status_code == 201, answer.text
    return answer.json()


async def test_a_job_in_our_own_words(world: World, client: httpx.AsyncClient) -> None:
    job = await made(world, client, hyperparameters={"n_epochs": 2}, lora_rank=4, suffix="x", requestId="native-1")
    assert (job["object"], job["status"], job["base"]) == ("job", "validating", "tiny")
    assert job["hyperparameters"]["lora_rank"] == 4 and job["hyperparameters"]["n_epochs"] == 2
    assert job["fine_tuned_model"].startswith("tiny:") and job["request_id"] == "native-1"
    assert job["resolved"] is job["choices"] is job["retry_of"] is job["cloned_from"] is None
    assert (await client.get(f"{JOBS}/{job['id']}")).json() == job
    dialect = (await client.get(f"/v1/fine_tuning/jobs/{job['id']}")).json()
    assert set(dialect) < set(job) and dialect["object"] == "fine_tuning.job"
    again = await client.post(JOBS, json={"model": "tiny", "training_file": "file-x", "request_id": "native-1"})
    assert again.json()["id"] == job["id"]


@pytest.mark.parametrize("path", ["", "/{job}/clone"])
async def test_names_that_mean_nothing_are_refused(world: World, client: httpx.AsyncClient, path: str) -> None:
    job = await made(world, client)
    answer = await client.post(
        JOBS + path.format(job=job["id"]), json={"model": "tiny", "training_file": "f", "n_epoch": 1}
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n_epoch")


async def test_lists_with_filters(world: World) -> None:
    key = world.platform.accounts.create_key("native", world.platform.accounts.create_project("native").id)
    async with world.client(key) as client:
        ids = [(await made(world, client, metadata={"n": str(n)}))["id"] for n in range(3)]
        await client.post(f"{JOBS}/{ids[0]}/cancel")
        for query, expected in (
            ("", ids[::-1]),
            ("?status=cancelled", ids[:1]),
            ("?status=validating&limit=1", ids[2:]),
            ("?model=tiny&metadata%5Bn%5D=1", ids[1:2]),
            ("?model=other", []),
        ):
            page = (await client.get(JOBS + query)).json()
            assert [job["id"] for job in page["data"]] == expected, query
        assert (await client.get(JOBS + "?status=validating&limit=1")).json()["has_more"] is True
        wrong = await client.get(JOBS + "?status=pending")
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "status")


async def test_retry_and_clone(world: World, client: httpx.AsyncClient) -> None:
    job = await made(world, client, hyperparameters={"n_epochs": 2}, suffix="s")
    early = await client.post(f"{JOBS}/{job['id']}/retry")
    assert (early.status_code, early.json()["error"]["code"]) == (409, "job_not_finished")
    assert (await client.post(f"{JOBS}/{job['id']}/cancel")).json()["status"] == "cancelled"
    key = {"Idempotency-Key": "native-retry"}
    first = await client.post(f"{JOBS}/{job['id']}/retry", headers=key)
    assert first.status_code == 201 and first.json()["retry_of"] == job["id"]
    assert (await client.post(f"{JOBS}/{job['id']}/retry", headers=key)).json()["id"] == first.json()["id"]
    assert first.json()["hyperparameters"] == job["hyperparameters"]
    none = await client.post(f"{JOBS}/{job['id']}/retry", json={"apply_suggestion": True})
    assert none.json()["error"]["code"] == "no_suggestion"
    copy = await client.post(
        f"{JOBS}/{job['id']}/clone",
        json={"hyperparameters": {"batch_size": 2}, "max_length": 64, "suffix": None, "metadata": {"c": "d"}},
    )
    shown = copy.json()
    assert copy.status_code == 201 and shown["cloned_from"] == job["id"]
    expected = {"n_epochs": 2, "batch_size": 2, "learning_rate_multiplier": "auto", "max_length": 64}
    assert shown["hyperparameters"] == expected
    assert (shown["user_provided_suffix"], shown["metadata"]) == (None, {"c": "d"})
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 5}}}
    other = (await client.post(f"{JOBS}/{job['id']}/clone", json={"method": method})).json()
    assert other["hyperparameters"]["n_epochs"] == 5


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"apply_suggestion": 1}', "apply_suggestion"),
        (b'{"other": true}', "other"),
        (b"[]", None),
        (b"{", None),
        (b'{"request_id": 5}', "request_id"),
    ],
)
async def test_bodies_of_a_retry(world: World, client: httpx.AsyncClient, body: bytes, param: str | None) -> None:
    job = await made(world, client)
    await client.post(f"{JOBS}/{job['id']}/cancel")
    answer = await client.post(f"{JOBS}/{job['id']}/retry", content=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


async def test_changes_and_the_rest_of_the_verbs(world: World, client: httpx.AsyncClient) -> None:
    job = await made(world, client)
    url = f"{JOBS}/{job['id']}"
    assert (await client.patch(url, json={"metadata": {"k": "v"}})).json()["metadata"] == {"k": "v"}
    wrong = await client.patch(url, json={"status": "succeeded"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "status")
    with world.platform.storage.write() as tx:
        stored = tx.jobs.get(world.project_id, job["id"])
        assert stored is not None
        tx.jobs.change(stored, status="queued")
    assert (await client.post(url + "/pause")).json()["status"] == "paused"
    assert (await client.post(url + "/resume")).json()["status"] == "queued"
    codes = [event["code"] for event in (await client.get(url + "/events")).json()["data"]]
    assert codes[-1] == "created" and (await client.get(url + "/checkpoints")).json()["data"] == []
    assert (await client.post(url + "/cancel")).json()["status"] == "cancelled"
    assert (await client.delete(url)).json()["deleted"] is True
    assert (await client.get(url)).status_code == 404


async def test_another_projects_job_does_not_exist(world: World, client: httpx.AsyncClient) -> None:
    job = await made(world, client)
    async with world.client(world.other_key) as other:
        for method, path, body in (
            ("GET", "", None),
            ("PATCH", "", {}),
            ("POST", "/retry", None),
            ("POST", "/clone", {}),
            ("DELETE", "", None),
        ):
            answer = await other.request(method, f"{JOBS}/{job['id']}{path}", json=body)
            assert answer.status_code == 404, (method, path)


async def test_extra_body_reaches_the_hyperparameters(world: World, client: httpx.AsyncClient) -> None:
    job = await created(world, client, "/api/paas/v4", lora_rank="4", max_length=128, hyperparameters={"lora_rank": 6})
    assert job["hyperparameters"]["lora_rank"] == 6, "what is nearer to its name wins"
    assert job["hyperparameters"]["max_length"] == 128


async def test_a_queued_job_shows_its_place_under_every_prefix(world: World, client: httpx.AsyncClient) -> None:
    jobs = [await made(world, client), await created(world, client, "/api/paas/v4", priority="high")]
    assert [job["priority"] for job in jobs] == ["normal", "high"] and jobs[0]["queue"] is jobs[1]["queue"] is None
    with world.platform.storage.write() as tx:
        for job in jobs:
            stored = tx.jobs.get(world.project_id, job["id"])
            assert stored is not None
            tx.jobs.change(stored, status="queued")
    urls = [f"{JOBS}/{jobs[0]['id']}", *(f"{prefix}/fine_tuning/jobs/{jobs[1]['id']}" for prefix in PREFIXES)]
    normal, *high = [(await client.get(url, headers={"Accept-Language": "zh"})).json()["queue"] for url in urls]
    assert high[0] == high[1] and high[0]["position"] < normal["position"] == normal["ahead"] + 1
    assert (high[0]["waits_for"]["code"], high[0]["waits_for"]["message"]) == ("start", "即将开始。")
    assert normal["waits_for"]["code"] == "turn" and normal["estimated_start"] is None and normal["sources"] == []
    changed = await client.patch(f"{JOBS}/{jobs[1]['id']}", json={"priority": "low"})
    assert (changed.json()["priority"], changed.json()["queue"]["waits_for"]["code"]) == ("low", "turn")
    listed = {job["id"]: job["queue"] for job in (await client.get(JOBS + "?status=queued")).json()["data"]}
    assert listed[jobs[0]["id"]]["position"] < listed[jobs[1]["id"]]["position"]
    for value in ("urgent", 1, ["high"]):
        wrong = await client.patch(f"{JOBS}/{jobs[1]['id']}", json={"priority": value})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "priority")
    for job in jobs:
        await client.post(f"{JOBS}/{job['id']}/cancel")
