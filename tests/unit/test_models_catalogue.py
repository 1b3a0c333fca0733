"""The catalogue: built-in data, the operator's file beside it, aliases, and folders that are taken in or refused."""

import json
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tunewright.errors import InvalidRequest, Misconfigured, TunewrightError
from tunewright.models.catalogue import Catalogue
from tunewright.models.manifest import MANIFEST
from tunewright.models.pull import verify
from tunewright.settings import HomeFolder


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    return Catalogue(HomeFolder(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path: Path, tiny_base: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "folder"))


def code_of(catalogue: Catalogue, name: str) -> str | None:
    base = catalogue.find(name)
    return None if base is None else base.code


def test_built_in_entries_are_complete(catalogue: Catalogue) -> None:
    bases = {base.code: base for base in catalogue.all()}
    smol = bases["smollm2-135m"]
    assert (smol.licence, smol.context_tokens, smol.pool, smol.path) == ("Apache-2.0", 8192, True, None)
    assert (smol.row_kinds, smol.methods) == (("chat", "function", "preference"), ("lora", "full", "dpo"))
    assert smol.source.sha256 is not None
    assert len(smol.source.sha256) == 64
    assert {base.source.kind for base in bases.values()} == {"package", "hub"}
    assert all(base.licence and base.context_tokens >= 8192 for base in bases.values())


def test_names_resolve_in_order_code_operators_alias_built_in_alias(catalogue: Catalogue) -> None:
    assert code_of(catalogue, "glm-4-9b") == "glm-4-9b-chat"
    catalogue.set_alias("glm-4-flash", "smollm2")
    catalogue.set_alias("glm-4-9b", "glm-4-flash")
    assert code_of(catalogue, "glm-4-flash") == code_of(catalogue, "glm-4-9b") == "smollm2-135m"
    smol, glm = catalogue.find("smollm2-135m"), catalogue.find("glm-4-9b-chat")
    assert smol is not None
    assert glm is not None
    assert set(smol.aliases) == {"smollm2", "glm-4-flash", "glm-4-9b"}
    assert glm.aliases == ()
    assert code_of(catalogue, "nothing") is None


@pytest.mark.parametrize(
    ("alias", "target", "code"),
    [
        ("smollm2-135m", "glm-4-9b-chat", "alias_is_code"),
        ("a", "a", "alias_cycle"),
        ("first", "second", "alias_cycle"),
        ("a", "nothing", "unknown_base"),
        ("a b", "smollm2-135m", "invalid_name"),
        ("a/b", "smollm2-135m", "invalid_name"),
        ("a:b", "smollm2-135m", "invalid_name"),
        ("..", "smollm2-135m", "invalid_name"),
        ("a\n", "smollm2-135m", "invalid_name"),
        ("x" * 65, "smollm2-135m", "invalid_name"),
        ("", "smollm2-135m", "invalid_name"),
    ],
)
def test_aliases_that_make_no_sense_are_refused(catalogue: Catalogue, alias: str, target: str, code: str) -> None:
    catalogue.set_alias("first", "smollm2-135m")
    catalogue.set_alias("second", "first")
    before = catalogue.home.catalogue.read_bytes()
    with pytest.raises(TunewrightError) as caught:
        catalogue.set_alias(alias, target)
    assert caught.value.code == code
    assert caught.value.text("zh") != caught.value.text("en")
    assert catalogue.home.catalogue.read_bytes() == before


def test_an_alias_can_be_set_anew(catalogue: Catalogue) -> None:
    catalogue.set_alias("m", "smollm2-135m")
    catalogue.set_alias("m", "smollm2-360m")
    assert code_of(catalogue, "m") == "smollm2-360m"


def test_edits_at_the_same_time_all_stay(catalogue: Catalogue) -> None:
    home = catalogue.home
    home.create()
    code = (
        "import sys; from pathlib import Path; from tunewright.models.catalogue import Catalogue\n"
        "from tunewright.settings import HomeFolder\n"
        "for n in range(10): Catalogue(HomeFolder(Path(sys.argv[1]))).set_alias(f'p-{n}', 'smollm2-135m')"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(home.root)])

    def edit(thread: int) -> None:
        for n in range(10):
            Catalogue(home).set_alias(f"t{thread}-{n}", "smollm2-135m")

    threads = [threading.Thread(target=edit, args=(thread,)) for thread in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert other.wait(60) == 0
    base = catalogue.find("smollm2-135m")
    assert base is not None
    assert len(base.aliases) == 1 + 40


def test_the_operators_comments_survive_an_edit(catalogue: Catalogue) -> None:
    catalogue.home.create()
    catalogue.home.catalogue.write_text('# mine\n[aliases]\n"glm-4-air" = "smollm2-135m"  # for the guide\n')
    catalogue.set_alias("glm-4-flash", "glm-4-air")
    text = catalogue.home.catalogue.read_text()
    assert "# mine" in text
    assert "# for the guide" in text
    assert code_of(catalogue, "glm-4-flash") == "smollm2-135m"


@pytest.mark.parametrize(
    "text",
    [
        "[bases",
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
        "[bases.x]\nname = 1",
        '[bases.x]\nname = "X"\nlicence = "MIT"\ncontext_tokens = 1\nsurprise = 1\nsource = {kind = "hub"}',
        '[bases."a b"]\nname = "X"\nlicence = "MIT"\ncontext_tokens = 1\nsource = {kind = "hub"}',
        "bases = 3",
        '[aliases]\na = "b"\nb = "a"',
        '[aliases]\nsmollm2-135m = "glm-4-9b-chat"',
        "[aliases]\na = 1",
    ],
)
def test_a_wrong_file_is_refused_at_start_and_ignored_by_a_running_process(catalogue: Catalogue, text: str) -> None:
    catalogue.set_alias("m", "smollm2-135m")
    assert code_of(catalogue, "m") == "smollm2-135m"
    catalogue.home.catalogue.write_text(text, encoding="latin-1")
    with pytest.raises(Misconfigured) as caught:
        Catalogue(catalogue.home).all()
    assert caught.value.code == "invalid_catalogue"
    assert str(catalogue.home.catalogue) in caught.value.text()
    assert code_of(catalogue, "m") == "smollm2-135m"
    with pytest.raises(Misconfigured):
        catalogue.set_alias("other", "smollm2-135m")


# -- add ------------------------------------------------------------------------------------------------------------------


def test_a_folder_is_taken_in(catalogue: Catalogue, folder: Path) -> None:
    (folder / "README.md").write_text("# not needed")
    base = catalogue.add(folder, "my.model-1", licence="MIT", aliases=["mine"])
    assert base == catalogue.find("mine") == Catalogue(catalogue.home).find("my.model-1")
    assert (base.licence, base.context_tokens, base.source.kind, base.name) == ("MIT", 2048, "folder", "my.model-1")
    assert base.path is not None
    present = {path.name for path in base.path.iterdir()}
    assert present == {MANIFEST, *base.files}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= present
    assert "README.md" not in present
    verify(base)
    assert list(catalogue.home.temporary.iterdir()) == []
    shutil.rmtree(folder)
    verify(base)


def test_the_folder_of_a_hubs_base_can_be_brought_along(catalogue: Catalogue, folder: Path) -> None:
    base = catalogue.add(folder, "glm-4-9b-chat")
    assert (base.name, base.licence, base.context_tokens) == ("GLM-4-9B-Chat", "glm-4", 2048)
    assert code_of(catalogue, "glm-4-9b") == "glm-4-9b-chat"
    with pytest.raises(InvalidRequest) as caught:
        catalogue.add(folder, "glm-4-9b-chat")
    assert caught.value.code == "base_exists"


@pytest.mark.parametrize(
    ("code", "overrides", "expected"),
    [
        ("a b", {}, "invalid_name"),
        ("../a", {}, "invalid_name"),
        ("-a", {}, "invalid_name"),
        ("smollm2", {}, "code_is_alias"),
        ("a", {"context_tokens": "many"}, "invalid_value"),
        ("a", {"surprise": 1}, "invalid_value"),
        ("a", {"aliases": ["x y"]}, "invalid_name"),
        ("a", {"aliases": ["smollm2-135m"]}, "alias_taken"),
    ],
)
def test_names_and_values_are_checked(
    catalogue: Catalogue, folder: Path, code: str, overrides: dict[str, object], expected: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        catalogue.add(folder, code, **overrides)
    assert caught.value.code == expected
    assert not catalogue.home.catalogue.exists()


def test_an_absent_folder_is_named(catalogue: Catalogue, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        catalogue.add(tmp_path / "nowhere", "a")
    assert caught.value.code == "folder_not_found"


@pytest.mark.parametrize(
    "name",
    [
        *("modeling.py", "x.so", "pytorch_model.bin", "a.pt", "a.pth", "a.pkl", "a.ckpt", "A.PY", "w.h5", "run.sh"),
        *("modules.json", "adapter_config.json", "inner/deep/a.pickle"),
    ],
)
def test_whatever_could_run_code_is_refused_by_name(catalogue: Catalogue, folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"{}")
    _refused(catalogue, folder, "unsafe_artifact", name)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("key", ["auto_map", "trust_remote_code", "custom_pipeline"])
def test_keys_that_load_code_are_refused(catalogue: Catalogue, folder: Path, file: str, key: str) -> None:
    value = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(value | {key: {"AutoModel": "x.Y"}}))
    _refused(catalogue, folder, "unsafe_artifact", key)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "notes.txt"])
def test_links_are_refused(catalogue: Catalogue, folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).touch()
    (folder / name).rename(tmp_path / "target")
    (folder / name).symlink_to(tmp_path / "target")
    _refused(catalogue, folder, "unsafe_artifact", name)


def test_a_linked_folder_is_refused(catalogue: Catalogue, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    _refused(catalogue, tmp_path / "link", "unsafe_artifact", "link")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_an_incomplete_folder_is_refused(catalogue: Catalogue, folder: Path, name: str) -> None:
    (folder / name).unlink()
    named = {"model.safetensors": "*.safetensors", "tokenizer_config.json": "chat_template"}.get(name, name)
    _refused(catalogue, folder, "incomplete_model", named)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", pickle.dumps({"a": 1})),
        ("model.safetensors", b"\xff" * 64),
        ("config.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", b"[" * 100_000),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../other.safetensors"}}'),
        ("model.safetensors.index.json", b'{"weight_map": []}'),
    ],
)
def test_damaged_files_are_refused(catalogue: Catalogue, folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    _refused(catalogue, folder, "invalid_artifact", name)


def test_a_killed_add_can_be_repeated(catalogue: Catalogue, folder: Path) -> None:
    orphan = catalogue.home.bases / "a"
    orphan.mkdir(parents=True)
    (orphan / "config.json").write_text("{}")
    base = catalogue.add(folder, "a")
    verify(base)


def _refused(catalogue: Catalogue, folder: Path, code: str, named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        catalogue.add(folder, "a")
    assert caught.value.code == code
    assert named in caught.value.text()
    assert caught.value.text("zh") != caught.value.text("en")
    assert catalogue.find("a") is None
    assert list(catalogue.home.bases.iterdir()) == []
    assert list(catalogue.home.temporary.iterdir()) == []
