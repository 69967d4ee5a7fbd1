"""Teacher temperature and momentum on the embedded digits: four trials in a few minutes, to see an ablation work.

    python -m orchestrator sweep quickstart

Expected: every trial beats random weights clearly and none collapses (its teacher entropy stays away from 0 and ln K).
"""

from __future__ import annotations

from orchestrator.sweep import Sweep

SWEEP = Sweep(
    base="quickstart",
    space={
        "pretrain.teacher.temp": [0.04, 0.07],
        "pretrain.teacher.momentum": [0.99, 0.996],
    },
)
