"""Momentum schedule of the teacher: where it begins and where it ends.

    python -m orchestrator sweep momentum_schedule
    python -m orchestrator sweep momentum_schedule --base dino_vits16 data.source=/path/to/imagenet pretrain.epochs=100

Paper: arXiv 2104.14294 goes from 0.996 to 1 by a cosine and sweeps neither. An end of 1 leaves the teacher where it is
in the last steps; a run as short as the quickstart's must end below.
"""

from __future__ import annotations

from orchestrator.sweep import Sweep

SWEEP = Sweep(
    base="quickstart",
    space={
        "pretrain.teacher.momentum": [0.97, 0.99, 0.996],
        "pretrain.teacher.final_momentum": [0.996, 0.999, 1.0],
    },
)
