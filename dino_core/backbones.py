"""Backbones: timm models that turn images [n, 3, H, W] into features [n, D]."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from dino_core.backbone_names import backbone_modules, backbone_names, check_backbone_name
from dino_core.config import ConfigError, CropsConfig, ModelConfig
from dino_core.stochastic_depth import adopt_stochastic_depth, depth_masks

__all__ = [
    "backbone_arguments",
    "backbone_names",
    "build_backbone",
    "check_backbone_name",
    "check_crop_sizes",
    "num_features",
]

_VIT_MODULES = ("vision_transformer", "deit")
"""timm modules whose models take crops of any multiple of the patch size."""

_SIZES = ("patch_size", "embed_dim", "depth", "num_heads")


def build_backbone(config: ModelConfig, image_size: int, *, drop_path: float = 0.0) -> nn.Module:
    """A timm model with random weights from torch's global RNG, without classifier.

    Its forward gives pooled features [n, D], D = `.num_features`: a ViT's normalised class token (or whatever else the
    model pools by), a convnet's global average. Stochastic depth is the model's own rule for `drop_path`, drawn by
    `StochasticDepth`.

    Args:
        image_size: side of the global crops, pixels; a ViT's position embeddings are made for it and interpolated
            for other sizes by timm (bicubic and antialiased; the authors of DINO do not antialias).
        drop_path: rate of the last block.

    Raises:
        ConfigError: an unknown name, ViT sizes for another kind of model, a patch size that does not divide
            `image_size`, or a drop_path that the model does not know.
    """
    arguments = backbone_arguments(config, image_size)
    is_vit = backbone_modules()[config.backbone] in _VIT_MODULES
    if drop_path > 0:
        arguments["drop_path_rate"] = drop_path
    if is_vit and config.patch_size is not None:
        _check_multiple("global_size", image_size, config.patch_size)
    try:
        backbone = timm.create_model(config.backbone, pretrained=False, num_classes=0, **arguments)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise _no_stochastic_depth(config, drop_path) from error
    if is_vit:
        _check_multiple("global_size", image_size, _patch_size(backbone))
        class_token = dict(backbone.named_parameters(recurse=False)).get("cls_token")
        if class_token is not None:  # timm starts it at 1e-6, the authors of DINO at 0.02 like everything else
            nn.init.trunc_normal_(class_token, std=0.02)
    adopt_stochastic_depth(backbone)
    if drop_path > 0 and config.depth != 1 and depth_masks(backbone) is None:  # the rates of one block are (0,)
        raise _no_stochastic_depth(config, drop_path)
    return backbone


def backbone_arguments(config: ModelConfig, image_size: int) -> dict[str, Any]:
    """What turns the timm model `config.backbone` into this backbone, stochastic depth aside; JSON can hold it.

    Raises:
        ConfigError: an unknown name, or ViT sizes for another kind of model.
    """
    check_backbone_name(config.backbone)
    arguments: dict[str, Any] = {name: getattr(config, name) for name in _SIZES if getattr(config, name) is not None}
    if backbone_modules()[config.backbone] in _VIT_MODULES:
        return arguments | {"img_size": image_size, "dynamic_img_size": True}
    if arguments:
        lines = (
            f"pretrain.model.{k} = {v}: must be none, {config.backbone} is not a ViT" for k, v in arguments.items()
        )
        raise ConfigError("\n".join(lines))
    return arguments


def num_features(backbone: nn.Module) -> int:
    """D, the width of a backbone's features (of the pooled ones, where timm tells the two apart)."""
    width = getattr(backbone, "head_hidden_size", backbone.num_features)
    assert isinstance(width, int)
    return width


def check_crop_sizes(backbone: nn.Module, config: ModelConfig, crops: CropsConfig) -> None:
    """Raises:
    ConfigError: the backbone cannot take crops of these sizes.
    """
    sizes = {"global_size": crops.global_size}
    if crops.num_local_crops:
        sizes["local_size"] = crops.local_size
    if backbone_modules()[config.backbone] in _VIT_MODULES:
        for name, size in sizes.items():
            _check_multiple(name, size, _patch_size(backbone))
        return
    pretrained = timm.get_pretrained_cfg(config.backbone)
    if pretrained is not None and pretrained.fixed_input_size:
        expected = pretrained.input_size[-1]
        for name, size in sizes.items():
            if size != expected:
                raise ConfigError(
                    f"pretrain.crops.{name} = {size}: must be {expected}, the only size that {config.backbone} takes"
                )


def _patch_size(backbone: nn.Module) -> int:
    patch_embed = backbone.patch_embed
    assert isinstance(patch_embed, nn.Module)
    return int(patch_embed.patch_size[0])  # type: ignore[index]


def _check_multiple(name: str, size: int, patch: int) -> None:
    if size % patch:
        raise ConfigError(f"pretrain.crops.{name} = {size}: must be a multiple of the patch size {patch}")


def _no_stochastic_depth(config: ModelConfig, drop_path: float) -> ConfigError:
    return ConfigError(
        f"pretrain.model.drop_path = {drop_path:g}: must be 0, {config.backbone} has no stochastic depth"
    )


def compile_backbone(backbone: nn.Module) -> None:
    backbone.compile()


def adopt_backbone(module: nn.Module, image_size: int) -> int:
    raise NotImplementedError
