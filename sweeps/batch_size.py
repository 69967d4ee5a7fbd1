"""Batch size from 128 to 1024 without multi-crop, the learning rate in proportion.

    python -m orchestrator sweep batch_size --base quickstart
    python -m orchestrator sweep batch_size data.source=/path/to/imagenet

Paper: arXiv 2104.14294, table 9: k-NN of ViT-S/16 after 100 epochs; a batch of 8 reached 35.2 % after 50 epochs.
Cost there: 15.3 hours on 16 GPUs for the batch of 1024 (table 8); the batch of 128 ran on one GPU.
The teacher's momentum is per step and stays the base's, as in the table: with a small batch the teacher then averages
over fewer images, and the authors expect better numbers from another momentum (their code's help advises 0.9995 for
256). `pretrain.teacher.momentum_reference_batch_size=1024` couples the two, so that the average spans as many images in
every row. On a base whose length is in steps, as the quickstart's, larger batches also see more images.
"""

from __future__ import annotations

from orchestrator.sweep import Row, Sweep

_KEY = "pretrain.batch_size"

SWEEP = Sweep(
    base="dino_vits16",
    changes={"pretrain.epochs": 100, "pretrain.crops.num_local_crops": 0},
    paper_setting="ImageNet-1k, ViT-S/16, 100 epochs without multi-crop (arXiv 2104.14294, table 9)",
    rows={
        "batch_128": Row(changes={_KEY: 128}, paper={"eval/knn_top1": 57.9}),
        "batch_256": Row(changes={_KEY: 256}, paper={"eval/knn_top1": 59.1}),
        "batch_512": Row(changes={_KEY: 512}, paper={"eval/knn_top1": 59.6}),
        "batch_1024": Row(changes={_KEY: 1024}, paper={"eval/knn_top1": 59.9}),
    },
)
