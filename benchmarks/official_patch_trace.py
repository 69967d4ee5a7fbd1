"""Twenty training steps with masked patches by the authors' code (bytedance/ibot, facebookresearch/dinov2).

    python -m benchmarks.official_patch_trace --ibot CHECKOUT --dinov2 CHECKOUT \\
        > tests/dino_core/official_patch_trace.json

As `official_trace.py`: weights, crops and here also masks are made by this project for both sides, and what is printed
are losses, gradient norms and sums of weights. tests/dino_core/test_official_patch_trace.py takes the same steps with
`dino_core` and compares. README.md tells what is replaced in their code.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.official_trace import STEPS, TRACES, _interpolate, crops, fill, steps_per_epoch, sums
from dino_core.config import IBOTConfig, LossConfig, MaskConfig, PretrainConfig
from dino_core.masking import draw_masks
from dino_core.schedules import Schedules, build_schedules

_PLAIN = TRACES["adamw"]
_IMAGES = _PLAIN.batch_size
_LARGE_MASKS = MaskConfig(sampler="ibot", shape="random", prob=0.75, ratio=(0.2, 0.6))
_V2 = replace(
    _PLAIN,
    model=replace(_PLAIN.model, layer_scale=0.1, drop_path=0.0),
    loss=LossConfig(koleo_weight=0.1, koleo_group_size=_IMAGES),
    ibot=IBOTConfig(weight=1.0, center_over="masked"),
    optim=replace(
        _PLAIN.optim,
        clip_mode="module",
        freeze_last_layer_by="lr",
        layer_decay=0.9,
        patch_embed_lr_mult=0.2,
        lr_scaling="sqrt",
        lr=0.00625,
    ),
)

PATCH_TRACES: dict[str, tuple[str, PretrainConfig]] = {
    "ibot": ("ibot", replace(_PLAIN, ibot=IBOTConfig(weight=1.0), mask=MaskConfig(sampler="ibot"))),
    "ibot, no local crops": (
        "ibot",
        replace(
            TRACES["adamw, no local crops"],
            ibot=IBOTConfig(weight=0.5, temp=0.05, warmup_temp=0.05),
            loss=LossConfig(weight=2.0),
            mask=_LARGE_MASKS,
        ),
    ),
    "dinov2": ("dinov2", _V2),
    "dinov2, large": (
        "dinov2",
        replace(
            _V2,
            model=replace(_V2.model, swiglu=True),
            teacher=replace(_V2.teacher, centering="sinkhorn_knopp"),
            ibot=IBOTConfig(weight=1.0, head="untied", num_prototypes=48, bottleneck_dim=12),
            mask=_LARGE_MASKS,
        ),
    ),
}
"""By the name of the trace, whose code and with what configuration."""


def masks(config: PretrainConfig, step: int) -> Tensor:
    """bool [2, B, H, W], as the run of `config` has them."""
    side = config.crops.global_size // (config.model.patch_size or 1)
    found = draw_masks(
        config.mask,
        (side, side),
        seed=config.seed,
        step=step,
        batch_size=config.batch_size,
        images=np.arange(config.batch_size),
    )
    return torch.from_numpy(found).unflatten(2, (side, side))


def _schedules(config: PretrainConfig) -> Schedules:
    return build_schedules(config, config.batch_size * steps_per_epoch(config))


class _Trace:
    """What is recorded of a run."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {
            key: [] for key in ("loss", "class_loss", "patch_loss", "koleo", "grad_norm", "student", "teacher")
        }

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.values[name].append(value)

    def finish(self, student: nn.Module, teacher: nn.Module, **more: Any) -> dict[str, Any]:
        values = {name: series for name, series in self.values.items() if series}
        return values | {"student_parameters": sums(student), "teacher_parameters": _teacher_sums(teacher)} | more


# -------------------------------------------------------------------------------------------------------------- iBOT


class _Batches:
    """One epoch for `train_one_epoch`."""

    def __init__(self, config: PretrainConfig, epoch: int, dtype: torch.dtype, on_step: Callable[[], None]) -> None:
        self._config, self._epoch, self._dtype, self._on_step = config, epoch, dtype, on_step

    def __len__(self) -> int:
        return steps_per_epoch(self._config)

    def __iter__(self) -> Iterator[tuple[list[Tensor], Tensor, list[Tensor]]]:
        for step in range(self._epoch * len(self), (self._epoch + 1) * len(self)):
            groups = [group for group in crops(self._config, step) if group is not None]
            images = [crop.to(self._dtype) for group in groups for crop in group.split(_IMAGES)]
            yield images, torch.zeros(_IMAGES, dtype=torch.long), list(masks(self._config, step))
            self._on_step()


class _Unwrapped(nn.Module):
    """In the place of DistributedDataParallel, with its attribute."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*inputs, **named)


def _build_ibot(official: ModuleType, config: PretrainConfig, *, student: bool) -> nn.Module:
    model, head = config.model, config.head
    backbone = official.models.vision_transformer.VisionTransformer(
        img_size=[config.crops.global_size],
        patch_size=model.patch_size,
        embed_dim=model.embed_dim,
        depth=model.depth,
        num_heads=model.num_heads,
        qkv_bias=True,
        return_all_tokens=True,
        masked_im_modeling=student,
    )
    projection = official.iBOTHead(
        model.embed_dim,
        head.num_prototypes,
        norm_last_layer=head.norm_last_layer,
        hidden_dim=head.hidden_dim,
        bottleneck_dim=head.bottleneck_dim,
        shared_head=True,
    )
    network: nn.Module = official.utils.MultiCropWrapper(backbone, projection)
    return network


def run_ibot(official: ModuleType, config: PretrainConfig, dtype: torch.dtype) -> dict[str, Any]:
    epochs = STEPS // steps_per_epoch(config)
    student, teacher = (_build_ibot(official, config, student=own).to(dtype) for own in (True, False))
    fill(student)
    teacher.load_state_dict(student.state_dict(), strict=False)
    teacher.requires_grad_(False)
    schedules = _schedules(config)
    temps = [[schedule(0), schedule(0)] for schedule in (schedules.teacher_temp, schedules.patch_temp)]
    objective = official.iBOTLoss(
        config.head.num_prototypes,
        config.head.num_prototypes,
        2,
        config.crops.num_local_crops,
        *temps[0],
        *temps[1],
        0,
        epochs,
        lambda1=config.loss.weight,
        lambda2=config.ibot.weight,
    ).to(dtype)
    optimizer = torch.optim.AdamW(official.utils.get_params_groups(student))
    trace, norms = _Trace(), []

    def record_loss(*inputs: Any) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = objective(*inputs)
        trace.add(
            loss=losses["loss"].item(),
            class_loss=losses["cls"].item() / config.loss.weight,
            patch_loss=losses["patch"].item() / config.ibot.weight,
        )
        return losses

    clip_gradients = official.utils.clip_gradients
    with patch.object(official.utils, "clip_gradients", lambda *given: norms.append(clip_gradients(*given))):
        for epoch in range(epochs):
            official.train_one_epoch(
                _Unwrapped(student),
                teacher,
                teacher,
                record_loss,
                _Batches(
                    config, epoch, dtype, lambda: trace.add(student=sum(sums(student)), teacher=sum(sums(teacher)))
                ),
                optimizer,
                [schedules.lr(step) for step in range(STEPS)],
                [schedules.weight_decay(step) for step in range(STEPS)],
                [schedules.momentum(step) for step in range(STEPS)],
                epoch,
                None,
                argparse.Namespace(
                    epochs=epochs,
                    clip_grad=config.optim.clip_grad,
                    freeze_last_layer=int(config.optim.freeze_last_layer_epochs),
                    global_crops_number=2,
                    use_masked_im_modeling=True,
                ),
            )
    trace.values["grad_norm"] = [math.hypot(*step) for step in norms]
    centers = {"center": objective.center.flatten().tolist(), "patch_center": objective.center2.flatten().tolist()}
    return trace.finish(student, teacher, **centers)


@contextlib.contextmanager
def ibot_code(checkout: Path) -> Iterator[ModuleType]:
    """Their main_ibot.py as a module, able to run without a GPU."""
    stubs = {
        "tensorboardX": SimpleNamespace(SummaryWriter=None),
        "evaluation": ModuleType("evaluation"),
        "evaluation.unsupervised": ModuleType("evaluation.unsupervised"),
        "evaluation.unsupervised.unsup_cls": SimpleNamespace(eval_pred=lambda *_, **__: (0.0, 0.0, 0.0, 0.0)),
    }
    sys.path.insert(0, str(checkout))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with patch.dict(sys.modules, stubs):  # type: ignore[arg-type]
            official = importlib.import_module("main_ibot")
        vit = official.models.vision_transformer.VisionTransformer
        with (
            contextlib.redirect_stdout(sys.stderr),
            patch.object(vit, "interpolate_pos_encoding", _interpolate),
            patch.object(official.utils.SmoothedValue, "synchronize_between_processes", lambda self: None),
            patch.object(torch.Tensor, "cuda", lambda self, **_: self),
            patch.object(torch.cuda, "synchronize", lambda: None),
            patch.object(torch.cuda, "is_available", lambda: False),
        ):
            yield official
    finally:
        torch.distributed.destroy_process_group()
        sys.path.remove(str(checkout))
        for name in [n for n in sys.modules if n.split(".")[0] in ("main_ibot", "models", "utils", "loader")]:
            del sys.modules[name]


# ------------------------------------------------------------------------------------------------------------ DINOv2


def _namespace(values: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(**{k: _namespace(v) if isinstance(v, dict) else v for k, v in values.items()})


def _settings(config: PretrainConfig) -> SimpleNamespace:
    """Their keys, as far as `SSLMetaArch` reads them."""
    head, ibot = config.head, config.ibot
    common = {"head_nlayers": head.num_layers, "head_hidden_dim": head.hidden_dim}
    return _namespace(
        {
            "compute_precision": {"grad_scaler": False},
            "student": {"pretrained_weights": "", "arch": "a small"},
            "dino": {
                **common,
                "loss_weight": config.loss.weight,
                "head_n_prototypes": head.num_prototypes,
                "head_bottleneck_dim": head.bottleneck_dim,
                "koleo_loss_weight": config.loss.koleo_weight,
            },
            "ibot": {
                **common,
                "loss_weight": ibot.weight,
                "mask_ratio_min_max": config.mask.ratio,
                "mask_sample_probability": config.mask.prob,
                "separate_head": ibot.head == "untied",
                "head_n_prototypes": ibot.num_prototypes or head.num_prototypes,
                "head_bottleneck_dim": ibot.bottleneck_dim or head.bottleneck_dim,
            },
            "train": {"centering": "centering" if config.teacher.centering == "center" else "sinkhorn_knopp"},
            "crops": {"local_crops_number": config.crops.num_local_crops},
            "optim": {
                "layerwise_decay": config.optim.layer_decay,
                "patch_embed_lr_mult": config.optim.patch_embed_lr_mult,
            },
        }
    )


def _backbones(config: PretrainConfig, *_: Any) -> tuple[nn.Module, nn.Module, int]:
    vits = importlib.import_module("dinov2.models.vision_transformer")
    model = config.model
    build = partial(
        vits.DinoVisionTransformer,
        img_size=config.crops.global_size,
        patch_size=model.patch_size,
        embed_dim=model.embed_dim,
        depth=model.depth,
        num_heads=model.num_heads,
        init_values=model.layer_scale,
        ffn_layer="swiglufused" if model.swiglu else "mlp",
        block_chunks=0,
    )
    assert model.embed_dim is not None
    return build(), build(), model.embed_dim


def run_dinov2(official: ModuleType, config: PretrainConfig, dtype: torch.dtype) -> dict[str, Any]:
    with patch.object(official, "build_model_from_cfg", partial(_backbones, config)):
        arch = official.SSLMetaArch(_settings(config))
    arch.need_to_synchronize_fsdp_streams = False
    fill(arch.student)
    arch.to(dtype).train()
    arch.teacher.load_state_dict(arch.student.state_dict())
    optimizer = torch.optim.AdamW(arch.get_params_groups())
    schedules, trace = _schedules(config), _Trace()
    for step in range(STEPS):
        lr, weight_decay = schedules.lr(step), schedules.weight_decay(step)
        for group in optimizer.param_groups:
            frozen = step < schedules.freeze_last_layer_steps and group["is_last_layer"]
            group["weight_decay"] = weight_decay * group["wd_multiplier"]
            group["lr"] = (0.0 if frozen else lr) * group["lr_multiplier"]
        optimizer.zero_grad(set_to_none=True)
        losses = arch.forward_backward(_collated(config, step, dtype), teacher_temp=schedules.teacher_temp(step))
        gradients = [p.grad for p in arch.student.parameters() if p.grad is not None]
        trace.add(grad_norm=torch.stack([g.norm() for g in gradients]).norm().item())
        for part in arch.student.values():
            assert config.optim.clip_grad is not None
            nn.utils.clip_grad_norm_(part.parameters(), config.optim.clip_grad)
        optimizer.step()
        arch.update_teacher(schedules.momentum(step))
        _add_losses(trace, config, {name: value.item() for name, value in losses.items()})
        trace.add(student=sum(sums(arch.student)), teacher=sum(_teacher_sums(arch.teacher)))
    return trace.finish(arch.student, arch.teacher)


def _add_losses(trace: _Trace, config: PretrainConfig, shown: dict[str, float]) -> None:
    """They show halves of KoLeo and of the patches' loss."""
    class_loss = shown["dino_local_crops_loss"] + shown["dino_global_crops_loss"]
    patch_loss, koleo = 2 * shown["ibot_loss"], 2 * shown["koleo_loss"]
    trace.add(
        loss=config.loss.weight * class_loss + config.ibot.weight * patch_loss + koleo,
        class_loss=class_loss,
        patch_loss=patch_loss,
        koleo=koleo / config.loss.koleo_weight,
    )


def _teacher_sums(teacher: nn.Module) -> list[float]:
    """Their teacher follows the student's mask token, which it never uses; ours has none."""
    names = [name for name, _ in teacher.named_parameters()]
    return [value for name, value in zip(names, sums(teacher), strict=True) if not name.endswith("mask_token")]


def _collated(config: PretrainConfig, step: int, dtype: torch.dtype) -> dict[str, Any]:
    """What their `collate_data_and_cast` makes, from the masks of this project."""
    first, local = crops(config, step)
    assert local is not None
    flat = masks(config, step).flatten(0, 1).flatten(1)  # [2 * B, N]
    counts = flat.sum(-1).clamp(min=1.0)
    rows = flat.flatten().nonzero().flatten()
    return {
        "collated_global_crops": first.to(dtype),
        "collated_local_crops": local.to(dtype),
        "collated_masks": flat,
        "mask_indices_list": rows,
        "masks_weight": (1 / counts).unsqueeze(-1).expand_as(flat)[flat].to(dtype),
        "upperbound": len(rows),
        "n_masked_patches": torch.full((1,), len(rows), dtype=torch.long),
    }


class _OneAfterTheOther:
    """In the place of xFormers' `BlockDiagonalMask`, which packs sequences for a head that does not mix them."""

    def __init__(self, lengths: list[int]) -> None:
        self._lengths = lengths

    @classmethod
    def from_tensor_list(cls, tensors: list[Tensor]) -> tuple[_OneAfterTheOther, Tensor]:
        return cls([tensor.shape[1] for tensor in tensors]), torch.cat(tensors, dim=1)

    def split(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.split(self._lengths, dim=1))


def _positions(backbone: Any, x: Tensor, width: int, height: int) -> Tensor:
    shown = SimpleNamespace(patch_embed=SimpleNamespace(patch_size=backbone.patch_size), pos_embed=backbone.pos_embed)
    return _interpolate(shown, x, width, height)


@contextlib.contextmanager
def dinov2_code(checkout: Path) -> Iterator[ModuleType]:
    """Their `dinov2.train.ssl_meta_arch`, able to run without a GPU, xFormers and FSDP."""
    ops = ModuleType("xformers.ops")
    ops.fmha = SimpleNamespace(BlockDiagonalMask=_OneAfterTheOther)  # type: ignore[attr-defined]
    fsdp = SimpleNamespace(
        get_fsdp_wrapper=None,
        ShardedGradScaler=None,
        reshard_fsdp_model=lambda _: None,
        get_fsdp_modules=lambda module: [SimpleNamespace(params=list(module.parameters()))],
    )
    train = ModuleType("dinov2.train")
    train.__path__ = [str(checkout / "dinov2" / "train")]
    stubs = {"xformers": ModuleType("xformers"), "xformers.ops": ops, "dinov2.fsdp": fsdp, "dinov2.train": train}
    sys.path.insert(0, str(checkout))
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with (
            contextlib.redirect_stdout(sys.stderr),
            patch.dict("os.environ", {"XFORMERS_DISABLED": "1"}),
            patch.dict(sys.modules, stubs),  # type: ignore[arg-type]
        ):
            official = importlib.import_module("dinov2.train.ssl_meta_arch")
            vit = importlib.import_module("dinov2.models.vision_transformer").DinoVisionTransformer
            with (
                patch.object(vit, "interpolate_pos_encoding", _positions),
                patch.object(
                    vit,
                    "forward_features_list",
                    lambda self, xs, found: [self.forward_features(x, m) for x, m in zip(xs, found, strict=True)],
                ),
                patch.object(torch.Tensor, "cuda", lambda self, **_: self),
            ):
                yield official
    finally:
        torch.distributed.destroy_process_group()
        sys.path.remove(str(checkout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ibot", type=Path, required=True, metavar="CHECKOUT", help="of bytedance/ibot")
    parser.add_argument("--dinov2", type=Path, required=True, metavar="CHECKOUT", help="of facebookresearch/dinov2")
    parser.add_argument("--double", action="store_true", help="in fp64, to see how large the rounding is")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dtype = torch.float64 if arguments.double else torch.float32
    found = {}
    for whose, code, run in (("ibot", ibot_code, run_ibot), ("dinov2", dinov2_code, run_dinov2)):
        with code(getattr(arguments, whose)) as official:
            for name, (owner, config) in PATCH_TRACES.items():
                if owner == whose:
                    found[name] = run(official, config, dtype)
    print(json.dumps({"torch": torch.__version__, "traces": {name: found[name] for name in PATCH_TRACES}}, indent=1))


if __name__ == "__main__":
    main()
