"""The bad-input catalogue for JSON bodies, headers and queries: every case gets its status and code, in both dialects."""

import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.api.world import PREFIXES, World
from tunewright.api.body import MOST_HEADERS

CHAT = "/chat/completions"
JOBS = "/fine_tuning/jobs"
HI = [{"role": "user", "content": "hi"}]
NAME_WITH_65 = "s" * 65


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "messages": HI, **fields}).encode()


def job(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "training_file": "{file}", **fields}).encode()


def message(**fields: Any) -> bytes:
    return chat(messages=[{"role": "user", **fields}])


def json_schema(schema: Any) -> bytes:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}})


def tool(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, **fields}}


# (id, path, body, status on /v1, code, param)
BODIES: list[tuple[str, str, bytes, int, str, str | None]] = [
    ("A05 empty", CHAT, b"", 400, "invalid_json", None),
    ("A05 blank", CHAT, b"  \n", 400, "invalid_json", None),
    ("A05 null", CHAT, b"null", 400, "invalid_body", None),
    ("A05 list", CHAT, b"[]", 400, "invalid_body", None),
    ("A05 text", CHAT, b'"x"', 400, "invalid_body", None),
    ("A05 brace", CHAT, b"{", 400, "invalid_json", None),
    ("A05 trailing", CHAT, b"{} x", 400, "invalid_json", None),
    ("A05 empty job", JOBS, b"", 400, "invalid_json", None),
    ("A07 NaN", CHAT, b'{"temperature":NaN}', 400, "invalid_number", None),
    ("A07 Infinity", CHAT, b'{"temperature":-Infinity}', 400, "invalid_number", None),
    ("A07 1e999", CHAT, b'{"temperature":1e999}', 400, "invalid_number", None),
    ("A07 digits", CHAT, b'{"seed":' + b"1" * 5000 + b"}", 400, "invalid_number", None),
    ("A08", CHAT, b'{"model":"a","model":"b"}', 400, "duplicate_key", None),
    ("A09 deep", CHAT, b'{"x":' + b"[" * 40 + b"]" * 40 + b"}", 400, "nesting_too_deep", None),
    ("A09 very deep", CHAT, b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "nesting_too_deep", None),
    ("A09 wide", JOBS, json.dumps({str(i): 0 for i in range(20_000)}).encode(), 400, "too_many_fields", None),
    ("A09 large chat", CHAT, b'{"model":"' + b"a" * 20 * 2**20 + b'"}', 413, "body_too_large", None),
    (
        "A09 200,000 keys",
        CHAT,
        json.dumps({"x": dict.fromkeys(map(str, range(200_000)), 0)}).encode(),
        400,
        "too_many_fields",
        None,
    ),
    ("A34 large", CHAT, chat(stream=[[0]] * 10**5), 400, "invalid_value", "stream"),
    ("A09 large", JOBS, b'{"model":"' + b"a" * 2**20 + b'"}', 413, "body_too_large", None),
    ("A10 surrogate", CHAT, b'{"model":"\\ud800"}', 400, "invalid_unicode", None),
    ("A10 NUL", CHAT, b'{"model":"\\u0000"}', 400, "invalid_unicode", None),
    ("A10 bytes", CHAT, b'{"model":"\xff"}', 400, "invalid_unicode", None),
    ("A11 missing", CHAT, b'{"messages":[{"role":"user","content":"hi"}]}', 400, "missing_required_parameter", "model"),
    ("A11 null", CHAT, chat(model=None), 400, "missing_required_parameter", "model"),
    ("A11 empty", CHAT, chat(model=""), 400, "missing_required_parameter", "model"),
    ("A11 number", CHAT, chat(model=5), 400, "invalid_value", "model"),
    ("A11 long", CHAT, chat(model="m" * 10_000), 400, "invalid_value", "model"),
    ("A11 job missing", JOBS, b"{}", 400, "missing_required_parameter", "model"),
    ("A11 job path", JOBS, job(model="../x"), 404, "model_not_found", "model"),
    ("A11 job hub", JOBS, job(model="hf://a/b"), 404, "model_not_found", "model"),
    ("A11 job file", JOBS, job(model="file:///etc/passwd"), 404, "model_not_found", "model"),
    ("A13 missing", JOBS, b'{"model":"tiny"}', 400, "missing_required_parameter", "training_file"),
    ("A13 unknown", JOBS, job(training_file="file-x"), 404, "file_not_found", "training_file"),
    ("A14 zero", JOBS, job(hyperparameters={"n_epochs": 0}), 400, "invalid_value", "hyperparameters.n_epochs"),
    ("A14 fraction", JOBS, job(hyperparameters={"n_epochs": 1.5}), 400, "invalid_value", "hyperparameters.n_epochs"),
    ("A14 true", JOBS, job(hyperparameters={"n_epochs": True}), 400, "invalid_value", "hyperparameters.n_epochs"),
    ("A14 huge", JOBS, job(hyperparameters={"n_epochs": 1e9}), 400, "invalid_value", "hyperparameters.n_epochs"),
    *[
        (
            f"A15 {value}",
            JOBS,
            job(hyperparameters={"learning_rate_multiplier": value}),
            400,
            "invalid_value",
            "hyperparameters.learning_rate_multiplier",
        )
        for value in (0, -1, "1e-4", 1e6)
    ],
    *[
        (f"A17 {name}", JOBS, job(hyperparameters={name: value}), 400, code, f"hyperparameters.{name}")
        for name, value, code in (
            ("lora_rank", 257, "invalid_value"),
            ("lora_rank", 7.5, "invalid_value"),
            ("target_modules", ["(a+)+$"] * 10_000, "unknown_parameter"),
        )
    ],
    ("A16 huge", JOBS, job(hyperparameters={"batch_size": 10**9}), 400, "invalid_value", "hyperparameters.batch_size"),
    ("A18 long", JOBS, job(suffix=NAME_WITH_65), 400, "invalid_suffix", "suffix"),
    ("A18 space", JOBS, job(suffix="a b"), 400, "invalid_suffix", "suffix"),
    ("A18 path", JOBS, job(suffix="../x"), 400, "invalid_suffix", "suffix"),
    ("A18 line", JOBS, job(suffix="a\n"), 400, "invalid_suffix", "suffix"),
    ("A18 shell", JOBS, job(suffix="$(id)"), 400, "invalid_suffix", "suffix"),
    ("A19 negative", JOBS, job(seed=-1), 400, "invalid_value", "seed"),
    ("A19 text", JOBS, job(seed="x"), 400, "invalid_value", "seed"),
    ("A20 unknown", JOBS, job(method={"type": "reinforcement"}), 400, "method_not_supported", "method.type"),
    ("A20 list", JOBS, job(method=[1]), 400, "invalid_value", "method"),
    ("A20 no type", JOBS, job(method={}), 400, "missing_required_parameter", "method.type"),
    ("A20 settings", JOBS, job(method={"type": "dpo", "dpo": 5}), 400, "invalid_value", "method.dpo"),
    *[
        (f"A21 {name} {path}", path, body(**{name: True}), 400, "unknown_parameter", name)
        for name in (
            "trust_remote_code",
            "model_path",
            "output_dir",
            "api_base",
            "chat_template",
            "chat_template_kwargs",
        )
        for path, body in ((CHAT, chat), (JOBS, job))
    ],
    *[
        (f"A22 {name}", JOBS, job(**{name: "x"}), 400, "unknown_parameter", name)
        for name in ("status", "id", "tenant_id", "project_id", "fine_tuned_model")
    ],
    ("A23 pairs", JOBS, job(metadata={str(i): "x" for i in range(17)}), 400, "invalid_value", "metadata"),
    ("A23 long key", JOBS, job(metadata={"k" * 65: "x"}), 400, "invalid_value", "metadata"),
    ("A23 long value", JOBS, job(metadata={"a": "x" * 513}), 400, "invalid_value", "metadata"),
    ("A23 number", JOBS, job(metadata={"a": 1}), 400, "invalid_value", "metadata"),
    ("A23 nested", JOBS, job(metadata={"a": {}}), 400, "invalid_value", "metadata"),
    ("A29 missing", CHAT, b'{"model":"tiny"}', 400, "missing_required_parameter", "messages"),
    ("A29 empty", CHAT, chat(messages=[]), 400, "invalid_value", "messages"),
    ("A29 many", CHAT, chat(messages=HI * 10_001), 400, "invalid_value", "messages"),
    ("A29 object", CHAT, chat(messages={}), 400, "invalid_value", "messages"),
    ("A29 item", CHAT, chat(messages=["x"]), 400, "invalid_value", "messages[0]"),
    ("A30 role", CHAT, chat(messages=[*HI, {"role": "boss", "content": ""}]), 400, "invalid_value", "messages[1].role"),
    ("A30 no role", CHAT, chat(messages=[{"content": ""}]), 400, "missing_required_parameter", "messages[0].role"),
    ("A30 odd role", CHAT, chat(messages=[{"role": ["user"]}]), 400, "invalid_value", "messages[0].role"),
    ("A30 content", CHAT, message(content=5), 400, "invalid_value", "messages[0].content"),
    ("A30 null", CHAT, message(content=None), 400, "missing_required_parameter", "messages[0].content"),
    ("A30 no parts", CHAT, message(content=[]), 400, "invalid_value", "messages[0].content"),
    ("A30 part", CHAT, message(content=[{"type": "smell"}]), 400, "invalid_value", "messages[0].content[0].type"),
    (
        "A30 text",
        CHAT,
        message(content=[{"type": "text"}]),
        400,
        "missing_required_parameter",
        "messages[0].content[0].text",
    ),
    (
        "A30 image",
        CHAT,
        message(content=[{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": "AAAA"}}]),
        400,
        "modality_not_supported",
        "messages[0].content[1].type",
    ),
    *[
        (
            f"A38 {url[:12]}",
            CHAT,
            message(content=[{"type": "image_url", "image_url": {"url": url}}]),
            400,
            "modality_not_supported",
            "messages[0].content[0].type",
        )
        for url in ("http://169.254.169.254/x", "file:///etc/passwd", "data:image/png;base64,AAAA")
    ],
    ("A31 zero", CHAT, chat(max_tokens=0), 400, "invalid_value", "max_tokens"),
    ("A31 negative", CHAT, chat(max_tokens=-1), 400, "invalid_value", "max_tokens"),
    ("A31 float", CHAT, chat(max_tokens=1.5), 400, "invalid_value", "max_tokens"),
    ("A32 hot", CHAT, chat(temperature="hot"), 400, "invalid_value", "temperature"),
    ("A32 true", CHAT, chat(temperature=True), 400, "invalid_value", "temperature"),
    ("A32 top_p", CHAT, chat(top_p="1"), 400, "invalid_value", "top_p"),
    ("A33 n", CHAT, chat(n=129), 400, "invalid_value", "n"),
    ("A33 n zero", CHAT, chat(n=0), 400, "invalid_value", "n"),
    ("A33 best_of", CHAT, chat(best_of=4), 400, "unsupported_parameter", "best_of"),
    ("A33 logprobs", CHAT, chat(logprobs=10**6), 400, "invalid_value", "logprobs"),
    ("A33 top_logprobs", CHAT, chat(logprobs=True, top_logprobs=21), 400, "invalid_value", "top_logprobs"),
    ("A33 top alone", CHAT, chat(top_logprobs=5), 400, "invalid_value", "top_logprobs"),
    ("A33 penalty", CHAT, chat(presence_penalty=2.1), 400, "invalid_value", "presence_penalty"),
    ("A33 penalty text", CHAT, chat(frequency_penalty="1"), 400, "invalid_value", "frequency_penalty"),
    ("A33 stops", CHAT, chat(stop=["a"] * 1000), 400, "invalid_value", "stop"),
    ("A33 long stop", CHAT, chat(stop="a" * 2**20), 400, "invalid_value", "stop"),
    ("A33 empty stop", CHAT, chat(stop=""), 400, "invalid_value", "stop"),
    ("A34 text", CHAT, chat(stream="true"), 400, "invalid_value", "stream"),
    ("A34 options", CHAT, chat(stream_options={"include_usage": True}), 400, "invalid_value", "stream_options"),
    ("A35", CHAT, chat(logit_bias={str(i): 1 for i in range(1025)}), 400, "invalid_value", "logit_bias"),
    ("A35 value", CHAT, chat(logit_bias={"5": 1e9}), 400, "invalid_value", "logit_bias.5"),
    ("A35 text", CHAT, chat(logit_bias={"5": "x"}), 400, "invalid_value", "logit_bias.5"),
    ("A35 name", CHAT, chat(logit_bias={"five": 1}), 400, "invalid_value", "logit_bias"),
    ("A35 list", CHAT, chat(logit_bias=[5]), 400, "invalid_value", "logit_bias"),
    ("A36 text", CHAT, chat(response_format="json"), 400, "invalid_value", "response_format"),
    ("A36 schema", CHAT, json_schema(None), 400, "invalid_value", "response_format.json_schema.schema"),
    ("A36 list", CHAT, json_schema([]), 400, "invalid_value", "response_format.json_schema.schema"),
    (
        "A36 large",
        CHAT,
        json_schema({"enum": ["x" * 2**16]}),
        400,
        "invalid_schema",
        "response_format.json_schema.schema",
    ),
    ("A36 unknown", CHAT, chat(response_format={"type": "xml"}), 400, "invalid_value", "response_format.type"),
    ("A37 many", CHAT, chat(tools=[tool()] * 129), 400, "invalid_value", "tools"),
    ("A37 name", CHAT, chat(tools=[tool(name="a b")]), 400, "invalid_value", "tools[0].function.name"),
    ("A37 no name", CHAT, chat(tools=[tool(name=None)]), 400, "missing_required_parameter", "tools[0].function.name"),
    ("A37 parameters", CHAT, chat(tools=[tool(parameters=[])]), 400, "invalid_value", "tools[0].function.parameters"),
    ("A37 type", CHAT, chat(tools=[{"type": "web_search"}]), 400, "invalid_value", "tools[0].type"),
    ("A37 choice", CHAT, chat(tools=[tool()], tool_choice="perhaps"), 400, "invalid_value", "tool_choice"),
    (
        "A37 choice of none",
        CHAT,
        chat(tools=[tool()], tool_choice={"type": "function", "function": {"name": "g"}}),
        400,
        "invalid_value",
        "tool_choice",
    ),
    ("seed", CHAT, chat(seed=2**63), 400, "invalid_value", "seed"),
]
OTHER_STATUS_ON_ZHIPU = {404: 404, 413: 413, 400: 400}


@pytest.fixture
async def file_id(world: World, client: httpx.AsyncClient) -> str:
    return (await world.upload(client))["id"]


@pytest.mark.parametrize(("name", "path", "body", "status", "code", "param"), BODIES, ids=[case[0] for case in BODIES])
async def test_bad_bodies(
    client: httpx.AsyncClient,
    world: World,
    file_id: str,
    name: str,  # the test's id
    path: str,
    body: bytes,
    status: int,
    code: str,
    param: str | None,
) -> None:
    asked = len(world.completions.requests)
    for prefix in PREFIXES:
        answer = await client.post(
            prefix + path,
            content=body.replace(b"{file}", file_id.encode()),
            headers={"Content-Type": "application/json"},
        )
        error = answer.json()["error"]
        assert (answer.status_code, code_of(error), error["param"]) == (status, code, param), answer.text
        assert len(error["message"]) < 400, "at most 40 characters of a value"
        assert not re.search(r"\b(None|True|False)\b|\{'", error["message"]), "Python's spelling"
        assert error["message"] and not re.search(r"\{[a-z_]+\}", error["message"]), "a place was not filled"
        assert b"\n" not in answer.content
        assert "detail" not in answer.json()
    assert len(world.completions.requests) == asked, "nothing reached the engine"


def code_of(error: dict[str, Any]) -> str:
    """Our stable code: `reason` beside the digits of one dialect, `code` in the other."""
    if "reason" in error:
        assert error["code"].isdigit()
        reason = error["reason"]
        return "model_not_found" if reason == "base_not_found" else reason
    return error["code"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (chat(temperature=-0.1), "temperature"),
        (chat(temperature=2.1), "temperature"),
        (chat(top_p=0), "top_p"),
        (chat(top_p=1.1), "top_p"),
        (chat(max_tokens=5, max_completion_tokens=5), "max_completion_tokens"),
        (chat(functions=[]), "functions"),
    ],
)
async def test_the_openai_dialect_refuses_what_the_other_moves_into_range(
    client: httpx.AsyncClient, body: bytes, param: str
) -> None:
    headers = {"Content-Type": "application/json"}
    refused = await client.post("/v1" + CHAT, content=body, headers=headers)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert (await client.post("/api/paas/v4" + CHAT, content=body, headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("application/json; charset=UTF-8", 200),
        ("application/json; charset=utf-16", 415),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("", 415),
        (None, 200),
    ],
)
async def test_a06_content_types(client: httpx.AsyncClient, content_type: str | None, status: int) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = await client.post("/v1" + CHAT, content=chat(), headers=headers)
    assert answer.status_code == status, answer.text


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip", "GZIP"])
@pytest.mark.parametrize("path", [CHAT, JOBS, "/files"])
async def test_f10_encodings(client: httpx.AsyncClient, path: str, encoding: str) -> None:
    answer = await client.post("/v1" + path, content=b"x", headers={"Content-Encoding": encoding})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_encoding")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=-1", "limit"),
        ("limit=x", "limit"),
        ("limit=1.5", "limit"),
        ("limit=", "limit"),
        ("limit=1&limit=0", "limit"),
        ("after=%27%20OR%201=1", "after"),
        ("after=" + "a" * 200, "after"),
    ],
)
async def test_a28_queries(client: httpx.AsyncClient, query: str, param: str) -> None:
    for prefix in PREFIXES:
        for path in ("/files", JOBS):
            answer = await client.get(f"{prefix}{path}?{query}")
            error = answer.json()["error"]
            assert (answer.status_code, code_of(error), error["param"]) == (400, "invalid_value", param)


async def test_a28_order_and_large_limits(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/files?order=up")).json()["error"]["param"] == "order"
    for query in ("limit=1000000", "order=asc", "order=created_at", "after=&limit=5", "purpose=", "page=1"):
        assert (await client.get(f"/v1/files?{query}")).status_code == 200


@pytest.mark.parametrize("key", ["", "k" * 256, "a\tb", "é"])
async def test_a26_idempotency_keys(client: httpx.AsyncClient, key: str) -> None:
    headers = {"Content-Type": "application/json", "Idempotency-Key": key.encode()}  # type: ignore[dict-item]
    answer = await client.post("/v1" + JOBS, content=job(), headers=headers)  # type: ignore[arg-type]
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_idempotency_key")


async def test_a26_a_reused_key_is_refused_for_good(client: httpx.AsyncClient, file_id: str) -> None:
    for prefix, status in zip(PREFIXES, (400, 422), strict=True):
        headers = {"Idempotency-Key": f"key of {prefix}"}
        body = {"model": "tiny", "training_file": file_id}
        first = await client.post(prefix + JOBS, json=body, headers=headers)
        again = await client.post(prefix + JOBS, json=body, headers=headers)
        other = await client.post(prefix + JOBS, json={**body, "seed": 1}, headers=headers)
        assert first.json()["id"] == again.json()["id"]
        assert (other.status_code, code_of(other.json()["error"])) == (status, "idempotency_key_reused")


async def test_a27_conflicts_are_not_worth_a_retry(client: httpx.AsyncClient, file_id: str) -> None:
    for prefix, status in zip(PREFIXES, (400, 409), strict=True):
        created = await client.post(prefix + JOBS, json={"model": "tiny", "training_file": file_id})
        job_id = created.json()["id"]
        resumed = await client.post(f"{prefix}{JOBS}/{job_id}/resume")
        in_use = await client.delete(f"{prefix}/files/{file_id}")
        unfinished = await client.delete(f"{prefix}{JOBS}/{job_id}")
        for answer, code in ((resumed, "invalid_state"), (in_use, "file_in_use"), (unfinished, "job_not_finished")):
            assert (answer.status_code, code_of(answer.json()["error"])) == (status, code)
            assert answer.headers["x-should-retry"] == "false"
        cancelled = await client.post(f"{prefix}{JOBS}/{job_id}/cancel")
        again = await client.post(f"{prefix}{JOBS}/{job_id}/cancel")
        assert cancelled.json() == again.json()
        assert cancelled.json()["status"] == "cancelled"


async def test_a42_routes_and_methods(client: httpx.AsyncClient) -> None:
    for prefix, unknown, wrong in (("/api/paas/v4", "1222", "1212"), ("/v1", "unknown_route", "method_not_allowed")):
        absent = await client.get(prefix + "/nothing")
        assert (absent.status_code, absent.json()["error"]["code"]) == (404, unknown)
        method = await client.put(prefix + "/files/file-x")
        assert (method.status_code, method.json()["error"]["code"]) == (405, wrong)
        assert method.headers["allow"] == "DELETE, GET"
    long = await client.get("/v1/files/" + "a" * 60_000)
    assert (long.status_code, long.json()["error"]["code"]) == (414, "url_too_long")


async def test_a43_headers(client: httpx.AsyncClient) -> None:
    large = await client.get("/v1/models", headers={"X-Large": "a" * 33_000})
    many = await client.get("/v1/models", headers={f"X-{i}": "a" for i in range(MOST_HEADERS + 1)})
    assert (large.status_code, many.status_code) == (431, 431)
    assert large.json()["error"]["code"] == "headers_too_large"


@pytest.mark.parametrize(
    ("sent", "echoed"),
    [
        ("a" * 10_000, None),
        ("req-20261123012344783-q71wpk5ebm3q2b5o3qes", "req-20261123012344783-q71wpk5ebm3q2b5o3qes"),
        ("abc-1.2_X", "abc-1.2_X"),
        ("a" * 65, None),
        ("a b", None),
        ("<script>", None),
    ],
)
async def test_a44_request_ids_are_ours(client: httpx.AsyncClient, sent: str, echoed: str | None) -> None:
    answer = await client.get("/v1/models", headers={"X-Request-Id": sent})
    assert answer.headers["x-request-id"].startswith("req-")
    assert answer.headers.get("x-client-request-id") == echoed


@pytest.mark.parametrize("origin", ["https://evil", "null", "http://localhost"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_a46_no_cross_origin_grant(client: httpx.AsyncClient, world: World, origin: str, method: str) -> None:
    headers = {"Origin": origin, "Access-Control-Request-Method": method}
    async with world.client(None) as browser:  # a preflight carries no key
        preflight = await browser.options("/v1/files/file-x", headers=headers)
    known = await client.options("/v1/files/file-x", headers=headers)
    assert (preflight.status_code, known.status_code) == (401, 405)
    simple = await client.get("/v1/models", headers={"Origin": origin})
    for answer in (preflight, known, simple):
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_a24_integrations_are_ignored_and_shown_as_none(client: httpx.AsyncClient, file_id: str) -> None:
    """No address of a caller is ever dialled: there is nothing in this release that would."""
    for url in ("http://169.254.169.254/", "http://[::ffff:7f00:1]/", "http://user@localhost:22/"):
        body = {"model": "tiny", "training_file": file_id, "integrations": [{"type": "webhook", "url": url}]}
        answer = await client.post("/v1" + JOBS, json=body)
        assert (answer.status_code, answer.json()["integrations"]) == (200, [])
        assert url not in answer.text


async def test_a50_texts_of_callers_stay_texts(
    client: httpx.AsyncClient, file_id: str, log_lines: Callable[[], list[dict[str, Any]]]
) -> None:
    for text in ("<script>alert(1)</script>", "\x1b[31mred", "a\r\nX-Evil: 1", '"}{"x":"'):
        body = {"model": "tiny", "training_file": file_id, "metadata": {"title": text}, "user": text}
        answer = await client.post("/v1" + JOBS, json=body)
        assert (answer.status_code, answer.json()["metadata"]) == (200, {"title": text})
        assert answer.headers["content-type"] == "application/json" and "x-evil" not in answer.headers
    lines = log_lines()  # each parsed as one JSON object
    assert len([line for line in lines if line["event"] == "request"]) == 4
    assert "script" not in str(lines) and "evil" not in str(lines).lower()


async def test_errors_speak_the_callers_language(client: httpx.AsyncClient) -> None:
    chinese = await client.get("/v1/nothing", headers={"Accept-Language": "zh-CN,zh;q=0.9,en;q=0.1"})
    english = await client.get("/v1/nothing", headers={"Accept-Language": "en-US,en"})
    assert chinese.json()["error"]["message"] == "此路径不存在。"
    assert "此路径不存在".encode() in chinese.content, "not escaped"
    assert english.json()["error"]["message"] == "There is nothing at this path."


async def test_a_bug_shows_its_id_and_nothing_else(client: httpx.AsyncClient) -> None:
    for prefix in PREFIXES:
        answer = await client.post(prefix + CHAT, content=chat(messages=[{"role": "user", "content": "bug"}]))
        assert answer.status_code == 500
        assert answer.json()["error"]["request_id"] == answer.headers["x-request-id"]
        assert not [leak for leak in ("secret", "/home", "0x7f", "Runtime", "Traceback") if leak in answer.text]


async def test_bodies_that_no_route_reads_are_not_parsed(client: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "application/json; charset=UTF-8"}
    assert (await client.get("/v1/models", headers=headers)).status_code == 200
    for method, path in (("DELETE", "/v1/files/file-x"), ("POST", f"/v1{JOBS}/ftjob-x/cancel")):
        answer = await client.request(method, path, headers=headers)
        assert answer.status_code == 404
        answer = await client.request(method, path, headers=headers, content=b"{broken")
        assert answer.status_code == 404


async def test_the_schema_is_there_for_callers_and_describes_bodies(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/openapi.json")).json()
    for prefix in PREFIXES:
        for path in (CHAT, JOBS, "/files"):
            assert "requestBody" in schema["paths"][prefix + path]["post"]
