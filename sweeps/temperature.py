"""Teacher temperatures, from hard targets to so soft that the paper's run collapses.

    python -m orchestrator sweep temperature
    python -m orchestrator sweep temperature --base dino_vits16 data.source=/path/to/imagenet pretrain.epochs=100

Paper: arXiv 2104.14294, appendix D: k-NN of ViT-S/16 after 100 epochs. Temperature 0 is the argmax. Temperatures are
constant but in the last row, where it rises from 0.04 to 0.07 over 30 epochs; a shorter run is the beginning of that.
Cost there: about a day on 16 GPUs for each row (table 8).
"""

from __future__ import annotations

from orchestrator.sweep import Row, Sweep

_KEY = "pretrain.teacher.temp"

SWEEP = Sweep(
    base="quickstart",
    changes={"pretrain.teacher.warmup_temp_epochs": 0},  # constant, as in the paper's table
    paper_setting="ImageNet-1k, ViT-S/16, 100 epochs (arXiv 2104.14294, appendix D)",
    rows={
        "argmax": Row(changes={"pretrain.teacher.sharpening": "argmax"}, paper={"eval/knn_top1": 43.9}),
        "temp_0.02": Row(changes={_KEY: 0.02}, paper={"eval/knn_top1": 66.7}),
        "temp_0.04": Row(changes={_KEY: 0.04}, paper={"eval/knn_top1": 69.6}),
        "temp_0.06": Row(changes={_KEY: 0.06}, paper={"eval/knn_top1": 68.7}),
        "temp_0.08": Row(changes={_KEY: 0.08}, paper={"eval/knn_top1": 0.1}),
        "temp_0.04_to_0.07": Row(
            changes={
                "pretrain.teacher.warmup_temp": 0.04,
                _KEY: 0.07,
                "pretrain.teacher.warmup_temp_epochs": 30,
            },
            paper={"eval/knn_top1": 69.7},
        ),
    },
)
