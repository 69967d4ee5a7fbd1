"""Centring without sharpening, sharpening without centring, and both: the two ways to collapse, on purpose.

    python -m orchestrator sweep collapse
    python -m orchestrator sweep collapse --base dino_vits16 data.source=/path/to/imagenet

Paper: arXiv 2104.14294, figure 7: KL between teacher and student falls to 0 when one of the two is missing; without
centring the teacher's entropy falls to 0 too, without sharpening it rises to ln K.
Cost there: not given; the collapse shows early in the run.
"""

from __future__ import annotations

from orchestrator.sweep import Row, Sweep

_CENTERING, _SHARPENING = "pretrain.teacher.centering", "pretrain.teacher.sharpening"

SWEEP = Sweep(
    base="quickstart",
    paper_setting="ImageNet-1k, ViT-S/16, what the curves converge to (arXiv 2104.14294, figure 7)",
    rows={
        "both": Row(changes={_CENTERING: "center", _SHARPENING: "softmax"}),
        "no_centering": Row(
            changes={_CENTERING: "none", _SHARPENING: "softmax"},
            paper={"train/kl": 0.0, "train/teacher_entropy": 0.0},
        ),
        "no_sharpening": Row(changes={_CENTERING: "center", _SHARPENING: "none"}, paper={"train/kl": 0.0}),
    },
)
