"""The real services on a temporary home, two projects, and a stand-in for the engine."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from tunewright.accounts.records import Caller
from tunewright.api.app import create_app
from tunewright.completions.vocabulary import (
    ChatRequest,
    Choice,
    Completion,
    Delta,
    Finish,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from tunewright.errors import NotFound, Unavailable
from tunewright.settings import Settings
from tunewright.wiring import Platform, build

PREFIXES = ("/api/paas/v4", "/v1")
ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
USAGE = Usage(prompt_tokens=5, completion_tokens=2)


class FakeCompletions:
    """Answers by script: the last user message names one. `closed` counts streams that were ended from outside or inside."""

    def __init__(self) -> None:
        self.requests: list[ChatRequest] = []
        self.open = 0
        self.closed = 0

    async def stream(self, caller: Caller, request: ChatRequest) -> AsyncGenerator[Delta, None]:
        self.requests.append(request)
        self.open += 1
        try:
            async for delta in _script(request):
                yield delta
        finally:
            self.open -= 1
            self.closed += 1

    async def complete(self, caller: Caller, request: ChatRequest) -> Completion:
        text, calls = "", []
        async for delta in self.stream(caller, request):
            if isinstance(delta, TextDelta):
                text += delta.text
            elif isinstance(delta, ToolCallDelta):
                calls.append({"id": delta.id, "name": delta.name, "arguments": delta.arguments})
        reason = "tool_calls" if calls else "stop"
        choice = Choice(text=text, tool_calls=tuple(calls), reason=reason)
        return Completion(choices=(choice,) * request.n, usage=USAGE)


async def _script(request: ChatRequest) -> AsyncGenerator[Delta, None]:
    word = request.conversation.messages[-1].content or ""
    if request.model == "nowhere":
        raise NotFound("model_not_found", 'The model "{model}" does not exist or is not yours to use.', model="nowhere")
    if word == "bug":
        raise RuntimeError("secret path /home/x at 0x7f00")
    if word == "wait":
        await asyncio.sleep(60)
    if word == "think":
        yield ReasoningDelta(text="hm")
    if word == "call":
        yield ToolCallDelta(index=0, id="call_1", name="f", arguments='{"a"')
        yield ToolCallDelta(index=0, arguments=": 1}")
        yield Finish(reason="tool_calls", usage=USAGE)
        return
    yield TextDelta(text="Hel")
    if word == "break":
        raise Unavailable("engine_lost", "The engine stopped while it answered; try again.")
    if word == "late bug":
        raise RuntimeError("secret path /home/x at 0x7f00")
    if word == "unfinished":
        return
    if word == "endless":
        while True:
            await asyncio.sleep(0.01)
            yield TextDelta(text="x" * 100)
    if word == "pause":
        await asyncio.sleep(60)
    yield TextDelta(text="lo 你\u2028")
    yield Finish(reason="stop", usage=USAGE)


class World:
    """`key` and `other_key` belong to two projects."""

    def __init__(self, home: Path, base: Path | None = None, **settings: Any) -> None:
        unlimited = {"max_requests_per_minute": 0, "max_refused_keys_per_minute": 0}
        self.settings = Settings(
            home=home, **{"min_free_disk_bytes": 1, "max_file_bytes": 2**20, **unlimited, **settings}
        )
        self.platform: Platform = build(self.settings)
        self.platform.prepare()
        self.completions = FakeCompletions()
        self.platform.completions = self.completions  # type: ignore[assignment]
        if base is not None:
            self.platform.catalogue.add(base, "tiny")
        self.key = self.platform.first_key or ""
        self.project_id = self.platform.accounts.authenticate(f"Bearer {self.key}").project_id
        other = self.platform.accounts.create_project("other")
        self.other_key = self.platform.accounts.create_key("other", other.id)
        self.app: FastAPI = create_app(self.platform)

    def client(self, key: str | None = "", **headers: str) -> httpx.AsyncClient:
        """In-process; `key` None sends none."""
        if key is not None:
            headers = {"Authorization": f"Bearer {key or self.key}", **headers}
        transport = httpx.ASGITransport(self.app)
        return httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers)

    async def upload(self, client: httpx.AsyncClient, prefix: str = "/v1", **options: Any) -> dict[str, Any]:
        """A good training file."""
        content = json.dumps(ROW) + "\n"
        answer = await client.post(
            f"{prefix}/files",
            data={"purpose": "fine-tune"},
            files={"file": ("rows.jsonl", content.encode())},
            **options,
        )
        assert answer.status_code == 200, answer.text
        return answer.json()
