"""The unreadable images of a run: each listed once, counted over all workers, and too many of them its end."""

from __future__ import annotations

import logging
import math
from contextlib import closing
from pathlib import Path

import torch.distributed as dist

from dino_core.distributed import has_process_group, rank
from orchestrator.config import DataConfig
from orchestrator.data.images import BadImage, load_image
from orchestrator.data.split import Split
from orchestrator.data.stream import Batch, TooManyBadSamples
from orchestrator.records import BAD_SAMPLES_FILE, AppendOnly, read_lines

logger = logging.getLogger(__name__)

_ROUNDING = 1e-6  # 0.29 of 100 images are 29, not the 28.999... of floating point


class BadSampleLog:
    """What the workers of a run have found unreadable.

    Args:
        run_dir: Has `bad_samples.jsonl`, which rank 0 writes: sample id, name and reason of each.
        split: What is trained on.
        config: Says how many are too many.
    """

    def __init__(self, run_dir: Path, split: Split, config: DataConfig) -> None:
        self._path = run_dir / BAD_SAMPLES_FILE
        self._split, self._config = split, config
        self._reasons: dict[int, str] = {r["sample"]: r["reason"] for _, r in read_lines(self._path)}
        self._new: dict[int, str] = {}
        if has_process_group():  # machines may see a shared file at different lengths
            known = [self._reasons]
            dist.broadcast_object_list(known)
            self._reasons = known[0]

    def note(self, batch: Batch) -> Batch:
        """Take note of a batch's `bad_id` [B] and hand the batch on. Reads the sample again for the reason.

        Raises:
            StorageError, MemoryError: Now it cannot be read for a reason that is not its own.
        """
        bad_ids = batch["bad_id"]
        for sample in sorted(set(bad_ids[bad_ids >= 0].tolist()) - self._reasons.keys() - self._new.keys()):
            try:
                load_image(self._split, sample, self._config.max_pixels)
                self._new[sample] = "was unreadable, but is readable now"
            except BadImage as error:
                self._new[sample] = str(error)
        return batch

    def check(self) -> int:
        """How many distinct images all workers have found unreadable. Every rank calls it at the same step.

        Rank 0 lists and logs each when it is first known, once over all ranks, restarts and resumed runs.

        Raises:
            TooManyBadSamples: More than `data.max_bad_fraction` of the split; every rank raises it.
        """
        found = [self._new]
        if has_process_group():
            found = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(found, self._new)
        new = {s: why for part in found for s, why in sorted(part.items()) if s not in self._reasons}
        self._reasons |= new
        self._new = {}
        if new and rank() == 0:
            with closing(AppendOnly(self._path)) as file:
                for sample, reason in new.items():
                    name = self._split.name(sample)
                    file.append({"sample": sample, "name": name, "reason": reason})
                    logger.warning("sample %d, %s, is unreadable and replaced by another: %s", sample, name, reason)
        allowed = math.floor(self._config.max_bad_fraction * len(self._split) + _ROUNDING)
        if len(self._reasons) > allowed:
            first = "; ".join(f"{self._split.name(s)}: {why}" for s, why in list(self._reasons.items())[:3])
            raise TooManyBadSamples(
                f"{len(self._reasons)} of {len(self._split)} images are unreadable, more than the {allowed} that "
                f"data.max_bad_fraction = {self._config.max_bad_fraction:g} allows. The first: {first}"
            )
        return len(self._reasons)
