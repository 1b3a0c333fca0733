"""Token statistics and previews over HTTP, with a real tokenizer and real counting processes."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from tests.api.world import World
from tunewright.clock import wall_s
from tunewright.datasets.rows import conversation_of
from tunewright.datasets.tokens import token_service
from tunewright.datasets.tokens.token_service import Count, TokenService
from tunewright.errors import Unavailable
from tunewright.jobs.records import Job
from tunewright.rendering.renderer import renderer_of

PREFERENCE = {
    "messages": [{"role": "user", "content": "hi"}],
    "preferred_output": [{"role": "assistant", "content": "yes"}],
    "non_preferred_output": [{"role": "assistant", "content": "no"}],
}


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


async def upload(client: httpx.AsyncClient, rows: list[Any]) -> str:
    content = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"
    answer = await client.post("/api/v1/datasets", files={"file": ("rows.jsonl", content.encode())})
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def length_of(world: World, row: dict[str, Any]) -> int:
    base = world.platform.catalogue.find("tiny")
    assert base is not None and base.path is not None
    return len(renderer_of(base.path).example(conversation_of(row)).tokens)


async def test_statistics_of_a_dataset(world: World, client: httpx.AsyncClient) -> None:
    rows = [chat("hello", "yes"), chat("hello", "one two three " * 40), chat("hello " * 90, "no")]
    file_id = await upload(client, rows)
    address = f"/api/v1/datasets/{file_id}/statistics"
    answer = await client.get(address, params={"model": "tiny", "max_length": 60, "n_epochs": 5})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["id"], found["object"], found["base"], found["kind"]) == (
        file_id,
        "dataset.statistics",
        "tiny",
        "chat",
    )
    tokens = found["tokens"]
    assert (tokens["rows"], tokens["max_length"]) == (3, 60)
    assert tokens["tokens"]["total"] == sum(length_of(world, row) for row in rows)
    assert (tokens["cut"]["lines"], tokens["nothing_to_train"]["lines"]) == ([2], [3])
    assert tokens["problems"][0]["code"] == "nothing_to_train"
    assert tokens["problems"][0]["messages"]["zh"] != tokens["problems"][0]["messages"]["en"]
    whole = 5 * (length_of(world, rows[0]) + 60)
    assert (found["estimate"]["trained_tokens"], found["estimate"]["n_epochs"]) == (whole, 5)
    assert found["estimate"]["price"] is None
    assert found["statistics"] == (await client.get(f"/api/v1/datasets/{file_id}")).json()["statistics"]


async def test_a_count_is_kept_and_shared(
    world: World, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two who ask at once start one process; who asks later starts none; what is kept goes with the file."""
    started: list[Path] = []
    run = TokenService._run_child

    def noted(self: TokenService, count: Count, folder: Path) -> None:
        started.append(folder)
        run(self, count, folder)

    monkeypatch.setattr(TokenService, "_run_child", noted)
    file_id = await upload(client, [chat("kept and shared", "yes")])
    address = f"/api/v1/datasets/{file_id}/statistics?model=tiny"
    first, second = await asyncio.gather(client.get(address), client.get(address))
    third = await client.get(address)
    assert first.json() == second.json() == third.json()
    assert len(started) == 1
    assert not started[0].exists()
    other_length = await client.get(address, params={"model": "tiny", "max_length": 32})
    assert other_length.json()["tokens"]["max_length"] == 32
    file = world.platform.datasets.get(world.project_id, file_id)
    cache = world.platform.home.token_cache
    kept = [*cache.glob(f"{file.sha256[:32]}-*"), *(cache.parent / "token-counts").glob(f"{file.sha256[:32]}-*")]
    assert len([path for path in kept if path.suffix != ".lock"]) == 3  # tokens once, counts twice
    await client.delete(f"/v1/files/{file_id}")
    assert not any(path.exists() for path in kept)


async def test_defaults_are_those_of_a_job(world: World, client: httpx.AsyncClient) -> None:
    file_id = await upload(client, [chat("defaults", "yes")])
    found = (await client.get(f"/api/v1/datasets/{file_id}/statistics?model=tiny")).json()
    assert found["tokens"]["max_length"] == 1024
    assert found["estimate"]["n_epochs"] == 10


async def test_time_and_price_once_they_are_known(world: World, client: httpx.AsyncClient) -> None:
    file_id = await upload(client, [chat("time and price", "yes")])
    address = f"/api/v1/datasets/{file_id}/statistics?model=tiny&n_epochs=2"
    assert (await client.get(address)).json()["estimate"]["seconds"] is None
    now = wall_s()
    job = Job(
        id="ftjob-speed",
        project_id=world.project_id,
        base_code="tiny",
        model="tiny",
        tuned_model_id="m",
        tuned_model_name="tiny:1::speed",
        training_file=file_id,
        status="succeeded",
        created_at=now,
        running_at=now,
        finished_at=now + 10,
        trained_tokens=20,
    )
    others = [
        msgspec.structs.replace(job, id="ftjob-fast", tuned_model_name="n", tuned_model_id="n", trained_tokens=40),
        msgspec.structs.replace(job, id="ftjob-other", tuned_model_name="o", tuned_model_id="o", base_code="large"),
    ]
    with world.platform.storage.write() as tx:
        for one in (job, *others):
            tx.jobs.insert(one)
    base = world.platform.catalogue.find("tiny")
    assert base is not None
    priced = msgspec.structs.replace(base, price_per_million_tokens=1e6)
    world.platform.models._catalogue.find = lambda name: priced  # type: ignore[method-assign]
    try:
        found = (await client.get(address)).json()["estimate"]
    finally:
        del world.platform.models._catalogue.find
        with world.platform.storage.write() as tx:
            for one in (job, *others):
                tx.jobs.change(one, deleted_at=now)
    tokens = 2 * length_of(world, chat("time and price", "yes"))
    assert found["trained_tokens"] == tokens
    assert found["seconds"] == [round(tokens / 4), round(tokens / 2)]
    assert found["price"] == tokens


async def test_preview_of_a_row(world: World, client: httpx.AsyncClient) -> None:
    long = chat("a long row " * 30_000, "end")
    file_id = await upload(client, [chat("hello", "yes"), "", long, chat("你好", "再见")])
    for line, row in ((1, chat("hello", "yes")), (4, chat("你好", "再见"))):
        answer = await client.get(f"/api/v1/datasets/{file_id}/rows/{line}/tokens", params={"model": "tiny"})
        found = answer.json()
        assert answer.status_code == 200, found
        assert (found["line"], found["base"], found["max_length"]) == (line, "tiny", 1024)
        (example,) = found["examples"]
        assert example["n_tokens"] == length_of(world, row) == len(example["tokens"])
        assert example["text"] == "".join(token["text"] or "" for token in example["tokens"])
        trained = "".join(token["text"] or "" for token in example["tokens"] if token["trained"])
        assert trained == row["messages"][1]["content"] + "<|im_end|>"
    cut = (await client.get(f"/api/v1/datasets/{file_id}/rows/3/tokens?model=tiny")).json()["examples"][0]
    assert (cut["cut_at"], cut["n_trained"], cut["truncated"]) == (1024, 0, True)
    assert len(cut["tokens"]) < cut["n_tokens"]


async def test_preview_of_a_preference_row(client: httpx.AsyncClient) -> None:
    file_id = await upload(client, [PREFERENCE])
    found = (await client.get(f"/api/v1/datasets/{file_id}/rows/1/tokens?model=tiny")).json()
    assert [example["side"] for example in found["examples"]] == ["preferred", "non_preferred"]


async def test_what_can_not_be_answered(world: World, client: httpx.AsyncClient) -> None:
    wrong = {"messages": [{"role": "robot", "content": "x"}]}
    file_id = await upload(client, [chat("hello", "yes"), "", wrong, "{broken"])
    rows = f"/api/v1/datasets/{file_id}/rows"

    async def code(address: str, status: int) -> str:
        answer = await client.get(address)
        assert answer.status_code == status, answer.text
        return answer.json()["error"]["code"]

    assert await code(f"{rows}/2/tokens?model=tiny", 404) == "row_not_found"
    assert await code(f"{rows}/5/tokens?model=tiny", 404) == "row_not_found"
    assert await code(f"{rows}/0/tokens?model=tiny", 400) == "invalid_value"
    assert await code(f"{rows}/3/tokens?model=tiny", 400) == "invalid_role"
    assert await code(f"{rows}/4/tokens?model=tiny", 400) == "invalid_json"
    assert await code(f"{rows}/1/tokens", 400) == "missing_required_parameter"
    assert await code(f"{rows}/1/tokens?model=nothing", 404) == "model_not_found"
    assert await code(f"{rows}/1/tokens?model=smollm2-135m", 400) == "model_not_pulled"
    assert await code(f"{rows}/1/tokens?model=tiny&max_length=1000000", 400) == "invalid_value"
    statistics = f"/api/v1/datasets/{file_id}/statistics"
    assert await code(f"{statistics}?model=tiny&n_epochs=0", 400) == "invalid_value"
    assert await code(f"{statistics}?model=nothing", 404) == "model_not_found"
    async with world.client(world.other_key) as other:
        for address in (f"{rows}/1/tokens?model=tiny", f"{statistics}?model=tiny"):
            assert (await other.get(address)).status_code == 404


async def test_bad_rows_are_counted_apart(client: httpx.AsyncClient) -> None:
    file_id = await upload(client, [chat("hello", "yes"), "{broken"])
    found = (await client.get(f"/api/v1/datasets/{file_id}/statistics?model=tiny")).json()["tokens"]
    assert (found["rows"], found["refused"]["rows"], found["refused"]["lines"]) == (1, 1, [2])


def running_service(world: World, monkeypatch: pytest.MonkeyPatch) -> tuple[TokenService, threading.Event]:
    """A service whose counting processes never end by themselves."""
    begun = threading.Event()
    service = TokenService(world.platform.blobs, world.platform.home, world.settings)
    monkeypatch.setattr(token_service, "COMMAND", ("-c", "import sys; sys.stdin.read()"))
    run = TokenService._run_child

    def noted(self: TokenService, count: Count, folder: Path) -> None:
        begun.set()
        run(self, count, folder)

    monkeypatch.setattr(TokenService, "_run_child", noted)
    return service, begun


@pytest.mark.parametrize("way", ["stop", "abandon"])
async def test_a_count_can_be_ended(
    world: World, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """By the end of the server, or because nobody waits any more. Nothing stays behind."""
    file = world.platform.datasets.get(world.project_id, await upload(client, [chat(f"ended by {way}", "yes")]))
    base = world.platform.catalogue.find("tiny")
    assert base is not None and base.path is not None
    service, begun = running_service(world, monkeypatch)
    count = service.count(file, base.path, 64)
    waiting = service.count(file, base.path, 128)  # behind the first
    assert await asyncio.to_thread(begun.wait, 60)
    if way == "stop":
        await asyncio.to_thread(service.stop)
    else:
        monkeypatch.setattr(token_service, "ABANDONED_S", 0.0)
        count.leave()
        waiting.leave()
    for each in (count, waiting):
        assert await asyncio.to_thread(each.done.wait, 60)
        with pytest.raises(Unavailable):
            each.result()
    await asyncio.to_thread(service.stop)
    assert not list(world.platform.home.temporary.glob("count-*"))
