"""Recipes: functions that return a complete configuration.

Any key of a recipe can be changed on the command line (`pretrain.optim.lr=1e-3`) or in a file (`--config my.yaml`);
`--dry-run` prints all keys with their values. Batch sizes are global: more or fewer workers compute the same run.
"""

from __future__ import annotations

from dino_core.config import (
    CropsConfig,
    EvalConfig,
    HeadConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    StudentConfig,
    TeacherConfig,
)
from orchestrator.config import ClusterConfig, DataConfig, RunConfig
from sweeps._patch_recipes import PATCH_RECIPES


def quickstart() -> RunConfig:
    """Smoke test on scikit-learn's 8x8 handwritten digits: the whole path in a minute on two CPU cores, no download.

    Paper: the method of arXiv 2104.14294, shrunk; no number of the paper applies.
    Cost: about a minute on 2 cores, 2 GB.
    Expected: 75 % k-NN on the test split, where random weights give 38 % and raw pixels 97 %. It shows that everything
    works, and is no benchmark.

        python -m orchestrator pretrain quickstart
    """
    return RunConfig(
        pretrain=PretrainConfig(
            steps=500,
            epochs=None,
            batch_size=64,
            log_every_steps=10,
            checkpoint_every_steps=100,
            model=ModelConfig(
                backbone="vit_tiny_patch16_224", patch_size=4, embed_dim=64, depth=2, num_heads=4, drop_path=0.0
            ),
            # Without batch norm in the head a network this small gives every image the same output: uniform collapse.
            head=HeadConfig(num_prototypes=256, hidden_dim=256, bottleneck_dim=64, batch_norm=True),
            # 500 steps are too few for a momentum that rises to 1: the teacher would stay near its random weights.
            teacher=TeacherConfig(temp=0.04, warmup_temp=0.04, momentum=0.99, final_momentum=0.996),
            student=StudentConfig(temp=0.2),
            crops=CropsConfig(
                num_local_crops=2,
                global_size=16,
                local_size=8,
                global_scale=(0.6, 1.0),
                local_scale=(0.3, 0.6),
                flip_prob=0.0,  # a mirrored digit is another sign
                brightness=0.2,
                contrast=0.2,
                saturation=0.0,
                hue=0.0,
                grayscale_prob=0.0,
                blur_prob=(0.0, 0.0, 0.0),
                solarize_prob=0.0,
                mean=(0.305, 0.305, 0.305),
                std=(0.376, 0.376, 0.376),
            ),
            optim=OptimConfig(
                lr=1e-3,
                lr_reference_batch_size=None,
                warmup_epochs=0.0,
                final_weight_decay=0.1,
                freeze_last_layer_epochs=1.0,
            ),
            # Enough for 64 features, and a small part of a run that evaluates as often.
            eval=EvalConfig(every_steps=50, crop_fraction=1.0, num_lidar_images=128, num_lidar_views=4),
        ),
        data=DataConfig(source="digits"),
        cluster=ClusterConfig(data_cpus=1),
    )


def cifar10_tiny() -> RunConfig:
    """Half of ViT-Tiny, 4-pixel patches, on CIFAR-10's 32x32 photos: for a small GPU or, patiently, a CPU.

    Paper: the method of arXiv 2104.14294 at the size of CIFAR-10; the paper has no such run.
    Cost: 100 epochs of 50,000 images; hours on one GPU, days on a CPU (`pretrain.epochs=1` for a first look).
    Expected: k-NN above raw pixels (35 % by the nearest neighbour, 44 % by 20) and above random weights. Not measured
    at full length.
    Data: a Parquet file with columns `image` (encoded bytes), `label` and `split` (train, test).

        python -m orchestrator pretrain cifar10_tiny data.source=cifar10.parquet
    """
    return RunConfig(
        pretrain=PretrainConfig(
            epochs=100.0,
            batch_size=256,
            checkpoint_every_steps=1000,
            model=ModelConfig(backbone="vit_tiny_patch16_224", patch_size=4, depth=6),
            head=HeadConfig(num_prototypes=4096, hidden_dim=1024),
            teacher=TeacherConfig(momentum=0.99),
            crops=CropsConfig(
                num_local_crops=6,
                global_size=32,
                local_size=16,
                local_scale=(0.1, 0.4),
                blur_prob=(0.0, 0.0, 0.0),  # at 32 pixels the paper's blur leaves nothing to see
                mean=(0.4914, 0.4822, 0.4465),
                std=(0.247, 0.2435, 0.2616),
            ),
            eval=EvalConfig(every_steps=1000, num_gallery=2000, num_queries=500, crop_fraction=1.0),
        ),
        data=DataConfig(source="cifar10.parquet"),
        cluster=ClusterConfig(cpus_per_worker=2),
    )


def cifar10_simclr() -> RunConfig:
    """SimCLR with a small RegNet on CIFAR-10's photos at 48 pixels: real learning in an hour of two CPU cores.

    Paper: the method of arXiv 2002.05709, shrunk; the paper has no such run.
    Cost: 8 epochs; 55 minutes on two CPU cores that did other work too, 38 minutes at the speed without it.
    Expected: 52.2 % k-NN by 20 neighbours among all training images, where random weights give 27.8 % and raw pixels
    43.8 % (docs/cifar10.md has the curve).
    Data: a Parquet file with columns `image` (encoded bytes), `label` and `split` (train, test).

        python -m orchestrator pretrain cifar10_simclr data.source=cifar10.parquet
    """
    return RunConfig(
        pretrain=PretrainConfig(
            steps=3200,
            epochs=None,
            batch_size=128,
            checkpoint_every_steps=400,
            model=ModelConfig(backbone="regnetx_002", drop_path=0.0),
            head=HeadConfig(
                num_prototypes=None,
                hidden_dim=512,
                bottleneck_dim=128,
                bottleneck_norm=False,
                batch_norm=True,
                activation="relu",
            ),
            loss=LossConfig(name="info_nce"),
            teacher=TeacherConfig(update="student_copy", stop_gradient=False, centering="none"),
            student=StudentConfig(temp=0.2),
            crops=CropsConfig(
                num_local_crops=0,
                global_size=48,
                global_scale=(0.3, 1.0),
                saturation=0.4,
                blur_prob=(0.0, 0.0, 0.0),  # at 32 pixels the paper's blur leaves nothing to see
                mean=(0.4914, 0.4822, 0.4465),
                std=(0.247, 0.2435, 0.2616),
            ),
            optim=OptimConfig(
                lr=1e-3, lr_reference_batch_size=None, min_lr=1e-5, warmup_epochs=0.5, final_weight_decay=0.1
            ),
            eval=EvalConfig(every_steps=800, crop_fraction=1.0),
        ),
        data=DataConfig(source="cifar10.parquet"),
        cluster=ClusterConfig(cpus_per_worker=2),
    )


def dino_vits16() -> RunConfig:
    """DINO ViT-S/16 on ImageNet-1k, 300 epochs on 16 GPUs: the authors' improved recipe without its longest version.

    Paper: arXiv 2104.14294. This is the authors' public 300-epoch recipe: their defaults with a teacher temperature
    rising to 0.07 over 30 epochs and prototypes of free length.
    Cost: 2.6 days on 16 V100 GPUs as the authors report it.
    Expected: 73.3 % k-NN and 76.0 % linear on ImageNet's validation images (theirs; not yet repeated here).
    `pretrain.epochs=100 pretrain.teacher.temp=0.04 pretrain.head.norm_last_layer=true cluster.num_workers=8
    pretrain.batch_size=512` is their plain recipe: 1.75 days on 8 GPUs, 69.3 % and 74.0 %.
    Data: a folder with the sub-folders train and val, one folder of images per class in each.

        python -m orchestrator pretrain dino_vits16 data.source=/path/to/imagenet
    """
    return RunConfig(
        pretrain=PretrainConfig(
            epochs=300.0,
            batch_size=1024,
            precision="bf16",
            checkpoint_every_steps=2500,
            model=ModelConfig(backbone="vit_small_patch16_224", drop_path=0.1),
            head=HeadConfig(num_prototypes=65536, norm_last_layer=False),
            teacher=TeacherConfig(
                temp=0.07, warmup_temp=0.04, warmup_temp_epochs=30.0, momentum=0.996, final_momentum=1.0
            ),
            crops=CropsConfig(num_local_crops=8, global_scale=(0.4, 1.0), local_scale=(0.05, 0.4)),
            optim=OptimConfig(
                name="adamw",
                lr=5e-4,
                min_lr=1e-6,
                warmup_epochs=10.0,
                weight_decay=0.04,
                final_weight_decay=0.4,
                clip_grad=3.0,
                freeze_last_layer_epochs=1.0,
            ),
            eval=EvalConfig(every_steps=12_500, num_gallery=50_000, num_queries=10_000),
        ),
        data=DataConfig(source="imagenet", test_split="val"),
        cluster=ClusterConfig(num_workers=16, use_gpu=True, cpus_per_worker=2, data_cpus=128),
    )


def dino_resnet50() -> RunConfig:
    """DINO ResNet-50 on ImageNet-1k, 100 epochs on 8 GPUs: the authors' public recipe for a convnet.

    Paper: arXiv 2104.14294. SGD at a learning rate of 0.03 per 256 images, constant weight decay, larger global and
    smaller local crops, prototypes of unit length.
    Cost: days on 8 GPUs; the authors give no time.
    Expected: below the paper's 300 epochs of 65.6 % k-NN and 74.5 % linear (not yet repeated here).
    Data: as for dino_vits16.

        python -m orchestrator pretrain dino_resnet50 data.source=/path/to/imagenet
    """
    return RunConfig(
        pretrain=PretrainConfig(
            epochs=100.0,
            batch_size=512,
            precision="bf16",
            checkpoint_every_steps=2500,
            model=ModelConfig(backbone="resnet50", drop_path=0.0),
            head=HeadConfig(num_prototypes=65536, norm_last_layer=True),
            teacher=TeacherConfig(momentum=0.996, final_momentum=1.0),
            crops=CropsConfig(num_local_crops=8, global_scale=(0.14, 1.0), local_scale=(0.05, 0.14)),
            optim=OptimConfig(
                name="sgd",
                lr=0.03,
                min_lr=1e-6,
                warmup_epochs=10.0,
                weight_decay=1e-4,
                final_weight_decay=1e-4,
                clip_grad=3.0,
                freeze_last_layer_epochs=1.0,
            ),
            eval=EvalConfig(every_steps=25_000, num_gallery=50_000, num_queries=10_000),
        ),
        data=DataConfig(source="imagenet", test_split="val"),
        cluster=ClusterConfig(num_workers=8, use_gpu=True, cpus_per_worker=2, data_cpus=64),
    )


RECIPES = {
    recipe.__name__: recipe
    for recipe in (quickstart, cifar10_tiny, cifar10_simclr, dino_vits16, dino_resnet50, *PATCH_RECIPES)
}
"""Every recipe that the command line knows."""
