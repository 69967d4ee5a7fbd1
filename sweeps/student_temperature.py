"""Student temperature beside the teacher's: their ratio decides how much sharper the targets are.

    python -m orchestrator sweep student_temperature
    python -m orchestrator sweep student_temperature --base dino_vits16 data.source=/path/to/imagenet \\
        pretrain.epochs=100

Paper: arXiv 2104.14294 has 0.1 everywhere and sweeps the teacher's alone (`temperature`); the quickstart has 0.2.
"""

from __future__ import annotations

from orchestrator.sweep import Sweep

SWEEP = Sweep(
    base="quickstart",
    changes={"pretrain.teacher.warmup_temp_epochs": 0},  # constant, so that the ratio is too
    space={
        "pretrain.teacher.temp": [0.04, 0.07],
        "pretrain.student.temp": [0.1, 0.2, 0.4],
    },
)
