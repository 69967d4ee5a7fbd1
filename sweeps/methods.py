"""MoCo v2, BYOL, SwAV and DINO under one recipe on a ViT: the same data, backbone, optimiser and schedule.

    python -m orchestrator sweep methods
    python -m orchestrator sweep methods --base dino_vits16 data.source=/path/to/imagenet \\
        pretrain.crops.num_local_crops=10

Paper: arXiv 2104.14294, table 13, the columns of ViT-S/16 (`methods_resnet50` has those of ResNet-50): 300 epochs, SwAV
and DINO with multi-crop.
Cost there: 45.9 hours on 16 GPUs for a row without multi-crop, 60.9 hours with 6 local crops, 72.6 with 10 (table 8).
The methods bring the temperatures and momenta of their papers; 500 quick steps are too few for the slow teachers of
BYOL and MoCo v2.
"""

from __future__ import annotations

from orchestrator.sweep import Row, Sweep

SWEEP = Sweep(
    base="quickstart",
    paper_setting="ImageNet-1k, ViT-S/16, 300 epochs (arXiv 2104.14294, table 13)",
    rows={
        "moco_v2": Row(method="moco_v2", paper={"eval/knn_top1": 62.0, "eval/linear_top1": 71.6}),
        "byol": Row(method="byol", paper={"eval/knn_top1": 66.6, "eval/linear_top1": 71.4}),
        "swav": Row(method="swav", paper={"eval/knn_top1": 64.7, "eval/linear_top1": 71.8}),
        "dino": Row(method="dino", paper={"eval/knn_top1": 72.8, "eval/linear_top1": 76.1}),
    },
)
