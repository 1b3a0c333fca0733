"""Files with images through the API: what an upload answers, how the wait ends, and a server that is killed meanwhile."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.api.world import PREFIXES, World
from tests.evil_hosts import SmallInternet
from tests.images import data_uri, hostile, picture, row
from tests.live_server import LiveServer
from tunewright import egress

URL = "https://good.example/image"


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallInternet]:
    made = SmallInternet(picture())
    monkeypatch.setattr(egress, "_resolve", made.resolve)
    monkeypatch.setattr(egress, "_connect", made.connect)
    yield made
    made.close()


@pytest.fixture
def gallery(internet: SmallInternet, tmp_path: Path) -> Iterator[World]:
    """A server with its image loop, whose network is the small internet."""
    world = World(tmp_path / "home")
    world.platform.datasets.images.start()
    yield world
    world.platform.datasets.images.stop()
    world.platform.storage.close()


@pytest.fixture
async def client(gallery: World) -> AsyncIterator[httpx.AsyncClient]:
    async with gallery.client() as client:
        yield client


async def upload(client: httpx.AsyncClient, *rows: dict[str, Any], prefix: str = "/v1", **form: str) -> httpx.Response:
    body = "".join(json.dumps(one) + "\n" for one in rows).encode()
    data = {"purpose": "fine-tune", **form}
    return await client.post(f"{prefix}/files", data=data, files={"file": ("rows.jsonl", body)})


async def ended(client: httpx.AsyncClient, file_id: str) -> dict[str, Any]:
    """The dataset once its images are done."""
    for _ in range(600):
        dataset = (await client.get(f"/api/v1/datasets/{file_id}")).json()
        if dataset["status"] != "processing":
            return dataset
        await asyncio.sleep(0.05)
    raise TimeoutError


@pytest.mark.parametrize("prefix", PREFIXES)
async def test_a_file_of_web_addresses_is_processing_and_then_processed(client: httpx.AsyncClient, prefix: str) -> None:
    http = URL.replace("https", "http")
    answer = await upload(client, row(http), row(data_uri(picture(3, 3))), prefix=prefix)
    assert (answer.status_code, answer.json()["status"]) == (200, "processing")
    dataset = await ended(client, answer.json()["id"])
    assert (dataset["status"], dataset["kind"], dataset["report"]["bad_rows"]) == (
        "processed",
        "image_understanding",
        0,
    )
    assert dataset["statistics"]["image_files"]["distinct"] == 2
    file = (await client.get(f"{prefix}/files/{dataset['id']}")).json()
    assert file["status"] == "processed"
    assert (await client.delete(f"{prefix}/files/{dataset['id']}")).json()["deleted"] is True


async def test_inline_images_are_processed_with_the_answer(client: httpx.AsyncClient) -> None:
    answer = await upload(client, row(data_uri(picture())))
    assert (answer.status_code, answer.json()["status"]) == (200, "processed")


async def test_a_bomb_in_a_row_is_refused_with_its_place(client: httpx.AsyncClient) -> None:
    bomb = hostile()["PNG of 900 megapixels"][0]
    answer = await upload(client, row(data_uri(picture())), row(data_uri(bomb)))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "image_too_large")
    assert "line 2" in error["message"] and "Mi" in error["message"]


async def test_an_image_that_can_not_be_fetched_is_a_problem_of_its_row(
    client: httpx.AsyncClient, internet: SmallInternet
) -> None:
    answer = await upload(client, row("http://good.example/image"), row("http://good.example/to-loopback"))
    dataset = await ended(client, answer.json()["id"])
    assert (dataset["status"], dataset["report"]["bad_rows"]) == ("error", 1)
    problem = next(p for p in dataset["report"]["problems"] if p["severity"] == "error")
    assert (problem["line"], problem["code"]) == (2, "url_not_allowed")
    assert problem["pointer"] == "/messages/0/content/1/image_url/url"
    assert "127.0.0.1" not in json.dumps(dataset) and internet.hits == 0


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/x", "http://169.254.169.254/", "http://localhost/", "file:///etc/passwd"]
)
async def test_addresses_inside_are_refused_at_once(
    client: httpx.AsyncClient, internet: SmallInternet, url: str
) -> None:
    answer = await upload(client, row(url))
    assert answer.status_code == 400 and answer.json()["error"]["code"] in ("url_not_allowed", "invalid_media_url")
    assert (internet.hits, internet.asked) == (0, [])


# --- a server of its own


def journal(home: Path) -> Path | None:
    return next((home / "tmp").glob("*.journal"), None)


def lines(path: Path | None) -> int:
    try:
        return path.read_bytes().count(b"\n") if path else 0
    except FileNotFoundError:
        return 0


def wait_for(condition: Any) -> Any:
    deadline = time.monotonic() + 60
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.01)
    return found


def image_workers(server: psutil.Process) -> list[psutil.Process]:
    return [p for p in server.children() if "tunewright.datasets.images.image_worker" in p.cmdline()]


def test_killed_servers_and_killed_workers_cost_no_image(tmp_path: Path) -> None:
    live = LiveServer(tmp_path / "home").start()
    try:
        file_id = live.upload([row(data_uri(picture(100 + i, 100))) for i in range(400)])
        process = next(
            p for p in psutil.Process().children() if "serve" in p.cmdline() and str(live.home) in p.cmdline()
        )
        wait_for(lambda: lines(journal(live.home)) >= 5)
        worker = wait_for(lambda: image_workers(process))[0]
        worker.send_signal(signal.SIGKILL)
        after = lines(journal(live.home))
        wait_for(lambda: lines(journal(live.home)) > after + 5)
        other = wait_for(lambda: image_workers(process))[0]
        assert other.pid != worker.pid
        done = lines(journal(live.home))
        live.kill()
        wait_for(lambda: not psutil.pid_exists(other.pid) or other.status() == psutil.STATUS_ZOMBIE)
        assert done <= lines(journal(live.home)) < 400, "it was in the middle"
        live.start()
        with live.api("/api/v1") as api:
            dataset = wait_for(lambda: _ended(api, file_id))
        assert (dataset["status"], dataset["report"]["bad_rows"]) == ("processed", 0)
        images = dataset["statistics"]["image_files"]
        assert (images["count"], images["distinct"], images["failed"]) == (400, 400, 0)
        stored = list((live.home / "blobs").glob("images/*/*"))
        assert len(stored) == 400
        wait_for(lambda: not os.listdir(live.home / "tmp"))
    finally:
        assert live.stop() == 0


def _ended(api: httpx.Client, file_id: str) -> dict[str, Any] | None:
    dataset = api.get(f"/datasets/{file_id}").json()
    return dataset if dataset["status"] != "processing" else None
