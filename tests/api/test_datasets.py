"""Datasets: report, rows, problems, versions, through the real application."""

import asyncio
import csv
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.world import PREFIXES, ROW, World
from tunewright.datasets import intake
from tunewright.datasets.report import Report

GOOD = json.dumps(ROW, ensure_ascii=False)


def row(text: str, answer: str = "hello") -> str:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}, ensure_ascii=False)


def lines(*rows: str) -> bytes:
    return "".join(each + "\n" for each in rows).encode()


BAD = '{"messages":[{"role":"user","content":"x"},{"role":"boss","content":"y"}]}'
MIXED = lines(GOOD, BAD, "{not json}", row("second"))


async def create(client: httpx.AsyncClient, data: bytes, status: int = 201, **fields: str) -> dict[str, Any]:
    answer = await client.post("/api/v1/datasets", data=fields, files={"file": ("rows.jsonl", data)})
    assert answer.status_code == status, answer.text
    return answer.json()


async def get(client: httpx.AsyncClient, path: str, **options: Any) -> dict[str, Any]:
    answer = await client.get(f"/api/v1/datasets/{path}", **options)
    assert answer.status_code == 200, answer.text
    return answer.json()


def left_behind(world: World) -> set[Path]:
    root = world.platform.home.root
    return {path for path in root.rglob("*") if path.is_file() and "tunewright.db" not in path.name}


async def test_a_good_dataset(client: httpx.AsyncClient) -> None:
    made = await create(client, lines(GOOD, row("你好")))
    assert (made["object"], made["kind"], made["rows"], made["status"]) == ("dataset", "chat", 2, "processed")
    assert (made["purpose"], made["version"], made["parent_id"], made["origin"]) == ("fine-tune", 1, None, {})
    assert made["report"]["errors"] == 0
    assert await get(client, made["id"]) == made
    file = (await client.get(f"/v1/files/{made['id']}")).json()
    assert (file["status"], file["status_details"], file["samples"]) == ("processed", None, 2)


async def test_rows_with_errors_are_kept_and_told_in_the_callers_language(client: httpx.AsyncClient) -> None:
    made = await create(client, MIXED)
    assert (made["status"], made["rows"]) == ("error", 4)
    report = made["report"]
    assert (report["errors"], report["bad_rows"]) == (2, 2)
    assert {"invalid_role", "invalid_json"} <= {group["code"] for group in report["groups"]}
    chinese = await get(client, made["id"], headers={"Accept-Language": "zh"})
    for ours, theirs in zip(report["problems"], chinese["report"]["problems"], strict=True):
        assert ours["messages"] == theirs["messages"]
        assert (ours["message"], theirs["message"]) == (ours["messages"]["en"], ours["messages"]["zh"])
    for prefix in PREFIXES:
        file = (await client.get(f"{prefix}/files/{made['id']}")).json()
        assert file["status"] == "error"
        assert file["status_details"].startswith("2 of 4 rows can't be trained on (2 errors); the first: line 2")


@pytest.mark.parametrize("prefix", PREFIXES)
async def test_files_keep_wrong_rows_only_when_asked_to(client: httpx.AsyncClient, world: World, prefix: str) -> None:
    async def upload(**more: str) -> httpx.Response:
        form = {"purpose": "fine-tune", **more}
        return await client.post(f"{prefix}/files", data=form, files={"file": ("a.jsonl", MIXED)})

    before = left_behind(world)
    for fields in ({}, {"on_problems": "refuse"}):
        assert (await upload(**fields)).status_code == 400
    odd = await upload(on_problems="ignore")
    assert (odd.status_code, odd.json()["error"]["param"]) == (400, "on_problems")
    assert left_behind(world) == before
    kept = await upload(on_problems="keep")
    assert (kept.status_code, kept.json()["status"]) == (200, "error")
    shown = await client.get(f"{prefix}/files/{kept.json()['id']}", headers={"Accept-Language": "zh"})
    assert "行" in shown.json()["status_details"]


@pytest.mark.parametrize(
    ("data", "code"), [(b"", "file_empty"), (b"PAR1xxxx", "unsupported_format"), (b"\n\n", "file_empty")]
)
async def test_what_no_mend_of_rows_helps_is_refused(
    client: httpx.AsyncClient, world: World, data: bytes, code: str
) -> None:
    before = left_behind(world)
    answer = await create(client, data, status=400)
    assert answer["error"]["code"] == code
    assert left_behind(world) == before


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"purpose": "evil"}, 400, "invalid_purpose", "purpose"),
        ({"purpose": "batch"}, 400, "invalid_purpose", "purpose"),
        ({"on_problems": "keep"}, 400, "unknown_parameter", "on_problems"),
        ({"x" * 500: "keep"}, 400, "unknown_parameter", "x" * 40 + "…"),
        ({"parent_id": "file-x"}, 404, "file_not_found", "parent_id"),
    ],
)
async def test_bad_fields_of_the_form(
    client: httpx.AsyncClient, world: World, fields: dict[str, str], status: int, code: str, param: str
) -> None:
    before = left_behind(world)
    error = (await create(client, lines(GOOD), status=status, **fields))["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert left_behind(world) == before


async def test_a_large_upload_is_taken_and_a_larger_one_refused(client: httpx.AsyncClient, world: World) -> None:
    big = lines(*[row("x" * 1000)] * 900)
    assert len(big) < world.settings.max_file_bytes
    made = await create(client, big)
    assert made["bytes"] == len(big)
    assert (await create(client, big * 2, status=413))["error"]["code"] == "file_too_large"


async def test_lists_filter_and_page(world: World) -> None:
    key = world.platform.accounts.create_key("lister", world.platform.accounts.create_project("lister").id)
    async with world.client(key) as client:
        good = [(await create(client, lines(row(str(i)))))["id"] for i in range(3)]
        bad = (await create(client, MIXED, purpose="fine-tune-function-calling"))["id"]
        form = {"data": {"purpose": "batch"}, "files": {"file": ("b.jsonl", b'{"a":1}\n')}}
        batch = (await client.post("/v1/files", **form)).json()["id"]
        seen, after = [], ""
        while True:
            listed = (await client.get(f"/api/v1/datasets?limit=2&after={after}")).json()
            seen += [each["id"] for each in listed["data"]]
            if not listed["has_more"]:
                break
            after = listed["last_id"]
        assert seen == [bad, *reversed(good)], "the newest first; a batch file is no dataset"
        assert "problems" not in listed["data"][0]["report"]

        async def ids(query: str) -> list[str]:
            return [each["id"] for each in (await client.get(f"/api/v1/datasets?{query}")).json()["data"]]

        assert await ids("status=error") == [bad] == await ids("purpose=fine-tune-function-calling")
        assert await ids("kind=chat&status=processed") == [*reversed(good)]
        assert await ids("kind=preference") == []
        assert (await client.get(f"/api/v1/datasets/{batch}")).status_code == 404
        for query in ("status=x", "kind=x", "purpose=batch", "limit=0", "after=%20", "after=nothing"):
            answer = await client.get(f"/api/v1/datasets?{query}")
            assert answer.status_code == 400, query
            assert answer.json()["error"]["param"] == query.partition("=")[0]


async def all_rows(client: httpx.AsyncClient, file_id: str, **query: Any) -> tuple[list[dict[str, Any]], int]:
    """Every row, and how many pages there were."""
    found, pages, after = [], 0, None
    while True:
        params = {**query, "after": after} if after else query
        page = await get(client, f"{file_id}/rows", params=params)
        assert page["has_more"] == (page["next_after"] is not None)
        found += page["data"]
        pages += 1
        if not page["has_more"]:
            return found, pages
        after = page["next_after"]


async def test_rows_are_read_page_by_page(client: httpx.AsyncClient) -> None:
    data = "\ufeff".encode() + lines(row("0"), "", *[row(str(i)) for i in range(1, 10)]).replace(b"\n", b"\r\n")[:-2]
    file_id = (await create(client, data))["id"]
    for limit in (1, 4, 10, 200):
        found, _ = await all_rows(client, file_id, limit=limit)
        assert [each["line"] for each in found] == [1, *range(3, 12)]
        assert [each["row"]["messages"][0]["content"] for each in found] == [str(i) for i in range(10)]
    assert {problem["code"] for problem in found[0]["problems"]} == {"crlf"}


async def test_a_row_comes_with_its_problems_and_odd_lines_as_text(tmp_path: Path) -> None:
    world = World(tmp_path / "home", max_line_bytes=1000)
    async with world.client() as client:
        await _look_at_odd_lines(client)
    world.platform.storage.close()


async def _look_at_odd_lines(client: httpx.AsyncClient) -> None:
    file_id = (await create(client, MIXED + lines(row("x" * 300_000), row("last"))))["id"]
    found, _ = await all_rows(client, file_id)
    assert [each["line"] for each in found] == [1, 2, 3, 4, 5, 6]
    assert [each["row"] is None for each in found] == [False, False, True, False, True, False]
    assert found[2]["text"] == "{not json}" and found[4]["text"] is None
    codes = [[problem["code"] for problem in each["problems"]] for each in found]
    assert codes == [[], ["invalid_role"], ["invalid_json"], [], ["line_too_long"], []]
    only, _ = await all_rows(client, file_id, problems="only", limit=2)
    assert only == [found[1], found[2], found[4]]
    assert (await all_rows(client, file_id, problems="only", search="BOSS"))[0] == []
    assert [each["line"] for each in (await all_rows(client, file_id, problems="only", search="Y"))[0]] == [2]


async def test_search_looks_at_texts_in_whatever_case_and_spelling(client: httpx.AsyncClient) -> None:
    escaped = json.dumps({"messages": [{"role": "user", "content": "训练"}, {"role": "assistant", "content": "é"}]})
    texts = lines(row("Straße"), escaped, row('a "quoted"\nword'), row("训练 数据"), "no json: needle")
    file_id = (await create(client, texts))["id"]

    async def hits(text: str) -> list[int]:
        return [each["line"] for each in (await all_rows(client, file_id, search=text, limit=1))[0]]

    assert await hits("STRASSE") == [1]
    assert await hits("训练") == [2, 4]
    assert await hits("É") == [2]
    assert await hits('A "QUOTED"\nw') == [3]
    assert await hits("needle") == [5]
    assert await hits("content") == await hits("nword") == [], "names of fields and halves of escapes are no texts"
    assert (await client.get(f"/api/v1/datasets/{file_id}/rows", params={"search": "x" * 201})).status_code == 400


@pytest.mark.parametrize("after", ["x", "r1-2", "r1-999999999", "r1-0", "p1", "r-1", "file-1", "r1-" + "9" * 15])
async def test_odd_cursors_are_refused(client: httpx.AsyncClient, after: str) -> None:
    file_id = (await create(client, MIXED))["id"]
    for query in (f"after={after}", f"after={after}&search=x"):
        answer = await client.get(f"/api/v1/datasets/{file_id}/rows?{query}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_cursor")
    answer = await client.get(f"/api/v1/datasets/{file_id}/rows?problems=only&after=r1-{len(lines(GOOD))}")
    assert answer.status_code == 400, "a cursor of the other list"


async def test_all_problems_as_json_lines_and_as_a_table(client: httpx.AsyncClient) -> None:
    many = lines(*[BAD] * 150, *[GOOD] * 2, "=1+1")
    file_id = (await create(client, many))["id"]
    answer = await client.get(f"/api/v1/datasets/{file_id}/problems")
    assert "rows.jsonl-problems.jsonl" in answer.headers["content-disposition"]
    problems = [json.loads(line) for line in answer.text.splitlines()]
    report = (await get(client, file_id))["report"]
    assert len(report["problems"]) == 100 < len(problems) == report["errors"] + report["warnings"]
    assert [problem["line"] or 0 for problem in problems] == sorted(problem["line"] or 0 for problem in problems)
    by_code = (await client.get(f"/api/v1/datasets/{file_id}/problems?code=invalid_role&severity=error")).text
    assert len(by_code.splitlines()) == 150
    assert (await client.get(f"/api/v1/datasets/{file_id}/problems?code=x")).text == ""
    table = await client.get(f"/api/v1/datasets/{file_id}/problems?format=csv", headers={"Accept-Language": "zh"})
    assert table.headers["content-type"] == "text/csv; charset=utf-8"
    cells = list(csv.DictReader(io.StringIO(table.text)))
    assert [cell["message"] for cell in cells] == [problem["messages"]["zh"] for problem in problems]
    assert not [value for cell in cells for value in cell.values() if value.startswith(("=", "+", "-", "@"))]
    assert (await client.get(f"/api/v1/datasets/{file_id}/problems?format=xls")).status_code == 400


async def test_deletion_takes_the_report_along(client: httpx.AsyncClient, world: World) -> None:
    before = left_behind(world)
    file_id = (await create(client, lines(*[BAD] * 150)))["id"]
    assert {path.parent.parent.name for path in left_behind(world) - before} == {"files", "reports"}
    assert (await client.delete(f"/v1/files/{file_id}")).status_code == 200
    assert left_behind(world) == before
    for path in ("", "/rows", "/problems", "/versions"):
        assert (await client.get(f"/api/v1/datasets/{file_id}{path}")).status_code == 404


async def test_a_retried_create_is_one_dataset(client: httpx.AsyncClient) -> None:
    async def send(data: bytes, key: str) -> httpx.Response:
        headers = {"Idempotency-Key": key}
        return await client.post("/api/v1/datasets", files={"file": ("a.jsonl", data)}, headers=headers)

    first, again = [(await send(MIXED, "one")).json() for _ in range(2)]
    assert first == again
    assert (await send(lines(GOOD), "one")).status_code == 422


async def test_nobody_else_sees_a_dataset(client: httpx.AsyncClient, world: World) -> None:
    file_id = (await create(client, MIXED))["id"]
    async with world.client(world.other_key) as theirs:
        for method, path, body in [
            ("GET", "", None),
            ("GET", "/rows", None),
            ("GET", "/problems", None),
            ("GET", "/versions", None),
            ("POST", "/split", {}),
        ]:
            answer = await theirs.request(method, f"/api/v1/datasets/{file_id}{path}", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "file_not_found"), path
        assert (await create(theirs, lines(GOOD), status=404, parent_id=file_id))["error"]["param"] == "parent_id"
        assert file_id not in (await theirs.get("/api/v1/datasets?limit=100")).text


async def test_a_client_that_leaves_ends_the_check(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain ASGI, because this client must be able to hang up."""
    begun, ended = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slow(data: Path, purpose: str, limits: Any, *, progress: Callable[[int, int], None], **_rest: Any) -> Report:
        loop.call_soon_threadsafe(begun.set)
        try:
            while True:
                progress(0, 1)
                ended.wait(0.01)
        finally:
            ended.set()

    monkeypatch.setattr(intake, "check_in_child", slow)
    request = httpx.Request("POST", "http://localhost/api/v1/datasets", files={"file": ("a.jsonl", lines(GOOD))})
    messages = [{"type": "http.request", "body": request.read(), "more_body": False}]
    before = left_behind(world)

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await begun.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError("nobody is there to answer")

    headers = [(name.lower(), value) for name, value in request.headers.raw]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/api/v1/datasets",
        "raw_path": b"/api/v1/datasets",
        "query_string": b"",
        "headers": [*headers, (b"authorization", f"Bearer {world.key}".encode())],
        "http_version": "1.1",
    }
    await asyncio.wait_for(world.app(scope, receive, send), 60)
    assert ended.is_set()
    assert left_behind(world) == before
