"""Several servers of one home on a real PostgreSQL, behind a proxy that asks them whether they are ready."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.deployments import deploy, events, processes, wait_for
from tests.live_server import LiveServer
from tests.promises.test_pool import worker_process
from tunewright.runners.local import LocalRunner

pytestmark = pytest.mark.timeout(600)  # on a machine that does much else; twenty seconds for each are usual
GRACE_S = 10.0
TAKEOVER_S = 10.0
SOAK = [pytest.mark.soak, pytest.mark.timeout(1200)]
Serve = Callable[..., LiveServer]


@pytest.fixture
def serve(postgres_url: str, tmp_path: Path, tiny_base: Path) -> Iterator[Serve]:
    """`serve()` is one more server of the home; with `home` of another one on the same database."""
    made: list[LiveServer] = []

    def run(home: str = "home", start: bool = True, **settings: str) -> LiveServer:
        fresh = not (tmp_path / home).exists()
        chosen = {
            "TUNEWRIGHT_DATABASE_URL": postgres_url,
            "TUNEWRIGHT_DRAIN_DELAY_S": "0",
            "TUNEWRIGHT_MAX_STREAMS_PER_KEY": "1000",
            "TUNEWRIGHT_CANCEL_GRACE_S": "2",
            "TUNEWRIGHT_DRAIN_GRACE_S": str(GRACE_S),
            "TUNEWRIGHT_ENGINE_SLOTS": "64",
            "FAKE_TRAINER": "1",
        }
        server = LiveServer(tmp_path / home, module="tests.serve_fake", **(chosen | settings))
        server.log = tmp_path / f"{home}-{len(made)}.log"
        made.append(server)
        if fresh:
            server.run("models", "add", str(tiny_base), "--code", "tiny")
            (server.home / "workers" / "fake.json").write_text('{"step_s": 0.01}')
        return server.start() if start else server

    yield run
    for server in made:
        server.stop()


class Proxy:
    """Connections to the servers in turn, those left out that said at their last probe that they are not ready."""

    def __init__(self, servers: list[LiveServer]) -> None:
        self._ports = [server.port for server in servers]
        self._ready = set(self._ports)
        self._turn = itertools.count()
        self.address = ""

    async def probe(self) -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=2) as client:
            await asyncio.gather(*(self._probe(client, port) for port in self._ports))

    async def _probe(self, client: httpx.AsyncClient, port: int) -> None:
        while True:
            try:
                ready = (await client.get(f"http://127.0.0.1:{port}/readyz")).status_code == 200
            except httpx.HTTPError:
                ready = False
            (self._ready.add if ready else self._ready.discard)(port)
            await asyncio.sleep(0.1)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        turn = next(self._turn) % len(self._ports)
        in_turn = self._ports[turn:] + self._ports[:turn]
        for port in sorted(in_turn, key=lambda port: port not in self._ready):
            try:
                back, out = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                continue
            with contextlib.suppress(asyncio.CancelledError):  # the test is over
                await asyncio.gather(_pipe(reader, out), _pipe(back, writer))
            return
        writer.close()


async def _pipe(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(2**16):
            target.write(data)
            await target.drain()
    except ConnectionError:
        pass
    finally:
        target.close()


@asynccontextmanager
async def proxied(*servers: LiveServer) -> AsyncIterator[str]:
    """The address of a proxy before the servers."""
    proxy = Proxy(list(servers))
    listening = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    probing = asyncio.ensure_future(proxy.probe())
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        probing.cancel()
        listening.close()


class Callers:
    """20 requests a second, one in four a stream; `ends` says how they ended: by the SDK with its retries, by it without any."""

    def __init__(self, address: str, key: str, model: str = "tiny") -> None:
        self._model = model
        # A connection for each request, as a proxy that balances requests makes.
        self._http = httpx.AsyncClient(
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0), trust_env=False, timeout=30
        )
        http: Any = self._http  # the SDK names the class by another module
        self._sdk = openai.AsyncOpenAI(api_key=key, base_url=f"{address}/v1", http_client=http)
        self._plain = self._sdk.with_options(max_retries=0)
        self._calls: list[asyncio.Task[None]] = []
        self.ends: Counter[str] = Counter()

    async def run(self, until: "asyncio.Future[Any]") -> None:
        for n in itertools.count():
            if until.done():
                break
            self._calls.append(asyncio.ensure_future(self._call(n)))
            await asyncio.sleep(0.05)
        await asyncio.gather(*self._calls)
        await self._http.aclose()

    async def _call(self, n: int) -> None:
        kind = ("stream", "sdk", "plain", "sdk")[n % 4]
        ask: Any = {"model": self._model, "messages": [{"role": "user", "content": f"hi {n}"}], "max_tokens": 20}
        try:
            if kind == "stream":  # a second and a half of words, one after another
                ask["max_tokens"] = 150
                said = ""
                async for chunk in await self._sdk.chat.completions.create(**ask, stream=True):
                    said += chunk.choices[0].delta.content or "" if chunk.choices else ""
                whole = said.split() == [str(word) for word in range(150)]
            else:
                client = self._sdk if kind == "sdk" else self._plain
                whole = (await client.chat.completions.create(**ask)).choices[0].finish_reason == "length"
            self.ends[f"{kind} {'whole' if whole else 'cut'}"] += 1
        except openai.OpenAIError as error:
            self.ends[f"{kind} {type(error).__name__} {error}"] += 1


def fake_rows(**orders: Any) -> list[dict[str, Any]]:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    return [{"messages": turns, **({"fake": orders} if n == 0 else {})} for n in range(4)]


def job_events(server: LiveServer, job_id: str) -> list[dict[str, Any]]:
    with server.api() as api:
        return api.get(f"/fine_tuning/jobs/{job_id}/events", params={"limit": 1000}).json()["data"]


def ledger(api: httpx.Client) -> list[dict[str, Any]]:
    return api.get("/usage/requests", params={"limit": 100}).json()["data"]


def chat(server: LiveServer, model: str = "tiny", **more: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, **more}
    with server.api() as api:
        answer = api.post("/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def step_of(server: LiveServer, job_id: str, step: int) -> None:
    """Wait until the job has come to this step."""
    deadline = time.monotonic() + 60
    while not any(e["type"] == "metrics" and e["data"]["step"] >= step for e in job_events(server, job_id)):
        assert time.monotonic() < deadline, server.job(job_id)
        time.sleep(0.1)


def trainer_of(server: LiveServer, job_id: str) -> int:
    return json.loads((server.home / "jobs" / job_id / "trainer.json").read_bytes())["pid"]


def check_done_once(server: LiveServer, job_id: str) -> None:
    """The job has succeeded without making a step twice, with one trainer."""
    job = server.wait(job_id, 120)
    assert job["status"] == "succeeded", job
    steps = [event["data"]["step"] for event in job_events(server, job_id) if event["type"] == "metrics"]
    assert sorted(steps) == sorted(set(steps)), "no step was made twice"
    journals = [path.name for path in (server.home / "jobs" / job_id).glob("journal-*.jsonl")]
    assert journals == ["journal-1.jsonl"], "the trainer was handed over, not started again"


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=SOAK)])
async def test_r07_a_rolling_restart_is_noticed_by_nobody(serve: Serve, rounds: int) -> None:
    """Both servers are restarted, one after the other. No request fails, no stream is cut, and a job goes on all along."""
    servers = [serve(TUNEWRIGHT_DRAIN_DELAY_S="2"), serve(TUNEWRIGHT_DRAIN_DELAY_S="2")]
    for server in servers:
        chat(server)
    job_id = servers[0].create_job(servers[0].upload(fake_rows(steps=200 * rounds, sleep_s=0.1)), suffix="rolled")
    async with proxied(*servers) as address:
        callers = Callers(address, servers[0].key)

        async def restart() -> None:
            for server in servers * rounds:
                port = server.port
                code = await asyncio.to_thread(server.stop)
                assert code == 0, server.log.read_text()[-2000:]
                await asyncio.to_thread(server.start, port)
                await asyncio.sleep(0.5)

        await callers.run(asyncio.ensure_future(restart()))
    print(dict(callers.ends))
    assert set(callers.ends) == {"stream whole", "sdk whole", "plain whole"}, callers.ends
    assert callers.ends.total() > 100
    await asyncio.to_thread(check_done_once, servers[1], job_id)


def test_what_one_server_is_told_the_other_knows(serve: Serve) -> None:
    first, second = serve(), serve()
    chat(first)
    worker = worker_process(first)
    chat(second)
    assert worker_process(second) == worker, "they have one engine worker"
    rows = [{"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions"} for n in range(3)]
    asks = [row | {"body": {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}} for row in rows]
    batch_id = second.create_batch(second.upload(asks, "batch"))
    data = b"".join(json.dumps(row).encode() + b"\n" for row in fake_rows(steps=5))
    with first.api() as one, second.api() as two:
        created = one.post(
            "/uploads",
            json={"purpose": "fine-tune", "filename": "r.jsonl", "bytes": len(data), "mime_type": "text/jsonl"},
        ).json()
        parts = [
            api.post(f"/uploads/{created['id']}/parts", files={"data": piece}).json()["id"]
            for api, piece in ((two, data[:100]), (one, data[100:]))
        ]
        file_id = two.post(f"/uploads/{created['id']}/complete", json={"part_ids": parts}).json()["file"]["id"]
        order = {"model": "tiny", "training_file": file_id}
        headers = {"Idempotency-Key": "only-once"}
        jobs = [api.post("/fine_tuning/jobs", json=order, headers=headers).json()["id"] for api in (one, two, one)]
        assert len(set(jobs)) == 1
    job = second.wait(jobs[0])
    assert job["status"] == "succeeded", job
    for server in (second, first):
        assert chat(server, job["fine_tuned_model"])["usage"]["completion_tokens"] == 3
        assert job_events(server, jobs[0]) == job_events(first, jobs[0])
    deadline = time.monotonic() + 60
    with first.api() as api:
        while (batch := api.get(f"/batches/{batch_id}").json())["status"] != "completed":
            assert time.monotonic() < deadline, batch
            time.sleep(0.1)
        assert batch["request_counts"] == {"total": 3, "completed": 3, "failed": 0}
    with first.api("/api/v1") as api:
        usage = ledger(api)
        while any(row["status"] == "running" for row in usage):  # the end of each is written a moment later
            assert time.monotonic() < deadline, usage
            time.sleep(0.1)
            usage = ledger(api)
    assert len(usage) == 4 + 3 and {row["status"] for row in usage} == {"ok"}


def test_a_server_that_is_killed_leaves_its_work_to_the_other(serve: Serve) -> None:
    """The lease of a dead server ends by itself, and its trainer goes on meanwhile."""
    first, second = serve(), serve()
    job_id = first.create_job(first.upload(fake_rows(steps=60, sleep_s=0.1)))
    step_of(second, job_id, 3)
    process = trainer_of(first, job_id)
    first.kill()
    killed = time.monotonic()
    known = max(e["data"]["step"] for e in job_events(second, job_id) if e["type"] == "metrics")
    step_of(second, job_id, known + 1)
    took = time.monotonic() - killed
    print(f"taken over after {took:.1f} s")
    assert took < TAKEOVER_S
    assert trainer_of(second, job_id) == process
    check_done_once(second, job_id)
    first.start()
    assert chat(first)["usage"]["completion_tokens"] == 3


def test_instances_take_calls_through_both_and_outlive_the_server_that_keeps_them(serve: Serve) -> None:
    first, second = serve(), serve()
    made = deploy(first, "tiny", replicas=2, name="pair")
    kept = processes(first, made["id"])
    for server in (first, second):
        assert chat(server, "pair")["usage"]["completion_tokens"] == 3
    os.kill(next(iter(kept.values())).pid, signal.SIGKILL)
    for _ in range(5):
        chat(second, "pair")  # those of the dead one are begun again by the other
    wait_for(second, made["id"], lambda found: sum(replica["restarts"] for replica in found["replicas"]) == 1)
    wait_for(second, made["id"], lambda found: found["status"] == "ready")
    kept = processes(first, made["id"])

    async def stream() -> str:
        async with httpx.AsyncClient(base_url=second.address, trust_env=False, timeout=60) as client:
            body = {"model": "pair", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 400}
            headers = {"Authorization": f"Bearer {second.key}"}
            answer = await client.post("/v1/chat/completions", json=body, headers=headers)
        return answer.text

    async def scale() -> list[str]:
        """Fewer replicas while both have calls of the server that only follows."""
        under_way = [asyncio.ensure_future(stream()) for _ in range(6)]
        await asyncio.sleep(0.5)
        with first.api("/api/v1") as api:
            api.patch(f"/deployments/{made['id']}", json={"replicas": 1}).raise_for_status()
        return await asyncio.gather(*under_way)

    answers = asyncio.run(scale())
    assert all('"finish_reason":"length"' in answer for answer in answers), answers
    wait_for(second, made["id"], lambda found: len(found["replicas"]) == 1)
    assert first.stop() == 0
    assert chat(second, "pair")["usage"]["completion_tokens"] == 3
    ((number, process),) = processes(second, made["id"]).items()
    assert kept[number] == process
    os.kill(process.pid, signal.SIGKILL)
    wait_for(second, made["id"], lambda found: found["replicas"][0]["restarts"] > 0)
    wait_for(second, made["id"], lambda found: found["status"] == "ready")
    assert chat(second, "pair")["usage"]["completion_tokens"] == 3
    assert events(second, made["id"]).count("ready") == 1
    assert second.stop() == 0
    assert not processes(second, made["id"]) or not LocalRunner().find("tests.fake_worker", second.home / "workers")


def test_who_would_not_see_the_others_is_kept_out(serve: Serve, tmp_path: Path, postgres: str) -> None:
    first = serve()
    with pytest.raises(RuntimeError, match=r"exit code 78.*another TUNEWRIGHT_DATABASE_URL"):
        serve(TUNEWRIGHT_DATABASE_URL=f"{postgres}&application_name=x")
    other = serve("other", start=False)
    with pytest.raises(RuntimeError, match=r"exit code 78.*master\.key"):
        other.start()
    (other.home / "master.key").write_bytes((first.home / "master.key").read_bytes())
    with pytest.raises(RuntimeError, match=r"exit code 78(.|\n)*another home"):
        other.start()
    first.stop()
    other.start()
