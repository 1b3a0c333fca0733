"""The checks of a create-job request, field by field. Pure: rows come in as records."""

import re
import secrets
from typing import Any

import msgspec

from tunewright.datasets.records import FINE_TUNE_PURPOSES, File
from tunewright.errors import Conflict, InvalidRequest, NotFound, quote
from tunewright.i18n import mark
from tunewright.models.records import Base

SUPERVISED = "supervised"
DPO = "dpo"
LARGEST_SEED = 2**31 - 1

_SUFFIX = re.compile(r"[A-Za-z0-9_-]{1,40}")
_REQUEST_ID_CHARACTERS = 128
_METADATA_PAIRS, _METADATA_KEY, _METADATA_VALUE = 16, 64, 512


class CreateJob(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller asks for, in the words of neither dialect. Values are as they came; `JobService.create` checks them."""

    model: Any = None
    training_file: Any = None
    validation_file: Any = None
    suffix: Any = None
    seed: Any = None
    method: Any = SUPERVISED
    training_type: Any = "lora"
    hyperparameters: Any = None
    metadata: Any = None
    request_id: Any = None


def check_text(value: Any, param: str) -> str:
    """A required name or id. Raises InvalidRequest(`missing_required_parameter` or `invalid_value`)."""
    if value is None or value == "":
        raise InvalidRequest("missing_required_parameter", mark("{field} is required."), param=param, field=param)
    if not isinstance(value, str):
        raise InvalidRequest("invalid_value", mark("{field} must be text."), param=param, field=param)
    return value


def check_method(base: Base, method: Any, training_type: Any) -> None:
    """Raises InvalidRequest(`method_not_supported`, `training_type_not_supported`) for what `base` does not take."""
    known = method in (SUPERVISED, DPO) and isinstance(method, str)
    if not known or (method == DPO and DPO not in base.methods):
        offered = [SUPERVISED, *(name for name in base.methods if name == DPO)]
        raise InvalidRequest(
            "method_not_supported",
            mark("The method {method} is not supported for {model}. Supported: {offered}."),
            param="method.type",
            method=quote(method),
            model=base.code,
            offered=", ".join(offered),
        )
    types = [name for name in base.methods if name != DPO]
    if not isinstance(training_type, str) or training_type not in types:
        raise InvalidRequest(
            "training_type_not_supported",
            mark("The training type {training_type} is not supported for {model}. Supported: {offered}."),
            param="training_type",
            training_type=quote(training_type),
            model=base.code,
            offered=", ".join(types),
        )


def check_file(file: File | None, param: str, file_id: str, base: Base, method: str) -> File:
    """The file if this base can train on it that way.

    Raises NotFound(`file_not_found`), Conflict(`file_not_ready`), InvalidRequest(`wrong_purpose`, `kind_not_supported`).
    """
    if file is None:
        raise NotFound("file_not_found", mark("There is no file {file}."), param=param, file=quote(file_id))
    if file.purpose not in FINE_TUNE_PURPOSES:
        raise InvalidRequest(
            "wrong_purpose",
            mark("File {file} has the purpose {purpose}; training takes files with the purpose {wanted}."),
            param=param,
            file=file.id,
            purpose=file.purpose,
            wanted=FINE_TUNE_PURPOSES[0],
        )
    if file.status != "processed":
        raise Conflict("file_not_ready", mark("File {file} is not ready yet."), param=param, file=file.id)
    taken = [kind for kind in base.row_kinds if (kind == "preference") == (method == DPO)]
    if file.kind not in taken:
        raise InvalidRequest(
            "kind_not_supported",
            mark("File {file} holds rows of the kind {kind}; {method} training of {model} takes: {taken}."),
            param=param,
            file=file.id,
            kind=file.kind or "?",
            method=method,
            model=base.code,
            taken=", ".join(taken),
        )
    return file


def check_suffix(suffix: Any) -> str | None:
    """None if absent. Raises InvalidRequest(`invalid_suffix`)."""
    if suffix is None or (isinstance(suffix, str) and _SUFFIX.fullmatch(suffix)):
        return suffix
    raise InvalidRequest(
        "invalid_suffix",
        mark("suffix must be 1 to 40 letters, digits, '-' or '_', not {value}."),
        param="suffix",
        value=quote(suffix),
    )


def check_seed(seed: Any) -> int:
    """A random one if absent. Raises InvalidRequest(`invalid_value`)."""
    if seed is None:
        return secrets.randbelow(LARGEST_SEED + 1)
    if isinstance(seed, float) and seed.is_integer():
        seed = int(seed)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
        raise InvalidRequest(
            "invalid_value",
            mark("seed must be a whole number from 0 to {most}, not {value}."),
            param="seed",
            most=LARGEST_SEED,
            value=quote(seed),
        )
    return seed


def check_metadata(metadata: Any) -> dict[str, str] | None:
    """Raises InvalidRequest(`invalid_value`) beyond 16 pairs of text, 64 characters a key, 512 a value."""
    if metadata is None:
        return None
    right = (
        isinstance(metadata, dict)
        and len(metadata) <= _METADATA_PAIRS
        and all(isinstance(key, str) and 1 <= len(key) <= _METADATA_KEY for key in metadata)
        and all(isinstance(value, str) and len(value) <= _METADATA_VALUE for value in metadata.values())
    )
    if not right:
        raise InvalidRequest(
            "invalid_value",
            mark(
                "metadata must be an object of at most {pairs} texts; keys up to {key}, values up to {value} characters."
            ),
            param="metadata",
            pairs=_METADATA_PAIRS,
            key=_METADATA_KEY,
            value=_METADATA_VALUE,
        )
    return metadata


def check_request_id(request_id: Any) -> str | None:
    """None if absent or empty. Raises InvalidRequest(`invalid_value`)."""
    if request_id is None or request_id == "":
        return None
    if isinstance(request_id, str) and len(request_id) <= _REQUEST_ID_CHARACTERS and request_id.isprintable():
        return request_id
    raise InvalidRequest(
        "invalid_value",
        mark("request_id must be text of at most {most} printable characters."),
        param="request_id",
        most=_REQUEST_ID_CHARACTERS,
    )
