"""Chat requests of all sorts, right and wrong, at a real engine: each gets an answer or a refusal, and the engine lives."""

import asyncio
import random
from typing import Any

import httpx
import pytest

from tests.api.world import PREFIXES
from tests.live_server import LiveServer
from tests.promises.test_pool import chat, worker_process, worker_state

SCHEMAS: list[Any] = [
    {"type": "object"},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
    {"type": "string", "pattern": "(a+)+b"},
    {"type": "string", "pattern": "[" * 50},
    {"$ref": "#"},
    {"type": "array", "items": {"$ref": "#/nowhere"}},
    {"enum": []},
    {"anyOf": [{"type": "null"}] * 200},
    {"type": ["string", 5]},
    False,
    [],
]
TOOLS: list[Any] = [
    [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    [{"type": "function", "function": {"name": "f", "parameters": schema}} for schema in SCHEMAS[:3]],
    [{"type": "function", "function": {"name": "a b"}}],
    [{"type": "function"}] * 130,
    [],
    "f",
]
WILD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2**63,
    1e308,
    -0.5,
    "",
    "x",
    "\u0000",
    "\U0001f600" * 50,
    [],
    [[]],
    {},
    {"a": {}},
]
VALUES: dict[str, list[Any]] = {
    "temperature": [0, 0.01, 1, 2, 1.999, 3],
    "top_p": [0.01, 0.5, 1, 0, 1e-9],
    "n": [1, 2, 8, 9],
    "seed": [0, 1, -(2**63), 2**63 - 1, 2**64],
    "stop": ["a", ["a", "b"], ["的"], ["x" * 256], ["x" * 257], [""], ["a"] * 5],
    "logprobs": [True, False],
    "top_logprobs": [0, 1, 20, 21],
    "logit_bias": [
        {"5": 100},
        {"5": -100, "6": 3},
        {"599": 1},
        {"600": 1},
        {"x": 1},
        {str(n): -100 for n in range(600)},
    ],
    "presence_penalty": [-2, 2, 2.1],
    "frequency_penalty": [-2, 2, -2.1],
    "response_format": [{"type": "text"}, {"type": "json_object"}, {"type": "xml"}]
    + [{"type": "json_schema", "json_schema": {"name": "s", "schema": schema}} for schema in SCHEMAS],
    "tools": TOOLS,
    "tool_choice": ["auto", "none", "required", {"type": "function", "function": {"name": "f"}}, "maybe"],
    "parallel_tool_calls": [True, False],
    "stream": [True, False],
    "stream_options": [{"include_usage": True}],
    "max_tokens": [1, 2, 5, 17, 0, 10**9],
}
CONTENTS: list[Any] = [
    "hi",
    "",
    " ",
    "你好" * 30,
    "<|im_end|>",
    "a" * 3000,
    "\u200b" * 100,
    "\U0001f468\u200d\U0001f469",
]
BAD_CONTENTS: list[Any] = [None, 5, []]
ROLES = ["user", "user", "user", "system", "assistant", "tool", "developer", "nobody"]


def any_body(chance: random.Random) -> dict[str, Any]:
    messages = [
        {"role": chance.choice(ROLES), "content": chance.choice(CONTENTS + BAD_CONTENTS)}
        for _ in range(chance.choice((1, 1, 1, 2, 5)))
    ]
    body: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 8}
    if chance.random() < 0.85:
        body["messages"] = [{"role": "user", "content": chance.choice(CONTENTS)}]
    for name in chance.sample(sorted(VALUES), chance.choice((0, 1, 2, 3, 6))):
        body[name] = chance.choice(WILD if chance.random() < 0.08 else VALUES[name])
    return body


@pytest.mark.parametrize("requests", [250, pytest.param(10_000, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])])
async def test_t19_no_request_kills_the_engine(live_server: LiveServer, requests: int) -> None:
    chance = random.Random(requests)
    before = chat(live_server, "tiny", "hi")["choices"]
    worker = worker_process(live_server)
    statuses: dict[int, int] = {}
    headers = {"Authorization": f"Bearer {live_server.key}"}
    async with httpx.AsyncClient(base_url=live_server.address, headers=headers, timeout=120, trust_env=False) as client:

        async def send(number: int) -> None:
            body = any_body(chance)
            answer = await client.post(f"{PREFIXES[number % 2]}/chat/completions", json=body)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, (answer.text, body)
            if answer.status_code != 200:
                assert answer.json()["error"]["message"], body
            elif body.get("stream") is True:
                assert answer.text.endswith("data: [DONE]\n\n") or '"error"' in answer.text.splitlines()[-2], body
                assert "engine_error" not in answer.text and "internal_error" not in answer.text, body
            else:
                assert answer.json()["usage"]["completion_tokens"] >= 0

        for first in range(0, requests, 10):
            await asyncio.gather(*(send(first + n) for n in range(10)))
    print(statuses)
    assert statuses[200] > requests / 8 and statuses[400] > requests / 8
    assert worker_process(live_server) == worker
    assert chat(live_server, "tiny", "hi")["choices"] == before
    state = await asyncio.to_thread(worker_state, live_server)
    assert (state.active, state.waiting) == (0, 0)
