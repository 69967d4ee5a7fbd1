"""Number of local crops, from none to ten: what multi-crop is worth beside what it costs.

    python -m orchestrator sweep crops
    python -m orchestrator sweep crops --base dino_vits16 data.source=/path/to/imagenet

Paper: arXiv 2104.14294, table 8: linear top-1, time on two machines of 8 GPUs and memory of a GPU for ViT-S/16 and
global crops of 224 pixels with local ones of 96. The k-NN numbers are those of the same runs in table 7 and appendix E;
there is none for 2 local crops.
Cost there: the column of hours. After 100 epochs (`pretrain.epochs=100`) table 8 has 67.8 % in 15.3 hours, 71.5 % in
17.0, 73.8 % in 20.3 and 74.6 % in 24.2.
"""

from __future__ import annotations

from orchestrator.sweep import Row, Sweep

_KEY = "pretrain.crops.num_local_crops"

SWEEP = Sweep(
    base="quickstart",
    paper_setting="ImageNet-1k, ViT-S/16, 300 epochs on 16 GPUs (arXiv 2104.14294, table 8)",
    rows={
        "local_0": Row(
            changes={_KEY: 0},
            paper={
                "eval/knn_top1": 67.9,
                "eval/linear_top1": 72.5,
                "cost/hours": 45.9,
                "cost/gpu_memory_gb": 9.3,
            },
        ),
        "local_2": Row(
            changes={_KEY: 2},
            paper={"eval/linear_top1": 74.5, "cost/hours": 51.0, "cost/gpu_memory_gb": 10.5},
        ),
        "local_6": Row(
            changes={_KEY: 6},
            paper={
                "eval/knn_top1": 72.7,
                "eval/linear_top1": 75.9,
                "cost/hours": 60.9,
                "cost/gpu_memory_gb": 12.9,
            },
        ),
        "local_10": Row(
            changes={_KEY: 10},
            paper={
                "eval/knn_top1": 72.8,
                "eval/linear_top1": 76.1,
                "cost/hours": 72.6,
                "cost/gpu_memory_gb": 15.4,
            },
        ),
    },
)
