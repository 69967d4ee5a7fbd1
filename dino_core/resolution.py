"""A network's weights at another image size: position embeddings interpolated, all else as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from dino_core.config import ConfigError, PretrainConfig
from dino_core.networks import CropNetwork, build_student
from dino_core.sharding import is_sharded, part_like, whole_tensor
from dino_core.stages import Stage

POSITIONS = "backbone.pos_embed"


def carry_over(source: CropNetwork, target: CropNetwork) -> None:
    """Load the weights and buffers of a network into one that was built for other crops.

    Absolute position embeddings [1, P + N, D] of N patches behind P other tokens are interpolated over the grid of the
    patches by timm, bicubic and antialiased, as it does for crops of other sizes in every forward pass. Networks may be
    sharded, so every rank calls it.

    Raises:
        ValueError: other tensors differ in shape.
    """
    tensors, expected = source.state_dict(), target.state_dict()
    if changed := resized(tensors, expected):
        if changed != [POSITIONS]:
            raise ValueError(f"{', '.join(changed)}: of another shape in the other network")
        old, new = _grid(source.backbone), _grid(target.backbone)
        num_prefix = expected[POSITIONS].shape[1] - new[0] * new[1]
        like = expected[POSITIONS]
        positions = resample_abs_pos_embed(whole_tensor(tensors[POSITIONS]), new, old, num_prefix)
        if is_sharded(like):
            tensors[POSITIONS] = part_like(like, lambda first, last: positions[first:last], like.device)
        else:
            tensors[POSITIONS] = positions
    target.load_state_dict(tensors)


def resized(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """The tensors that have another shape, or are missing, in one of two networks."""
    names = sorted(one.keys() | other.keys())
    return [name for name in names if name not in one or name not in other or one[name].shape != other[name].shape]


def check_stages(stages: tuple[Stage, ...]) -> None:
    """Build each stage's network without memory (on torch's meta device) and compare it with that of the first.

    Raises:
        ConfigError: a network cannot be built for the crops of a stage, or has more in it than position embeddings that
            depends on their size.
    """
    with torch.device("meta"):
        networks = [_build(stage.config, stage.index) for stage in stages]
    for stage, network in zip(stages[1:], networks[1:], strict=True):
        other = resized(networks[0].state_dict(), network.state_dict())
        if other and (other != [POSITIONS] or networks[0].state_dict()[POSITIONS].dim() != 3):
            size, first = stage.config.crops.global_size, stages[0].config.crops.global_size
            raise ConfigError(
                f"pretrain.stages[{stage.index - 1}].crops.global_size = {size}: must be {first} as in the first stage "
                f"with pretrain.model.backbone = {stage.config.model.backbone}, whose {other[0]} depends on it; only "
                "position embeddings can be interpolated"
            )


def _build(config: PretrainConfig, index: int) -> CropNetwork:
    try:
        return build_student(config)
    except ConfigError as error:
        lines = str(error).splitlines()
        where = f"pretrain.stages[{index - 1}]: " if index else ""
        raise ConfigError("\n".join(where + line for line in lines)) from error


def _grid(backbone: nn.Module) -> list[int]:
    patch_embed: Any = backbone.get_submodule("patch_embed")
    return list(patch_embed.grid_size)
