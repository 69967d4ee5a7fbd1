"""Population-based training (arXiv 1711.09846) of learning rate, teacher's temperature and momentum.

    python -m orchestrator sweep population
    python -m orchestrator sweep population --base dino_vits16 data.source=/path/to/imagenet pretrain.epochs=100 \
        sweep.generation_steps=25100

Six members; after every 100 of 500 steps the last two go on from the weights of one of the first two, with settings
near theirs. Each member trains in one process, on one GPU if it has any. Costs what six whole runs cost, and their
checkpoints twice.
"""

from __future__ import annotations

from orchestrator.space import LogUniform, Uniform
from orchestrator.sweep import Sweep

SWEEP = Sweep(
    base="quickstart",
    design="qmc",
    num_trials=6,
    scheduler="pbt",
    generation_steps=100,
    space={
        "pretrain.optim.lr": LogUniform(3e-4, 1e-2),
        "pretrain.teacher.temp": Uniform(0.03, 0.1),
        "pretrain.teacher.momentum": Uniform(0.95, 0.999),
    },
    # The momentum that a member has is then that of its steps, and not where a cosine would begin.
    changes={"pretrain.teacher.momentum_schedule": "constant", "cluster.num_workers": 1},
)
