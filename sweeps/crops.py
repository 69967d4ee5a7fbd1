"""Number of local crops, from none to ten: what multi-crop is worth beside what it costs.

    python -m orchestrator sweep crops
    python -m orchestrator sweep crops --base dino_vits16 data.source=/path/to/imagenet pretrain.epochs=100

Paper (arXiv 2104.14294, table 8): ImageNet top-1 of ViT-S/16 after 100 epochs and the time for it on 16 GPUs: 67.8 %
and 15.3 h with none, 71.5 % and 17.0 h with 2, 73.8 % and 20.3 h with 6, 74.6 % and 24.2 h with 10.
"""

from __future__ import annotations

from orchestrator.sweep import Sweep

SWEEP = Sweep(
    base="quickstart",
    space={"pretrain.crops.num_local_crops": [0, 2, 6, 10]},
)
