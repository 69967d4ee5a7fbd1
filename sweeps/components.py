"""DINO with one part taken away, exchanged or added, beside BYOL, MoCo v2 and SwAV: what each part is worth.

    python -m orchestrator sweep components
    python -m orchestrator sweep components --base dino_vits16 data.source=/path/to/imagenet \\
        pretrain.crops.num_local_crops=10

Paper: arXiv 2104.14294, table 7: ViT-S/16, 300 epochs, 2 x 224 + 10 x 96 pixels where there is multi-crop (SwAV's
number is with 6 local crops, table of appendix E).
Cost there: 72.6 hours on 16 GPUs for a row with multi-crop, 45.9 hours without (table 8).
The methods bring the temperatures and momenta of their papers. The quick look shows that every row runs and which ones
collapse; its 500 steps are too few for a teacher whose momentum rises to 1.
"""

from __future__ import annotations

from orchestrator.sweep import Row, Sweep

SWEEP = Sweep(
    base="quickstart",
    paper_setting="ImageNet-1k, ViT-S/16, 300 epochs (arXiv 2104.14294, table 7)",
    rows={
        "dino": Row(paper={"eval/knn_top1": 72.8, "eval/linear_top1": 76.1}),
        "no_momentum": Row(
            changes={"pretrain.teacher.update": "student_copy"},
            paper={"eval/knn_top1": 0.1, "eval/linear_top1": 0.1},
        ),
        "sinkhorn_knopp": Row(
            changes={"pretrain.teacher.centering": "sinkhorn_knopp"},
            paper={"eval/knn_top1": 72.2, "eval/linear_top1": 76.0},
        ),
        "no_multi_crop": Row(
            changes={"pretrain.crops.num_local_crops": 0},
            paper={"eval/knn_top1": 67.9, "eval/linear_top1": 72.5},
        ),
        # On L2-normalised outputs, without sharpening; the centre stays.
        "mse": Row(
            changes={"pretrain.loss.name": "mse"},
            paper={"eval/knn_top1": 52.6, "eval/linear_top1": 62.4},
        ),
        # Without batch norm, as everything else of DINO.
        "predictor": Row(
            changes={"pretrain.predictor.num_layers": 2, "pretrain.predictor.batch_norm": False},
            paper={"eval/knn_top1": 71.8, "eval/linear_top1": 75.6},
        ),
        "byol": Row(method="byol", paper={"eval/knn_top1": 66.6, "eval/linear_top1": 71.4}),
        "moco_v2": Row(method="moco_v2", paper={"eval/knn_top1": 62.0, "eval/linear_top1": 71.6}),
        "swav": Row(method="swav", paper={"eval/knn_top1": 64.7, "eval/linear_top1": 71.8}),
    },
)
