"""What only a real connection shows: disconnects, raw requests, bodies that stop, and the server's end."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from tests.api.running import Running, answer_of, exchange, until
from tests.api.world import World
from tunewright.api import body as body_limits
from tunewright.api import streaming


@pytest.mark.parametrize("word", ["endless", "pause"])
async def test_a_client_that_leaves_mid_stream_frees_the_engine(running: Running, word: str) -> None:
    completions = running.world.completions
    reader, writer = await running.connect()
    writer.write(running.chat(word, stream=True))
    await asyncio.wait_for(reader.readuntil(b"Hel"), 30)
    assert completions.open == 1
    writer.close()
    await until(lambda: completions.open == 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_a51_a_client_that_leaves_before_the_first_word_frees_it_too(running: Running, stream: bool) -> None:
    completions = running.world.completions
    _, writer = await running.connect()
    writer.write(running.chat("wait", stream=stream))
    await until(lambda: completions.open == 1)
    writer.close()
    await until(lambda: completions.open == 0)


async def test_silence_is_filled_with_comments(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_S", 0.05)
    monkeypatch.setattr(streaming, "_TICK_S", 0.02)
    reader, writer = await running.connect()
    writer.write(running.chat("pause", stream=True))
    await asyncio.wait_for(reader.readuntil(b": keep-alive\n\n"), 30)
    await asyncio.wait_for(reader.readuntil(b": keep-alive\n\n"), 30)
    writer.close()
    await until(lambda: running.world.completions.open == 0)


async def test_a_client_that_reads_nothing_is_given_up(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "STALL_LIMIT_S", 0.2)
    monkeypatch.setattr(streaming, "_TICK_S", 0.05)
    frames = b"data: " + b"x" * 1_000_000 + b"\n\n"
    ended: list[str] = []

    async def floods() -> AsyncGenerator[bytes, None]:
        while True:
            yield frames

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await streaming.EventStream(floods())(scope, receive, send)
        finally:
            ended.append(scope["tunewright.exchange"].log_values["ended_by"])

    monkeypatch.setattr(running.world.app.router, "app", app, raising=False)
    monkeypatch.setattr(running.world.app.router, "middleware_stack", app, raising=False)
    _, writer = await running.connect()
    writer.write(running.head("GET", "/v1/models"))
    await until(lambda: ended, 30)
    assert ended == ["stall"]
    writer.close()


async def test_a_stopping_server_ends_streams_with_an_error(world: World) -> None:
    running = Running(world)
    await running.start()
    reader, writer = await running.connect()
    writer.write(running.chat("pause", stream=True))
    await asyncio.wait_for(reader.readuntil(b"Hel"), 30)
    await running.stop()
    rest = await asyncio.wait_for(reader.read(), 30)
    assert b'"code":"server_stopping"' in rest
    assert b"[DONE]" not in rest
    assert rest.endswith(b"0\r\n\r\n"), "the body is whole: the error frame is its end"
    writer.close()
    assert world.completions.open == 0


async def test_f08_an_upload_that_is_broken_off_leaves_nothing(running: Running) -> None:
    temporary = running.world.platform.home.temporary
    before = set(temporary.iterdir())
    _, writer = await running.connect()
    start = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n{"messages"'
    head = running.head("POST", "/v1/files", "Content-Type: multipart/form-data; boundary=B", "Content-Length: 9999")
    writer.write(head + start)
    await until(lambda: set(temporary.iterdir()) != before)
    writer.close()
    await until(lambda: set(temporary.iterdir()) == before)


async def test_f06_a_body_that_stops_arriving_is_given_up(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limits, "BODY_SILENCE_LIMIT_S", 0.1)
    head = running.head("POST", "/v1/chat/completions", "Content-Type: application/json", "Content-Length: 50")
    status, body = await exchange(running, head + b'{"model"')
    assert (status, json.loads(body)["error"]["code"]) == (408, "request_timeout")


async def test_f11_a_stranger_is_refused_before_the_body(running: Running) -> None:
    head = (
        b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 500\r\n"
        b"Authorization: Bearer wrong\r\nContent-Type: multipart/form-data; boundary=B\r\n\r\n"
    )
    status, body = await exchange(running, head)
    assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")


async def test_f07_a_large_declared_body_is_refused_at_once(running: Running) -> None:
    head = running.head("POST", "/v1/fine_tuning/jobs", "Content-Type: application/json", "Content-Length: 10000000")
    status, body = await exchange(running, head)
    assert (status, json.loads(body)["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("raw", "statuses"),
    [
        (b"GET http://localhost/healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", {200, 400, 404}),
        (b"GET /v1/%2e%2e/healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", {404}),
        (b"GET /v1/..;/healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", {401, 404}),
        (b"GET /healthz%2f HTTP/1.1\r\nHost: localhost\r\n\r\n", {404}),
        (b"GET /healthz/ HTTP/1.1\r\nHost: localhost\r\n\r\n", {200}),
        (b"GET /healthz?x=/v1 HTTP/1.1\r\nHost: localhost\r\n\r\n", {200}),
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost/healthz?\r\n\r\n", {400}),
        (b"GET /v1/models HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n", {400}),
        (b"GET /v1/models HTTP/1.1\r\n\r\n", {400}),
        (b"GET /healthz HTTP/1.0\r\n\r\n", {200}),
        (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", {400, 404}),
        (b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", {400}),
        (b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", {400}),
        (
            b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            {400, 401},
        ),
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: 127.0.0.1\r\n\r\n", {401}),
    ],
)
async def test_raw_requests(running: Running, raw: bytes, statuses: set[int]) -> None:
    status, _ = await exchange(running, raw)
    assert status in statuses


async def test_a52_pipelined_requests_get_their_own_answers(running: Running) -> None:
    names = [f"model-{i}" for i in range(50)]
    reader, writer = await running.connect()
    writer.write(b"".join(running.head("GET", f"/v1/models/{name}") for name in names))
    for name in names:
        status, body = await answer_of(reader)
        assert status == 404 and name in json.loads(body)["error"]["message"]
    writer.close()


async def test_a_refused_body_does_not_spoil_the_connection(running: Running) -> None:
    """The rest of a refused body is thrown away, and the next request on the connection is understood."""
    reader, writer = await running.connect()
    head = running.head("POST", "/v1/fine_tuning/jobs", "Content-Type: application/json", "Content-Length: 3000000")
    writer.write(head + b"GET /healthz HTTP/1.1\r\n" + b"x" * (3_000_000 - 23) + running.head("GET", "/v1/models"))
    assert (await answer_of(reader))[0] == 413
    status, body = await answer_of(reader)
    assert (status, json.loads(body)["object"]) == (200, "list")
    writer.close()
