"""Folders of models with all weights of their own: sealed when they are written, checked before they are loaded.

Such a folder holds config.json, model*.safetensors, the base's tokenizer, templates and generation settings, and MANIFEST.json:
the base's code and the sha256 of every other file. Who knows the sha256 of the manifest knows them all.
"""

import json
import shutil
from pathlib import Path

from tunewright.errors import InvalidRequest, quote
from tunewright.files_on_disk import sha256_of
from tunewright.i18n import mark
from tunewright.models.manifest import MANIFEST

LARGEST_PART = "5GB"
"""Of the files that the weights are cut into."""


def seal(folder: Path, base: Path, base_code: str) -> str:
    """Add to freshly saved weights what else a model folder has; returns the sha256 of the manifest."""
    for source in sorted(base.iterdir()):
        ours = source.name in ("config.json", MANIFEST) or source.name.endswith(".safetensors.index.json")
        if source.is_file() and not ours and source.suffix in (".json", ".jinja", ".model", ".txt"):
            shutil.copyfile(source, folder / source.name)
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "base": base_code, "files": files}, indent=1), "utf-8")
    return sha256_of(folder / MANIFEST)


def verify(folder: Path, manifest_sha256: str) -> None:
    """Raises InvalidRequest(`model_files_changed`) that names a file if the folder is not what was sealed."""
    wrong = MANIFEST
    try:
        if sha256_of(folder / MANIFEST) == manifest_sha256:
            files = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
            there = {path.name for path in folder.iterdir()} - {MANIFEST}
            differ = sorted(there ^ files.keys()) + [
                n for n in files if n in there and sha256_of(folder / n) != files[n]
            ]
            if not differ:
                return
            wrong = differ[0]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InvalidRequest(
        "model_files_changed",
        mark("The files of the trained model are not those that its training wrote (file {name})."),
        name=quote(wrong),
    )
