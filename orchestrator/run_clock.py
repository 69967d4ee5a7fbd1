"""What a run has spent, over all its attempts: device hours, and the seconds that did not go into training steps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

from orchestrator.records import METRICS_FILE, read_lines

DEVICE_HOURS = "cost/device_hours"
"""Wall hours times GPUs or, without GPUs, times the CPU cores of the training processes."""

Part = Literal["start", "data_wait", "evaluation", "checkpoint", "report"]
PARTS: tuple[Part, ...] = ("start", "data_wait", "evaluation", "checkpoint", "report")

_T = TypeVar("_T")


class RunClock:
    """Of one attempt; goes on from what the journal says of those before it.

    Args:
        run_dir: Whose journal is read; None starts from nothing, for workers that keep no record.
        num_devices: GPUs of the run, or CPU cores of its training processes.
        began: `time.perf_counter()` when the attempt began.
    """

    def __init__(self, run_dir: Path | None, num_devices: int, began: float) -> None:
        self._num_devices = num_devices
        self._began = began
        self._spent: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        self._hours_before = 0.0
        if run_dir is not None:
            self._hours_before = hours_spent(run_dir, num_devices)
            for _, record in read_lines(run_dir / METRICS_FILE):
                for part in PARTS:
                    self._spent[part] = record["metrics"].get(f"time/{part}_s", self._spent[part])

    def device_hours(self) -> dict[str, float]:
        """`DEVICE_HOURS` so far."""
        hours = (time.perf_counter() - self._began) / 3600
        return {DEVICE_HOURS: self._hours_before + hours * self._num_devices}

    def parts(self) -> dict[str, float]:
        """Seconds so far: `time/start_s` (imports, data, network), `time/data_wait_s`, `time/evaluation_s`,
        `time/checkpoint_s`, `time/report_s` (waiting for Tune or the other workers). And `time/evaluation_share`, that
        of evaluations in the whole time of the run, 0 to 1."""
        parts = {f"time/{part}_s": seconds for part, seconds in self._spent.items()}
        seconds = self.device_hours()[DEVICE_HOURS] * 3600 / self._num_devices
        return parts | {"time/evaluation_share": self._spent["evaluation"] / seconds if seconds > 0 else 0.0}

    def started(self) -> None:
        """Training can begin."""
        self._spent["start"] += time.perf_counter() - self._began

    @contextmanager
    def during(self, part: Part) -> Iterator[None]:
        """Counts the time of a block."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent[part] += time.perf_counter() - began

    def waiting_for(self, batches: Iterable[_T]) -> Iterator[_T]:
        """The same batches; counts how long each took to come."""
        iterator = iter(batches)
        while True:
            with self.during("data_wait"):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch


class EvaluationBudget:
    """Holds the evaluations between the first and the last to a share of the time between those two.

    Args:
        max_share: None holds back none.
    """

    def __init__(self, max_share: float | None) -> None:
        self._max_share = max_share
        self._began = time.perf_counter()
        self._spent = self._last = 0.0
        self.num_left_out = 0

    @contextmanager
    def first(self) -> Iterator[None]:
        """Around the evaluation before the first step: what it takes is no part of either, but says what is to come."""
        began = time.perf_counter()
        yield
        self._began = time.perf_counter()
        self._last = self._began - began

    @contextmanager
    def another(self) -> Iterator[None]:
        """Around an evaluation in between."""
        began = time.perf_counter()
        yield
        self._last = time.perf_counter() - began
        self._spent += self._last

    def allows(self) -> bool:
        """Whether one more, as long as the last one, keeps to the share; if not, it is counted as left out."""
        if self._max_share is None:
            return True
        elapsed = time.perf_counter() - self._began
        if self._spent + self._last <= self._max_share * (elapsed + self._last):
            return True
        self.num_left_out += 1
        return False


def hours_spent(run_dir: Path, num_devices: int) -> float:
    """Device hours that a run's earlier attempts are known to have taken.

    The last value of the journal, and the time between later records that have none: a restarted run writes the steps
    that it repeats without metrics. What an attempt took before its first such record or after its last is not known.
    """
    hours, last = 0.0, None
    for _, record in read_lines(run_dir / METRICS_FILE):
        if DEVICE_HOURS in record["metrics"]:
            hours = record["metrics"][DEVICE_HOURS]
        elif last is not None and record["step"] > last["step"]:
            hours += (record["time"] - last["time"]) * num_devices / 3600
        last = record
    return hours
