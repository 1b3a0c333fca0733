"""The worker process over its socket: what the gateway relies on, and what a stranger on the machine gets."""

import asyncio
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from safetensors.torch import load_file, save_file

from tests.engines.adapters import Reference, make_adapter, request_values
from tests.engines.engine_worker import (
    SECRET,
    WorkerRun,
    exchange,
    generate,
    generate_request,
    health,
    one,
    worker_spec,
)
from tests.tiny_models import tiny_llama
from tunewright.deployments.ports import (
    Done,
    Health,
    Proof,
    Prove,
    State,
    TokenText,
    Trouble,
    Unload,
    WorkerProcess,
    decode_reply,
    encode_line,
)
from tunewright.deployments.worker_client import WorkerClient
from tunewright.deployments.workers import base_spec
from tunewright.models.records import Base, Source
from tunewright.models.whole_models import seal
from tunewright.rendering.renderer import Renderer
from tunewright.settings import Settings


@pytest.fixture(scope="module")
def worker(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerRun]:
    run = WorkerRun(tmp_path_factory.mktemp("worker"), worker_spec(tiny_base, context_tokens=2000)).start()
    yield run
    run.kill()


def solo(base: Path, reference: Reference, path: Path | None, prompt: list[int], n: int) -> str:
    return Renderer(base).decode(reference.greedy(path, prompt, n, frozenset()))


def test_it_says_who_it_is(worker: WorkerRun) -> None:
    process = msgspec.json.decode((worker.folder / "worker.json").read_bytes(), type=WorkerProcess)
    assert worker.process is not None
    assert process.pid == worker.process.pid
    assert process.worker_id == "w1"
    boot_ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    assert process.start_ticks == int(boot_ticks)
    assert (worker.folder / "worker.json").stat().st_mode & 0o077 == 0
    connections = psutil.Process(process.pid).net_connections(kind="tcp")
    listening = [c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN]
    assert listening == ["127.0.0.1"]


async def test_health(worker: WorkerRun) -> None:
    state = await health(worker.port)
    assert (state.worker_id, state.base_code, state.slots) == ("w1", "tiny", 4)
    assert (state.precision, state.threads) == ("float32", 1)


async def test_base_and_adapters_answer_together(
    worker: WorkerRun, tiny_base: Path, adapters: list[Path], reference: Reference
) -> None:
    """Eight at once, base and three adapters, on four slots and two adapter places."""
    paths: list[Path | None] = [None, *adapters] * 2
    prompts = [[10 + i, 3 + i, 100] for i in range(8)]
    answers = await asyncio.gather(
        *(
            generate(worker.port, prompt_ids=prompt, max_tokens=12, **request_values(path))
            for prompt, path in zip(prompts, paths, strict=True)
        )
    )
    for (text, done), prompt, path in zip(answers, prompts, paths, strict=True):
        assert text == solo(tiny_base, reference, path, prompt, 12)
        assert (done.reason, done.prompt_tokens, done.completion_tokens) == ("length", 3, 12)
    assert len({text for text, _ in answers}) > 4


async def test_tokens_come_one_by_one(worker: WorkerRun) -> None:
    replies = [reply async for reply in exchange(worker.port, generate_request(prompt_ids=[4, 5], max_tokens=40))]
    counts = [reply.n_tokens for reply in replies if isinstance(reply, TokenText)]
    assert isinstance(replies[-1], Done)
    assert counts == sorted(set(counts))
    assert len(counts) > 5


def test_strangers_learn_nothing(worker: WorkerRun) -> None:
    lines = [
        encode_line(Health(secret="wrong")),
        b'{"type":"health","secret":"\xc3\x9f"}',
        b'{"type":"health"}',
        b'{"type":"health","secret":null}',
        b"GET / HTTP/1.1",
        b"",
        b"\xff\x00\xfe",
        b"[" * 100_000,
        b"x" * (17 * 2**20),
    ]  # fmt: skip
    for line in lines:
        with socket.create_connection(("127.0.0.1", worker.port), timeout=10) as connection:
            try:
                connection.sendall(line + b"\n")
                assert connection.recv(10) == b""
            except ConnectionError:
                pass  # the worker closed before it had read all of a line over its limit
    assert isinstance(asyncio.run(one(worker.port, Health(secret=SECRET))), State)


@pytest.mark.parametrize(
    "request_values",
    [
        {"type": "nothing"},
        {"type": "generate", "request_id": "r", "prompt_ids": "abc", "max_tokens": 1},
        {"type": "generate", "request_id": "r", "prompt_ids": [1.5], "max_tokens": 1},
        {"type": "generate"},
    ],
)
def test_requests_that_do_not_parse(worker: WorkerRun, request_values: dict[str, Any]) -> None:
    with socket.create_connection(("127.0.0.1", worker.port), timeout=10) as connection:
        connection.sendall(json.dumps(request_values | {"secret": SECRET}).encode() + b"\n")
        reply = decode_reply(connection.makefile("rb").readline())
    assert isinstance(reply, Trouble)
    assert reply.code == "invalid_engine_request"


@pytest.mark.parametrize("abort", [False, True], ids=["FIN", "RST"])
async def test_leaving_frees_the_slot(worker: WorkerRun, abort: bool) -> None:
    request = generate_request(prompt_ids=[6, 7], max_tokens=1900)
    connections = []
    for _ in range(4):
        reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
        writer.write(encode_line(request) + b"\n")
        assert isinstance(decode_reply(await reader.readline()), TokenText)
        connections.append(writer)
    assert (await health(worker.port)).active == 4
    left = time.monotonic()
    for writer in connections:
        if abort:
            writer.transport.abort()
        else:
            writer.close()
    while (await health(worker.port)).active:
        assert time.monotonic() - left < 2
        await asyncio.sleep(0.01)


async def test_a_slow_reader_gets_everything_and_holds_nobody_up(
    worker: WorkerRun, tiny_base: Path, reference: Reference
) -> None:
    """It reads nothing until others are done; what piled up for it is joined into few lines."""
    reader, writer = await asyncio.open_connection("127.0.0.1", worker.port, limit=4096)
    writer.write(encode_line(generate_request(prompt_ids=[8, 9], max_tokens=30)) + b"\n")
    await generate(worker.port, prompt_ids=[1, 2], max_tokens=60)
    lines = (await reader.read()).splitlines()
    writer.close()
    replies = [decode_reply(line) for line in lines]
    text = "".join(reply.text for reply in replies if isinstance(reply, TokenText))
    assert isinstance(replies[-1], Done)
    assert text == solo(tiny_base, reference, None, [8, 9], 30)


async def test_probabilities_that_pile_up_for_a_slow_reader_all_come(worker: WorkerRun) -> None:
    """Twenty alternatives at each place make a kilobyte: joined without end, lines would be longer than the gateway reads."""
    request = generate_request(prompt_ids=[8, 9], max_tokens=700, top_logprobs=20)
    scores = 0
    async for reply in WorkerClient(worker.port, SECRET).generate(request):
        if isinstance(reply, TokenText):
            if not scores:
                while (await health(worker.port)).active:
                    await asyncio.sleep(0.05)
            scores += len(reply.scores)
    assert scores == 700


def prove_request(path: Path) -> Prove:
    return Prove(secret=SECRET, prompts=[[5, 6, 7], [8, 9]], **request_values(path))


async def test_proofs(worker: WorkerRun, tiny_base: Path, adapters: list[Path], tmp_path: Path) -> None:
    proof = await one(worker.port, prove_request(adapters[0]))
    assert isinstance(proof, Proof)
    assert proof.tensors == proof.tensors_applied == 28
    assert proof.max_logit_shift > 0.01

    nothing = make_adapter(tiny_base, tmp_path / "nothing", seed=9, strength=0)
    trouble = await one(worker.port, prove_request(nothing))
    assert isinstance(trouble, Trouble)
    assert (trouble.kind, trouble.code) == ("invalid_request", "no_effect")

    renamed = make_adapter(tiny_base, tmp_path / "renamed", seed=9)
    tensors = load_file(renamed / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name.replace("base_model.model.", "base_model.")] = tensors.pop(name)
    save_file(tensors, renamed / "adapter_model.safetensors")
    trouble = await one(worker.port, prove_request(renamed))
    assert isinstance(trouble, Trouble)
    assert (trouble.kind, trouble.code) == ("invalid_request", "adapter_invalid")
    assert name.replace("base_model.model.", "base_model.") in str(trouble.values["problems"])


async def test_unload(worker: WorkerRun, adapters: list[Path]) -> None:
    await generate(worker.port, prompt_ids=[1], **request_values(adapters[1]))
    assert "middle" in (await health(worker.port)).adapters
    assert isinstance(await one(worker.port, Unload(secret=SECRET, adapter_id="middle")), State)
    assert "middle" not in (await health(worker.port)).adapters


def fails_with(folder: Path, tiny_base: Path, **changes: Any) -> str:
    """Start a worker that must not start; returns its log."""
    run = WorkerRun(folder, worker_spec(tiny_base, **changes))
    done = subprocess.run(
        [sys.executable, "-m", "tunewright.engines.worker", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 78
    assert not (run.folder / "worker.json").exists()
    return done.stderr


def test_a_changed_base_is_not_served(tiny_base: Path, tmp_path: Path) -> None:
    files = worker_spec(tiny_base).base_files | {"model.safetensors": "0" * 64}
    assert "base_changed" in fails_with(tmp_path, tiny_base, base_files=files)


def test_another_renderer_is_not_served(tiny_base: Path, tmp_path: Path) -> None:
    assert "renderer_changed" in fails_with(tmp_path, tiny_base, renderer_hash="0" * 64)


@pytest.fixture
def own_weights(tmp_path: Path, tiny_base: Path) -> dict[str, Any]:
    """The fields of a spec that serves a model of its own weights."""
    model = tiny_llama(tmp_path / "model", seed=5)
    return {"weights_path": str(model), "weights_sha256": seal(model, tiny_base, "tiny")}


async def test_weights_of_its_own_are_served(
    own_weights: dict[str, Any], adapters: list[Path], tiny_base: Path, tmp_path: Path
) -> None:
    """They answer as transformers does with that folder, and take no adapters of the base."""
    run = WorkerRun(tmp_path / "worker", worker_spec(tiny_base, **own_weights)).start()
    try:
        text, _ = await generate(run.port, prompt_ids=[5, 6, 7], max_tokens=12)
        assert text == solo(tiny_base, Reference(Path(own_weights["weights_path"])), None, [5, 6, 7], 12)
        assert text != solo(tiny_base, Reference(tiny_base), None, [5, 6, 7], 12)
        with pytest.raises(RuntimeError, match="adapter_invalid"):
            await generate(run.port, prompt_ids=[5], **request_values(adapters[0]))
    finally:
        run.kill()


@pytest.mark.parametrize("fault", ["flip", "unsealed", "renderer"])
def test_changed_weights_of_its_own_are_not_served(
    fault: str, own_weights: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    if fault == "flip":
        weights = Path(own_weights["weights_path"]) / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif fault == "unsealed":
        own_weights["weights_sha256"] = None
    else:
        own_weights["renderer_hash"] = "0" * 64
    code = "renderer_changed" if fault == "renderer" else "model_files_changed"
    assert code in fails_with(tmp_path / "worker", tiny_base, **own_weights)


def test_the_server_asks_for_the_engine_of_its_settings(tiny_base: Path, tmp_path: Path) -> None:
    base = Base(code="tiny", name="T", source=Source(kind="folder"), licence="x", context_tokens=99, path=tiny_base)
    ours = base_spec(base, Settings(home=tmp_path), "w")
    assert (ours.engine, ours.python, ours.store_path) == ("torch", None, str(tmp_path / "adapters"))
    other = base_spec(base, Settings(home=tmp_path, engine="vllm", vllm_python=Path("/opt/vllm/bin/python")), "w")
    assert (other.engine, other.python) == ("vllm", "/opt/vllm/bin/python")


def test_without_vllm_its_engine_does_not_start(tiny_base: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    assert "vllm_missing" in fails_with(tmp_path, tiny_base, engine="vllm")


def test_vllm_runs_in_its_own_environment_as_the_same_process(tiny_base: Path, tmp_path: Path) -> None:
    """The worker goes on under the other interpreter, with the number and the arguments by which a server finds it again."""
    other = tmp_path / "bin" / "python"
    other.parent.mkdir()
    other.write_text(f"#!{sys.executable}\nimport os, sys\nprint(os.getpid(), *sys.argv[1:], flush=True)\n")
    other.chmod(0o700)
    run = WorkerRun(tmp_path / "worker", worker_spec(tiny_base, engine="vllm", python=str(other)))
    command = [sys.executable, "-P", "-m", "tunewright.engines.worker", str(run.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        said, _ = process.communicate(timeout=60)
    assert said.split() == [str(process.pid), *command[1:]]


def test_sigterm_ends_it_at_once_even_while_it_answers(tiny_base: Path, tmp_path: Path) -> None:
    run = WorkerRun(tmp_path, worker_spec(tiny_base, context_tokens=2000)).start()
    with socket.create_connection(("127.0.0.1", run.port), timeout=10) as connection:
        connection.sendall(encode_line(generate_request(prompt_ids=[1], max_tokens=1900)) + b"\n")
        lines = connection.makefile("rb")
        assert isinstance(decode_reply(lines.readline()), TokenText)
        assert run.terminate() == 0
        said = [decode_reply(line) for line in lines.read().split(b"\n")[:-1]]
        assert not any(isinstance(reply, Done) for reply in said), "it did not wait for the end of the answer"


def test_kill_9_leaves_nothing(tiny_base: Path, tmp_path: Path) -> None:
    run = WorkerRun(tmp_path, worker_spec(tiny_base)).start()
    assert run.process is not None
    group = run.process.pid
    run.kill()
    left = [p.pid for p in psutil.process_iter() if _group(p.pid) == group]
    assert left == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "spec.json", "worker.json"]


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def test_an_orphan_serves_on_and_goes_when_nobody_comes(tiny_base: Path, tmp_path: Path) -> None:
    """Its parent ends at once: it must serve whoever finds it, and exit when idle for long enough."""
    WorkerRun(tmp_path, worker_spec(tiny_base, idle_exit_s=3.0))
    parent = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-m', 'tunewright.engines.worker', sys.argv[1]])"
    )
    with (tmp_path / "log.txt").open("wb") as log:
        # The parent waits until the worker has looked at who its parent is.
        code = parent + "; import os, time\nwhile not os.path.exists(sys.argv[1] + '/worker.json'): time.sleep(0.02)"
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], stderr=log, stdout=log, check=True, timeout=60)
    process = msgspec.json.decode((tmp_path / "worker.json").read_bytes(), type=WorkerProcess)
    worker = psutil.Process(process.pid)
    for _ in range(5):
        time.sleep(0.8)
        assert isinstance(asyncio.run(one(process.port, Health(secret=SECRET))), State)
    idle = time.monotonic()
    psutil.wait_procs([worker], timeout=60)
    assert not worker.is_running()
    assert 2 < time.monotonic() - idle < 6
