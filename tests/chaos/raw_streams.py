"""Chat requests over plain sockets: many at once cost the client little, and how each connection ends is its own to say."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

from tests.live_server import LiveServer


def request_bytes(server: LiveServer, **fields: Any) -> bytes:
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields})
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {server.host}\r\nAuthorization: Bearer {server.key}\r\n"
        f"Connection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


async def open_request(
    server: LiveServer, *, receive_buffer: int = 0, **fields: Any
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which the request has been sent. With a `receive_buffer` the kernel takes little for a slow reader."""
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (server.host, server.port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=receive_buffer or 2**16)
    writer.write(request_bytes(server, **fields))
    return reader, writer


async def words(reader: asyncio.StreamReader) -> AsyncIterator[tuple[str, float]]:
    """(text, when it came) of each event of a stream. Raises RuntimeError unless it ends with `[DONE]`."""
    async for line in reader:
        if line.startswith(b'data: {"error"'):
            raise RuntimeError(line.decode())
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:])["choices"]
            if choices:
                yield choices[0]["delta"].get("content", ""), time.perf_counter()
        elif line == b"data: [DONE]\n":
            return
    raise RuntimeError("the stream was cut")


async def answer_of(server: LiveServer, **fields: Any) -> tuple[int, bytes, float]:
    """Status, the whole of the answer with its headers, and the seconds it took."""
    began = time.perf_counter()
    reader, writer = await open_request(server, **fields)
    try:
        answer = await reader.read()
    finally:
        writer.close()
    return int(answer.split(maxsplit=2)[1]), answer, time.perf_counter() - began


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]
