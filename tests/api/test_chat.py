"""Chat requests become the neutral form, answers take the dialect's shape."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.api.world import PREFIXES, World
from tunewright.api.chat import ChunkWriter, completion_object
from tunewright.completions.vocabulary import (
    ChatRequest,
    Choice,
    Completion,
    Finish,
    Sampling,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from tunewright.rendering.conversation import Message, ToolCall

CHAT = "/chat/completions"


async def ask(client: httpx.AsyncClient, prefix: str, word: str = "hi", **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": [{"role": "user", "content": word}], **fields}
    return await client.post(prefix + CHAT, json=body)


async def understood(world: World, client: httpx.AsyncClient, prefix: str, **fields: Any) -> ChatRequest:
    """What the completion service got."""
    answer = await ask(client, prefix, **fields)
    assert answer.status_code == 200, answer.text
    return world.completions.requests[-1]


def frames(answer: httpx.Response) -> list[Any]:
    """The data of every frame; each must end with an empty line."""
    text = answer.content.decode()
    assert text.endswith("\n\n")
    blocks = text.removesuffix("\n\n").split("\n\n")
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [block[6:] if block == "data: [DONE]" else json.loads(block[6:]) for block in blocks]


async def test_the_whole_answer(client: httpx.AsyncClient) -> None:
    zhipu = (await ask(client, "/api/paas/v4", request_id="r1")).json()
    openai = (await ask(client, "/v1")).json()
    for answer in (zhipu, openai):
        assert answer["object"] == "chat.completion"
        assert answer["model"] == "tiny"
        assert answer["choices"] == [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hello 你\u2028"}}
        ]
        assert answer["usage"] == {
            "prompt_tokens": 5,
            "completion_tokens": 2,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        assert isinstance(answer["created"], int) and answer["id"]
    assert zhipu["request_id"] == "r1"
    assert (await ask(client, "/api/paas/v4")).json()["request_id"].startswith("req-")


async def test_tool_calls(client: httpx.AsyncClient) -> None:
    for prefix in PREFIXES:
        choice = (await ask(client, prefix, "call")).json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        call = choice["message"]["tool_calls"][0]
        assert (call["id"], call["type"], call["index"]) == ("call_1", "function", 0)
        streamed = frames(await ask(client, prefix, "call", stream=True))
        pieces = [chunk["choices"][0]["delta"].get("tool_calls") for chunk in streamed[:-1]]
        assert pieces[0] == [
            {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a"'}}
        ]
        assert pieces[1] == [{"index": 0, "function": {"arguments": ": 1}"}}]
        assert streamed[-2]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("include", [None, False, True])
async def test_where_a_stream_puts_the_usage(client: httpx.AsyncClient, prefix: str, include: bool | None) -> None:
    options: dict[str, Any] = {} if include is None else {"stream_options": {"include_usage": include}}
    answer = await ask(client, prefix, stream=True, **options)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-accel-buffering"] == "no"
    *chunks, done = frames(answer)
    assert done == "[DONE]"
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    with_choices = [chunk for chunk in chunks if chunk["choices"]]
    roles = [chunk["choices"][0]["delta"].get("role") for chunk in with_choices]
    assert roles == ["assistant", None, None] if prefix == "/v1" else ["assistant"] * 3
    assert [chunk["choices"][0]["finish_reason"] for chunk in with_choices] == [None, None, "stop"]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in with_choices) == "Hello 你\u2028"
    on_finish = bool(with_choices[-1].get("usage"))
    extra = [chunk for chunk in chunks if not chunk["choices"]]
    assert on_finish == (prefix == "/api/paas/v4")
    assert len(extra) == (1 if include else 0)
    if extra:
        assert extra[0]["usage"]["total_tokens"] == 7
        assert chunks[-1] is extra[0]


async def test_reasoning_has_its_own_key(client: httpx.AsyncClient) -> None:
    first = frames(await ask(client, "/api/paas/v4", "think", stream=True))[0]
    assert first["choices"][0]["delta"] == {"role": "assistant", "reasoning_content": "hm"}


async def test_errors_before_the_first_delta_have_a_status(client: httpx.AsyncClient) -> None:
    for stream in (False, True):
        openai = await ask(client, "/v1", model="nowhere", stream=stream)
        zhipu = await ask(client, "/api/paas/v4", model="nowhere", stream=stream)
        assert (openai.status_code, openai.json()["error"]["code"]) == (404, "model_not_found")
        assert (zhipu.status_code, zhipu.json()["error"]["code"]) == (400, "1211")


@pytest.mark.parametrize("word", ["break", "late bug", "unfinished"])
async def test_errors_after_it_end_the_stream_with_an_error_frame(
    client: httpx.AsyncClient, word: str, log_lines: Callable[[], list[dict[str, Any]]]
) -> None:
    for prefix in PREFIXES:
        answer = await ask(client, prefix, word, stream=True)
        *chunks, last = frames(answer)
        assert answer.status_code == 200 and chunks
        assert set(last) == {"error"}
        assert last["error"]["request_id"] == answer.headers["x-request-id"]
        assert "[DONE]" not in answer.text and "/home" not in answer.text
    logged = [line for line in log_lines() if line["event"] == "request"]
    assert [line["ended_by"] for line in logged] == ["error", "error"]
    bugs = [line for line in log_lines() if line["event"] == "unexpected_error"]
    assert len(bugs) == (0 if word == "break" else 2)
    assert all("RuntimeError" in bug["exception"] for bug in bugs)


async def test_explicit_nulls_are_absent(world: World, client: httpx.AsyncClient) -> None:
    nulls = dict.fromkeys(
        (
            "stream",
            "stream_options",
            "temperature",
            "top_p",
            "max_tokens",
            "max_completion_tokens",
            "stop",
            "seed",
            "tools",
            "tool_choice",
            "response_format",
            "thinking",
            "n",
            "logprobs",
            "do_sample",
            "request_id",
            "frequency_penalty",
            "logit_bias",
            "functions",
            "something_new",
        )
    )
    for prefix in PREFIXES:
        request = await understood(world, client, prefix, **nulls)
        plain = await understood(world, client, prefix)
        assert (request.sampling, request.conversation, request.tool_choice) == (
            plain.sampling,
            plain.conversation,
            "auto",
        )


@pytest.mark.parametrize(
    ("prefix", "fields", "expected"),
    [
        ("/v1", {}, {"temperature": 1.0, "top_p": 1.0}),
        ("/v1", {"temperature": 2, "top_p": 0.5}, {"temperature": 2.0, "top_p": 0.5}),
        ("/v1", {"temperature": 0, "max_completion_tokens": 7}, {"temperature": 0.0, "max_tokens": 7}),
        ("/v1", {"stop": "x", "seed": -1}, {"stop": ("x",), "seed": 2**63 - 1}),
        ("/v1", {"stop": [], "n": 1, "logprobs": False, "presence_penalty": 0.0}, {"stop": (), "top_logprobs": None}),
        ("/v1", {"logprobs": True}, {"top_logprobs": 0}),
        ("/v1", {"logprobs": True, "top_logprobs": 20}, {"top_logprobs": 20}),
        ("/v1", {"logprobs": False, "top_logprobs": 0}, {"top_logprobs": None}),
        ("/v1", {"logit_bias": {"7": -100, "8": 0.5}}, {"logit_bias": {7: -100.0, 8: 0.5}}),
        ("/v1", {"presence_penalty": -2, "frequency_penalty": 2}, {"presence_penalty": -2.0, "frequency_penalty": 2.0}),
        ("/api/paas/v4", {}, {"temperature": 0.75, "top_p": 0.9}),
        ("/api/paas/v4", {"temperature": 1.7, "top_p": 1.7}, {"temperature": 1.0, "top_p": 1.0}),
        ("/api/paas/v4", {"temperature": -1, "top_p": 0}, {"temperature": 0.0, "top_p": 0.01}),
        ("/api/paas/v4", {"temperature": 0.01, "do_sample": False}, {"temperature": 0.0, "top_p": 1.0}),
        ("/api/paas/v4", {"max_tokens": 3, "max_completion_tokens": 4}, {"max_tokens": 3}),
        ("/api/paas/v4", {"stop": ["a", "b"]}, {"stop": ("a", "b")}),
    ],
)
async def test_sampling(
    world: World, client: httpx.AsyncClient, prefix: str, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    request = await understood(world, client, prefix, **fields)
    assert {name: getattr(request.sampling, name) for name in expected} == expected
    assert isinstance(request.sampling, Sampling)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"messages": "hi"}, 'messages must be a list, not "hi".'),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content must be text or a list of parts, not 5."),
        ({"tools": "5"}, 'tools must be a list, not "5".'),
        ({"max_tokens": "many"}, 'max_tokens must be a whole number, not "many".'),
    ],
)
async def test_a_wrong_value_is_shown_as_it_was_sent(
    client: httpx.AsyncClient, fields: dict[str, Any], sentence: str
) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    answer = await client.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, sentence)


async def test_messages_as_they_really_come(world: World, client: httpx.AsyncClient) -> None:
    call = {"id": "call_1", "type": "function", "index": 0, "function": {"name": "f", "arguments": "{}"}}
    tools = [{"type": "function", "function": {"name": "f", "strict": True, "description": None}}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None},
        {"content": "c", "role": "assistant", "reasoning_content": None, "tool_calls": None, "refusal": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "42"},
    ]
    for prefix in PREFIXES:
        request = await understood(world, client, prefix, messages=messages, tools=tools, tool_choice="required")
        assert request.conversation.messages == (
            Message(role="system", content="Be brief."),
            Message(role="user", content="ab"),
            Message(role="assistant", content="c"),
            Message(role="assistant", tool_calls=(ToolCall(id="call_1", name="f", arguments="{}"),)),
            Message(role="tool", content="42", tool_call_id="call_1"),
        )
        assert request.conversation.tools == tuple(tools), "as they came, like those of training rows"
        assert (request.tool_choice, request.function, request.one_call) == ("required", None, False)
    named = {"type": "function", "function": {"name": "f"}}
    request = await understood(world, client, "/v1", tools=tools, tool_choice=named, parallel_tool_calls=False)
    assert (request.tool_choice, request.function, request.one_call) == ("required", "f", True)
    developer = await understood(world, client, "/v1", messages=[{"role": "developer", "content": "x"}])
    assert developer.conversation.messages[0].role == "system"


def test_a_chunk_costs_little() -> None:
    """The gateway may spend 0.2 ms on a token; encoding gets a hundredth of it."""
    from time import perf_counter

    writer = ChunkWriter("m", {}, usage_with_finish=True, usage_chunk=True)
    delta = TextDelta(text=' 你好 "quoted"\n')
    best = 1.0
    for _ in range(5):
        start = perf_counter()
        for _ in range(1000):
            writer.frames(delta)
        best = min(best, (perf_counter() - start) / 1000)
    assert best < 20e-6, f"{best * 1e6:.1f} µs"


def test_frames_of_one_writer_share_their_head() -> None:
    writer = ChunkWriter("m", {"request_id": "r"}, usage_with_finish=False, usage_chunk=True)
    usage = Usage(prompt_tokens=1, completion_tokens=2, cached_tokens=1)
    raw = b"".join(
        writer.frames(delta)
        for delta in (
            TextDelta(text="é\n\n"),
            ToolCallDelta(index=1, arguments="x"),
            Finish(reason="length", usage=usage),
        )
    )
    *chunks, done = raw.decode().removesuffix("\n\n").split("\n\n")
    read = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
    assert done == "data: [DONE]"
    assert [chunk["usage"] for chunk in read[:-1]] == [None, None, None]
    assert read[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    assert {chunk["request_id"] for chunk in read} == {"r"}
    assert read[0]["choices"][0]["delta"]["content"] == "é\n\n"


@pytest.mark.parametrize("prefix", PREFIXES)
async def test_several_choices_come_whole(world: World, client: httpx.AsyncClient, prefix: str) -> None:
    assert (await understood(world, client, prefix, n=3)).n == 3
    answer = (await ask(client, prefix, n=3)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]


def test_frames_of_several_choices_end_with_the_last() -> None:
    writer = ChunkWriter("m", {}, usage_with_finish=False, usage_chunk=True, role_once=True)
    usage = Usage(prompt_tokens=3, completion_tokens=4)
    text = b"".join(
        writer.frames(delta)
        for delta in (
            TextDelta(text="a", choice=1),
            TextDelta(text="b"),
            Finish(reason="stop", usage=None, choice=1),
            Finish(reason="length", usage=usage),
        )
    ).decode()
    *chunks, done = [block.removeprefix("data: ") for block in text.removesuffix("\n\n").split("\n\n")]
    assert done == "[DONE]" and text.count("[DONE]") == 1
    found = [json.loads(chunk) for chunk in chunks]
    assert [chunk["choices"][0]["index"] for chunk in found[:-1]] == [1, 0, 1, 0]
    roles = [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}, {}, {}]
    assert [chunk["choices"][0]["delta"] for chunk in found[:-1]] == roles
    assert found[-1]["choices"] == [] and found[-1]["usage"]["total_tokens"] == 7


def test_frames_and_answers_carry_logprobs() -> None:
    top = TokenLogprob(token="b", bytes=[98], logprob=-2.0)
    scored = TokenLogprob(token="a", bytes=[97], logprob=-0.5, top_logprobs=[top])
    writer = ChunkWriter("m", {}, usage_with_finish=True, usage_chunk=False)
    chunk = json.loads(writer.frames(TextDelta(text="a", logprobs=[scored])).removeprefix(b"data: "))
    expected = {
        "content": [
            {
                "token": "a",
                "bytes": [97],
                "logprob": -0.5,
                "top_logprobs": [{"token": "b", "bytes": [98], "logprob": -2.0}],
            }
        ],
        "refusal": None,
    }
    assert chunk["choices"][0]["logprobs"] == expected
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    whole = completion_object(
        Completion(choices=(Choice(text="a", reason="stop", logprobs=[scored]),), usage=usage), "m", {}
    )
    assert whole["choices"][0]["logprobs"] == expected
