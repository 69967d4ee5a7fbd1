"""Population-based training (arXiv 1711.09846) of learning rate, teacher's temperature and momentum.

    python -m orchestrator sweep population
    python -m orchestrator sweep population --base dino_vits16 data.source=/path/to/imagenet pretrain.epochs=100 \
        sweep.generation_steps=25100

Six members; after every 40 of 200 steps the last two go on from the weights of one of the first two, with settings near
theirs. Costs what six whole runs cost, and their checkpoints twice.
"""

from __future__ import annotations

from orchestrator.space import LogUniform, Uniform
from orchestrator.sweep import Sweep

SWEEP = Sweep(
    base="quickstart",
    design="qmc",
    num_trials=6,
    scheduler="pbt",
    generation_steps=40,
    space={
        "pretrain.optim.lr": LogUniform(3e-4, 1e-2),
        "pretrain.teacher.temp": Uniform(0.03, 0.1),
        "pretrain.teacher.momentum": Uniform(0.95, 0.999),
    },
    # The momentum that a member has is then that of its steps, and not where a cosine would begin.
    changes={"pretrain.steps": 200, "pretrain.teacher.momentum_schedule": "constant"},
)
