"""The access log: one JSON object per request, with ids and codes, without secrets."""

import json
from collections.abc import Callable
from typing import Any

import httpx

from tests.api.world import World


async def test_a_line_says_who_what_and_how_it_ended(
    client: httpx.AsyncClient, world: World, log_lines: Callable[[], list[dict[str, Any]]]
) -> None:
    answer = await client.get("/v1/files/file-x?a=secret-query", headers={"X-Request-Id": "mine-1"})
    line = log_lines()[-1]
    assert line["request_id"] == answer.headers["x-request-id"]
    assert line["client_request_id"] == "mine-1"
    assert (line["method"], line["route"], line["status"], line["code"]) == (
        "GET",
        "/v1/files/{file_id}",
        404,
        "file_not_found",
    )
    assert (line["project_id"], line["key_id"]) == (world.project_id, world.key.partition(".")[0])
    assert line["ms"] >= 0


async def test_no_secret_and_no_content_is_logged(
    client: httpx.AsyncClient, world: World, log_lines: Callable[[], list[dict[str, Any]]]
) -> None:
    secret = world.key.partition(".")[2]
    await client.get(f"/v1/models?api_key={world.key}")
    await client.post(
        "/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": "private"}]}
    )
    await client.post("/v1/chat/completions", content=b'{"private')
    await client.get("/v1/files/%0d%0aprivate-line", headers={"X-Request-Id": "a\x1b[31mb", "User-Agent": "private"})
    await world.upload(client)
    lines = log_lines()
    text = json.dumps(lines)
    assert len(lines) == 5
    assert secret not in text
    assert "hello" not in text and "private" not in text.replace("private-line", "")


async def test_a_refused_key_is_not_logged(world: World, log_lines: Callable[[], list[dict[str, Any]]]) -> None:
    async with world.client("0123456789abcdef0123456789abcdef.wrongsecret") as client:
        await client.get("/v1/models")
    assert "wrongsecret" not in json.dumps(log_lines())
    assert log_lines()[-1]["code"] == "invalid_api_key"
