"""What a project may call, see and delete."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tunewright.accounts.records import Project
from tunewright.errors import Conflict, InvalidRequest, NotFound, PermissionDenied, TunewrightError
from tunewright.models.catalogue import Catalogue
from tunewright.models.records import TunedModel
from tunewright.models.service import Card, ModelService
from tunewright.settings import HomeFolder
from tunewright.storage.database import Storage

PROOF = {"tensors": 4, "tensors_applied": 4, "max_logit_shift": 1.5}


class World:
    """Two projects, one base on disk, a real database."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.home = HomeFolder(root / "home")
        self.home.create()
        self.storage = Storage(f"sqlite:///{self.home.database}")
        self.storage.migrate()
        self.catalogue = Catalogue(self.home)
        self.catalogue.add(folder, "tiny")
        self.catalogue.set_alias("glm-4-flash", "tiny")
        self.models = ModelService(self.storage, self.catalogue, self.home)
        self.mine = Project(id="project-1", number="1234567890", name="one", created_at=1)
        self.theirs = Project(id="project-2", number="1234567891", name="two", created_at=1)
        with self.storage.write() as tx:
            tx.projects.insert(self.mine)
            tx.projects.insert(self.theirs)

    def reserve(self, project: Project, suffix: str | None = "s", created_at: int = 5) -> TunedModel:
        name = self.models.name_for(project, "tiny", suffix)
        model = TunedModel(
            id=f"model-{name[-8:]}",
            project_id=project.id,
            name=name,
            base_code="tiny",
            job_id="ftjob-1",
            created_at=created_at,
        )
        with self.storage.write() as tx:
            tx.models.insert(model)
        return model

    def publish(self, model: TunedModel, sha256: str = "a" * 64) -> TunedModel:
        folder = self.home.adapters / model.id
        folder.mkdir(exist_ok=True)
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
        with self.storage.write() as tx:
            return self.models.publish(
                tx,
                model,
                adapter_path=model.id,
                adapter_sha256=sha256,
                renderer_hash="r",
                checkpoint_step=9,
                proof=PROOF,
            )


@pytest.fixture
def world(tmp_path: Path, tiny_base: Path) -> Iterator[World]:
    world = World(tmp_path, tiny_base)
    yield world
    world.storage.close()


def test_bases_and_aliases_resolve(world: World) -> None:
    for name in ("tiny", "glm-4-flash"):
        resolved = world.models.resolve("project-1", name)
        assert (resolved.base.code, resolved.tuned) == ("tiny", None)
        assert resolved.base.path == world.home.bases / "tiny"


def test_a_base_that_is_not_pulled_names_the_command(world: World) -> None:
    with pytest.raises(InvalidRequest) as caught:
        world.models.resolve("project-1", "smollm2")
    assert (caught.value.code, caught.value.param) == ("model_not_pulled", "model")
    assert "tunewright models pull smollm2-135m" in caught.value.text()
    assert "tunewright models pull smollm2-135m" in caught.value.text("zh")
    with pytest.raises(NotFound):
        world.models.card("project-1", "smollm2")


def test_a_model_is_callable_from_published_to_deleted(world: World) -> None:
    reserved = world.reserve(world.mine)
    _unknown(world, "project-1", reserved.name)
    ready = world.publish(reserved)
    assert (ready.status, ready.proof, ready.checkpoint_step) == ("ready", PROOF, 9)
    resolved = world.models.resolve("project-1", reserved.name)
    assert resolved.tuned == ready
    assert resolved.base.code == "tiny"
    world.models.delete("project-1", reserved.name)
    with pytest.raises(NotFound):
        world.models.resolve("project-1", reserved.name)


def test_a_foreign_model_looks_like_no_model(world: World) -> None:
    name = world.publish(world.reserve(world.theirs)).name
    _unknown(world, "project-1", name)
    assert name not in {card.id for card in world.models.list("project-1")}
    assert (world.home.adapters / f"model-{name[-8:]}").exists()
    with pytest.raises(NotFound) as foreign:
        world.models.resolve("project-1", name)
    with pytest.raises(NotFound) as absent:
        world.models.resolve("project-1", name[:-1])
    assert foreign.value.text().replace(name, "X") == absent.value.text().replace(name[:-1], "X")


@pytest.mark.parametrize("name", ["", ":", "nothing", "tiny:1:2:3", "a:\x00", "a:\ud800", "../tiny", "a:" + "x" * 5000])
def test_odd_names_are_only_unknown(world: World, name: str) -> None:
    _unknown(world, "project-1", name)


def test_the_list_shows_what_can_be_called(world: World) -> None:
    old = world.publish(world.reserve(world.mine, created_at=5))
    new = world.publish(world.reserve(world.mine, created_at=6), sha256="b" * 64)
    world.reserve(world.mine)
    cards = world.models.list("project-1")
    assert [card.id for card in cards] == ["tiny", "glm-4-flash", new.name, old.name]
    assert [card.parent for card in cards] == [None, "tiny", "tiny", "tiny"]
    assert cards[0].created > 1_700_000_000
    assert cards[3] == Card(id=old.name, created=5, owned_by="project-1", parent="tiny")
    assert [world.models.card("project-1", card.id) for card in cards] == cards


def test_deleting_twice_gives_the_same_answer_and_removes_the_files(world: World) -> None:
    model = world.publish(world.reserve(world.mine))
    first = world.models.delete("project-1", model.name)
    assert first.status == "deleted"
    assert first.deleted_at is not None
    assert not (world.home.adapters / model.id).exists()
    assert world.models.delete("project-1", model.name) == first
    assert [card.id for card in world.models.list("project-1")] == ["tiny", "glm-4-flash"]


def test_a_repeated_delete_removes_what_a_crash_left(world: World) -> None:
    model = world.publish(world.reserve(world.mine))
    world.models.delete("project-1", model.name)
    (world.home.adapters / model.id).mkdir()
    world.models.delete("project-1", model.name)
    assert not (world.home.adapters / model.id).exists()


@pytest.mark.parametrize("path", [".", "..", "../models", "/"])
def test_nothing_outside_the_adapters_is_removed(world: World, path: str) -> None:
    model = world.publish(world.reserve(world.mine))
    with world.storage.write() as tx:
        tx.models.change(model, adapter_path=path)
    assert world.models.delete("project-1", model.name).status == "deleted"
    assert (world.home.adapters / model.id).exists()
    assert (world.home.bases / "tiny" / "config.json").exists()


@pytest.mark.parametrize("name", ["tiny", "glm-4-flash", "smollm2-135m"])
def test_bases_stay(world: World, name: str) -> None:
    with pytest.raises(PermissionDenied) as caught:
        world.models.delete("project-1", name)
    assert caught.value.code == "base_model"
    assert (world.home.bases / "tiny" / "config.json").exists()


def test_names_carry_base_project_and_suffix(world: World) -> None:
    names = {world.models.name_for(world.mine, "tiny", "my-suffix") for _ in range(50)}
    assert len(names) == 50
    assert all(name.startswith("tiny:1234567890:my-suffix:") and len(name.split(":")[3]) == 8 for name in names)
    assert world.models.name_for(world.mine, "tiny", None).startswith("tiny:1234567890::")
    assert not set("".join(names)) & set("/?#% ")


def test_publishing_again_is_harmless_and_never_revives(world: World) -> None:
    model = world.reserve(world.mine)
    ready = world.publish(model)
    assert world.publish(model) == ready
    assert world.publish(ready) == ready
    with pytest.raises(Conflict):
        world.publish(model, sha256="c" * 64)
    world.models.delete("project-1", model.name)
    with pytest.raises(Conflict):
        world.publish(model)


def test_no_model_without_proof(world: World) -> None:
    model = world.reserve(world.mine)
    with pytest.raises(ValueError, match="proof"), world.storage.write() as tx:
        world.models.publish(
            tx, model, adapter_path="x", adapter_sha256="x", renderer_hash="r", checkpoint_step=1, proof={}
        )
    _unknown(world, "project-1", model.name)


def _unknown(world: World, project_id: str, name: str) -> None:
    for call in (world.models.resolve, world.models.card, world.models.delete):
        with pytest.raises(TunewrightError) as caught:
            call(project_id, name)
        assert (type(caught.value), caught.value.code, caught.value.param) == (NotFound, "model_not_found", "model")
