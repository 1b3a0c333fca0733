"""Engine workers that die, freeze, outlive their server, or are merely busy."""

import asyncio
import json
import os
import random
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from tests.chaos.streams import Streams
from tests.live_server import LiveServer, chat_rows
from tests.open_files import open_files
from tests.promises.test_pool import chat, worker_process, worker_state
from tests.tiny_models import tiny_tokenizer
from tunewright.clock import mono_s
from tunewright.deployments.pool import Pool
from tunewright.deployments.ports import (
    Done,
    Generate,
    Health,
    State,
    WorkerProcess,
    WorkerSpec,
    decode_request,
    encode_line,
)
from tunewright.errors import Unavailable
from tunewright.models.records import Base, Source, TunedModel
from tunewright.runners.local import LocalRunner
from tunewright.settings import HomeFolder, Settings

SILENCE_LIMIT_S = 2.0
IDLE_EXIT_S = 30.0
"""Longer than a server takes to start and to be asked."""


def lives(process: WorkerProcess) -> bool:
    return LocalRunner().alive(process.pid, process.start_ticks)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[LiveServer]:
    server = LiveServer(
        tmp_path_factory.mktemp("engines") / "home",
        TUNEWRIGHT_ENGINE_SILENCE_LIMIT_S=str(SILENCE_LIMIT_S),
        TUNEWRIGHT_ENGINE_IDLE_EXIT_S=str(IDLE_EXIT_S),
    )
    server.add_base(tiny_base)
    server.start()
    yield server
    server.stop()


def test_r22_a_frozen_worker_is_replaced(server: LiveServer) -> None:
    """What it had begun ends with an error, what it had not is answered by its successor."""
    chat(server, "tiny", "hi")
    frozen = worker_process(server)
    streams = Streams(server, 5)
    late: list[dict[str, Any]] = []
    began: list[float] = []

    async def freeze() -> None:
        os.kill(frozen.pid, signal.SIGSTOP)
        began.append(time.monotonic())
        late.append(await asyncio.to_thread(chat, server, "tiny", "hi"))

    streams.run(freeze)
    assert streams.ends == {"error": 5} and streams.codes == {"engine_lost": 5}
    assert late[0]["usage"]["completion_tokens"] > 0
    assert not lives(frozen) and worker_process(server).pid != frozen.pid


def test_r06_a_worker_that_outlived_its_server_is_kept_while_a_server_uses_it(server: LiveServer) -> None:
    chat(server, "tiny", "hi")
    worker = worker_process(server)
    server.kill()
    server.start()
    chat(server, "tiny", "hi")
    assert worker_process(server) == worker, "adopted, not started anew"
    time.sleep(IDLE_EXIT_S + 1.5)
    assert lives(worker), "it ended itself although a server uses it"
    server.kill()
    deadline = time.monotonic() + IDLE_EXIT_S + 5
    while lives(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not lives(worker), "an orphan whom nobody asks ends itself"
    server.start()


def test_a_deleted_model_leaves_the_worker(server: LiveServer) -> None:
    names = []
    for _ in range(2):
        job_id = server.create_job(server.upload(chat_rows(4)), hyperparameters={"n_epochs": 1})
        names.append(server.wait(job_id)["fine_tuned_model"])
    assert len(worker_state(server).adapters) == 2
    with server.api() as api:
        api.delete(f"/models/{names[0]}").raise_for_status()
        deadline = time.monotonic() + 60
        while len(worker_state(server).adapters) == 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(worker_state(server).adapters) == 1
        worker = worker_process(server)
        os.kill(worker.pid, signal.SIGSTOP)
        began = time.monotonic()
        assert api.delete(f"/models/{names[1]}").json()["deleted"] is True
        assert time.monotonic() - began < 1
        assert lives(worker), "a deletion waits for no engine: this one would be given up first"
    left = [path for path in (server.home / "adapters").rglob("*") if path.name != "checkpoints"]
    assert left == [], "a model's checkpoints go with it"


def test_r21_an_engine_that_can_not_start_is_a_quick_503_and_heals(
    server: LiveServer, tiny_base: Path, tmp_path: Path
) -> None:
    brittle = shutil.copytree(tiny_base, tmp_path / "brittle")
    server.run("models", "add", str(brittle), "--code", "brittle")
    weights = brittle / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"\xff")
    body = {"model": "brittle", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    with server.api() as api:
        for limit_s in (60.0, 1.0):  # the first waits for the start that fails, the second for nothing
            began = time.monotonic()
            answer = api.post("/chat/completions", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_not_ready")
            assert int(answer.headers["retry-after"]) >= 1
            assert time.monotonic() - began < limit_s
        assert server.log.read_text().count('"engine_start_failed"') == 1, "nothing was started for the second"
        weights.write_bytes(content)
        deadline = time.monotonic() + 60
        while (answer := api.post("/chat/completions", json=body)).status_code != 200:
            assert answer.json()["error"]["code"] == "engine_not_ready" and time.monotonic() < deadline
            time.sleep(int(answer.headers["retry-after"]))


@pytest.mark.parametrize("cycles", [60, pytest.param(3000, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])])
def test_r26_callers_who_leave_cost_nothing(server: LiveServer, cycles: int) -> None:
    """By FIN or RST, at once, after the request or in the middle of a stream, and without a stream too."""
    chat(server, "tiny", "hi")
    process = server._process
    assert process is not None
    gateway, worker = psutil.Process(process.pid), psutil.Process(worker_process(server).pid)
    chance = random.Random(cycles)
    before = (open_files(gateway.pid)[0], worker.num_fds())
    for n in range(cycles):
        body = json.dumps(
            {
                "model": "tiny",
                "messages": [{"role": "user", "content": "hi"}],
                "temperature": 0,
                "max_tokens": 1900,
                "stream": n % 3 > 0,
            }
        )
        head = f"Host: localhost\r\nAuthorization: Bearer {server.key}\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            request = f"POST /v1/chat/completions HTTP/1.1\r\n{head}Content-Length: {len(body)}\r\n\r\n{body}"
            connection.sendall(request.encode())
            if n % 3 == 1:
                assert connection.recv(1)
            else:
                time.sleep(chance.uniform(0, 0.02))
            if n % 2:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    left = time.monotonic()
    while (state := worker_state(server)).active or state.waiting:
        assert time.monotonic() - left < 2, state
        time.sleep(0.05)
    deadline = time.monotonic() + 5
    while (more := open_files(gateway.pid)[0] - before[0]).total() > 3 or worker.num_fds() - before[1] > 3:
        assert time.monotonic() < deadline, more
        time.sleep(0.1)
    assert chat(server, "tiny", "hi")["usage"]["completion_tokens"] > 0, "the key has its places back"


# --- the pool alone, with workers that only speak the protocol -------------------------------------------------------


class Worker:
    """A process that does nothing, and a thread that answers in its name: `Health` always (unless `mute`), `Generate` by
    closing the connection (`breaks`), not at all (`ponders`) or with an empty answer."""

    def __init__(self, home: HomeFolder, base: Base, pool: Pool) -> None:
        self.breaks = self.mute = self.ponders = False
        self._closed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        folder = home.workers / base.code
        folder.mkdir()
        self.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        ticks = LocalRunner().start_ticks(self.process.pid)
        assert ticks is not None
        known = WorkerProcess(
            pid=self.process.pid, start_ticks=ticks, port=self._listener.getsockname()[1], worker_id="w"
        )
        (folder / "worker.json").write_bytes(msgspec.json.encode(known))
        (folder / "spec.json").write_bytes(
            msgspec.json.encode(msgspec.structs.replace(pool._spec(base), secret=secrets.token_hex(4)))
        )
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with suppress(ConnectionError), connection, connection.makefile("rb") as lines:
                line = lines.readline()
                if not line:  # given up before it was asked
                    continue
                request = decode_request(line)
                if isinstance(request, Generate):
                    if self.ponders:
                        connection.recv(1)  # until the caller has had enough
                    elif not self.breaks:
                        connection.sendall(
                            encode_line(Done(reason="stop", prompt_tokens=1, completion_tokens=0)) + b"\n"
                        )
                    continue
                if self.mute:
                    self._closed.wait(60)
                    continue
                if not isinstance(request, Health):
                    raise RuntimeError(repr(request))
                state = State(worker_id="w", base_code="b", active=0, waiting=0, slots=1, adapters=[])
                connection.sendall(encode_line(state) + b"\n")

    def close(self) -> None:
        self._closed.set()
        self._listener.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def home(tmp_path: Path) -> HomeFolder:
    home = HomeFolder(tmp_path / "home")
    home.create()
    return home


@pytest.fixture
def pool(home: HomeFolder) -> Iterator[Pool]:
    pool = Pool(home, Settings(home=home.root, engine_silence_limit_s=2.0, engine_start_limit_s=60), LocalRunner())
    yield pool
    pool.stop()


def a_base(home: HomeFolder, code: str = "tiny") -> Base:
    path = home.bases / code
    tiny_tokenizer(path)
    return Base(code=code, name=code, source=Source(kind="folder"), licence="none", context_tokens=512, path=path)


def a_request() -> Generate:
    return Generate(secret="", request_id="r", prompt_ids=[1], max_tokens=1)


async def answer(pool: Pool, base: Base) -> list[Any]:
    return [reply async for reply in pool.generate(base, None, a_request())]


async def test_a_broken_connection_does_not_cost_a_worker_its_life(home: HomeFolder, pool: Pool) -> None:
    base = a_base(home)
    worker = Worker(home, base, pool)
    try:
        assert len(await answer(pool, base)) == 1
        worker.breaks = True
        with pytest.raises(Unavailable, match="engine_lost"):
            await answer(pool, base)
        assert worker.process.poll() is None
        worker.breaks = False
        assert len(await answer(pool, base)) == 1
    finally:
        worker.close()


async def test_an_answer_that_does_not_begin_in_time_is_given_up(home: HomeFolder) -> None:
    """The worker is well, so it lives; those whom nobody waits for have no such limit."""
    settings = Settings(home=home.root, engine_silence_limit_s=2.0, engine_start_limit_s=60, first_token_limit_s=1.0)
    pool = Pool(home, settings, LocalRunner())
    base = a_base(home)
    worker = Worker(home, base, pool)
    try:
        worker.ponders = True
        with pytest.raises(Unavailable, match="engine_busy"):
            await answer(pool, base)
        patient = msgspec.structs.replace(a_request(), priority=1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.0):
                async for _ in pool.generate(base, None, patient):
                    pass
        worker.ponders = False
        assert len(await answer(pool, base)) == 1
        assert worker.process.poll() is None
    finally:
        worker.close()
        pool.stop()


async def test_want_of_descriptors_does_not_cost_a_worker_its_life(
    home: HomeFolder, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = a_base(home)
    worker = Worker(home, base, pool)

    async def too_many_open_files(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    try:
        assert len(await answer(pool, base)) == 1
        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "open_connection", too_many_open_files)
            with pytest.raises(Unavailable, match="engine_busy"):
                await answer(pool, base)
            await pool._look_after_all()
        assert worker.process.poll() is None
        assert len(await answer(pool, base)) == 1
    finally:
        worker.close()


async def test_who_finds_a_worker_gone_finds_those_aboard_known(
    home: HomeFolder, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or one of them would board the next worker as if nothing had happened, and a third would die of it."""
    base = a_base(home)
    worker, told = Worker(home, base, pool), threading.Event()
    known = pool.ensure(base)
    worker.close()

    def slowly(*_: object) -> None:
        time.sleep(0.3)
        told.set()

    monkeypatch.setattr(pool._quarantine, "died", slowly)
    keeper = threading.Thread(target=lambda: asyncio.run(pool._ask(base.code, known)))
    keeper.start()
    while base.code in pool._workers:
        await asyncio.sleep(0.001)
    assert told.is_set()
    keeper.join()


def test_the_keeper_ends_a_silent_worker_and_keeps_the_others(home: HomeFolder, pool: Pool) -> None:
    bases = [a_base(home, code) for code in ("one", "two")]
    workers = [Worker(home, base, pool) for base in bases]
    try:
        for base in bases:
            pool.ensure(base)
        pool.start()
        workers[0].mute = True
        workers[0].process.wait(60)
        time.sleep(0.5)
        assert workers[1].process.poll() is None
    finally:
        for worker in workers:
            worker.close()


async def test_a_base_that_is_starting_holds_up_no_other(
    home: HomeFolder, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More callers than the event loop has threads wait for a worker that does not get ready."""
    slow, quick = a_base(home, "slow"), a_base(home, "quick")
    worker = Worker(home, quick, pool)
    stuck = threading.Event()
    monkeypatch.setattr(pool, "_start", lambda base: stuck.wait(60) and None)
    waiting = [asyncio.ensure_future(answer(pool, slow)) for _ in range(100)]
    try:
        while not any(thread.name == "start-slow" for thread in threading.enumerate()):
            await asyncio.sleep(0.01)
        assert len(await answer(pool, quick)) == 1
        assert await asyncio.to_thread(lambda: 1) == 1
        assert not any(task.done() for task in waiting)
        assert [thread.name for thread in threading.enumerate()].count("start-slow") == 1
        waiting[0].cancel()  # one who leaves takes nothing from the others
        await asyncio.sleep(0)
        assert not waiting[1].done()
    finally:
        stuck.set()
        await asyncio.gather(*waiting, return_exceptions=True)
        worker.close()


def test_forgetting_a_model_never_waits_and_never_fails(home: HomeFolder, pool: Pool) -> None:
    base = a_base(home)
    worker = Worker(home, base, pool)
    model = TunedModel(id="m", project_id="p", name="tiny:1::x", base_code="tiny", job_id="j", created_at=1)
    pool.forget(model)  # no worker
    try:
        pool.ensure(base)
        worker.mute = True
        began = mono_s()
        pool.forget(model)
        assert mono_s() - began < 0.2
    finally:
        worker.close()
    pool.forget(model)  # a worker that is gone
    for thread in threading.enumerate():
        if thread.name == "forget-m":
            thread.join(5)


def test_only_one_worker_for_a_base_even_if_the_first_was_not_ready(home: HomeFolder, tiny_base: Path) -> None:
    """A server was killed while its worker was starting: the next one must not start a second beside it."""
    runner = LocalRunner()
    settings = Settings(home=home.root, engine_threads=1, engine_precision="bfloat16", engine_weights="int8")
    base = msgspec.structs.replace(a_base(home), path=tiny_base)
    pool = Pool(home, settings, runner)
    folder = home.workers / base.code
    folder.mkdir()
    (folder / "spec.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(pool._spec(base), secret="secret")))
    first = runner.start("tunewright.engines.worker", folder, folder / "log.txt")
    worker = pool.ensure(base)
    try:
        assert worker.process.pid != first
        assert runner.find("tunewright.engines.worker", folder) == [worker.process.pid]
        spec = msgspec.json.decode((folder / "spec.json").read_bytes(), type=WorkerSpec)
        assert spec.secret != "secret"
        assert (spec.precision, spec.weights) == ("bfloat16", "int8")
        assert "int8: mean divergence" in (folder / "log.txt").read_text()
    finally:
        pool.stop()
    assert runner.find("tunewright.engines.worker", folder) == []
    assert runner.group_empty(first)
    # The main thread of a killed process is a zombie at once; it can be reaped when its other threads are gone too.
    deadline = mono_s() + 10
    while any(child.returncode is None for child in runner._children.values()) and mono_s() < deadline:
        runner.reap()
        time.sleep(0.01)
