"""Decoding: every mode of image gives the right pixels, and nothing damaged gets through."""

from __future__ import annotations

import io
import pickle
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from orchestrator.data.images import BadImage, decode, load_image
from orchestrator.data.split import Split

LIMIT = 50_000_000


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(width: int = 80, height: int = 64) -> Image.Image:
    """Smooth colours, with no symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * x / width, 255 * y / height, 255 * (x + 2 * y) / (width + 2 * height)]
    return Image.fromarray(np.stack(planes, axis=2).astype(np.uint8))


def difference(data: bytes, reference: Image.Image) -> int:
    ours = decode(data, LIMIT)
    assert ours.dtype == np.uint8
    assert ours.flags.writeable
    return int(np.abs(ours.astype(int) - np.array(reference.convert("RGB"))).max())


def test_rgb_grey_palette_and_one_bit() -> None:
    image = picture()
    assert difference(encode(image, "PNG"), image) == 0
    assert difference(encode(image, "JPEG", quality=95), image) < 12
    assert difference(encode(image, "WEBP", lossless=True), image) == 0
    for mode in ("L", "P", "1"):
        converted = image.convert(mode)
        assert difference(encode(converted, "PNG"), converted) == 0


def test_cmyk() -> None:
    image = picture().convert("CMYK")
    assert difference(encode(image, "JPEG", quality=95), image) < 16
    assert difference(encode(image, "TIFF"), image) <= 2


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_shows_white(mode: str) -> None:
    image = picture().convert(mode)
    alpha = Image.new("L", image.size, 255)
    ImageDraw.Draw(alpha).rectangle((0, 0, 39, 63), fill=0)
    image.putalpha(alpha)
    pixels = decode(encode(image, "PNG"), LIMIT)
    assert (pixels[:, :40] == 255).all()
    assert np.abs(pixels[:, 40:].astype(int) - np.array(image.convert("RGB"))[:, 40:]).max() <= 1


def test_transparent_palette_entry_shows_white() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    pixels = decode(encode(image, "PNG", transparency=0), LIMIT)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[1, 1].tolist() == [0, 0, 255]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled(kind: str) -> None:
    eight = np.array(picture().convert("L"))
    data = encode(Image.fromarray(eight.astype(np.uint16) * 257), kind)
    assert np.array_equal(decode(data, LIMIT), np.repeat(eight[:, :, None], 3, axis=2))


def test_values_of_unknown_range_are_refused() -> None:
    with pytest.raises(BadImage, match="floating-point"):
        decode(encode(Image.new("F", (4, 4), 0.5), "TIFF"), LIMIT)
    with pytest.raises(BadImage, match="expected 0 to 65535"):
        decode(encode(Image.new("I", (4, 4), 70000), "TIFF"), LIMIT)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    upright = picture()
    transpose = Image.Transpose
    undo = {
        2: transpose.FLIP_LEFT_RIGHT,
        3: transpose.ROTATE_180,
        4: transpose.FLIP_TOP_BOTTOM,
        5: transpose.TRANSPOSE,
        6: transpose.ROTATE_90,
        7: transpose.TRANSVERSE,
        8: transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    pixels = decode(encode(stored, kind, exif=exif, **options), LIMIT)
    assert pixels.shape == (64, 80, 3)
    assert np.abs(pixels.astype(int) - np.array(upright)).mean() < 3


@pytest.mark.filterwarnings("ignore:::PIL")
def test_broken_exif_does_not_cost_the_image() -> None:
    data = encode(picture(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0\0")
    assert decode(data, LIMIT).shape == (64, 80, 3)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    data = encode(first, kind, save_all=True, append_images=[second])
    assert decode(data, LIMIT)[0, 0, 0] > 250


def test_tiny_and_thin_images_are_accepted() -> None:
    assert decode(encode(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), LIMIT).tolist() == [[[1, 2, 3]]]
    assert decode(encode(Image.new("RGB", (3000, 1)), "PNG"), LIMIT).shape == (1, 3000, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(kind: str, share: float) -> None:
    rng = np.random.default_rng(0)
    data = encode(Image.fromarray(rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)), kind)
    with pytest.raises(BadImage):
        decode(data[: int(share * len(data))], LIMIT)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty file"), (b"\0" * 500, "not an image"), (b"<html>not found</html>", "not an image")],
)
def test_what_is_no_image_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        decode(data, LIMIT)


@pytest.mark.filterwarnings("ignore:::PIL")
def test_flipped_bits_are_refused_or_decoded_but_never_crash() -> None:
    rng = np.random.default_rng(1)
    reasons = []
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        good = encode(picture(), kind)
        for _ in range(60):
            data = bytearray(good)
            for place in rng.integers(0, len(data), 4):
                data[place] ^= 1 << int(rng.integers(8))
            try:
                assert decode(bytes(data), 1_000_000).ndim == 3
            except BadImage as error:
                reasons.append(str(error))
    assert reasons
    assert all(reasons)


def bomb(side: int) -> bytes:
    """A PNG of side x side black pixels in a few kB."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    rows = [packer.compress(b"\0" * (side // 8 + 1)) for _ in range(200)]
    body = b"".join(rows) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8_000, 10_000, 20_000])
def test_a_bomb_is_refused_by_its_header(side: int) -> None:
    data = bomb(side)
    assert len(data) < 50_000
    start = time.process_time()
    with pytest.raises(BadImage, match="too large"):
        decode(data, LIMIT)
    assert time.process_time() - start < 0.5


def test_the_limit_counts_pixels() -> None:
    data = encode(picture(20, 10), "PNG")
    assert decode(data, 200).shape == (10, 20, 3)
    with pytest.raises(BadImage, match="20x10 is more than 199 pixels"):
        decode(data, 199)


class Folder:
    """A reader of files by name."""

    def __init__(self, *paths: Path) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        return self.paths[index].read_bytes()

    def name(self, index: int) -> str:
        return self.paths[index].name


def test_a_file_that_cannot_be_read_is_a_bad_image(tmp_path: Path) -> None:
    split = Split(Folder(tmp_path / "gone.png"), None)
    with pytest.raises(BadImage, match="cannot be read: No such file"):
        load_image(split, 0, LIMIT)


def test_the_reason_survives_pickling() -> None:
    assert str(pickle.loads(pickle.dumps(BadImage("why")))) == "why"  # noqa: S301
