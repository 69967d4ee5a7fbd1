"""Features of images, taken once for each view: in shares, which are kept on disk, here or as Ray tasks."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dino_core.eval.features import evaluating
from orchestrator.data.images import BadImage
from orchestrator.data.loaders import Loader
from orchestrator.data.split import Split
from orchestrator.errors import RunFailed
from orchestrator.evaluate.feature_cache import FeatureCache, Part
from orchestrator.evaluate.targets import Target
from orchestrator.evaluate.views import View

if TYPE_CHECKING:
    from orchestrator.evaluate.compute import Compute

_BATCHES_AHEAD = 2
_SHARE_IMAGES = 1024
_FORMAT = 1
"""Of what is kept; another one is another cache. To be raised when a change of views or backbones changes features."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Images:
    """Some images of a split."""

    split: Split
    ids: NDArray[np.int64]
    """[n] numbers in the split."""
    digest: str
    """Of the content of the split; what is kept of its images is known by it."""
    loader: Loader
    name: str
    """For messages: `train`, `test`, `queries`, ..."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class Features:
    """Features of those images that could be read."""

    images: Images
    rows: Tensor
    """[m, ...], fp32, on the CPU."""
    ids: NDArray[np.int64]
    """[m] numbers in the split, in the order of `images`."""
    left_out: Mapping[int, str]
    """The others, and why."""

    @property
    def labels(self) -> Tensor:
        """[m], places in the source's `classes`; of a split that has labels."""
        labels = self.images.split.labels
        assert labels is not None
        return torch.from_numpy(labels[self.ids])


class Share(NamedTuple):
    """Images that are computed in a row, by one process: places in `Images.ids`."""

    start: int
    stop: int
    batch_size: int


@torch.no_grad()
def extract_share(backbone: nn.Module, images: Images, view: View, share: Share, num_threads: int) -> Part:
    """Features of a share's readable images, in order; places of the others in it, and why.

    Features [0] if none can be read. The same in whatever process, to rounding.

    Args:
        num_threads: That read, decode and make views; more where a service has to answer.

    Raises:
        StorageError: As `load_image`.
    """
    parameter = next(backbone.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    rows: list[Tensor] = []
    bad: dict[int, str] = {}
    with evaluating(backbone):
        for batch in _batches(images, view, share, max(num_threads, images.split.reads_at_once), bad):
            rows.append(view.features(backbone, batch.to(device, non_blocking=True)).float().cpu())
    return torch.cat(rows) if rows else torch.zeros(0), bad


def _batches(images: Images, view: View, share: Share, num_threads: int, bad: dict[int, str]) -> Iterator[Tensor]:
    """The views of images in order, of one shape each batch. Threads make the next while the caller works with one."""

    def load(sample: int) -> Tensor | str:
        try:
            return view.make(images.loader.load(images.split, sample), sample)
        except BadImage as error:
            return str(error)

    waiting: deque[Future[Tensor | str]] = deque()
    batch: list[Tensor] = []
    samples = iter(images.ids[share.start : share.stop].tolist())
    pool = ThreadPoolExecutor(num_threads, "features")
    try:
        for place in range(share.stop - share.start):
            while len(waiting) < _BATCHES_AHEAD * share.batch_size and (sample := next(samples, None)) is not None:
                waiting.append(pool.submit(load, sample))
            found = waiting.popleft().result()
            if isinstance(found, str):
                bad[place] = found
                continue
            num_views = found.shape[0] if found.dim() == 4 else 1
            if batch and (batch[0].shape != found.shape or len(batch) * num_views >= share.batch_size):
                yield torch.stack(batch)
                batch = []
            batch.append(found)
        if batch:
            yield torch.stack(batch)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Extractor:
    """Takes features of one target, each once.

    Args:
        cache: Where they are kept; None keeps those of this command in memory.
        progress: Told how many images of how many are done, and what they are.
    """

    def __init__(
        self,
        target: Target,
        compute: Compute,
        *,
        batch_size: int,
        cache: FeatureCache | None = None,
        progress: Progress = lambda name, done, total: None,
    ) -> None:
        self._target, self._compute, self._batch_size = target, compute, batch_size
        self._cache, self._progress = cache, progress
        self._in_memory: dict[str, Features] = {}

    def extract(self, images: Images, view: View) -> Features:
        """Features of images, from memory or disk where they were taken before.

        Raises:
            RunFailed: No image can be read, features are not finite, or as `Compute.parts`.
        """
        key = _key(self._target, images, view)
        if key in self._in_memory:
            return self._in_memory[key]
        size = self._batch_size * max(1, _SHARE_IMAGES // self._batch_size)
        shares = [
            Share(start, min(start + size, len(images)), self._batch_size) for start in range(0, len(images), size)
        ]
        rows: Tensor | None = None
        reasons: dict[int, str] = {}
        num_rows, is_kept = 0, False
        for share, (some, bad), is_new in self._parts(key, images, view, shares):
            reasons |= {share.start + place: reason for place, reason in bad.items()}
            if len(some):
                if rows is None:
                    rows = torch.empty(len(images), *some.shape[1:])
                    is_kept = self._cache is not None and self._cache.make_room(key, rows.nbytes)
                rows[num_rows : num_rows + len(some)] = some
                num_rows += len(some)
            if is_new and is_kept and self._cache is not None:
                self._cache.write(key, share.start, (some, bad))
            self._progress(images.name, share.stop, len(images))
        found = self._checked(images, torch.zeros(0) if rows is None else rows[:num_rows], reasons)
        if not is_kept:
            self._in_memory[key] = found
        return found

    def _parts(
        self, key: str, images: Images, view: View, shares: Sequence[Share]
    ) -> Iterator[tuple[Share, Part, bool]]:
        """Each share with its features, and whether they are new; in order."""
        missing = {share for share in shares if self._cache is None or not self._cache.has(key, share.start)}
        new = self._compute.parts(self._target.backbone, images, view, (each for each in shares if each in missing))
        for share in shares:
            known = None if share in missing or self._cache is None else self._cache.read(key, share.start)
            if known is not None:
                yield share, known, False
            elif share in missing:
                yield share, next(new), True
            else:  # damaged
                (part,) = self._compute.parts(self._target.backbone, images, view, [share])
                yield share, part, True

    def _checked(self, images: Images, rows: Tensor, bad: dict[int, str]) -> Features:
        if len(bad) == len(images):
            raise RunFailed(f"no {images.name} image can be read: {next(iter(bad.values()), 'there is none')}")
        if not rows.isfinite().all():
            raise RunFailed(f"the features of {images.name} images are not finite")
        good = np.ones(len(images), dtype=bool)
        good[list(bad)] = False
        left_out = {int(images.ids[place]): reason for place, reason in bad.items()}
        return Features(images, rows, images.ids[good], left_out)


def _key(target: Target, images: Images, view: View) -> str:
    """Of what features depend on."""
    assert is_dataclass(view) and not isinstance(view, type)
    ids = hashlib.sha256(np.ascontiguousarray(images.ids)).hexdigest()
    kind = f"{type(view).__module__}.{type(view).__qualname__}"
    what: list[Any] = [_FORMAT, target.digest, images.digest, ids, kind, asdict(view)]
    what += [torch.__version__, timm.__version__]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
