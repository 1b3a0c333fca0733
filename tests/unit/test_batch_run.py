"""A batch when time, disk or file run out, and late answers when they have had their day."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.contract.rows import async_task
from tunewright.accounts.idempotency import from_headers
from tunewright.accounts.records import Caller
from tunewright.batches.answering import answered
from tunewright.batches.ports import CHAT
from tunewright.batches.records import CANCELLED, COMPLETED, EXPIRED, FAILED, Batch
from tunewright.batches.results import Journal
from tunewright.batches.run import BatchRun, Superseded
from tunewright.batches.service import NewBatch
from tunewright.clock import wall_s
from tunewright.datasets.blob_keys import content_key
from tunewright.errors import InvalidRequest, TunewrightError, Unavailable
from tunewright.settings import Settings
from tunewright.wiring import Platform, build

REQUESTS = 6


class Echo:
    """Answers with the request's id; the first `unavailable` calls fail, and `gate` may hold all back."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.unavailable = 0
        self.gate: asyncio.Event | None = None

    def check(self, caller: Caller, body: dict[str, Any], request_id: str) -> str:
        return body["model"]

    async def answer(
        self, caller: Caller, body: dict[str, Any], request_id: str, *, priority: int, endpoint: str
    ) -> dict[str, Any]:
        self.asked.append(request_id)
        if self.gate is not None:
            await self.gate.wait()
        if self.unavailable:
            self.unavailable -= 1
            raise Unavailable("engine_lost", "lost")
        if "wrong" in body:
            raise InvalidRequest("invalid_value", "wrong")
        return {"echo": request_id}

    def failure(self, error: TunewrightError | None, request_id: str) -> tuple[int, dict[str, Any]]:
        return (503 if isinstance(error, Unavailable) else 400), {"error": {"code": error.code if error else "bug"}}


class World:
    def __init__(self, home: Path, **settings: Any) -> None:
        self.settings = Settings(home=home, min_free_disk_bytes=1, **settings)
        self.platform: Platform = build(self.settings)
        self.platform.prepare()
        key = self.platform.accounts.authenticate(f"Bearer {self.platform.first_key}")
        self.caller = Caller(project_id=key.project_id, key_id=key.key_id)
        self.echo = Echo()

    def batch(self, **changes: Any) -> Batch:
        body = {"method": "POST", "url": "/v1/chat/completions", "body": {"model": "m"}}
        upload = self.platform.datasets.begin_upload(self.caller.project_id)
        upload.write("".join(json.dumps({"custom_id": f"r{n}", **body}) + "\n" for n in range(REQUESTS)).encode())
        file = upload.finish("f.jsonl", "batch")
        idem = from_headers(idempotency_key=None, retry_count=None, key_id="k", route="r", body=file.id.encode())
        wanted = NewBatch(dialect="openai", input_file_id=file.id, endpoint="/v1/chat/completions")
        made = self.platform.batches.create(self.caller, wanted, idem)
        if not changes:
            return made
        with self.platform.storage.write() as tx:
            changed = tx.batches.change(made, **changes)
        assert changed is not None
        return changed

    def run_of(self, batch: Batch, places: int = 2) -> BatchRun:
        platform = self.platform
        folder = platform.home.batches / batch.id
        semaphore = asyncio.Semaphore(places)
        return BatchRun(batch, folder, platform.storage, platform.datasets, self.echo, semaphore, self.settings)

    def now(self, batch: Batch) -> Batch:
        return self.platform.batches.get(self.caller.project_id, batch.id)

    def lines(self, file_id: str | None) -> list[dict[str, Any]]:
        assert file_id is not None
        _, chunks = self.platform.datasets.content(self.caller.project_id, file_id)
        return [json.loads(line) for line in b"".join(chunks).splitlines()]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "home")
    yield world
    world.platform.storage.close()


async def test_a_batch_runs_through(world: World) -> None:
    batch = world.batch()
    await world.run_of(batch).run()
    done = world.now(batch)
    assert (done.status, done.completed, done.failed, done.error_file_id) == (COMPLETED, REQUESTS, 0, None)
    assert [line["response"]["body"]["echo"] for line in world.lines(done.output_file_id)] == sorted(world.echo.asked)


async def test_when_time_is_up_the_rest_is_told_so(world: World) -> None:
    batch = world.batch(expires_at=wall_s() - 1)
    run = world.run_of(batch)
    await run.run()
    done = world.now(batch)
    assert (done.status, done.completed, done.failed, done.output_file_id) == (EXPIRED, 0, REQUESTS, None)
    lines = world.lines(done.error_file_id)
    assert [line["custom_id"] for line in lines] == [f"r{n}" for n in range(REQUESTS)]
    assert {(line["response"], line["error"]["code"]) for line in lines} == {(None, "batch_expired")}


async def test_a_full_disk_is_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = world.batch()
    add = Journal.add

    def full(self: Journal, line: int, ok: bool, record: dict[str, Any]) -> None:
        if line == 3:
            raise OSError(28, "No space left on device")
        add(self, line, ok, record)

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(Journal, "add", full)
        await world.run_of(batch).run()
    before = len(world.echo.asked)
    await world.run_of(world.now(batch)).run()
    done = world.now(batch)
    assert (done.status, done.completed) == (COMPLETED, REQUESTS)
    assert len(world.echo.asked) - before < REQUESTS, "what was kept is not asked again"


async def test_a_file_whose_bytes_are_gone_fails_the_batch(world: World) -> None:
    batch = world.batch()
    world.platform.blobs.delete(content_key(world.caller.project_id, batch.input_file_id))
    await world.run_of(batch).run()
    failed = world.now(batch)
    assert failed.status == FAILED and failed.errors[0].code == "blob_missing"


async def test_a_batch_that_was_cancelled_meanwhile_is_looked_at_again(world: World) -> None:
    batch = world.batch()
    world.echo.gate = asyncio.Event()
    run = world.run_of(batch)
    running = asyncio.ensure_future(run.run())
    while len(world.echo.asked) < 2:
        await asyncio.sleep(0.01)
    world.platform.batches.cancel(world.caller.project_id, batch.id)
    run.ending.set()
    world.echo.gate.set()
    await running
    done = world.now(batch)
    assert (done.status, done.completed) == (CANCELLED, 2)
    with pytest.raises(Superseded):
        await world.run_of(batch).run()


async def test_engines_in_trouble_are_asked_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunewright.batches.answering._PAUSE_S", 0.001)
    world.echo.unavailable = 3

    async def ask(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return await answered(world.echo, world.caller, body, "r", priority=2, endpoint="/batches")

    assert await ask({}) == (200, {"echo": "r"})
    world.echo.unavailable = 99
    assert (await ask({}))[0] == 503
    world.echo.unavailable = 0
    assert await ask({"wrong": 1}) == (400, {"error": {"code": "invalid_value"}})


async def test_late_answers_have_their_day(world: World) -> None:
    controller, project_id = world.platform.batch_controller, world.caller.project_id
    world.platform.speeches["zhipu", CHAT] = world.echo
    task = world.platform.async_tasks.create(world.caller, "zhipu", {"model": "m"}, "late")
    old = async_task(project_id, status="SUCCESS", ended_at=wall_s() - world.settings.async_kept_s - 1)
    with world.platform.storage.write() as tx:
        tx.async_tasks.insert(old)
    controller.start()
    try:
        for _ in range(3000):
            if world.platform.async_tasks.get(project_id, task.id).status != "PROCESSING":
                break
            await asyncio.sleep(0.02)
    finally:
        controller.stop()
    done = world.platform.async_tasks.get(project_id, task.id)
    assert done.status == "SUCCESS" and done.answer == {"echo": "late"}
    with world.platform.storage.read() as tx:
        assert tx.async_tasks.get(project_id, old.id) is None
    assert msgspec.json.decode(done.body) == {"model": "m"}
