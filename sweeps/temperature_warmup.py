"""Warm-up of the teacher's temperature: none, or from a low start over a few or many epochs.

    python -m orchestrator sweep temperature_warmup
    python -m orchestrator sweep temperature_warmup --base dino_vits16 data.source=/path/to/imagenet pretrain.epochs=100

Paper: arXiv 2104.14294, appendix D: a rise from 0.04 to 0.07 over 30 epochs reaches 69.7 % k-NN, a constant 0.04
69.6 %; a constant temperature above 0.06 collapses. The start varies only where there is a warm-up, so that no trial
runs twice. Of a short run the warm-up is a larger part: the quickstart's 500 steps are 22 epochs.
"""

from __future__ import annotations

from orchestrator.sweep import Sweep

_EPOCHS, _START = "pretrain.teacher.warmup_temp_epochs", "pretrain.teacher.warmup_temp"

SWEEP = Sweep(
    base="quickstart",
    changes={"pretrain.teacher.temp": 0.07},
    space={_EPOCHS: [0, 5, 15], _START: [0.02, 0.04]},
    conditions={_START: {_EPOCHS: [5, 15]}},
)
