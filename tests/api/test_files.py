"""Uploads: what a form may hold, and that a refused one leaves nothing."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.api.world import PREFIXES, ROW, World

ROWS = (json.dumps(ROW) + "\n").encode()
PURPOSE = (b'form-data; name="purpose"', b"fine-tune")
FILE = (b'form-data; name="file"; filename="a.jsonl"', ROWS)


def form(*parts: tuple[bytes, bytes], boundary: bytes = b"B", end: bytes = b"--B--\r\n") -> bytes:
    body = b"".join(
        b"--" + boundary + b"\r\nContent-Disposition: " + head + b"\r\n\r\n" + content + b"\r\n"
        for head, content in parts
    )
    return body + end


async def post(
    client: httpx.AsyncClient, body: bytes, content_type: str = "multipart/form-data; boundary=B", prefix: str = "/v1"
) -> httpx.Response:
    return await client.post(prefix + "/files", content=body, headers={"Content-Type": content_type})


def left_behind(world: World) -> set[Path]:
    """Every file of the home but the database's."""
    root = world.platform.home.root
    return {path for path in root.rglob("*") if path.is_file() and "tunewright.db" not in path.name}


@pytest.mark.parametrize("prefix", PREFIXES)
async def test_a_files_whole_life(world: World, client: httpx.AsyncClient, prefix: str) -> None:
    answer = await client.post(
        prefix + "/files", data={"purpose": "fine-tune"}, files={"file": ("训练 ü.jsonl", ROWS * 3)}
    )
    file = answer.json()
    assert answer.status_code == 200, file
    assert file == {
        "id": file["id"],
        "object": "file",
        "bytes": len(ROWS) * 3,
        "created_at": file["created_at"],
        "filename": "训练 ü.jsonl",
        "purpose": "fine-tune",
        "status": "processed",
        "status_details": None,
        "samples": 3,
        "kind": "chat",
    }
    one = await client.get(f"{prefix}/files/{file['id']}")
    assert one.json() == file
    content = await client.get(f"{prefix}/files/{file['id']}/content", headers={"Accept": "application/binary"})
    assert content.content == ROWS * 3
    assert content.headers["content-type"] == "application/octet-stream"
    assert content.headers["content-length"] == str(len(ROWS) * 3)
    assert content.headers["content-disposition"].startswith("attachment; filename*=UTF-8''%E8%AE%AD")
    deleted = await client.delete(f"{prefix}/files/{file['id']}")
    assert deleted.json() == {"id": file["id"], "object": "file", "deleted": True}
    assert (await client.delete(f"{prefix}/files/{file['id']}")).status_code == 404
    assert (await client.get(f"{prefix}/files/{file['id']}/content")).status_code == 404


async def test_lists_page_and_end(world: World) -> None:
    key = world.platform.accounts.create_key("lister", world.platform.accounts.create_project("lister").id)
    async with world.client(key) as client:
        made = [(await world.upload(client))["id"] for _ in range(5)]
        for prefix in PREFIXES:
            seen: list[str] = []
            after = ""
            while True:
                listed = (await client.get(f"{prefix}/files?limit=2&after={after}&purpose=fine-tune")).json()
                assert listed["object"] == "list" and isinstance(listed["has_more"], bool)
                if not listed["data"]:
                    assert listed["first_id"] is listed["last_id"] is None
                    break
                assert listed["first_id"] == listed["data"][0]["id"]
                seen += [file["id"] for file in listed["data"]]
                after = listed["last_id"]
            assert seen == sorted(made, reverse=True)
            ascending = (await client.get(f"{prefix}/files?order=asc")).json()
            assert [file["id"] for file in ascending["data"]] == sorted(made)
            assert (await client.get(f"{prefix}/files?purpose=batch")).json()["data"] == []
            assert (await client.get(f"{prefix}/files?limit=5")).json()["has_more"] is False


# (id, body, status on /v1, code, param)
FORMS: list[tuple[str, bytes, int, str, str | None]] = [
    ("F01 no file", form(PURPOSE), 400, "missing_required_parameter", "file"),
    ("F01 no purpose", form(FILE), 400, "missing_required_parameter", "purpose"),
    ("F01 nothing", b"--B--\r\n", 400, "missing_required_parameter", "file"),
    ("F01 file as text", form(PURPOSE, (b'form-data; name="file"', ROWS)), 400, "missing_required_parameter", "file"),
    ("F02 evil", form((PURPOSE[0], b"evil"), FILE), 400, "invalid_purpose", "purpose"),
    ("F02 empty", form((PURPOSE[0], b""), FILE), 400, "invalid_purpose", "purpose"),
    ("F02 list", form((PURPOSE[0], b'["fine-tune"]'), FILE), 400, "invalid_purpose", "purpose"),
    ("F02 10 KB", form((PURPOSE[0], b"p" * 10_000), FILE), 400, "invalid_purpose", "purpose"),
    ("F02 bytes", form((PURPOSE[0], b"\xff"), FILE), 400, "invalid_unicode", "purpose"),
    ("F02 twice", form(PURPOSE, PURPOSE, FILE), 400, "invalid_multipart", None),
    ("F04 empty", b"", 400, "invalid_multipart", None),
    ("F04 other boundary", form(PURPOSE, FILE, boundary=b"C"), 400, "invalid_multipart", None),
    ("F05 two files", form(PURPOSE, FILE, FILE), 400, "invalid_multipart", None),
    ("F05 other file", form(PURPOSE, (b'form-data; name="x"; filename="y"', b"")), 400, "invalid_multipart", None),
    (
        "F05 parts",
        form(PURPOSE, *[(b'form-data; name="%d"' % i, b"") for i in range(9)]),
        400,
        "invalid_multipart",
        None,
    ),
    ("F05 field", form((b'form-data; name="x"', b"x" * 70_000), PURPOSE, FILE), 413, "field_too_large", "x"),
    ("F05 no end", form(PURPOSE, FILE, end=b""), 400, "invalid_multipart", None),
    ("F05 cut", form(PURPOSE, FILE)[:-20], 400, "invalid_multipart", None),
    ("F05 preamble", b"x" * 2**20 + form(PURPOSE, FILE), 400, "invalid_multipart", None),
    (
        "F05 header",
        form((b'form-data; name="x"; y="' + b"z" * 20_000 + b'"', b""), FILE),
        400,
        "invalid_multipart",
        None,
    ),
    ("F05 no name", form((b"form-data", b"x"), PURPOSE, FILE), 400, "invalid_multipart", None),
    ("F05 attachment", form((b'attachment; name="purpose"', b"fine-tune"), FILE), 400, "invalid_multipart", None),
    ("F07 too large", form(PURPOSE, (FILE[0], b"x" * (2**20 + 1))), 413, "file_too_large", "file"),
    ("F09 NUL", form(PURPOSE, (FILE[0].replace(b"a.jsonl", b"a\x00"), ROWS)), 400, "invalid_filename", "file"),
    ("F09 long", form(PURPOSE, (FILE[0].replace(b"a.jsonl", b"a" * 3000), ROWS)), 400, "invalid_filename", "file"),
    ("F09 empty", form(PURPOSE, (FILE[0].replace(b"a.jsonl", b""), ROWS)), 400, "invalid_filename", "file"),
    ("F09 dot", form(PURPOSE, (FILE[0].replace(b"a.jsonl", b".."), ROWS)), 400, "invalid_filename", "file"),
    ("F09 RTL", form(PURPOSE, (FILE[0].replace(b"a.jsonl", "\u202e".encode()), ROWS)), 400, "invalid_filename", "file"),
    ("F09 bytes", form(PURPOSE, (FILE[0].replace(b"a.jsonl", b"\xff"), ROWS)), 400, "invalid_unicode", "filename"),
    ("rows", form(PURPOSE, (FILE[0], b'{"messages":[]}\n')), 400, "", "file"),
]


@pytest.mark.parametrize(("name", "body", "status", "code", "param"), FORMS, ids=[case[0] for case in FORMS])
async def test_bad_forms_leave_nothing(
    client: httpx.AsyncClient, world: World, name: str, body: bytes, status: int, code: str, param: str | None
) -> None:
    before = left_behind(world)
    for prefix in PREFIXES:
        answer = await post(client, body, prefix=prefix)
        error = answer.json()["error"]
        expected = 435 if code == "file_too_large" and prefix != "/v1" else status
        assert answer.status_code == expected, answer.text
        assert error.get("reason", error["code"]) == code or not code
        assert error["param"] == param
        assert left_behind(world) == before


@pytest.mark.parametrize(
    ("content_type", "status", "code"),
    [
        ("application/json", 415, "unsupported_media_type"),
        ("multipart/mixed; boundary=B", 415, "unsupported_media_type"),
        ("", 415, "unsupported_media_type"),
        ("multipart/form-data", 400, "invalid_multipart"),
        ("multipart/form-data; boundary=", 400, "invalid_multipart"),
        ("multipart/form-data; boundary=" + "B" * 71, 400, "invalid_multipart"),
        ("multipart/form-data; boundary=a\tb", 400, "invalid_multipart"),
        ('multipart/form-data; boundary="B "', 400, "invalid_multipart"),
    ],
)
async def test_f03_f04_content_types(client: httpx.AsyncClient, content_type: str, status: int, code: str) -> None:
    answer = await post(client, form(PURPOSE, FILE), content_type)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize(
    "body",
    [
        form(FILE, PURPOSE),
        form(PURPOSE, FILE, (b'form-data; name="extra[a]"', b"x")),
        form(PURPOSE, FILE) + b"epilogue",
        b"\r\n" + form(PURPOSE, FILE),
        form(PURPOSE, (FILE[0] + b"\r\nContent-Type: application/octet-stream", ROWS)),
        form(PURPOSE, FILE, (b'form-data; name="expires_after[seconds]"', b"3600")),
    ],
)
async def test_good_forms_of_every_kind(client: httpx.AsyncClient, body: bytes) -> None:
    answer = await post(client, body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["samples"] == 1


@pytest.mark.parametrize("name", ["../../etc/x", "C:\\x", "x/y/..//x", "\\\\host\\x"])
async def test_f09_paths_become_labels(client: httpx.AsyncClient, name: str) -> None:
    answer = await post(client, form(PURPOSE, (b'form-data; name="file"; filename="' + name.encode() + b'"', ROWS)))
    assert (answer.status_code, answer.json()["filename"]) == (200, "x")


@pytest.mark.parametrize("seconds", ["1", "x", "99999999999", "-3600"])
async def test_expiry_is_checked(client: httpx.AsyncClient, seconds: str) -> None:
    body = form(PURPOSE, FILE, (b'form-data; name="expires_after[seconds]"', seconds.encode()))
    answer = await post(client, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "expires_after[seconds]")


async def test_a_declared_length_over_the_limit_is_refused_unread(client: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=B", "Content-Length": str(10**9)}
    answer = await client.post("/v1/files", content=b"", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "file_too_large")


async def test_a_body_without_length_is_refused_at_the_crossing_byte(client: httpx.AsyncClient) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield form(PURPOSE, FILE, end=b"")[:-2]
        while True:
            sent += 1
            yield b"x" * 65536

    headers = {"Content-Type": "multipart/form-data; boundary=B"}
    answer = await client.post("/v1/files", content=endless(), headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "file_too_large")
    assert sent < 64


async def test_f20_a_full_disk_is_an_answer_in_both_dialects(tmp_path: Path) -> None:
    world = World(tmp_path / "home", min_free_disk_bytes=2**62)
    before = left_behind(world)
    async with world.client() as client:
        for prefix, status, code in (("/v1", 507, "insufficient_storage"), ("/api/paas/v4", 500, "1100")):
            answer = await post(client, form(PURPOSE, FILE), prefix=prefix)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            assert answer.headers["x-should-retry"] == "false"
            assert left_behind(world) == before
    world.platform.storage.close()


async def test_refused_rows_are_listed_with_their_places(client: httpx.AsyncClient) -> None:
    bad = b'{"messages":[{"role":"user","content":"x"},{"role":"boss","content":"y"}]}\n'
    openai = (await post(client, form(PURPOSE, (FILE[0], bad * 3)))).json()["error"]
    assert openai["total"] >= 3
    assert {problem["line"] for problem in openai["problems"]} == {1, 2, 3}
    assert openai["problems"][0]["pointer"] == "/messages/1/role"
    assert "{" not in openai["problems"][0]["message"]
    zhipu = (await post(client, form(PURPOSE, (FILE[0], bad * 3)), prefix="/api/paas/v4")).json()["error"]
    assert "problems" not in zhipu and "line 1" in zhipu["message"]


async def test_a_retried_upload_is_one_file(client: httpx.AsyncClient, world: World) -> None:
    for first, again in (
        ({"x-stainless-retry-count": "0"}, {"x-stainless-retry-count": "1"}),
        ({"Idempotency-Key": "upload"}, {"Idempotency-Key": "upload"}),
    ):
        one = await world.upload(client, headers=first)
        two = await world.upload(client, headers=again)  # another boundary, the same content
        assert one["id"] == two["id"]
    assert (await world.upload(client))["id"] != one["id"]


@pytest.mark.parametrize("range_", ["bytes=9-1", "bytes=" + "0-1," * 5000, "x", "bytes=x-", "bytes=0-1, 3-4"])
async def test_f16_odd_ranges_get_the_whole(client: httpx.AsyncClient, world: World, range_: str) -> None:
    file = await world.upload(client)
    answer = await client.get(f"/v1/files/{file['id']}/content", headers={"Range": range_})
    assert (answer.status_code, answer.content) == (200, ROWS)


@pytest.mark.parametrize("file_id", ["x", "file-", "file-..%2e", "%00", "a" * 5000, "file-x'--", "名"])
async def test_f17_odd_ids_are_404(client: httpx.AsyncClient, file_id: str) -> None:
    for method in ("GET", "DELETE"):
        answer = await client.request(method, f"/v1/files/{file_id}")
        assert answer.status_code == 404
        assert len(answer.content) < 500
