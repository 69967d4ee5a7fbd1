"""From encoded bytes to pixels. Whatever cannot be decoded in full is refused with a reason, never filled in."""

from __future__ import annotations

import errno
import io
import struct
import time
import zlib
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from orchestrator.data import jpeg
from orchestrator.data.split import DamagedRecord

if TYPE_CHECKING:
    from orchestrator.data.sources import Split

BACKGROUND = (255, 255, 255)
"""What shows through the transparent parts of an image."""
FORMATS = ("PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA")
"""What Pillow reads, beside the JPEG that libjpeg-turbo reads. Not all that it could: EPS would run Ghostscript."""

READ_TRIES = 3
_PAUSES_S = (0.1, 0.4)  # between them
_OF_ONE_FILE = (DamagedRecord, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)

_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # what Pillow refuses to open
_BYTES_PER_PIXEL = 32  # a 16-bit or a transparent image, with all copies that its conversion makes

_SPARE_BYTES = 256 << 20  # where the size is not known yet

# Pillow's format plugins raise any of these on damaged data.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)


class BadImage(ValueError):
    """An image that cannot be used; the message is the reason."""


class StorageError(OSError):
    """An image could not be read for a reason that is not its own, and may be gone later: of the machine, its network
    or its disks."""


def load_image(split: Split, index: int, max_pixels: int) -> NDArray[np.uint8]:
    """One image of a split, uint8 [height, width, 3].

    An image is at fault for a read that fails if it is missing, is a folder or may not be read, or if what holds it is
    damaged (`DamagedRecord`). After any other OSError (too many open files, no space, input/output error, stale file
    handle, a connection lost, a timeout) it is tried again after a pause, `READ_TRIES` times in all.

    Raises:
        BadImage: It cannot be read or decoded, or has more than `max_pixels` pixels.
        StorageError: It may be in order, but could not be read.
        MemoryError: It may be in order, but there is no memory to decode it.
    """
    data = _read(split, index)
    return data if isinstance(data, np.ndarray) else decode(data, max_pixels)


def _read(split: Split, index: int) -> bytes | NDArray[np.uint8]:
    for pause in (*_PAUSES_S, None):
        try:
            return split.read(index)
        except OSError as error:
            if isinstance(error, _OF_ONE_FILE) or error.errno == errno.ENAMETOOLONG:
                raise BadImage(f"cannot be read: {error.strerror or error}") from error
            failure = error
        if pause is not None:
            time.sleep(pause)
    why = failure.strerror or str(failure) or type(failure).__name__
    message = f"{split.name(index)} could not be read, {READ_TRIES} times: {why}"
    raise StorageError(failure.errno, message) from failure


def decode(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """Encoded bytes -> uint8 [height, width, 3], upright (EXIF), 8 bits a channel, transparency over `BACKGROUND`.

    The array is C-contiguous and writable. Of an animation or a stack, the first frame. The size is read from the
    header before anything is decoded; images of more than Pillow's own limit, 179 million pixels, are refused whatever
    `max_pixels` says. JPEG goes to libjpeg-turbo, `FORMATS` to Pillow.

    Raises:
        BadImage: Not an image, damaged or cut short, too large, or of values whose range is unknown.
        MemoryError: The machine lacks what an image of this size takes.
    """
    if not data:
        raise BadImage("empty file")
    return _decode_jpeg(data, max_pixels) if data.startswith(jpeg.MAGIC) else _decode_by_pillow(data, max_pixels)


def _decode_jpeg(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    try:
        header = jpeg.read_header(data)
        _check_size(header.width, header.height, max_pixels)
        return jpeg.decode_jpeg(data, header)
    except BadImage:
        raise
    except ValueError as error:
        raise BadImage(str(error)) from None


def _decode_by_pillow(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadImage("not an image in a format that is read") from None
    except _TOO_LARGE as error:
        raise BadImage(f"too large: {error}") from None
    except _DAMAGED as error:
        raise _damage("damaged header", error, 0) from error
    width, height = image.size
    _check_size(width, height, max_pixels)
    if image.format == "JPEG2000" and data.find(b"\xff\xd9", data.find(b"\xff\x93")) < 0:
        raise BadImage("damaged: JPEG 2000 without its end")  # cut before the first tile's data, Pillow would fill it
    try:
        image.load()
        return np.array(_to_rgb(_upright(image)))
    except BadImage:
        raise
    except _TOO_LARGE as error:
        raise BadImage(f"too large: {error}") from None
    except _DAMAGED as error:
        raise _damage("damaged", error, width * height) from error


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > (limit := min(max_pixels, _MAX_PIXELS)):
        raise BadImage(f"too large: {width}x{height} is more than {limit} pixels")
    if not width or not height:
        raise BadImage(f"no pixels: {width}x{height}")


def _damage(what: str, error: Exception, num_pixels: int) -> BadImage | MemoryError:
    """The verdict on what Pillow raised.

    That memory is short it says in many ways, some of them vague, and damaged data can ask for any amount: only where
    there is less than an image of this size can take, the image is not to blame.
    """
    try:
        np.empty(_SPARE_BYTES + _BYTES_PER_PIXEL * num_pixels, np.uint8)
    except MemoryError:
        return MemoryError(f"too little to decode an image: {error!r}")
    return BadImage(f"{what}: {str(error) or type(error).__name__}")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DAMAGED:  # the pixels are whole, only their description is not
        return image
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadImage("floating-point image: the range of its values is unknown")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _to_eight_bits(image)
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits; Pillow's own conversion would cut everything above 255 to white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImage(f"32-bit image with values from {values.min()} to {values.max()}: expected 0 to 65535")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
