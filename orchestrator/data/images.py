"""From encoded bytes to pixels. Whatever cannot be decoded in full is refused with a reason, never filled in."""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from orchestrator.data.sources import Split

BACKGROUND = (255, 255, 255)
"""What shows through the transparent parts of an image."""

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
    NotImplementedError,
    MemoryError,
    struct.error,
    zlib.error,
)
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)


class BadImage(ValueError):
    """An image that cannot be used; the message is the reason."""


def load_image(split: Split, index: int, max_pixels: int) -> NDArray[np.uint8]:
    """One image of a split, uint8 [height, width, 3].

    Raises:
        BadImage: It cannot be read or decoded, or has more than `max_pixels` pixels.
    """
    try:
        data = split.read(index)
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or error}") from error
    return data if isinstance(data, np.ndarray) else decode(data, max_pixels)


def decode(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """Encoded bytes -> uint8 [height, width, 3], upright (EXIF), 8 bits a channel, transparency over `BACKGROUND`.

    Of an animation or a stack, the first frame. The size is read from the header before anything is decoded; images of
    more than Pillow's own limit, 179 million pixels, are refused whatever `max_pixels` says.

    Raises:
        BadImage: Not an image, damaged or cut short, too large, or of values whose range is unknown.
    """
    if not data:
        raise BadImage("empty file")
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise BadImage("not an image in a format that Pillow reads") from None
    except _TOO_LARGE as error:
        raise BadImage(f"too large: {error}") from None
    except _DAMAGED as error:
        raise BadImage(f"damaged header: {error}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage(f"too large: {width}x{height} is more than {max_pixels} pixels")
    if not width or not height:
        raise BadImage(f"no pixels: {width}x{height}")
    try:
        image.load()
        return np.array(_to_rgb(_upright(image)))
    except BadImage:
        raise
    except _TOO_LARGE as error:
        raise BadImage(f"too large: {error}") from None
    except _DAMAGED as error:
        raise BadImage(f"damaged: {error}") from error


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
