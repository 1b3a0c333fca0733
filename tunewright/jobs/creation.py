"""The checks of a create-job request, field by field. Pure: rows come in as records."""

import math
import re
import secrets
from collections.abc import Mapping
from typing import Any

import msgspec

from tunewright.datasets.records import FINE_TUNE_PURPOSES, File
from tunewright.datasets.report import Report
from tunewright.errors import Conflict, InvalidRequest, NotFound, as_sent, quote
from tunewright.i18n import mark
from tunewright.jobs.scheduling import PRIORITIES
from tunewright.models.records import Base, TunedModel

NEED_VALIDATION = ("early_stopping", "eval_steps")
"""Hyperparameters that mean nothing without validation rows."""
SUPERVISED = "supervised"
DPO = "dpo"
QLORA = "qlora"
REHEARSALS = ("auto", "always", "off")
LARGEST_SEED = 2**31 - 1
MOST_BAD_ROWS = 100_000
LARGEST_BAD_RATIO = 0.5
LARGEST_SPLIT = 0.5

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
    max_bad_rows: Any = None
    max_bad_ratio: Any = None
    validation_split: Any = None
    priority: Any = None
    rehearsal: Any = None
    receipts: Any = None
    tensorboard: Any = None


def with_changes(request: CreateJob, changes: Mapping[str, Any]) -> CreateJob:
    """`request` with what a `records.Suggestion` changes; `hyperparameters` that it does not name stay."""
    fields = dict(changes)
    if "hyperparameters" in fields:
        fields["hyperparameters"] = {**(request.hyperparameters or {}), **fields["hyperparameters"]}
    return msgspec.structs.replace(request, **fields)


class Tolerance(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How many bad rows of a file a job may leave out; where both are given, both must hold. None of either: no bad row."""

    max_bad_rows: int | None = None
    max_bad_ratio: float | None = None

    def allowed(self, rows: int) -> int:
        """Of a file with so many rows. A ratio is rounded down to whole rows."""
        limits = [] if self.max_bad_rows is None else [self.max_bad_rows]
        if self.max_bad_ratio is not None:
            limits.append(math.floor(rows * self.max_bad_ratio + 1e-9))  # 0.07 of 100 rows are 7, not 6
        return min(limits, default=0)


def check_text(value: Any, param: str) -> str:
    """A required name or id. Raises InvalidRequest(`missing_required_parameter` or `invalid_value`)."""
    if value is None or value == "":
        raise InvalidRequest("missing_required_parameter", mark("{field} is required."), param=param, field=param)
    if not isinstance(value, str):
        raise InvalidRequest("invalid_value", mark("{field} must be text."), param=param, field=param)
    return value


def offered(base: Base, tuned: TunedModel | None = None) -> list[tuple[str, str]]:
    """(method, training type) of every training that starts from `base`, or from `tuned`: an adapter goes on being trained
    and nothing else."""
    types = [name for name in base.methods if name == "lora" or (name != DPO and tuned is None)]
    pairs = [(DPO, "lora")] if DPO in base.methods and "lora" in types else []
    return [(SUPERVISED, name) for name in types] + pairs


def check_method(base: Base, method: Any, training_type: Any, tuned: TunedModel | None = None) -> None:
    """Raises InvalidRequest(`method_not_supported`, `training_type_not_supported`) for what is not `offered`."""
    if training_type == QLORA:
        raise InvalidRequest(
            "training_type_not_supported",
            mark(
                "QLoRA keeps the base in 4 bits, which needs a GPU and is not in this release. "
                'Use training_type "lora", which takes more memory and gives the same kind of adapter.'
            ),
            param="training_type",
        )
    pairs = offered(base, tuned)
    methods = list(dict.fromkeys(name for name, _ in pairs)) or [SUPERVISED]
    if not isinstance(method, str) or method not in methods:
        raise InvalidRequest(
            "method_not_supported",
            mark("The method {method} is not supported for {model}. Supported: {offered}."),
            param="method.type",
            method=quote(method),
            model=base.code,
            offered=", ".join(methods),
        )
    types = [name for known, name in pairs if known == method]
    if not isinstance(training_type, str) or training_type not in types:
        raise InvalidRequest(
            "training_type_not_supported",
            mark("The training type {training_type} is not supported for {model}. Supported: {offered}."),
            param="training_type",
            training_type=quote(training_type),
            model=base.code if tuned is None else tuned.name,
            offered=", ".join(types),
        )


def check_file(
    file: File | None, param: str, file_id: str, base: Base, method: str, tolerance: Tolerance | None = None
) -> File:
    """The file if this base can train on it that way.

    Raises NotFound(`file_not_found`), Conflict(`file_not_ready`), InvalidRequest(`wrong_purpose`, `file_has_errors`,
    `too_many_bad_rows`, `kind_not_supported`).
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
    if file.status == "error":
        check_bad_rows(file, param, tolerance or Tolerance())
    elif file.status != "processed":
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


def check_bad_rows(file: File, param: str, tolerance: Tolerance) -> None:
    """Let a file with errors pass if all of them are in rows and the rows are few enough to be left out.

    Raises InvalidRequest(`file_has_errors`, `too_many_bad_rows`).
    """
    report = msgspec.convert(file.report, Report)
    if report.file_errors > 0:
        raise InvalidRequest(
            "file_has_errors",
            mark(
                "File {file} has errors that concern all of it ({codes}), which no tolerance covers. "
                "Mend it with POST /api/v1/datasets/{file}/repair, or upload it again."
            ),
            param=param,
            file=file.id,
            codes=", ".join(sorted({p.code for p in report.problems if p.severity == "error" and p.line is None})),
        )
    if tolerance == Tolerance():
        raise InvalidRequest(
            "file_has_errors",
            mark(
                "{bad} of the {rows} rows of file {file} have errors. Mend it with POST /api/v1/datasets/{file}/repair, "
                "or leave those rows out with max_bad_rows or max_bad_ratio."
            ),
            param=param,
            file=file.id,
            bad=report.bad_rows,
            rows=report.rows,
        )
    check_number_of_bad_rows(file, param, tolerance, found=report.bad_rows, rows=report.rows)


def check_number_of_bad_rows(file: File, param: str, tolerance: Tolerance, *, found: int, rows: int) -> None:
    """Raises InvalidRequest(`too_many_bad_rows`)."""
    allowed = tolerance.allowed(rows)
    if found > allowed:
        raise InvalidRequest(
            "too_many_bad_rows",
            mark("{found} of the {rows} rows of file {file} have errors; this job allows {allowed}."),
            param=param,
            file=file.id,
            found=found,
            rows=rows,
            allowed=allowed,
        )


def check_tolerance(max_bad_rows: Any, max_bad_ratio: Any) -> Tolerance:
    """Raises InvalidRequest(`invalid_value`) beyond 0 to 100,000 rows and 0 to 0.5 of the rows."""
    rows = max_bad_rows
    if isinstance(rows, float) and rows.is_integer():
        rows = int(rows)
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or not 0 <= rows <= MOST_BAD_ROWS):
        raise InvalidRequest(
            "invalid_value",
            mark("max_bad_rows must be a whole number from 0 to {most}, not {value}."),
            param="max_bad_rows",
            most=MOST_BAD_ROWS,
            value=as_sent(max_bad_rows),
        )
    ratio = max_bad_ratio
    if ratio is not None and not (_is_number(ratio) and 0 <= ratio <= LARGEST_BAD_RATIO):
        raise InvalidRequest(
            "invalid_value",
            mark("max_bad_ratio must be a number from 0 to {most}, not {value}."),
            param="max_bad_ratio",
            most=LARGEST_BAD_RATIO,
            value=as_sent(max_bad_ratio),
        )
    return Tolerance(max_bad_rows=rows, max_bad_ratio=None if ratio is None else float(ratio))


def check_split(validation_split: Any, validation_file: Any) -> float | None:
    """None if absent. Raises InvalidRequest(`invalid_value`), also beside a validation file."""
    if validation_split is None:
        return None
    if not (_is_number(validation_split) and 0 < validation_split <= LARGEST_SPLIT):
        raise InvalidRequest(
            "invalid_value",
            mark("validation_split must be a number above 0 and up to {most}, not {value}."),
            param="validation_split",
            most=LARGEST_SPLIT,
            value=as_sent(validation_split),
        )
    if validation_file not in (None, ""):
        raise InvalidRequest(
            "invalid_value",
            mark("validation_split and validation_file exclude each other; leave one out."),
            param="validation_split",
        )
    return float(validation_split)


def check_measured(requested: Mapping[str, Any], validation_file: str | None, validation_split: float | None) -> None:
    """Raises InvalidRequest(`validation_rows_required`) for what can't be done without validation rows."""
    if validation_file is not None or validation_split is not None:
        return
    for name in NEED_VALIDATION:
        if name in requested:
            raise InvalidRequest(
                "validation_rows_required",
                mark("{field} needs validation rows: name a validation_file or a validation_split."),
                param=f"hyperparameters.{name}",
                field=f"hyperparameters.{name}",
            )


def check_receipts(receipts: Any) -> str:
    """`auto` if absent. Raises InvalidRequest(`invalid_value`)."""
    if receipts is None:
        return "auto"
    if receipts not in ("auto", "on", "off"):
        raise InvalidRequest(
            "invalid_value",
            mark("receipts must be auto, on or off, not {value}."),
            param="receipts",
            value=as_sent(receipts),
        )
    return receipts


def check_tensorboard(wish: Any) -> bool:
    """False if absent. Raises InvalidRequest(`invalid_value`)."""
    if wish is None or isinstance(wish, bool):
        return bool(wish)
    raise InvalidRequest(
        "invalid_value",
        mark("{field} must be true or false, not {value}."),
        param="tensorboard",
        field="tensorboard",
        value=as_sent(wish),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_rehearsal(wish: Any) -> str | None:
    """None if absent: the server's setting holds. Raises InvalidRequest(`invalid_value`)."""
    if wish is None or (isinstance(wish, str) and wish in REHEARSALS):
        return wish
    raise InvalidRequest(
        "invalid_value",
        mark("rehearsal must be one of {known}, not {value}."),
        param="rehearsal",
        known=", ".join(REHEARSALS),
        value=as_sent(wish),
    )


def check_suffix(suffix: Any) -> str | None:
    """None if absent. Raises InvalidRequest(`invalid_suffix`)."""
    if suffix is None or (isinstance(suffix, str) and _SUFFIX.fullmatch(suffix)):
        return suffix
    raise InvalidRequest(
        "invalid_suffix",
        mark("suffix must be 1 to 40 letters, digits, '-' or '_', not {value}."),
        param="suffix",
        value=as_sent(suffix),
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
            value=as_sent(seed),
        )
    return seed


def check_priority(priority: Any) -> str:
    """`normal` if absent. Raises InvalidRequest(`invalid_value`)."""
    if priority is None:
        return "normal"
    if isinstance(priority, str) and priority in PRIORITIES:
        return priority
    raise InvalidRequest(
        "invalid_value",
        mark("priority must be one of {known}, not {value}."),
        param="priority",
        known=", ".join(PRIORITIES),
        value=as_sent(priority),
    )


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
