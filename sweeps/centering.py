"""Momentum teacher or copy of the student, each with a centre, a softmax over the batch, or Sinkhorn-Knopp.

    python -m orchestrator sweep centering
    python -m orchestrator sweep centering --base dino_vits16 data.source=/path/to/imagenet \\
        pretrain.crops.num_local_crops=10

Paper: arXiv 2104.14294, table 15: linear top-1 of ViT-S/16 after 300 epochs; k-NN numbers are those of the same runs in
table 7. The copy of the student gets no gradient; with Sinkhorn-Knopp it is what table 7 calls SwAV. Only the first
operator has a centre.
Cost there: 72.6 hours on 16 GPUs for each row (table 8, 10 local crops).
"""

from __future__ import annotations

from orchestrator.sweep import Row, Sweep

_UPDATE, _CENTERING = "pretrain.teacher.update", "pretrain.teacher.centering"

SWEEP = Sweep(
    base="quickstart",
    paper_setting="ImageNet-1k, ViT-S/16, 300 epochs (arXiv 2104.14294, table 15)",
    rows={
        "ema_center": Row(
            changes={_UPDATE: "ema", _CENTERING: "center"},
            paper={"eval/knn_top1": 72.8, "eval/linear_top1": 76.1},
        ),
        "ema_softmax": Row(
            changes={_UPDATE: "ema", _CENTERING: "softmax"},
            paper={"eval/linear_top1": 75.8},
        ),
        "ema_sinkhorn_knopp": Row(
            changes={_UPDATE: "ema", _CENTERING: "sinkhorn_knopp"},
            paper={"eval/knn_top1": 72.2, "eval/linear_top1": 76.0},
        ),
        "copy_center": Row(
            changes={_UPDATE: "student_copy", _CENTERING: "center"},
            paper={"eval/knn_top1": 0.1, "eval/linear_top1": 0.1},
        ),
        "copy_softmax": Row(
            changes={_UPDATE: "student_copy", _CENTERING: "softmax"},
            paper={"eval/linear_top1": 72.2},
        ),
        "copy_sinkhorn_knopp": Row(
            changes={_UPDATE: "student_copy", _CENTERING: "sinkhorn_knopp"},
            paper={"eval/knn_top1": 64.7, "eval/linear_top1": 71.8},
        ),
    },
)
