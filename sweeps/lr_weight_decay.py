"""Learning rate times weight decay at the first step: the two are rarely best one by one.

    python -m orchestrator sweep lr_weight_decay
    python -m orchestrator sweep lr_weight_decay --base dino_vits16 data.source=/path/to/imagenet pretrain.epochs=100

Paper: arXiv 2104.14294 has 5e-4 at 256 images per step and a weight decay from 0.04 to 0.4, and prints no sweep. The
weight decay at the end stays the base's. `lr_search` draws from ranges instead.
"""

from __future__ import annotations

from orchestrator.sweep import Sweep

SWEEP = Sweep(
    base="quickstart",
    space={
        "pretrain.optim.lr": [2.5e-4, 5e-4, 1e-3],
        "pretrain.optim.weight_decay": [0.01, 0.04, 0.1],
    },
)
