"""The application behind a real socket, and raw requests to it."""

import asyncio
import json
import socket
from typing import Any

import uvicorn

from tests.api.world import World
from tunewright.api.connections import BoundedHttp

CRLF = b"\r\n"


class Running:
    """A uvicorn on a free port, in this loop, without the lifespan (no control loop is wanted here)."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        config = uvicorn.Config(
            world.app,
            http=BoundedHttp,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=1,
        )
        self.server = uvicorn.Server(config)
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.task = asyncio.ensure_future(self.server._serve(sockets=[self.listener]))  # no signal handlers
        while not self.server.started:
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self.server.should_exit = True
        if self.task is not None:
            await self.task

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    def head(self, method: str, path: str, *headers: str) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {self.world.key}", *headers]
        return "\r\n".join([*lines, "", ""]).encode()

    def chat(self, word: str, **fields: Any) -> bytes:
        body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": word}], **fields}).encode()
        head = self.head(
            "POST", "/v1/chat/completions", "Content-Type: application/json", f"Content-Length: {len(body)}"
        )
        return head + body


async def exchange(running: Running, raw: bytes) -> tuple[int, bytes]:
    """Send and read one answer with a Content-Length."""
    reader, writer = await running.connect()
    try:
        writer.write(raw)
        return await answer_of(reader)
    finally:
        writer.close()


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await asyncio.wait_for(reader.readuntil(CRLF * 2), 30)
    length = next((int(line[15:]) for line in head.lower().split(CRLF) if line.startswith(b"content-length:")), 0)
    return int(head.split()[1]), await reader.readexactly(length)


async def until(condition: Any, limit_s: float = 30.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.01)
