"""Uploads of whatever bytes: a file or an error in the dialect's own words, and never a trace of a refused one."""

from random import Random

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.api.test_files import left_behind
from tests.api.world import PREFIXES, World
from tests.unit.any_bytes import CORPUS, mutated
from tests.unit.bad_rows import CASES, Case
from tunewright.datasets.records import PURPOSES

SMALL = [case for case in CASES if len(case.data) < 2**20]


async def upload(client: httpx.AsyncClient, path: str, data: bytes, purpose: str, **fields: str) -> httpx.Response:
    form = {"purpose": purpose, **fields}
    return await client.post(path, data=form, files={"file": ("rows.jsonl", data)})


def code_of(answer: httpx.Response) -> str:
    error = answer.json()["error"]
    assert error["message"] and error["request_id"]
    return error.get("reason", error["code"])


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
async def test_what_an_upload_says_of_each_fault(world: World, client: httpx.AsyncClient, case: Case) -> None:
    """The codes of the catalogue reach the caller, and a refused file leaves nothing."""
    before = left_behind(world)
    answer = await upload(client, "/v1/files", case.data, case.purpose)
    if case.severity == "error":
        assert answer.status_code == 400, answer.text
        assert case.code in answer.json()["error"].get("counts", [code_of(answer)])
        assert left_behind(world) == before
        return
    assert answer.status_code == 200, answer.text
    kept = await client.get(f"/api/v1/datasets/{answer.json()['id']}")
    if case.purpose != "batch":
        assert (case.code in kept.json()["report"]["counts"]) == (case.severity == "warning")
    await client.delete(f"/v1/files/{answer.json()['id']}")


@pytest.mark.parametrize("path", [*(prefix + "/files" for prefix in PREFIXES), "/api/v1/datasets"])
@settings(max_examples=100)
@given(
    data=st.binary(max_size=100) | st.builds(mutated, st.sampled_from(CORPUS), st.integers(0, 2**64 - 1).map(Random)),
    purpose=st.sampled_from(PURPOSES[:4]),
    keep=st.booleans(),
)
async def test_any_bytes_are_answered(
    client: httpx.AsyncClient, path: str, data: bytes, purpose: str, keep: bool
) -> None:
    answer = await upload(client, path, data, purpose, **({"on_problems": "keep"} if keep else {}))
    assert answer.status_code in (200, 201, 400, 413), answer.text
    if answer.status_code < 300:
        shown = answer.json()
        assert shown["status"] in ("processed", "error", "processing")
        dataset = await client.get(f"/api/v1/datasets/{shown['id']}")
        assert dataset.status_code == 200
        report = dataset.json()["report"]
        assert (shown["status"] == "error") == (report["errors"] > 0) or shown["status"] == "processing"
    else:
        assert code_of(answer)
