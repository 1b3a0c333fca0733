"""MANIFEST.json: what a folder of weights must hold, written once when the folder is made."""

from pathlib import Path

import msgspec

from tunewright import clock
from tunewright.files_on_disk import sha256_of
from tunewright.models.records import Source

MANIFEST = "MANIFEST.json"


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`files` is name -> sha256 of every other file of the folder; `conversion` is None where nothing was converted."""

    code: str
    created_at: int
    source: Source
    conversion: int | None
    files: dict[str, str]


def write_manifest(folder: Path, code: str, source: Source, conversion: int | None) -> Manifest:
    """Hash all files of the flat `folder` and describe them in it."""
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    manifest = Manifest(code=code, created_at=clock.wall_s(), source=source, conversion=conversion, files=files)
    data = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (folder / MANIFEST).write_bytes(data + b"\n")
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """None if there is none that can be read, which is the same as no folder: folders appear whole."""
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError):
        return None
