"""Multi-crop in four methods, each without and with six local crops: it helps all but BYOL.

    python -m orchestrator sweep multi_crop
    python -m orchestrator sweep multi_crop --base dino_vits16 data.source=/path/to/imagenet

Paper: arXiv 2104.14294, appendix E: ViT-S/16 after 300 epochs, 2 x 224 pixels against 2 x 224 + 6 x 96. BYOL with
multi-crop is ahead at first and declines later, so a short run shows another order.
Cost there: 45.9 hours on 16 GPUs without, 60.9 hours with local crops (DINO, table 8).
"""

from __future__ import annotations

from orchestrator.sweep import Row, Sweep

_NONE = {"pretrain.crops.num_local_crops": 0}
_SIX = {"pretrain.crops.num_local_crops": 6}

SWEEP = Sweep(
    base="quickstart",
    paper_setting="ImageNet-1k, ViT-S/16, 300 epochs (arXiv 2104.14294, appendix E)",
    rows={
        "byol": Row(method="byol", changes=_NONE, paper={"eval/knn_top1": 66.6, "eval/linear_top1": 71.4}),
        "byol_local_6": Row(method="byol", changes=_SIX, paper={"eval/knn_top1": 59.8, "eval/linear_top1": 64.8}),
        "swav": Row(method="swav", changes=_NONE, paper={"eval/knn_top1": 60.5, "eval/linear_top1": 68.5}),
        "swav_local_6": Row(method="swav", changes=_SIX, paper={"eval/knn_top1": 64.7, "eval/linear_top1": 71.8}),
        "moco_v2": Row(method="moco_v2", changes=_NONE, paper={"eval/knn_top1": 62.0, "eval/linear_top1": 71.6}),
        "moco_v2_local_6": Row(method="moco_v2", changes=_SIX, paper={"eval/knn_top1": 65.4, "eval/linear_top1": 73.4}),
        "dino": Row(method="dino", changes=_NONE, paper={"eval/knn_top1": 67.9, "eval/linear_top1": 72.5}),
        "dino_local_6": Row(method="dino", changes=_SIX, paper={"eval/knn_top1": 72.7, "eval/linear_top1": 75.9}),
    },
)
