"""The colour tail of the augmentation, batched: for an accelerator, for tiny crops, and for the tests of `colour_cpu`.

It repeats what Pillow computes in the official pipeline, integer levels after every operation included, but on a whole
batch with parameters of its own for each crop. Every intermediate value is either a whole number below 2^24 or the
result of one correctly rounded operation, so the outcome depends neither on the device nor on the rest of the batch.

`params` float32 [n, NUM_PARAMS], one row per crop:

| column | meaning | does nothing at |
|---|---|---|
| BRIGHTNESS, CONTRAST, SATURATION | factor of the colour jitter | 1 |
| HUE | shift, turns of the colour wheel | 0 |
| ORDER | which of the 24 orders of those four | - |
| GRAYSCALE | 1: drop the colour | 0 |
| SIGMA | standard deviation of the Gaussian blur, pixels | 0 |
| SOLARIZE | 1: invert levels of 128 and more | 0 |
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAYSCALE, SIGMA, SOLARIZE = range(8)
NUM_PARAMS = 8
_JITTER = (BRIGHTNESS, CONTRAST, SATURATION, HUE)
ORDERS = np.array(list(itertools.permutations(_JITTER)))
"""[24, 4] columns"""
NUM_ORDERS = len(ORDERS)
_NUM_BLENDS = 3

LUMA_WEIGHTS = (19595.0, 38470.0, 7471.0)
"""ITU-R 601 luma of red, green, blue in Pillow's fixed point: they sum to 65536."""
HUE_RAMPS = ((3, -1, 2), (2, 1, -1), (4, 1, -1))
"""How far red, green and blue are from the highest level towards the lowest, at an angle in sixths of a turn: sign x
|angle - centre| + offset, cut to 0..1, of (centre, sign, offset)."""
BLUR_UNIT = 256
"""What a blur kernel sums to: with pixels of 8 bits, two passes of it are exact in float32."""

_CPU_CHUNK = 1 << 19  # elements worked on at a time: a compromise between the caches and the price of a call
_ACCELERATOR_CHUNK = 1 << 26  # bounds the temporaries at some hundred MB each


def apply_colour(images: Tensor, params: Tensor) -> Tensor:
    """Colour jitter, grayscale, blur and solarisation of crops, in this order (Caron et al. 2021, appendix).

    Args:
        images: uint8 [n, 3, H, W], on any device.
        params: float32 [n, NUM_PARAMS] in this process's memory, not on the accelerator: which crops need which step is
            decided here, so that the accelerator is never waited for.

    Returns:
        uint8 [n, 3, H, W] on the device of `images`.
    """
    if not len(images):
        return images
    limit = _CPU_CHUNK if images.device.type == "cpu" else _ACCELERATOR_CHUNK
    size = max(1, limit // images[0].numel())
    steps = list(_steps(params.numpy()))
    chunks = []
    with torch.autocast(images.device.type, enabled=False):
        for start in range(0, len(images), size):
            stop = min(start + size, len(images))
            chunks.append(_apply(images[start:stop], [part for step in steps if (part := step.within(start, stop))]))
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


class _Step(NamedTuple):
    """One operation on some crops."""

    run: Callable[[Tensor, Tensor], Tensor]
    """(crops float32 [m, 3, H, W] of whole levels, values [m, k]) -> crops"""
    rows: NDArray[np.int64]
    """[m], ascending"""
    values: NDArray[np.float32]
    """[m, k]"""

    def within(self, start: int, stop: int) -> _Step | None:
        """What of it falls to the crops from `start` up to `stop`, numbered from `start`."""
        first, last = np.searchsorted(self.rows, (start, stop))
        if first == last:
            return None
        run, values = self.run, self.values[first:last]
        if run is _blend:
            run = _simplest_blend(values)
        elif run is _blur:
            values = values[:, : np.flatnonzero(values.any(0))[-1] + 1]
        return _Step(run, self.rows[first:last] - start, values)


def _steps(params: NDArray[np.float32]) -> Iterator[_Step]:
    """What the crops need, in an order that respects each crop's own.

    The hue of all crops is shifted in one step; the other three parts of the jitter, all blends, take at most three
    steps before and three after it.
    """
    order = ORDERS[params[:, ORDER].astype(np.int64)]  # [n, 4]
    shift = np.trunc(params[:, HUE] * np.float32(255)) % 256
    shifted = np.flatnonzero(params[:, HUE])
    hue_place = np.where(params[:, HUE] != 0, (order == HUE).argmax(1), _NUM_BLENDS)  # blends in front of the hue
    blends = order[order != HUE].reshape(-1, _NUM_BLENDS)
    factors = np.take_along_axis(params, blends, axis=1)
    for in_front in (True, False):
        for place in range(_NUM_BLENDS):
            rows = np.flatnonzero((factors[:, place] != 1) & ((place < hue_place) == in_front))
            kind = blends[rows, place]
            yield _Step(
                _blend,
                rows,
                np.stack([factors[rows, place], kind == CONTRAST, kind == SATURATION], axis=1, dtype=np.float32),
            )
        if in_front:
            yield _Step(_hue, shifted, shift[shifted, None])
    for run, column in ((_grayscale, GRAYSCALE), (_blur, SIGMA), (_solarize, SOLARIZE)):
        rows = np.flatnonzero(params[:, column])
        values = params[rows, column, None]
        yield _Step(run, rows, blur_weights(values[:, 0]) if run is _blur and len(rows) else values)


def _apply(images: Tensor, steps: Sequence[_Step]) -> Tensor:
    if not steps:
        return images
    # All numbers travel in two copies, before the first step: many small ones would each cost a launch.
    rows = _send(np.concatenate([step.rows for step in steps]), images.device)
    values = _send(np.concatenate([step.values.ravel() for step in steps]), images.device)
    x = images.float()
    row = value = 0
    for step in steps:
        index = rows[row : row + len(step.rows)]
        arguments = values[value : value + step.values.size].view(step.values.shape)
        row, value = row + len(step.rows), value + step.values.size
        if len(index) == len(x):
            x = step.run(x, arguments)
        else:
            x.index_copy_(0, index, step.run(x.index_select(0, index), arguments))
    return x.to(torch.uint8)


def _send(array: NDArray[np.generic], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _blend(x: Tensor, values: Tensor) -> Tensor:
    """Brightness, contrast or saturation. Values [m, 3]: factor, 1 for contrast, 1 for saturation."""
    luma = _luma(x)
    base = _mean(luma).mul_(_column(values, 1)) + luma * _column(values, 2)
    return _blend_with(x, base, values)


def _simplest_blend(values: NDArray[np.float32]) -> Callable[[Tensor, Tensor], Tensor]:
    """`_blend`, or what it amounts to where all crops ask for the same."""
    _, contrast, saturation = values.mean(0)
    if contrast == 1:
        return _contrast
    if saturation == 1:
        return _saturation
    return _blend if contrast or saturation else _brightness


def _brightness(x: Tensor, values: Tensor) -> Tensor:
    return (x * _column(values, 0)).clamp_(0, 255).floor_()


def _contrast(x: Tensor, values: Tensor) -> Tensor:
    return _blend_with(x, _mean(_luma(x)), values)


def _saturation(x: Tensor, values: Tensor) -> Tensor:
    return _blend_with(x, _luma(x), values)


def _blend_with(x: Tensor, base: Tensor, values: Tensor) -> Tensor:
    """`base` + factor x (`x` - `base`), cut to 0..255 and truncated."""
    return (x - base).mul_(_column(values, 0)).add_(base).clamp_(0, 255).floor_()


def _column(values: Tensor, column: int) -> Tensor:
    return values[:, column].view(-1, 1, 1, 1)


def _luma(x: Tensor) -> Tensor:
    """[m, 3, H, W] -> [m, 1, H, W]: ITU-R 601 luma in Pillow's 16-bit fixed point."""
    luma = x[:, 0:1] * LUMA_WEIGHTS[0]
    luma.add_(x[:, 1:2], alpha=LUMA_WEIGHTS[1]).add_(x[:, 2:3], alpha=LUMA_WEIGHTS[2])
    return luma.add_(32768.0).mul_(1 / 65536).floor_()


def _mean(luma: Tensor) -> Tensor:
    """[m, 1, H, W] -> [m, 1, 1, 1], rounded to a whole level."""
    return luma.mean(dim=(2, 3), keepdim=True, dtype=torch.float64).add_(0.5).floor_().float()


def _hue(x: Tensor, values: Tensor) -> Tensor:
    """Shift by whole 256ths of the wheel, through HSV with 8 bits for each of its channels, as Pillow keeps them.

    Conditions are sums and products of 0 and 1, since on a CPU torch compares several times slower than it adds.
    """
    red, green, blue = x.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    not_red, not_green = (value - red).clamp_(max=1), (value - green).clamp_(max=1)
    from_red = green - blue  # place on the wheel, sixths of a turn x chroma, as it is where red is the highest
    from_green = (blue - red).add_(chroma, alpha=2)
    from_blue = (red - green).add_(chroma, alpha=4)
    from_other = from_green.addcmul_(from_blue.sub_(from_green), not_green)
    turn = from_red.addcmul_(from_other.sub_(from_red), not_red)
    turn.addcmul_(turn.clamp(-1, 0), chroma, value=-6)
    hue = turn.mul_(85).div_(chroma.clamp(min=1).mul_(2)).floor_().add_(values.view(-1, 1, 1))
    hue.sub_((hue - 255).clamp_(0, 1), alpha=256)
    saturation = chroma.mul_(255).div_(value.clamp(min=1)).floor_()
    scaled = saturation.mul_(value).div_(255)
    angle = hue.mul_(6).div_(255)
    out = torch.empty_like(x)
    for channel, (centre, sign, offset) in enumerate(HUE_RAMPS):
        weight = (angle - centre).abs_().mul_(sign).add_(offset).clamp_(0, 1)  # 1 where the channel is at its lowest
        torch.sub(value, weight.mul_(scaled).round_(), out=out[:, channel])
    return out


def _grayscale(x: Tensor, _: Tensor) -> Tensor:
    return _luma(x).repeat(1, 3, 1, 1)


def _solarize(x: Tensor, _: Tensor) -> Tensor:
    bright = (x - 127).clamp_(0, 1)
    return x.addcmul(bright, 255 - 2 * x)


def blur_weights(sigma: NDArray[np.float32]) -> NDArray[np.float32]:
    """Half of a Gaussian kernel, [m, r + 1] from the centre outwards, for `sigma` [m] (> 0, pixels).

    Each crop's weights end at three of its own standard deviations; r is that of the widest. They are whole numbers,
    and a full kernel sums to `BLUR_UNIT`.
    """
    width = sigma.astype(np.float64)[:, None]
    reach = np.ceil(3 * width)
    offsets = np.arange(int(reach.max()) + 1)
    weights = np.exp(-0.5 * (offsets / width) ** 2) * (offsets <= reach)
    weights /= weights[:, :1] + 2 * weights[:, 1:].sum(1, keepdims=True)
    weights = np.rint(weights * BLUR_UNIT)
    weights[:, 0] = BLUR_UNIT - 2 * weights[:, 1:].sum(1)
    return weights.astype(np.float32)


def _blur(x: Tensor, weights: Tensor) -> Tensor:
    """Along each axis in turn, the edge pixel repeated beyond the edge; rounded to whole levels once, half to even."""
    for dim in (3, 2):
        radius, size = weights.shape[1] - 1, x.shape[dim]
        padded = F.pad(x, (radius, radius, 0, 0) if dim == 3 else (0, 0, radius, radius), mode="replicate")
        total = x * _column(weights, 0)
        for offset in range(1, radius + 1):
            pair = padded.narrow(dim, radius - offset, size) + padded.narrow(dim, radius + offset, size)
            total.addcmul_(pair, _column(weights, offset))
        x = total
    return x.mul_(1 / BLUR_UNIT**2).round_()
