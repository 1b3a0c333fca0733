"""Notification channels over HTTP."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.api.world import World
from tests.unit.test_notifications_webhooks import A24
from tests.webhook_world import Receiver
from tunewright.notifications.webhooks import WebhookSender

CHANNELS = "/api/v1/notifications/channels"
HOOK = "https://good.example/hook?token=geheim"


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    receiver = Receiver(tmp_path_factory.mktemp("receiver"))
    yield receiver
    receiver.close()


@pytest.fixture
async def client(tmp_path: Path, receiver: Receiver, untrained_base: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Of a world of its own, which sends to the receiver."""
    receiver.got.clear()
    world = World(tmp_path / "home", untrained_base)
    world.platform.sending.webhooks = WebhookSender(receiver.egress())
    async with world.client() as client:
        client.world = world  # type: ignore[attr-defined]
        yield client
    world.platform.deliverer.stop()
    world.platform.storage.close()


async def made(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await client.post(CHANNELS, json={"url": HOOK, **body})
    assert answer.status_code == 201, answer.text
    return answer.json()


async def test_the_life_of_a_channel(client: httpx.AsyncClient, receiver: Receiver) -> None:
    channel = await made(client, name="钩子")
    secret = channel.pop("signing_secret")
    assert secret.startswith("whsec_")
    assert (channel["kind"], channel["url"], channel["name"]) == ("webhook", "https://good.example/***", "钩子")
    assert len(channel["events"]) == 5 and channel["enabled"] and channel["language"] == "en"
    one = f"{CHANNELS}/{channel['id']}"
    assert (await client.get(one)).json() == channel
    assert (await client.get(CHANNELS)).json()["data"] == [channel]

    changed = (await client.patch(one, json={"events": ["fine_tuning.job.failed"], "language": "zh"})).json()
    assert (changed["events"], changed["language"], changed["name"]) == (["fine_tuning.job.failed"], "zh", "钩子")

    tested = (await client.post(f"{one}/test")).json()
    assert (tested["status"], tested["http_status"], tested["error"]) == ("delivered", 200, None)
    OpenAI(api_key="x", webhook_secret=secret).webhooks.unwrap(receiver.got[0].body, receiver.got[0].headers)
    assert (await client.get(f"{one}/deliveries")).json()["data"] == [tested]

    rotated = (await client.post(f"{one}/rotate_secret")).json()["signing_secret"]
    assert rotated.startswith("whsec_") and rotated != secret
    assert (await client.delete(one)).json() == {
        "id": channel["id"],
        "object": "notification_channel",
        "deleted": True,
    }
    assert (await client.get(one)).json()["error"]["code"] == "channel_not_found"


async def test_deliveries_come_in_pages(client: httpx.AsyncClient) -> None:
    one = f"{CHANNELS}/{(await made(client))['id']}"
    ids = [(await client.post(f"{one}/test")).json()["id"] for _ in range(3)]
    first = (await client.get(f"{one}/deliveries?limit=2")).json()
    assert first["has_more"] and len(first["data"]) == 2
    rest = (await client.get(f"{one}/deliveries?limit=2&after={first['last_id']}")).json()
    assert not rest["has_more"]
    assert sorted(each["id"] for each in first["data"] + rest["data"]) == sorted(ids)


@pytest.mark.parametrize("url", A24)
async def test_a24_addresses_are_refused(client: httpx.AsyncClient, url: str) -> None:
    answer = await client.post(CHANNELS, json={"url": url})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "url")
    assert error["code"] == (A24[url] if url else "invalid_value")


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_required_parameter", "url"),
        ({"url": 5}, "invalid_value", "url"),
        ({"url": HOOK, "events": []}, "invalid_value", "events"),
        ({"url": HOOK, "events": ["fine_tuning.job.started"]}, "invalid_value", "events"),
        ({"url": HOOK, "events": "fine_tuning.job.failed"}, "invalid_value", "events"),
        ({"url": HOOK, "name": "x" * 129}, "invalid_value", "name"),
        ({"url": HOOK, "language": "fr"}, "invalid_value", "language"),
        ({"url": HOOK, "secret": "mine"}, "unknown_parameter", "secret"),
        ({"url": "json://good.example/"}, "url_not_allowed", "url"),
        ({"url": "file:///etc/passwd"}, "url_not_allowed", "url"),
    ],
)
async def test_bad_channels(client: httpx.AsyncClient, body: dict[str, Any], code: str, param: str) -> None:
    answer = await client.post(CHANNELS, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param)
    assert "geheim" not in answer.text


async def test_a_cancelled_job_is_told(client: httpx.AsyncClient, receiver: Receiver) -> None:
    world: World = client.world  # type: ignore[attr-defined]
    one = f"{CHANNELS}/{(await made(client))['id']}"
    file_id = (await world.upload(client))["id"]
    job = (await client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file_id})).json()
    assert (await client.get(f"{one}/deliveries")).json()["data"] == []
    await client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
    [waiting] = (await client.get(f"{one}/deliveries")).json()["data"]
    assert (waiting["status"], waiting["type"], waiting["job_id"]) == (
        "pending",
        "fine_tuning.job.cancelled",
        job["id"],
    )
    world.platform.deliverer.run_once()
    world.platform.deliverer.stop()
    [done] = (await client.get(f"{one}/deliveries")).json()["data"]
    assert done["status"] == "delivered" and job["id"].encode() in receiver.got[0].body
