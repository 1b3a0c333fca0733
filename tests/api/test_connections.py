"""Heads of requests on a real socket: what never ends, what is too large, what is no HTTP; and answers that stay apart."""

import asyncio
import json
import resource
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.api.running import Running, answer_of, exchange, until
from tunewright.api import connections

GET = "GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
POST = "POST /v1/fine_tuning/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


# (id, what is sent, status, code)
HEADS: list[tuple[str, str, int, str]] = [
    ("A42 URL of 100 KB", f"GET /v1/{'a' * 100_000} HTTP/1.1\r\nHost: localhost\r\n\r\n", 414, "url_too_long"),
    ("A42 URL of 20 KB", f"GET /v1/{'a' * 20_000} HTTP/1.1\r\nHost: localhost\r\n{{key}}\r\n", 414, "url_too_long"),
    ("A43 header of 33 KiB", f"{GET}{{key}}X: {'a' * 33 * 1024}\r\n\r\n", 431, "headers_too_large"),
    ("A43 header of 1 MB", f"{GET}{{key}}X: {'a' * 10**6}\r\n\r\n", 431, "headers_too_large"),
    ("A02 key of 1 MB", f"{GET}Authorization: Bearer {'a' * 10**6}\r\n\r\n", 431, "headers_too_large"),
    ("A43 200 headers", GET + "".join(f"X-{i}: a\r\n" for i in range(200)) + "\r\n", 431, "headers_too_large"),
    ("A43 bare LF", GET.replace("\r\n", "\n") + "\n", 400, "invalid_http"),
    ("A43 no name", f"{GET}: a\r\n\r\n", 400, "invalid_http"),
    ("A43 NUL", f"{GET}X: a\0b\r\n\r\n", 400, "invalid_http"),
    ("A43 folded", f"{GET}Authorization: Bearer a\r\n b\r\n\r\n", 400, "invalid_http"),
    ("A43 odd host", "GET /v1/models HTTP/1.1\r\nHost: a b\r\n\r\n", 400, "invalid_host"),
    ("no HTTP", "\x16\x03\x01\x02\x00\x01\x00\x01\r\n\r\n", 400, "invalid_http"),
    ("HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "invalid_http"),
    ("F06 negative length", f"{POST}Content-Length: -1\r\n\r\n", 400, "invalid_http"),
    ("F06 length of 30 digits", f"{POST}Content-Length: {'9' * 30}\r\n\r\n", 400, "invalid_http"),
    ("F06 two lengths", f"{POST}Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc", 400, "invalid_http"),
    ("F06 CL and TE", f"{POST}Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "invalid_http"),
    ("F06 TE and CL", f"{POST}Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n", 400, "invalid_http"),
    ("F06 other coding", f"{POST}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400, "invalid_http"),
    ("F06 bad chunk", f"{POST}{{key}}Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n", 400, "invalid_http"),
    ("F06 huge chunk", f"{POST}{{key}}Transfer-Encoding: chunked\r\n\r\n{'F' * 17}\r\n\r\n", 400, "invalid_http"),
    ("F06 smaller length", f"{POST}{{key}}Content-Length: 2\r\n\r\n{{}}more", 400, "missing_required_parameter"),
]


@pytest.mark.parametrize(("name", "raw", "status", "code"), HEADS, ids=[case[0] for case in HEADS])
async def test_bad_heads(running: Running, name: str, raw: str, status: int, code: str) -> None:
    key = f"Authorization: Bearer {running.world.key}\r\n"
    began = time.perf_counter()
    answered, body = await exchange(running, raw.replace("{key}", key).encode("latin-1"))
    assert (answered, json.loads(body)["error"]["code"]) == (status, code)
    assert time.perf_counter() - began < 1


async def test_refusals_before_there_is_a_request_have_the_dialects_shape(
    running: Running, log_lines: Callable[[], list[dict[str, Any]]]
) -> None:
    status, body = await exchange(running, b"GET /api/paas/v4/models HTTP/1.1\nHost: localhost\n\n")
    error = json.loads(body)["error"]
    assert (status, error["code"], error["reason"]) == (400, "1210", "invalid_http")
    assert log_lines()[-1]["request_id"] == error["request_id"]


async def test_endless_headers_take_no_memory(running: Running) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reader, writer = await running.connect()
    writer.write(GET.encode())
    for number in range(640):  # 40 MiB
        writer.write(b"X-%d: " % number + b"a" * 65536 + b"\r\n")
        await writer.drain()
    assert (await answer_of(reader))[0] == 431
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 1024
    writer.close()


@pytest.mark.parametrize(("sent", "answer"), [(b"", b""), (GET.encode(), b"HTTP/1.1 408 ")])
async def test_a_head_that_does_not_come_is_given_up(
    running: Running, monkeypatch: pytest.MonkeyPatch, sent: bytes, answer: bytes
) -> None:
    monkeypatch.setattr(connections, "HEAD_LIMIT_S", 0.1)
    monkeypatch.setattr(connections, "LINGER_S", 0.1)
    reader, writer = await running.connect()
    writer.write(sent)
    assert (await asyncio.wait_for(reader.read(), 30))[:13] == answer
    writer.close()


async def test_a_later_head_has_its_own_time(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_LIMIT_S", 1.0)
    reader, writer = await running.connect()
    for _ in range(3):
        await asyncio.sleep(0.4)
        writer.write(running.head("GET", "/v1/models"))
        assert (await answer_of(reader))[0] == 200
    await asyncio.sleep(1.2)  # between requests only the keep-alive counts
    writer.write(running.head("GET", "/v1/models"))
    assert (await answer_of(reader))[0] == 200
    writer.close()


async def test_many_requests_with_bodies_are_not_one_large_head(running: Running) -> None:
    """Heads that arrive together with the bodies before them."""
    body = b'{"x":"' + b"a" * 100_000 + b'"}'
    request = (
        running.head("POST", "/v1/fine_tuning/jobs", "Content-Type: application/json", f"Content-Length: {len(body)}")
        + body
    )
    reader, writer = await running.connect()
    everything = request * 10
    for start in range(0, len(everything), 60_000):
        writer.write(everything[start : start + 60_000])
        await asyncio.sleep(0)
    for _ in range(10):
        assert (await answer_of(reader))[0] == 400
    writer.close()


async def test_rubbish_after_a_request_does_not_spoil_its_answer(running: Running) -> None:
    """Neither is it written into the answer that is under way, nor taken for that answer."""
    reader, writer = await running.connect()
    writer.write(running.chat("endless", stream=True) + b"rubbish\r\n\r\n")
    await asyncio.wait_for(reader.readuntil(b"Hel"), 30)
    assert b"HTTP/1.1" not in await asyncio.wait_for(reader.readexactly(5000), 30)
    writer.close()
    await until(lambda: running.world.completions.open == 0)
    reader, writer = await running.connect()
    writer.write(running.head("GET", "/v1/models/x") + b"rubbish\r\n\r\n")
    assert (await answer_of(reader))[0] == 404
    assert await asyncio.wait_for(reader.read(), 30) == b"", "closed after it"
    writer.close()


async def test_a52_old_and_closing_clients(running: Running) -> None:
    for raw in (
        running.head("GET", "/v1/models/x").replace(b"HTTP/1.1", b"HTTP/1.0"),
        running.head("GET", "/v1/models/x", "Connection: close"),
    ):
        reader, writer = await running.connect()
        writer.write(raw)
        assert (await answer_of(reader))[0] == 404
        assert await asyncio.wait_for(reader.read(), 30) == b""
        writer.close()


async def test_a51_a_client_that_leaves_after_its_headers_is_no_failure(
    running: Running, log_lines: Callable[[], list[dict[str, Any]]]
) -> None:
    _, writer = await running.connect()
    writer.write(running.head("POST", "/v1/chat/completions", "Content-Type: application/json", "Content-Length: 99"))
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.close()
    await until(lambda: [line for line in log_lines() if line["event"] == "request"])
    assert [line.get("status") for line in log_lines()] == [499]
