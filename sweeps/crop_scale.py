"""The share s of an image's area that divides local crops (0.05 to s) from global ones (s to 1).

    python -m orchestrator sweep crop_scale
    python -m orchestrator sweep crop_scale --base dino_vits16 data.source=/path/to/imagenet pretrain.epochs=100 \\
        pretrain.crops.num_local_crops=6

Paper: arXiv 2104.14294, appendix E: k-NN of ViT-S/16 with 6 local crops. The table tells no epochs; its best is that of
the 100-epoch runs of the other tables.
Cost there: 20.3 hours on 16 GPUs for each row (table 8, 100 epochs).
"""

from __future__ import annotations

from orchestrator.sweep import Row, Sweep

_GLOBAL, _LOCAL = "pretrain.crops.global_scale", "pretrain.crops.local_scale"

SWEEP = Sweep(
    base="quickstart",
    paper_setting="ImageNet-1k, ViT-S/16, 100 epochs, 6 local crops (arXiv 2104.14294, appendix E)",
    rows={
        f"s_{s}": Row(changes={_GLOBAL: (s, 1.0), _LOCAL: (0.05, s)}, paper={"eval/knn_top1": knn})
        for s, knn in ((0.08, 65.6), (0.16, 68.0), (0.24, 69.7), (0.32, 69.8), (0.48, 69.5))
    },
)
