"""The stream of batches of crops that one worker trains on, made in this process or by Ray Data tasks.

A batch is a function of its step and of the configuration, so both ways give the same bytes, and so does any number of
workers: each makes its own rows of every global batch. Ray Data is given nothing but the numbers of tasks (`tasks.py`);
each of them makes some rows of some consecutive batches, which come back in order.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_core.crops import NUM_GLOBAL_CROPS, MultiCrop
from orchestrator.data.images import BadImage, StorageError
from orchestrator.data.loaders import Loader
from orchestrator.data.plan import IndexPlan
from orchestrator.data.shelf import Shelf, prefer_this_machine
from orchestrator.data.sources import Split
from orchestrator.data.tasks import Cost, Limits, Part, Round, Share, Sizes, in_executions, plan_rounds, tasks_at_once

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
"""What `MultiCrop.make` returns, with `sample_id` int64 [B] (the samples whose crops these are) and `bad_id` int64 [B]
(-1, or the sample that should have stood there but could not be read)."""

MAX_BAD_IN_A_ROW = 100

_HEAD_SECONDS = 5.0  # work done in this process while the first data tasks start
_CHEAP_SHARE = 0.2  # of a step: up to here a batch is made in this process, for tasks and their servers cost as much
_MAX_WAIT_SHARE = 0.1  # of the time, for batches of this process
_LOOK_STEPS = 32  # the newest, over which the two are judged
_FEWEST_STEPS = 4  # before the first judgement, unless batches cost more than steps
_CLOSE_TIMEOUT_S = 30.0


class TooManyBadSamples(RuntimeError):
    """More unreadable images than the configuration tolerates."""


def make_batch(
    split: Split, loader: Loader, crops: MultiCrop, plan: IndexPlan, positions: NDArray[np.int64]
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
    order = np.argsort(wanted, kind="stable")  # neighbours on disk are read together
    read = partial(_readable, split, loader)
    mapped = _pool(split.reads_at_once).map if split.reads_at_once > 1 else map
    found = mapped(read, wanted[order].tolist())
    for row, (image, sample) in zip(order, found, strict=True):
        images[row], used[row] = image, sample
        if sample != wanted[row]:
            bad[row] = wanted[row]
    return {**crops.make(images, epochs, used), "sample_id": used, "bad_id": bad}


@lru_cache(maxsize=1)
def _pool(num_threads: int) -> ThreadPoolExecutor:
    """Threads of this process that wait for a storage service."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix="read")


def _readable(split: Split, loader: Loader, sample: int) -> tuple[NDArray[np.uint8], int]:
    for offset in range(MAX_BAD_IN_A_ROW):
        candidate = (sample + offset) % len(split)
        try:
            return loader.load(split, candidate), candidate
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
    loader: Loader
    start_step: int
    stop_step: int
    rank: int = 0
    world_size: int = 1

    @property
    def rows(self) -> int:
        """Images per batch of this worker."""
        return self.share.rows

    @property
    def image_bytes(self) -> int:
        """Of the crops of one image."""
        config = self.crops.config
        return 3 * (NUM_GLOBAL_CROPS * config.global_size**2 + config.num_local_crops * config.local_size**2)

    @property
    def share(self) -> Share:
        """The rows of every global batch that are this worker's."""
        return Share.of(self.plan, self.rank, self.world_size)

    def make(self, step: int) -> dict[str, np.ndarray]:
        """The batch of one step, as numpy arrays."""
        return self.make_part(Part(step, step + 1, 0, self.rows))

    def make_part(self, part: Part) -> dict[str, np.ndarray]:
        """Some rows of some consecutive batches, one step behind the other: many tiny crops at a time cost less."""
        rows = slice(part.first_row, part.last_row)
        positions = [
            self.plan.positions(step, self.rank, self.world_size)[rows] for step in range(part.start, part.stop)
        ]
        return make_batch(self.split, self.loader, self.crops, self.plan, np.concatenate(positions))


def local_batches(
    batches: Batches,
    *,
    num_threads: int = 1,
    prefetch: int = 2,
    make: Callable[[int], dict[str, np.ndarray]] | None = None,
) -> Generator[Batch]:
    """Make the batches in `num_threads` threads of this process; close the generator to stop them.

    Up to `prefetch` batches, and at least one for each thread, are in the making or ready while one is used. `make`
    stands for `batches.make`.
    """
    make = make or batches.make
    ahead = max(prefetch, num_threads)
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="crops")
    waiting: deque[Future[dict[str, np.ndarray]]] = deque()
    try:
        for step in range(batches.start_step, batches.stop_step):
            while len(waiting) <= ahead and step + len(waiting) < batches.stop_step:
                waiting.append(pool.submit(make, step + len(waiting)))
            yield as_tensors(waiting.popleft().result())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def ray_batches(
    batches: Batches, *, data_cpus: float = 2, prefetch: int = 2, shelf: Shelf | None = None
) -> Generator[Batch]:
    """Let Ray Data tasks make the batches; close the generator to shut the execution down.

    As long as a batch costs a small part of the step that uses it, a thread of this process makes it instead: tasks,
    their idle workers and Ray Data's actors would take more of the machine than they save. When tasks take over, the
    batches of their first seconds are made here too: training goes on while Ray Data starts, and the time of the first
    tells how many batches make a task worth while.

    Args:
        batches: What to make.
        data_cpus: CPUs that the data tasks of this worker may take at once, at least one.
        prefetch: Finished batches that wait in this process.
        shelf: Where this run takes what others with the same crops have made, and leaves what it made itself.
    """
    if shelf is None and batches.split.reads_at_once == 1 and _CHEAP_SHARE > 0:
        reached = yield from _while_cheap(batches)
        batches = replace(batches, start_step=reached)
    if batches.start_step >= batches.stop_step:
        return
    started = time.perf_counter()
    first = batches.make(batches.start_step)
    seconds = time.perf_counter() - started
    head_stop = min(batches.stop_step, batches.start_step + math.ceil(_HEAD_SECONDS / seconds))
    store_bytes = _store_share(data_cpus)
    sizes = Sizes(Cost(seconds, batches.rows * batches.image_bytes), Limits.of_store(store_bytes, data_cpus))
    if shelf is not None:
        sizes = shelf.agree(sizes)
    rounds = plan_rounds(batches.plan, head_stop, batches.stop_step, batches.share, sizes, aligned=shelf is not None)
    executions = in_executions(rounds)
    upcoming = next(executions, None)
    running: list[_Execution] = []

    def begin(rounds: Sequence[Round]) -> None:
        if shelf is None:
            stream = _ray_stream(batches, rounds, data_cpus, store_bytes)
        else:
            stream = _shelf_stream(batches, rounds, shelf)
        running.append(_Execution(stream, prefetch))

    try:
        if upcoming is not None:
            begin(upcoming)
        yield as_tensors(first)
        head = replace(batches, start_step=batches.start_step + 1, stop_step=head_stop)
        yield from local_batches(head)
        while upcoming is not None:
            now, upcoming = upcoming, next(executions, None)
            late = now[(len(now) - 1) * 3 // 4].start  # time to begin the next, lest the flow stop between the two
            for step, batch in enumerate(running[0], start=now[0].start):
                yield batch
                if step >= late and len(running) == 1 and upcoming is not None:
                    begin(upcoming)
            del running[0]
    finally:
        for execution in running:
            execution.close()


def _while_cheap(batches: Batches) -> Generator[Batch, None, int]:
    """Batches of a thread of this process as long as it keeps up at little cost; returns the step that comes next."""
    costs, waits, uses = (deque[float](maxlen=_LOOK_STEPS) for _ in range(3))  # seconds of a batch each

    def timed(step: int) -> dict[str, np.ndarray]:
        began = time.thread_time()
        made = batches.make(step)
        costs.append(time.thread_time() - began)
        return made

    with closing(local_batches(batches, make=timed)) as running:
        for step in range(batches.start_step, batches.stop_step):
            asked = time.perf_counter()
            batch = next(running)
            got = time.perf_counter()
            yield batch
            if step == batches.start_step:  # nothing was ready, and what is done for the first time takes longer
                costs.clear()
                continue
            waits.append(got - asked)
            uses.append(time.perf_counter() - got)
            cost, use = median(list(costs) or [0.0]), median(uses)  # whatever an evaluation takes
            share = cost / max(use, 1e-9)
            waited = sum(waits) > _MAX_WAIT_SHARE * (sum(waits) + use * len(uses))
            if share > 1 or (len(uses) >= _FEWEST_STEPS and (share > _CHEAP_SHARE or waited)):
                logger.info(
                    "step %d: a batch costs %.0f %% of a step; data tasks make them from here", step, 100 * share
                )
                return step + 1
    return batches.stop_step


def as_tensors(arrays: dict[str, np.ndarray]) -> Batch:
    """Without a copy, except of what lies read-only in Ray's object store."""
    return {name: torch.from_numpy(np.require(array, requirements=("C", "W"))) for name, array in arrays.items()}


def assemble(parts: Iterator[dict[str, np.ndarray]], rounds: Iterable[Round]) -> Iterator[Batch]:
    """The batches of `rounds` from what their parts made, in order."""
    for this in rounds:
        made = [next(parts) for _ in this.parts]
        for place in range(this.stop - this.start):
            rows = [
                {name: array[place * part.rows : (place + 1) * part.rows] for name, array in arrays.items()}
                for part, arrays in zip(this.parts, made, strict=True)
            ]
            if len(rows) == 1:
                yield as_tensors(rows[0])
            else:
                yield as_tensors({name: np.concatenate([some[name] for some in rows]) for name in rows[0]})


def _ray_stream(batches: Batches, rounds: Sequence[Round], cpus: float, store_bytes: float) -> Generator[Batch]:
    """One Ray Data execution over the parts of `rounds`; it starts with the first `next`."""
    import ray
    from ray.exceptions import RayTaskError

    parts = [part for this in rounds for part in this.parts]
    # A block is one number and no batch size is given, so that each becomes a task.
    numbers = ray.data.from_items([{"part": part} for part in range(len(parts))], override_num_blocks=len(parts))
    dataset = numbers.map_batches(
        _part_maker(batches, parts),
        batch_size=None,
        batch_format="numpy",
        num_cpus=_cpus_of_task(cpus),
        **prefer_this_machine(),
    )
    # The dataset's own settings: nothing leaks into those of the process.
    context = dataset.context
    context.execution_options.preserve_order = True
    # Half of the store's share: near its end an execution overlaps with the next.
    limits = ray.data.ExecutionResources.for_limits(cpu=cpus, object_store_memory=store_bytes / 2)
    context.execution_options.resource_limits = limits
    context.target_max_block_size = None  # a part stays whole
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # a long evaluation stops the flow, and may
    context.raise_original_map_exception = True
    try:
        made = iter(dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1))
        yield from assemble(made, rounds)
    except RayTaskError as error:
        if isinstance(error.cause, TooManyBadSamples | StorageError):
            raise error.cause from None
        raise


def _shelf_stream(batches: Batches, rounds: Sequence[Round], shelf: Shelf) -> Generator[Batch]:
    """The same from the shelf."""
    from ray.exceptions import RayTaskError

    parts = [part for this in rounds for part in this.parts]
    try:
        yield from assemble(shelf.take(batches, parts), rounds)
    except RayTaskError as error:
        if isinstance(error.cause, TooManyBadSamples | StorageError):
            raise error.cause from None
        raise


def _store_share(data_cpus: float) -> float:
    """Bytes of this machine's object store for a worker with that many of its CPUs."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    (resources,) = (node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    share: float = resources["object_store_memory"] * min(1, data_cpus / max(1, resources.get("CPU", 0)))
    return share


def _cpus_of_task(cpus: float) -> float:
    """What a task reserves, so that one more of them than there are CPUs is under way.

    Ray Data looks for finished tasks every 0.1 s. Until it starts the next, the one more has the CPU.
    """
    return math.floor(1e4 * cpus / tasks_at_once(cpus)) / 1e4  # Ray counts in 1/10,000 of a CPU


def _part_maker(batches: Batches, parts: Sequence[Part]) -> Callable[[dict[str, Any]], dict[str, np.ndarray]]:
    def make(block: dict[str, Any]) -> dict[str, np.ndarray]:
        torch.set_num_threads(1)
        (index,) = block["part"]
        return batches.make_part(parts[index])

    return make


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
