"""Packed crops and stochastic depth by sub-batches: time and operations of a student's forward and backward pass.

    python -m benchmarks.packing [--batch 16] [--rounds 5] [--json]

ViT-Ti/16, 2 crops of 96 and 6 of 48 pixels, 37 and 10 tokens each, stochastic depth of 0.3 in all blocks, one thread.
Each contender has the same weights; they take turns, and ratios are taken within a round, of CPU time. Operations are
those that torch dispatches and that are no views: a lower bound of what a GPU would have to launch.

README.md has figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dino_core.config import CropsConfig, HeadConfig, ModelConfig, PretrainConfig
from dino_core.networks import CropNetwork, build_student

SUB_BATCH = {"drop_path_mode": "sub_batch"}
CONTENDERS: dict[str, dict[str, Any]] = {
    "separate": {},
    "packed": {"packing": True},
    "separate, sub-batches": SUB_BATCH,
    "packed, sub-batches": {"packing": True, **SUB_BATCH},
}
PRECISIONS = {"fp32": False, "bf16": True}


class _Counter(TorchDispatchMode):
    """Counts what is dispatched, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def build(settings: dict[str, Any], batch: int) -> CropNetwork:
    torch.manual_seed(0)
    config = PretrainConfig(
        batch_size=batch,
        model=ModelConfig(
            backbone="vit_tiny_patch16_224", drop_path=0.3, drop_path_schedule="uniform", layer_scale=0.1, **settings
        ),
        head=HeadConfig(num_prototypes=1024, hidden_dim=512),
        crops=CropsConfig(num_local_crops=6, global_size=96, local_size=48),
    )
    return build_student(config).train()


def run(network: CropNetwork, groups: list[torch.Tensor], batch: int, step: int, *, bf16: bool) -> float:
    """CPU seconds of a forward and a backward pass."""
    network.zero_grad(set_to_none=True)
    network.begin_pass(0, step, num_images=batch, share=batch)
    began = time.process_time()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        outputs = network(groups).crops
    outputs.float().logsumexp(dim=-1).mean().backward()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="images")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    networks = {name: build(settings, args.batch) for name, settings in CONTENDERS.items()}
    groups = [torch.randn(n * args.batch, 3, size, size) for n, size in ((2, 96), (6, 48))]
    turns = {(name, precision): list[float]() for name in CONTENDERS for precision in PRECISIONS}
    operations: dict[str, int] = {}
    for name, network in networks.items():
        with _Counter() as counter:
            run(network, groups, args.batch, 0, bf16=True)
        operations[name] = counter.count
        print(f"{name}: {counter.count} operations in bf16", flush=True)
        run(network, groups, args.batch, 0, bf16=False)
    for step in range(args.rounds):
        for (name, precision), seconds in turns.items():
            seconds.append(run(networks[name], groups, args.batch, step, bf16=PRECISIONS[precision]))
            print(f"round {step}, {name}, {precision}: {1000 * seconds[-1]:.0f} ms", flush=True)
    found = []
    print(f"{'':24}{'':6}{'ms':>8}{'ratio':>8}  {'in rounds':32}{'operations':>12}")
    for (name, precision), seconds in turns.items():
        ratios = [mine / base for mine, base in zip(seconds, turns["separate", precision], strict=True)]
        row = {"name": name, "precision": precision, "ms": 1000 * statistics.median(seconds)}
        row |= {"ratio": statistics.median(ratios), "operations": operations[name]}
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        count = operations[name] if precision == "bf16" else ""
        print(f"{name:24}{precision:6}{row['ms']:8.0f}{row['ratio']:8.2f}  {shown:32}{count:>12}")
        found.append(row)
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
