"""Batch norm and activation of the projection head: a ViT needs no batch norm anywhere.

    python -m orchestrator sweep head
    python -m orchestrator sweep head --base dino_vits16 data.source=/path/to/imagenet pretrain.epochs=100

Paper: arXiv 2104.14294, appendix C: k-NN of ViT-S/16 after 100 epochs; the first row is the one of both tables.
Cost there: about a day on 16 GPUs for each row (table 8).
On the quickstart only the row with batch norm is known to learn: a network this small tends to collapse without.
"""

from __future__ import annotations

from orchestrator.sweep import Row, Sweep

_BATCH_NORM, _ACTIVATION = "pretrain.head.batch_norm", "pretrain.head.activation"

SWEEP = Sweep(
    base="quickstart",
    paper_setting="ImageNet-1k, ViT-S/16, 100 epochs (arXiv 2104.14294, appendix C)",
    rows={
        "gelu": Row(changes={_BATCH_NORM: False, _ACTIVATION: "gelu"}, paper={"eval/knn_top1": 69.7}),
        "gelu_batch_norm": Row(changes={_BATCH_NORM: True, _ACTIVATION: "gelu"}, paper={"eval/knn_top1": 68.6}),
        "relu": Row(changes={_BATCH_NORM: False, _ACTIVATION: "relu"}, paper={"eval/knn_top1": 68.9}),
    },
)
