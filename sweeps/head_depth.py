"""Depth of the projection head with and without its L2-normalised bottleneck: deep heads need it.

    python -m orchestrator sweep head_depth --base quickstart
    python -m orchestrator sweep head_depth data.source=/path/to/imagenet pretrain.epochs=100

Paper: arXiv 2104.14294, appendix C: k-NN of ViT-S/16 after 100 epochs with 4096 prototypes.
Cost there: about a day on 16 GPUs for each row (table 8).
The paper counts all linear layers. With the bottleneck the prototypes are one of them, so that its n is here
`num_layers` + 1. Without it there is no narrow layer there, and n is `num_layers`: here the last one keeps the
bottleneck's width between the MLP and the prototypes but does not normalise it, which is near to that and not the same.
"""

from __future__ import annotations

from orchestrator.sweep import Row, Sweep

_LAYERS, _NORM = "pretrain.head.num_layers", "pretrain.head.bottleneck_norm"

SWEEP = Sweep(
    base="dino_vits16",
    changes={"pretrain.head.num_prototypes": 4096},
    paper_setting="ImageNet-1k, ViT-S/16, 100 epochs, K = 4096 (arXiv 2104.14294, appendix C)",
    rows={
        "bottleneck_2": Row(changes={_LAYERS: 1, _NORM: True}, paper={"eval/knn_top1": 62.2}),
        "bottleneck_3": Row(changes={_LAYERS: 2, _NORM: True}, paper={"eval/knn_top1": 68.0}),
        "bottleneck_4": Row(changes={_LAYERS: 3, _NORM: True}, paper={"eval/knn_top1": 69.3}),
        "plain_1": Row(changes={_LAYERS: 1, _NORM: False}, paper={"eval/knn_top1": 61.6}),
        "plain_2": Row(changes={_LAYERS: 2, _NORM: False}, paper={"eval/knn_top1": 62.9}),
        "plain_3": Row(changes={_LAYERS: 3, _NORM: False}, paper={"eval/knn_top1": 0.1}),
        "plain_4": Row(changes={_LAYERS: 4, _NORM: False}, paper={"eval/knn_top1": 0.1}),
    },
)
