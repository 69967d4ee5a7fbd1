"""JPEG: Pillow's pixels, of every kind of JPEG that is whole; and nothing that is not."""

from __future__ import annotations

import io
import struct
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from orchestrator.data.images import BadImage, decode
from orchestrator.data.jpeg import MAX_SCANS, read_header

LIMIT = 50_000_000
EOI = b"\xff\xd9"


def picture(width: int = 83, height: int = 61) -> Image.Image:
    """Smooth colours under noise, with no symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    planes = np.stack([200 * x / width, 200 * y / height, 200 * (x + 2 * y) / (width + 2 * height)], axis=2)
    return Image.fromarray((planes + np.random.default_rng(0).integers(0, 55, planes.shape)).astype(np.uint8))


def encode(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, options.pop("kind", "JPEG"), **options)
    return buffer.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def check(data: bytes) -> None:
    """Our pixels are Pillow's, up to what two versions of libjpeg-turbo may differ in."""
    pixels, expected = decode(data, LIMIT), by_pillow(data)
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= 2
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable


def refused(data: bytes) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data, LIMIT)
    return str(caught.value)


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def with_segment(data: bytes, marker: int, body: bytes) -> bytes:
    return data[:2] + segment(marker, body) + data[2:]


def patched(data: bytes, place: int, new: bytes) -> bytes:
    return data[:place] + new + data[place + len(new) :]


def frame(data: bytes) -> int:
    """Where the SOF0 segment starts."""
    return data.index(b"\xff\xc0\x00")


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"quality": 30}], ids=str)
def test_colour(subsampling: str, options: dict[str, object]) -> None:
    check(encode(picture(), subsampling=subsampling, **options))


@pytest.mark.parametrize("size", [(1, 1), (3000, 2), (2, 3000), (8, 8), (17, 16)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_sizes_and_modes(size: tuple[int, int], mode: str) -> None:
    check(encode(picture(*size).convert(mode)))


def test_rgb_without_conversion() -> None:
    check(encode(picture(), keep_rgb=True))


def test_cmyk_and_ycck() -> None:
    """Adobe's inverted values: white is no ink, and no ink is white."""
    white = decode(encode(Image.new("CMYK", (16, 16), (0, 0, 0, 0))), LIMIT)
    assert (white == 255).all()
    data = encode(picture().convert("CMYK"), progressive=True)
    check(data)
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    check(patched(data, transform, b"\2"))


def test_icc_profile_comments_and_whatever_follows_the_end() -> None:
    data = encode(picture(), icc_profile=bytes(range(256)) * 800, comment=b"\xff\xda" * 300)
    check(data)
    check(data + b"trailing" * 1000)
    check(data + encode(picture(9, 9)))


def exif(orientation: int, order: str) -> bytes:
    head = b"MM\0*\0\0\0\x08" if order == ">" else b"II*\0\x08\0\0\0"
    return b"Exif\0\0" + head + struct.pack(order + "HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)


def xmp(orientation: int) -> bytes:
    return b"http://ns.adobe.com/xap/1.0/\0" + b'<x:xmpmeta tiff:Orientation="%d"/>' % orientation


@pytest.mark.parametrize("orientation", [0, *range(1, 9), 9, 300])
@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_is_pillows(orientation: int, order: str) -> None:
    plain = encode(picture())
    data = with_segment(plain, 0xE1, exif(orientation, order))
    check(data)
    assert np.array_equal(decode(data, LIMIT), decode(plain, LIMIT)) == (orientation not in range(2, 9))


def test_where_the_orientation_stands() -> None:
    plain = encode(picture())
    behind_tables = frame(plain)
    files = {
        "XMP": with_segment(plain, 0xE1, xmp(6)),
        "EXIF before XMP": with_segment(with_segment(plain, 0xE1, xmp(6)), 0xE1, exif(3, "<")),
        "EXIF behind XMP": with_segment(with_segment(plain, 0xE1, exif(3, "<")), 0xE1, xmp(6)),
        "two XMP": with_segment(with_segment(plain, 0xE1, xmp(8)), 0xE1, xmp(6)),
        "late": plain[:behind_tables] + segment(0xE1, exif(5, ">")) + plain[behind_tables:],
        "in two parts": with_segment(
            with_segment(plain, 0xE1, b"Exif\0\0" + exif(7, "<")[20:]), 0xE1, exif(7, "<")[:20]
        ),
        "CMYK": with_segment(encode(picture().convert("CMYK")), 0xE1, exif(6, "<")),
        "one pixel": with_segment(encode(picture(1, 1)), 0xE1, exif(6, "<")),
    }
    for name, data in files.items():
        assert read_header(data).orientation > 1, name
        check(data)


@pytest.mark.filterwarnings("ignore:::PIL")
@pytest.mark.parametrize("body", [exif(6, "<")[:17], exif(6, "<")[:9], b"Exif\0\0\x01\x12 nothing", b"Exif\0\0"])
def test_damaged_exif_does_not_cost_the_image(body: bytes) -> None:
    plain = encode(picture())
    assert np.array_equal(decode(with_segment(plain, 0xE1, body), LIMIT), decode(plain, LIMIT))


def test_of_two_pictures_in_one_file_the_first() -> None:
    first = picture()
    tags = Image.Exif()
    tags[0x0112] = 6
    data = encode(first, kind="MPO", save_all=True, append_images=[picture(40, 40)], exif=tags)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert decode(data, LIMIT).shape == (83, 61, 3)
    check(data)


def test_oddities_of_cameras_that_do_no_harm() -> None:
    data = encode(picture())
    scan = data.index(b"\xff\xda") + 2
    spectral = scan + data[scan + 1] - 3
    for odd in (
        patched(data, spectral, b"\0\0\0"),
        patched(data, data.index(b"JFIF") + 5, b"\2"),
        patched(patched(data, spectral, b"\0\0\0"), data.index(b"JFIF") + 5, b"\2"),
    ):
        assert np.array_equal(decode(odd, LIMIT), decode(data, LIMIT))
        # A warning about the header does not hide another behind it.
        assert "premature end" in refused(odd[: len(odd) // 2] + EOI)
        assert "Premature end" in refused(odd[: len(odd) // 2])


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], bool, str]] = {
    # what is done to it, whether Pillow takes it nevertheless, our reason
    "cut": (lambda data: data[: len(data) // 2], False, "damaged: Premature end of JPEG file"),
    "without its last two bytes": (lambda data: data[:-2], False, "damaged: Premature end of JPEG file"),
    "without its last byte": (lambda data: data[:-1], False, "damaged: Premature end of JPEG file"),
    "cut, but with an end": (lambda data: data[: len(data) // 2] + EOI, True, "damaged: Corrupt JPEG data: premature"),
    "little cut, but with an end": (lambda data: data[:-12] + EOI, True, "damaged: Corrupt JPEG data: premature"),
    "a run missing": (lambda data: data[: len(data) // 2] + data[len(data) // 2 + 300 :], True, "damaged: Corrupt"),
    "a run too many": (lambda data: data[: len(data) // 2] + data[len(data) // 2 - 300 :], True, "damaged: Corrupt"),
    "an unknown marker": (lambda data: patched(data, len(data) // 2, b"\xff\x8f"), False, "damaged: "),
    "a marker": (lambda data: patched(data, len(data) // 2, b"\xff\xd3"), True, "damaged: Corrupt"),
    "only the first bytes": (lambda data: data[:4], False, "damaged header: cut short"),
    "header alone": (lambda data: data[: data.index(b"\xff\xda") + 14], False, "damaged: "),
    "junk in the header": (lambda data: data[:20] + b"junk" + data[20:], True, "damaged header: no marker"),
    "no frame": (lambda data: data[: frame(data)] + data[frame(data) + 19 :], False, "damaged header: no frame"),
    "no rows": (lambda data: patched(data, frame(data) + 5, b"\0\0"), False, "no pixels: 83x0"),
    "12 bits": (lambda data: patched(data, frame(data) + 4, b"\x0c"), False, "JPEG of 12 bits a channel"),
    "2 channels": (lambda data: patched(data, frame(data) + 9, b"\2"), False, "JPEG of 2 channels"),
    "arithmetic code": (lambda data: patched(data, frame(data) + 1, b"\xc9"), True, "arithmetic-coded JPEG"),
    "lossless": (lambda data: patched(data, frame(data) + 1, b"\xc3"), False, "damaged: "),
    "hierarchical": (lambda data: patched(data, frame(data) + 1, b"\xc5"), False, "hierarchical JPEG"),
}


@pytest.mark.filterwarnings("ignore:::PIL")
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_also_where_pillow_would_fill_it_in(kind: str) -> None:
    damage, pillow_takes_it, reason = DAMAGE[kind]
    data = damage(encode(picture(), subsampling="4:4:4"))
    with pytest.raises(BadImage, match=f"^(?:{reason})"):
        decode(data, LIMIT)
    try:
        by_pillow(data)
    except (OSError, SyntaxError):
        assert not pillow_takes_it
    else:
        assert pillow_takes_it


@pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_rows": 1}, {}], ids=str)
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_no_kind_of_jpeg_is_filled_in(options: dict[str, object], mode: str) -> None:
    data = encode(picture().convert(mode), **options)
    body = data.index(b"\xff\xda")
    for share in (0.1, 0.5, 0.95):
        length = int(body + share * (len(data) - body))
        assert refused(data[:length]).startswith("damaged: ")
        assert refused(data[:length] + EOI).startswith("damaged: ")


def test_a_sampling_without_a_name_is_refused() -> None:
    """libjpeg decodes it, but through Pillow only, which could not tell whether it is whole."""
    data = encode(picture(), subsampling="4:2:2")
    luma, red = frame(data) + 11, frame(data) + 17
    assert (data[luma], data[red]) == (0x21, 0x11)
    data = patched(patched(data, luma, b"\x11"), red, b"\x21")
    assert refused(data) == "damaged header, or a JPEG of a chroma sampling that libjpeg-turbo has no name for"


def test_a_bomb_is_refused_by_its_header() -> None:
    data = encode(picture())
    bomb = patched(data, frame(data) + 5, struct.pack(">HH", 65500, 65500))
    started = time.process_time()
    assert refused(bomb) == f"too large: 65500x65500 is more than {LIMIT} pixels"
    with pytest.raises(BadImage, match="more than 178956970 pixels"):
        decode(bomb, 10**10)
    # Of two frames, the first small: memory for the second is never asked for.
    two = data[: frame(data)] + data[frame(data) : frame(data) + 19] + bomb[frame(data) :]
    assert refused(two).startswith("damaged header")
    assert time.process_time() - started < 0.1


def test_a_bomb_of_scans_is_refused() -> None:
    data = encode(picture(), progressive=True)
    last = data.rindex(b"\xff\xda")
    assert refused(data[:-2] + data[last:-2] * MAX_SCANS + EOI) == f"JPEG of more than {MAX_SCANS} scans"


@pytest.fixture(scope="module")
def photos(shared_data: Path) -> list[bytes]:
    with tarfile.open(shared_data / "photos.tar") as tar:
        files = [tar.extractfile(member) for member in tar if member.isfile()]
        return [file.read() for file in files if file is not None][:40]


def test_real_photos(photos: list[bytes]) -> None:
    for data in photos:
        check(data)


def test_a_photo_takes_less_time_than_with_pillow(photos: list[bytes]) -> None:
    """Measured: 0.66 of Pillow's CPU time."""

    def seconds(function: Callable[[bytes], object]) -> float:
        started = time.thread_time()
        for data in photos:
            function(data)
        return time.thread_time() - started

    ratios = [seconds(lambda data: decode(data, LIMIT)) / seconds(by_pillow) for _ in range(9)]
    assert min(ratios) < 0.95  # other work on the machine's cores takes from either
