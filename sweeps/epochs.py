"""Length of training, from 100 to 800 epochs: how far the short runs of other sweeps are from the end.

    python -m orchestrator sweep epochs --base cifar10_tiny data.source=cifar10.parquet
    python -m orchestrator sweep epochs data.source=/path/to/imagenet

Paper: arXiv 2104.14294, appendix D: k-NN of ViT-S/16.
Cost there: 24.2 hours on 16 GPUs for 100 epochs with 10 local crops, 72.6 hours for 300 (table 8).
"""

from __future__ import annotations

from orchestrator.sweep import Row, Sweep

_KEY = "pretrain.epochs"

SWEEP = Sweep(
    base="dino_vits16",
    paper_setting="ImageNet-1k, ViT-S/16 (arXiv 2104.14294, appendix D)",
    rows={
        "epochs_100": Row(changes={_KEY: 100}, paper={"eval/knn_top1": 70.9}),
        "epochs_300": Row(changes={_KEY: 300}, paper={"eval/knn_top1": 72.8}),
        "epochs_800": Row(changes={_KEY: 800}, paper={"eval/knn_top1": 74.5}),
    },
)
