"""One data pass for several trials: crops that one of them needs are made once and lent to all.

A part of a stream is a function of the configuration and the step, so it does not matter which trial asks first. An
actor of the sweep has each part made when it is first asked for, by a task of one CPU, and keeps the newest. Nothing
waits for anybody: a trial that runs ahead has its parts made, and one that falls behind what is kept has them made
again. Trials of different crops, seeds or batch sizes share nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from orchestrator.config import RunConfig
from orchestrator.overrides import flatten

if TYPE_CHECKING:
    import numpy as np

    from orchestrator.data.stream import Batches
    from orchestrator.data.tasks import Part, Sizes

_ACTOR = "shared-crops"
_STORE_SHARE = 0.25  # of one machine's object store for parts that nobody may want any more
_MAX_STREAMS = 32  # whose batches, small next to their crops, are kept
_SAME_CROPS = frozenset(
    (
        *("data.label_column", "data.test_split", "data.max_bad_fraction", "data.download"),
        *("pretrain.crops.mean", "pretrain.crops.std"),
    )
)


def stream_key(config: RunConfig) -> str:
    """Equal for runs that see the same crops in the same order, dealt to as many workers."""
    values = flatten(config)
    chosen = {
        name: value
        for name, value in values.items()
        if name.startswith(("data.", "pretrain.crops.")) and name not in _SAME_CROPS
    }
    chosen |= {name: values[name] for name in ("pretrain.seed", "pretrain.batch_size", "cluster.num_workers")}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def num_streams(trials: Iterable[RunConfig]) -> int:
    """How many different streams the trials of a sweep have."""
    return len(set(map(stream_key, trials)))


class Traffic(NamedTuple):
    """What went over a shelf."""

    made: int
    """Parts."""
    taken: int
    """Parts, each time that one was taken."""


class _Keeper:
    """The actor. Knows parts by name only, and never holds their crops in its own memory."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._parts: OrderedDict[tuple[Any, ...], tuple[Any, int]] = OrderedDict()
        self._batches: OrderedDict[str, Any] = OrderedDict()
        self._sizes: dict[str, Sizes] = {}
        self._made = self._taken = 0

    def agree(self, key: str, sizes: Sizes) -> Sizes:
        """The sizes of the tasks of a stream: what the first to ask proposes."""
        return self._sizes.setdefault(key, sizes)

    def part(self, key: str, part: Part, num_bytes: int, batches: list[Any], options: dict[str, Any]) -> list[Any]:
        """The reference of a part, ready or in the making; in a list, lest Ray wait for it."""
        import ray

        name = (key, *part)
        if name not in self._parts:
            if key not in self._batches:  # a copy of the actor's own, for the trial that sent it may end
                self._batches[key] = ray.remote(_same).options(num_cpus=0, **options).remote(*batches)
                if len(self._batches) > _MAX_STREAMS:
                    self._batches.popitem(last=False)
            made = ray.remote(_make).options(num_cpus=1, **options).remote(self._batches[key], part)
            self._parts[name] = (made, num_bytes)
            self._made += 1
            self._bytes += num_bytes
            while self._bytes > self._max_bytes and len(self._parts) > 1:
                self._bytes -= self._parts.popitem(last=False)[1][1]
        self._parts.move_to_end(name)
        self._taken += 1
        return [self._parts[name][0]]

    def forget(self, key: str, part: Part, made: list[Any]) -> None:
        """Have a part made anew that could not be had by the reference in `made`."""
        name = (key, *part)
        if name in self._parts and [self._parts[name][0]] == made:
            self._bytes -= self._parts.pop(name)[1]
            self._batches.pop(key, None)  # perhaps they were lost with the trial that sent them

    def traffic(self) -> Traffic:
        return Traffic(self._made, self._taken)


def _same(batches: Batches) -> Batches:
    return batches


def _make(batches: Batches, part: Part) -> dict[str, np.ndarray]:
    import torch

    torch.set_num_threads(1)
    return batches.make_part(part)


@dataclass
class Shelf:
    """One trial's access to the shared parts of its stream.

    Args:
        keeper: The actor's handle.
        key: The `stream_key` and rank of the trial's worker.
        ahead: Parts that are in the making or wait while one is used.
    """

    keeper: Any
    key: str
    ahead: int

    def agree(self, sizes: Sizes) -> Sizes:
        """The sizes of tasks by which all trials of this stream cut it; `sizes` if this is the first."""
        import ray

        agreed: Sizes = ray.get(self.keeper.agree.remote(self.key, sizes))
        return agreed

    def take(self, batches: Batches, parts: Sequence[Part]) -> Iterator[dict[str, np.ndarray]]:
        """What the parts hold, in order; read-only.

        Raises RayError if a part cannot be made, at the second attempt.
        """
        import ray

        sent = [ray.put(batches)]
        options = prefer_this_machine()

        def ask(part: Part) -> Any:
            num_bytes = (part.stop - part.start) * part.rows * batches.image_bytes
            return self.keeper.part.remote(self.key, part, num_bytes, sent, options)

        asked: deque[Any] = deque()
        for number, part in enumerate(parts):
            while len(asked) <= self.ahead and number + len(asked) < len(parts):
                asked.append(ask(parts[number + len(asked)]))
            yield self._arrays(part, ray.get(asked.popleft()), ask)

    def _arrays(self, part: Part, made: list[Any], ask: Callable[[Part], Any]) -> dict[str, np.ndarray]:
        import ray
        from ray.exceptions import RayError

        try:
            return ray.get(made[0])
        except RayError:  # this may have befallen another trial's task: once more, by one of our own
            ray.get(self.keeper.forget.remote(self.key, part, made))
        made = ray.get(ask(part))
        try:
            return ray.get(made[0])
        except RayError:
            self.keeper.forget.remote(self.key, part, made)  # for whoever asks next
            raise


@dataclass(frozen=True)
class SharedCrops:
    """The driver's end of the shelf."""

    keeper: Any

    def traffic(self) -> Traffic:
        """What has gone over the shelf so far."""
        import ray

        found: Traffic = ray.get(self.keeper.traffic.remote())
        return found

    def report(self) -> str:
        """One line for people."""
        made, taken = self.traffic()
        return f"shared crops: {taken:,} parts used, of which {made:,} were made"


@contextmanager
def shelf_for_trials(config: RunConfig) -> Generator[SharedCrops | None]:
    """What the trials of a sweep share crops by (`cluster.share_crops`), or None; needs a connection to Ray."""
    if not config.cluster.share_crops:
        yield None
        return
    import ray

    store = min(node["Resources"]["object_store_memory"] for node in ray.nodes() if node["Alive"])
    keeper: Any = ray.remote(_Keeper).options(name=_ACTOR, num_cpus=0).remote(int(_STORE_SHARE * store))
    try:
        yield SharedCrops(keeper)
    finally:
        ray.kill(keeper)


def find_shelf(config: RunConfig, rank: int, ahead: int) -> Shelf | None:
    """The shelf of the sweep that this process belongs to; None where trials share nothing, or for a run alone."""
    if not config.cluster.share_crops:
        return None
    import ray

    try:
        keeper = ray.get_actor(_ACTOR)
    except ValueError:  # no such actor
        return None
    return Shelf(keeper, f"{stream_key(config)}-{rank}", ahead)


def prefer_this_machine() -> dict[str, Any]:
    """Options of tasks that stay on this machine while it has CPUs free, so that crops cross no network.

    Else any machine takes them. Ray Data's own default spreads them over all machines.
    """
    import ray

    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return {"label_selector": here, "fallback_strategy": [{"label_selector": {}}]}
