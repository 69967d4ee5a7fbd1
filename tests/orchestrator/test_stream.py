"""The stream of batches: the same bytes however it is made, whoever makes it, wherever it starts."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.stream_rate import spilled_bytes
from dino_core.backbones import build_backbone
from dino_core.config import CropsConfig, ModelConfig
from dino_core.crops import MultiCrop
from orchestrator import ray_cluster
from orchestrator.config import DataConfig, RunConfig
from orchestrator.data import shelf, stream, tasks
from orchestrator.data.images import StorageError
from orchestrator.data.loaders import Decoder
from orchestrator.data.plan import IndexPlan, Windows
from orchestrator.data.shelf import Shelf, find_shelf, shelf_for_trials
from orchestrator.data.sources import Split, open_source
from orchestrator.data.stream import Batches, TooManyBadSamples, local_batches, make_batch, ray_batches
from orchestrator.data.tasks import Part, Round
from orchestrator.errors import RunFailed
from orchestrator.evaluate.compute import choose_compute
from orchestrator.evaluate.features import Images, Share
from orchestrator.evaluate.views import CentreCrop
from orchestrator.overrides import override

# Ray Data leaves the log file of an execution open when two run at once.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <_io.FileIO name=.*ray-data:pytest.PytestUnraisableExceptionWarning"
)

STORE_BYTES = 80 << 20  # about the least that Ray takes
CROPS = MultiCrop(CropsConfig(global_size=16, local_size=8, num_local_crops=2), seed=3)
LOADER = Decoder(max_pixels=10_000)
BAD = (2, 3, 11)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Twenty images, three of them unreadable in different ways."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(20):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (12, 14, 3), dtype=np.uint8)).save(buffer, "PNG")
        (root / f"{number:02}.png").write_bytes(buffer.getvalue())
    (root / "02.png").write_bytes(b"")
    (root / "03.png").write_bytes((root / "04.png").read_bytes()[:200])
    (root / "11.png").write_text("not an image")
    return open_source(DataConfig(source=str(root))).train


@pytest.fixture(scope="module")
def table_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty images in row groups of four."""
    rng = np.random.default_rng(1)
    images = []
    for _ in range(50):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (10, 9, 3), dtype=np.uint8)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    path = tmp_path_factory.mktemp("table") / "images.parquet"
    pq.write_table(pa.table({"image": images}), path, row_group_size=4)
    return path


@pytest.fixture(scope="module")
def table(table_path: Path) -> Split:
    return open_source(DataConfig(source=str(table_path))).train


def units(split: Split) -> bytes:
    starts = split.units()
    assert starts is not None
    assert starts.tolist() == list(range(0, 50, 4))
    return starts.tobytes()


def digest(shares: list[dict[str, Tensor]]) -> str:
    """Of a global batch, given as the shares of the ranks in order."""
    whole = {name: torch.cat([share[name] for share in shares]) for name in sorted(shares[0])}
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in whole.values())).hexdigest()


def batches_of(split: Split, *, batch_size: int = 6, windows: Windows | None = None, **changes: Any) -> Batches:
    plan = IndexPlan(len(split), seed=3, batch_size=batch_size, windows=windows)
    settings = {"start_step": 0, "stop_step": 30, "loader": LOADER, **changes}
    return Batches(split=split, crops=CROPS, plan=plan, **settings)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def all_equal(some: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> bool:
    return len(some) == len(others) and all(map(equal, some, others))


def threads_named(name: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(name)]


# A batch


def test_a_batch_holds_the_crops_of_its_samples(folder: Split) -> None:
    plan = IndexPlan(len(folder), seed=3, batch_size=6)
    positions = plan.positions(4)
    batch = make_batch(folder, LOADER, CROPS, plan, positions)
    epochs, ids = plan.locate(positions)
    assert np.array_equal(np.where(batch["bad_id"] < 0, batch["sample_id"], batch["bad_id"]), ids)
    assert batch["global_crops"].shape == (6, 2, 3, 16, 16)
    for row, sample in enumerate(batch["sample_id"]):
        with Image.open(io.BytesIO(folder.read(int(sample)))) as image:  # type: ignore[arg-type]
            alone = CROPS.make([np.array(image)], epochs[row : row + 1], np.array([sample]))
        assert np.array_equal(alone["global_crops"][0], batch["global_crops"][row])
        assert np.array_equal(alone["local_crops"][0], batch["local_crops"][row])


def test_a_bad_sample_is_replaced_by_the_next_readable_one(folder: Split) -> None:
    plan = IndexPlan(20, seed=3, batch_size=20)
    batch = make_batch(folder, LOADER, CROPS, plan, np.arange(20))
    replaced = {int(bad): int(used) for bad, used in zip(batch["bad_id"], batch["sample_id"], strict=True) if bad >= 0}
    assert replaced == {2: 4, 3: 4, 11: 12}
    rows = np.flatnonzero(batch["sample_id"] == 4)
    assert len(rows) == 3
    assert all(np.array_equal(batch["global_crops"][rows[0]], batch["global_crops"][row]) for row in rows)


def test_the_size_limit_reaches_the_decoder(folder: Split) -> None:
    with pytest.raises(TooManyBadSamples, match=r"100 images in a row .* 14x12 is more than 100 pixels"):
        make_batch(folder, Decoder(100), CROPS, IndexPlan(20, 0, 4), np.arange(4))


class Far:
    """A service that takes its time for every image; number 5 is not there."""

    def __init__(self) -> None:
        self.asked = self.most = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return 24

    def read(self, index: int) -> np.ndarray:
        with self._lock:
            self.asked += 1
            self.most = max(self.most, self.asked)
        time.sleep(0.02)
        with self._lock:
            self.asked -= 1
        if index == 5:
            raise FileNotFoundError(2, "no such object")
        return np.full((9, 9, 3), index, dtype=np.uint8)

    def name(self, index: int) -> str:
        return str(index)

    def units(self) -> None:
        return None


def test_images_of_a_service_are_asked_for_several_at_a_time() -> None:
    plan = IndexPlan(24, seed=3, batch_size=24)
    near, far = Split(Far(), None), Split(Far(), None, reads_at_once=16)
    batches = [make_batch(split, LOADER, CROPS, plan, np.arange(24)) for split in (near, far)]
    assert all(np.array_equal(batches[0][name], batches[1][name]) for name in batches[0])
    assert 5 in batches[1]["bad_id"]
    assert isinstance(near.reader, Far) and isinstance(far.reader, Far)
    assert near.reader.most == 1
    assert 4 <= far.reader.most <= 16


# In this process


@pytest.mark.parametrize("num_threads", [1, 3])
def test_local_batches_are_the_batches(folder: Split, num_threads: int) -> None:
    batches = batches_of(folder)
    made = list(local_batches(batches, num_threads=num_threads))
    assert len(made) == 30
    for step, batch in enumerate(made):
        assert equal(batch, {name: torch.from_numpy(array) for name, array in batches.make(step).items()})
    assert all_equal(list(local_batches(replace(batches, start_step=17))), made[17:])
    assert list(local_batches(replace(batches, start_step=30))) == []


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_rows_are_the_global_batch(folder: Split, world_size: int) -> None:
    whole = list(local_batches(batches_of(folder, stop_step=8)))
    parts = [
        list(local_batches(batches_of(folder, stop_step=8, rank=rank, world_size=world_size)))
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        assert equal(batch, {name: torch.cat([part[step][name] for part in parts]) for name in batch})


def test_several_steps_at_once_are_the_same_rows(folder: Split) -> None:
    batches = batches_of(folder, rank=1, world_size=2)
    several = batches.make_part(Part(3, 7, 0, 3))
    for name, array in several.items():
        assert np.array_equal(array, np.concatenate([batches.make(step)[name] for step in range(3, 7)]))
    row = batches.make_part(Part(3, 7, 1, 2))
    for name, array in row.items():
        assert np.array_equal(array, several[name][1::3])


def test_closing_early_ends_the_threads(folder: Split) -> None:
    running = local_batches(batches_of(folder), num_threads=2)
    next(running)
    assert threads_named("crops")
    running.close()
    assert not threads_named("crops")


def test_an_error_of_a_thread_reaches_the_consumer(folder: Split) -> None:
    with pytest.raises(TooManyBadSamples):
        list(local_batches(batches_of(folder, loader=Decoder(1))))
    assert not threads_named("crops")


def test_a_killed_stream_goes_on_where_it_was(table: Split, table_path: Path) -> None:
    expected = [digest([batch]) for batch in local_batches(batches_of(table, windows=Windows(20, units(table))))]
    seen: list[str] = []
    for lines in (int(np.random.default_rng().integers(1, 25)), 30):  # a random step, another each time
        command = [sys.executable, "-c", ENDLESS, str(table_path), str(len(seen))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            while len(seen) < lines:
                seen.append(process.stdout.readline().strip())
            process.kill()
    assert seen == expected


ENDLESS = """
import sys
from orchestrator.config import DataConfig
from orchestrator.data.plan import Windows
from orchestrator.data.sources import open_source
from orchestrator.data.stream import local_batches
from tests.orchestrator.test_stream import batches_of, digest, units

split = open_source(DataConfig(source=sys.argv[1])).train
batches = batches_of(split, windows=Windows(20, units(split)), start_step=int(sys.argv[2]), stop_step=1000)
for batch in local_batches(batches):
    print(digest([batch]), flush=True)
"""


def test_batches_that_cost_little_are_made_here(folder: Split) -> None:
    batches = batches_of(folder)
    made = []
    for batch in ray_batches(batches):  # where there is no Ray, which would fail
        made.append(batch)
        time.sleep(0.1)
    assert all_equal(made, list(local_batches(batches)))


class Waiting:
    """Costs no CPU, but time, as a slow disk does."""

    def load(self, split: Split, index: int) -> np.ndarray:
        time.sleep(0.02)
        return LOADER.load(split, index)


@pytest.mark.parametrize(("loader", "use_s"), [(LOADER, 0.0), (Waiting(), 0.05)], ids=["costly", "slow"])
def test_other_batches_are_made_here_until_that_is_known(folder: Split, loader: Any, use_s: float) -> None:
    batches = batches_of(folder, loader=loader)
    expected = list(local_batches(replace(batches, loader=LOADER)))
    running = stream._while_cheap(batches)
    made, reached = [], None
    while reached is None:
        try:
            made.append(next(running))
            time.sleep(use_s)
        except StopIteration as end:
            reached = end.value
    assert len(made) == reached < 12
    assert all_equal(made, expected[:reached])
    assert not threads_named("crops")


# Through Ray Data


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    import ray

    ray_cluster._start_local(
        num_cpus=4,
        object_store_memory=STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield ray
    ray_cluster.disconnect()
    gc.collect()  # what Ray leaves open is found here, not in another test


def only_by_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_CHEAP_SHARE", 0.0)
    monkeypatch.setattr(stream, "_HEAD_SECONDS", 1e-9)


@pytest.fixture
def by_ray(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No head start in this process and several short executions; counts the batches of each."""
    only_by_tasks(monkeypatch)
    monkeypatch.setattr(tasks, "_TASKS_PER_EXECUTION", 4)
    monkeypatch.setattr(tasks, "_MAX_TASK_STEPS", 2)
    counts: list[int] = []
    original = stream._ray_stream

    def counted(*args: Any) -> Iterator[dict[str, Tensor]]:
        counts.append(0)
        place = len(counts) - 1
        for batch in original(*args):
            counts[place] += 1
            yield batch

    monkeypatch.setattr(stream, "_ray_stream", counted)
    return counts


@pytest.mark.ray
def test_ray_batches_are_the_local_ones(ray: Any, by_ray: list[int], folder: Split) -> None:
    from ray.data import DataContext

    before = repr(DataContext.get_current())
    batches = batches_of(folder)
    expected = list(local_batches(batches))
    made = list(ray_batches(batches))
    assert all_equal(made, expected)
    assert sum(by_ray) == 29
    assert len(by_ray) == 4
    assert set(torch.cat([batch["bad_id"] for batch in made]).tolist()) == {-1, *BAD}
    assert all_equal(list(ray_batches(replace(batches, start_step=13))), expected[13:])
    assert repr(DataContext.get_current()) == before


@pytest.mark.ray
def test_two_ranks_at_once_make_the_global_batch(ray: Any, by_ray: list[int], folder: Split) -> None:
    whole = list(local_batches(batches_of(folder, stop_step=10)))
    parts = [ray_batches(batches_of(folder, stop_step=10, rank=rank, world_size=2), data_cpus=1) for rank in range(2)]
    for step, shares in enumerate(zip(*parts, strict=True)):
        assert equal({name: torch.cat([share[name] for share in shares]) for name in shares[0]}, whole[step])


@pytest.mark.ray
def test_more_streams_than_cpus_all_go_on(ray: Any, by_ray: list[int], folder: Split) -> None:
    whole = batches_of(folder, stop_step=6)
    trials = [ray_batches(replace(whole, crops=MultiCrop(CROPS.config, seed=seed)), data_cpus=2) for seed in range(5)]
    # Five streams that may take ten CPUs, of which there are four, consumed in step: each waits for all others.
    assert sum(1 for _ in zip(*trials, strict=True)) == 6


@pytest.mark.ray
def test_the_head_start_joins_the_rest(ray: Any, folder: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = batches_of(folder)
    monkeypatch.setattr(stream, "_CHEAP_SHARE", 0.0)
    monkeypatch.setattr(stream, "_HEAD_SECONDS", 0.05)
    assert all_equal(list(ray_batches(batches)), list(local_batches(batches)))
    monkeypatch.setattr(stream, "_HEAD_SECONDS", 1e9)
    assert len(list(ray_batches(batches))) == 30
    assert list(ray_batches(replace(batches, start_step=30))) == []


@pytest.mark.ray
def test_the_stream_is_the_same_for_any_workers_tasks_and_start(
    ray: Any, by_ray: list[int], table: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(7)
    for windows in (None, Windows(20, units(table))):
        whole = batches_of(table, windows=windows, stop_step=24)
        expected = [digest([batch]) for batch in local_batches(whole)]
        assert len(set(expected)) == 24
        for world_size, max_steps in ((1, 1), (2, 3), (3, 7)):
            monkeypatch.setattr(tasks, "_MAX_TASK_STEPS", max_steps)
            start = int(rng.integers(0, 23))  # as after a kill: nothing is known but the step
            parts = [
                ray_batches(replace(whole, start_step=start, rank=rank, world_size=world_size), data_cpus=1)
                for rank in range(world_size)
            ]
            assert [digest(list(shares)) for shares in zip(*parts, strict=True)] == expected[start:]


@pytest.mark.ray
def test_trials_share_what_one_of_them_made(ray: Any, folder: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_HEAD_SECONDS", 1e-9)
    batches = batches_of(folder)
    expected = list(local_batches(batches))
    config = override(RunConfig(), {"cluster.share_crops": True})
    assert find_shelf(config, 0, 2) is None  # a run alone
    with shelf_for_trials(config) as shared:
        assert shared is not None
        shelves = [find_shelf(config, 0, 2) for _ in range(3)]
        trials = [ray_batches(batches, shelf=shelf) for shelf in shelves[:2]]
        for want, *made in zip(expected, *trials, strict=True):
            assert all(equal(want, batch) for batch in made)
        made, taken = shared.traffic()
        assert taken == 2 * made > 0
        # One that comes later takes all that is kept; one of another seed takes nothing.
        assert all_equal(list(ray_batches(replace(batches, start_step=9), shelf=shelves[2])), expected[9:])
        later = shared.traffic()
        assert later.made <= made + 1  # the cut at its first step
        other = find_shelf(override(config, {"pretrain.seed": 5}), 0, 2)
        assert other is not None
        plan = replace(batches.plan, seed=5)
        mine = replace(batches, plan=plan, crops=MultiCrop(CROPS.config, seed=5))
        assert all_equal(list(ray_batches(mine, shelf=other)), list(local_batches(mine)))
        assert shared.traffic().made > later.made
    assert find_shelf(config, 0, 2) is None


class Stumbling:
    """Fails as storage does, as long as a file is there."""

    def __init__(self, stone: Path) -> None:
        self._stone = stone

    def load(self, split: Split, index: int) -> np.ndarray:
        if self._stone.exists():
            raise StorageError(5, "input/output error")
        return LOADER.load(split, index)


@pytest.mark.ray
def test_a_part_that_failed_is_made_again(
    ray: Any, folder: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "_MAX_TASK_STEPS", 4)
    config = override(RunConfig(), {"cluster.share_crops": True})
    stone = tmp_path / "stone"
    batches = batches_of(folder, loader=Stumbling(stone))
    rounds = [Round(4, 8, (Part(4, 8, 0, 6),))]
    with shelf_for_trials(config) as shared:
        assert shared is not None
        first, second = (Shelf(shared.keeper, "stream", 1) for _ in range(2))
        stone.touch()
        with pytest.raises(StorageError, match="input/output error"):
            list(stream._shelf_stream(batches, rounds, first))
        stone.unlink()
        expected = list(local_batches(replace(batches, start_step=4, stop_step=8)))
        assert all_equal(list(stream._shelf_stream(batches, rounds, second)), expected)
        assert shared.traffic().made == 3  # twice in vain


@pytest.mark.ray
def test_a_full_shelf_forgets_and_has_made_again(ray: Any, folder: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_HEAD_SECONDS", 1e-9)
    monkeypatch.setattr(shelf, "_STORE_SHARE", 1e-9)  # room for one part
    monkeypatch.setattr(tasks, "_MAX_TASK_STEPS", 4)
    config = override(RunConfig(), {"cluster.share_crops": True})
    batches = batches_of(folder)
    with shelf_for_trials(config) as shared:
        assert shared is not None
        for _ in range(2):  # one after the other
            assert all_equal(list(ray_batches(batches, shelf=find_shelf(config, 0, 2))), list(local_batches(batches)))
        made, taken = shared.traffic()
        assert made == taken == 16
        assert shared.report() == "shared crops: 16 parts used, of which 16 were made"
        bad = replace(batches, loader=Decoder(1))
        with pytest.raises(TooManyBadSamples, match="100 images in a row"):
            list(stream._shelf_stream(bad, [Round(0, 4, (Part(0, 4, 0, 6),))], Shelf(shared.keeper, "bad", 1)))


@pytest.mark.ray
def test_a_source_ten_times_the_object_store_streams_in_bounded_memory(
    ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_by_tasks(monkeypatch)
    split = open_source(DataConfig(source=str(large_table(tmp_path, 10 * STORE_BYTES)))).train
    crops = MultiCrop(CropsConfig(global_size=160, local_size=48, num_local_crops=2), seed=0)
    plan = IndexPlan(len(split), 0, 64, Windows(256, np.asarray(split.units()).tobytes()))
    steps = len(split) // 64
    batches = Batches(split=split, crops=crops, plan=plan, loader=Decoder(10**6), start_step=0, stop_step=steps)
    assert steps * 64 * batches.image_bytes > 3 * STORE_BYTES
    processes: dict[int, int] = {}
    seen = 0
    for step, batch in enumerate(ray_batches(batches)):
        seen += len(batch["sample_id"])
        if step % 8 == 0:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.name().startswith("ray::"):  # at rest too: a task is over in a moment
                        memory = process.memory_full_info()
                        processes[process.pid] = max(processes.get(process.pid, 0), memory.uss)
    assert seen == steps * 64
    # Trials that stand still, as in an evaluation, while their streams could run ahead.
    small = replace(batches, plan=replace(plan, batch_size=16))
    others = [ray_batches(replace(small, crops=MultiCrop(crops.config, seed)), data_cpus=1) for seed in range(3)]
    for other in others:
        next(other), next(other)
    time.sleep(3)
    for other in others:
        other.close()
    spilled = spilled_bytes()
    largest = max(processes.values())
    print(f"spilled {spilled >> 20} MiB; largest process of Ray's {largest >> 20} MiB")
    assert spilled == 0
    assert largest < 1 << 30


def large_table(folder: Path, num_bytes: int) -> Path:
    """Uncompressed noise in row groups of 6 MB."""
    rng = np.random.default_rng(0)
    path = folder / "large.parquet"
    schema = pa.schema([("image", pa.binary())])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False, write_statistics=False) as writer:
        while not path.exists() or path.stat().st_size < num_bytes:
            images = []
            for pixels in rng.integers(0, 256, (12, 400, 400, 3), dtype=np.uint8):
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "BMP")
                images.append(buffer.getvalue())
            writer.write_table(pa.table({"image": images}, schema))
    return path


@pytest.mark.ray
def test_closing_early_shuts_the_execution_down(ray: Any, by_ray: list[int], folder: Split) -> None:
    running = ray_batches(batches_of(folder, stop_step=100_000))
    for _ in range(20):
        next(running)
    running.close()
    assert not threads_named("batches")
    deadline = time.monotonic() + 100
    while threads_named("StreamingExecutor") or ray.available_resources().get("CPU") != 4:
        assert time.monotonic() < deadline, (threads_named("StreamingExecutor"), ray.available_resources())
        time.sleep(0.1)


@pytest.mark.ray
def test_a_failing_task_names_its_reason(ray: Any, by_ray: list[int], tmp_path: Path) -> None:
    for number in range(150):
        (tmp_path / f"{number:03}.png").write_bytes(b"" if number >= 20 else _png())
    split = open_source(DataConfig(source=str(tmp_path))).train
    plan = IndexPlan(len(split), seed=3, batch_size=1)
    _, ids = plan.locate(np.arange(150))
    good = int(np.flatnonzero(ids < 20)[0])
    batches = Batches(split=split, crops=CROPS, plan=plan, loader=LOADER, start_step=good, stop_step=good + 150)
    with pytest.raises(TooManyBadSamples, match=r"100 images in a row from .* are unreadable"):
        list(ray_batches(batches))


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.ray
def test_data_tasks_run_beside_a_trials_placement_group(ray: Any, folder: Split) -> None:
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    def stream_inside(batches: Batches) -> int:
        stream._CHEAP_SHARE, stream._HEAD_SECONDS = 0.0, 1e-9
        return len(list(ray_batches(batches)))

    class Trial:
        def run(self, batches: Batches) -> int:
            return stream_inside(batches)

    group = placement_group([{"CPU": 1}])
    ray.get(group.ready())
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    trial = ray.remote(Trial).options(num_cpus=1, scheduling_strategy=strategy).remote()
    try:
        assert ray.get(trial.run.remote(batches_of(folder, stop_step=5)), timeout=400) == 5
    finally:
        ray.kill(trial)
        remove_placement_group(group)


@pytest.mark.ray
def test_features_by_tasks_are_the_local_ones(ray: Any, folder: Split, tmp_path: Path) -> None:
    """Here for the sake of the cluster, which takes half a minute to start."""
    sizes = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}
    backbone = build_backbone(ModelConfig(backbone="vit_tiny_patch16_224", **sizes), 16)
    images = Images(folder, np.arange(len(folder))[::-1], "digest", LOADER, "train")
    view = CentreCrop(16, 0.875, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    shares = [Share(start, start + 5, batch_size=2) for start in range(0, 20, 5)]
    here, on_ray = (
        choose_compute(override(RunConfig(), {"cluster.launcher": launcher})) for launcher in ("local", "train")
    )
    made = list(on_ray.parts(backbone, images, view, shares))
    expected = list(here.parts(backbone, images, view, shares))
    for (rows, bad), (expected_rows, expected_bad) in zip(made, expected, strict=True):
        assert torch.equal(rows, expected_rows)
        assert bad == expected_bad
    assert [len(rows) for rows, _ in made] == [5, 4, 5, 3]
    first = on_ray.parts(backbone, images, view, shares)  # given up by who asked: what waits is cancelled
    assert torch.equal(next(first)[0], made[0][0])
    first.close()  # type: ignore[attr-defined]
    (tmp_path / "stone").touch()
    lost = replace(images, loader=Stumbling(tmp_path / "stone"))
    with pytest.raises(RunFailed, match="input/output error"):
        list(on_ray.parts(backbone, lost, view, shares[:1]))
    on_ray.close()
    assert ray.is_initialized()
