"""k-NN and label-free scores of the teacher's backbone while a run trains, each worker taking its share of images."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dino_core.config import PretrainConfig
from dino_core.distributed import all_gather_rows, rank, world_size
from dino_core.eval.features import extract_features
from dino_core.eval.knn import knn_accuracy
from dino_core.eval.rank import alpha_req, lidar, rankme
from orchestrator.config import RunConfig
from orchestrator.data.images import BadImage
from orchestrator.data.loaders import Part, make_loader
from orchestrator.data.sources import Source
from orchestrator.errors import RunFailed
from orchestrator.evaluate.views import AugmentedViews, CentreCrop

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


_kept: dict[tuple[object, ...], _Evaluation] = {}
"""The last evaluation made in this process, with its images: the next trial of a sweep mostly needs the same."""


def make_evaluate(
    config: RunConfig, source: Source, digest: str | None = None
) -> Callable[[TrainState], dict[str, float]] | None:
    """The evaluation of a run, or None if there is nothing to measure.

    Of the teacher's backbone it returns, where the source has labels and a test split, `eval/knn_top1` (per cent) and,
    before the first step, `eval/raw_pixel_knn_top1`, the same protocol on the pixels themselves. With or without
    labels: `eval/rankme` and `eval/alpha_req` of training images, `eval/lidar` of their augmented views; the images and
    views are the same for every run and seed. If there are any, `eval/unreadable_images`, how many images were left
    out. Every rank must call it; all get the same result, or raise RunFailed if features are not finite or no image of
    a split can be read.

    Args:
        digest: The source's, if it is known already.

    Raises:
        ConfigError: As `make_loader` does.
    """
    if not source.has_test_labels and not config.pretrain.eval.num_label_free:
        return None
    if digest is None:
        return _Evaluation(config, source, digest)
    settings = (config.data, config.cluster, config.pretrain.crops, config.pretrain.eval)
    depends_on = (digest, *settings, rank(), world_size())
    for made_for in [key for key in _kept if key != depends_on]:
        del _kept[made_for]
    if depends_on not in _kept:
        _kept[depends_on] = _Evaluation(config, source, digest)
    return _kept[depends_on]


class _Evaluation:
    """Features of a run's fixed images, and what they come to."""

    def __init__(self, config: RunConfig, source: Source, digest: str | None) -> None:
        settings = config.pretrain.eval
        num, labelled = len(source.train), source.has_test_labels
        self._config = config
        # The choices are nested, so that an image of both costs one forward pass.
        limits = [settings.num_label_free, *([settings.num_gallery or num] if labelled else [])]
        self._train = _Images(config, source, "train", fixed_choice(num, max(limits)), digest)
        self._gallery, self._scored = (
            torch.from_numpy(np.isin(self._train.all_ids, fixed_choice(num, limit)))
            for limit in (settings.num_gallery, settings.num_label_free)
        )
        self._queries: _Images | None = None
        if labelled:
            assert source.test is not None
            self._queries = _Images(
                config, source, "test", fixed_choice(len(source.test), settings.num_queries), digest
            )
        self._views: _Images | None = None
        if settings.num_label_free and settings.num_lidar_images:
            chosen = fixed_choice(num, settings.num_lidar_images)
            self._augmented = AugmentedViews(config.pretrain.crops, settings.num_lidar_views)
            self._views = _Images(config, source, "train", chosen, digest, self._augmented)

    def __call__(self, state: TrainState) -> dict[str, float]:
        backbone = state.teacher_backbone()
        train = self._train.gather(extract_features(backbone, self._train.batches()))
        metrics: dict[str, float] = {}
        if self._queries is not None:
            tests = self._queries.gather(extract_features(backbone, self._queries.batches()))
            metrics["eval/knn_top1"] = self._accuracy(train, tests, state.step)
            side = self._config.pretrain.crops.global_size
            if state.step == 0 and int(self._gallery.sum()) * 3 * side * side <= _RAW_PIXEL_VALUES:
                pixels = [self._pixels(images, state.device) for images in (self._train, self._queries)]
                metrics["eval/raw_pixel_knn_top1"] = self._accuracy(pixels[0], pixels[1], state.step)
        if self._config.pretrain.eval.num_label_free:
            metrics |= self._label_free(state, backbone, train)
        if num_bad := sum(int(part.bad(state.device).sum()) for part in (self._train, self._queries) if part):
            metrics["eval/unreadable_images"] = num_bad
        return metrics

    def _accuracy(self, train: Tensor, tests: Tensor, step: int) -> float:
        assert self._queries is not None
        settings = self._config.pretrain.eval
        gallery = self._readable(self._train, train, "training", step, self._gallery)
        queries = self._readable(self._queries, tests, "test", step)
        return knn_accuracy(
            train[gallery],
            self._train.all_labels()[gallery.cpu()],
            tests[queries],
            self._queries.all_labels()[queries.cpu()],
            k=min(settings.knn_k, int(gallery.sum())),
            temperature=settings.knn_temperature,
        )

    def _label_free(self, state: TrainState, backbone: nn.Module, train: Tensor) -> dict[str, float]:
        rows = train[self._readable(self._train, train, "training", state.step, self._scored)]
        scores = {"eval/rankme": rankme(rows), "eval/alpha_req": alpha_req(rows)}
        if self._views is not None:
            num_views = self._config.pretrain.eval.num_lidar_views
            batches = (self._augmented.finish(batch, state.device) for batch in self._views.batches())
            views = self._views.gather(extract_features(backbone, batches).unflatten(0, (-1, num_views)))
            scores["eval/lidar"] = lidar(views[self._readable(self._views, views, "training", state.step)])
        return {name: score for name, score in scores.items() if math.isfinite(score)}  # no spectrum has no exponent

    def _readable(self, images: _Images, rows: Tensor, name: str, step: int, chosen: Tensor | None = None) -> Tensor:
        """Which of the images, those `chosen` or all, could be read: bool [n], on the device of their features."""
        good = ~images.bad(rows.device)
        if chosen is not None:
            good &= chosen.to(rows.device)
        if not good.any():
            raise RunFailed(f"data.source = {self._config.data.source}: no {name} image for evaluations can be read")
        if not rows[good].isfinite().all():
            raise RunFailed(f"the features of {name} images at step {step} are not finite")
        return good

    @staticmethod
    def _pixels(images: _Images, device: torch.device) -> Tensor:
        rows = torch.cat([batch.flatten(1) for batch in images.batches()])
        return images.gather(rows.to(device))  # NCCL gathers nothing that lies on the CPU


def fixed_choice(num: int, limit: int | None) -> NDArray[np.int64]:
    """At most `limit` of `num` images, ascending; all of them for None.

    The same choice in every run, whatever its seed: figures of different seeds stay comparable. A smaller choice is a
    part of a larger one.
    """
    if limit is None or limit >= num:
        return np.arange(num)
    return np.sort(choice_order(num)[:limit])


def choice_order(num: int) -> NDArray[np.int64]:
    """All of `num` images in the order in which they are chosen."""
    return np.random.default_rng(0).permutation(num)


def centre_crop(config: PretrainConfig) -> CentreCrop:
    """What features are taken from while a run trains."""
    crops = config.crops
    return CentreCrop(crops.global_size, config.eval.crop_fraction, crops.mean, crops.std)


class _Images:
    """This worker's share of some images of a split, as batches of one view of each, or of several."""

    def __init__(
        self,
        config: RunConfig,
        source: Source,
        part: Part,
        ids: NDArray[np.int64],
        digest: str | None,
        view: CentreCrop | AugmentedViews | None = None,
    ) -> None:
        split = source.train if part == "train" else source.test
        assert split is not None
        self._config, self._split = config, split
        self._view = view or centre_crop(config.pretrain)
        self._loader = make_loader(config, source, part, digest)
        self.all_ids = ids
        """Of all workers."""
        share = -(-len(ids) // world_size())
        padded = np.resize(ids, share * world_size())
        self._ids = padded[rank() * share : (rank() + 1) * share]
        self._bad = torch.zeros(share, dtype=torch.bool)
        self._shape = self._view.shape
        self._cache: Tensor | None = None
        self._keep = share * math.prod(self._shape) * self._view.dtype.itemsize <= _CACHE_BYTES
        self._num_kept = 0
        self._num_threads: int | None = None
        num_views = math.prod(self._shape[:-3])
        self._batch_size = max(1, config.pretrain.eval.batch_size // num_views)

    def all_labels(self) -> Tensor:
        """[n] of all workers' images, on the CPU."""
        assert self._split.labels is not None
        return torch.from_numpy(np.asarray(self._split.labels)[self.all_ids])

    def batches(self) -> Iterator[Tensor]:
        """[n, ...] of the view's shape, in order. The next one is made by threads while the caller works with one."""
        if self._cache is None and self._keep:
            self._cache = torch.zeros(len(self._ids), *self._shape, dtype=self._view.dtype)
        size = self._batch_size
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
            self._load(torch.empty(1, *self._shape, dtype=self._view.dtype), place)
            seconds.append(time.thread_time() - started)
        cluster = self._config.cluster
        # The processes that make the training's batches come to rest as soon as nobody takes these.
        many = cluster.cpus_per_worker + cluster.data_cpus // cluster.num_workers
        return many if statistics.median(seconds) > _WORTH_THREADS_S else 1

    def _begin(self, pool: ThreadPoolExecutor, start: int, size: int) -> tuple[Tensor, list[Future[dict[int, str]]]]:
        """The batch from place `start` on, and the tasks that are filling it."""
        stop = min(start + size, len(self._ids))
        if self._cache is None:
            images = torch.zeros(max(0, stop - start), *self._shape, dtype=self._view.dtype)
        else:
            images = self._cache[start:stop]
        if stop <= self._num_kept:
            return images, []
        parts = [(at, min(at + _IMAGES_PER_TASK, stop)) for at in range(start, stop, _IMAGES_PER_TASK)]
        return images, [pool.submit(self._load, images[at - start : end - start], at) for at, end in parts]

    def _end(self, images: Tensor, tasks: list[Future[dict[int, str]]]) -> Tensor:
        """The images, once they are all there."""
        for task in tasks:
            for place, reason in task.result().items():
                if not self._bad[place] and isinstance(self._view, CentreCrop):  # views are of images told already
                    sample = int(self._ids[place])
                    logger.warning("evaluation leaves out %s: %s", self._split.name(sample), reason)
                self._bad[place] = True
        if tasks and self._cache is not None:
            self._num_kept += len(images)
        return images

    def _load(self, images: Tensor, start: int) -> dict[int, str]:
        """Fill `images` [n, ...] from place `start` on; the places that cannot be read, and why. They are zeros."""
        reasons = {}
        for row, sample in enumerate(self._ids[start : start + len(images)].tolist()):
            try:
                image = self._loader.load(self._split, sample)
            except BadImage as error:
                reasons[start + row] = str(error)
                continue
            images[row] = self._view.make(image, sample)
        return reasons

    def bad(self, device: torch.device) -> Tensor:
        """Which images could not be read, of all workers: bool [n], on `device`."""
        return all_gather_rows(self._bad.to(device, torch.uint8))[: len(self.all_ids)] != 0

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all workers' images, [n, ...], those that cannot be read among them."""
        return all_gather_rows(rows)[: len(self.all_ids)]
