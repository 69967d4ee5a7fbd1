"""Number of prototypes K, from 1024 to 262144: the width of the head's last layer.

    python -m orchestrator sweep prototypes --base cifar10_tiny data.source=cifar10.parquet pretrain.epochs=1
    python -m orchestrator sweep prototypes data.source=/path/to/imagenet pretrain.epochs=100

Paper: arXiv 2104.14294, appendix C: k-NN of ViT-S/16. The table tells no epochs; its 69.7 % at 65536 is that of the
100-epoch runs in the tables beside it.
Cost there: about a day on 16 GPUs for each row (table 8). The values are the paper's own on every base: 262144
prototypes need gigabytes of memory even beside a tiny backbone.
"""

from __future__ import annotations

from orchestrator.sweep import Row, Sweep

_KEY = "pretrain.head.num_prototypes"

SWEEP = Sweep(
    base="dino_vits16",
    paper_setting="ImageNet-1k, ViT-S/16, 100 epochs (arXiv 2104.14294, appendix C)",
    rows={
        "K_1024": Row(changes={_KEY: 1024}, paper={"eval/knn_top1": 67.8}),
        "K_4096": Row(changes={_KEY: 4096}, paper={"eval/knn_top1": 69.3}),
        "K_16384": Row(changes={_KEY: 16384}, paper={"eval/knn_top1": 69.2}),
        "K_65536": Row(changes={_KEY: 65536}, paper={"eval/knn_top1": 69.7}),
        "K_262144": Row(changes={_KEY: 262144}, paper={"eval/knn_top1": 69.1}),
    },
)
