"""iBOT turned into DINOv2 piece by piece, each row with all that the rows above it changed.

    python -m orchestrator sweep dinov2_components data.source=/path/to/imagenet

Paper: arXiv 2304.07193, table 1: ViT-L, pre-trained on ImageNet-22k, evaluated on ImageNet-1k. Here a ViT-S on
ImageNet-1k; `pretrain.model.backbone=vit_large_patch16_224` makes it theirs. `dinov2_components_digits` is the same at
the size of the digits.
Cost there: not given for each row; the last is about `dinov2_vitl14`, 3.3 days on 96 GPUs.
Two rows of the table say little of what they change. The reproduction is read as what DINOv2's code does otherwise
than iBOT's: mask sampler, centre, clipping, freezing and blur. The warm-ups are the shares of the run that DINOv2's
large configuration gives them, 80 and 30 of 500 epochs, here of 300.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.sweep import Row, Sweep

PAPER = {
    "ibot": (72.9, 82.3),
    "reproduction": (74.5, 83.2),
    "layer_scale_depth": (75.4, 82.0),
    "prototypes": (76.6, 81.9),
    "koleo": (78.9, 82.5),
    "swiglu": (78.7, 83.1),
    "patch_size": (78.9, 83.5),
    "teacher_momentum": (79.4, 83.6),
    "warm_ups": (80.5, 83.8),
    "batch_size": (81.7, 84.7),
    "sinkhorn_knopp": (81.7, 84.7),
    "untied_heads": (82.0, 84.5),
}
"""k-NN and linear probe of each row of the table."""

SETTING = "ImageNet-22k, ViT-L, evaluated on ImageNet-1k (arXiv 2304.07193, table 1)"

REPRODUCTION = {
    "pretrain.mask.sampler": "dinov2",
    "pretrain.ibot.center_over": "masked",
    "pretrain.optim.clip_mode": "module",
    "pretrain.optim.freeze_last_layer_by": "lr",
    "pretrain.crops.invert_blur_prob": True,
}


def additive(steps: Mapping[str, Mapping[str, Any]]) -> dict[str, Row]:
    """Rows of iBOT, each with its own changes and those of all before it."""
    rows, changes = {}, dict[str, Any]()
    for name, more in steps.items():
        changes = {**changes, **more}
        knn, linear = PAPER[name]
        rows[name] = Row(method="ibot", changes=changes, paper={"eval/knn_top1": knn, "eval/linear_top1": linear})
    return rows


SWEEP = Sweep(
    base="dino_vits16",
    paper_setting=SETTING,
    rows=additive(
        {
            "ibot": {},
            "reproduction": REPRODUCTION,
            "layer_scale_depth": {
                "pretrain.model.layer_scale": 1e-5,
                "pretrain.model.drop_path": 0.4,
                "pretrain.model.drop_path_schedule": "uniform",
            },
            "prototypes": {"pretrain.head.num_prototypes": 131_072},
            "koleo": {"pretrain.loss.koleo_weight": 0.1, "pretrain.loss.koleo_group_size": 32},
            "swiglu": {"pretrain.model.swiglu": True},
            "patch_size": {"pretrain.model.patch_size": 14, "pretrain.crops.local_size": 98},
            "teacher_momentum": {"pretrain.teacher.momentum": 0.994},
            "warm_ups": {"pretrain.optim.warmup_epochs": 48.0, "pretrain.teacher.warmup_temp_epochs": 18.0},
            "batch_size": {"pretrain.batch_size": 3072},
            "sinkhorn_knopp": {"pretrain.teacher.centering": "sinkhorn_knopp"},
            "untied_heads": {"pretrain.ibot.head": "untied"},
        }
    ),
)
