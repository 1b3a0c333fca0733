"""Requests that kill the engine worker or hang it: what they cost, whom they hurt, and when they are refused."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.fake_worker import HANGS, KILLS, KILLS_LATE, LATE
from tests.live_server import LiveServer
from tests.promises.test_pool import worker_state
from tunewright.deployments.worker_client import WorkerGone, WorkerSlow

STEP_LIMIT_S = 1.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[LiveServer]:
    server = LiveServer(
        tmp_path_factory.mktemp("deadly") / "home",
        module="tests.serve_fake",
        TUNEWRIGHT_ENGINE_STEP_LIMIT_S=str(STEP_LIMIT_S),
        TUNEWRIGHT_ENGINE_SILENCE_LIMIT_S="2",
        TUNEWRIGHT_FIRST_TOKEN_LIMIT_S="8",
    )
    server.add_base(tiny_base)
    (server.home / "workers" / "fake.json").write_text(json.dumps({"step_s": 0.005}))
    server.start()
    yield server
    server.stop()


def body(seed: int, text: str = "hi", **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "seed": seed, "max_tokens": 30, **more}


def deaths(server: LiveServer, reason: str = "") -> int:
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if '"engine_lost"' in line]
    return sum(line["event"] == "engine_lost" and reason in line["reason"] for line in lines)


async def post(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json=fields)


def client_of(server: LiveServer) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {server.key}"}
    return httpx.AsyncClient(base_url=server.address, headers=headers, timeout=60, trust_env=False)


@pytest.mark.parametrize("seed", [KILLS, KILLS_LATE])
async def test_r25_a_deadly_request_is_refused_after_two_deaths_and_its_neighbours_are_answered(
    server: LiveServer, seed: int
) -> None:
    before = deaths(server)
    text = f"neighbours of {seed}"
    async with client_of(server) as client:
        neighbours = [asyncio.ensure_future(post(client, **body(n, text, max_tokens=LATE + 10))) for n in range(8)]
        deadly = await post(client, **body(seed, text))
        answers = await asyncio.gather(*neighbours)
        assert [answer.status_code for answer in answers] == [200] * 8, [answer.text for answer in answers]
        texts = {answer.json()["choices"][0]["message"]["content"] for answer in answers}
        assert texts == {"".join(f"{n} " for n in range(LATE + 10))}
        assert (deadly.status_code, deadly.json()["error"]["code"]) == (500, "request_quarantined")
        for _ in range(3):
            refused = await post(client, **body(seed, text))
            assert (refused.status_code, refused.headers["x-should-retry"]) == (500, "false")
            assert "retry-after" not in refused.headers
        chinese = await client.post(
            "/api/paas/v4/chat/completions",
            json=body(seed, text, temperature=1, top_p=1),
            headers={"Accept-Language": "zh"},
        )
        assert chinese.status_code == 500 and "拒绝" in chinese.json()["error"]["message"]
        again = await asyncio.gather(*(post(client, **body(n, text)) for n in range(8)))
        assert {answer.status_code for answer in again} == {200}
    assert deaths(server) - before == 2


def test_r25_the_sdk_does_not_try_again(server: LiveServer) -> None:
    before = deaths(server)
    with openai.OpenAI(api_key=server.key, base_url=f"{server.address}/v1") as client:
        for _ in range(2):
            with pytest.raises(openai.InternalServerError) as refused:
                client.chat.completions.create(**body(KILLS, "of the sdk"))
            assert refused.value.code == "request_quarantined"
    assert deaths(server) - before == 2


async def test_r25_a_stream_that_kills_late_ends_with_an_error(server: LiveServer) -> None:
    codes = []
    async with client_of(server) as client:
        for _ in range(3):
            async with client.stream(
                "POST", "/v1/chat/completions", json=body(KILLS_LATE, "stream", stream=True)
            ) as answer:
                frames = [line[6:] async for line in answer.aiter_lines() if line.startswith("data: {")]
                if answer.status_code == 200:
                    codes.append(json.loads(frames[-1])["error"]["code"])
                else:
                    codes.append(answer.status_code)
    assert codes == ["engine_lost", "request_quarantined", 500]


async def test_t19_a_worker_that_hangs_in_a_step_is_replaced_and_only_the_culprit_is_blamed(server: LiveServer) -> None:
    stuck_before = deaths(server, "stuck")
    begun: set[int] = set()
    began = time.monotonic()

    async def stream(client: httpx.AsyncClient, n: int) -> str:
        text = ""
        asked = body(n, "long", stream=True, max_tokens=1500)
        async with client.stream("POST", "/v1/chat/completions", json=asked) as answer:
            async for piece in answer.aiter_text():
                begun.add(n)
                text += piece
        return text

    async with client_of(server) as client:
        streams = [asyncio.ensure_future(stream(client, n)) for n in range(3)]
        while len(begun) < 3:
            await asyncio.sleep(0.01)
        hanging = await post(client, **body(HANGS, "hang"))
        assert (hanging.status_code, hanging.json()["error"]["code"]) == (500, "request_quarantined")
        assert time.monotonic() - began < 30
        for text in await asyncio.gather(*streams):
            assert '"engine_lost"' in text and "[DONE]" not in text
        assert (await post(client, **body(1, "long", max_tokens=5))).status_code == 200
    assert deaths(server, "stuck") - stuck_before == 2


async def at_it(server: LiveServer) -> bool:
    """Whether the worker says that it is at a request."""
    try:
        return bool((await asyncio.to_thread(worker_state, server)).running)
    except (WorkerGone, WorkerSlow, OSError):
        return False


async def test_a_caller_who_gave_up_on_a_hanging_request_finds_it_refused(server: LiveServer) -> None:
    """The worker says what it hangs in, so it matters not that nobody waits for it any more."""
    stuck_before = deaths(server, "stuck")
    async with client_of(server) as client:
        for n in range(2):
            assert (await post(client, **body(1, "the worker is there"))).status_code == 200
            while await at_it(server):  # it forgets an answered request with its next step
                await asyncio.sleep(0.01)
            asking = asyncio.ensure_future(post(client, **body(HANGS, "give up")))
            while not await at_it(server):
                await asyncio.sleep(0.01)
            asking.cancel()
            while deaths(server, "stuck") - stuck_before <= n:
                await asyncio.sleep(0.05)
        refused = await post(client, **body(HANGS, "give up"))
    assert refused.json()["error"]["code"] == "request_quarantined"
