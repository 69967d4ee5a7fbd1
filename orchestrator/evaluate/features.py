"""Features of images, taken once for each view: in shares, which are kept on disk, here or as Ray tasks."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dino_core.eval.features import evaluating
from orchestrator.data.images import BadImage
from orchestrator.data.loaders import Loader
from orchestrator.data.split import Split
from orchestrator.errors import RunFailed
from orchestrator.evaluate.targets import Target
from orchestrator.evaluate.views import View

logger = logging.getLogger(__name__)

_BATCHES_AHEAD = 2


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
    """[m] numbers in the split, ascending as in `images`."""

    @property
    def num_unreadable(self) -> int:
        return len(self.images) - len(self.ids)

    @property
    def labels(self) -> Tensor:
        """[m], places in the source's `classes`; of a split that has labels."""
        labels = self.images.split.labels
        assert labels is not None
        return torch.from_numpy(labels[self.ids])


@dataclass(frozen=True, eq=False)
class Share:
    """What is computed in a row, by one process."""

    images: Images
    view: View
    batch_size: int
    num_threads: int


@torch.no_grad()
def extract_share(backbone: nn.Module, share: Share) -> tuple[Tensor, dict[int, str]]:
    """Features of a share's readable images, in order; places of the others in the share, and why.

    Empty features [0] if none can be read.
    """
    parameter = next(backbone.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    rows: list[Tensor] = []
    bad: dict[int, str] = {}
    with evaluating(backbone):
        for batch in _batches(share, bad):
            rows.append(share.view.features(backbone, batch.to(device, non_blocking=True)).float().cpu())
    return torch.cat(rows) if rows else torch.zeros(0), bad


def _batches(share: Share, bad: dict[int, str]) -> Iterator[Tensor]:
    """The views of images in order, of one shape each batch. Threads make the next while the caller works with one."""
    images, view = share.images, share.view

    def load(sample: int) -> Tensor | str:
        try:
            return view.make(images.loader.load(images.split, sample), sample)
        except BadImage as error:
            return str(error)

    waiting: deque[Future[Tensor | str]] = deque()
    batch: list[Tensor] = []
    samples = iter(images.ids.tolist())
    pool = ThreadPoolExecutor(share.num_threads, "features")
    try:
        for place in range(len(images)):
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
    """Takes features of one target.

    Args:
        num_threads: That read and decode images.
    """

    def __init__(self, target: Target, *, batch_size: int, num_threads: int) -> None:
        self._target, self._batch_size, self._num_threads = target, batch_size, num_threads
        self._known: dict[str, Features] = {}
        self._unreadable: set[tuple[str, int]] = set()

    def extract(self, images: Images, view: View) -> Features:
        """Raises:
        RunFailed: No image can be read, or features are not finite.
        """
        key = _key(self._target, images, view)
        if key not in self._known:
            threads = max(self._num_threads, images.split.reads_at_once)
            rows, bad = extract_share(self._target.backbone, Share(images, view, self._batch_size, threads))
            self._known[key] = self._checked(images, rows, bad)
        return self._known[key]

    @property
    def num_unreadable(self) -> int:
        """Images of all splits that were left out, each once."""
        return len(self._unreadable)

    def _checked(self, images: Images, rows: Tensor, bad: dict[int, str]) -> Features:
        for place, reason in bad.items():
            sample = int(images.ids[place])
            if (images.digest, sample) not in self._unreadable:
                logger.warning("evaluation leaves out %s: %s", images.split.name(sample), reason)
            self._unreadable.add((images.digest, sample))
        if len(bad) == len(images):
            raise RunFailed(f"no {images.name} image can be read: {next(iter(bad.values()), 'there is none')}")
        if not rows.isfinite().all():
            raise RunFailed(f"the features of {images.name} images are not finite")
        good = np.ones(len(images), dtype=bool)
        good[list(bad)] = False
        return Features(images, rows, images.ids[good])


def _key(target: Target, images: Images, view: View) -> str:
    """Of what features depend on."""
    assert is_dataclass(view) and not isinstance(view, type)
    ids = hashlib.sha256(np.ascontiguousarray(images.ids)).hexdigest()
    kind = f"{type(view).__module__}.{type(view).__qualname__}"
    what: list[Any] = [target.digest, images.digest, ids, kind, asdict(view), torch.__version__]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
