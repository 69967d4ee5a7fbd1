"""JPEG by libjpeg-turbo, whole or not at all: with less work than by way of Pillow, and to the same pixels.

Pillow takes a JPEG whose data end early behind a proper end marker, or have a hole, and fills the rest with grey. Here
whatever libjpeg warns about is an error, so no JPEG goes to Pillow, and the few of which libjpeg could not tell whether
they are whole are refused: arithmetic-coded ones, and those of a chroma sampling that TurboJPEG has no name for.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image

MAGIC = b"\xff\xd8\xff"
MAX_SCANS = 100
"""Encoders write 10 or so. Each scan goes over the whole image, and can be of a few bytes."""

_FILL, _SOS, _APP0, _APP1 = 0xFF, 0xDA, 0xE0, 0xE1
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ARITHMETIC, _HIERARCHICAL = frozenset((0xC9, 0xCA, 0xCB)), frozenset((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF))
_PROGRESSIVE = 0xC2
_EXIF, _XMP, _JFIF = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"JFIF\0"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_ORIENTATION_TAGS = (b"\x01\x12", b"\x12\x01")  # of either byte order


class JpegHeader(NamedTuple):
    """What stands before the pixels."""

    width: int
    height: int
    channels: int
    """1 (grey), 3 (colour) or 4 (CMYK or YCCK)."""
    progressive: bool
    orientation: int
    """As in EXIF: 1 to 8, where 1, or any other number, is upright."""
    jfif: int | None
    """Where the JFIF segment starts."""
    scan: int
    """Where the first scan's segment starts."""


def read_header(data: bytes) -> JpegHeader:
    """Read the header of a JPEG that starts with `MAGIC`, without the pixels.

    Raises:
        ValueError: It is damaged or cut short, or the image is of a kind that is not decoded; the message says which.
    """
    try:
        return _read_header(data)
    except IndexError:
        raise ValueError("damaged header: cut short") from None


def _read_header(data: bytes) -> JpegHeader:
    place, frame, jfif, exif, xmp = 2, 0, None, b"", b""
    while True:
        if data[place] != _FILL:
            raise ValueError("damaged header: no marker where one is due")
        marker = data[place + 1]
        if marker == _FILL:
            place += 1
            continue
        end = place + 2 + (data[place + 2] << 8 | data[place + 3])
        if marker in _FRAMES:
            frame = frame or place
        elif marker == _APP0 and data.startswith(_JFIF, place + 4):
            jfif = place if jfif is None else jfif
        elif marker == _APP1:
            # Of several, the parts of Exif belong together and the last XMP counts, as in Pillow.
            if data.startswith(_EXIF, place + 4):
                exif += data[place + 4 + (len(_EXIF) if exif else 0) : end]
            elif data.startswith(_XMP, place + 4):
                xmp = data[place + 4 + len(_XMP) : end]
        elif marker == _SOS:
            break
        place = end
    if not frame:
        raise ValueError("damaged header: no frame before the first scan")
    kind, bits, channels = data[frame + 1], data[frame + 4], data[frame + 9]
    if bits != 8:
        raise ValueError(f"JPEG of {bits} bits a channel; only 8 are read")
    if channels not in (1, 3, 4):
        raise ValueError(f"JPEG of {channels} channels; only 1, 3 and 4 are read")
    if kind in _HIERARCHICAL:
        raise ValueError("hierarchical JPEG, which libjpeg does not read")
    if kind in _ARITHMETIC:
        raise ValueError("arithmetic-coded JPEG, which cannot be told to be whole")
    if (kind == _PROGRESSIVE or data[place + 4] < channels) and data.count(b"\xff\xda") > MAX_SCANS:
        raise ValueError(f"JPEG of more than {MAX_SCANS} scans")
    height, width = data[frame + 5] << 8 | data[frame + 6], data[frame + 7] << 8 | data[frame + 8]
    orientation = _orientation(exif, xmp) if exif or xmp else 1
    return JpegHeader(width, height, channels, kind == _PROGRESSIVE, orientation, jfif, place)


def _orientation(exif: bytes, xmp: bytes) -> int:
    """What `PIL.ImageOps.exif_transpose` goes by: the tag of Exif, or else that of XMP."""
    found = None
    if any(tag in exif for tag in _ORIENTATION_TAGS):
        tags = Image.Exif()
        try:
            tags.load(exif)
            found = tags.get(ExifTags.Base.Orientation)
        except (SyntaxError, ValueError, LookupError, TypeError, OSError):
            return 1  # the pixels are whole, only their description is not
    if found is None and (match := _XMP_ORIENTATION.search(xmp)):
        found = int(match[1])
    return found if isinstance(found, int) else 1


def decode_jpeg(data: bytes, header: JpegHeader) -> NDArray[np.uint8]:
    """The pixels, uint8 [height, width, 3], upright.

    Raises:
        ValueError: The data are cut short or corrupt, as far as libjpeg can tell; the message says how.
        MemoryError: No memory for the pixels, or for the coefficients of a progressive JPEG.
    """
    try:
        pixels = _decode(data, header)
    except ValueError as error:
        standard = _standard(data, header)
        if standard == data:
            raise _refusal(error) from None
        try:
            pixels = _decode(standard, header)
        except ValueError as other:
            raise _refusal(other) from None
    return pixels if header.orientation == 1 else _turned(pixels, header.orientation)


def _decode(data: bytes, header: JpegHeader) -> NDArray[np.uint8]:
    cmyk = header.channels == 4
    # The memory is given, so that nothing else than what the header was checked for can be made.
    pixels = np.empty((header.height, header.width, 4 if cmyk else 3), np.uint8)
    decoded = simplejpeg.decode_jpeg(data, "CMYK" if cmyk else "RGB", buffer=pixels, strict=True)
    if decoded.shape != pixels.shape:
        raise ValueError(f"two sizes: {pixels.shape[1::-1]} and {decoded.shape[1::-1]}")
    if not cmyk:
        return pixels
    # Adobe's convention, 255 for no ink, which Pillow takes every CMYK JPEG to follow.
    return np.array(Image.fromarray(np.invert(pixels, out=pixels), "CMYK").convert("RGB"))


def _standard(data: bytes, header: JpegHeader) -> bytes:
    """The same image without two oddities that libjpeg warns about and that do no harm.

    It would tell of nothing else behind its first warning. Some cameras leave the spectral selection of the only scan,
    which has no use outside of progressive JPEG, at 0; and some programs write another major version of JFIF than 1.
    """
    changed = bytearray(data)
    if header.jfif is not None:
        changed[header.jfif + 9 : header.jfif + 10] = b"\1"
    end = header.scan + 2 + (data[header.scan + 2] << 8 | data[header.scan + 3])
    if not header.progressive:
        changed[end - 3 : end] = b"\0\x3f\0"
    return bytes(changed)


def _refusal(error: ValueError) -> ValueError | MemoryError:
    """libjpeg's message as one of ours."""
    if "nsufficient memory" in str(error):
        return MemoryError(str(error))
    if "subsampling" in str(error):  # all that simplejpeg says of a header that libjpeg does not take
        return ValueError("damaged header, or a JPEG of a chroma sampling that libjpeg-turbo has no name for")
    return ValueError(f"damaged: {error}")


def _turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """The pixels as EXIF says that they are to be shown."""
    whole = pixels.view("V3")[:, :, 0]  # a pixel as one value is moved in less than half the time
    if orientation in (5, 6, 7, 8):
        whole = whole.T
    if orientation in (3, 4, 7, 8):
        whole = whole[::-1]
    if orientation in (2, 3, 6, 7):
        whole = whole[:, ::-1]
    return np.ascontiguousarray(whole)[:, :, None].view(np.uint8)
