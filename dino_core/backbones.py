"""Backbones: networks that turn images [n, 3, H, W] into features [n, D], from timm or of one's own."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.drop import DropPath
from timm.layers.mlp import SwiGLUPacked
from torch import Tensor, nn

from dino_core.activation_checkpointing import checkpoint_activations
from dino_core.backbone_names import backbone_names, check_backbone_name, setting_problems, sizing
from dino_core.config import ConfigError, CropsConfig, ModelConfig
from dino_core.stochastic_depth import StochasticDepth, adopt_stochastic_depth, depth_masks, remove_stochastic_depth

__all__ = [
    "adopt_backbone",
    "backbone_names",
    "build_backbone",
    "check_backbone_name",
    "check_crop_sizes",
    "compile_backbone",
    "num_features",
    "swiglu_arguments",
    "try_images",
]

_REFUSALS = (AssertionError, RuntimeError, ValueError)
"""What timm's models raise for sizes that they do not take."""


def build_backbone(config: ModelConfig, image_size: int, *, drop_path: float = 0.0) -> nn.Module:
    """A timm model with random weights from torch's global RNG, without classifier.

    Its forward gives pooled features [n, D], D = `num_features`: a ViT's normalised class token or the mean of its
    patches, a convnet's global average, or whatever else the model pools by. Stochastic depth is the model's own rule
    for `drop_path`, drawn by `StochasticDepth`. The dropout that a few models have is off: it would be drawn from
    torch's global RNG, and so depend on the number of workers.

    Args:
        image_size: side of the global crops, pixels; a ViT's position embeddings are made for it and interpolated
            for other sizes by timm (bicubic and antialiased; the authors of DINO do not antialias).
        drop_path: rate of the last block.

    Raises:
        ConfigError: an unknown name, a setting that this kind of model does not have, sizes that it cannot be built
            with, or a drop_path or activation checkpointing that it does not know.
    """
    check_backbone_name(config.backbone)
    kind = sizing(config.backbone)
    arguments = backbone_arguments(config, image_size)
    if config.swiglu:
        arguments |= swiglu_arguments(config, arguments)
    if kind.multiples_of_patch and config.patch_size is not None:
        _check_multiple("global_size", image_size, config.patch_size)
    backbone = _create(config, arguments, drop_path)
    if kind.multiples_of_patch:
        _check_multiple("global_size", image_size, _patch_size(backbone))
    _check_tokens(backbone, config)
    if kind.settings:
        class_token = dict(backbone.named_parameters(recurse=False)).get("cls_token")
        if class_token is not None:  # timm starts it at 1e-6, the authors of DINO at 0.02 like everything else
            nn.init.trunc_normal_(class_token, std=0.02)
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if drop_path > 0 and config.drop_path_schedule == "uniform":
        _make_uniform(backbone, config)
    adopt_stochastic_depth(backbone)
    if drop_path == 0:  # some models have a rate of their own
        remove_stochastic_depth(backbone)
    elif config.depth != 1 and depth_masks(backbone) is None:  # the rates of one block are (0,)
        raise _no_stochastic_depth(config, drop_path)
    if config.activation_checkpointing:
        try:
            checkpoint_activations(backbone)
        except NotImplementedError as error:
            raise ConfigError(
                f"pretrain.model.activation_checkpointing = True: must be false, {config.backbone} cannot: {error}"
            ) from error
    return backbone


def adopt_backbone(module: nn.Module, image_size: int) -> int:
    """Make a backbone of a network of one's own; D, the width of its features.

    timm's `DropPath` layers in it are replaced, in place, by `StochasticDepth`. Nothing else changes.

    Raises:
        ConfigError: for two images of `image_size` pixels, in evaluation mode, it does not give finite features [2, D].
    """
    output = try_images(module, image_size)
    problem = _problem(output)
    if problem:
        raise ConfigError(
            f"pretrain.model.backbone = {type(module).__name__}: must turn images [2, 3, {image_size}, {image_size}] "
            f"into features [2, D], {problem}"
        )
    adopt_stochastic_depth(module)
    return int(output.shape[1])


def num_features(backbone: nn.Module) -> int:
    """D, the width of a timm backbone's features (of the pooled ones, where timm tells the two apart)."""
    width = getattr(backbone, "head_hidden_size", backbone.num_features)
    assert isinstance(width, int)
    return width


def check_crop_sizes(backbone: nn.Module, config: ModelConfig, crops: CropsConfig) -> None:
    """Run two images of each size through the backbone, in evaluation mode on the device it is on.

    Raises:
        ConfigError: the backbone cannot take crops of these sizes.
    """
    sizes = {"global_size": crops.global_size}
    if crops.num_local_crops:
        sizes["local_size"] = crops.local_size
    for name, size in sizes.items():
        if sizing(config.backbone).multiples_of_patch:
            _check_multiple(name, size, _patch_size(backbone))
        try:
            with _rows_dropped(backbone) as rows:
                problem = _problem(try_images(backbone, size))
        except _REFUSALS as error:
            problem = _reason(error)
            if name == "local_size" and size != crops.global_size:
                problem += (
                    f"; set pretrain.crops.local_size = {crops.global_size} if it takes crops of one size only, or "
                    "pretrain.crops.num_local_crops = 0"
                )
            raise ConfigError(
                f"pretrain.crops.{name} = {size}: must be a size that {config.backbone} takes: {problem}"
            ) from error
        if problem:
            raise ConfigError(
                f"pretrain.model.backbone = {config.backbone}: must turn images into features [n, D], {problem}"
            )
        if rows - {2}:
            raise ConfigError(
                f"pretrain.model.drop_path = {config.drop_path:g}: must be 0, the stochastic depth of "
                f"{config.backbone} drops parts of images"
            )


def compile_backbone(backbone: nn.Module) -> nn.Module:
    """The same module, in place, run through `torch.compile` from its next call on.

    Names of parameters and buffers stay as they are, and copies of it are not compiled. Each shape of input and each
    of training, evaluation and no gradients is compiled at its first call, for sizes that are known make the better
    code; torch keeps 8 such versions of all modules together and runs what comes after them uncompiled, so a process
    that trains one model after another calls `torch.compiler.reset` between them.
    """
    backbone.compile(dynamic=False)
    return backbone


def backbone_arguments(config: ModelConfig, image_size: int) -> dict[str, Any]:
    """timm's arguments for the settings that are not none, and for the size of the images; JSON can hold them.

    Raises:
        ConfigError: an unknown name, or settings that its models do not have.
    """
    kind = sizing(config.backbone)
    problems = setting_problems(config)
    if problems:
        raise ConfigError("\n".join(problems))
    arguments = {
        argument: getattr(config, name) for name, argument in kind.settings.items() if getattr(config, name) is not None
    }
    image = {"img_size": image_size} if kind.image_size else {}
    return {**arguments, **image, **kind.any_size, **kind.no_dropout}


def swiglu_arguments(config: ModelConfig, arguments: dict[str, Any]) -> dict[str, Any]:
    """timm's arguments for SwiGLU with 2/3 of the hidden width, rounded up to a multiple of 8, as in DINOv2's code."""
    with torch.device("meta"):
        plain: Any = _create(config, arguments, 0.0)
    width, hidden = plain.embed_dim, plain.blocks[0].mlp.fc1.out_features
    hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    # timm cuts width x ratio down to a whole number, for gate and value together
    return {"mlp_layer": SwiGLUPacked, "act_layer": "silu", "mlp_ratio": (2 * hidden + 0.5) / width}


def _create(config: ModelConfig, arguments: dict[str, Any], drop_path: float) -> nn.Module:
    rate: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path > 0 else {}
    try:
        return timm.create_model(config.backbone, pretrained=False, num_classes=0, **arguments, **rate)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise _no_stochastic_depth(config, drop_path) from error
    except _REFUSALS as error:
        shown = ", ".join(f"{name} = {getattr(value, '__name__', value)}" for name, value in arguments.items())
        raise ConfigError(
            f"pretrain.model.backbone = {config.backbone}: timm cannot build it with {shown or 'these settings'}: "
            f"{_reason(error)}"
        ) from error


def _make_uniform(backbone: nn.Module, config: ModelConfig) -> None:
    """One rate for all branches; timm has an identity where its own rule gives 0."""
    places = [
        (module, name)
        for module in backbone.modules()
        for name, child in module.named_children()
        if re.fullmatch(r"drop_path\d*", name) and isinstance(child, DropPath | nn.Identity)
    ]
    if not places:
        raise ConfigError(
            f"pretrain.model.drop_path_schedule = uniform: must be linear, {config.backbone} names no such layers"
        )
    for module, name in places:
        setattr(module, name, DropPath(config.drop_path))


def _check_tokens(backbone: nn.Module, config: ModelConfig) -> None:
    """What timm lets pass: older ones pool the first patch for want of a class token, some ViTs leave registers out."""
    has_class_token = dict(backbone.named_parameters(recurse=False)).get("cls_token") is not None
    if config.pooling == "token" and not has_class_token:
        raise ConfigError(f"pretrain.model.pooling = token: must be avg or none, {config.backbone} has no class token")
    if config.num_register_tokens and backbone.num_prefix_tokens != config.num_register_tokens + has_class_token:
        raise ConfigError(
            f"pretrain.model.num_register_tokens = {config.num_register_tokens}: must be none, {config.backbone} has "
            "no place for them"
        )


def try_images(module: nn.Module, size: int) -> Any:
    """What a network gives for two images, in evaluation mode and without gradients; leaves no trace."""
    parameter = next(module.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    images = torch.randn(2, 3, size, size, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(device)
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            return module(images)
    finally:
        for part, training in modes:
            part.training = training


@contextlib.contextmanager
def _rows_dropped(backbone: nn.Module) -> Iterator[set[int]]:
    """The numbers of rows that reach stochastic depth."""
    rows: set[int] = set()
    layers = [module for module in backbone.modules() if isinstance(module, StochasticDepth)]
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: rows.add(inputs[0].shape[0])) for layer in layers]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def _problem(output: Any) -> str:
    """What is wrong with the output for two images; empty if they are features [2, D]."""
    if not isinstance(output, Tensor):
        return f"not into a {type(output).__name__}"
    if output.dim() != 2 or output.shape[0] != 2 or not output.shape[1] or not output.is_floating_point():
        return f"not into {output.dtype} {list(output.shape)}".replace("torch.", "")
    if not output.is_meta and not torch.isfinite(output).all():
        return "which must be finite"
    return ""


def _reason(error: Exception) -> str:
    if str(error):
        return str(error).splitlines()[0].strip(" .")
    places = [frame.line for frame in traceback.extract_tb(error.__traceback__) if "timm" in Path(frame.filename).parts]
    return f"{type(error).__name__} at {places[-1]}"


def _patch_size(backbone: nn.Module) -> int:
    patch_embed: Any = backbone.patch_embed
    return int(patch_embed.feat_ratio())  # of a hybrid: that of the convnet times that of its patches


def _check_multiple(name: str, size: int, patch: int) -> None:
    if size % patch:
        raise ConfigError(f"pretrain.crops.{name} = {size}: must be a multiple of the patch size {patch}")


def _no_stochastic_depth(config: ModelConfig, drop_path: float) -> ConfigError:
    return ConfigError(
        f"pretrain.model.drop_path = {drop_path:g}: must be 0, {config.backbone} has no stochastic depth"
    )
