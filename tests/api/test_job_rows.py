"""What a job says of its rows: tolerance, split and counts, alike in both dialects."""

from typing import Any

import httpx
import msgspec
import pytest

from tests.api.world import PREFIXES, World

JOBS = "/fine_tuning/jobs"


async def bad_file(world: World, client: httpx.AsyncClient, bad: int, rows: int) -> str:
    """A file as one that was kept with errors in some of its rows."""
    file_id = (await world.upload(client))["id"]
    with world.platform.storage.write() as tx:
        file = tx.files.get(world.project_id, file_id)
        assert file is not None
        tx.files.delete(world.project_id, file_id)
        report = file.report | {"rows": rows, "errors": bad, "bad_rows": bad, "counts": {"invalid_role": bad}}
        tx.files.insert(msgspec.structs.replace(file, status="error", rows=rows, report=report))
    return file_id


async def create(client: httpx.AsyncClient, prefix: str, file_id: str, **fields: Any) -> httpx.Response:
    return await client.post(prefix + JOBS, json={"model": "tiny", "training_file": file_id, **fields})


@pytest.mark.parametrize("prefix", PREFIXES)
async def test_a_file_with_errors_is_trained_on_within_a_tolerance(
    world: World, client: httpx.AsyncClient, prefix: str
) -> None:
    file_id = await bad_file(world, client, bad=3, rows=100)
    for fields, code in (
        ({}, "file_has_errors"),
        ({"max_bad_rows": 2}, "too_many_bad_rows"),
        ({"max_bad_rows": 3, "max_bad_ratio": 0.02}, "too_many_bad_rows"),
        ({"max_bad_rows": "3"}, "invalid_value"),
        ({"max_bad_rows": -1}, "invalid_value"),
        ({"max_bad_ratio": 0.6}, "invalid_value"),
    ):
        refused = await create(client, prefix, file_id, **fields)
        error = refused.json()["error"]
        assert (refused.status_code, error.get("reason", error["code"])) == (400, code)
        assert error["param"] in (*fields, "training_file")
    sentence = (await create(client, prefix, file_id)).json()["error"]["message"]
    assert "3 of the 100 rows" in sentence and f"/api/v1/datasets/{file_id}/repair" in sentence
    made = await create(client, prefix, file_id, max_bad_rows=3, max_bad_ratio=0.5)
    assert made.status_code == 200, made.text
    job = (await client.get(f"{prefix}{JOBS}/{made.json()['id']}")).json()
    assert (job["max_bad_rows"], job["max_bad_ratio"], job["validation_split"], job["rows"]) == (3, 0.5, None, None)


@pytest.mark.parametrize("prefix", PREFIXES)
async def test_a_validation_split_instead_of_a_file(world: World, client: httpx.AsyncClient, prefix: str) -> None:
    file_id = (await world.upload(client))["id"]
    made = await create(client, prefix, file_id, validation_split=0.1)
    assert (made.json()["validation_split"], made.json()["validation_file"]) == (0.1, None)
    for fields in ({"validation_split": 0.1, "validation_file": file_id}, {"validation_split": 0}):
        refused = await create(client, prefix, file_id, **fields)
        error = refused.json()["error"]
        assert (error.get("reason", error["code"]), error["param"]) == ("invalid_value", "validation_split")
