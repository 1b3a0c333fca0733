"""A worker process for tests and benchmarks, and a minimal client that speaks its protocol."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from tunewright.deployments.ports import (
    Done,
    EngineReply,
    EngineRequest,
    Generate,
    Health,
    State,
    TokenText,
    Trouble,
    WorkerProcess,
    WorkerSpec,
    decode_reply,
    encode_line,
)
from tunewright.files_on_disk import sha256_of
from tunewright.rendering.renderer import Renderer
from tunewright.worker_environment import LARGE_PAGES, VLLM

SECRET = "s" * 64


def worker_spec(base: Path, **changes: Any) -> WorkerSpec:
    """A spec for `base` as the server would write it."""
    values: dict[str, Any] = {
        "worker_id": "w1",
        "base_code": "tiny",
        "base_path": str(base),
        "base_files": {p.name: sha256_of(p) for p in base.iterdir() if p.suffix in {".json", ".safetensors"}},
        "renderer_hash": Renderer(base).hash,
        "secret": SECRET,
        "threads": 1,
        "slots": 4,
        "queue": 16,
        "adapters": 2,
        "context_tokens": 256,
        "idle_exit_s": 60.0,
    }
    return WorkerSpec(**(values | changes))


class WorkerRun:
    """A worker process; `start` returns when it can answer."""

    def __init__(self, folder: Path, spec: WorkerSpec) -> None:
        self.folder = folder
        self.spec = spec
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "spec.json").write_bytes(msgspec.json.encode(spec))
        self.port = 0
        self.start_s = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, limit_s: float = 60.0, **environment: str) -> "WorkerRun":
        began = time.monotonic()
        with (self.folder / "log.txt").open("ab") as log:
            command = [sys.executable, "-P", "-m", "tunewright.engines.worker", str(self.folder)]
            values = {**os.environ, **LARGE_PAGES, **VLLM, **environment}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=values, start_new_session=True)
        while not (self.folder / "worker.json").exists():
            if self.process.poll() is not None or time.monotonic() - began > limit_s:
                self.kill()
                raise RuntimeError(f"exit code {self.process.returncode}: {self.log()}")
            time.sleep(0.02)
        self.start_s = time.monotonic() - began
        self.port = msgspec.json.decode((self.folder / "worker.json").read_bytes(), type=WorkerProcess).port
        return self

    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    def terminate(self, limit_s: float = 60.0) -> int:
        """SIGTERM; returns the exit code."""
        if self.process is None:
            raise RuntimeError("not started")
        self.process.terminate()
        return self.process.wait(limit_s)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()


async def exchange(port: int, request: EngineRequest) -> AsyncIterator[EngineReply]:
    """Send one request; yields replies until the worker closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(encode_line(request) + b"\n")
        while line := await reader.readline():
            yield decode_reply(line)
    finally:
        writer.close()
        await writer.wait_closed()


async def one(port: int, request: EngineRequest) -> EngineReply:
    """The only reply to a request."""
    replies = [reply async for reply in exchange(port, request)]
    if len(replies) != 1:
        raise RuntimeError(f"{len(replies)} replies")
    return replies[0]


async def generate(port: int, **values: Any) -> tuple[str, Done]:
    """The whole answer. Raises RuntimeError on a Trouble."""
    text, done = "", None
    async for reply in exchange(port, generate_request(**values)):
        if isinstance(reply, Trouble):
            raise RuntimeError(reply.code)
        if isinstance(reply, TokenText):
            text += reply.text
        if isinstance(reply, Done):
            done = reply
    if done is None:
        raise RuntimeError("the connection closed early")
    return text, done


def generate_request(**values: Any) -> Generate:
    """A greedy request with the test secret."""
    return Generate(**({"secret": SECRET, "request_id": "r", "temperature": 0.0, "max_tokens": 16} | values))


async def health(port: int) -> State:
    reply = await one(port, Health(secret=SECRET))
    if not isinstance(reply, State):
        raise RuntimeError(repr(reply))
    return reply
