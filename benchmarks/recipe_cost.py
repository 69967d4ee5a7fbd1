"""What the cost model says of a training step beside what it takes: memory and images per second of recipes.

    python -m benchmarks.recipe_cost [RECIPE ...] [--rounds 3] [--steps 5] [--json]

Without names: all recipes of the digits, the small versions of the others. A recipe has a process of its own with one
torch thread, the run's own network and batch size, and crops of noise. Processes take turns.

- Memory predicted is what `--dry-run` tells (weights, activations, logits); measured is the peak of resident memory
  above what the process had after its imports, the crops counted out.
- `--dry-run` scales what it has not measured by its arithmetic. So images per second predicted are those of the first
  recipe times the ratio of GFLOP per image; measured is the median step, teacher, loss and optimiser included, by the
  CPU time of its thread, so that other programs count little.

docs/cost.md has figures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

RECIPES = ("quickstart", "ibot_digits", "dinov2_digits", "dinov2_large_digits")
_WARM_UP = 2


class Found(NamedTuple):
    images_per_s: float
    memory_mb: float


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _train(name: str, num_steps: int, out: Connection) -> None:
    import torch

    from dino_core.crops import CropBatch
    from dino_core.train import TrainState, train_step
    from sweeps.recipes import RECIPES as ALL

    torch.set_num_threads(1)
    config = ALL[name]().pretrain
    num_images, crops = config.batch_size, config.crops
    local = torch.randn(crops.num_local_crops * num_images, 3, crops.local_size, crops.local_size)
    batch = CropBatch(
        torch.randn(2 * num_images, 3, crops.global_size, crops.global_size),
        local if crops.num_local_crops else None,
        num_images,
    )
    torch.nn.functional.linear(torch.ones(8, 8, requires_grad=True), torch.ones(8, 8)).sum().backward()
    before = _resident()
    peak, done = [before], threading.Event()

    def watch() -> None:  # the kernel's high-water mark would count what came before
        while not done.wait(0.002):
            peak[0] = max(peak[0], _resident())

    watching = threading.Thread(target=watch)
    watching.start()
    state = TrainState.create(config, num_samples=10 * num_images)
    seconds = []
    for _ in range(_WARM_UP + num_steps):
        began = time.thread_time()
        train_step(state, batch, diagnose=False)
        seconds.append(time.thread_time() - began)
    done.set()
    watching.join()
    out.send(Found(num_images / statistics.median(seconds[_WARM_UP:]), (peak[0] - before) / 1e6))


def measure_recipe(name: str, num_steps: int) -> Found:
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(name, num_steps, send))
    process.start()
    send.close()
    try:
        found: Found = receive.recv()
    finally:
        process.join()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    from orchestrator.cost import measure
    from sweeps.recipes import RECIPES as ALL

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), metavar="RECIPE", help="the digits' recipes")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (3)")
    parser.add_argument("--steps", type=int, default=5, help="steps that are measured in a turn (5)")
    parser.add_argument("--json", action="store_true", help="print the table as JSON on the last line")
    options = parser.parse_args(arguments)
    turns: dict[str, list[Found]] = {name: [] for name in options.recipes}
    for _ in range(options.rounds):
        for name, found in turns.items():
            found.append(measure_recipe(name, options.steps))
    costs = {name: measure(ALL[name]()) for name in turns}
    first = options.recipes[0]
    base = costs[first].flops.total
    rows = []
    print("| recipe | GFLOP/image | MB predicted | measured | images/s predicted | measured | ratio in rounds |")
    print("|---|---|---|---|---|---|---|")
    for name, found in turns.items():
        cost = costs[name]
        of_first = [turn.images_per_s * base / cost.flops.total for turn in turns[first]]
        ratios = [mine.images_per_s / other for mine, other in zip(found, of_first, strict=True)]
        row = {
            "recipe": name,
            "gflop_per_image": cost.flops.total / 1e9,
            "predicted_mb": cost.total / 1e6,
            "measured_mb": statistics.median(turn.memory_mb for turn in found),
            "predicted_images_per_s": statistics.median(of_first),
            "measured_images_per_s": statistics.median(turn.images_per_s for turn in found),
        }
        numbers = "{gflop_per_image:.4f} | {predicted_mb:.1f} | {measured_mb:.1f} | {predicted_images_per_s:.0f} | "
        numbers += "{measured_images_per_s:.0f}"
        print(f"| {name} | {numbers.format(**row)} | {', '.join(f'{ratio:.2f}' for ratio in ratios)} |", flush=True)
        rows.append(row)
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
