"""ViT-S and ViT-B with patches of 16 and 8 pixels: smaller patches cost time and are worth it.

    python -m orchestrator sweep backbone data.source=/path/to/imagenet pretrain.epochs=1
    python -m orchestrator sweep backbone data.source=/path/to/imagenet

Paper: arXiv 2104.14294, the released weights, whose numbers of epochs differ; its own comparison at 300 epochs
(figure 5) is a drawing without numbers. ResNet-50 has 67.5 % k-NN and 75.3 % linear, by the recipe dino_resnet50.
Cost there: images per second of a forward pass on a V100 are 1007 for ViT-S/16, 180 for S/8, 312 for B/16, 63 for B/8.
The rows change the base's timm model, so a base with sizes of its own (quickstart, cifar10_tiny) says little here.
"""

from __future__ import annotations

from orchestrator.sweep import Row, Sweep

_KEY, _NORM = "pretrain.model.backbone", "pretrain.head.norm_last_layer"

SWEEP = Sweep(
    base="dino_vits16",
    paper_setting="ImageNet-1k, released weights after different numbers of epochs (arXiv 2104.14294)",
    rows={
        "vits16": Row(
            changes={_KEY: "vit_small_patch16_224", _NORM: False},
            paper={"eval/knn_top1": 74.5, "eval/linear_top1": 77.0},
        ),
        "vits8": Row(
            changes={_KEY: "vit_small_patch8_224", _NORM: False},
            paper={"eval/knn_top1": 78.3, "eval/linear_top1": 79.7},
        ),
        # The authors advise prototypes of unit length for ViT-B.
        "vitb16": Row(
            changes={_KEY: "vit_base_patch16_224", _NORM: True},
            paper={"eval/knn_top1": 76.1, "eval/linear_top1": 78.2},
        ),
        "vitb8": Row(
            changes={_KEY: "vit_base_patch8_224", _NORM: True},
            paper={"eval/knn_top1": 77.4, "eval/linear_top1": 80.1},
        ),
    },
)
