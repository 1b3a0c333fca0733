"""The images that rows refer to: found, fetched through the one egress client, decoded in a child process, complained about."""

import binascii
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from tunewright import strict_json
from tunewright.clock import mono_s
from tunewright.datasets.images.image_decoder import Decoder
from tunewright.datasets.images.image_records import MAX_IMAGE_BYTES, MAX_PIXELS, Outcome
from tunewright.datasets.lines import read_lines
from tunewright.datasets.report import Path as Place
from tunewright.datasets.report import Reporter, Row
from tunewright.datasets.rules import media, messages
from tunewright.egress import Egress
from tunewright.errors import InvalidRequest, TooLarge, TunewrightError
from tunewright.files_on_disk import sha256_of
from tunewright.i18n import mark
from tunewright.ids import random_text

IMAGE_KINDS = frozenset({messages.IMAGE_UNDERSTANDING, messages.IMAGE_GENERATION})
PART_PREFIX = "image-"
_PAUSES_S = (0.5, 2.0)
_PATIENCE = 8
"""Failures in a row after which a host is given up: each may have cost ten seconds."""
_GIVEN_UP_S = 300.0


class Limits(Protocol):
    """What is read of the settings."""

    @property
    def max_line_bytes(self) -> int: ...
    @property
    def remote_media(self) -> str: ...
    @property
    def max_images_per_file(self) -> int: ...


class Reference(NamedTuple):
    """One image of a row: `url` is a web address, a data URI or bare base64; `path` leads to it."""

    line: int
    byte_offset: int
    path: Place
    url: str
    detail: str | None

    @property
    def remote(self) -> bool:
        return media.is_remote(self.url)

    @property
    def key(self) -> bytes:
        """The same for the same image text."""
        return hashlib.blake2b(self.url.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def read_references(path: Path, max_line_bytes: int) -> Iterator[Reference]:
    """Every image of every row that has no error, in order. Rows that can't be used anyway cause no request."""
    with path.open("rb", buffering=1 << 18) as stream:
        if stream.read(3) != b"\xef\xbb\xbf":
            stream.seek(0)
        for line in read_lines(stream, max_line_bytes):
            if not line.data or line.data.isspace():
                continue
            try:
                value = strict_json.loads(line.data)
            except InvalidRequest:
                continue
            reporter = Reporter()
            if not isinstance(value, dict) or "messages" not in value:
                continue
            kind = messages.check_row(Row(reporter, line.number, line.byte_offset), value)
            if kind in IMAGE_KINDS and not reporter.errors:
                for place, url, detail in _images_of(value):
                    yield Reference(line.number, line.byte_offset, place, url, detail)


def _images_of(value: dict[str, object]) -> Iterator[tuple[Place, str, str | None]]:
    """(path, url, detail) of a row without errors."""
    for i, message in enumerate(value["messages"]):  # type: ignore[arg-type]
        content = message.get("content")
        for j, part in enumerate(content if isinstance(content, list) else ()):
            if part["type"] == "image_url":
                image, place = part["image_url"], ("messages", i, "content", j, "image_url")
                if isinstance(image, str):
                    yield place, image, None
                else:
                    detail = image.get("detail")
                    yield (*place, "url"), image["url"], detail if isinstance(detail, str) else None


class Stopped(Exception):
    """The server stops; the next one goes on."""


class Obtainer:
    """Turns references into decoded images in files of `folder`. Safe to use from several threads; they share one decoder."""

    def __init__(self, folder: Path, egress: Egress | None, decoder: Decoder, stopping: threading.Event) -> None:
        """Without `egress` web addresses are not fetched."""
        self._folder = folder
        self._egress = egress
        self._decoder = decoder
        self._stopping = stopping
        self._trouble: dict[str, tuple[int, float]] = {}
        """Host -> (failures in a row, when it was given up)."""

    def refuses(self, reference: Reference) -> bool:
        """Whether it would not even try."""
        return self._egress is None and reference.remote

    def obtain(self, url: str) -> tuple[Outcome, Path | None]:
        """What became of the image, and the file with its bytes unless it failed; the caller removes that file.

        Raises OSError if the disk fails, Unavailable(`image_decoder_failed`), and Stopped.
        """
        path = self._folder / f"{PART_PREFIX}{random_text(20)}.part"
        target = path.with_suffix(".new")
        kept = False
        try:
            failure = self._fetch(url, path) if media.is_remote(url) else _write_inline(url, path)
            if failure is not None:
                return failure, None
            decoded = self._decoder.decode(path, target)
            if decoded.error is not None:
                return Outcome(code=decoded.error), None
            if target.exists():
                os.replace(target, path)
            kept = True
            return (
                Outcome(
                    sha256=sha256_of(path),
                    size_bytes=path.stat().st_size,
                    width=decoded.width,
                    height=decoded.height,
                    media_type=decoded.media_type,
                    changed=decoded.changed,
                ),
                path,
            )
        finally:
            target.unlink(missing_ok=True)
            if not kept:
                path.unlink(missing_ok=True)

    def _fetch(self, url: str, path: Path) -> Outcome | None:
        """None once the bytes are in `path`."""
        if self._egress is None:
            return Outcome(code="remote_media_not_allowed")
        try:
            host = self._egress.check(url.strip()).host
        except InvalidRequest as error:
            return _failure(error)
        failure: Outcome | None = None
        for pause_s in (0.0, *_PAUSES_S):
            if self._given_up(host):
                return failure or Outcome(code="image_not_fetched", reason="given_up")
            self._stopping.wait(pause_s)
            if self._stopping.is_set():
                raise Stopped
            try:
                with path.open("wb") as stream:
                    self._egress.fetch(url.strip(), stream, max_bytes=MAX_IMAGE_BYTES, accept="image/*")
                self._trouble.pop(host, None)
                return None
            except TunewrightError as error:
                failure = _failure(error)
                if not error.retryable:
                    return failure
            failures = self._trouble.get(host, (0, 0.0))[0] + 1
            self._trouble[host] = (failures, mono_s())
        return failure or Outcome(code="image_not_fetched", reason="given_up")

    def _given_up(self, host: str) -> bool:
        failures, since_s = self._trouble.get(host, (0, 0.0))
        return failures >= _PATIENCE and mono_s() - since_s < _GIVEN_UP_S


def _write_inline(url: str, path: Path) -> Outcome | None:
    try:
        path.write_bytes(media.inline_bytes(url))
    except (binascii.Error, ValueError):
        return Outcome(code="invalid_image")
    return None


def _failure(error: TunewrightError) -> Outcome:
    if isinstance(error, TooLarge):
        return Outcome(code="image_too_large")
    if error.code == "invalid_url":
        return Outcome(code="invalid_media_url")
    reason, status = error.values.get("reason"), error.values.get("status")
    code = "url_not_allowed" if error.code == "url_not_allowed" else "image_not_fetched"
    return Outcome(code=code, reason=str(reason), status=status if isinstance(status, int) else None)


_NOT_FETCHED = {
    "timeout": mark("line {line}, {field} was not fetched: the host did not answer in time"),
    "dns": mark("line {line}, {field} was not fetched: the name of the host is not known"),
    "connect": mark("line {line}, {field} was not fetched: the host could not be reached"),
    "tls": mark("line {line}, {field} was not fetched: the certificate or encryption of the host is not valid"),
    "status": mark("line {line}, {field} was not fetched: the host answered with status {status}"),
    "redirects": mark("line {line}, {field} was not fetched: the address redirects too often"),
    "given_up": mark("line {line}, {field} was not fetched: the host failed too often"),
}
_UNUSABLE_ANSWER = mark("line {line}, {field} was not fetched: the answer of the host is not usable")
_FAILED = {
    "invalid_image": mark("line {line}, {field} holds no JPEG, PNG or WebP image, or a damaged one"),
    "image_too_large": mark(
        "line {line}, {field} is too large: at most {limit_mib} MiB and {limit_mpx} million pixels"
    ),
    "invalid_media_url": mark("line {line}, {field} leads to something else than one plain http or https address"),
    "url_not_allowed": mark("line {line}, {field} leads to a host or port that this server does not fetch from"),
    "remote_media_not_allowed": mark(
        "line {line}, {field} is a web address; this server does not fetch images: write them as data:image/...;base64"
    ),
    "too_many_image_bytes": mark("line {line}, {field} is left out: the images of the file are too large in all"),
}
_CONVERTED = {
    "animated": mark("line {line}, {field} is animated; its first frame is used"),
    "mode": mark("line {line}, {field} was converted to 8-bit RGB (it was CMYK, 16-bit, a palette or transparent)"),
}

Complain = Callable[..., None]


def complain(complaint: Complain, reference: Reference, outcome: Outcome) -> None:
    """Report what became of a reference. `complaint` is `Reporter.add`, or takes the same arguments."""
    place = {"line": reference.line, "byte_offset": reference.byte_offset, "path": reference.path}
    if outcome.code is None:
        for change in outcome.changed:
            if change in _CONVERTED:
                complaint("warning", "image_converted", _CONVERTED[change], **place)
    elif outcome.code == "image_not_fetched":
        sentence = _NOT_FETCHED.get(outcome.reason, _UNUSABLE_ANSWER)
        more = {"status": outcome.status} if outcome.reason == "status" else {}
        complaint("error", outcome.code, sentence, **place, **more)
    else:
        limits = {"limit_mib": MAX_IMAGE_BYTES >> 20, "limit_mpx": MAX_PIXELS // 10**6}
        more = limits if outcome.code == "image_too_large" else {}
        complaint("error", outcome.code, _FAILED[outcome.code], **place, **more)


_EDGES = (256, 512, 1024, 2048, 4096)


class ImageStatistics:
    """Counts images by size, format and bytes, each stored image once for bytes."""

    def __init__(self) -> None:
        self._references = 0
        self._failed = 0
        self._bytes = 0
        self._seen: set[bytes] = set()
        self._formats: dict[str, int] = {}
        self._sizes: dict[tuple[int, int], int] = {}

    def add(self, outcome: Outcome) -> None:
        """One reference."""
        self._references += 1
        if outcome.code is not None:
            self._failed += 1
            return
        digest = bytes.fromhex(outcome.sha256)
        if digest not in self._seen:
            self._seen.add(digest)
            self._bytes += outcome.size_bytes
        kind = outcome.media_type.removeprefix("image/")
        self._formats[kind] = self._formats.get(kind, 0) + 1
        bucket = (_edge(outcome.width), _edge(outcome.height))
        self._sizes[bucket] = self._sizes.get(bucket, 0) + 1

    def result(self) -> dict[str, object]:
        """`count` references, `distinct` stored images of `bytes` together, `failed`, `formats`, and `sizes`: how many are at
        most `width` x `height` pixels and over the next smaller edge (256, 512, 1024, 2048, 4096; null: larger)."""
        sizes = [
            {"width": width or None, "height": height or None, "count": count}
            for (width, height), count in sorted(
                self._sizes.items(), key=lambda item: [edge or 10**9 for edge in item[0]]
            )
        ]
        return {
            "count": self._references,
            "distinct": len(self._seen),
            "failed": self._failed,
            "bytes": self._bytes,
            "formats": dict(sorted(self._formats.items())),
            "sizes": sizes,
        }


def _edge(length: int) -> int:
    return next((edge for edge in _EDGES if length <= edge), 0)
