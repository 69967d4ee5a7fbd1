"""Where the teacher's weights come from: moving average, copy of the student, its last step, its last epoch.

    python -m orchestrator sweep teacher
    python -m orchestrator sweep teacher --base dino_vits16 data.source=/path/to/imagenet \\
        pretrain.crops.num_local_crops=10

Paper: arXiv 2104.14294, figure 6: k-NN of ViT-S/16 after 300 epochs. Copy and last step do not converge there.
Cost there: 72.6 hours on 16 GPUs for each row (table 8, 10 local crops).
"""

from __future__ import annotations

from orchestrator.sweep import Row, Sweep

SWEEP = Sweep(
    base="quickstart",
    paper_setting="ImageNet-1k, ViT-S/16, 300 epochs (arXiv 2104.14294, figure 6)",
    rows={
        "student_copy": Row(changes={"pretrain.teacher.update": "student_copy"}, paper={"eval/knn_top1": 0.1}),
        "previous_step": Row(changes={"pretrain.teacher.update": "previous_step"}, paper={"eval/knn_top1": 0.1}),
        "previous_epoch": Row(changes={"pretrain.teacher.update": "previous_epoch"}, paper={"eval/knn_top1": 66.6}),
        "momentum": Row(changes={"pretrain.teacher.update": "ema"}, paper={"eval/knn_top1": 72.8}),
    },
)
