"""Points of the component space at the smallest size, for the suites that run over all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from dino_core.config import CropsConfig, HeadConfig, ModelConfig, OptimConfig, PredictorConfig, PretrainConfig
from dino_core.crops import CropBatch
from dino_core.distributed import rank, world_size
from dino_core.methods import METHODS, with_method

NUM_SAMPLES = 16

BASE = PretrainConfig(
    seed=5,
    steps=4,
    epochs=None,
    batch_size=8,
    model=ModelConfig(backbone="vit_tiny_patch16_224", patch_size=8, embed_dim=16, depth=2, num_heads=2, drop_path=0.2),
    head=HeadConfig(num_prototypes=24, hidden_dim=32, bottleneck_dim=8),
    predictor=PredictorConfig(hidden_dim=16),
    crops=CropsConfig(num_local_crops=2, global_size=16, local_size=8),
    optim=OptimConfig(lr=0.001, lr_reference_batch_size=None, warmup_epochs=0, freeze_last_layer_epochs=0.5),
)


def changed(config: PretrainConfig, **parts: dict[str, Any]) -> PretrainConfig:
    """`config` with other fields in its parts."""
    return dataclasses.replace(
        config, **{part: dataclasses.replace(getattr(config, part), **fields) for part, fields in parts.items()}
    )


def _points() -> dict[str, PretrainConfig]:
    points = {name: with_method(BASE, name) for name in METHODS}
    points["moco_v2"] = changed(points["moco_v2"], loss={"queue_size": 40})
    for name in ("ibot", "dinov2"):
        points[name] = changed(points[name], model={"patch_size": 4})
    patches = changed(points["ibot"], ibot={"temp": None, "warmup_temp": None})
    embeddings: dict[str, Any] = {"num_prototypes": None, "batch_norm": True}
    return points | {
        "student copy": changed(BASE, teacher={"update": "student_copy", "centering": "softmax"}),
        "previous step": changed(BASE, teacher={"update": "previous_step"}),
        "previous epoch": changed(BASE, teacher={"update": "previous_epoch"}),
        "sinkhorn": changed(BASE, teacher={"centering": "sinkhorn_knopp"}),
        "hard targets": changed(BASE, teacher={"sharpening": "argmax"}),
        "no sharpening": changed(BASE, teacher={"sharpening": "none", "centering": "none"}),
        "mse with centre": changed(BASE, loss={"name": "mse"}),
        "cross-entropy with predictor": changed(BASE, predictor={"num_layers": 2}),
        "info_nce, local crops": changed(
            BASE, loss={"name": "info_nce"}, teacher={"centering": "none"}, head=embeddings, student={"temp": 0.2}
        ),
        "simclr, local crops": changed(points["simclr"], crops={"num_local_crops": 2}),
        "patches alone": changed(patches, loss={"weight": 0.0}, crops={"num_local_crops": 0}),
        "patches alone, sinkhorn": changed(
            patches,
            loss={"weight": 0.0},
            crops={"num_local_crops": 0},
            ibot={"centering": "sinkhorn_knopp", "divisor": "masked_patches"},
        ),
        "patches, full view, random masks": changed(
            patches,
            ibot={"class_view": "full", "divisor": "masked_crops", "center_over": "masked", "weight": 0.5},
            mask={"shape": "random", "sampler": "dinov2"},
            loss={"weight": 2.0},
        ),
        "patches, own head, batch norm": changed(
            patches,
            head={"batch_norm": True},
            ibot={"head": "untied", "num_prototypes": 20, "bottleneck_dim": 6, "center_over": "masked", "temp": 0.06},
            mask={"prob": 1.0, "ratio": (0.3, 0.3), "shape": "random"},
        ),
        "patches, own prototypes, batch norm": changed(
            patches,
            head={"batch_norm": True, "norm_last_layer": False},
            ibot={"head": "shared_mlp", "num_prototypes": 20, "class_view": "full"},
        ),
        "koleo in groups, first crop": changed(
            BASE, loss={"koleo_weight": 0.1, "koleo_group_size": 2, "koleo_crops": "first"}
        ),
        "koleo in groups of several ranks": changed(BASE, loss={"koleo_weight": 0.1, "koleo_group_size": 8}),
        "swiglu, layer scale, uniform depth": changed(
            points["dinov2"],
            model={
                "swiglu": True,
                "layer_scale": 1e-1,
                "drop_path_schedule": "uniform",
                "drop_path": 0.4,
                "num_register_tokens": 2,
            },
            loss={"koleo_group_size": 2},
        ),
        "packed": changed(points["ibot"], model={"packing": True}),
        "packed, sub-batches, recomputed": changed(
            points["dinov2"],
            model={
                "packing": True,
                "drop_path": 0.4,
                "drop_path_schedule": "uniform",
                "drop_path_mode": "sub_batch",
                "drop_path_group_size": 2,
                "num_register_tokens": 2,
                "activation_checkpointing": True,
            },
            loss={"koleo_group_size": 2},
            ibot={"class_view": "full"},
        ),
        "sub-batches in the last block": changed(
            BASE, model={"drop_path": 0.3, "drop_path_mode": "sub_batch", "drop_path_group_size": 1}
        ),
        "relu, batch norm, no bottleneck norm": changed(
            BASE,
            head={"batch_norm": True, "bottleneck_norm": False, "activation": "relu"},
            teacher={"ema_buffers": True},
        ),
    }


POINTS = _points()


def share(config: PretrainConfig, step: int) -> CropBatch:
    """This rank's rows of the global batch of noise of a step."""
    generator = torch.Generator().manual_seed(step)
    num_images = config.batch_size // world_size()
    rows = slice(rank() * num_images, (rank() + 1) * num_images)

    def crops(num: int, size: int) -> Tensor:
        whole = torch.randn(num, config.batch_size, 3, size, size, generator=generator)
        return whole[:, rows].flatten(0, 1).contiguous()

    num_local = config.crops.num_local_crops
    first = crops(2, config.crops.global_size)
    return CropBatch(first, crops(num_local, config.crops.local_size) if num_local else None, num_images)
