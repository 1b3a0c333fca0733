"""Uploads in parts over HTTP, and downloads of ranges."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.running import Running, until
from tests.api.test_files import form, left_behind
from tests.api.world import PREFIXES, ROW, World
from tunewright.api.ranges import wanted_range
from tunewright.errors import InvalidRequest
from tunewright.ids import new_id

EVERYWHERE = (*PREFIXES, "/api/v1")
ROWS = (json.dumps(ROW) + "\n").encode() * 50
HALF = len(ROWS) // 2
BODY: dict[str, Any] = {"filename": "a.jsonl", "purpose": "fine-tune", "bytes": len(ROWS), "mime_type": "text/jsonl"}
DATA = b'form-data; name="data"; filename="upload"'


async def create(client: httpx.AsyncClient, prefix: str = "/v1", **changes: Any) -> str:
    answer = await client.post(f"{prefix}/uploads", json={**BODY, **changes})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


async def send(
    client: httpx.AsyncClient, upload_id: str, content: bytes, prefix: str = "/v1", **options: Any
) -> httpx.Response:
    return await client.post(f"{prefix}/uploads/{upload_id}/parts", files={"data": ("upload", content)}, **options)


async def send_all(client: httpx.AsyncClient, upload_id: str) -> list[str]:
    return [(await send(client, upload_id, data)).json()["id"] for data in (ROWS[:HALF], ROWS[HALF:])]


async def complete(
    client: httpx.AsyncClient, upload_id: str, part_ids: list[str], prefix: str = "/v1", **more: Any
) -> httpx.Response:
    return await client.post(f"{prefix}/uploads/{upload_id}/complete", json={"part_ids": part_ids, **more})


def code_of(answer: httpx.Response) -> str:
    error = answer.json()["error"]
    return error.get("reason") or error["code"]


@pytest.mark.parametrize("prefix", EVERYWHERE)
async def test_an_uploads_whole_life(client: httpx.AsyncClient, prefix: str) -> None:
    answer = await client.post(f"{prefix}/uploads", json={**BODY, "filename": "训练/ü.jsonl"})
    made = answer.json()
    assert answer.status_code == 200, made
    assert made == {
        "id": made["id"],
        "object": "upload",
        "bytes": len(ROWS),
        "created_at": made["created_at"],
        "expires_at": made["created_at"] + 24 * 3600,
        "filename": "ü.jsonl",
        "purpose": "fine-tune",
        "mime_type": "text/jsonl",
        "status": "pending",
        "file": None,
        "parts": 0,
        "received_bytes": 0,
        "completing": None,
        "on_problems": "refuse",
    }
    address = f"{prefix}/uploads/{made['id']}"
    sha256 = hashlib.sha256(ROWS[HALF:]).hexdigest()
    last = (await send(client, made["id"], ROWS[HALF:], prefix, data={"sha256": sha256})).json()
    assert last == {
        "id": last["id"],
        "object": "upload.part",
        "created_at": last["created_at"],
        "upload_id": made["id"],
        "bytes": len(ROWS) - HALF,
        "sha256": sha256,
    }
    assert (await client.get(address)).json() == {**made, "parts": 1, "received_bytes": len(ROWS) - HALF}
    first = (await send(client, made["id"], ROWS[:HALF], prefix)).json()
    listed = (await client.get(f"{address}/parts?limit=1")).json()
    assert (listed["data"], listed["has_more"]) == ([last], True)
    listed = (await client.get(f"{address}/parts?after={last['id']}")).json()
    assert (listed["data"], listed["has_more"], listed["object"]) == ([first], False, "list")

    md5 = hashlib.md5(ROWS).hexdigest()
    done = (await complete(client, made["id"], [first["id"], last["id"]], prefix, md5=md5)).json()
    file = done["file"]
    assert done == {**made, "status": "completed", "received_bytes": len(ROWS), "file": file}
    assert (file["object"], file["bytes"], file["samples"], file["status"]) == ("file", len(ROWS), 50, "processed")
    assert (await client.get(f"/v1/files/{file['id']}/content")).content == ROWS
    assert (await client.get(address)).json() == done
    again = await complete(client, made["id"], [first["id"], last["id"]], prefix)
    assert again.json() == done, "F13: twice is once"


@pytest.mark.parametrize("prefix", EVERYWHERE)
async def test_f12_parts_that_are_refused(client: httpx.AsyncClient, world: World, prefix: str) -> None:
    upload_id = await create(client)
    before = left_behind(world)
    wrong = "0" * 64

    async def refused(status: int, code: str, content: bytes, **options: Any) -> None:
        answer = await send(client, upload_id, content, prefix, **options)
        assert (answer.status_code, code_of(answer)) == (status, code), answer.text

    await refused(400, "empty_part", b"")
    await refused(400, "checksum_mismatch", b"x", data={"sha256": wrong})
    await refused(400, "checksum_mismatch", b"x", headers={"X-Part-SHA256": wrong})
    await refused(400, "invalid_value", b"x", headers={"X-Part-SHA256": "x"})
    await refused(413, "part_too_large", b"", headers={"Content-Length": str(2**31)})
    await refused(415, "unsupported_media_type", b"x", headers={"Content-Type": "application/json"})
    for body in (form((b'form-data; name="file"; filename="x"', b"x")), form((DATA, b"x"), (DATA, b"x")), b"--B--\r\n"):
        answer = await client.post(
            f"{prefix}/uploads/{upload_id}/parts",
            content=body,
            headers={"Content-Type": "multipart/form-data; boundary=B"},
        )
        assert answer.status_code == 400, answer.text
    assert left_behind(world) == before
    assert (await client.get(f"/v1/uploads/{upload_id}")).json()["parts"] == 0
    good = hashlib.sha256(b"x").hexdigest()
    assert (await send(client, upload_id, b"x", prefix, headers={"X-Part-SHA256": good})).status_code == 200
    absent = await send(client, new_id("upload"), b"x", prefix)
    assert (absent.status_code, code_of(absent)) == (404, "upload_not_found")


async def test_f12_after_expiry(world: World, client: httpx.AsyncClient) -> None:
    upload_id = await create(client)
    (part_id, *_) = await send_all(client, upload_id)
    with world.platform.storage.write() as tx:
        upload = tx.uploads.get(world.project_id, upload_id)
        assert upload is not None
        tx.uploads.change(upload, expires_at=upload.created_at - 1)
    for prefix, status in (("/v1", 410), ("/api/v1", 410), ("/api/paas/v4", 400)):
        for answer in (
            await send(client, upload_id, b"x", prefix),
            await complete(client, upload_id, [part_id], prefix),
            await client.post(f"{prefix}/uploads/{upload_id}/cancel"),
        ):
            assert (answer.status_code, code_of(answer)) == (status, "upload_expired")
        assert (await client.get(f"{prefix}/uploads/{upload_id}")).json()["status"] == "expired"
    await create(client)
    assert not (world.platform.home.uploads / world.project_id / upload_id).exists()


@pytest.mark.parametrize(
    ("part_ids", "more", "code", "param"),
    [
        ([], {}, "invalid_parts", "part_ids"),
        (["A", "B", "A"], {}, "invalid_parts", "part_ids"),
        (["A", "part-x"], {}, "invalid_parts", "part_ids"),
        (["A"], {}, "size_mismatch", "part_ids"),
        (["A", "B"], {"md5": "0" * 32}, "checksum_mismatch", "md5"),
        (["A", "B"], {"md5": "x"}, "invalid_value", "md5"),
        (["A", 1], {}, "invalid_value", "part_ids[1]"),
        (None, {}, "invalid_value", "part_ids"),
        ("A", {}, "invalid_value", "part_ids"),
    ],
)
async def test_f13_completions_that_are_refused(
    client: httpx.AsyncClient, world: World, part_ids: Any, more: dict[str, Any], code: str, param: str
) -> None:
    upload_id = await create(client)
    names = dict(zip("AB", await send_all(client, upload_id), strict=True))
    before = left_behind(world)
    asked: Any = [names.get(each, each) for each in part_ids] if isinstance(part_ids, list) else part_ids
    answer = await complete(client, upload_id, asked, **more)
    assert (answer.status_code, code_of(answer), answer.json()["error"]["param"]) == (400, code, param), answer.text
    assert left_behind(world) == before
    assert (await complete(client, upload_id, list(names.values()))).status_code == 200


async def test_wrong_rows_are_listed_as_for_any_file(client: httpx.AsyncClient) -> None:
    bad = b'{"messages":[]}\n'
    upload_id = await create(client, bytes=len(bad))
    part_id = (await send(client, upload_id, bad)).json()["id"]
    answer = await complete(client, upload_id, [part_id])
    assert answer.status_code == 400 and answer.json()["error"]["problems"][0]["line"] == 1
    upload_id = await create(client, bytes=len(bad), on_problems="keep")
    part_id = (await send(client, upload_id, bad)).json()["id"]
    assert (await complete(client, upload_id, [part_id])).json()["file"]["status"] == "error"


@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"filename": None}, 400, "invalid_value", "filename"),
        ({"filename": "\u202e"}, 400, "invalid_filename", "file"),
        ({"purpose": "evil"}, 400, "invalid_purpose", "purpose"),
        ({"purpose": ["fine-tune"]}, 400, "invalid_value", "purpose"),
        ({"bytes": 0}, 400, "invalid_value", "bytes"),
        ({"bytes": -1}, 400, "invalid_value", "bytes"),
        ({"bytes": True}, 400, "invalid_value", "bytes"),
        ({"bytes": 1.5}, 400, "invalid_value", "bytes"),
        ({"bytes": 2**63}, 413, "file_too_large", "bytes"),
        ({"mime_type": ""}, 400, "invalid_value", "mime_type"),
        ({"on_problems": "x"}, 400, "invalid_value", "on_problems"),
        ({"expires_after": {"anchor": "created_at", "seconds": 1}}, 400, "invalid_value", "expires_after.seconds"),
    ],
)
async def test_creates_that_are_refused(
    client: httpx.AsyncClient, changes: dict[str, Any], status: int, code: str, param: str
) -> None:
    answer = await client.post("/v1/uploads", json={**BODY, **changes})
    assert (answer.status_code, code_of(answer), answer.json()["error"]["param"]) == (status, code, param), answer.text


async def test_f15_open_uploads_are_counted(tmp_path: Path) -> None:
    world = World(tmp_path / "home", max_open_uploads=2, max_upload_parts=1)
    async with world.client() as client, world.client(world.other_key) as other:
        upload_id = await create(client)
        await create(client)
        for prefix in EVERYWHERE:
            answer = await client.post(f"{prefix}/uploads", json=BODY)
            assert (answer.status_code, code_of(answer)) == (429, "too_many_uploads")
            assert answer.headers["x-should-retry"] == "false", "the SDK must not wait for what only its user can end"
        await create(other)
        assert (await send(client, upload_id, b"x")).status_code == 200
        answer = await send(client, upload_id, b"x")
        assert (answer.status_code, code_of(answer)) == (400, "too_many_parts")
        cancelled = (await client.post(f"/v1/uploads/{upload_id}/cancel")).json()
        assert (cancelled["status"], cancelled["parts"]) == ("cancelled", 0)
        assert (await client.post(f"/v1/uploads/{upload_id}/cancel")).json() == cancelled
        answer = await complete(client, upload_id, ["x"])
        assert (answer.status_code, code_of(answer)) == (409, "upload_not_pending")
        await create(client)
    world.platform.storage.close()


async def test_a_full_disk_is_told_at_the_create(tmp_path: Path) -> None:
    world = World(tmp_path / "home", min_free_disk_bytes=2**62)
    async with world.client() as client:
        for prefix, status in (("/v1", 507), ("/api/paas/v4", 500)):
            answer = await client.post(f"{prefix}/uploads", json=BODY)
            assert (answer.status_code, code_of(answer)) == (status, "insufficient_storage")
    world.platform.storage.close()


async def test_a_retried_create_is_one_upload(client: httpx.AsyncClient) -> None:
    made = {(await client.post("/v1/uploads", json=BODY, headers={"Idempotency-Key": "up"})).json()["id"] for _ in "12"}
    assert len(made) == 1


async def test_f14_and_a_cut_part_leaves_its_upload_open(running: Running, client: httpx.AsyncClient) -> None:
    """A client that vanishes in the middle of a part: meanwhile nobody can complete, afterwards the rest can come."""
    upload_id = await create(client)
    first = (await send(client, upload_id, ROWS[:HALF])).json()["id"]
    world = running.world
    before = left_behind(world)
    reader, writer = await running.connect()
    head = running.head(
        "POST",
        f"/v1/uploads/{upload_id}/parts",
        "Content-Type: multipart/form-data; boundary=B",
        "Content-Length: 1000000",
    )
    writer.write(head + form((DATA, ROWS[HALF:]), end=b""))
    await writer.drain()
    await until(lambda: left_behind(world) != before)
    answer = await complete(client, upload_id, [first])
    assert (answer.status_code, code_of(answer)) == (409, "part_in_progress")
    assert answer.headers["x-should-retry"] == "true"
    writer.close()
    await until(lambda: left_behind(world) == before)
    assert [part["id"] for part in (await client.get(f"/v1/uploads/{upload_id}/parts")).json()["data"]] == [first]
    second = (await send(client, upload_id, ROWS[HALF:])).json()["id"]
    assert (await complete(client, upload_id, [first, second])).json()["status"] == "completed"
    del reader


async def test_a_part_without_length_is_refused_at_the_crossing_byte(client: httpx.AsyncClient) -> None:
    upload_id = await create(client)
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield form((DATA, b"x"), end=b"")[:-2]
        while True:
            sent += 1
            yield b"x" * 2**20

    headers = {"Content-Type": "multipart/form-data; boundary=B"}
    answer = await client.post(f"/v1/uploads/{upload_id}/parts", content=endless(), headers=headers)
    assert (answer.status_code, code_of(answer)) == (413, "part_too_large")
    assert sent <= 66


@pytest.mark.parametrize("upload_id", ["x", "upload-..%2e", "%00", "a" * 5000, "upload-x'--", "名"])
async def test_odd_ids_are_404(client: httpx.AsyncClient, upload_id: str) -> None:
    for method, path in (("GET", ""), ("GET", "/parts"), ("POST", "/cancel")):
        answer = await client.request(method, f"/v1/uploads/{upload_id}{path}")
        assert answer.status_code == 404
        assert len(answer.content) < 500


# (header, status, what comes of ten bytes)
RANGES: list[tuple[str, int, slice]] = [
    ("bytes=0-1", 206, slice(0, 2)),
    ("bytes=3-", 206, slice(3, 10)),
    ("bytes=-4", 206, slice(6, 10)),
    ("bytes=-99", 206, slice(0, 10)),
    ("bytes=9-9", 206, slice(9, 10)),
    ("bytes=5-99999999999999999", 206, slice(5, 10)),
    (" Bytes = 1 - 2 ", 206, slice(1, 3)),
    ("bytes=-0", 416, slice(0)),
    ("bytes=10-", 416, slice(0)),
    ("bytes=10-20", 416, slice(0)),
    ("bytes=9-1", 200, slice(None)),
    ("bytes=-", 200, slice(None)),
    ("bytes=x-y", 200, slice(None)),
    ("bytes=٣-", 200, slice(None)),
    ("lines=0-1", 200, slice(None)),
    ("bytes=0-1,3-4", 200, slice(None)),
    ("bytes=" + "0-1," * 10_000, 200, slice(None)),
    ("bytes=" + "9" * 30 + "-", 200, slice(None)),
    ("", 200, slice(None)),
]


@pytest.mark.parametrize(("header", "status", "expected"), RANGES, ids=[header[:20] for header, _, _ in RANGES])
def test_ranges(header: str, status: int, expected: slice) -> None:
    content = b"0123456789"
    if status == 416:
        with pytest.raises(InvalidRequest) as caught:
            wanted_range(header, len(content))
        assert caught.value.code == "range_not_satisfiable"
        return
    found = wanted_range(header, len(content))
    assert (found is None) is (status == 200)
    start, end = found or (0, len(content))
    assert content[start:end] == content[expected]


async def test_a_download_that_was_cut_goes_on(client: httpx.AsyncClient, world: World) -> None:
    file = await world.upload(client)
    for prefix in PREFIXES:
        address = f"{prefix}/files/{file['id']}/content"
        whole = await client.get(address)
        assert whole.headers["accept-ranges"] == "bytes"
        assert whole.headers["etag"] == f'"{hashlib.sha256(whole.content).hexdigest()}"'
        size = len(whole.content)
        rest = await client.get(address, headers={"Range": "bytes=5-", "If-Range": whole.headers["etag"]})
        assert (rest.status_code, rest.content) == (206, whole.content[5:])
        assert rest.headers["content-range"] == f"bytes 5-{size - 1}/{size}"
        assert rest.headers["content-length"] == str(size - 5)
        other = await client.get(address, headers={"Range": "bytes=5-", "If-Range": '"other"'})
        assert (other.status_code, other.content) == (200, whole.content)
        beyond = await client.get(address, headers={"Range": f"bytes={size}-"})
        assert (beyond.status_code, code_of(beyond)) == (416, "range_not_satisfiable")
        assert beyond.headers["content-range"] == f"bytes */{size}"


async def test_parts_in_parallel(client: httpx.AsyncClient) -> None:
    upload_id = await create(client)
    size = len(ROWS) // 5
    pieces = [ROWS[at : at + size] for at in range(0, len(ROWS), size)]
    answers = await asyncio.gather(*[send(client, upload_id, piece) for piece in pieces])
    done = await complete(client, upload_id, [answer.json()["id"] for answer in answers])
    assert done.json()["file"]["samples"] == 50
