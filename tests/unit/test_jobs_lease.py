"""One active control loop."""

from pathlib import Path

from tests.job_bench import Bench
from tunewright.jobs.lease import Lease, holder_of
from tunewright.settings import HomeFolder


def test_one_holder_until_it_lets_go(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "home")
    first, second = Lease(bench.storage, "jobs", "a"), Lease(bench.storage, "jobs", "b")
    assert first.held() and first.held() and not second.held()
    assert Lease(bench.storage, "jobs", "a").held(), "the same holder after a restart waits for nothing"
    assert Lease(bench.storage, "other", "b").held()
    second.release()
    assert not second.held(), "who does not hold it can't release it"
    first.release()
    assert second.held() and not first.held()
    bench.storage.close()


def test_an_expired_lease_is_taken_over_and_the_old_holder_notices(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "home")
    first = Lease(bench.storage, "jobs", "a", ttl_s=0.0)
    assert first.held()
    second = Lease(bench.storage, "jobs", "b", ttl_s=60)
    assert second.held() and not first.held()
    bench.storage.close()


def test_a_home_keeps_its_holder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    home, again, other = HomeFolder(tmp_path / "a"), HomeFolder(tmp_path / "a"), HomeFolder(tmp_path / "b")
    assert holder_of(home) == holder_of(again) != holder_of(other)
    again.server = 2
    assert holder_of(home) != holder_of(again), "each server of a home has a name of its own"
