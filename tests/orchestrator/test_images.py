"""Decoding: every mode of image gives the right pixels, and nothing damaged gets through."""

from __future__ import annotations

import errno
import io
import os
import pickle
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from orchestrator.data.images import READ_TRIES, BadImage, StorageError, decode, load_image
from orchestrator.data.split import DamagedRecord, Split

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


def test_sixteen_bit_colour_keeps_the_high_bytes() -> None:
    eight = np.array(picture())
    rows = (eight.astype(">u2") * 257).reshape(64, -1)
    data = png((80, 64, 16, 2), zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    assert np.array_equal(decode(data, LIMIT), eight)


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
    assert decode(encode(Image.new("RGB", (3000, 2)), "PNG"), LIMIT).shape == (2, 3000, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(kind: str, share: float) -> None:
    rng = np.random.default_rng(0)
    data = encode(Image.fromarray(rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)), kind)
    with pytest.raises(BadImage):
        decode(data[: int(share * len(data))], LIMIT)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"\0" * 500, "not an image"),
        (b"<html>not found</html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not an image"),  # Pillow would start Ghostscript
    ],
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


def png(header: tuple[int, int, int, int], body: bytes) -> bytes:
    """Of a header (width, height, bits, type of colour) and compressed rows."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def bomb(side: int) -> bytes:
    """A PNG of side x side black pixels in a few kB."""
    packer = zlib.compressobj(9)
    rows = [packer.compress(b"\0" * (side // 8 + 1)) for _ in range(200)]
    return png((side, side, 1, 0), b"".join(rows) + packer.flush())


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
    """A reader of files by name, and of errors."""

    def __init__(self, *contents: Path | bytes | Exception) -> None:
        self.contents = list(contents)
        self.reads = 0

    def __len__(self) -> int:
        return len(self.contents)

    def read(self, index: int) -> bytes:
        self.reads += 1
        content = self.contents[index]
        if isinstance(content, list):  # one after the other
            content = content.pop(0)
        if isinstance(content, Exception):
            raise content
        return content.read_bytes() if isinstance(content, Path) else content

    def name(self, index: int) -> str:
        return f"image {index}"


def test_a_file_that_cannot_be_read_is_a_bad_image(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    reader = Folder(tmp_path / "gone.png", tmp_path, tmp_path / "file" / "below.png", tmp_path / ("x" * 300))
    for index, reason in enumerate(("No such file", "Is a directory", "Not a directory", "File name too long")):
        with pytest.raises(BadImage, match=f"cannot be read: {reason}"):
            load_image(Split(reader, None), index, LIMIT)
    assert reader.reads == 4


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (DamagedRecord("row group 3: bad page"), "row group 3: bad page"),  # how a reader tells of its damaged file
    ],
)
def test_the_fault_of_one_file(error: OSError, reason: str) -> None:
    reader = Folder(error)
    with pytest.raises(BadImage, match=f"cannot be read: {reason}"):
        load_image(Split(reader, None), 0, LIMIT)
    assert reader.reads == 1


MACHINE = [OSError(number, os.strerror(number)) for number in (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EIO)] + [
    OSError(errno.ESTALE, "Stale file handle"),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    ConnectionError("no route to the store"),
    TimeoutError(),
]


@pytest.mark.parametrize("error", MACHINE, ids=str)
def test_the_fault_of_the_machine_is_no_bad_image(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    reader = Folder(error)
    with pytest.raises(StorageError, match="image 0 could not be read, 3 times: ") as caught:
        load_image(Split(reader, None), 0, LIMIT)
    assert reader.reads == READ_TRIES
    assert pauses == [0.1, 0.4]
    assert caught.value.__cause__ is error
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert (again.errno, str(again)) == (error.errno, str(caught.value))


def test_a_passing_fault_of_the_machine_costs_a_pause() -> None:
    reader = Folder([TimeoutError(), encode(picture(), "PNG")])
    assert load_image(Split(reader, None), 0, LIMIT).shape == (64, 80, 3)
    reader = Folder([TimeoutError(), FileNotFoundError(errno.ENOENT, "No such file")])
    with pytest.raises(BadImage, match="No such file"):
        load_image(Split(reader, None), 0, LIMIT)


LACK = """
import resource, sys
from pathlib import Path
from orchestrator.data.readers.folder import Files
from orchestrator.data.images import StorageError, decode, load_image
from orchestrator.data.split import Split
from orchestrator.data.storage import LocalFolder

root, *names = sys.argv[1:]
encoded = [(Path(root) / name).read_bytes() for name in names]
decode(encoded[0], 50_000_000)  # whatever is imported late
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), resource.RLIM_INFINITY))
for name, data in zip(names[1:], encoded[1:]):
    try:
        decode(data, 50_000_000)
    except MemoryError:
        print("no memory for", name)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print({decode(data, 50_000_000).shape for data in encoded[1:]})
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 100))
try:
    load_image(Split(Files(LocalFolder(root), names), None), 0, 50_000_000)
except StorageError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_machine_without_memory_or_file_handles(tmp_path: Path) -> None:
    small, large = picture(), Image.new("RGB", (3000, 2000), (0, 128, 255))
    (tmp_path / "small").write_bytes(encode(small, "WEBP"))
    kinds = {"JPEG": {}, "JPEG2": {"progressive": True}, "PNG": {}, "WEBP": {"method": 0}, "TIFF": {}, "BMP": {}}
    for name, options in kinds.items():
        (tmp_path / name).write_bytes(encode(large, name.rstrip("2"), **options))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", LACK, str(tmp_path), "small", *kinds]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[:-2] == [f"no memory for {name}" for name in kinds]
    assert lines[-2:] == ["{(2000, 3000, 3)}", "[Errno 24] small could not be read, 3 times: Too many open files"]


def test_the_reason_survives_pickling() -> None:
    assert str(pickle.loads(pickle.dumps(BadImage("why")))) == "why"  # noqa: S301
