"""What is kept of the images of a dataset, and what goes between the server and the process that decodes them."""

import msgspec

MAX_PIXELS = 40_000_000
MAX_IMAGE_BYTES = 20 * 2**20


class Order(msgspec.Struct, frozen=True):
    """Decode the file at `path`; write `target` if it must change."""

    path: str
    target: str


class Decoded(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An image, upright and in RGB or grey. `changed` says what had to be done to it: `animated` (first frame taken), `rotated`
    (EXIF), `mode` (palette, CMYK, 16-bit grey or transparency, now RGB). With `error` nothing else counts."""

    width: int = 0
    height: int = 0
    media_type: str = ""
    changed: tuple[str, ...] = ()
    error: str | None = None


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one image reference. `sha256` (hex) and `size_bytes` are of the stored bytes; `code` is set if it failed,
    `reason` says more for `image_not_fetched` and `url_not_allowed`."""

    sha256: str = ""
    size_bytes: int = 0
    width: int = 0
    height: int = 0
    media_type: str = ""
    changed: tuple[str, ...] = ()
    code: str | None = None
    reason: str = ""
    status: int | None = None


class Placed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a manifest (`image-manifests/{project}/{file}.jsonl`, in the order of the rows): which stored image
    (`images/{project}/{sha256}`) stands at `pointer` of row `line`.

    `detail` is the caller's word (low, high, auto), `source` a hash of the address or base64 in the row: a version made from
    this file takes over what it knows by it. `changed` is as in `Decoded`.
    """

    line: int
    pointer: str
    sha256: str
    width: int
    height: int
    media_type: str
    size_bytes: int
    detail: str | None = None
    source: str = ""
    changed: tuple[str, ...] = ()
