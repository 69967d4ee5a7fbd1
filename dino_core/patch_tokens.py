"""The patch tokens of a timm ViT, and a mask token in the place of masked patches.

Whatever the ViT does between its patch embedding and its final norm stays its own: hooks on the two put the mask token
in and take the tokens out. They do nothing outside `forward_with_patches`, and a copy of the backbone has them too.

Axes: n crops, N patches, D features.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dino_core.backbones import try_images
from dino_core.config import ConfigError
from dino_core.masking import MaskedPatches, put_mask_token

_MASK, _WANTED, _TOKENS = "masked_patches", "tokens_are_wanted", "tokens"
"""Attributes of the patch embedding and of the final norm during a pass."""


def adopt_patch_tokens(backbone: nn.Module, name: str, image_size: int) -> tuple[int, int]:
    """Make `forward_with_patches` possible for a ViT and crops of `image_size` pixels; the grid of its patches.

    Raises:
        ConfigError: it has no class token that it pools, or no patch tokens of the same width beside it.
    """
    problem = f"pretrain.ibot.weight: must be 0 with pretrain.model.backbone = {name}, "
    parts = dict(backbone.named_children())
    if dict(backbone.named_parameters(recurse=False)).get("cls_token") is None:
        raise ConfigError(f"{problem}which has no class token beside its patches; must be a ViT that has")
    if not {"patch_embed", "norm"} <= parts.keys() or hasattr(backbone, "mask_token"):
        raise ConfigError(f"{problem}whose patches cannot be masked")
    found: dict[str, Any] = {}
    hooks = [
        parts[part].register_forward_hook(lambda _, inputs, output, part=part: found.update({part: output}))
        for part in ("patch_embed", "norm")
    ]
    try:
        features = try_images(backbone, image_size)
    finally:
        for hook in hooks:
            hook.remove()
    patches, tokens = found.get("patch_embed"), found.get("norm")
    if not (isinstance(patches, Tensor) and isinstance(tokens, Tensor) and tokens.dim() == 3):
        raise ConfigError(f"{problem}whose patches cannot be masked")
    num_patches = patches[0, ..., 0].numel()
    side = math.isqrt(num_patches)
    if (
        features.shape != (2, tokens.shape[2])
        or patches.shape[-1] != tokens.shape[2]
        or tokens.shape[1] <= num_patches
        or side**2 != num_patches
    ):
        raise ConfigError(f"{problem}whose patches have other sizes than its features")
    if not features.is_meta and not torch.equal(features, tokens[:, 0]):
        raise ConfigError(f"{problem}whose features are not its class token; set pretrain.model.pooling = token")
    parts["patch_embed"].register_forward_hook(_put_mask_token)
    parts["norm"].register_forward_hook(_keep_tokens)
    return side, side


def add_mask_token(backbone: nn.Module) -> None:
    """A parameter `mask_token` [1, D] of zeros, as in both references."""
    class_token = backbone.get_parameter("cls_token")
    backbone.register_parameter("mask_token", nn.Parameter(torch.zeros(1, class_token.shape[-1])))


def remove_mask_token(backbone: nn.Module) -> None:
    """Of a teacher, which never sees a mask."""
    if hasattr(backbone, "mask_token"):
        del backbone.mask_token


def forward_with_patches(
    backbone: nn.Module, crops: Tensor, masked: MaskedPatches | None = None
) -> tuple[Tensor, Tensor]:
    """Crops [n, 3, H, W] -> class tokens [n, D] and normalised patch tokens [n, N, D].

    Args:
        masked: the patches in whose place the embedding is the mask token; positions are added to it as to any other.
    """
    patch_embed, norm = backbone.get_submodule("patch_embed").__dict__, backbone.get_submodule("norm").__dict__
    if masked is not None:
        # the token is looked up where it is used: in a sharded backbone it is whole during the pass alone
        patch_embed[_MASK] = (masked.mask, partial(backbone.get_parameter, "mask_token"))
    norm[_WANTED] = True
    try:
        features = backbone(crops)
        tokens = norm.pop(_TOKENS)
    finally:
        norm[_WANTED] = False
        patch_embed[_MASK] = None
    num_patches = _num_patches(backbone, crops)
    return features, tokens[:, tokens.shape[1] - num_patches :]


def _num_patches(backbone: nn.Module, crops: Tensor) -> int:
    patch_embed: Any = backbone.get_submodule("patch_embed")
    return int(crops.shape[-2] // patch_embed.feat_ratio()) * int(crops.shape[-1] // patch_embed.feat_ratio())


def count_patches(backbone: nn.Module, image_size: int) -> tuple[int, int]:
    """The grid of a ViT's patches in crops of `image_size` pixels."""
    patch_embed: Any = backbone.get_submodule("patch_embed")
    side = int(image_size // patch_embed.feat_ratio())
    return side, side


def _put_mask_token(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    given = module.__dict__.get(_MASK)
    if given is None:
        return None
    mask, mask_token = given
    return put_mask_token(output, mask, mask_token())


def _keep_tokens(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    if module.__dict__.get(_WANTED):
        module.__dict__[_TOKENS] = output
