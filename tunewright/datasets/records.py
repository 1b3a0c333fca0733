"""What the product keeps of an uploaded file."""

from typing import Any

import msgspec

FINE_TUNE_PURPOSES = (
    "fine-tune",
    "fine-tune-function-calling",
    "fine-tune-vision-cogview",
    "fine-tune-vision-cogvlm",
)
PURPOSES = (*FINE_TUNE_PURPOSES, "batch")


class File(msgspec.Struct, frozen=True, kw_only=True):
    """One uploaded or produced file. `kind` is None unless the file holds training rows
    (chat, function, preference, image_understanding, image_generation).

    `status`: `processing` (its images are being fetched), `processed`, or `error` (kept although rows are wrong).
    `report` is a `report.Report`, `statistics` a `statistics.Statistics` as plain values. A repaired, split or converted
    dataset is a file of its own: `parent_id` names what it was made from, `origin` how (`{"made_by": "repair", ...}`), `version`
    counts from 1 along that line.
    """

    id: str
    project_id: str
    filename: str
    purpose: str
    size_bytes: int
    sha256: str
    created_at: int
    status: str = "processed"
    kind: str | None = None
    rows: int | None = None
    report: dict[str, Any] = {}
    statistics: dict[str, Any] = {}
    parent_id: str | None = None
    version: int = 1
    origin: dict[str, Any] = {}


class PartedUpload(msgspec.Struct, frozen=True, kw_only=True):
    """A file that comes in parts. `status`: pending, completed, cancelled or expired; `file_id` once completed.

    `on_problems`: `refuse` or `keep`, what completion does with wrong rows. `completed_with`: sha256 of the part ids in the
    order of the completion, so that the same completion can be recognised when it comes again.
    """

    id: str
    project_id: str
    filename: str
    purpose: str
    mime_type: str
    size_bytes: int
    status: str = "pending"
    created_at: int
    expires_at: int
    file_id: str | None = None
    on_problems: str = "refuse"
    completed_with: str | None = None


class UploadPart(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a `PartedUpload`, whole and hashed."""

    id: str
    project_id: str
    upload_id: str
    size_bytes: int
    sha256: str
    created_at: int
