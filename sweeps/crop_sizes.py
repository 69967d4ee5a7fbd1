"""Sizes of global and local crops, one at a time around the base: what fewer pixels save and cost.

    python -m orchestrator sweep crop_sizes data.source=/path/to/imagenet pretrain.epochs=100 --seeds 2

Paper: arXiv 2104.14294 has 224 and 96 pixels throughout and sweeps neither. A step's time goes about with the number of
pixels. The sizes are absolute and multiples of 16, so that patches of 8 and 16 pixels divide them; the base itself is
one of the trials.
"""

from __future__ import annotations

from orchestrator.sweep import Sweep

SWEEP = Sweep(
    base="dino_vits16",
    design="one_at_a_time",
    space={
        "pretrain.crops.global_size": [160, 192, 224],
        "pretrain.crops.local_size": [64, 96, 128],
    },
)
