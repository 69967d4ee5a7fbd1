"""MoCo v2, BYOL, SwAV and DINO under one recipe on a ResNet-50, for comparison with the ViT of `methods`.

    python -m orchestrator sweep methods_resnet50 --base quickstart pretrain.steps=50
    python -m orchestrator sweep methods_resnet50 data.source=/path/to/imagenet pretrain.epochs=300

Paper: arXiv 2104.14294, table 13, the columns of ResNet-50: 300 epochs. The quick look has the quickstart's small ViT
and shows only that the rows run.
Cost there: not given.
"""

from __future__ import annotations

from orchestrator.sweep import Row, Sweep

SWEEP = Sweep(
    base="dino_resnet50",
    paper_setting="ImageNet-1k, ResNet-50, 300 epochs (arXiv 2104.14294, table 13)",
    rows={
        "moco_v2": Row(method="moco_v2", paper={"eval/knn_top1": 62.9, "eval/linear_top1": 71.1}),
        "byol": Row(method="byol", paper={"eval/knn_top1": 65.4, "eval/linear_top1": 72.7}),
        "swav": Row(method="swav", paper={"eval/knn_top1": 65.4, "eval/linear_top1": 74.1}),
        "dino": Row(method="dino", paper={"eval/knn_top1": 65.6, "eval/linear_top1": 74.5}),
    },
)
