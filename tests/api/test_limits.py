"""How often a key may ask, how often an address may guess, and how much may be under way."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.world import PREFIXES, World
from tunewright.accounts import rates
from tunewright.accounts.rates import Buckets


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(rates, "mono_s", lambda: now[0])
    return now


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "home", max_requests_per_minute=60, request_burst=3, max_refused_keys_per_minute=2)
    yield world
    world.platform.storage.close()


async def test_a47_a_key_that_asks_too_often_waits(limited: World, clock: list[float]) -> None:
    for prefix, code in zip(PREFIXES, ("1303", "rate_limit_exceeded"), strict=True):
        clock[0] += 60
        async with limited.client() as client, limited.client(limited.other_key) as other:
            for left in ("2", "1", "0"):
                answer = await client.get(f"{prefix}/models")
                assert (answer.status_code, answer.headers["x-ratelimit-remaining-requests"]) == (200, left)
                assert answer.headers["x-ratelimit-limit-requests"] == "60"
            refused = await client.post(f"{prefix}/files", content=b"not even read")
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, code)
            assert (refused.headers["retry-after"], refused.headers["x-ratelimit-remaining-requests"]) == ("1", "0")
            assert "x-should-retry" not in refused.headers
            assert (await client.get("/healthz")).status_code == 200
            assert (await other.get(f"{prefix}/models")).status_code == 200
            clock[0] += 1
            assert (await client.get(f"{prefix}/models")).status_code == 200


async def test_a47_an_address_that_guesses_keys_waits_and_right_keys_do_not(limited: World, clock: list[float]) -> None:
    async with limited.client("wrong") as guesser, limited.client() as client:
        for forwarded in ("127.0.0.1", "10.0.0.1"):  # A45: whatever it says, it is one address
            answer = await guesser.get("/v1/models", headers={"X-Forwarded-For": forwarded})
            assert answer.status_code == 401
        refused = await guesser.get("/v1/models", headers={"X-Forwarded-For": "10.0.0.2"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert refused.headers["retry-after"] == "30"
        assert (await client.get("/v1/models")).status_code == 200
        clock[0] += 30
        assert (await guesser.get("/v1/models")).status_code == 401


def test_buckets_fill_up_again_and_stay_few(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_MOST_NAMES", 10)
    buckets = Buckets(per_minute=60, burst=2)
    for number in range(100):
        assert buckets.take(str(number)) == (1, 0.0)
        clock[0] += 1
    assert len(buckets._levels) <= 10
    buckets.take("a")
    assert buckets.take("a") == (0, 0.0)
    assert buckets.take("a") == (0, 1.0)
    clock[0] += 3600
    assert buckets.take("a") == (1, 0.0)
    assert buckets.spend("a", 120) == 0
    assert buckets.wait_s("a") == 120.0, "what was taken beyond the level is paid back"
    clock[0] += 120
    assert buckets.wait_s("a") == 0.0
    assert [Buckets(0, 1).take("a") for _ in range(3)] == [(1, 0.0)] * 3
