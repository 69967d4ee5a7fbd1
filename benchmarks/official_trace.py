"""Twenty steps of the authors' training loop (facebookresearch/dino) from weights and crops that are made here.

    python -m benchmarks.official_trace --official CHECKOUT > tests/dino_core/official_trace.json

runs `train_one_epoch` of their main_dino.py on the CPU, in fp32 and one thread, and prints losses, gradient norms, sums
of weights and centres. tests/dino_core/test_official_trace.py takes the same steps with `dino_core` and compares.
README.md tells what is replaced in their code and how large the rounding is.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from dino_core.config import CropsConfig, HeadConfig, ModelConfig, OptimConfig, PretrainConfig, TeacherConfig

STEPS = 20
_IMAGES = 16


def _config(
    optimizer: Literal["adamw", "sgd", "lars"],
    lr: float,
    head: HeadConfig,
    *,
    local_crops: int = 2,
    epochs: int = 5,
    still_epochs: int = 1,
    teacher: TeacherConfig | None = None,
) -> PretrainConfig:
    return PretrainConfig(
        epochs=epochs,
        batch_size=_IMAGES,
        model=ModelConfig(
            backbone="vit_tiny_patch16_224", patch_size=8, embed_dim=32, depth=2, num_heads=2, drop_path=0.0
        ),
        head=head,
        teacher=teacher or TeacherConfig(warmup_temp=0.07, temp=0.07, momentum=0.9),
        crops=CropsConfig(num_local_crops=local_crops, global_size=32, local_size=16),
        optim=OptimConfig(
            name=optimizer, lr=lr, warmup_epochs=still_epochs, freeze_last_layer_epochs=still_epochs, clip_grad=1.0
        ),
    )


def _head(*, norm_last_layer: bool = False, batch_norm: bool = False) -> HeadConfig:
    return HeadConfig(
        num_prototypes=64, hidden_dim=48, bottleneck_dim=16, norm_last_layer=norm_last_layer, batch_norm=batch_norm
    )


TRACES = {
    "adamw": _config("adamw", 0.025, _head()),
    "adamw, temperature warm-up": _config(
        "adamw",
        0.025,
        _head(norm_last_layer=True),
        epochs=20,
        still_epochs=4,
        teacher=TeacherConfig(warmup_temp=0.04, temp=0.07, warmup_temp_epochs=10, momentum=0.9),
    ),
    "adamw, temperature by epoch": _config(
        "adamw",
        0.025,
        _head(),
        teacher=TeacherConfig(warmup_temp=0.04, temp=0.07, warmup_temp_epochs=3, temp_by_epoch=True, momentum=0.9),
    ),
    "adamw, no local crops": _config("adamw", 0.025, _head(), local_crops=0),
    "sgd, batch norm in the head": _config("sgd", 0.5, _head(batch_norm=True)),
    "lars": _config("lars", 5.0, _head()),
}
"""The configurations by the name of the trace. Warm-up and the epochs of frozen prototypes end within it."""


def steps_per_epoch(config: PretrainConfig) -> int:
    """20 steps in the 5 or 20 epochs of a trace."""
    assert config.epochs is not None
    return STEPS // int(config.epochs)


def noise(shape: Sequence[int], *seed: int) -> Tensor:
    """Uniform numbers of standard deviation 1, fp32, from numpy's bit stream."""
    draws = np.random.Generator(np.random.PCG64(seed)).random(tuple(shape))
    return torch.from_numpy((draws - 0.5) * math.sqrt(12)).float()


@torch.no_grad()
def fill(network: nn.Module) -> None:
    """Set all weights of a student or teacher, theirs or ours, by their order and shape alone."""
    for index, (name, parameter) in enumerate(network.named_parameters()):
        values = noise(parameter.shape, index)
        if parameter.dim() == 1:
            parameter.copy_(1 + 0.1 * values if name.endswith("weight") else 0.02 * values)
        elif not name.endswith("weight_g"):  # the lengths of the prototypes are 1 on both sides
            parameter.copy_(values * (parameter[0].numel() ** -0.5 if parameter.shape[0] > 1 else 0.3))


def crops(config: PretrainConfig, step: int) -> tuple[Tensor, Tensor | None]:
    """Global crops [2B, 3, H, W] and local ones, crop by crop; None if there are none."""
    count, sizes = config.crops.num_local_crops, config.crops
    first = noise((2 * _IMAGES, 3, sizes.global_size, sizes.global_size), step, 2)
    return first, noise((count * _IMAGES, 3, sizes.local_size, sizes.local_size), step, count) if count else None


def sums(network: nn.Module) -> list[float]:
    """Sum of the absolute weights of each parameter, in the network's order.

    Leaves out the biases of attention's keys. Softmax does not see them, so their gradient is rounding alone, of which
    Adam makes full steps.
    """
    result = []
    for name, parameter in network.named_parameters():
        values = parameter.detach().double().abs()
        if name.endswith("attn.qkv.bias"):
            query, _, value = values.chunk(3)
            values = torch.cat([query, value])
        result.append(values.sum().item())
    return result


class _Batches:
    """One epoch for `train_one_epoch`, which asks for the next batch when it has finished the step before."""

    def __init__(self, config: PretrainConfig, epoch: int, dtype: torch.dtype, on_step: Any) -> None:
        self._config, self._epoch, self._dtype, self._on_step = config, epoch, dtype, on_step

    def __len__(self) -> int:
        return steps_per_epoch(self._config)

    def __iter__(self) -> Iterator[tuple[list[Tensor], None]]:
        for step in range(self._epoch * len(self), (self._epoch + 1) * len(self)):
            groups = [group for group in crops(self._config, step) if group is not None]
            yield [crop.to(self._dtype) for group in groups for crop in group.split(_IMAGES)], None
            self._on_step()


def _build(official: ModuleType, config: PretrainConfig) -> nn.Module:
    """The authors' network: student or teacher."""
    vits = official.vits
    model, head = config.model, config.head
    backbone = vits.VisionTransformer(
        img_size=[config.crops.global_size],
        patch_size=model.patch_size,
        embed_dim=model.embed_dim,
        depth=model.depth,
        num_heads=model.num_heads,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    projection = vits.DINOHead(
        model.embed_dim,
        head.num_prototypes,
        use_bn=head.batch_norm,
        norm_last_layer=head.norm_last_layer,
        hidden_dim=head.hidden_dim,
        bottleneck_dim=head.bottleneck_dim,
    )
    network: nn.Module = official.utils.MultiCropWrapper(backbone, projection)
    fill(network)
    return network


def _schedules(official: ModuleType, config: PretrainConfig) -> dict[str, Any]:
    """The arrays that the authors' `train_dino` makes."""
    scheduler, optim, teacher = official.utils.cosine_scheduler, config.optim, config.teacher
    peak_lr = optim.lr * _IMAGES / 256.0
    lengths = (STEPS // steps_per_epoch(config), steps_per_epoch(config))
    return {
        "lr": scheduler(peak_lr, optim.min_lr, *lengths, warmup_epochs=int(optim.warmup_epochs)),
        "weight_decay": scheduler(optim.weight_decay, optim.final_weight_decay, *lengths),
        "momentum": scheduler(teacher.momentum, teacher.final_momentum, *lengths),
    }


def run_official(official: ModuleType, config: PretrainConfig, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The trace of one configuration: for each step the loss, the norms of the gradients before clipping and the sum of
    absolute weights of student and teacher after it; at the end these sums by parameter, and the centre."""
    epochs = STEPS // steps_per_epoch(config)
    student, teacher = _build(official, config).to(dtype), _build(official, config).to(dtype).requires_grad_(False)
    parallel = nn.parallel.DistributedDataParallel(student)
    temps = (config.teacher.warmup_temp, config.teacher.temp, int(config.teacher.warmup_temp_epochs))
    objective = official.DINOLoss(config.head.num_prototypes, config.crops.num_local_crops + 2, *temps, epochs).to(
        dtype
    )
    groups = official.utils.get_params_groups(parallel)
    optimizer = {
        "adamw": lambda: torch.optim.AdamW(groups),
        "sgd": lambda: torch.optim.SGD(groups, lr=0, momentum=0.9),
        "lars": lambda: official.utils.LARS(groups),
    }[config.optim.name]()
    schedules = _schedules(official, config)
    trace: dict[str, Any] = {key: [] for key in ("loss", "student", "teacher")}
    norms: list[list[float]] = []

    def record_loss(*inputs: Any) -> Tensor:
        loss: Tensor = objective(*inputs)
        trace["loss"].append(loss.item())
        return loss

    def record_weights() -> None:
        trace["student"].append(sum(sums(student)))
        trace["teacher"].append(sum(sums(teacher)))

    clip_gradients = official.utils.clip_gradients
    with patch.object(official.utils, "clip_gradients", lambda *given: norms.append(clip_gradients(*given))):
        for epoch in range(epochs):
            official.train_one_epoch(
                parallel,
                teacher,
                teacher,
                record_loss,
                _Batches(config, epoch, dtype, record_weights),
                optimizer,
                schedules["lr"],
                schedules["weight_decay"],
                schedules["momentum"],
                epoch,
                None,
                argparse.Namespace(
                    epochs=epochs,
                    clip_grad=config.optim.clip_grad,
                    freeze_last_layer=int(config.optim.freeze_last_layer_epochs),
                ),
            )
    clip = config.optim.clip_grad or math.inf
    return trace | {
        "grad_norm": [math.hypot(*step) for step in norms],
        "clipped": [sum(norm + 1e-6 > clip for norm in step) for step in norms],
        "student_parameters": sums(student),
        "teacher_parameters": sums(teacher),
        "center": objective.center.flatten().tolist(),
        **{name: values.tolist() for name, values in schedules.items()},
    }


def _interpolate(backbone: Any, x: Tensor, width: int, height: int) -> Tensor:
    """Position embeddings by timm's rule; `x` are the tokens."""
    patch_size = backbone.patch_embed.patch_size
    return resample_abs_pos_embed(backbone.pos_embed, [width // patch_size, height // patch_size])


@contextlib.contextmanager
def official_code(checkout: Path) -> Iterator[ModuleType]:
    """Their main_dino.py as a module, able to run without a GPU. Their log lines go to stderr."""
    sys.path.insert(0, str(checkout))
    official = importlib.import_module("main_dino")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with (
            contextlib.redirect_stdout(sys.stderr),
            patch.object(official.vits.VisionTransformer, "interpolate_pos_encoding", _interpolate),
            patch.object(official.utils.SmoothedValue, "synchronize_between_processes", lambda self: None),
            patch.object(torch.Tensor, "cuda", lambda self, **_: self),
            patch.object(torch.cuda, "synchronize", lambda: None),
            patch.object(torch.cuda, "is_available", lambda: False),
        ):
            yield official
    finally:
        torch.distributed.destroy_process_group()
        sys.path.remove(str(checkout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, metavar="CHECKOUT", help="of facebookresearch/dino")
    parser.add_argument("--double", action="store_true", help="in fp64, to see how large the rounding is")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dtype = torch.float64 if arguments.double else torch.float32
    with official_code(arguments.official) as official:
        traces = {name: run_official(official, config, dtype) for name, config in TRACES.items()}
    print(json.dumps({"torch": torch.__version__, "traces": traces}, indent=1))


if __name__ == "__main__":
    main()
