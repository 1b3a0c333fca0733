"""What a folder of weights may contain. Everything that could run code is refused by name before anything is opened."""

import json
from pathlib import Path
from typing import Any

from tunewright.errors import InvalidRequest, quote
from tunewright.files_on_disk import link_or_copy
from tunewright.i18n import mark

_UNSAFE_SUFFIXES = (
    *(".bin", ".ckpt", ".gguf", ".h5", ".joblib", ".npy", ".npz", ".onnx", ".pickle", ".pkl", ".pt", ".pth"),
    *(".dll", ".dylib", ".py", ".pyc", ".pyo", ".sh", ".so"),
)
_UNSAFE_NAMES = frozenset({"modules.json", "adapter_config.json"})
"""Files that make a loader import classes, or load another base model than this one."""
_UNSAFE_KEYS = frozenset({"auto_map", "auto_mapping", "custom_pipeline", "trust_remote_code"})
_TAKEN_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".txt", ".model"})
_MAX_JSON_BYTES = 128 * 2**20


def copy_model_files(folder: Path, target: Path) -> None:
    """Hard-link (copy where that is impossible) the model files of `folder` into the empty folder `target`.

    Only the top level is taken: safetensors, JSON, templates, tokenizer files. Raises InvalidRequest(`unsafe_artifact`) naming
    whatever could run code or points elsewhere, before anything is taken.
    """
    unsafe = [quote(str(path.relative_to(folder))) for path in sorted(folder.rglob("*")) if _is_unsafe(path)]
    if folder.is_symlink() or unsafe:
        raise _unsafe(unsafe or [quote(folder.name)])
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in _TAKEN_SUFFIXES and not path.name.startswith((".", "MANIFEST")):
            link_or_copy(path, target / path.name)


def inspect_model_folder(folder: Path) -> dict[str, Any]:
    """The config of a flat folder in Hugging Face layout after checking that it is complete, readable and free of code.

    Raises InvalidRequest(`unsafe_artifact`, `invalid_artifact` or `incomplete_model`).
    """
    if unsafe := [quote(path.name) for path in sorted(folder.iterdir()) if _is_unsafe(path) or path.is_dir()]:
        raise _unsafe(unsafe)
    parsed = {path.name: _json_of(path) for path in sorted(folder.glob("*.json"))}
    for name, value in parsed.items():
        if isinstance(value, dict) and (keys := sorted(_UNSAFE_KEYS & value.keys())):
            raise _unsafe([f"{quote(name)}: {key}" for key in keys])
    config = parsed.get("config.json")
    missing = [name for name in ("config.json", "tokenizer.json") if not isinstance(parsed.get(name), dict)]
    if not _has_chat_template(folder, parsed.get("tokenizer_config.json")):
        missing.append("chat_template")
    if not list(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing or not isinstance(config, dict):
        raise InvalidRequest(
            "incomplete_model", mark("The folder lacks: {names}."), param="folder", names=", ".join(missing)
        )
    _check_weights(folder, parsed.get("model.safetensors.index.json"))
    _check_tokenizer(folder)
    return config


def _is_unsafe(path: Path) -> bool:
    special = path.is_symlink() or not (path.is_file() or path.is_dir())
    return special or path.suffix.lower() in _UNSAFE_SUFFIXES or path.name.lower() in _UNSAFE_NAMES


def _unsafe(names: list[str]) -> InvalidRequest:
    return InvalidRequest(
        "unsafe_artifact",
        mark("Only safetensors, JSON and templates are taken, no code, pickles or links; found: {names}."),
        param="folder",
        names=", ".join(names[:10]),
    )


def _invalid(name: str) -> InvalidRequest:
    return InvalidRequest(
        "invalid_artifact", mark('The file "{name}" is damaged or not of its kind.'), param="folder", name=quote(name)
    )


def _json_of(path: Path) -> Any:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise _invalid(path.name)
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _invalid(path.name) from error


def _has_chat_template(folder: Path, tokenizer_config: Any) -> bool:
    in_config = isinstance(tokenizer_config, dict) and tokenizer_config.get("chat_template")
    return bool(in_config) or (folder / "chat_template.jinja").is_file()


def _check_weights(folder: Path, index: Any) -> None:
    """Every safetensors header opens, and an index names only files that are here."""
    from safetensors import SafetensorError, safe_open

    names = {path.name for path in folder.glob("*.safetensors")}
    for name in sorted(names):
        try:
            with safe_open(folder / name, framework="numpy") as weights:
                if not weights.keys():
                    raise _invalid(name)
        except (SafetensorError, OSError) as error:
            raise _invalid(name) from error
    if index is None:
        if "model.safetensors" not in names:
            raise _invalid("model.safetensors.index.json")
        return
    parts = index.get("weight_map") if isinstance(index, dict) else None
    # A part's name is joined to the folder by whoever loads it, so "../other" would leave it.
    if not isinstance(parts, dict) or not names.issuperset(str(part) for part in parts.values()):
        raise _invalid("model.safetensors.index.json")


def _check_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception for every kind of damage
        raise _invalid("tokenizer.json") from error
