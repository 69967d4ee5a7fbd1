"""Momentum of the centre, from none to so slow that the paper's run collapses.

    python -m orchestrator sweep center_momentum
    python -m orchestrator sweep center_momentum --base dino_vits16 data.source=/path/to/imagenet pretrain.epochs=100

Paper: arXiv 2104.14294, appendix D: k-NN of ViT-S/16. The table tells no epochs; its 69.7 % at 0.9 is that of the
100-epoch runs of the other tables.
Cost there: about a day on 16 GPUs for each row (table 8).
"""

from __future__ import annotations

from orchestrator.sweep import Row, Sweep

_KEY = "pretrain.teacher.center_momentum"

SWEEP = Sweep(
    base="quickstart",
    paper_setting="ImageNet-1k, ViT-S/16, 100 epochs (arXiv 2104.14294, appendix D)",
    rows={
        "m_0": Row(changes={_KEY: 0.0}, paper={"eval/knn_top1": 69.1}),
        "m_0.9": Row(changes={_KEY: 0.9}, paper={"eval/knn_top1": 69.7}),
        "m_0.99": Row(changes={_KEY: 0.99}, paper={"eval/knn_top1": 69.4}),
        "m_0.999": Row(changes={_KEY: 0.999}, paper={"eval/knn_top1": 0.1}),
    },
)
