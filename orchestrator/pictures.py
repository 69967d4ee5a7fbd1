"""Pictures of a run on disk: fixed training images, the same in all runs of a source, to put trials side by side.

::

    <run>/pictures/step_00000500/crops.png      each image, its global and its local crops as the student sees them
                                 attention.png  each image, attention of the class token: mean, heads (ViTs only)
                                 features.png   each image, principal components of its patches' features as colours
"""

from __future__ import annotations

import io
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from dino_core.crops import MultiCrop
from dino_core.eval.attention import attention_maps
from dino_core.eval.features import eval_transform
from dino_core.eval.pictures import (
    Picture,
    as_pixels,
    attention_picture,
    crops_picture,
    features_picture,
    patch_features,
)
from orchestrator.config import RunConfig
from orchestrator.data.images import BadImage
from orchestrator.data.loaders import Loader
from orchestrator.data.split import Source
from orchestrator.evaluation import choice_order
from orchestrator.records import PICTURES_DIR

if TYPE_CHECKING:
    from dino_core.train import TrainState

logger = logging.getLogger(__name__)

MAX_BYTES = 300_000
"""Of a PNG. Reports hold many of them."""
_SMALLER = 0.8


class Pictures:
    """Draws a run's pictures. Only one worker of a run has it."""

    def __init__(self, config: RunConfig, source: Source, loader: Loader, run_dir: Path) -> None:
        self._config, self._source, self._loader = config, source, loader
        self._folder = run_dir / PICTURES_DIR
        self._images: tuple[list[int], list[Picture]] | None = None

    def is_due(self, state: TrainState) -> bool:
        """Whether the evaluation of this step is to draw, and nobody drew before."""
        settings = self._config.pretrain.eval
        every = settings.pictures_every_steps
        due = state.step == state.schedules.total_steps or (every is not None and state.step % every == 0)
        return settings.num_pictures > 0 and due and not self._step_folder(state).exists()

    def draw(self, state: TrainState, backbone: nn.Module) -> None:
        """Draw and write all pictures of this step, or none, with the teacher's `backbone`.

        Nothing that goes wrong here ends a run: it is logged, and the pictures are missing.
        """
        folder = self._step_folder(state)
        try:
            write_pictures(folder, self._make(backbone))
        # No number depends on a picture. A full disk, or a backbone that is unlike all that were thought of, must not
        # cost the result of the whole run, whose last evaluation this is.
        except Exception:
            logger.warning("no pictures of step %d, %s is missing:", state.step, folder, exc_info=True)

    def _step_folder(self, state: TrainState) -> Path:
        return self._folder / f"step_{state.step:08d}"

    def _make(self, backbone: nn.Module) -> dict[str, Picture]:
        if self._images is None:
            self._images = self._choose()
        numbers, originals = self._images
        if not originals:
            raise ValueError("no training image can be read")
        config = self._config.pretrain
        crops = config.crops
        multi_crop = MultiCrop(crops, config.seed)
        made = multi_crop.make(originals, np.zeros(len(numbers), dtype=np.int64), np.array(numbers))
        pictures = {"crops": crops_picture(originals, multi_crop.finish(made, "cpu"), crops.mean, crops.std)}
        size, fraction = crops.global_size, config.eval.crop_fraction
        views = torch.stack([eval_transform(image, size, fraction, crops.mean, crops.std) for image in originals])
        seen = as_pixels(views, crops.mean, crops.std)
        maps = attention_maps(backbone, views)
        if maps is not None:
            pictures["attention"] = attention_picture(seen, maps)
        features = patch_features(backbone, views)
        if features is not None:
            pictures["features"] = features_picture(seen, features)
        return pictures

    def _choose(self) -> tuple[list[int], list[Picture]]:
        """The first readable images of the order that evaluations choose by: their numbers and pixels."""
        numbers: list[int] = []
        images: list[NDArray[np.uint8]] = []
        for sample in choice_order(len(self._source.train)).tolist():
            if len(numbers) == self._config.pretrain.eval.num_pictures:
                break
            try:
                images.append(self._loader.load(self._source.train, sample))
            except BadImage:  # told by the evaluation or by training
                continue
            numbers.append(sample)
        return numbers, images


def write_pictures(folder: Path, pictures: Mapping[str, Picture]) -> None:
    """Write `<name>.png` for each picture; the folder appears with all of them or not at all.

    Raises:
        OSError: the disk is full, or the like.
    """
    encoded = {f"{name}.png": encode_png(picture) for name, picture in pictures.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(exist_ok=True)
        for name, data in encoded.items():
            (temporary / name).write_bytes(data)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def encode_png(picture: Picture, max_bytes: int = MAX_BYTES) -> bytes:
    """A PNG of at most `max_bytes`: as it is if that fits, else of 256 colours, else smaller as well."""
    image = Image.fromarray(picture)
    data = _encode(image)
    while len(data) > max_bytes:
        data = _encode(image.quantize(256))
        image = image.resize((max(1, round(image.width * _SMALLER)), max(1, round(image.height * _SMALLER))))
    return data


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
