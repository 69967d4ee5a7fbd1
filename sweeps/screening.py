"""Five settings at two values each in 8 trials instead of 32: which of them matter at all.

    python -m orchestrator sweep screening --seeds 3
    python -m orchestrator sweep screening --base dino_vits16 data.source=/path/to/imagenet pretrain.epochs=100

A fractional factorial design (Box, Hunter and Hunter). The interactions of the teacher's temperature with the student's
and with the momentum are named, so they are kept apart from every main effect and from each other; `--dry-run` prints
what else is aliased.
"""

from __future__ import annotations

from orchestrator.sweep import Sweep

_TEMP, _STUDENT, _MOMENTUM = "pretrain.teacher.temp", "pretrain.student.temp", "pretrain.teacher.momentum"

SWEEP = Sweep(
    base="quickstart",
    design="fractional_factorial",
    interactions=[(_TEMP, _STUDENT), (_TEMP, _MOMENTUM)],
    space={
        _TEMP: [0.04, 0.07],
        _STUDENT: [0.1, 0.2],
        _MOMENTUM: [0.99, 0.996],
        "pretrain.optim.lr": [5e-4, 1e-3],
        "pretrain.crops.num_local_crops": [2, 4],
    },
)
