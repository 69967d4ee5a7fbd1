"""Constant teacher temperatures, from sharp to so soft that the paper's run collapses.

    python -m orchestrator sweep temperature
    python -m orchestrator sweep temperature --base dino_vits16 data.source=/path/to/imagenet pretrain.epochs=100

Paper (arXiv 2104.14294, appendix): k-NN on ImageNet of ViT-S/16 after 100 epochs is 66.7 % at 0.02, 69.6 % at 0.04,
68.7 % at 0.06 and 0.1 % (collapsed) at 0.08; 69.7 % when it rises from 0.04 to 0.07.
"""

from __future__ import annotations

from orchestrator.sweep import Sweep

SWEEP = Sweep(
    base="quickstart",
    changes={"pretrain.teacher.warmup_temp_epochs": 0},  # constant, as in the paper's table
    space={"pretrain.teacher.temp": [0.02, 0.04, 0.06, 0.08]},
)
