"""Pictures, and the official augmentation of them with given parameters, for the tests of crops and colours."""

from __future__ import annotations

import io
import math
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as tv

from dino_core import colour

IDENTITY = np.array([1, 1, 1, 0, 0, 0, 0, 0], dtype=np.float32)
BLENDS = (
    (colour.BRIGHTNESS, tv.adjust_brightness),
    (colour.CONTRAST, tv.adjust_contrast),
    (colour.SATURATION, tv.adjust_saturation),
)
"""Columns of the parameters and the operation of torchvision that each is for."""


def smooth_image(seed: int, height: int, width: int) -> np.ndarray:
    """Something with edges, gradients and colours, like a photo: a few random sinusoids and a rectangle."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = sum(
        rng.uniform(20, 60) * np.sin(rng.uniform(2, 40) * x + rng.uniform(2, 40) * y + rng.uniform(0, 6, (3, 1, 1)))
        for _ in range(4)
    )
    image = np.moveaxis(128 + waves, 0, 2)
    image[height // 3 : height // 2, width // 4 : width // 2] = rng.uniform(0, 255, 3)
    return np.clip(image, 0, 255).astype(np.uint8)


def first_photos(shared_data: Path, count: int) -> list[np.ndarray]:
    images: list[np.ndarray] = []
    with tarfile.open(shared_data / "photos.tar") as archive:
        for member in archive:
            if member.name.endswith(".jpg") and len(images) < count:
                data = archive.extractfile(member)
                assert data is not None
                images.append(np.array(Image.open(io.BytesIO(data.read())).convert("RGB")))
    return images


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def official_crop(image: np.ndarray, box: np.ndarray, flip: bool, params: np.ndarray, size: int) -> np.ndarray:
    """The same operations with the same parameters as Pillow and torchvision do them."""
    top, left, height, width = box.tolist()
    pil = Image.fromarray(image)
    pil = tv.resized_crop(pil, top, left, height, width, [size, size], tv.InterpolationMode.BICUBIC)
    if flip:
        pil = tv.hflip(pil)
    hue = (colour.HUE, tv.adjust_hue)
    operations = dict([*BLENDS, hue])
    for column in colour.ORDERS[int(params[colour.ORDER])].tolist():
        if params[column] != IDENTITY[column]:
            pil = operations[column](pil, float(params[column]))
    if params[colour.GRAYSCALE]:
        pil = tv.rgb_to_grayscale(pil, num_output_channels=3)
    if params[colour.SIGMA]:
        pil = pil.filter(ImageFilter.GaussianBlur(float(params[colour.SIGMA])))
    if params[colour.SOLARIZE]:
        pil = ImageOps.solarize(pil)
    return np.array(pil)
