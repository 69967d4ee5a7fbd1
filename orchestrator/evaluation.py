"""k-NN of the teacher's backbone while a run trains, each worker taking its share of the images."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dino_core.distributed import all_gather_rows, rank, world_size
from dino_core.eval.features import eval_transform, extract_features
from dino_core.eval.knn import knn_accuracy
from orchestrator.config import RunConfig
from orchestrator.data.images import BadImage
from orchestrator.data.loaders import Part, make_loader
from orchestrator.data.sources import Source
from orchestrator.errors import RunFailed

if TYPE_CHECKING:
    from dino_core.train import TrainState

logger = logging.getLogger(__name__)

_CACHE_BYTES = 1 << 30
"""Transformed images of one split are kept between evaluations up to this size per worker, else decoded each time."""

_IMAGES_PER_TASK = 16  # decoded by one thread in a row: what is stored together is read together
_PROBED_IMAGES = 5
_WORTH_THREADS_S = 0.5e-3  # CPU time of an image below which several threads mostly wait for Python's lock

_RAW_PIXEL_VALUES = 1 << 28
"""Raw pixels are classified too, as a floor to compare with, while a gallery holds no more values than this."""


def make_evaluate(
    config: RunConfig, source: Source, digest: str | None = None
) -> Callable[[TrainState], dict[str, float]] | None:
    """The evaluation of a run, or None if its source has no labels or no test split.

    It returns `eval/knn_top1` (per cent); before the first step `eval/raw_pixel_knn_top1`, the same protocol on the
    pixels themselves; and, if there are any, `eval/unreadable_images`, how many images of both splits were left out.
    Every rank must call it; all get the same result, or raise RunFailed if features are not finite or no image of a
    split can be read.

    Args:
        digest: The source's, if it is known already.

    Raises:
        ConfigError: As `make_loader` does.
    """
    if source.test is None or source.test.labels is None or source.train.labels is None:
        return None
    settings = config.pretrain.eval
    gallery = _Images(config, source, "train", settings.num_gallery, digest)
    queries = _Images(config, source, "test", settings.num_queries, digest)

    def evaluate(state: TrainState) -> dict[str, float]:
        features = [extract_features(state.teacher.backbone, images.batches()) for images in (gallery, queries)]
        metrics = {"eval/knn_top1": accuracy(features, state.step)}
        if num_bad := sum(int(images.bad(state.device).sum()) for images in (gallery, queries)):
            metrics["eval/unreadable_images"] = num_bad
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

    def __init__(self, config: RunConfig, source: Source, part: Part, limit: int | None, digest: str | None) -> None:
        split = source.train if part == "train" else source.test
        assert split is not None and split.labels is not None
        ids = np.arange(len(split))
        if limit is not None and limit < len(ids):
            # The same choice in every run, whatever its seed: k-NN figures of different seeds stay comparable.
            ids = np.sort(np.random.default_rng(0).permutation(len(ids))[:limit])
        self._config, self._split = config, split
        self._loader = make_loader(config, source, part, digest)
        self._num = len(ids)
        share = -(-self._num // world_size())
        padded = np.resize(ids, share * world_size())
        self._ids = padded[rank() * share : (rank() + 1) * share]
        self._labels = torch.from_numpy(np.asarray(split.labels)[self._ids])
        self._bad = torch.zeros(share, dtype=torch.bool)
        side = config.pretrain.crops.global_size
        self._shape = (3, side, side)
        self._cache: Tensor | None = None
        self._keep = share * 3 * side * side * 4 <= _CACHE_BYTES
        self._num_kept = 0
        self._num_threads: int | None = None

    def __len__(self) -> int:
        return self._num

    def batches(self) -> Iterator[Tensor]:
        """float32 [n, 3, side, side], in order. The next one is made by threads while the caller works with one."""
        if self._cache is None and self._keep:
            self._cache = torch.zeros(len(self._ids), *self._shape)
        size = self._config.pretrain.eval.batch_size
        if self._num_threads is None:
            self._num_threads = self._choose_threads()
        pool = ThreadPoolExecutor(self._num_threads, "evaluation")
        try:
            waiting = self._begin(pool, 0, size)
            for start in range(0, len(self._ids), size):
                images = self._end(*waiting)
                waiting = self._begin(pool, start + size, size)
                yield images
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _choose_threads(self) -> int:
        """As many as there are CPUs, of which training leaves all to an evaluation; one for tiny images, and more where
        a service has to answer."""
        if self._split.reads_at_once > 1:
            return self._split.reads_at_once
        seconds = []
        for place in range(min(_PROBED_IMAGES, len(self._ids))):
            started = time.thread_time()
            self._load(torch.empty(1, *self._shape), place)
            seconds.append(time.thread_time() - started)
        cluster = self._config.cluster
        # The processes that make the training's batches come to rest as soon as nobody takes these.
        many = cluster.cpus_per_worker + cluster.data_cpus // cluster.num_workers
        return many if statistics.median(seconds) > _WORTH_THREADS_S else 1

    def _begin(self, pool: ThreadPoolExecutor, start: int, size: int) -> tuple[Tensor, list[Future[dict[int, str]]]]:
        """The batch from place `start` on, and the tasks that are filling it."""
        stop = min(start + size, len(self._ids))
        images = torch.zeros(max(0, stop - start), *self._shape) if self._cache is None else self._cache[start:stop]
        if stop <= self._num_kept:
            return images, []
        parts = [(at, min(at + _IMAGES_PER_TASK, stop)) for at in range(start, stop, _IMAGES_PER_TASK)]
        return images, [pool.submit(self._load, images[at - start : end - start], at) for at, end in parts]

    def _end(self, images: Tensor, tasks: list[Future[dict[int, str]]]) -> Tensor:
        """The images, once they are all there."""
        for task in tasks:
            for place, reason in task.result().items():
                if not self._bad[place]:
                    sample = int(self._ids[place])
                    logger.warning("evaluation leaves out %s: %s", self._split.name(sample), reason)
                self._bad[place] = True
        if tasks and self._cache is not None:
            self._num_kept += len(images)
        return images

    def _load(self, images: Tensor, start: int) -> dict[int, str]:
        """Fill `images` [n, 3, side, side] from place `start` on; the places that cannot be read, and why.

        They are zeros, and left out by `gather`.
        """
        config = self._config.pretrain
        crops = config.crops
        reasons = {}
        for row, sample in enumerate(self._ids[start : start + len(images)].tolist()):
            try:
                image = self._loader.load(self._split, sample)
            except BadImage as error:
                reasons[start + row] = str(error)
                continue
            images[row] = eval_transform(image, crops.global_size, config.eval.crop_fraction, crops.mean, crops.std)
        return reasons

    def bad(self, device: torch.device) -> Tensor:
        """Which images could not be read, of all workers: bool [n], on `device`."""
        return all_gather_rows(self._bad.to(device, torch.uint8))[: self._num] != 0

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The rows and labels of all workers' readable images: [n, D], [n]."""
        good = ~self.bad(rows.device)
        rows, labels = (all_gather_rows(part.to(rows.device))[: self._num] for part in (rows, self._labels))
        return rows[good], labels[good]
