"""Number of attention heads of ViT-S at the same width: more of them are better and a little slower.

    python -m orchestrator sweep attention_heads data.source=/path/to/imagenet pretrain.epochs=1
    python -m orchestrator sweep attention_heads data.source=/path/to/imagenet

Paper: arXiv 2104.14294, appendix D: k-NN of ViT-S/16 after 300 epochs.
Cost there: about three days on 16 GPUs for each row (table 8).
The numbers of heads must divide the backbone's width, 384 here.
"""

from __future__ import annotations

from orchestrator.sweep import Row, Sweep

_KEY = "pretrain.model.num_heads"

SWEEP = Sweep(
    base="dino_vits16",
    paper_setting="ImageNet-1k, ViT-S/16, 300 epochs (arXiv 2104.14294, appendix D)",
    rows={
        "heads_6": Row(changes={_KEY: 6}, paper={"eval/knn_top1": 72.8}),
        "heads_8": Row(changes={_KEY: 8}, paper={"eval/knn_top1": 73.1}),
        "heads_12": Row(changes={_KEY: 12}, paper={"eval/knn_top1": 73.7}),
        "heads_16": Row(changes={_KEY: 16}, paper={"eval/knn_top1": 73.8}),
    },
)
