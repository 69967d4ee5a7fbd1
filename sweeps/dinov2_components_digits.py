"""`dinov2_components` at the size of the digits: iBOT turned into DINOv2, each row on top of those above it.

    python -m orchestrator sweep dinov2_components_digits
    python -m orchestrator sweep dinov2_components data.source=/path/to/imagenet    # dino_vits16, the paper's sizes

Paper: arXiv 2304.07193, table 1, whose numbers are of ViT-L on ImageNet-22k and say nothing about digits.
Cost there: not given for each row.
Sizes are those of the table divided: twice the prototypes, half the patch size, twice the batch. Of 16 patches single
ones are masked, since a block would be a quarter of them. The quick look shows that every row runs and which pieces the
small network bears; one seed orders nothing.
"""

from __future__ import annotations

from orchestrator.sweep import Sweep
from sweeps.dinov2_components import REPRODUCTION, SETTING, additive

SWEEP = Sweep(
    base="quickstart",
    paper_setting=SETTING,
    rows=additive(
        {
            "ibot": {
                "pretrain.mask.shape": "random",
                "pretrain.ibot.temp": 0.04,
                "pretrain.ibot.center_over": "masked",
            },
            "reproduction": REPRODUCTION,
            "layer_scale_depth": {
                "pretrain.model.layer_scale": 0.1,
                "pretrain.model.drop_path": 0.1,
                "pretrain.model.drop_path_schedule": "uniform",
            },
            "prototypes": {"pretrain.head.num_prototypes": 512},
            "koleo": {"pretrain.loss.koleo_weight": 0.1, "pretrain.loss.koleo_group_size": 64},
            "swiglu": {"pretrain.model.swiglu": True},
            "patch_size": {"pretrain.model.patch_size": 2},
            "teacher_momentum": {"pretrain.teacher.momentum": 0.985},
            "warm_ups": {
                "pretrain.optim.warmup_epochs": 2.0,
                "pretrain.teacher.warmup_temp": 0.03,
                "pretrain.teacher.warmup_temp_epochs": 2.0,
            },
            "batch_size": {"pretrain.batch_size": 128},
            "sinkhorn_knopp": {"pretrain.teacher.centering": "sinkhorn_knopp"},
            "untied_heads": {"pretrain.ibot.head": "untied"},
        }
    ),
)
