"""From pixels to encoded bytes: the same bytes for the same pixels."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

JPEG_QUALITY = 95


def to_png(pixels: NDArray[np.uint8]) -> bytes:
    """uint8 [height, width, 3] -> PNG, without loss."""
    return _encode(Image.fromarray(pixels), "PNG")


def shrink(pixels: NDArray[np.uint8], shorter_side: int, form: Literal["JPEG", "PNG"]) -> bytes:
    """Pixels uint8 [height, width, 3] whose shorter side is longer than `shorter_side` -> encoded at that size.

    Resized by Pillow's antialiased bicubic filter in one step. JPEG has `JPEG_QUALITY` and unreduced colour (4:4:4).
    """
    height, width = pixels.shape[:2]
    scale = shorter_side / min(height, width)
    size = (max(shorter_side, round(width * scale)), max(shorter_side, round(height * scale)))
    return _encode(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC), form)


def _encode(image: Image.Image, form: Literal["JPEG", "PNG"]) -> bytes:
    buffer = io.BytesIO()
    if form == "PNG":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
