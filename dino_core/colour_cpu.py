"""The colour tail of the augmentation on a CPU core, crop by crop: OpenCV, look-up tables and numpy.

What it computes is `colour.apply_colour`, level for level: the tables hold, and the steps between them give, the same
whole numbers on every machine. One thing is left to OpenCV's vector code: a blurred value exactly between two levels,
one in some ten thousand, may go to either where the width of a crop is not a multiple of the vector's.

Nothing here starts a thread or changes a setting of OpenCV, which belong to the process: the functions used work in the
calling thread, `cv2.LUT` as long as all it is given is one row.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from dino_core import colour
from dino_core.colour import BRIGHTNESS, CONTRAST, GRAYSCALE, HUE, ORDER, SATURATION, SIGMA, SOLARIZE

Plane = NDArray[np.uint8]
Table = NDArray[np.uint8]
"""[256], what becomes of each level"""

_LEVELS = np.arange(256, dtype=np.float32)
_SOLARIZED: Table = np.where(_LEVELS < 128, _LEVELS, 255 - _LEVELS).astype(np.uint8)
_PIECE = 1 << 16  # pixels worked on at a time, so that the scratch memory stays in the cache


def apply_colour(crops: NDArray[np.uint8], params: NDArray[np.float32]) -> None:
    """Colour jitter, grayscale, blur and solarisation of crops, in this order, in place.

    Args:
        crops: uint8 [n, 3, H, W], C-contiguous.
        params: float32 [n, colour.NUM_PARAMS].
    """
    blurred = np.flatnonzero(params[:, SIGMA])
    kernels: dict[int, NDArray[np.float32]] = {}
    if len(blurred):
        kernels = {
            row: _kernel(half)
            for row, half in zip(blurred.tolist(), colour.blur_weights(params[blurred, SIGMA]), strict=True)
        }
    tail = _Tail(*crops.shape[2:])
    for row, values in enumerate(params.tolist()):
        tail.apply(crops[row], values, kernels.get(row))


class _Tail:
    """The tail of crops of one size; its scratch memory is what makes it an object."""

    def __init__(self, height: int, width: int) -> None:
        size = min(height * width, _PIECE)
        self._planes = np.empty((10, 1, size), dtype=np.uint8)
        self._pairs = np.empty((1, size), dtype=np.uint16)
        self._float = np.empty((5, 1, size), dtype=np.float32)

    def apply(self, crop: NDArray[np.uint8], params: list[float], kernel: NDArray[np.float32] | None) -> None:
        """Change `crop` uint8 [3, H, W] by one row of parameters; `kernel` is that of the blur, if there is one.

        Tables wait until a step needs the pixels, so that several cost one look-up.
        """
        table: Table | None = None
        for column in _orders()[int(params[ORDER])]:
            value = params[column]
            if value == (0 if column == HUE else 1):
                continue
            if column == BRIGHTNESS:
                table = _then(table, _blend_table(value, 0))
                continue
            _look_up(crop, table)
            table = None
            if column == CONTRAST:
                table = _blend_table(value, self._mean_luma(crop))
                continue
            for piece in _pieces(crop):
                if column == SATURATION:
                    self._saturate(piece, value)
                else:
                    self._shift_hue(piece, value)
        planes = crop
        if params[GRAYSCALE]:
            _look_up(crop, table)
            table = None
            for piece in _pieces(crop):
                self._luma(piece, out=piece[0])
            planes = crop[:1]
        if kernel is not None:
            _look_up(planes, table)
            table = None
            for plane in planes:
                cv2.sepFilter2D(plane, -1, kernel, kernel, dst=plane, borderType=cv2.BORDER_REPLICATE)
        if params[SOLARIZE]:
            table = _then(table, _SOLARIZED)
        _look_up(planes, table)
        if params[GRAYSCALE]:
            crop[1:] = crop[0]

    def _mean_luma(self, crop: NDArray[np.uint8]) -> int:
        """The mean of the luma of a crop, rounded to a whole level."""
        total = 0.0
        for piece in _pieces(crop):
            plane = self._planes[0, :, : piece.shape[2]]
            self._luma(piece, out=plane)
            total += cv2.sumElems(plane)[0]
        return int(total / crop[0].size + 0.5)

    def _luma(self, piece: NDArray[np.uint8], out: Plane) -> None:
        np.copyto(out, self._float_luma(piece)[1], casting="unsafe")

    def _float_luma(self, piece: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """[3, 1, n] the levels, [1, n] their luma, which is to be truncated."""
        x, luma, part = self._float[:3, :, : piece.shape[2]], *self._float[3:, :, : piece.shape[2]]
        np.copyto(x, piece)
        np.multiply(x[0], colour.LUMA_WEIGHTS[0], out=luma)
        for channel in (1, 2):
            np.multiply(x[channel], colour.LUMA_WEIGHTS[channel], out=part)
            luma += part
        luma += 32768
        luma *= 1 / 65536
        return x, luma

    def _saturate(self, piece: NDArray[np.uint8], factor: float) -> None:
        x, luma = self._float_luma(piece)
        np.floor(luma, out=luma)
        x -= luma
        x *= factor
        x += luma
        if factor > 1:
            np.clip(x, 0, 255, out=x)
        np.copyto(piece, x, casting="unsafe")

    def _shift_hue(self, piece: NDArray[np.uint8], turns: float) -> None:
        """Through Pillow's 8-bit HSV, whose hue and saturation are looked up by pairs of levels.

        Which of the three comparisons around the wheel hold (red >= green >= blue >= red) tells its sixth; where one
        alone does, the hue falls from the next third of the wheel, otherwise it rises from the last one. Of the three
        new channels one has the highest level, one the lowest, and one a level in between.
        """
        red, green, blue = piece
        size = piece.shape[2]
        value, low, chroma, middle, code, falls, hue, part, lowest, between = self._planes[:, :, :size]
        tables = _hue_tables()
        np.maximum(red, green, out=value)
        np.maximum(value, blue, out=value)
        np.minimum(red, green, out=low)
        np.minimum(low, blue, out=low)
        np.subtract(value, low, out=chroma)
        # The one level that is neither the highest nor the lowest, above the lowest; wraps on the way.
        np.add(red, green, out=middle)
        middle += blue
        middle -= value
        middle -= low
        middle -= low

        cv2.compare(red, green, cv2.CMP_GE, dst=code)
        cv2.compare(green, blue, cv2.CMP_GE, dst=part)
        np.bitwise_xor(code, part, out=falls)
        code &= 1
        part &= 2
        code |= part
        cv2.compare(blue, red, cv2.CMP_GE, dst=part)
        falls ^= part
        part &= 4
        code |= part
        shift = int(turns * 255) % 256
        cv2.LUT(code, tables.thirds + np.uint8(shift), dst=hue)
        pairs = self._pairs[:, :size]
        np.multiply(chroma, 256, out=pairs, dtype=np.uint16)
        pairs += middle
        cv2.LUT(pairs, tables.rise, dst=part)
        cv2.LUT(pairs, tables.fall, dst=low)
        cv2.copyTo(low, falls, dst=part)
        hue += part

        np.multiply(chroma, 256, out=pairs, dtype=np.uint16)
        pairs += value
        cv2.LUT(pairs, tables.lowest, dst=lowest)
        depth, weight = self._float[:2, :, :size]
        cv2.LUT(pairs, tables.depth, dst=depth)
        cv2.LUT(hue, tables.weight, dst=weight)
        cv2.multiply(weight, depth, dst=between, dtype=cv2.CV_8U)
        np.subtract(value, between, out=between)
        cv2.LUT(hue, tables.roles, dst=code)
        for channel, plane in enumerate(piece):
            np.copyto(plane, between)
            for bit, source in ((1, value), (8, lowest)):
                np.bitwise_and(code, bit << channel, out=part)
                cv2.copyTo(source, part, dst=plane)


class _HueTables(NamedTuple):
    """By a pair of levels: uint8 [65536], index first + 256 x second. By one level: [256]."""

    rise: NDArray[np.uint8]
    """Of (middle - lowest, chroma): how far the hue is above the third of the wheel that its sixth starts from"""
    fall: NDArray[np.uint8]
    """The same, below the third that its sixth ends at, modulo 256"""
    thirds: NDArray[np.uint8]
    """Of the comparisons (1: red >= green, 2: green >= blue, 4: blue >= red): that third's hue"""
    lowest: NDArray[np.uint8]
    """Of (value, chroma): the new lowest level"""
    depth: NDArray[np.float32]
    """Of (value, chroma): how far that is below the value, before rounding"""
    weight: NDArray[np.float32]
    """Of the new hue: the share of `depth` that the channel in between is below the value"""
    roles: NDArray[np.uint8]
    """Of the new hue: bit c if channel c is the highest, bit 3 + c if it is the lowest"""


@lru_cache(maxsize=1)
def _hue_tables() -> _HueTables:
    second, first = np.divmod(np.arange(65536), 256)
    middle, chroma = np.minimum(first, second), np.maximum(second, 1)  # middle <= chroma is all that occurs
    rise = 85 * middle // (2 * chroma)
    fall = -85 * middle // (2 * chroma)  # minus the quotient, rounded up
    thirds = np.zeros(256, dtype=np.uint8)
    thirds[[0b011, 0b110, 0b101, 0b010, 0b100, 0b001]] = 0, 85, 170, 85, 170, 255
    saturation = np.minimum(255 * second // np.maximum(first, 1), 255).astype(np.float32)
    depth = saturation * first.astype(np.float32) / np.float32(255)
    lowest = first - np.rint(depth)
    angle = _LEVELS * 6 / 255
    weights = np.stack(
        [(np.abs(angle - centre) * sign + offset).clip(0, 1) for centre, sign, offset in colour.HUE_RAMPS]
    )
    in_between = (weights > 0) & (weights < 1)
    roles = sum((weights[c] == 0) * (1 << c) + (weights[c] == 1) * (8 << c) for c in range(3))
    return _HueTables(
        rise.astype(np.uint8),
        (fall % 256).astype(np.uint8),
        thirds,
        lowest.astype(np.uint8),
        depth,
        np.where(in_between, weights, 0).max(0),
        np.asarray(roles, dtype=np.uint8),
    )


@lru_cache(maxsize=1)
def _orders() -> list[list[int]]:
    return colour.ORDERS.tolist()


def _blend_table(factor: float, base: int) -> Table:
    """`base` + factor x (level - `base`), cut to 0..255 and truncated."""
    return (((_LEVELS - base) * factor) + base).clip(0, 255).astype(np.uint8)


def _then(first: Table | None, second: Table) -> Table:
    return second if first is None else second[first]


def _pieces(crop: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Views [3, 1, n] of a crop [3, H, W]."""
    pixels = crop.reshape(3, 1, -1)
    for start in range(0, pixels.shape[2], _PIECE):
        yield pixels[:, :, start : start + _PIECE]


def _look_up(planes: NDArray[np.uint8], table: Table | None) -> None:
    if table is None:
        return
    levels = planes.reshape(1, -1)
    cv2.LUT(levels, table, dst=levels)


def _kernel(half: NDArray[np.float32]) -> NDArray[np.float32]:
    """[2 r + 1] of one row of `colour.blur_weights`, without zeros at its ends; OpenCV makes whole numbers of it."""
    half = half[: np.flatnonzero(half)[-1] + 1]
    return (np.concatenate([half[:0:-1], half]) / colour.BLUR_UNIT).astype(np.float32)
