"""The colour tail: what each way of computing it has in common with Pillow, and with the other."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as tv

from dino_core import colour, colour_cpu
from dino_core.config import CropsConfig
from dino_core.crops import MultiCrop
from tests.dino_core.pictures import BLENDS, IDENTITY, first_photos, psnr, smooth_image

Apply = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(crops uint8 [n, 3, H, W], parameters [n, NUM_PARAMS]) -> crops"""


def batched(crops: np.ndarray, params: np.ndarray) -> np.ndarray:
    return colour.apply_colour(torch.from_numpy(crops), torch.from_numpy(params)).numpy()


def by_opencv(crops: np.ndarray, params: np.ndarray) -> np.ndarray:
    crops = crops.copy()
    colour_cpu.apply_colour(crops, params)
    return crops


@pytest.fixture(params=[batched, by_opencv])
def apply(request: pytest.FixtureRequest) -> Apply:
    return request.param


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tail(apply: Apply, image: np.ndarray, **changes: float) -> np.ndarray:
    """The tail of one image HWC with the named parameters."""
    params = IDENTITY.copy()
    for name, value in changes.items():
        params[getattr(colour, name)] = value
    crops = np.ascontiguousarray(image.transpose(2, 0, 1)[None])
    return apply(crops, params[None])[0].transpose(1, 2, 0)


# Fidelity to Pillow


@pytest.mark.parametrize("factor", [0.0, 0.6, 0.83, 1.17, 1.4, 3.0])
def test_blends_equal_pillows(apply: Apply, factor: float) -> None:
    image = smooth_image(3, 40, 50)
    for column, operation in BLENDS:
        name = {colour.BRIGHTNESS: "BRIGHTNESS", colour.CONTRAST: "CONTRAST", colour.SATURATION: "SATURATION"}[column]
        theirs = np.array(operation(Image.fromarray(image), factor))
        assert np.array_equal(tail(apply, image, **{name: factor}), theirs), name


@pytest.mark.parametrize("shift", [-0.5, -0.1, -0.031, 0.004, 0.07, 0.1, 0.5])
def test_hue_equals_pillows(apply: Apply, shift: float) -> None:
    levels = np.array([0, 1, 2, 60, 127, 128, 200, 254, 255], dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
    for image in (grid, smooth_image(4, 60, 80)):
        ours = tail(apply, image, HUE=shift).astype(int)
        theirs = np.array(tv.adjust_hue(Image.fromarray(image), shift)).astype(int)
        assert np.abs(ours - theirs).max() <= 6  # one step of the 8-bit hue
        assert (ours != theirs).mean() < 0.01


def test_grayscale_and_solarize_equal_pillows(apply: Apply) -> None:
    image = smooth_image(5, 40, 50)
    pil = Image.fromarray(image)
    assert np.array_equal(tail(apply, image, GRAYSCALE=1), np.array(tv.rgb_to_grayscale(pil, 3)))
    assert np.array_equal(tail(apply, image, SOLARIZE=1), np.array(ImageOps.solarize(pil)))


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_a_gaussian_and_close_to_pillows(apply: Apply, sigma: float) -> None:
    image = smooth_image(6, 96, 96)
    ours = tail(apply, image, SIGMA=sigma)
    offsets = np.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    exact = image.astype(np.float64)
    for axis in (0, 1):
        widths = [(len(offsets) // 2, len(offsets) // 2) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(exact, widths, mode="edge")
        exact = sum(k * np.take(padded, np.arange(i, i + 96), axis=axis) for i, k in enumerate(kernel))
    assert np.abs(ours - exact).max() < 1.5  # the kernel has 8 bits
    assert np.abs(ours - exact).mean() < 0.35  # of which rounding to a level is 0.25
    assert psnr(ours, np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))) > 44


def test_blur_weights_are_whole_and_sum_to_256() -> None:
    weights = colour.blur_weights(np.array([0.1, 0.37, 1.3, 2.0], dtype=np.float32))
    assert weights.shape == (4, 7)
    assert np.array_equal(weights, np.rint(weights))
    assert (weights[:, 0] + 2 * weights[:, 1:].sum(1)).tolist() == [256] * 4
    assert (weights[0, 2:] == 0).all()


# The two ways


def random_tails(side: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Crops, noisy and smooth in turn, with parameters as in a run."""
    rng = np.random.default_rng(side)
    crops = rng.integers(0, 256, (count, 3, side, side), dtype=np.uint8)
    for row in range(1, count, 2):
        crops[row] = smooth_image(row, side, side).transpose(2, 0, 1)
    config = CropsConfig(num_local_crops=2, grayscale_prob=0.3, solarize_prob=0.5, blur_sigma=(0.1, 3.0))
    ids = np.arange(count // 4)
    return crops, MultiCrop(config, 0).draw(np.full((len(ids), 2), side), ids * 0, ids).params.reshape(count, -1)


@pytest.mark.parametrize("side", [1, 5, 16, 37, 96, 160])
def test_both_ways_agree_to_the_level_but_for_ties_of_the_blur(side: int) -> None:
    crops, params = random_tails(side, 100 if side < 96 else 40)
    a, b = batched(crops, params), by_opencv(crops, params)
    different = np.abs(a.astype(int) - b)
    assert different.max() <= 1
    assert (different > 0).mean() < 1e-4
    assert not different[params[:, colour.SIGMA] == 0].any()
    assert (a != crops).mean() > 0.5


def test_both_ways_shift_the_hue_of_every_colour_alike() -> None:
    levels = np.arange(0, 256, 3, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels)).reshape(1, 3, len(levels), -1)
    for turns in (-0.5, -0.09, 0.001, 0.1, 0.37):
        params = IDENTITY[None].copy()
        params[0, colour.HUE] = turns
        assert np.array_equal(batched(colours, params), by_opencv(colours, params)), turns


def test_both_ways_agree_on_photos(shared_data: Path) -> None:
    images = [image[:200, :224].transpose(2, 0, 1) for image in first_photos(shared_data, 20)]
    crops = np.stack([image for image in images if image.shape == (3, 200, 224)])
    _, params = random_tails(8, 20)
    params = params[: len(crops)]
    assert np.abs(batched(crops, params).astype(int) - by_opencv(crops, params)).max() <= 1


def test_nothing_changes_without_parameters(apply: Apply) -> None:
    crops, _ = random_tails(40, 4)
    assert np.array_equal(apply(crops, np.tile(IDENTITY, (4, 1))), crops)
    assert apply(crops[:0], IDENTITY[None][:0]).shape == (0, 3, 40, 40)


def test_a_crop_does_not_depend_on_the_others(apply: Apply, monkeypatch: pytest.MonkeyPatch) -> None:
    crops, params = random_tails(33, 24)
    whole = apply(crops, params)
    order = np.random.default_rng(0).permutation(24)
    assert np.array_equal(apply(crops[order], params[order]), whole[order])
    monkeypatch.setattr(colour, "_CPU_CHUNK", 1)
    monkeypatch.setattr(colour_cpu, "_PIECE", 100)
    assert np.array_equal(apply(crops, params), whole)


def test_opencv_starts_no_threads() -> None:
    # In a process of its own, for a thread once started stays. Far larger than crops are, so that OpenCV would want to.
    code = """
import os
import cv2
import numpy as np
from dino_core import colour, colour_cpu
from dino_core.config import CropsConfig
from dino_core.crops import MultiCrop

cv2.setNumThreads(4)
threads = lambda: len(os.listdir("/proc/self/task"))
config = CropsConfig(num_local_crops=0, jitter_prob=1, blur_prob=(1, 1, 1), solarize_prob=1)
params = MultiCrop(config, 0).draw(np.full((1, 2), 600), np.zeros(1), np.zeros(1)).params.reshape(2, -1)
params[:, colour.GRAYSCALE] = 0, 1
crops = np.random.default_rng(0).integers(0, 256, (2, 3, 600, 600), dtype=np.uint8)
cv2.split(cv2.flip(np.ascontiguousarray(crops[0].transpose(1, 2, 0)), 1))
before = threads()
colour_cpu.apply_colour(crops, params)
assert threads() == before, (before, threads())
cv2.LUT(crops.reshape(-1, 600), np.arange(256, dtype=np.uint8))
print(threads() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, "the check sees no threads"
