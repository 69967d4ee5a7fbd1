"""The stream of batches of crops that one worker trains on, made in this process or by Ray Data tasks.

A batch is a function of its step and of the configuration, so both ways give the same bytes, and so does any number of
workers: each makes its own rows of every global batch. Ray Data is given nothing but the numbers of blocks; a data task
turns one of them into some consecutive batches, which come back in order.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_core.crops import MultiCrop
from orchestrator.data.images import BadImage, load_image
from orchestrator.data.plan import IndexPlan
from orchestrator.data.sources import Split

Batch = dict[str, Tensor]
"""What `MultiCrop.make` returns, with `sample_id` int64 [B] (the samples whose crops these are) and `bad_id` int64 [B]
(-1, or the sample that should have stood there but could not be read)."""

MAX_BAD_IN_A_ROW = 100

_HEAD_SECONDS = 5.0  # work done in this process while the first data tasks start
_TASK_SECONDS = 1.0  # work that makes up for the price of a Ray task
_MAX_BLOCK_BYTES = 64 << 20
_MAX_BLOCK_BATCHES = 64
_BLOCKS_PER_EXECUTION = 512  # Ray Data plans every block before the first task, so a long run is several executions
_CLOSE_TIMEOUT_S = 30.0


class TooManyBadSamples(RuntimeError):
    """More unreadable images than the configuration tolerates."""


def make_batch(
    split: Split, crops: MultiCrop, plan: IndexPlan, positions: NDArray[np.int64], max_pixels: int
) -> dict[str, np.ndarray]:
    """The crops of the samples at `positions` [B] of the plan, as numpy arrays.

    In the place of an unreadable sample stands the next readable one by id, with the crops that it has itself in that
    epoch; so what a position holds does not depend on the batch around it.

    Raises:
        TooManyBadSamples: `MAX_BAD_IN_A_ROW` samples of consecutive ids are unreadable.
    """
    epochs, wanted = plan.locate(positions)
    used, bad = wanted.copy(), np.full_like(wanted, -1)
    images: list[Any] = [None] * len(wanted)
    for row in np.argsort(wanted, kind="stable"):  # neighbours on disk are read together
        images[row], used[row] = _readable(split, int(wanted[row]), max_pixels)
        if used[row] != wanted[row]:
            bad[row] = wanted[row]
    return {**crops.make(images, epochs, used), "sample_id": used, "bad_id": bad}


def _readable(split: Split, sample: int, max_pixels: int) -> tuple[NDArray[np.uint8], int]:
    for offset in range(MAX_BAD_IN_A_ROW):
        candidate = (sample + offset) % len(split)
        try:
            return load_image(split, candidate, max_pixels), candidate
        except BadImage as error:
            reason = str(error)
    raise TooManyBadSamples(
        f"data.source: {MAX_BAD_IN_A_ROW} images in a row from {split.name(sample)} on are unreadable, "
        f"the last, {split.name(candidate)}, because: {reason}"
    )


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The batches of one worker from `start_step` up to, not including, `stop_step`."""

    split: Split
    crops: MultiCrop
    plan: IndexPlan
    max_pixels: int
    start_step: int
    stop_step: int
    rank: int = 0
    world_size: int = 1

    @property
    def rows(self) -> int:
        """Images per batch of this worker."""
        return len(self.plan.positions(0, self.rank, self.world_size))

    def make(self, step: int) -> dict[str, np.ndarray]:
        """The batch of one step, as numpy arrays."""
        return self.make_range(step, step + 1)

    def make_range(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """The batches of some consecutive steps, one behind the other: many tiny crops at a time cost less."""
        positions = [self.plan.positions(step, self.rank, self.world_size) for step in range(start, stop)]
        return make_batch(self.split, self.crops, self.plan, np.concatenate(positions), self.max_pixels)


def local_batches(batches: Batches, *, num_threads: int = 1, prefetch: int = 2) -> Generator[Batch]:
    """Make the batches in `num_threads` threads of this process; close the generator to stop them.

    Up to `prefetch` batches, and at least one for each thread, are in the making or ready while one is used.
    """
    ahead = max(prefetch, num_threads)
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="crops")
    waiting: deque[Future[dict[str, np.ndarray]]] = deque()
    try:
        for step in range(batches.start_step, batches.stop_step):
            while len(waiting) <= ahead and step + len(waiting) < batches.stop_step:
                waiting.append(pool.submit(batches.make, step + len(waiting)))
            yield _tensors(waiting.popleft().result())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def ray_batches(batches: Batches, *, data_cpus: float = 2, prefetch: int = 2) -> Generator[Batch]:
    """Let Ray Data tasks make the batches; close the generator to shut the execution down.

    The batches of the first seconds are made in this process: training can start while Ray Data does, and the time of
    the first tells how many batches make a task worth while.

    Args:
        batches: What to make.
        data_cpus: CPUs that the data tasks of this worker may take at once, at least one.
        prefetch: Finished batches that wait in this process.
    """
    if batches.start_step >= batches.stop_step:
        return
    started = time.perf_counter()
    first = batches.make(batches.start_step)
    seconds = time.perf_counter() - started
    head_stop = min(batches.stop_step, batches.start_step + math.ceil(_HEAD_SECONDS / seconds))
    parts = _execution_parts(_block_bounds(head_stop, batches.stop_step, _batches_per_block(first, seconds)))
    running: list[_Execution] = []
    try:
        if parts:
            running.append(_Execution(_ray_stream(batches, parts[0], data_cpus), prefetch))
        yield _tensors(first)
        head = replace(batches, start_step=batches.start_step + 1, stop_step=head_stop)
        yield from local_batches(head)
        for number, part in enumerate(parts):
            execution = running[-1]
            late = part[(len(part) - 1) * 3 // 4]  # time to start the next, lest the flow stop between the two
            for step, batch in enumerate(execution, start=int(part[0])):
                yield batch
                if step >= late and running[-1] is execution and number + 1 < len(parts):
                    running.append(_Execution(_ray_stream(batches, parts[number + 1], data_cpus), prefetch))
            running.remove(execution)
    finally:
        for execution in running:
            execution.close()


def _tensors(arrays: dict[str, np.ndarray]) -> Batch:
    """Without a copy, except of what lies read-only in Ray's object store."""
    return {name: torch.from_numpy(np.require(array, requirements=("C", "W"))) for name, array in arrays.items()}


def _batches_per_block(batch: dict[str, np.ndarray], seconds: float) -> int:
    size = sum(array.nbytes for array in batch.values())
    return max(1, min(math.ceil(_TASK_SECONDS / seconds), _MAX_BLOCK_BYTES // size, _MAX_BLOCK_BATCHES))


def _block_bounds(start: int, stop: int, per_block: int) -> NDArray[np.int64]:
    """Steps at which blocks begin, and `stop`. The first blocks are short: someone is waiting for them."""
    bounds, size = [start], 1
    while bounds[-1] < stop:
        bounds.append(min(bounds[-1] + size, stop))
        size = min(2 * size, per_block)
    return np.array(bounds, dtype=np.int64)


def _execution_parts(bounds: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The bounds of the blocks of each execution: each but the first starts with the last bound of the one before."""
    starts = range(0, len(bounds) - 1, _BLOCKS_PER_EXECUTION)
    return [bounds[start : start + _BLOCKS_PER_EXECUTION + 1] for start in starts]


def _ray_stream(batches: Batches, bounds: NDArray[np.int64], cpus: float) -> Generator[Batch]:
    """One Ray Data execution over the blocks between `bounds`; it starts with the first `next`."""
    import ray
    from ray.exceptions import RayTaskError

    num_blocks = len(bounds) - 1
    dataset = ray.data.range(num_blocks, override_num_blocks=num_blocks)
    # A block is one row, and no batch size is given, so that reading it and making its batches are one task.
    dataset = dataset.map_batches(_block_maker(batches, bounds), batch_size=None, batch_format="numpy")
    # The dataset's own settings: nothing leaks into those of the process.
    context = dataset.context
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(cpu=cpus)
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # a long evaluation stops the flow, and may
    context.raise_original_map_exception = True
    try:
        for arrays in dataset.iter_batches(batch_size=batches.rows, batch_format="numpy", prefetch_batches=1):
            yield _tensors(arrays)
    except RayTaskError as error:
        if isinstance(error.cause, TooManyBadSamples):
            raise error.cause from None
        raise


def _block_maker(batches: Batches, bounds: NDArray[np.int64]) -> Callable[[dict[str, Any]], dict[str, np.ndarray]]:
    def make_block(block: dict[str, Any]) -> dict[str, np.ndarray]:
        torch.set_num_threads(1)
        (index,) = block["id"]
        return batches.make_range(int(bounds[index]), int(bounds[index + 1]))

    return make_block


class _Execution:
    """Pulls a stream in a thread of its own, so that it starts at once and stays a few batches ahead."""

    def __init__(self, stream: Generator[Batch], prefetch: int) -> None:
        self._stream = stream
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(prefetch)
        self._closed = threading.Event()
        # A daemon, for Ray may keep it waiting for ever when the cluster is gone.
        self._thread = threading.Thread(target=self._pull, name="batches", daemon=True)
        self._thread.start()

    def _pull(self) -> None:
        end: BaseException | None = None
        try:
            for batch in self._stream:
                self._put(batch)
                if self._closed.is_set():
                    break
        except BaseException as error:  # noqa: BLE001 - it is raised in the consumer's thread
            end = error
        finally:
            self._stream.close()
        self._put(end)

    def _put(self, item: Batch | BaseException | None) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def __iter__(self) -> Iterator[Batch]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stop pulling and shut the stream down."""
        self._closed.set()
        self._thread.join(_CLOSE_TIMEOUT_S)
