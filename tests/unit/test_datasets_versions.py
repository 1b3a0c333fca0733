"""Repairs and splits on a real database and disk: whole or not at all, in this process or in one of their own."""

import msgspec
import pytest

from tests.unit.bad_rows import ASSISTANT, file
from tests.unit.test_datasets_service import BAD, PROJECT, Shop, key
from tests.unit.test_datasets_service import shop as shop
from tunewright.datasets import version_work
from tunewright.datasets.mending.repair import Choice
from tunewright.errors import Conflict, InvalidRequest, NotFound, Unavailable


def test_splits_and_their_halves(shop: Shop) -> None:
    rows = [{"messages": [{"role": "user", "content": f"q{i}"}, ASSISTANT]} for i in range(60)]
    parent = shop.upload(file(*rows))
    before = shop.files_on_disk()
    made = shop.service.versions.split(parent, 0.3, 1, idempotency=key())
    assert shop.service.versions.split(parent, 0.3, 1, idempotency=key()) == made
    halves = [b"".join(shop.service.content(PROJECT, half.id)[1]).splitlines() for half in made]
    assert sorted(halves[0] + halves[1]) == sorted(file(*rows).splitlines())
    assert [half.rows for half in made] == [len(half) for half in halves]
    assert [half.status for half in made] == ["processed", "processed"]
    assert len(shop.files_on_disk()) == len(before) + 2
    shop.service.delete(PROJECT, made.validation.id)
    with pytest.raises(NotFound):
        shop.service.versions.split(parent, 0.3, 1, idempotency=key())


def test_only_a_finished_file_is_made_into_another(shop: Shop) -> None:
    waiting = msgspec.structs.replace(shop.upload(), status="processing")
    with pytest.raises(Conflict) as caught:
        shop.service.versions.split(waiting, 0.3, 1)
    assert caught.value.code == "file_not_ready"
    assert len(shop.files_on_disk()) == 1


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every new version by a process of its own, however small the file."""
    monkeypatch.setattr(version_work, "CHILD_FROM_BYTES", 0)


ROWS = file(*[{"messages": [{"role": "user", "content": f"q{i}"}, ASSISTANT]} for i in range(60)])


def test_a_process_of_its_own_makes_the_same_versions(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = shop.upload(ROWS + BAD, on_problems="keep")
    made: list[list[bytes]] = []
    for least in (2**40, 0):
        monkeypatch.setattr(version_work, "CHILD_FROM_BYTES", least)
        mended = shop.service.versions.repair(parent, Choice(drop_bad_rows=True))
        halves = shop.service.versions.split(parent, 0.3, 5)
        assert mended.status == "processed"
        made.append([b"".join(shop.service.content(PROJECT, each.id)[1]) for each in (mended, *halves)])
    assert made[0] == made[1]


@pytest.mark.usefixtures("forked")
def test_what_the_process_raises_is_raised_here(shop: Shop) -> None:
    alone = shop.upload()
    before = shop.files_on_disk()
    with pytest.raises(InvalidRequest) as caught:
        shop.service.versions.split(alone, 0.3, 5)
    assert caught.value.code == "split_leaves_nothing"
    assert "{" not in caught.value.text("zh")
    assert shop.files_on_disk() == before


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("fault", ["left", "died"])
def test_a_version_that_is_not_finished_leaves_nothing(shop: Shop, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    parent = shop.upload(ROWS)
    before = shop.files_on_disk()
    monkeypatch.setattr(version_work, "_LOOK_EVERY_S", 0.001)
    if fault == "died":
        monkeypatch.setattr(version_work.sys, "executable", "/bin/false")

    def leave(done: int, total: int) -> None:
        raise OSError("nobody waits any more")

    with pytest.raises(Unavailable if fault == "died" else OSError):
        shop.service.versions.split(parent, 0.3, 5, watch=leave if fault == "left" else None)
    assert shop.files_on_disk() == before


def test_sweep_removes_the_folder_of_a_version_that_a_crash_cut_short(shop: Shop) -> None:
    folder = shop.home.temporary / "upload-x.part"
    folder.mkdir()
    (folder / ".training.17.tmp").write_bytes(b"half")
    shop.service.sweep()
    assert shop.files_on_disk() == [] and not folder.exists()
