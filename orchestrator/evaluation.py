"""k-NN of the teacher's backbone while a run trains, each worker taking its share of the images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dino_core.distributed import all_gather_rows, rank, world_size
from dino_core.eval.features import eval_transform, extract_features
from dino_core.eval.knn import knn_accuracy
from orchestrator.config import RunConfig
from orchestrator.data.images import BadImage, load_image
from orchestrator.data.sources import Source, Split
from orchestrator.errors import RunFailed

if TYPE_CHECKING:
    from dino_core.train import TrainState

logger = logging.getLogger(__name__)

_CACHE_BYTES = 1 << 30
"""Transformed images of one split are kept between evaluations up to this size per worker, else decoded each time."""

_RAW_PIXEL_VALUES = 1 << 28
"""Raw pixels are classified too, as a floor to compare with, while a gallery holds no more values than this."""


def make_evaluate(config: RunConfig, source: Source) -> Callable[[TrainState], dict[str, float]] | None:
    """The evaluation of a run, or None if its source has no labels or no test split.

    It returns `eval/knn_top1` (per cent) and, before the first step, `eval/raw_pixel_knn_top1`: the same protocol on
    the pixels themselves. Every rank must call it; all get the same result, or raise RunFailed if features are not
    finite or no image of a split can be read.
    """
    test = source.test
    if test is None or test.labels is None or source.train.labels is None:
        return None
    settings = config.pretrain.eval
    gallery = _Images(config, source.train, settings.num_gallery)
    queries = _Images(config, test, settings.num_queries)

    def evaluate(state: TrainState) -> dict[str, float]:
        features = [extract_features(state.teacher.backbone, images.batches()) for images in (gallery, queries)]
        metrics = {"eval/knn_top1": accuracy(features, state.step)}
        side = config.pretrain.crops.global_size
        if state.step == 0 and len(gallery) * 3 * side * side <= _RAW_PIXEL_VALUES:
            pixels = [torch.cat([batch.flatten(1) for batch in images.batches()]) for images in (gallery, queries)]
            # NCCL gathers nothing that lies on the CPU
            metrics["eval/raw_pixel_knn_top1"] = accuracy([rows.to(state.device) for rows in pixels], state.step)
        return metrics

    def accuracy(features: list[Tensor], step: int) -> float:
        (train, train_labels), (test, test_labels) = (
            images.gather(rows) for images, rows in zip((gallery, queries), features, strict=True)
        )
        for part, name in ((train, "training"), (test, "test")):
            if not len(part):
                raise RunFailed(f"data.source = {config.data.source}: no {name} image for k-NN can be read")
            if not part.isfinite().all():
                raise RunFailed(f"the features of {name} images at step {step} are not finite")
        k = min(settings.knn_k, len(train))
        return knn_accuracy(train, train_labels, test, test_labels, k=k, temperature=settings.knn_temperature)

    return evaluate


class _Images:
    """This worker's share of a split's images, as normalised batches."""

    def __init__(self, config: RunConfig, split: Split, limit: int | None) -> None:
        assert split.labels is not None
        ids = np.arange(len(split))
        if limit is not None and limit < len(ids):
            # The same choice in every run, whatever its seed: k-NN figures of different seeds stay comparable.
            ids = np.sort(np.random.default_rng(0).permutation(len(ids))[:limit])
        self._config, self._split = config, split
        self._num = len(ids)
        share = -(-self._num // world_size())
        padded = np.resize(ids, share * world_size())
        self._ids = padded[rank() * share : (rank() + 1) * share]
        self._labels = torch.from_numpy(np.asarray(split.labels)[self._ids])
        self._cache: Tensor | None = None
        self._bad = torch.zeros(share, dtype=torch.bool)

    def __len__(self) -> int:
        return self._num

    def batches(self) -> Iterator[Tensor]:
        """float32 [n, 3, side, side], in order."""
        side, size = self._config.pretrain.crops.global_size, self._config.pretrain.eval.batch_size
        keep = len(self._ids) * 3 * side * side * 4 <= _CACHE_BYTES
        if self._cache is None and keep:
            self._cache = self._load(0, len(self._ids))
        for start in range(0, len(self._ids), size):
            yield self._load(start, start + size) if self._cache is None else self._cache[start : start + size]

    def _load(self, start: int, stop: int) -> Tensor:
        """float32 [n, 3, side, side]. An unreadable image is zeros here and is left out by `gather`."""
        config = self._config.pretrain
        crops = config.crops
        side = crops.global_size
        ids = self._ids[start:stop]
        images = torch.zeros(len(ids), 3, side, side)
        for row, sample in enumerate(ids):
            try:
                image = load_image(self._split, int(sample), self._config.data.max_pixels)
            except BadImage as error:
                if not self._bad[start + row]:
                    logger.warning("evaluation leaves out %s: %s", self._split.name(int(sample)), error)
                self._bad[start + row] = True
                continue
            images[row] = eval_transform(image, side, config.eval.crop_fraction, crops.mean, crops.std)
        return images

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The rows and labels of all workers: [n, D], [n]."""
        device = rows.device
        rows, labels, bad = (
            all_gather_rows(part.to(device)) for part in (rows, self._labels, self._bad.to(torch.uint8))
        )
        good = bad[: self._num] == 0
        return rows[: self._num][good], labels[: self._num][good]
