"""What keeps DINO from collapse, taken away piece by piece: the rows that collapse in the paper, and their cure.

    python -m orchestrator sweep collapse
    python -m orchestrator sweep collapse --base dino_vits16 data.source=/path/to/imagenet pretrain.epochs=100

Paper: arXiv 2104.14294, figure 7 (centring without sharpening and the reverse: the KL between teacher and student falls
to 0), table 7 and figure 6 (teacher), table 15 (operators that do without a momentum teacher), and the appendix's
sweeps of centre momentum and teacher temperature; 0.1 % is chance. Their settings differ in length and crops.
Cost there: not given; a collapse shows early in the run.
`docs/diagnosis.md` shows what the rows come to on the digits.
"""

from __future__ import annotations

from orchestrator.sweep import Row, Sweep

_CENTERING, _SHARPENING = "pretrain.teacher.centering", "pretrain.teacher.sharpening"
_UPDATE = "pretrain.teacher.update"
_CHANCE = {"eval/knn_top1": 0.1}

SWEEP = Sweep(
    base="quickstart",
    paper_setting="ImageNet-1k, ViT-S/16, each row as in its table or figure (arXiv 2104.14294)",
    rows={
        "both": Row(paper={"eval/knn_top1": 72.8}),
        "no_centering": Row(changes={_CENTERING: "none"}, paper={"train/kl": 0.0, "train/teacher_entropy": 0.0}),
        "no_sharpening": Row(changes={_SHARPENING: "none"}, paper={"train/kl": 0.0}),
        "student_copy": Row(changes={_UPDATE: "student_copy"}, paper=_CHANCE),
        "previous_step": Row(changes={_UPDATE: "previous_step"}, paper=_CHANCE),
        "student_copy_softmax": Row(
            changes={_UPDATE: "student_copy", _CENTERING: "softmax"}, paper={"eval/linear_top1": 72.2}
        ),
        "student_copy_sinkhorn": Row(
            changes={_UPDATE: "student_copy", _CENTERING: "sinkhorn_knopp"}, paper={"eval/linear_top1": 71.8}
        ),
        "center_momentum_0.999": Row(changes={"pretrain.teacher.center_momentum": 0.999}, paper=_CHANCE),
        "temp_0.08": Row(
            changes={"pretrain.teacher.temp": 0.08, "pretrain.teacher.warmup_temp_epochs": 0}, paper=_CHANCE
        ),
    },
)
