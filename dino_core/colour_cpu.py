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
    tail = _Tail(crops, params)
    for row in range(len(crops)):
        tail.apply(row)


class _Tail:
    """`apply_colour` of one crop at a time. Arguments as there; its scratch memory is what makes it an object."""

    def __init__(self, crops: NDArray[np.uint8], params: NDArray[np.float32]) -> None:
        self._crops = crops
        self._params = params.tolist()
        self._kernels: dict[int, NDArray[np.float32]] = {}
        blurred = np.flatnonzero(params[:, SIGMA])
        if len(blurred):
            weights = colour.blur_weights(params[blurred, SIGMA])
            self._kernels = {row: _kernel(half) for row, half in zip(blurred.tolist(), weights, strict=True)}
        self._offsets = _saturation_offsets(params[:, SATURATION])
        size = min(crops.shape[2] * crops.shape[3], _PIECE)
        self._planes = np.empty((7, 1, size), dtype=np.uint8)
        self._pairs = np.empty((1, size, 2), dtype=np.uint8)
        self._float = np.empty((2, 1, size), dtype=np.float32)

    def apply(self, row: int) -> None:
        """Change the crop of this row. Tables wait until a step needs the pixels, so that several cost one look-up."""
        crop, params, kernel = self._crops[row], self._params[row], self._kernels.get(row)
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
                    self._saturate(piece, value, self._offsets[row])
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
        """ITU-R 601 luma, exact: sums of whole 65536ths below 256, and a half, fit a float32."""
        red, green, blue = piece
        total = self._float[0, :, : piece.shape[2]]
        weights = [weight / 65536 for weight in colour.LUMA_WEIGHTS]
        cv2.addWeighted(red, weights[0], green, weights[1], 0.5, dst=total, dtype=cv2.CV_32F)
        cv2.addWeighted(total, 1, blue, weights[2], 0, dst=total, dtype=cv2.CV_32F)
        np.copyto(out, total, casting="unsafe")

    def _saturate(self, piece: NDArray[np.uint8], factor: float, offset: float) -> None:
        """`offset`: of `_saturation_offsets`."""
        luma = self._planes[0, :, : piece.shape[2]]
        self._luma(piece, out=luma)
        if offset:
            for plane in piece:
                cv2.addWeighted(plane, factor, luma, 1 - factor, offset, dst=plane)
            return
        levels = self._float[0, :, : piece.shape[2]]
        for plane in piece:
            np.subtract(plane, luma, out=levels, dtype=np.float32)
            levels *= factor
            levels += luma
            np.clip(levels, 0, 255, out=levels)
            np.copyto(plane, levels, casting="unsafe")

    def _shift_hue(self, piece: NDArray[np.uint8], turns: float) -> None:
        """Through Pillow's 8-bit HSV, whose hue and saturation are looked up by pairs of levels.

        Which of the three comparisons around the wheel hold (red >= green >= blue >= red) tells its sixth; where one
        alone does, the hue falls from the next third of the wheel, otherwise it rises from the last one.
        """
        red, green, blue = piece
        size = piece.shape[2]
        value, low, chroma, middle, hue, falls, part = self._planes[:, :, :size]
        pair, pairs = self._pairs[:, :size], self._pairs[:, :size].view("<u2")
        tables = _hue_tables()
        np.maximum(red, green, out=part)
        np.minimum(red, green, out=low)
        np.maximum(part, blue, out=value)
        np.minimum(part, blue, out=middle)
        np.maximum(middle, low, out=middle)
        np.minimum(low, blue, out=low)
        np.subtract(value, low, out=chroma)
        middle -= low

        # Where that rise or fall starts, in thirds: 1 if red < green, and 2 if green < blue; of the thirds that the
        # hue falls from, the second and the last have changed places. One or all of three are an odd number of them.
        np.less(red, green, out=hue.view(np.bool_))
        np.less(green, blue, out=part.view(np.bool_))
        np.greater_equal(blue, red, out=falls.view(np.bool_))
        falls ^= hue
        falls ^= part
        hue += part
        hue += part
        part &= falls
        hue ^= part
        hue *= 85

        # (middle, chroma), the other way round where the hue falls.
        np.bitwise_xor(middle, chroma, out=part)
        part *= falls
        middle ^= part
        part ^= chroma
        cv2.merge((middle, part), dst=pair)
        cv2.LUT(pairs, tables.change, dst=part)
        hue += part

        cv2.merge((value, chroma), dst=pair)
        depth, weight = self._float[:, :, :size]
        cv2.LUT(pairs, tables.depth, dst=depth)
        shift = int(turns * 255) % 256
        for plane, weights in zip(piece, tables.weights, strict=True):
            cv2.LUT(hue, weights[shift : shift + 256], dst=weight)
            cv2.multiply(weight, depth, dst=part, dtype=cv2.CV_8U)
            np.subtract(value, part, out=plane)


class _HueTables(NamedTuple):
    """By a pair of levels: [65536], index first + 256 x second."""

    change: NDArray[np.uint8]
    """Of (middle - lowest, highest - lowest level), how far the hue is above the third of the wheel that it rises from;
    of the two the other way round, how far below the third it falls from, modulo 256. It falls only where the two
    differ and neither is 0."""
    depth: NDArray[np.float32]
    """Of (highest level, highest - lowest): how far the new lowest level is below the highest, before rounding"""
    weights: NDArray[np.float32]
    """[3, 512], of the new hue, not modulo 256: the share of `depth` by which red, green, blue are below the highest"""


@lru_cache(maxsize=1)
def _hue_tables() -> _HueTables:
    second, first = np.divmod(np.arange(65536), 256)
    rise = 85 * first // np.maximum(2 * second, 1)
    fall = -85 * second // np.maximum(2 * first, 1)  # minus the quotient, rounded up
    saturation = np.minimum(255 * second // np.maximum(first, 1), 255).astype(np.float32)
    angle = _LEVELS * 6 / 255
    weights = np.stack(
        [(np.abs(angle - centre) * sign + offset).clip(0, 1) for centre, sign, offset in colour.HUE_RAMPS]
    )
    return _HueTables(
        (np.where(first <= second, rise, fall) % 256).astype(np.uint8),
        saturation * first.astype(np.float32) / np.float32(255),
        np.tile(weights, 2),
    )


def _saturation_offsets(factors: NDArray[np.float32]) -> list[float]:
    """What to add to factor x level + (1 - factor) x luma so that rounding it to the nearest level truncates it.

    That is a little above -1/2, to make up for the errors of float32. Where some difference of level and luma times
    the factor is nearer than that below a whole number, the offset is 0, and truncation has to be done to the letter.
    """
    factor = factors.astype(np.float64)[:, None]
    error = 2.0**-22 * 256 * (factor + np.abs(1 - factor))  # of at most four roundings to 24 bits
    products = factor * np.arange(-255, 256)
    exact = (products - np.floor(products) < 1 - 3 * error).all(axis=1)
    return np.where(exact, 2 * error[:, 0] - 0.5, 0).tolist()


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
