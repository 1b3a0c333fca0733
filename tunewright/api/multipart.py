"""Forms with a file: the multipart body goes through the parser straight into the upload, in constant memory.

The parser is python-multipart's; here is what parts may be there and how big they are. Parts may come in any order.
"""

import logging
import re
from typing import Protocol

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from tunewright.api.errors import invalid, missing
from tunewright.api.threads import to_the_end
from tunewright.datasets.records import PURPOSES
from tunewright.errors import InvalidRequest, TooLarge, UnsupportedMedia, as_sent, quote
from tunewright.i18n import mark

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # what is wrong with a form is told to its sender

MOST_PARTS = 8
MOST_FIELD_BYTES = 64 * 1024
_BATCH_BYTES = 1 << 20
"""Bytes handed to the thread that parses and writes at a time."""

_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,\-./:=? ]{0,69}[0-9A-Za-z'()+_,\-./:=?]")
_PLAIN_ENCODINGS = frozenset({b"", b"7bit", b"8bit", b"binary"})
EXPIRES_SECONDS = (3600, 2_592_000)


class FileSink(Protocol):
    """Where the bytes of the file part go; all methods block."""

    def write(self, data: bytes) -> None:
        """Take more of the file. Raises TooLarge, InvalidRequest, StorageFull."""
        ...


class Form:
    """A multipart body as it arrives: `feed` it, then `finish` it. Afterwards `fields` and `filename` are there.

    Its one file is in the part named `file_part`; `required` are the fields that it can't do without.
    """

    def __init__(self, boundary: bytes, sink: FileSink, file_part: str, required: tuple[str, ...]) -> None:
        self._file_part = file_part
        self._required = required
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._sink = sink
        self._parts = 0
        self._ended = False
        self._in_file = False
        self._field = bytearray()
        self._name = ""
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._more_header_name,
                "on_header_value": self._more_header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": self._more_data,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    def feed(self, data: bytes) -> None:
        """Parse more of the body. Raises InvalidRequest (`invalid_multipart`, ...) and what the sink raises. Blocks."""
        try:
            self._parser.write(data)
        except FormParserError:
            raise _broken() from None

    def finish(self) -> None:
        """The body is over. Raises InvalidRequest if the form is not."""
        if not self._ended:
            raise _broken()
        if self.filename is None:
            raise missing(self._file_part)
        for name in self._required:
            if name not in self.fields:
                raise missing(name)

    def _begin_part(self) -> None:
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise InvalidRequest(
                "invalid_multipart", mark("An upload may have at most {limit} parts."), limit=MOST_PARTS
            )
        self._headers = {}
        self._field = bytearray()

    def _more_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _more_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        self._headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _end_headers(self) -> None:
        disposition, options = parse_options_header(self._headers.get(b"content-disposition"))
        if disposition != b"form-data" or b"name" not in options:
            raise _broken()
        if self._headers.get(b"content-transfer-encoding", b"").strip().lower() not in _PLAIN_ENCODINGS:
            raise UnsupportedMedia("unsupported_encoding", mark("Send the body as it is; encodings are not taken."))
        self._name = _text(options[b"name"], "name")
        self._in_file = b"filename" in options
        if not self._in_file:
            return
        if self._name != self._file_part or self.filename is not None:
            raise InvalidRequest(
                "invalid_multipart",
                mark("An upload has exactly one file, in the part named {name}."),
                name=self._file_part,
            )
        self.filename = _text(options[b"filename"], "filename")

    def _more_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._sink.write(data[start:end])
            return
        self._field += data[start:end]
        if len(self._field) > MOST_FIELD_BYTES:
            raise TooLarge(
                "field_too_large",
                mark("The part {name} is over the limit of {limit} bytes."),
                param=quote(self._name),
                name=quote(self._name),
                limit=MOST_FIELD_BYTES,
            )

    def _end_part(self) -> None:
        if self._in_file:
            self._in_file = False
            return
        if self._name in self.fields:
            raise InvalidRequest("invalid_multipart", mark("The part {name} comes twice."), name=quote(self._name))
        value = _text(bytes(self._field), self._name)
        if (
            self._name == "purpose" and value not in PURPOSES
        ):  # before the file arrives, if it comes first as in the SDKs
            raise InvalidRequest(
                "invalid_purpose",
                mark("purpose must be one of {purposes}, not {value}."),
                param="purpose",
                purposes=", ".join(PURPOSES),
                value=as_sent(value),
            )
        if self._name == "expires_after[seconds]":
            _check_expiry(value)
        self.fields[self._name] = value

    def _end(self) -> None:
        self._ended = True


async def read_form(
    request: Request, sink: FileSink, *, file_part: str = "file", required: tuple[str, ...] = ("purpose",)
) -> Form:
    """Read the whole body of `request`, its file into `sink`.

    Raises UnsupportedMedia (`unsupported_media_type`), InvalidRequest (`invalid_multipart`, `missing_required_parameter`,
    `invalid_purpose`), TooLarge, starlette's ClientDisconnect, and what the sink raises.
    """
    form = Form(boundary_of(request), sink, file_part, required)
    batch = bytearray()
    async for chunk in request.stream():
        batch += chunk
        if len(batch) >= _BATCH_BYTES:
            await to_the_end(form.feed, bytes(batch))
            batch.clear()
    await to_the_end(form.feed, bytes(batch))
    form.finish()
    return form


def boundary_of(request: Request) -> bytes:
    """The boundary that the Content-Type header names. Raises UnsupportedMedia, InvalidRequest (`invalid_multipart`)."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise UnsupportedMedia("unsupported_media_type", mark("This path takes multipart/form-data."))
    boundary = options.get(b"boundary", b"")
    if not _BOUNDARY.fullmatch(boundary):
        raise InvalidRequest("invalid_multipart", mark("The Content-Type header names no usable boundary."))
    return boundary


def _text(data: bytes, part: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(
            "invalid_unicode", mark("The part {name} is not UTF-8."), param=quote(part), name=quote(part)
        ) from None


def _check_expiry(value: str) -> None:
    """Files do not expire here, so the field is checked and then has no effect."""
    least, most = EXPIRES_SECONDS
    if not (value.isascii() and value.isdigit() and len(value) < 10 and least <= int(value) <= most):
        raise invalid("expires_after[seconds]", mark("{field} must be from {least} to {most}."), least=least, most=most)


def _broken() -> InvalidRequest:
    return InvalidRequest("invalid_multipart", mark("The multipart body is not well formed."))
