"""A create that is sent twice happens once; one that only looks alike happens again."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tunewright.accounts import idempotency
from tunewright.accounts.idempotency import IdempotencyKey, find_earlier, forget_expired, from_headers, remember
from tunewright.accounts.records import Project
from tunewright.errors import IdempotencyMismatch, InvalidRequest
from tunewright.storage import Storage

ROUTE = "POST /v1/fine_tuning/jobs"
BODY = b'{"model": "m"}'


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    storage = Storage(f"sqlite:///{tmp_path / 'test.db'}")
    storage.migrate()
    with storage.write() as tx:
        for number in ("1", "2"):
            tx.projects.insert(Project(id=f"proj-{number}", number=number * 10, name="", created_at=0))
    yield storage
    storage.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    now = [1_800_000_000]
    monkeypatch.setattr(idempotency, "wall_s", lambda: now[0])
    return now


def request(
    key: str | None = None, retry: str | None = None, *, key_id: str = "key-1", route: str = ROUTE, body: bytes = BODY
) -> IdempotencyKey:
    return from_headers(idempotency_key=key, retry_count=retry, key_id=key_id, route=route, body=body)


def make(storage: Storage, resource_id: str, idem: IdempotencyKey, project_id: str = "proj-1") -> None:
    with storage.write() as tx:
        remember(tx, project_id, ROUTE, idem, resource_id)


def earlier(storage: Storage, idem: IdempotencyKey, project_id: str = "proj-1", route: str = ROUTE) -> str | None:
    with storage.read() as tx:
        return find_earlier(tx, project_id, route, idem)


def test_the_same_key_finds_the_first_result_for_a_day(storage: Storage, clock: list[int]) -> None:
    make(storage, "job-1", request("k"))
    assert earlier(storage, request("k")) == "job-1"
    assert earlier(storage, request('"k"')) == "job-1"
    assert earlier(storage, request("other")) is None
    clock[0] += 24 * 3600
    assert earlier(storage, request("k")) == "job-1"
    clock[0] += 1
    assert earlier(storage, request("k")) is None
    make(storage, "job-2", request("k", body=b"{}"))
    assert earlier(storage, request("k", body=b"{}")) == "job-2"


def test_the_same_key_with_another_request_is_refused(storage: Storage) -> None:
    make(storage, "job-1", request("k"))
    with pytest.raises(IdempotencyMismatch) as caught:
        earlier(storage, request("k", body=b"{}"))
    assert caught.value.code == "idempotency_key_reused"
    assert earlier(storage, request("k", key_id="key-2")) == "job-1"  # any key of the project may retry


def test_keys_of_other_projects_and_routes_are_others(storage: Storage) -> None:
    make(storage, "job-1", request("k"))
    assert earlier(storage, request("k"), project_id="proj-2") is None
    assert earlier(storage, request("k"), route="POST /v1/files") is None


def test_a_retry_without_key_finds_the_first_result_for_two_minutes(storage: Storage, clock: list[int]) -> None:
    make(storage, "job-1", request())
    assert earlier(storage, request(retry="1")) == "job-1"
    assert earlier(storage, request(retry="2")) == "job-1"
    assert earlier(storage, request()) is None, "the same request on purpose is a new one"
    assert earlier(storage, request(retry="0")) is None
    assert earlier(storage, request(retry="1", body=b"{}")) is None
    assert earlier(storage, request(retry="1", key_id="key-2")) is None
    assert earlier(storage, request(retry="1"), project_id="proj-2") is None
    clock[0] += 121
    assert earlier(storage, request(retry="1")) is None


def test_a_retry_finds_the_newest_of_equal_requests(storage: Storage) -> None:
    make(storage, "job-1", request())
    make(storage, "job-2", request())
    assert earlier(storage, request(retry="1")) == "job-2"


def test_a_key_of_the_body_shape_is_no_body(storage: Storage) -> None:
    make(storage, "job-1", request())
    assert earlier(storage, request(f"body:{request().body_sha256}")) is None


@pytest.mark.parametrize("retry", ["-1", "1.0", "x", "", " 1", "1" * 400, "\u0661", "00"])
def test_odd_retry_counts_are_no_retries(retry: str) -> None:
    assert request(retry=retry).is_retry is False


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("a", "a"),
        ("a" * 255, "a" * 255),
        ('"a"', "a"),
        ('"a b"', "a b"),
        (r'"a\"b\\c"', 'a"b\\c'),
        ('"', '"'),
        ('"a"b"', '"a"b"'),
        ("8e03978e-40d5-43e8-bc93-6894a57f9324", "8e03978e-40d5-43e8-bc93-6894a57f9324"),
    ],
)
def test_key_spellings(header: str, key: str) -> None:
    assert request(header).key == key


@pytest.mark.parametrize("header", ["", '""', "a" * 256, '"' + "a" * 256 + '"', "a\tb", "a\n", "é", "\x7f", "密", "\0"])
def test_refused_keys(header: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        request(header)
    assert caught.value.code == "invalid_idempotency_key"


def test_uploads_are_told_apart_by_content() -> None:
    upload = request("k", body=b"")
    same = upload.with_content("a.jsonl", "fine-tune", "00ff")
    assert same == upload.with_content("a.jsonl", "fine-tune", "00ff")
    assert same.key == "k"
    for other in (
        upload.with_content("b.jsonl", "fine-tune", "00ff"),
        upload.with_content("a.jsonl", "fine-tune", "00fe"),
        upload.with_content("a.jsonlfine-tune", "", "00ff"),
    ):
        assert other.fingerprint != same.fingerprint
        assert other.body_sha256 != same.body_sha256


def test_fifty_at_once_make_one(storage: Storage) -> None:
    def create(number: int) -> str:
        with storage.write() as tx:
            found = find_earlier(tx, "proj-1", ROUTE, request("k"))
            if found is not None:
                return found
            remember(tx, "proj-1", ROUTE, request("k"), f"job-{number}")
            return f"job-{number}"

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(create, range(50)))) == 1


def test_a_create_that_fails_burns_no_key(storage: Storage) -> None:
    with pytest.raises(RuntimeError), storage.write() as tx:
        remember(tx, "proj-1", ROUTE, request("k"), "job-1")
        raise RuntimeError
    assert earlier(storage, request("k")) is None


def test_expired_rows_are_dropped(storage: Storage, clock: list[int]) -> None:
    make(storage, "job-1", request("old"))
    clock[0] += 24 * 3600 + 1
    make(storage, "job-2", request("new", body=b"{}"))
    with storage.write() as tx:
        assert forget_expired(tx) == 2
    assert earlier(storage, request("new", body=b"{}")) == "job-2"
