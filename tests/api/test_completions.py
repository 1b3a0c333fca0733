"""What is refused between the request and the engine: prompts that can't fit, lengths out of range, too much at once."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.world import PREFIXES, World
from tunewright.accounts import rates
from tunewright.completions import service
from tunewright.completions.service import CompletionService
from tunewright.deployments.ports import Done, Generate, TokenText
from tunewright.deployments.serving import Serving
from tunewright.deployments.workers import engine_overloaded
from tunewright.engines.adapter_files import adapter_invalid
from tunewright.models.records import Base, TunedModel
from tunewright.rendering.renderer import renderer_of

CHAT = "/chat/completions"


class EchoPool:
    """Says one word at once and the rest when `go_on` is set; counts what reached it."""

    def __init__(self) -> None:
        self.orders: list[Generate] = []
        self.go_on = asyncio.Event()

    def check_room(self, base: Base) -> None:
        """There is always room."""

    async def generate(
        self, base: Base, tuned: TunedModel | None, order: Generate
    ) -> AsyncGenerator[TokenText | Done, None]:
        self.orders.append(order)
        yield TokenText(text="Hel", n_tokens=1)
        await self.go_on.wait()
        yield Done(reason="stop", prompt_tokens=len(order.prompt_ids), completion_tokens=2, text="lo", cached_tokens=3)


def world_of(home: Path, base: Path, **settings: Any) -> World:
    """The real completion service above a stand-in for the engines."""
    world = World(home, base, **settings)
    platform = world.platform
    pool: Any = EchoPool()
    serving = Serving(platform.storage, platform.models, pool, platform.instances, platform.home, platform.settings)
    platform.completions = CompletionService(platform.models, serving, platform.settings, platform.metering)
    world.pool = pool  # type: ignore[attr-defined]
    return world


@pytest.fixture
def served(tmp_path: Path, untrained_base: Path) -> Iterator[World]:
    world = world_of(tmp_path / "home", untrained_base, max_streams_per_key=2)
    yield world
    world.platform.storage.close()


async def ask(client: httpx.AsyncClient, prefix: str, content: str, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}
    return await client.post(prefix + CHAT, json=body)


TOOL = {"type": "function", "function": {"name": "f", "description": "d" * 2_000_000}}


@pytest.mark.parametrize(
    ("content", "fields", "status", "code", "param"),
    [
        ("word " * 3000, {}, 400, "context_length_exceeded", "messages"),
        ("word " * 3_000_000, {}, 400, "context_length_exceeded", "messages"),
        ("hi", {"tools": [TOOL]}, 400, "context_length_exceeded", "messages"),
        ("hi", {"max_tokens": 10**9}, 400, "invalid_value", "max_tokens"),
        ("hi", {"model": "unknown"}, 404, "model_not_found", "model"),
        ("hi", {"model": "tiny:1234567890::abcdefgh"}, 404, "model_not_found", "model"),
        ("hi", {"model": "../../etc/passwd"}, 404, "model_not_found", "model"),
        ("hi", {"model": "hf://a/b"}, 404, "model_not_found", "model"),
        ("hi", {"model": "file:///etc/passwd"}, 404, "model_not_found", "model"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a11_a31_what_no_engine_can_answer(
    served: World, content: str, fields: dict[str, Any], status: int, code: str, param: str
) -> None:
    async with served.client() as client:
        for prefix in PREFIXES:
            began = time.perf_counter()
            answer = await ask(client, prefix, content, **fields)
            assert time.perf_counter() - began < 2, "a prompt of 15 MB is not rendered to be refused"
            error = answer.json()["error"]
            assert answer.status_code == (status if prefix == "/v1" else 400)
            assert (error.get("reason", error["code"]), error["param"]) == (code, param)
            if code == "context_length_exceeded":
                assert "2048" in error["message"]
    assert served.pool.orders == []  # type: ignore[attr-defined]


async def test_a11_the_model_of_another_project_is_like_none(served: World) -> None:
    name = "tiny:1234567890:s:abcdefgh"
    model = TunedModel(
        id="model-1",
        project_id=served.project_id,
        name=name,
        base_code="tiny",
        job_id="j",
        created_at=1,
        status="ready",
    )
    with served.platform.storage.write() as tx:
        tx.models.insert(model)
    async with served.client(served.other_key) as client:
        for prefix in PREFIXES:
            theirs = (await ask(client, prefix, "hi", model=name)).json()["error"]
            none = (await ask(client, prefix, "hi", model=name[:-1] + "x")).json()["error"]
            assert theirs.pop("request_id") != none.pop("request_id")
            assert str(theirs).replace(name, "") == str(none).replace(name[:-1] + "x", "")


async def test_a_project_is_the_tenant_of_what_its_keys_ask(served: World) -> None:
    """T-34: what engines may reuse is known by the project, which no request can name; usage says how much it was."""
    served.pool.go_on.set()  # type: ignore[attr-defined]
    async with served.client() as client, served.client(served.other_key) as other:
        for one in (client, other):
            for prefix in PREFIXES:
                usage = (await ask(one, prefix, "hi")).json()["usage"]
                assert usage["prompt_tokens_details"] == {"cached_tokens": 3}
    tenants = [order.tenant for order in served.pool.orders]  # type: ignore[attr-defined]
    assert tenants[:2] == [served.project_id] * 2
    assert tenants[2] == tenants[3] not in (served.project_id, None)


async def test_r23_a_damaged_adapter_is_a_conflict_and_one_of_a_deleted_model_is_none(served: World) -> None:
    """What the engine says of the files is told; 409, except where the dialect has no such status."""
    renderer = renderer_of(served.platform.catalogue.find("tiny").path)  # type: ignore[union-attr, arg-type]
    name = "tiny:1234567890:s:abcdefgh"
    model = TunedModel(
        id="model-1", project_id=served.project_id, name=name, base_code="tiny", job_id="j", created_at=1, status="ready",
        renderer_hash=renderer.hash, proof={"tensors": 1},
    )  # fmt: skip
    with served.platform.storage.write() as tx:
        tx.models.insert(model)

    async def refuse(base: Base, tuned: TunedModel | None, order: Generate) -> AsyncGenerator[TokenText | Done, None]:
        raise adapter_invalid(["its sha256 differs"])
        yield  # a generator, as the pool's

    served.pool.generate = refuse  # type: ignore[attr-defined]
    async with served.client() as client:
        for prefix in PREFIXES:
            answer = await ask(client, prefix, "hi", model=name)
            error = answer.json()["error"]
            assert (answer.status_code, error.get("reason", error["code"])) == (
                409 if prefix == "/v1" else 400,
                "adapter_invalid",
            )
            assert "sha256 differs" in error["message"] and error["param"] == "model"
            if prefix == "/v1":
                assert answer.headers["x-should-retry"] == "false"
        with served.platform.storage.write() as tx:
            tx.models.change(model, status="deleted", deleted_at=2)
        assert (await ask(client, "/v1", "hi", model=name)).json()["error"]["code"] == "model_not_found"


async def test_a49_a_key_has_a_limit_of_answers_under_way(served: World) -> None:
    async with served.client() as client, served.client(served.other_key) as other:
        waiting = [asyncio.ensure_future(ask(client, "/v1", "hi")) for _ in range(2)]
        while len(served.pool.orders) < 2:  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)
        for prefix, code in zip(PREFIXES, ("1302", "concurrency_limit"), strict=True):
            for stream in (False, True):
                refused = await ask(client, prefix, "hi", stream=stream)
                assert (refused.status_code, refused.json()["error"]["code"]) == (429, code)
                assert refused.headers["retry-after"] == "1"
        served.pool.go_on.set()  # type: ignore[attr-defined]
        assert [(await answer).status_code for answer in waiting] == [200, 200]
        assert (await ask(client, "/v1", "hi")).json()["choices"][0]["message"]["content"] == "Hello"
        assert (await ask(other, "/v1", "hi")).status_code == 200


async def test_a_key_that_has_used_its_tokens_waits(
    tmp_path: Path, untrained_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "mono_s", lambda: 1000.0)
    world = world_of(tmp_path / "home", untrained_base, max_tokens_per_minute=60)
    world.pool.go_on.set()  # type: ignore[attr-defined]
    async with world.client() as client, world.client(world.other_key) as other:
        used = (await ask(client, "/v1", "hi " * 40)).json()["usage"]["total_tokens"]
        assert used > 60
        for prefix, code in zip(PREFIXES, ("1303", "token_rate_exceeded"), strict=True):
            for stream in (False, True):
                refused = await ask(client, prefix, "hi", stream=stream)
                assert (refused.status_code, refused.json()["error"]["code"]) == (429, code)
                assert int(refused.headers["retry-after"]) == used - 59
        assert (await ask(other, "/v1", "hi")).status_code == 200
    world.platform.storage.close()


async def test_overload_is_refused_before_anything_is_rendered(served: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(base: Base) -> None:
        raise engine_overloaded()

    monkeypatch.setattr(served.pool, "check_room", full)  # type: ignore[attr-defined]
    monkeypatch.setattr(service, "renderer_of", None)
    async with served.client() as client:
        for prefix, status, code in (("/v1", 503, "engine_overloaded"), ("/api/paas/v4", 429, "1305")):
            refused = await ask(client, prefix, "hi")
            assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
            assert refused.headers["retry-after"] == "1"
