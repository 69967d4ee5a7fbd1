"""Momentum of the teacher at the first step, from fast to slow; it goes on to the base's final momentum by a cosine.

    python -m orchestrator sweep momentum
    python -m orchestrator sweep momentum --base dino_vits16 data.source=/path/to/imagenet pretrain.epochs=100

That is 1 in dino_vits16, as in the paper, and 0.996 in quickstart, whose 500 steps are too few for 1.

Paper (arXiv 2104.14294): uses 0.996 and sweeps no other number; a teacher that copies the student at every step
collapses (0.1 % k-NN instead of 72.8 %). The authors advise 0.9995 for batches of 256.
"""

from __future__ import annotations

from orchestrator.sweep import Sweep

SWEEP = Sweep(
    base="quickstart",
    space={"pretrain.teacher.momentum": [0.9, 0.99, 0.996, 0.9995]},
)
