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
    (chat, function, preference, image_understanding, image_generation)."""

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
