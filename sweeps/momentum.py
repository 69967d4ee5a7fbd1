"""Momentum of the teacher at the first step, from fast to slow; it rises to 1 by a cosine in each trial.

    python -m orchestrator sweep momentum
    python -m orchestrator sweep momentum --base dino_vits16 data.source=/path/to/imagenet pretrain.epochs=100

Paper (arXiv 2104.14294): uses 0.996 and sweeps no other number; a teacher that copies the student at every step
collapses (0.1 % k-NN instead of 72.8 %). The authors advise 0.9995 for batches of 256.
"""

from __future__ import annotations

from orchestrator.sweep import Sweep

SWEEP = Sweep(
    base="quickstart",
    space={"pretrain.teacher.momentum": [0.9, 0.99, 0.996, 0.9995]},
)
