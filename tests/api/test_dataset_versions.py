"""New datasets out of old ones: repairs, splits and the family they make."""

import json
from typing import Any

import httpx
import pytest

from tests.api.test_datasets import BAD, GOOD, all_rows, create, get, left_behind, lines, row
from tests.api.world import ROW, World


async def test_a_split_puts_equal_rows_on_one_side(client: httpx.AsyncClient) -> None:
    same = [json.dumps(json.loads(row(str(i % 60))), indent=None if i % 2 else 0).replace("\n", "") for i in range(120)]
    parent = await create(client, lines(*same))
    answer = await client.post(f"/api/v1/datasets/{parent['id']}/split", json={"validation_ratio": 0.3, "seed": 7})
    assert answer.status_code == 201, answer.text
    made = answer.json()
    sides = []
    for role in ("training", "validation"):
        half = made[role]
        assert half["filename"] == f"rows-{role}.jsonl"
        assert (half["parent_id"], half["version"], half["status"]) == (parent["id"], 2, "processed")
        assert half["origin"] == {
            "made_by": "split",
            "role": role,
            "validation_ratio": 0.3,
            "seed": 7,
            "training": made["training"]["id"],
            "validation": made["validation"]["id"],
        }
        found, _ = await all_rows(client, half["id"], limit=200)
        sides.append({each["row"]["messages"][0]["content"] for each in found})
    assert made["training"]["rows"] + made["validation"]["rows"] == 120
    assert sides[0] | sides[1] == {str(i) for i in range(60)} and not sides[0] & sides[1]
    again = (
        await client.post(f"/api/v1/datasets/{parent['id']}/split", json={"validation_ratio": 0.3, "seed": 7})
    ).json()
    other = (
        await client.post(f"/api/v1/datasets/{parent['id']}/split", json={"validation_ratio": 0.3, "seed": 8})
    ).json()
    contents = [
        (await client.get(f"/v1/files/{split['training']['id']}/content")).content for split in (made, again, other)
    ]
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"validation_ratio": 0}, "validation_ratio"),
        ({"validation_ratio": 0.51}, "validation_ratio"),
        ({"validation_ratio": "0.1"}, "validation_ratio"),
        ({"validation_ratio": True}, "validation_ratio"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"ratio": 0.1}, "ratio"),
    ],
)
async def test_odd_splits_are_refused(client: httpx.AsyncClient, body: dict[str, Any], param: str) -> None:
    file_id = (await create(client, lines(GOOD)))["id"]
    answer = await client.post(f"/api/v1/datasets/{file_id}/split", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_a_split_without_rows_on_both_sides_is_refused(client: httpx.AsyncClient, world: World) -> None:
    file_id = (await create(client, lines(GOOD)))["id"]
    before = left_behind(world)
    answer = await client.post(f"/api/v1/datasets/{file_id}/split", json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "split_leaves_nothing")
    assert left_behind(world) == before


async def test_a_split_that_is_sent_twice_happens_once(client: httpx.AsyncClient) -> None:
    file_id = (await create(client, lines(*[row(str(i)) for i in range(40)])))["id"]
    send = {"json": {"validation_ratio": 0.5}, "headers": {"Idempotency-Key": f"split-{file_id}"}}
    first, again = [(await client.post(f"/api/v1/datasets/{file_id}/split", **send)).json() for _ in range(2)]
    assert first == again
    send["json"] = {"validation_ratio": 0.4}
    assert (await client.post(f"/api/v1/datasets/{file_id}/split", **send)).status_code == 422


async def test_a_dataset_knows_its_family(client: httpx.AsyncClient) -> None:
    eldest = await create(client, lines(*[row(str(i)) for i in range(40)]))
    second = await create(client, lines(*[row(str(i)) for i in range(41)]), parent_id=eldest["id"])
    assert (second["parent_id"], second["version"], second["origin"]) == (eldest["id"], 2, {"made_by": "upload"})
    split = (await client.post(f"/api/v1/datasets/{second['id']}/split", json={"validation_ratio": 0.5})).json()
    family = (await get(client, f"{second['id']}/versions"))["data"]
    assert [(each["relation"], each["id"], each["version"]) for each in family] == [
        ("ancestor", eldest["id"], 1),
        ("self", second["id"], 2),
        *sorted(("child", split[role]["id"], 3) for role in ("training", "validation")),
    ]
    youngest = (await get(client, f"{split['training']['id']}/versions"))["data"]
    assert [each["relation"] for each in youngest] == ["ancestor", "ancestor", "self"]
    await client.delete(f"/v1/files/{eldest['id']}")
    assert (await get(client, f"{second['id']}/versions"))["data"][0]["relation"] == "self"


MENDABLE = '{"messages":[{"role":"human","content":"x"},{"role":"gpt","content":"y"}],}'


async def repair(client: httpx.AsyncClient, file_id: str, status: int = 201, **body: Any) -> dict[str, Any]:
    answer = await client.post(f"/api/v1/datasets/{file_id}/repair", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


async def test_a_repair_is_a_new_version(client: httpx.AsyncClient) -> None:
    data = lines(row("first"), MENDABLE, BAD.replace("boss", "nobody"), row("last"))
    old = await create(client, data)
    new = await repair(client, old["id"])
    assert (new["parent_id"], new["version"], new["status"], new["rows"]) == (old["id"], 2, "error", 4)
    assert new["origin"] == {"made_by": "repair", "patched": 1, "dropped": 0, "left": 1}
    assert [problem["line"] for problem in new["report"]["problems"] if problem["severity"] == "error"] == [3]
    found, _ = await all_rows(client, new["id"])
    assert [message["role"] for message in found[1]["row"]["messages"]] == ["user", "assistant"]
    assert (await client.get(f"/v1/files/{old['id']}/content")).content == data, "never in place"
    clean = await repair(client, new["id"], drop_bad_rows=True)
    assert (clean["version"], clean["status"], clean["rows"]) == (3, "processed", 3)
    assert clean["origin"] == {"made_by": "repair", "patched": 0, "dropped": 1, "left": 0}
    relations = [each["relation"] for each in (await get(client, f"{clean['id']}/versions"))["data"]]
    assert relations == ["ancestor", "ancestor", "self"]


async def test_a_repair_may_be_of_some_codes_and_lines(client: httpx.AsyncClient) -> None:
    old = await create(client, lines(row("first"), MENDABLE, MENDABLE))
    code = old["report"]["problems"][0]["code"]
    assert (await repair(client, old["id"], lines=[3]))["origin"]["patched"] == 1
    assert (await repair(client, old["id"], codes=[code]))["origin"]["patched"] == 2
    for body in ({"lines": [1]}, {"codes": ["file_empty"]}, {"codes": [], "lines": [2]}):
        answer = await repair(client, old["id"], 400, **body)
        assert answer["error"]["code"] == "nothing_to_repair"


async def test_a_repair_that_is_sent_twice_happens_once(client: httpx.AsyncClient) -> None:
    file_id = (await create(client, lines(row("first"), MENDABLE)))["id"]
    send: dict[str, Any] = {"json": {}, "headers": {"Idempotency-Key": f"repair-{file_id}"}}
    first, again = [(await client.post(f"/api/v1/datasets/{file_id}/repair", **send)).json() for _ in range(2)]
    assert first == again and first["version"] == 2
    send["json"] = {"drop_bad_rows": True}
    assert (await client.post(f"/api/v1/datasets/{file_id}/repair", **send)).status_code == 422


async def test_nothing_is_left_of_a_repair_that_fails(client: httpx.AsyncClient, world: World) -> None:
    good = (await create(client, lines(*[row(str(i)) for i in range(3)])))["id"]
    hopeless = (await create(client, lines(BAD, BAD)))["id"]
    before = left_behind(world)
    assert (await repair(client, good, 400))["error"]["code"] == "nothing_to_repair"
    assert (await repair(client, hopeless, 400, drop_bad_rows=True))["error"]["code"] == "file_empty"
    async with world.client(world.other_key) as theirs:
        assert (await repair(theirs, good, 404))["error"]["code"] == "file_not_found"
    assert left_behind(world) == before


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"codes": "invalid_role"}, "codes"),
        ({"codes": [1]}, "codes[0]"),
        ({"codes": ["x" * 65]}, "codes[0]"),
        ({"codes": ["x"] * 201}, "codes"),
        ({"lines": [0]}, "lines[0]"),
        ({"lines": ["1"]}, "lines[0]"),
        ({"lines": [True]}, "lines[0]"),
        ({"drop_bad_rows": 1}, "drop_bad_rows"),
        ({"patches": []}, "patches"),
    ],
)
async def test_odd_repairs_are_refused(client: httpx.AsyncClient, body: dict[str, Any], param: str) -> None:
    file_id = (await create(client, lines(GOOD)))["id"]
    error = (await repair(client, file_id, 400, **body))["error"]
    assert error["param"] == param
    assert len(error["message"]) < 300


@pytest.mark.parametrize(
    "data",
    [
        json.dumps([ROW, ROW | {"n": 1}]).encode(),
        json.dumps(ROW, indent=2).encode() + b"\n" + json.dumps(ROW | {"n": 1}, indent=2).encode(),
        ("\ufeff" + row("一") + "\n" + row("二") + "\n").encode("utf-16-le"),
        (row("1") + "\r" + row("2") + "\r").encode(),
    ],
    ids=["array", "pretty", "utf-16", "cr"],
)
async def test_a_file_wrong_as_a_whole_is_mended_as_a_whole(client: httpx.AsyncClient, data: bytes) -> None:
    old = await create(client, data)
    assert (old["status"], old["report"]["bad_rows"]) == ("error", 0)
    assert old["report"]["problems"][0]["patch"]["rewrite"]
    new = await repair(client, old["id"])
    assert (new["status"], new["rows"], new["origin"]["left"]) == ("processed", 2, 0)
