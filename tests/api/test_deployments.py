"""The routes of private instances: what they take, refuse and show. No process runs here; what runs is tests/chaos."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.world import World
from tunewright.clock import wall_s
from tunewright.deployments.records import Reason, ReplicaRecord
from tunewright.ids import new_id
from tunewright.models.records import TunedModel

ROUTE = "/api/v1/deployments"


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, untrained_base: Path) -> Iterator[World]:
    """A world whose reconcile loop does not run, with memory for a few replicas."""
    world = World(tmp_path_factory.mktemp("deployments") / "home", untrained_base, memory_bytes=20 * 2**30)
    yield world
    world.platform.storage.close()


@pytest.fixture
async def api(calm: World) -> AsyncIterator[httpx.AsyncClient]:
    async with calm.client() as client:
        yield client
        for each in (await client.get(ROUTE)).json()["data"]:
            await client.delete(f"{ROUTE}/{each['id']}")


def tuned(world: World, kind: str = "lora") -> TunedModel:
    model = TunedModel(
        id=new_id("model"),
        project_id=world.project_id,
        name=f"tiny:1::{new_id('x')[-8:]}",
        base_code="tiny",
        job_id="ftjob-none",
        created_at=wall_s(),
        status="ready",
        adapter_path="nowhere",
        adapter_sha256="0" * 64,
        proof={"kind": kind, "tensors": 1},
    )
    with world.platform.storage.write() as tx:
        tx.models.insert(model)
    return model


async def test_the_life_of_a_deployment(api: httpx.AsyncClient, calm: World) -> None:
    answer = await api.post(ROUTE, json={"model": "tiny", "replicas": 2, "name": "mine", "idle_minutes": 5})
    assert answer.status_code == 201
    made = answer.json()
    assert made["object"] == "deployment" and made["id"].startswith("dep-")
    shown = {name: made[name] for name in ("name", "model", "base", "merge", "status", "replicas_wanted", "replicas")}
    assert shown == {
        "name": "mine", "model": "tiny", "base": "tiny", "merge": False, "status": "deploying",
        "replicas_wanted": 2, "replicas": [],
    }  # fmt: skip
    assert made["memory"]["source"] == "estimated" and made["memory"]["replica_bytes"] > 0 and made["proof"] is None
    one = (await api.get(f"{ROUTE}/{made['id']}")).json()
    assert 0 < made["memory"]["free_bytes"] < calm.settings.memory_bytes - 2 * made["memory"]["replica_bytes"]
    assert one == made and (await api.get(ROUTE)).json()["data"] == [made]

    changed = await api.patch(f"{ROUTE}/{made['id']}", json={"replicas": 3, "idle_minutes": None})
    assert (changed.json()["replicas_wanted"], changed.json()["idle_minutes"]) == (3, None)
    events = (await api.get(f"{ROUTE}/{made['id']}/events")).json()
    assert [event["code"] for event in events["data"]] == ["scaled", "created"] and events["has_more"] is False
    chinese = await api.get(f"{ROUTE}/{made['id']}/events?limit=1", headers={"Accept-Language": "zh"})
    assert chinese.json()["data"][0]["message"] == "实例数量已改为 3。" and chinese.json()["has_more"] is True

    for _ in range(2):
        gone = await api.delete(f"{ROUTE}/{made['id']}")
        assert gone.json() == {"id": made["id"], "object": "deployment", "deleted": True}
    for path in ("", "/events"):
        assert (await api.get(f"{ROUTE}/{made['id']}{path}")).json()["error"]["code"] == "deployment_not_found"
    assert (await api.get(ROUTE)).json()["data"] == []


@pytest.mark.parametrize("prefix", ["/v1", "/api/paas/v4"])
async def test_lists_of_models_show_the_names_to_call(api: httpx.AsyncClient, calm: World, prefix: str) -> None:
    await api.post(ROUTE, json={"model": "tiny", "name": "mine"})
    shown = {each["id"]: each for each in (await api.get(f"{prefix}/models")).json()["data"]}
    assert shown["mine"]["parent"] == "tiny"
    assert (await api.get(f"{prefix}/models/mine")).json() == shown["mine"]
    assert (await api.get(f"{prefix}/models/other")).status_code == 404
    async with calm.client(calm.other_key) as stranger:
        assert (await stranger.get(f"{prefix}/models/mine")).status_code == 404


async def test_replicas_are_shown_with_their_reasons(api: httpx.AsyncClient, calm: World) -> None:
    made = (await api.post(ROUTE, json={"model": "tiny"})).json()
    reason = Reason(code="replica_start_failed", message="Its process died.")
    record = ReplicaRecord(number=4, state="backing_off", restarts=1, failures=3, next_try_at=99, reason=reason)
    with calm.platform.storage.write() as tx:
        stored = tx.deployments.get(calm.project_id, made["id"])
        assert stored is not None
        tx.deployments.change(stored, status="failed", reason=reason, replica_records=(record,))
    shown = (await api.get(f"{ROUTE}/{made['id']}", headers={"Accept-Language": "zh"})).json()
    assert (shown["status"], shown["reason"]["code"]) == ("failed", "replica_start_failed")
    assert shown["replicas"] == [
        {
            "id": "4", "state": "backing_off", "started_at": None, "restarts": 1, "failures": 3, "next_try_at": 99,
            "reason": {"code": "replica_start_failed", "message": "进程意外结束。"}, "memory_bytes": 0,
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({}, 400, "missing_required_parameter", "model"),
        ({"model": "nowhere"}, 404, "model_not_found", "model"),
        ({"model": "tiny:1::gone"}, 404, "model_not_found", "model"),
        ({"model": "tiny", "replicas": 0}, 400, "invalid_value", "replicas"),
        ({"model": "tiny", "replicas": 9}, 400, "invalid_value", "replicas"),
        ({"model": "tiny", "replicas": "2"}, 400, "invalid_value", "replicas"),
        ({"model": "tiny", "name": "a b"}, 400, "invalid_value", "name"),
        ({"model": "tiny", "name": "a:b"}, 400, "invalid_value", "name"),
        ({"model": "tiny", "name": "tiny"}, 409, "name_taken", "name"),
        ({"model": "tiny", "merge": True}, 400, "invalid_value", "merge"),
        ({"model": "tiny", "idle_minutes": 0}, 400, "invalid_value", "idle_minutes"),
        ({"model": "tiny", "idle_minutes": 1e9}, 400, "invalid_value", "idle_minutes"),
        ({"model": "tiny", "path": "/etc"}, 400, "unknown_parameter", "path"),
    ],
)
async def test_what_is_refused(
    api: httpx.AsyncClient, body: dict[str, Any], status: int, code: str, param: str
) -> None:
    answer = await api.post(ROUTE, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert (await api.get(ROUTE)).json()["data"] == []


async def test_a_name_is_one_deployments_as_long_as_it_lives(api: httpx.AsyncClient) -> None:
    first = (await api.post(ROUTE, json={"model": "tiny", "name": "mine"})).json()
    assert (await api.post(ROUTE, json={"model": "tiny", "name": "mine"})).json()["error"]["code"] == "name_taken"
    assert (await api.post(ROUTE, json={"model": "tiny"})).status_code == 201, "a base may have several"
    await api.delete(f"{ROUTE}/{first['id']}")
    assert (await api.post(ROUTE, json={"model": "tiny", "name": "mine"})).status_code == 201


async def test_need_and_free_are_named_where_memory_is_not_enough(api: httpx.AsyncClient, calm: World) -> None:
    need = (await api.post(ROUTE, json={"model": "tiny"})).json()["memory"]["replica_bytes"]
    with calm.platform.storage.write() as tx:
        (stored,) = tx.deployments.list(calm.project_id, after=None, limit=9)
        tx.deployments.change(stored, memory_bytes=8 * 10**9, memory_source="measured")
    assert need < 8 * 10**9
    refused = await api.post(ROUTE, json={"model": "tiny", "replicas": 3})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (409, "insufficient_memory")
    assert refused.headers["x-should-retry"] == "false", "an SDK that repeats it at once gains nothing"
    assert "3 replicas need 24.0 GB" in error["message"] and "GB are free" in error["message"]
    assert (await api.post(ROUTE, json={"model": "tiny", "replicas": 2})).status_code == 201
    again = await api.patch(f"{ROUTE}/{stored.id}", json={"replicas": 4})
    assert again.json()["error"]["code"] == "insufficient_memory", "what was promised to others is not free"


async def test_the_same_request_again_makes_no_second_one(api: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "once"}
    first = await api.post(ROUTE, json={"model": "tiny", "name": "once"}, headers=headers)
    again = await api.post(ROUTE, json={"model": "tiny", "name": "once"}, headers=headers)
    assert first.json()["id"] == again.json()["id"] and again.status_code == 201
    other = await api.post(ROUTE, json={"model": "tiny", "name": "other"}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")


async def test_others_see_and_reach_nothing(api: httpx.AsyncClient, calm: World) -> None:
    made = (await api.post(ROUTE, json={"model": "tiny", "name": "mine"})).json()
    async with calm.client(calm.other_key) as stranger:
        assert (await stranger.get(ROUTE)).json()["data"] == []
        for method, path in (("GET", ""), ("PATCH", ""), ("DELETE", ""), ("GET", "/events")):
            body = {"replicas": 1} if method == "PATCH" else None
            answer = await stranger.request(method, f"{ROUTE}/{made['id']}{path}", json=body)
            assert answer.json()["error"]["code"] == "deployment_not_found", (method, path)
    assert (await api.get(f"{ROUTE}/{made['id']}")).status_code == 200


@pytest.mark.parametrize(
    "route", ["/v1/models/{name}", "/api/paas/v4/models/{name}", "/api/paas/v4/fine_tuning/fine_tuned_models/{name}"]
)
async def test_a_deleted_card_takes_its_deployments_along(api: httpx.AsyncClient, calm: World, route: str) -> None:
    model, other = tuned(calm), tuned(calm, "full")
    mine = (await api.post(ROUTE, json={"model": model.name, "merge": True})).json()
    others = (await api.post(ROUTE, json={"model": other.name})).json()
    for _ in range(2):
        assert (await api.delete(route.format(name=model.name))).status_code == 200
        left = (await api.get(ROUTE)).json()["data"]
        assert [each["id"] for each in left] == [others["id"]]
    again = await api.post(ROUTE, json={"model": model.name})
    assert again.json()["error"]["code"] == "model_not_found"
    assert (await api.get(f"{ROUTE}/{mine['id']}")).status_code == 404
