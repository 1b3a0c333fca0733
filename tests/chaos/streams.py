"""Many streamed answers at once, and how each of them ended."""

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Awaitable, Callable

import httpx

from tests.live_server import LiveServer

_seeds = itertools.count()
LONG = {"temperature": 0, "max_tokens": 1900}
"""A random model goes round in circles if it is greedy, so this answer ends at its length: seconds, if many want it."""


class Streams:
    """`n` streams of one answer each, no two requests alike: those that go down with an engine twice are quarantined. `ends`
    counts how they ended: "done" with its last frame, "error" with an error frame,
    "broken" when the connection went before the body's end, and "cut", which must never be: a clean end without either."""

    def __init__(self, server: LiveServer, n: int, max_tokens: int = 1900, model: str = "tiny") -> None:
        self._server = server
        self._n = n
        self._body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": True, **LONG}
        self._body["max_tokens"] = max_tokens
        self.begun = 0
        self.ends: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()

    def run(self, meanwhile: Callable[[], Awaitable[None]]) -> None:
        """Open all, call `meanwhile` as soon as each has its first frame, and wait for the end of all."""
        asyncio.run(self._run(meanwhile))

    async def _run(self, meanwhile: Callable[[], Awaitable[None]]) -> None:
        headers = {"Authorization": f"Bearer {self._server.key}"}
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(headers=headers, timeout=60, trust_env=False, limits=limits) as client:
            streams = [asyncio.ensure_future(self._one(client)) for _ in range(self._n)]
            async with asyncio.timeout(60):
                while self.begun < self._n:
                    await asyncio.sleep(0.01)
            await meanwhile()
            async with asyncio.timeout(90):
                await asyncio.gather(*streams)

    async def _one(self, client: httpx.AsyncClient) -> None:
        end, first, body = "cut", True, self._body | {"seed": next(_seeds)}
        try:
            async with client.stream("POST", f"{self._server.address}/v1/chat/completions", json=body) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    self.begun += first
                    first = False
                    if line == "data: [DONE]":
                        end = "done"
                    elif line.startswith('data: {"error"'):
                        end = "error"
                        self.codes[json.loads(line[6:])["error"]["code"]] += 1
        except httpx.TransportError:
            end = "broken"
        self.ends[end] += 1
