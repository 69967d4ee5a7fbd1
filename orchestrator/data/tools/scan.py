"""Every image of a split once, in threads: what `data inspect` and `data convert` have in common."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.images import BadImage
from orchestrator.data.split import Split

T = TypeVar("T")

_CHUNK = 4  # images per task of a thread: few, for the results of all tasks under way are held in memory


def available_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def in_order(work: Callable[[int], T], numbers: Sequence[int], threads: int) -> Generator[T]:
    """`work(number)` for each of the numbers, made in threads, in the order of the numbers.

    Close the generator to stop. At most `threads` + 2 tasks of a few numbers are under way or wait to be taken, so that
    memory is bounded.
    """
    starts = iter(range(0, len(numbers), _CHUNK))
    waiting: deque[Future[list[T]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="images")

    stopped = threading.Event()

    def some(start: int) -> list[T]:
        return [work(int(number)) for number in numbers[start : start + _CHUNK] if not stopped.is_set()]

    try:
        while True:
            while len(waiting) < threads + 2 and (start := next(starts, None)) is not None:
                waiting.append(pool.submit(some, start))
            if not waiting:
                return
            yield from waiting.popleft().result()
    finally:
        stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)


def read_stored(split: Split, index: int) -> bytes | NDArray[np.uint8]:
    """An image as it is stored. Raises BadImage if it cannot be read."""
    try:
        return split.read(index)
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or error}") from error


def evenly_spread(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` of the numbers below `count`, ascending, the first included."""
    return np.arange(min(count, most), dtype=np.int64) * count // max(min(count, most), 1)


def printable(name: str) -> str:
    """A file name with whatever is no character of text (control codes, undecodable bytes) escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def show_number(number: float) -> str:
    """Whole from 100 on, else three digits."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def show_bytes(number: float) -> str:
    """Such as 12.3 MB."""
    power = min(int(math.log(number, 1000)), 4) if number >= 1 else 0
    return f"{show_number(number / 1000**power)} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
