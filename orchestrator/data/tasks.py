"""How the batches of a worker are cut into tasks: a task makes some rows of some consecutive batches.

Where any image may follow any other, a task makes whole batches, or some rows of a large one, about a second of work.
In the windowed order a round of tasks makes the batches of one window together, each of them the rows of some lanes: so
each unit of storage is read by one task, once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from orchestrator.data.plan import IndexPlan

_TASK_SECONDS = 1.0  # work that makes up for the price of a Ray task
_MAX_TASK_BYTES = 64 << 20
_MAX_TASK_STEPS = 64
_MAX_ROUND_BYTES = 1 << 30
_TASKS_PER_EXECUTION = 512  # Ray Data plans every task before the first, so a long run is several executions


def tasks_at_once(data_cpus: float) -> int:
    """How many tasks of a worker are under way: one more than it has CPUs for them."""
    return math.ceil(data_cpus) + 1


class Part(NamedTuple):
    """What one task makes."""

    start: int
    """First step."""
    stop: int
    """Behind the last step."""
    first_row: int
    """Of this worker's rows of each batch."""
    last_row: int
    """Behind the last."""

    @property
    def rows(self) -> int:
        """Of each batch."""
        return self.last_row - self.first_row


class Round(NamedTuple):
    """Tasks that make the batches from step `start` up to `stop` together, their rows one behind the other."""

    start: int
    stop: int
    parts: tuple[Part, ...]


class Cost(NamedTuple):
    """What one batch of a worker costs."""

    seconds: float
    """On one core."""
    num_bytes: int
    """Its crops."""


class Limits(NamedTuple):
    """How much may wait in the object store, which spills to disk when it is full."""

    task_bytes: int = _MAX_TASK_BYTES
    """Crops of one task; those of several are ready or in the making at a time."""
    round_bytes: int = _MAX_ROUND_BYTES
    """Crops of a window that wait for the slowest of its tasks."""

    @classmethod
    def of_store(cls, num_bytes: float, data_cpus: float) -> Limits:
        """For a worker that may use `num_bytes` of the store and `data_cpus` tasks at once."""
        # In the making, ready and in use: each task has room for its output twice, as Ray Data copies it.
        at_once = 2 * (tasks_at_once(data_cpus) + 2)
        return cls(min(_MAX_TASK_BYTES, int(num_bytes / at_once)), min(_MAX_ROUND_BYTES, int(num_bytes / 4)))


class Share(NamedTuple):
    """A worker's rows of every global batch."""

    rows: int
    """How many."""
    cuts: tuple[int, ...]
    """Rows, from 0 to `rows`, between which one lane (of the windowed order) has them."""

    @classmethod
    def of(cls, plan: IndexPlan, rank: int, world_size: int) -> Share:
        """Raises ValueError if there is no such share."""
        positions = plan.positions(0, rank, world_size)
        first, rows = int(positions[0]), len(positions)
        bounds = (plan.batch_size * lane // plan.lanes - first for lane in range(plan.lanes))
        return cls(rows, (0, *(bound for bound in bounds if 0 < bound < rows), rows))


class Sizes(NamedTuple):
    """What decides how large tasks are."""

    cost: Cost
    limits: Limits

    @property
    def max_steps(self) -> int:
        """Batches that are worth a task and fit into one."""
        cost, limits = self
        return max(
            1, min(math.ceil(_TASK_SECONDS / cost.seconds), limits.task_bytes // cost.num_bytes, _MAX_TASK_STEPS)
        )

    def num_tasks(self, steps: int, most: int) -> int:
        """Tasks, at least one and at `most` so many, that make so many batches together."""
        seconds, num_bytes = (steps * each for each in self.cost)
        return max(1, min(most, math.ceil(max(seconds / _TASK_SECONDS, num_bytes / self.limits.task_bytes))))


def plan_rounds(
    plan: IndexPlan, start: int, stop: int, share: Share, sizes: Sizes, *, aligned: bool = False
) -> Iterator[Round]:
    """The rounds that make the steps from `start` up to `stop` of one worker, in order.

    Args:
        plan: The order of the run.
        start, stop: Steps.
        share: The worker's rows.
        sizes: Of the tasks.
        aligned: Cut where others with the same `sizes` do, wherever they started. Else the first tasks are short, for
            someone is waiting for them. The windowed order is aligned either way.
    """
    size = 1
    while start < stop:
        if plan.window_steps is not None:
            first = start - start % plan.window_steps
            this = _in_window(first, first + plan.window_steps, start, share, sizes)
            this = this._replace(stop=min(this.stop, stop), parts=tuple(_until(part, stop) for part in this.parts))
        else:
            end = (start // sizes.max_steps + 1) * sizes.max_steps if aligned else start + size
            size = min(2 * size, sizes.max_steps)
            end = min(end, stop)
            # A batch that is too much for one task is cut into rows.
            tasks = sizes.num_tasks(1, share.rows) if sizes.max_steps == 1 else 1
            this = _round(start, end, [share.rows * task // tasks for task in range(tasks + 1)])
        yield this
        start = this.stop


def _in_window(first: int, last: int, start: int, share: Share, sizes: Sizes) -> Round:
    """The round from `start` on in the window of the steps from `first` up to `last`.

    A window is one round, or several, which read the same units again, if its crops would take too much memory.
    """
    steps = max(1, min(last - first, sizes.limits.round_bytes // sizes.cost.num_bytes))
    stop = min(first + ((start - first) // steps + 1) * steps, last)
    lanes = len(share.cuts) - 1
    tasks = sizes.num_tasks(steps, lanes)
    return _round(start, stop, [share.cuts[lanes * task // tasks] for task in range(tasks + 1)])


def _round(start: int, stop: int, cuts: Sequence[int]) -> Round:
    return Round(start, stop, tuple(Part(start, stop, first, last) for first, last in pairwise(cuts)))


def _until(part: Part, stop: int) -> Part:
    return part._replace(stop=min(part.stop, stop))


def in_executions(rounds: Iterator[Round]) -> Iterator[Sequence[Round]]:
    """Consecutive rounds with as many tasks together as one execution takes."""
    some: list[Round] = []
    tasks = 0
    for this in rounds:
        if some and tasks + len(this.parts) > _TASKS_PER_EXECUTION:
            yield some
            some, tasks = [], 0
        some.append(this)
        tasks += len(this.parts)
    if some:
        yield some
