"""The process that opens images, so that a hostile one can end nothing but this process.

`python -m tunewright.datasets.images.image_worker`: requests on stdin, answers on stdout, each a 4-byte big-endian
length and msgspec JSON. It reads `path`, and writes to `target` only when the bytes can't stay as they are. It has little
memory, little CPU time for each image, writes no core dump, and ends with its stdin. Errors are codes: Pillow's own texts
may hold addresses.
"""

import io
import resource
import struct
import sys
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from tunewright.datasets.images.image_records import MAX_PIXELS, Decoded, Order

MEMORY_BYTES = 2**30
CPU_S = 10
MAX_OUTPUT_BYTES = 256 * 2**20
FORMATS = ("JPEG", "PNG", "WEBP")
_MEDIA_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_LENGTH = struct.Struct(">I")
_ORIENTATION = 0x0112


def main() -> None:
    """Answer until stdin ends."""
    _limit_resources()
    from PIL import Image

    warnings.simplefilter("error", Image.DecompressionBombWarning)
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    write_frame(sys.stdout.buffer, Decoded())  # ready
    while (frame := read_frame(sys.stdin.buffer)) is not None:
        _allow_cpu_time()
        order = msgspec.json.decode(frame, type=Order)
        write_frame(sys.stdout.buffer, decode(Path(order.path), Path(order.target)))


def read_frame(stream: BinaryIO) -> bytes | None:
    """One message; None at the end of the stream, also in the middle of one."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    body = stream.read(length)
    return body if len(body) == length else None


def write_frame(stream: BinaryIO, message: msgspec.Struct) -> None:
    """One message, flushed."""
    body = msgspec.json.encode(message)
    stream.write(_LENGTH.pack(len(body)) + body)
    stream.flush()


def decode(path: Path, target: Path) -> Decoded:
    """What the image at `path` is; `target` is written if it had to change (`changed` says why). Never raises for bad bytes.

    `error` is `image_too_large` (over 40 million pixels, or more than the memory allows), or `invalid_image`.
    """
    from PIL import Image

    try:
        with path.open("rb") as stream, Image.open(stream, formats=FORMATS) as image:
            return _look(image, target)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return Decoded(error="image_too_large")
    except MemoryError:
        return Decoded(error="image_too_large")
    except Exception:  # a decoder's ways to fail are many, and all mean the same
        return Decoded(error="invalid_image")


def _look(image: Any, target: Path) -> Decoded:
    """`image` is open: its head is read, its pixels are not."""
    width, height = image.size
    if width < 1 or height < 1:
        return Decoded(error="invalid_image")
    if width * height > MAX_PIXELS:
        return Decoded(error="image_too_large")
    kind = "JPEG" if image.format == "MPO" else image.format  # several pictures in one JPEG: cameras do that
    changed = []
    if kind != "JPEG" and getattr(image, "n_frames", 1) > 1:
        changed.append("animated")
        image.seek(0)
    image.load()  # every pixel: a file that was cut short fails here
    if _orientation(image) in range(2, 9):
        from PIL import ImageOps

        changed.append("rotated")
        image = ImageOps.exif_transpose(image)
    if image.mode not in ("RGB", "L") or image.info.get("transparency") is not None:
        changed.append("mode")
        image = _to_rgb(image)
    if changed:
        kind = "JPEG" if kind == "JPEG" else "PNG"
        _write(image, kind, target)
    return Decoded(width=image.size[0], height=image.size[1], media_type=_MEDIA_TYPES[kind], changed=tuple(changed))


def _orientation(image: Any) -> object:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # spoiled EXIF does not spoil the picture
        return None


def _to_rgb(image: Any) -> Any:
    """8-bit RGB: transparency on white, 16 bits scaled to 8 (Pillow would cut them off)."""
    from PIL import Image

    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N", "F"):
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        ground = Image.new("RGB", image.size, "white")
        ground.paste(image, mask=image.getchannel("A"))
        return ground
    return image.convert("RGB")


def _write(image: Any, kind: str, target: Path) -> None:
    buffer = io.BytesIO()
    if kind == "JPEG":
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        image.save(buffer, "PNG", compress_level=3)
    target.write_bytes(buffer.getbuffer())


def _limit_resources() -> None:
    _lower(resource.RLIMIT_AS, MEMORY_BYTES)
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, MAX_OUTPUT_BYTES)
    _lower(resource.RLIMIT_NOFILE, 64)
    _allow_cpu_time()


def _lower(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (bound, bound))


def _allow_cpu_time() -> None:
    """CPU_S more from now: the kernel counts since the process began."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = int(usage.ru_utime + usage.ru_stime) + 1 + CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


if __name__ == "__main__":
    main()
