"""Ten steps between DINO, MoCo v2 and BYOL: loss, multi-crop, centring, batch norm in the head, predictor.

    python -m orchestrator sweep byol_moco
    python -m orchestrator sweep byol_moco --base dino_vits16 data.source=/path/to/imagenet \\
        pretrain.crops.num_local_crops=10

Paper: arXiv 2104.14294, table 14: linear top-1 of ViT-S/16 after 300 epochs. MSE is on L2-normalised outputs, without
sharpening. The rows with centring have DINO's head (row 9 is row 4 with MSE), the others that of their method, without
prototypes. Multi-crop of MoCo v2 and BYOL is 6 local crops (appendix E), that of DINO the base's number.
Cost there: 45.9 hours on 16 GPUs for a row without multi-crop, 60.9 hours with 6 local crops, 72.6 with 10 (table 8).
Batch norm is set in every row, as it is a column of the table: rows 1 to 4 and 9 have none, and without it a network as
small as the quickstart's tends to collapse.
"""

from __future__ import annotations

from orchestrator.sweep import Row, Sweep

_PLAIN = {"pretrain.head.batch_norm": False}
_GLOBAL_ONLY = {"pretrain.crops.num_local_crops": 0}
_SIX_LOCAL = {"pretrain.crops.num_local_crops": 6}

SWEEP = Sweep(
    base="quickstart",
    paper_setting="ImageNet-1k, ViT-S/16, 300 epochs (arXiv 2104.14294, table 14)",
    rows={
        "dino": Row(changes=_PLAIN, paper={"eval/linear_top1": 76.1}),
        "dino_mse": Row(changes=_PLAIN | {"pretrain.loss.name": "mse"}, paper={"eval/linear_top1": 62.4}),
        "dino_predictor": Row(
            changes=_PLAIN | {"pretrain.predictor.num_layers": 2, "pretrain.predictor.batch_norm": False},
            paper={"eval/linear_top1": 75.6},
        ),
        "dino_global": Row(changes=_PLAIN | _GLOBAL_ONLY, paper={"eval/linear_top1": 72.5}),
        "moco_v2": Row(method="moco_v2", paper={"eval/linear_top1": 71.4}),
        "moco_v2_multi_crop": Row(method="moco_v2", changes=_SIX_LOCAL, paper={"eval/linear_top1": 73.4}),
        "byol": Row(method="byol", paper={"eval/linear_top1": 71.4}),
        "byol_no_predictor": Row(
            method="byol", changes={"pretrain.predictor.num_layers": 0}, paper={"eval/linear_top1": 0.1}
        ),
        "mse_center": Row(
            changes=_PLAIN | _GLOBAL_ONLY | {"pretrain.loss.name": "mse"}, paper={"eval/linear_top1": 52.6}
        ),
        "byol_multi_crop": Row(method="byol", changes=_SIX_LOCAL, paper={"eval/linear_top1": 64.8}),
    },
)
