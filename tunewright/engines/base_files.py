"""Are the base's files those that the catalogue names? Needs no torch, so it runs while torch is imported."""

from pathlib import Path

from tunewright.errors import Misconfigured
from tunewright.files_on_disk import sha256_of
from tunewright.i18n import mark


def verify_files(folder: Path, files: dict[str, str]) -> None:
    """Check the sha256 of every listed file. Raises Misconfigured `base_changed` naming the first that differs."""
    for name, expected in sorted(files.items()):
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file() or sha256_of(path) != expected:
            raise Misconfigured(
                "base_changed",
                mark('The file "{name}" of the base is missing or was changed since it was added.'),
                name=name,
            )
