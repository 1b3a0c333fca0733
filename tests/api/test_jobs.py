"""Jobs, their events and models as the two dialects show them."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.world import PREFIXES, World
from tunewright.api.openai import fine_tuning as openai_words
from tunewright.api.renderings import job_object
from tunewright.api.zhipu import fine_tuning as zhipu_words
from tunewright.ids import new_id
from tunewright.jobs.records import MOVES, Job, JobCheckpoint, JobError, JobEvent, Suggestion
from tunewright.models.records import TunedModel

JOBS = "/fine_tuning/jobs"


async def created(world: World, client: httpx.AsyncClient, prefix: str = "/v1", **fields: Any) -> dict[str, Any]:
    file = await world.upload(client)
    answer = await client.post(prefix + JOBS, json={"model": "tiny", "training_file": file["id"], **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def a_job(status: str, **fields: Any) -> Job:
    return Job(
        id="ftjob-1",
        project_id="proj-1",
        base_code="tiny",
        model="tiny",
        tuned_model_id="model-1",
        tuned_model_name="tiny:1234567890:s:abcdefgh",
        training_file="file-1",
        created_at=5,
        status=status,
        **fields,
    )


async def test_a_job_in_both_dialects(world: World, client: httpx.AsyncClient) -> None:
    made = await created(
        world,
        client,
        "/api/paas/v4",
        hyperparameters={"n_epochs": 2, "batch_size": "8", "learning_rate_multiplier": None},
        suffix="demo_test",
        request_id="my-req-1",
        metadata={"a": "b"},
        seed=42,
        validation_file=None,
        unknown_extra={"x": 1},
    )
    expected = {"n_epochs": 2, "batch_size": 8, "learning_rate_multiplier": "auto"}
    assert made["hyperparameters"] == expected
    assert made["method"] == {"type": "supervised", "supervised": {"hyperparameters": expected}}
    assert made["status"] in ("created", "pending")
    assert made["fine_tuned_model"].split(":")[::2] == ["tiny", "demo_test"]
    assert (made["request_id"], made["seed"], made["metadata"]) == ("my-req-1", 42, {"a": "b"})
    assert (made["error"], made["result_files"], made["integrations"]) == (None, [], [])
    assert made["finished_at"] is made["trained_tokens"] is made["validation_file"] is made["estimated_finish"] is None
    assert made["object"] == "fine_tuning.job" and made["organization_id"] and made["training_type"] == "lora"
    same = (await client.get(f"/v1{JOBS}/{made['id']}")).json()
    assert same["fine_tuned_model"] is None
    assert same["status"] in ("validating_files", "queued")
    differ = {name for name in made if made[name] != same[name]}
    assert differ == {"status", "fine_tuned_model"}


def test_every_state_has_a_word_in_both_dialects() -> None:
    assert set(zhipu_words.STATUS_WORDS) == set(openai_words.STATUS_WORDS) == set(MOVES)
    literals = {"validating_files", "queued", "running", "succeeded", "failed", "cancelled"}
    assert set(openai_words.STATUS_WORDS.values()) == literals
    for status in MOVES:
        job = a_job(status)
        name = openai_words.name_shown(job)
        assert (name is not None) == (status == "succeeded")
        shown = job_object(job, openai_words.STATUS_WORDS, name, "en")
        assert shown["state"] == status
        assert zhipu_words.name_shown(job) == job.tuned_model_name


def test_auto_becomes_the_number_once_it_is_known() -> None:
    requested = {"n_epochs": "auto", "batch_size": 4, "learning_rate_multiplier": "auto", "lora_rank": 8}
    resolved = {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 1.0, "lora_rank": 8, "max_length": 99}
    before = job_object(a_job("queued", requested=requested), zhipu_words.STATUS_WORDS, None, "en")
    after = job_object(
        a_job("running", requested=requested, hyperparameters=resolved), zhipu_words.STATUS_WORDS, None, "en"
    )
    assert before["hyperparameters"] == requested
    assert after["hyperparameters"] == {**requested, "n_epochs": 3, "learning_rate_multiplier": 1.0}
    dpo = job_object(a_job("queued", method="dpo"), zhipu_words.STATUS_WORDS, None, "en")
    assert dpo["method"]["dpo"]["hyperparameters"]["beta"] == "auto"


def test_the_error_of_a_failed_job_is_a_sentence() -> None:
    error = JobError(
        code="c",
        message="The disk {name} is full",
        param="training_file",
        values={"name": "d"},
        cause="The disk is full.",
        evidence="OSError: …",
        suggestion=Suggestion(
            message="Retry with longer rows: {changes}.",
            values={"changes": "max_length 9"},
            changes={"hyperparameters": {"max_length": 9}},
        ),
    )
    shown = job_object(a_job("failed", error=error), zhipu_words.STATUS_WORDS, None, "zh")
    assert shown["error"] == {
        "code": "c",
        "message": "The disk d is full",
        "param": "training_file",
        "cause": "磁盘已满。",
        "evidence": "OSError: …",
        "suggestion": {
            "message": "请允许更长的样本后重试：max_length 9。",
            "changes": {"hyperparameters": {"max_length": 9}},
        },
    }
    plain = job_object(a_job("failed", error=JobError(code="c", message="m")), zhipu_words.STATUS_WORDS, None, "en")
    assert plain["error"]["cause"] is plain["error"]["evidence"] is plain["error"]["suggestion"] is None


@pytest.mark.parametrize(
    "fields",
    [
        {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4}}}},
        {"method": {"type": "supervised", "supervised": None}, "hyperparameters": {"n_epochs": 4}},
        {"method": {"type": "supervised"}, "hyperparameters": {"n_epochs": "4"}},
        {
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4}}},
            "hyperparameters": {"n_epochs": 9},
        },
        {"hyperparameters": {"n_epochs": 4.0}, "method": None, "training_type": "lora"},
    ],
)
async def test_the_ways_to_name_hyperparameters(
    world: World, client: httpx.AsyncClient, fields: dict[str, Any]
) -> None:
    for prefix in PREFIXES:
        made = await created(world, client, prefix, **fields)
        assert made["hyperparameters"]["n_epochs"] == made["method"]["supervised"]["hyperparameters"]["n_epochs"] == 4


@pytest.mark.parametrize("name", ["request_id", "requestId"])
async def test_a_request_id_makes_one_job(world: World, client: httpx.AsyncClient, name: str) -> None:
    first = await created(world, client, "/api/paas/v4", **{name: f"r-{name}"})
    again = await created(world, client, "/api/paas/v4", **{name: f"r-{name}"})
    assert first["id"] == again["id"]
    assert first["request_id"] == f"r-{name}"


async def test_lists_of_jobs(world: World) -> None:
    key = world.platform.accounts.create_key("jobs", world.platform.accounts.create_project("jobs").id)
    async with world.client(key) as client:
        made = [(await created(world, client, metadata={"n": str(i % 2)}))["id"] for i in range(4)]
        for prefix in PREFIXES:
            page = (await client.get(f"{prefix}{JOBS}?limit=3")).json()
            assert [job["id"] for job in page["data"]] == sorted(made, reverse=True)[:3]
            assert page["has_more"] is True
            rest = (await client.get(f"{prefix}{JOBS}?limit=3&after={page['last_id']}")).json()
            assert ([job["id"] for job in rest["data"]], rest["has_more"]) == ([min(made)], False)
            filtered = (await client.get(f"{prefix}{JOBS}?metadata%5Bn%5D=1")).json()["data"]
            assert {job["metadata"]["n"] for job in filtered} == {"1"}
            assert len((await client.get(f"{prefix}{JOBS}?metadata=null")).json()["data"]) == 4


async def test_cancel_delete_and_the_empty_body(world: World, client: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "application/json; charset=UTF-8"}
    for prefix in PREFIXES:
        job_id = (await created(world, client, prefix))["id"]
        cancelled = await client.post(f"{prefix}{JOBS}/{job_id}/cancel/", headers=headers)
        assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
        assert cancelled.json()["finished_at"]
        deleted = await client.delete(f"{prefix}{JOBS}/{job_id}", headers=headers)
        assert (deleted.json()["id"], deleted.json()["status"], deleted.json()["deleted"]) == (
            job_id,
            "cancelled",
            True,
        )
        assert (await client.get(f"{prefix}{JOBS}/{job_id}")).status_code == 404


async def test_pause_and_resume(world: World, client: httpx.AsyncClient) -> None:
    job_id = (await created(world, client))["id"]
    with world.platform.storage.write() as tx:
        job = tx.jobs.get(world.project_id, job_id)
        assert job is not None
        tx.jobs.change(job, status="queued")
    paused = (await client.post(f"/v1{JOBS}/{job_id}/pause")).json()
    assert (paused["status"], paused["state"]) == ("queued", "paused")
    assert (await client.get(f"/api/paas/v4{JOBS}/{job_id}")).json()["status"] == "pending"
    assert (await client.post(f"/v1{JOBS}/{job_id}/resume")).json()["state"] == "queued"


async def test_events_and_checkpoints(world: World, client: httpx.AsyncClient) -> None:
    made = await created(world, client)
    common = {"job_id": made["id"], "project_id": world.project_id, "created_at": 7}
    steps = [
        JobEvent(
            id=new_id("ftevent"),
            type="metrics",
            message="Step {step}/{total_steps}: loss={loss}",
            values={"step": step, "total_steps": 3, "loss": "1.5"},
            data={"step": step, "loss": float("nan")},
            step=step,
            **common,
        )
        for step in (1, 2, 3)
    ]
    with world.platform.storage.write() as tx:
        tx.jobs.add_events(steps)
        tx.jobs.add_checkpoint(JobCheckpoint(id="ftckpt-1", step=3, metrics={"step": 3}, path="x", **common))
    for prefix in PREFIXES:
        page = (await client.get(f"{prefix}{JOBS}/{made['id']}/events?limit=2")).json()
        assert page["has_more"] is True
        newest = page["data"][0]
        assert newest["object"] == "fine_tuning.job.event"
        assert (newest["type"], newest["level"], newest["message"]) == ("metrics", "info", "Step 3/3: loss=1.5")
        assert newest["data"] == {"step": 3, "loss": None}, "JSON has no NaN"
        older = (await client.get(f"{prefix}{JOBS}/{made['id']}/events?after={page['last_id']}")).json()
        assert [event["type"] for event in older["data"]] == ["metrics", "message"]
        checkpoints = (await client.get(f"{prefix}{JOBS}/{made['id']}/checkpoints")).json()
        name = (await client.get(f"/api/paas/v4{JOBS}/{made['id']}")).json()["fine_tuned_model"]
        assert checkpoints["data"] == [
            {
                "object": "fine_tuning.job.checkpoint",
                "id": "ftckpt-1",
                "created_at": 7,
                "fine_tuned_model_checkpoint": f"{name}:ckpt-step-3",
                "fine_tuning_job_id": made["id"],
                "metrics": {"step": 3},
                "step_number": 3,
                "best": False,
                "last": True,
                "proof": None,
            }
        ]
        assert checkpoints["has_more"] is False and checkpoints["first_id"] == "ftckpt-1"


async def test_the_event_stream_resumes_and_ends(world: World, client: httpx.AsyncClient) -> None:
    job_id = (await created(world, client))["id"]
    await client.post(f"/v1{JOBS}/{job_id}/cancel")
    url = f"/api/v1/jobs/{job_id}/events/stream"
    whole = await client.get(url)
    assert whole.headers["content-type"].startswith("text/event-stream")
    blocks = whole.text.removesuffix("\n\n").split("\n\n")
    events = [json.loads(block.split("data: ")[1]) for block in blocks]
    assert [event["object"] for event in events] == [
        "fine_tuning.job.event",
        "fine_tuning.job.event",
        "fine_tuning.job",
    ]
    assert blocks[-1].startswith("event: end\nid: ")
    assert events[-1]["status"] == "cancelled"
    assert blocks[0].split("\n")[0] == f"id: {events[0]['id']}"
    rest = await client.get(url, headers={"Last-Event-ID": events[0]["id"], "Accept-Language": "zh"})
    assert rest.text.count("data: ") == 2
    assert events[0]["id"] not in rest.text
    none_left = await client.get(f"{url}?after={events[1]['id']}")
    assert none_left.text.count("data: ") == 1


async def test_the_event_stream_of_nothing_is_404(client: httpx.AsyncClient) -> None:
    assert (await client.get("/api/v1/jobs/ftjob-x/events/stream")).status_code == 404


def ready_model(world: World) -> str:
    """A model that is there as far as callers can see."""
    name = f"tiny:1234567890:s:{new_id('x')[-8:]}"
    model = TunedModel(
        id=new_id("model"),
        project_id=world.project_id,
        name=name,
        base_code="tiny",
        job_id="ftjob-1",
        created_at=9,
        status="ready",
    )
    with world.platform.storage.write() as tx:
        tx.models.insert(model)
    (world.platform.home.adapters / model.id).mkdir()
    return name


async def test_models(world: World, client: httpx.AsyncClient) -> None:
    name = ready_model(world)
    for prefix in PREFIXES:
        listed = (await client.get(f"{prefix}/models")).json()
        assert listed["has_more"] is False
        cards = {card["id"]: card for card in listed["data"]}
        assert cards[name]["parent"] == "tiny"
        assert cards["tiny"]["parent"] is None
        assert (await client.get(f"{prefix}/models/{name}")).json() == cards[name]
        assert cards[name]["object"] == "model" and cards[name]["created"] == 9
        for odd in ("a%2Fb", "nowhere", "%E5%90%8D%20x%3Fy%23z", "org/x"):
            absent = await client.get(f"{prefix}/models/{odd}")
            assert absent.status_code == 404
        base = await client.delete(f"{prefix}/models/tiny")
        assert base.status_code == (403 if prefix == "/v1" else 400)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("path", ["/models/", "/fine_tuning/fine_tuned_models/"])
async def test_deleting_a_model_can_be_repeated(
    world: World, client: httpx.AsyncClient, prefix: str, path: str
) -> None:
    name = ready_model(world)
    for _ in range(2):
        answer = await client.delete(prefix + path + name)
        body = answer.json()
        assert answer.status_code == 200
        assert body == {
            "id": name,
            "object": "model",
            "deleted": True,
            "request_id": answer.headers["x-request-id"],
            "model_name": name,
            "delete_status": "deleted",
        }
    assert (await client.get(prefix + "/models/" + name)).status_code == 404


def test_the_table_in_the_docs_is_the_routes(world: World) -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text("utf-8")
    for route in world.app.routes:
        path = route.path.removeprefix("/api/paas/v4").removeprefix("/v1").replace(":path", "")  # type: ignore[attr-defined]
        assert f"`{path}`" in page, path


def test_the_error_tables_in_the_docs_are_those_of_the_code() -> None:
    from tunewright.api.app import ERROR_TABLES

    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text("utf-8")
    zhipu, openai = ERROR_TABLES
    names = {*zhipu.by_kind, *openai.by_kind, *zhipu.by_code, *openai.by_code}
    for name in sorted(names):
        kind = name in zhipu.by_kind
        of_zhipu = zhipu.by_kind.get(name) or zhipu.by_code.get(name)
        of_openai = openai.by_kind.get(name) or openai.by_code.get(name)
        shown = [
            f"{row.status} `{row.code or ''}`" if row and row.code else (str(row.status) if row else "")
            for row in (of_zhipu, of_openai)
        ]
        label = f"*{name}*" if kind else f"`{name}`"
        line = f"| {label} | {shown[0]} | {shown[1]} |"
        assert line.replace("  ", " ") in page.replace("  ", " "), line
