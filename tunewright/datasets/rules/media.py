"""Content parts: texts and images. Images are recognised here, fetched and decoded in `images.py`, never opened from a path."""

import base64
import binascii
import re
from typing import Any

from tunewright import egress
from tunewright.datasets.images.image_records import MAX_IMAGE_BYTES
from tunewright.datasets.report import Path, Row, shown
from tunewright.errors import InvalidRequest
from tunewright.i18n import mark

MAX_IMAGES = 10

_DATA_URL = re.compile(r"data:([^;,]{0,60})(;base64)?,", re.IGNORECASE)
_BARE_BASE64 = re.compile(r"[A-Za-z0-9+/\r\n]{40,}={0,2}\s*")
_TYPES = frozenset({"image/jpeg", "image/jpg", "image/png", "image/webp"})
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")


def has_image(parts: list[Any]) -> bool:
    """Whether a content list holds an image part."""
    return any(isinstance(part, dict) and part.get("type") == "image_url" for part in parts)


def check_parts(row: Row, parts: list[Any], role: str, path: Path) -> None:
    """Complain about a content that is a list of parts."""
    if not parts:
        row.error("content_empty", mark("line {line}, {field} is an empty list"), path)
        return
    some = False
    for i, part in enumerate(parts):
        place = (*path, i)
        if not isinstance(part, dict):
            row.wrong_type(place, "object", part)
            continue
        kind = part.get("type")
        if kind == "text":
            some = _check_text_part(row, part, place) or some
        elif kind == "image_url" and role in ("user", "assistant"):
            _check_image_part(row, part, place)
            some = True
        else:
            allowed = "text, image_url" if role in ("user", "assistant") else "text"
            sentence = mark("line {line}, {field} is {found}; allowed: {allowed}")
            row.error("invalid_content_part", sentence, (*place, "type"), found=shown(kind), allowed=allowed)
            some = True
    if not some:
        row.error("content_empty", mark("line {line}, {field} holds no text"), path)


def _check_text_part(row: Row, part: dict[str, Any], path: Path) -> bool:
    """Whether there is something in it (a wrong type counts: it has its own error)."""
    text = part.get("text")
    if "text" not in part:
        row.missing((*path, "text"))
    elif not isinstance(text, str):
        row.wrong_type((*path, "text"), "string", text)
    elif not text or text.isspace():
        return False
    row.unknown_fields(part, frozenset({"type", "text"}), path)
    return True


def _check_image_part(row: Row, part: dict[str, Any], path: Path) -> None:
    image = part.get("image_url")
    place = (*path, "image_url")
    row.unknown_fields(part, frozenset({"type", "image_url"}), path)
    if "image_url" not in part:
        row.missing(place)
        return
    if isinstance(image, str):
        check_image_url(row, image, place)
    elif not isinstance(image, dict):
        row.wrong_type(place, "object", image)
    elif "url" not in image:
        row.missing((*place, "url"))
    elif not isinstance(image["url"], str):
        row.wrong_type((*place, "url"), "string", image["url"])
    else:
        row.unknown_fields(image, frozenset({"url", "detail"}), place)
        check_image_url(row, image["url"], (*place, "url"))


def check_image_url(row: Row, url: str, path: Path) -> None:
    """Accept http(s) addresses that may be fetched, and JPEG, PNG or WebP as `data:image/...;base64,` or bare base64."""
    if is_remote(url):
        _check_address(row, url.strip(), path)
    elif found := _DATA_URL.match(url, len(url) - len(url.lstrip())):
        _check_data(row, found[1].lower(), bool(found[2]), url[found.end() :], path)
    elif _BARE_BASE64.fullmatch(url):
        _check_data(row, None, True, url, path)
    else:
        row.error(
            "invalid_media_url",
            mark("line {line}, {field} is {found}; an image is written as https://... or data:image/...;base64"),
            path,
            found=shown(url),
        )


def is_remote(url: str) -> bool:
    """Whether an image is given by a web address."""
    return url[:200].lstrip().lower().startswith(("http:", "https:"))


def inline_bytes(url: str) -> bytes:
    """The bytes of a data URI or of bare base64 that passed the check. Raises ValueError for anything else."""
    found = _DATA_URL.match(url, len(url) - len(url.lstrip()))
    return base64.b64decode("".join((url[found.end() :] if found else url).split()), validate=True)


def _check_address(row: Row, url: str, path: Path) -> None:
    try:
        egress.check_url(url)
    except InvalidRequest as error:
        if error.code == "url_not_allowed":
            sentence = mark("line {line}, {field} may not be fetched: only public hosts on the ports 80 and 443 may")
            row.error("url_not_allowed", sentence, path)
        else:
            sentence = mark("line {line}, {field} is {found}, not one plain http or https address")
            row.error("invalid_media_url", sentence, path, found=shown(url))


def _check_data(row: Row, media_type: str | None, is_base64: bool, body: str, path: Path) -> None:
    if media_type is not None and (media_type not in _TYPES or not is_base64):
        row.error(
            "invalid_image",
            mark("line {line}, {field} has type {found}; allowed as base64: {allowed}"),
            path,
            found=shown(media_type),
            allowed="image/jpeg, image/png, image/webp",
        )
        return
    if len(body) * 3 // 4 > MAX_IMAGE_BYTES:
        row.error(
            "image_too_large",
            mark("line {line}, {field} holds more than {limit_mib} MiB"),
            path,
            limit_mib=MAX_IMAGE_BYTES >> 20,
        )
        return
    try:
        image = base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError):
        row.error("invalid_image", mark("line {line}, {field} is not valid base64"), path)
        return
    if not image.startswith(_MAGIC) and not (image[:4] == b"RIFF" and image[8:12] == b"WEBP"):
        row.error("invalid_image", mark("line {line}, {field} holds no JPEG, PNG or WebP image"), path)


def check_images(row: Row, messages: list[dict[str, Any]], *, generated: bool) -> None:
    """Complain about too many images in a row, and about images that stand where none belongs: a row to generate an image
    has one, in its answer; in any other row users show images, and answers are texts."""
    found = 0
    for i, message in enumerate(messages):
        content = message.get("content")
        for k, part in enumerate(content if isinstance(content, list) else ()):
            if not isinstance(part, dict) or part.get("type") != "image_url":
                continue
            found += 1
            place = ("messages", i, "content", k)
            if generated != (message.get("role") == "assistant"):
                sentence = mark("line {line}, {field} is {found}; allowed: {allowed}")
                row.error("invalid_content_part", sentence, (*place, "type"), found=shown("image_url"), allowed="text")
            elif generated and found == 2:
                sentence = mark("line {line}, {field} is a second image; a row to generate an image has one")
                row.error("too_many_images", sentence, place)
    if found > MAX_IMAGES:
        sentence = mark("line {line}, {field} holds {found} images; at most {limit} are allowed")
        row.error("too_many_images", sentence, ("messages",), found=found, limit=MAX_IMAGES)
