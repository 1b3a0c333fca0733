"""Calls of functions from the SDK's request to the SDK's objects: real routes, service and renderer, an engine by script."""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from tests.api.world import World
from tunewright.completions.service import CompletionService
from tunewright.deployments.ports import Done, Generate, TokenText
from tunewright.deployments.serving import Serving
from tunewright.models.records import Base, TunedModel
from tunewright.rendering.conversation import ToolCall
from tunewright.rendering.renderer import Renderer, renderer_of
from tunewright.rendering.tool_format import written_call

TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("get_weather", "f")
]
QUESTION: list[Any] = [{"role": "user", "content": "天气?"}]


def call(name: str, **arguments: Any) -> str:
    return written_call(ToolCall(id="", name=name, arguments=json.dumps(arguments)))


class ScriptedPool:
    """Answers `text`, three characters for each token. `asked` is the last order, `closed` whether it was given up."""

    def __init__(self) -> None:
        self.text, self.reason = "", "stop"
        self.asked: Generate | None = None
        self.n_sent = 0

    def check_room(self, base: Base) -> None:
        """There is always room."""

    async def generate(
        self, base: Base, tuned: TunedModel | None, request: Generate
    ) -> AsyncGenerator[TokenText | Done, None]:
        self.asked, self.n_sent = request, 0
        for start in range(0, len(self.text), 3):
            self.n_sent += 1
            yield TokenText(text=self.text[start : start + 3], n_tokens=self.n_sent)
        yield Done(reason=self.reason, prompt_tokens=len(request.prompt_ids), completion_tokens=self.n_sent)


@pytest.fixture
def pool() -> ScriptedPool:
    return ScriptedPool()


@pytest.fixture
async def sdk(tmp_path: Path, untrained_base: Path, pool: ScriptedPool) -> AsyncIterator[AsyncOpenAI]:
    world = World(tmp_path / "home", untrained_base)
    platform = world.platform
    instances, home = platform.instances, platform.home
    serving = Serving(platform.storage, platform.models, pool, instances, home, world.settings)  # type: ignore[arg-type]
    platform.completions = CompletionService(platform.models, serving, world.settings, platform.metering)
    http: Any = httpx.AsyncClient(transport=httpx.ASGITransport(world.app))
    async with AsyncOpenAI(
        api_key=world.key, base_url="http://localhost/v1", http_client=http, max_retries=0
    ) as client:
        yield client
    world.platform.storage.close()


@pytest.fixture
def renderer(untrained_base: Path) -> Renderer:
    return renderer_of(untrained_base)


async def ask(sdk: AsyncOpenAI, **more: Any) -> Any:
    body: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "tools": TOOLS, **more}
    return (await sdk.chat.completions.create(**body)).choices[0]


async def test_the_sdks_stream_accumulates_to_the_calls(sdk: AsyncOpenAI, pool: ScriptedPool) -> None:
    arguments = {"city": "北京", "note": '</tool_call> " {'}
    pool.text = "\n".join(["好的。", call("get_weather", **arguments), call("f")])
    async with sdk.chat.completions.stream(model="tiny", messages=QUESTION, tools=TOOLS) as stream:
        deltas = [event.chunk.choices[0].delta async for event in stream if event.type == "chunk"]
        final = (await stream.get_final_completion()).choices[0]
    pieces = [piece for delta in deltas for piece in delta.tool_calls or ()]
    assert [piece.index for piece in pieces] == [0, 1]
    assert all(piece.id and piece.function and piece.function.name for piece in pieces), (
        "named once, at the first piece"
    )
    whole = await ask(sdk)
    for choice in (final, whole):
        calls: Any = choice.message.tool_calls
        assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == [
            ("get_weather", arguments),
            ("f", {}),
        ]
        assert (choice.message.content, choice.finish_reason) == ("好的。", "tool_calls")


async def test_a_replayed_answer_is_rendered_as_it_was_written(
    sdk: AsyncOpenAI, pool: ScriptedPool, renderer: Renderer
) -> None:
    pool.text = call("get_weather", city="北京")
    message = (await ask(sdk)).message
    results = [{"role": "tool", "tool_call_id": c.id, "content": "21"} for c in message.tool_calls]
    await ask(sdk, messages=[*QUESTION, message.model_dump(), *results])
    assert pool.asked is not None
    expected = f"assistant\n{pool.text}\nuser\n<tool_response>\n21\n</tool_response>\nassistant\n"
    assert renderer.decode(pool.asked.prompt_ids).endswith(expected)


@pytest.mark.parametrize(
    ("choice", "begins"),
    [
        ("required", '<tool_call>\n{"name": "'),
        ({"type": "function", "function": {"name": "f"}}, '<tool_call>\n{"name": "f'),
    ],
)
async def test_a_required_call_is_begun_for_the_model(
    sdk: AsyncOpenAI, pool: ScriptedPool, renderer: Renderer, choice: Any, begins: str
) -> None:
    pool.text = call("f", a=1).removeprefix(begins)
    answer = await ask(sdk, tool_choice=choice)
    assert pool.asked is not None
    assert renderer.decode(pool.asked.prompt_ids).endswith(f"assistant\n{begins}")
    assert [(c.function.name, c.function.arguments) for c in answer.message.tool_calls] == [("f", '{"a": 1}')]
    pool.text = " nothing that fits"
    refused = await ask(sdk, tool_choice=choice)
    assert (refused.message.content, refused.message.tool_calls) == (begins + pool.text, None), "nothing is hidden"


async def test_none_offers_no_tools(sdk: AsyncOpenAI, pool: ScriptedPool, renderer: Renderer) -> None:
    pool.text = call("f")
    answer = await ask(sdk, tool_choice="none")
    assert (answer.message.content, answer.finish_reason) == (pool.text, "stop")
    assert pool.asked is not None and "<tools>" not in renderer.decode(pool.asked.prompt_ids)


async def test_without_parallel_calls_the_first_one_ends_the_answer(sdk: AsyncOpenAI, pool: ScriptedPool) -> None:
    first = call("f", a=1)
    pool.text = f"{first}\n{call('f', a=2)} and more"
    answer = await ask(sdk, parallel_tool_calls=True)
    assert len(answer.message.tool_calls) == 2
    body: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "tools": TOOLS, "parallel_tool_calls": False}
    made = await sdk.chat.completions.create(**body)
    choice = made.choices[0]
    assert [json.loads(c.function.arguments) for c in choice.message.tool_calls or ()] == [{"a": 1}]  # type: ignore[union-attr]
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    assert made.usage is not None and made.usage.completion_tokens == pool.n_sent == -(-len(first) // 3)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}}, "tool_choice"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
    ],
)
async def test_what_is_not_honoured_is_refused(sdk: AsyncOpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(sdk, **fields)
    assert caught.value.param == param
    assert "not required" not in caught.value.message


@pytest.mark.parametrize("url", ["/v1/chat/completions", "/api/paas/v4/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_second_call_cut_off_is_a_call_as_far_as_it_goes(
    sdk: AsyncOpenAI, pool: ScriptedPool, url: str, stream: bool
) -> None:
    """The first stays whole, nothing of the second is text, and `finish_reason` says that the answer is not whole."""
    pool.text, pool.reason = call("f", n=1) + "\n" + call("get_weather", city="Tokyo")[:-20], "length"
    headers = {"Authorization": f"Bearer {sdk.api_key}"}
    body = {"model": "tiny", "messages": QUESTION, "tools": TOOLS, "stream": stream}
    answer = await sdk._client.post(f"http://localhost{url}", json=body, headers=headers)
    if stream:
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
        choices = [choice for line in lines for choice in json.loads(line)["choices"]]
        message: dict[str, Any] = {
            "content": "".join(choice["delta"].get("content") or "" for choice in choices),
            "tool_calls": [one for choice in choices for one in choice["delta"].get("tool_calls") or ()],
        }
    else:
        choices = answer.json()["choices"]
        message = choices[0]["message"]
    assert choices[-1]["finish_reason"] == "length"
    assert not message["content"]
    first, second = (one["function"] for one in message["tool_calls"])
    assert (first["name"], json.loads(first["arguments"])) == ("f", {"n": 1})
    assert (second["name"], second["arguments"]) == ("get_weather", '{"city": "T')
