"""A search by Optuna for learning rate, its warm-up, weight decay and head, guided by earlier trials.

    python -m orchestrator sweep lr_search
    python -m orchestrator sweep lr_search --base dino_vits16 data.source=/path/to/imagenet pretrain.epochs=100

Twelve configurations; results guide those after the first five. The width of the head's hidden layers is searched for
only where there are any. `sweep.objectives=eval/knn_top1:max,cost/device_hours:min` looks for the best trade-offs.
"""

from __future__ import annotations

from orchestrator.space import LogUniform, Uniform
from orchestrator.sweep import Sweep

_LAYERS, _WIDTH = "pretrain.head.num_layers", "pretrain.head.hidden_dim"

SWEEP = Sweep(
    base="quickstart",
    design="optuna",
    num_trials=12,
    num_startup_trials=5,
    space={
        "pretrain.optim.lr": LogUniform(1e-4, 5e-3),
        "pretrain.optim.warmup_epochs": Uniform(0.0, 5.0),
        "pretrain.optim.weight_decay": LogUniform(1e-3, 0.2),
        _LAYERS: [1, 2, 3],
        _WIDTH: [128, 256, 512],
    },
    conditions={_WIDTH: {_LAYERS: [2, 3]}},
)
