"""Crops per second through Ray Data to a consumer that only counts, beside the same transform called bare.

    python -m benchmarks.stream_rate --images FOLDER_OR_TAR [--cpus 2] [--json]

takes turns between as many plain processes as there are data CPUs, each of which makes its batches and throws them
away, and `ray_batches` on a Ray of as many CPUs, both for the same steps of the same stream, and prints images per
second (wall time), their ratio, and the bytes that Ray spilled. A stream that is not counted comes first: the processes
start in it, and stay. README.md has figures.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.pool import Pool
from pathlib import Path

import torch

from dino_core.config import CropsConfig
from dino_core.crops import MultiCrop
from orchestrator.config import DataConfig
from orchestrator.data import stream
from orchestrator.data.loaders import Decoder
from orchestrator.data.plan import IndexPlan
from orchestrator.data.sources import open_source
from orchestrator.data.stream import Batches, ray_batches
from orchestrator.data.tasks import tasks_at_once


def bare(batches: Batches, cpus: int, pool: Pool) -> float:
    """Images per second of `cpus` processes, each taking every `cpus`-th step."""
    steps = range(batches.start_step, batches.stop_step)
    start = time.perf_counter()
    pool.starmap(_make, [(batches, steps[process::cpus]) for process in range(cpus)], chunksize=1)
    return len(steps) * batches.rows / (time.perf_counter() - start)


def _make(batches: Batches, steps: Sequence[int]) -> None:
    torch.set_num_threads(1)
    for step in steps:
        batches.make(step)


def streamed(batches: Batches, cpus: int) -> float:
    """Images per second from the first batch that a task made to the last."""
    start = time.perf_counter()
    for step, _ in enumerate(ray_batches(batches, data_cpus=cpus), start=batches.start_step):
        if step == batches.start_step + 1:  # the very first is made in this process
            start = time.perf_counter()
    return (batches.stop_step - batches.start_step - 2) * batches.rows / (time.perf_counter() - start)


@contextmanager
def local_ray(cpus: int) -> Iterator[None]:
    import ray

    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        # Else Ray ends idle processes that are more than its CPUs, and each turn would begin with imports.
        _system_config={"num_workers_soft_limit": tasks_at_once(cpus)},
    )
    try:
        yield
    finally:
        ray.shutdown()
        gc.collect()


def spilled_bytes() -> int:
    """What Ray wrote to disk for want of room in its object store."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.spilled_bytes_total)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="anything that data.source takes")
    parser.add_argument("--cpus", type=int, default=2, help="data CPUs (2)")
    parser.add_argument("--batch-size", type=int, default=32, help="images of a batch (32)")
    parser.add_argument("--steps", type=int, default=200, help="batches of a turn (200)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (3)")
    parser.add_argument("--device", choices=["cpu", "accelerator"], default="accelerator", help="crops.device")
    parser.add_argument("--json", action="store_true", help="print the medians as JSON on the last line")
    options = parser.parse_args(arguments)
    split = open_source(DataConfig(source=str(options.images))).train
    batches = Batches(
        split=split,
        loader=Decoder(100_000_000),
        crops=MultiCrop(replace(CropsConfig(), device=options.device), seed=0),
        plan=IndexPlan(len(split), 0, options.batch_size),
        start_step=0,
        stop_step=options.steps,
    )
    stream._CHEAP_SHARE = 0.0
    stream._HEAD_SECONDS = 1e-9  # all but the first batch by Ray Data
    rates: list[tuple[float, float]] = []
    with multiprocessing.get_context("spawn").Pool(options.cpus) as pool, local_ray(options.cpus):
        bare(replace(batches, stop_step=4), options.cpus, pool)
        streamed(replace(batches, stop_step=max(4, options.steps // 2)), options.cpus)
        for _ in range(options.rounds):
            theirs, mine = bare(batches, options.cpus, pool), streamed(batches, options.cpus)
            rates.append((theirs, mine))
            print(f"bare {theirs:.1f} images/s, streamed {mine:.1f}, ratio {mine / theirs:.3f}")
        spilled = spilled_bytes()
    result = {
        "bare_images_per_s": statistics.median(rate for rate, _ in rates),
        "streamed_images_per_s": statistics.median(rate for _, rate in rates),
        "ratio_streamed": statistics.median(mine / theirs for theirs, mine in rates),
        "spilled_bytes": spilled,
    }
    print(f"streamed / bare {result['ratio_streamed']:.3f}; {spilled} bytes spilled")
    if options.json:
        print(json.dumps({name: round(value, 4) for name, value in result.items()}))


if __name__ == "__main__":
    main()
