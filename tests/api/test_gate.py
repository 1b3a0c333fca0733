"""Nobody passes without a key, and nobody sees what another project has (T-01, T-02, T-03)."""

import json
from typing import Any

import httpx
import pytest
from starlette.routing import Mount

from tests.api.world import PREFIXES, World
from tunewright.api.addresses import plain_path
from tunewright.api.auth import PUBLIC
from tunewright.errors import NotFound, TooLarge
from tunewright.ids import new_id

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
GOLDEN_PUBLIC = {("GET", "/healthz"), ("GET", "/readyz")}
"""Whoever adds to this list makes a route open to the world."""


def filled(path: str) -> str:
    for place in ("file", "job", "upload", "channel", "batch", "task"):
        path = path.replace(f"{{{place}_id}}", f"{place}-x")
    return path.replace("{name:path}", "x")


def paths(world: World) -> list[str]:
    assert not any(isinstance(route, Mount) for route in world.app.routes)
    return sorted({filled(route.path) for route in world.app.routes})  # type: ignore[attr-defined]


def test_the_public_routes_are_the_golden_list() -> None:
    assert PUBLIC == GOLDEN_PUBLIC


async def test_every_route_and_method_is_closed_without_a_valid_key(world: World) -> None:
    revoked = world.platform.accounts.create_key("revoked")
    world.platform.accounts.revoke(world.project_id, revoked.partition(".")[0])
    token = "eyJhbGciOiJub25lIn0.eyJhcGlfa2V5IjoieCJ9."
    keys = [None, "garbage", revoked, world.key[:-1] + "!", token]
    tried = opened = 0
    for key in keys:
        async with world.client(key) as client:
            for path in [*paths(world), "/", "/nothing", "/v1", "/docs", "/redoc", "/metrics"]:
                for method in METHODS:
                    answer = await client.request(method, path)
                    tried += 1
                    if (method, path) in GOLDEN_PUBLIC:
                        opened += 1
                        assert answer.status_code in (200, 503)
                        continue
                    assert answer.status_code == 401, (method, path, key)
                    assert "location" not in answer.headers
                    if method != "HEAD":
                        assert "error" in answer.json()
    assert opened == len(keys) * len(GOLDEN_PUBLIC)
    assert tried > 1000


async def test_the_same_routes_are_known_with_a_key(client: httpx.AsyncClient, world: World) -> None:
    """The matrix above would also pass on an application without routes."""
    for path in paths(world):
        codes = {(await client.request(method, path)).status_code for method in ("GET", "POST", "DELETE")}
        assert codes & {200, 400, 405, 415} or path.endswith(("-x", "/x")) or "-x/" in path


async def test_dialects_word_the_refusal_their_own_way(world: World) -> None:
    async with world.client(None) as client:
        zhipu = (await client.get("/api/paas/v4/models")).json()["error"]
        openai = (await client.get("/v1/models")).json()["error"]
        other = (await client.get("/elsewhere")).json()["error"]
    assert (zhipu["code"], zhipu["reason"]) == ("1001", "missing_api_key")
    assert openai["code"] == other["code"] == "missing_api_key"


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ([], "missing_api_key"),
        ([("Authorization", "Bearer")], "missing_api_key"),
        ([("Authorization", "Bearer ")], "missing_api_key"),
        ([("Authorization", "Basic dXNlcjpwYXNz")], "invalid_api_key"),
        ([("Authorization", "{key}"), ("Authorization", "{key}")], "invalid_api_key"),
        ([("Authorization", b"Bearer \xff\xfe")], "invalid_api_key"),
        ([("Authorization", "Bearer a.b.c")], "invalid_token"),
        ([("Cookie", "key={key}")], "missing_api_key"),
    ],
)
async def test_wrong_credentials(world: World, headers: list[tuple[str, Any]], code: str) -> None:
    def with_key(value: Any) -> Any:
        return value.replace("{key}", f"Bearer {world.key}") if isinstance(value, str) else value

    sent = [(name, with_key(value)) for name, value in headers]
    async with world.client(None) as client:
        answer = await client.get(f"/v1/models?api_key={world.key}", headers=sent)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, code)
    assert answer.headers["www-authenticate"] == "Bearer"


async def test_the_gate_comes_before_the_body(world: World) -> None:
    """A stranger's upload is refused unread."""
    read = []

    async def receive() -> dict[str, Any]:
        read.append(1)
        return {"type": "http.request", "body": b"", "more_body": False}

    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=x")]
    scope = {"type": "http", "method": "POST", "path": "/v1/files", "raw_path": b"/v1/files", "query_string": b""}
    await world.app({**scope, "headers": headers, "http_version": "1.1"}, receive, send)
    assert sent[0]["status"] == 401
    assert not read


async def test_websockets_are_refused(world: World) -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await world.app({"type": "websocket", "path": "/v1/models", "headers": []}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize(
    ("path", "raw"),
    [
        ("//v1/models", b"//v1/models"),
        ("/v1//models", b"/v1//models"),
        ("/v1/models//", b"/v1/models//"),
        ("/v1/../healthz", b"/v1/%2e%2e/healthz"),
        ("/v1/./models", b"/v1/./models"),
        ("/v1/models/..", b"/v1/models/%2e%2e"),
        ("/v1/models/../files", b"/v1/models/..%2ffiles"),
        ("/v1/files/a/content", b"/v1/files/a%2Fcontent"),
        ("/healthz/x", b"/healthz%2fx"),
        ("/v1/models/x", b"/v1%2Fmodels/x"),
        ("http://x/v1/models", b"http://x/v1/models"),
        ("*", b"*"),
        ("", b""),
        ("/v1/models/a\n", b"/v1/models/a%0a"),
        ("/healthz\x00", b"/healthz%00"),
    ],
)
def test_paths_that_two_readers_could_understand_differently_are_refused(path: str, raw: bytes) -> None:
    with pytest.raises(NotFound):
        plain_path(path, raw)


@pytest.mark.parametrize(
    ("path", "raw", "plain"),
    [
        ("/", b"/", "/"),
        ("/v1/models/", b"/v1/models/", "/v1/models"),
        ("/v1/models/org/名 x?y#z", b"/v1/models/org%2F%E5%90%8D%20x%3Fy%23z", "/v1/models/org/名 x?y#z"),
        ("/v1/models/a:1::b", b"/v1/models/a:1::b", "/v1/models/a:1::b"),
        ("/v1/models/...", b"/v1/models/...", "/v1/models/..."),
        ("/healthz;x", b"/healthz;x", "/healthz;x"),
    ],
)
def test_plain_paths_stay(path: str, raw: bytes, plain: str) -> None:
    assert plain_path(path, raw) == plain


def test_long_targets_are_refused() -> None:
    with pytest.raises(TooLarge):
        plain_path("/v1/files/" + "a" * 100_000, b"/v1/files/" + b"a" * 100_000)


async def test_a_trailing_slash_is_the_same_path_and_needs_the_same_key(world: World) -> None:
    async with world.client() as client, world.client(None) as stranger:
        for prefix in PREFIXES:
            assert (await client.get(f"{prefix}/models/")).json() == (await client.get(f"{prefix}/models")).json()
            assert (await stranger.get(f"{prefix}/models/")).status_code == 401


@pytest.mark.parametrize(
    ("hosts", "status"),
    [
        (["localhost"], 200),
        (["LOCALHOST:8000"], 200),
        (["[::1]:8000"], 200),
        (["127.0.0.1"], 200),
        (["evil.example"], 403),
        (["127.0.0.1.evil.example"], 403),
        (["localhost/?"], 400),
        (["localhost#"], 400),
        (["user@localhost"], 400),
        ([""], 400),
        ([], 400),
        (["localhost", "evil.example"], 400),
    ],
)
async def test_host_headers(world: World, hosts: list[str], status: int) -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", host.encode()) for host in hosts] + [(b"authorization", f"Bearer {world.key}".encode())]
    scope = {"type": "http", "method": "GET", "path": "/v1/models", "raw_path": b"/v1/models", "query_string": b""}
    await world.app({**scope, "headers": headers, "http_version": "1.1"}, receive, send)
    assert sent[0]["status"] == status


async def test_another_projects_things_look_like_things_that_never_were(world: World) -> None:
    async with world.client() as mine, world.client(world.other_key) as theirs:
        file_id = (await world.upload(mine))["id"]
        created = await mine.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file_id})
        assert created.status_code == 200, created.text
        job_id = created.json()["id"]
        name = (await mine.get(f"/api/paas/v4/fine_tuning/jobs/{job_id}")).json()["fine_tuned_model"]
        body = {"filename": "a.jsonl", "purpose": "fine-tune", "bytes": 1, "mime_type": "application/jsonl"}
        upload_id = (await mine.post("/v1/uploads", json=body)).json()["id"]
        part = {"files": {"data": b"x"}}
        tried = 0
        for method, path, content in [
            ("GET", "", {}),
            ("GET", "/parts", {}),
            ("POST", "/parts", part),
            ("POST", "/complete", {"json": {"part_ids": ["x"]}}),
            ("POST", "/cancel", {}),
        ]:
            for prefix in (*PREFIXES, "/api/v1"):
                absent = new_id("upload")
                seen = await theirs.request(method, f"{prefix}/uploads/{upload_id}{path}", **content)
                control = await theirs.request(method, f"{prefix}/uploads/{absent}{path}", **content)
                assert seen.status_code == 404, (method, path)
                assert told(seen, upload_id) == told(control, absent)
        channel = await mine.post("/api/v1/notifications/channels", json={"url": "https://good.example/"})
        channel_id = channel.json()["id"]
        for method, path, content in [
            ("GET", "", {}),
            ("PATCH", "", {"json": {"enabled": False}}),
            ("DELETE", "", {}),
            ("POST", "/test", {}),
            ("POST", "/rotate_secret", {}),
            ("GET", "/deliveries", {}),
        ]:
            absent = new_id("channel")
            address = "/api/v1/notifications/channels/{}" + path
            seen = await theirs.request(method, address.format(channel_id), **content)
            control = await theirs.request(method, address.format(absent), **content)
            assert seen.status_code == 404, (method, path)
            assert told(seen, channel_id) == told(control, absent)
        assert (await theirs.get("/api/v1/notifications/channels")).json()["data"] == []
        assert (await mine.get(f"/api/v1/notifications/channels/{channel_id}")).json()["enabled"]
        for prefix in PREFIXES:
            for method, path, real, absent in [
                ("GET", "/files/{}", file_id, new_id("file")),
                ("GET", "/files/{}/content", file_id, new_id("file")),
                ("DELETE", "/files/{}", file_id, new_id("file")),
                ("GET", "/fine_tuning/jobs/{}", job_id, new_id("ftjob")),
                ("DELETE", "/fine_tuning/jobs/{}", job_id, new_id("ftjob")),
                ("POST", "/fine_tuning/jobs/{}/cancel", job_id, new_id("ftjob")),
                ("POST", "/fine_tuning/jobs/{}/pause", job_id, new_id("ftjob")),
                ("POST", "/fine_tuning/jobs/{}/resume", job_id, new_id("ftjob")),
                ("GET", "/fine_tuning/jobs/{}/events", job_id, new_id("ftjob")),
                ("GET", "/fine_tuning/jobs/{}/checkpoints", job_id, new_id("ftjob")),
                ("DELETE", "/fine_tuning/fine_tuned_models/{}", name, "tiny:1234567890::abcdefgh"),
                ("GET", "/models/{}", name, "tiny:1234567890::abcdefgh"),
                ("DELETE", "/models/{}", name, "tiny:1234567890::abcdefgh"),
            ]:
                seen = await theirs.request(method, prefix + path.format(real))
                control = await theirs.request(method, prefix + path.format(absent))
                assert seen.status_code == 404, (method, path)
                assert told(seen, real) == told(control, absent)
                tried += 1
        stream = await theirs.get(f"/api/v1/jobs/{job_id}/events/stream")
        assert stream.status_code == 404
        for param in ("training_file", "validation_file"):
            own = (await world.upload(theirs))["id"]
            body = {"model": "tiny", "training_file": own, param: file_id}
            answer = await theirs.post("/v1/fine_tuning/jobs", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "file_not_found")
        for path in ("/files", "/fine_tuning/jobs"):
            for query in ("", f"?after={file_id}", f"?after={job_id}"):
                listed = (await theirs.get(f"/v1{path}{query}")).json()["data"]
                assert not {file_id, job_id} & {item["id"] for item in listed}
        assert (await mine.get(f"/v1/files/{file_id}")).status_code == 200, "nothing above changed it"
        assert tried == 26


def told(answer: httpx.Response, name: str) -> str:
    """The body without what must differ: the request's id and the name asked for."""
    body = answer.json()
    del body["error"]["request_id"]
    return json.dumps(body, ensure_ascii=False).replace(name[:40], "ID").replace(name, "ID")
