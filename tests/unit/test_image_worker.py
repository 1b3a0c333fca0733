"""The process that decodes images: what it takes, what it refuses, and that nothing of it reaches its parent."""

import io
import os
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tests.images import hostile, odd, picture, png
from tunewright.datasets.images.image_decoder import Decoder
from tunewright.datasets.images.image_records import Decoded

HOSTILE = hostile()
ODD = odd()


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder() as decoder:
        yield decoder


def decoded(decoder: Decoder, folder: Path, data: bytes) -> Decoded:
    path = folder / "image"
    path.write_bytes(data)
    return decoder.decode(path, folder / "changed")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_images_are_refused(decoder: Decoder, tmp_path: Path, name: str) -> None:
    data, error = HOSTILE[name]
    assert decoded(decoder, tmp_path, data) == Decoded(error=error)
    assert not (tmp_path / "changed").exists()


def test_bombs_take_no_memory_of_the_parent_and_none_ends_the_child(decoder: Decoder, tmp_path: Path) -> None:
    assert len(HOSTILE) >= 20
    decoded(decoder, tmp_path, picture())
    parent, child = psutil.Process(), decoder.pid
    before = parent.memory_info().rss
    for data, _ in HOSTILE.values():
        decoded(decoder, tmp_path, data)
    assert parent.memory_info().rss - before <= 64 * 2**20
    assert decoder.pid == child


@pytest.mark.parametrize("name", ODD)
def test_odd_images_are_taken_and_made_plain(decoder: Decoder, tmp_path: Path, name: str) -> None:
    data, size, media_type, changed = ODD[name]
    found = decoded(decoder, tmp_path, data)
    assert (found.error, (found.width, found.height), found.media_type, found.changed) == (
        None,
        size,
        media_type,
        changed,
    )
    assert (tmp_path / "changed").exists() == bool(changed), "bytes that can stay are not written again"
    with Image.open(tmp_path / ("changed" if changed else "image")) as image:
        image.load()
        assert image.size == size and image.mode in ("RGB", "L")
        assert Image.MIME[image.format or ""] in (media_type, "image/mpo")


def pixel(decoder: Decoder, folder: Path, image: Image.Image, kind: str) -> object:
    stream = io.BytesIO()
    image.save(stream, kind)
    assert decoded(decoder, folder, stream.getvalue()).error is None
    with Image.open(folder / "changed") as changed:
        return changed.getpixel((0, 0))


def test_colors_survive_the_conversion(decoder: Decoder, tmp_path: Path) -> None:
    assert pixel(decoder, tmp_path, Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "PNG") == (255, 255, 255)
    assert pixel(decoder, tmp_path, Image.new("RGBA", (2, 2), (255, 0, 0, 255)), "PNG") == (255, 0, 0)
    grey = pixel(decoder, tmp_path, Image.new("I;16", (2, 2), 0x8000), "PNG")
    assert grey == (128, 128, 128), "16 bits are scaled, not cut off"


def test_a_child_that_thinks_too_long_is_killed_and_another_one_started(tmp_path: Path) -> None:
    with Decoder(limit_s=0.01) as decoder:
        slow = png(6300, 6300, zlib.compress(bytes(6300 * 789)), 1, 0)  # 40 million pixels to unpack and to convert
        first = decoded(decoder, tmp_path, slow)
        assert first == Decoded(error="image_too_large") and decoder.pid is None
    with Decoder() as decoder:
        assert decoded(decoder, tmp_path, picture()).width == 9


def test_a_child_that_was_killed_is_replaced_and_the_image_is_not_blamed(tmp_path: Path) -> None:
    with Decoder() as decoder:
        assert decoded(decoder, tmp_path, picture()).width == 9
        child = decoder.pid
        assert child is not None
        os.kill(child, signal.SIGKILL)
        assert decoded(decoder, tmp_path, picture()).width == 9
        assert decoder.pid not in (None, child)
        last = decoder.pid
    assert last is not None and not psutil.pid_exists(last)


def test_the_child_has_little_of_everything_and_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEWRIGHT_DATABASE_URL", "postgresql://secret")
    with Decoder() as decoder:
        decoded(decoder, tmp_path, picture())
        child = psutil.Process(decoder.pid)
        assert child.rlimit(psutil.RLIMIT_AS)[0] == 2**30
        assert child.rlimit(psutil.RLIMIT_CORE) == (0, 0)
        assert 0 < child.rlimit(psutil.RLIMIT_CPU)[0] <= 20
        assert "TUNEWRIGHT_DATABASE_URL" not in child.environ()
        assert not child.net_connections()


def test_more_memory_than_there_is_is_the_images_fault(tmp_path: Path) -> None:
    """39 megapixels of 16-bit colors with transparency: under the limit of pixels, over that of memory or not, never a crash."""
    rows = zlib.compress(bytes(7000 * 8 + 1) * 5600, 1)
    with Decoder() as decoder:
        found = decoded(decoder, tmp_path, png(7000, 5600, rows, 16, 6))
        assert found.error == "image_too_large" or found.changed == ("mode",)
        assert decoded(decoder, tmp_path, picture()).width == 9
