"""Trains on exactly the bytes that the server recorded, or not at all."""

from pathlib import Path

from tunewright.errors import InvalidRequest, Misconfigured, quote
from tunewright.files_on_disk import sha256_of
from tunewright.i18n import mark
from tunewright.jobs.spec import TrainingSpec


def verify_inputs(spec: TrainingSpec) -> None:
    """Hash data files and base model (0.4-1 s for 540 MB; hashing releases the interpreter lock).

    Raises InvalidRequest(`file_integrity`) or Misconfigured(`base_model_integrity`).
    """
    _verify_data(spec.training_data, spec.training_sha256)
    if spec.validation_data is not None:
        _verify_data(spec.validation_data, spec.validation_sha256)
    _verify_base(Path(spec.base_path), spec.base_files, spec.base_code)


def _verify_data(path: str, expected: str | None) -> None:
    try:
        found = sha256_of(Path(path))
    except OSError:
        found = None
    if found is None or found != expected:
        raise InvalidRequest(
            "file_integrity",
            mark("The data file {name} is not the one that was uploaded: its sha256 differs. Upload it again."),
            name=quote(Path(path).name),
        )


def _verify_base(folder: Path, files: dict[str, str], code: str) -> None:
    # Weights that the catalogue does not list would be loaded unseen.
    unlisted = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in files)
    wrong = unlisted[:1] or [name for name, expected in files.items() if _differs(folder / name, expected)]
    if wrong or not any(name.endswith(".safetensors") for name in files):
        raise Misconfigured(
            "base_model_integrity",
            mark("The base model {base} is damaged or changed (file {name}). Remove it and pull it again."),
            base=code,
            name=quote(wrong[0] if wrong else "*.safetensors"),
        )


def _differs(path: Path, expected: str) -> bool:
    try:
        return sha256_of(path) != expected
    except OSError:
        return True
