"""Images made on the fly: good, odd and hostile ones."""

import base64
import io
import struct
import zlib
from typing import Any

from PIL import Image

Case = tuple[bytes, str]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture(width: int = 9, height: int = 5, kind: str = "PNG", color: tuple[int, ...] = (200, 30, 30)) -> bytes:
    return encoded(Image.new("RGB", (width, height), color), kind)


def data_uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def row(*urls: str, role: str = "user") -> dict[str, Any]:
    """A question about images, or (as the assistant) an image for a caption."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    if role == "assistant":
        return {"messages": [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": parts}]}
    question = {"role": "user", "content": [{"type": "text", "text": "What is it?"}, *parts]}
    return {"messages": [question, {"role": "assistant", "content": "A cat."}]}


def png(width: int, height: int, data: bytes, depth: int = 8, color: int = 2, extra: bytes = b"") -> bytes:
    """A PNG with any head and any compressed pixels, whether they fit or not."""
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _jpeg_size(data: bytes, width: int, height: int) -> bytes:
    """A JPEG whose head says another size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def _webp_size(width: int, height: int) -> bytes:
    body = (
        b"VP8X"
        + struct.pack("<I", 10)
        + bytes(4)
        + struct.pack("<I", width - 1)[:3]
        + struct.pack("<I", height - 1)[:3]
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def hostile() -> dict[str, Case]:
    """Name -> (bytes, the error that they are refused with)."""
    zeros = zlib.compress(bytes(10**7), 9)
    jpeg, webp = picture(64, 64, "JPEG"), picture(64, 64, "WEBP")
    frames = [Image.new("P", (10, 10), i) for i in range(20)]
    return {
        "PNG of 900 megapixels": (png(30_000, 30_000, zeros), "image_too_large"),
        "PNG of 2^31 by 2^31": (png(2**31 - 1, 2**31 - 1, zeros), "image_too_large"),
        "PNG one pixel over": (png(8000, 5001, zlib.compress(b"")), "image_too_large"),
        "grey PNG of 100 megapixels in one bit": (png(10_000, 10_000, zeros, 1, 0), "image_too_large"),
        "JPEG that says 65500 by 65500": (_jpeg_size(jpeg, 65_500, 65_500), "image_too_large"),
        "WebP that says 16383 by 16383": (_webp_size(16_383, 16_383), "image_too_large"),
        "PNG of no width": (png(0, 10, zeros), "invalid_image"),
        "PNG of no height": (png(10, 0, zeros), "invalid_image"),
        "JPEG of no height": (_jpeg_size(jpeg, 64, 0), "invalid_image"),
        "PNG without pixels": (png(10, 10, b""), "invalid_image"),
        "PNG of broken deflate": (png(10, 10, b"not deflate"), "invalid_image"),
        "PNG with too few pixels": (png(100, 100, zlib.compress(bytes(50))), "invalid_image"),
        "PNG cut short": (picture(300, 300)[:60], "invalid_image"),
        "PNG of a wrong checksum": (picture()[:29] + b"\x00\x00\x00\x00" + picture()[33:], "invalid_image"),
        "PNG with a text bomb": (
            png(1, 1, zlib.compress(bytes(4)), extra=chunk(b"zTXt", b"a\0\0" + zeros)),
            "invalid_image",
        ),
        "JPEG cut short": (picture(300, 300, "JPEG")[:-400], "invalid_image"),
        "JPEG head only": (jpeg[:100], "invalid_image"),
        "WebP cut short": (webp[:-20], "invalid_image"),
        "WebP of nothing": (b"RIFF\x04\x00\x00\x00WEBP", "invalid_image"),
        "GIF": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "invalid_image"),
        "BMP": (picture(kind="BMP"), "invalid_image"),
        "TIFF": (picture(kind="TIFF"), "invalid_image"),
        "ICO": (encoded(Image.new("RGB", (16, 16)), "ICO"), "invalid_image"),
        "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "invalid_image"),
        "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "invalid_image"),
        "FITS, zipped": (zlib.compress(b"SIMPLE  =                    T" + bytes(10**6)), "invalid_image"),
        "zip": (b"PK\x03\x04" + bytes(100), "invalid_image"),
        "a web page": (b"<!doctype html><title>404</title>", "invalid_image"),
        "nothing": (b"", "invalid_image"),
        "only the mark of a JPEG": (b"\xff\xd8\xff", "invalid_image"),
    }


def odd() -> dict[str, tuple[bytes, tuple[int, int], str, tuple[str, ...]]]:
    """Name -> (bytes, size, media type, what has to be changed): images that are taken."""
    exif = Image.Exif()
    exif[0x0112] = 6
    many = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(40)]
    first = {"save_all": True, "append_images": many[1:]}
    clear = Image.new("P", (6, 4))
    return {
        "plain PNG": (picture(), (9, 5), "image/png", ()),
        "plain JPEG": (picture(kind="JPEG"), (9, 5), "image/jpeg", ()),
        "plain WebP": (picture(kind="WEBP"), (9, 5), "image/webp", ()),
        "progressive JPEG": (encoded(Image.new("RGB", (90, 50)), "JPEG", progressive=True), (90, 50), "image/jpeg", ()),
        "grey JPEG": (encoded(Image.new("L", (6, 4)), "JPEG"), (6, 4), "image/jpeg", ()),
        "one pixel": (picture(1, 1), (1, 1), "image/png", ()),
        "a line": (picture(20_000, 1), (20_000, 1), "image/png", ()),
        "rubbish at the end": (picture() + b"rubbish" * 100, (9, 5), "image/png", ()),
        "CMYK": (encoded(Image.new("CMYK", (6, 4)), "JPEG"), (6, 4), "image/jpeg", ("mode",)),
        "palette": (encoded(Image.new("P", (6, 4)), "PNG"), (6, 4), "image/png", ("mode",)),
        "palette with a clear color": (encoded(clear, "PNG", transparency=0), (6, 4), "image/png", ("mode",)),
        "transparent": (encoded(Image.new("RGBA", (6, 4), (255, 0, 0, 0)), "PNG"), (6, 4), "image/png", ("mode",)),
        "transparent WebP": (encoded(Image.new("RGBA", (6, 4), (9, 9, 9, 9)), "WEBP"), (6, 4), "image/png", ("mode",)),
        "grey and transparent": (encoded(Image.new("LA", (6, 4)), "PNG"), (6, 4), "image/png", ("mode",)),
        "one bit": (encoded(Image.new("1", (6, 4)), "PNG"), (6, 4), "image/png", ("mode",)),
        "16-bit grey": (encoded(Image.new("I;16", (6, 4), 0x8000), "PNG"), (6, 4), "image/png", ("mode",)),
        "rotated": (encoded(Image.new("RGB", (6, 4)), "JPEG", exif=exif), (4, 6), "image/jpeg", ("rotated",)),
        "animated WebP": (encoded(many[0], "WEBP", **first), (8, 8), "image/png", ("animated",)),
        "animated PNG": (encoded(many[0], "PNG", **first), (8, 8), "image/png", ("animated",)),
        "several in one JPEG": (encoded(many[0], "MPO", **first), (8, 8), "image/jpeg", ()),
    }
