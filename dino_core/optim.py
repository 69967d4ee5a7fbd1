"""Parameter groups, optimisers and gradient clipping."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

import torch
from timm.models._manipulate import group_with_matcher
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dino_core.config import ConfigError, OptimConfig
from dino_core.sharding import local_part, norms_of_whole

_TOKEN = re.compile(
    r"(cls|dist|reg|register|mask)_tokens?_?\d*"
    r"|(patch_|pixel_)?pos(_embed\w*)?|position_embedding_table"
    r"|relative_position_bias_table|rel_pos_[hw]|(height|width)_rel|attention_biases"
)
"""How timm's models, and the authors', call a parameter that is a token or a table of positions."""

_LAST_LAYERS = ("head.last_layer.", "patch_head.last_layer.")

_BEFORE_BLOCKS = re.compile(r"(\w+_token|pos_embed|patch_embed|norm_pre|rel_pos_bias|rope)\b")
"""Opens the names of a ViT's parameters in front of its blocks."""


def parameter_groups(config: OptimConfig, student: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters of a student with children `backbone`, `head` and perhaps `predictor` or `patch_head`.

    Parameters of a group have in common, under these keys: `decays`, whether they have weight decay, as all but biases
    and 1-D ones do (and tokens and positions, unless `decay_tokens`); `lr_scale`, the multiple of the learning rate;
    `last_layer`, whether they are prototypes that are frozen by learning rate. Those that decay come first.

    Raises:
        ConfigError: `layer_decay` or `patch_embed_lr_mult` for a backbone without known layers or patch embedding.
    """
    scales = _lr_scales(config, student.get_submodule("backbone"))
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        is_token = _TOKEN.fullmatch(name.rpartition(".")[2]) is not None
        decays = parameter.dim() != 1 and not name.endswith(".bias") and (config.decay_tokens or not is_token)
        last_layer = config.freeze_last_layer_by == "lr" and name.startswith(_LAST_LAYERS)
        groups.setdefault((decays, scales.get(name, 1.0), last_layer), []).append(parameter)
    return [
        {"params": groups[key], "decays": key[0], "lr_scale": key[1], "last_layer": key[2]}
        for key in sorted(groups, key=lambda key: not key[0])
    ]


def _lr_scales(config: OptimConfig, backbone: nn.Module) -> dict[str, float]:
    """By the names in the student, the multiples of the learning rate of the backbone's parameters."""
    names = [name for name, _ in backbone.named_parameters()]
    scales = dict.fromkeys(names, 1.0)
    if config.layer_decay != 1:
        above = _layers_above(backbone, names)
        if above is None:
            raise ConfigError(
                f"pretrain.optim.layer_decay = {config.layer_decay:g}: must be 1, the order of the layers of a "
                f"{type(backbone).__name__} is not known"
            )
        scales = {name: config.layer_decay ** above[name] for name in names}
    if config.patch_embed_lr_mult != 1:
        patch_embed = [name for name in names if name.startswith("patch_embed.")]
        if not patch_embed:
            raise ConfigError(
                f"pretrain.optim.patch_embed_lr_mult = {config.patch_embed_lr_mult:g}: must be 1, a "
                f"{type(backbone).__name__} has no patch embedding"
            )
        for name in patch_embed:
            scales[name] *= config.patch_embed_lr_mult
    return {f"backbone.{name}": scale for name, scale in scales.items()}


def _layers_above(backbone: nn.Module, names: Sequence[str]) -> Mapping[str, int] | None:
    """How many layers each parameter lies below the head, None where that is not known.

    ViTs by the rule of BEiT (arXiv 2106.08254) and DINOv2 (arXiv 2304.07193): with L blocks, L + 1 for tokens,
    positions and patch embedding, L - i for block i, 0 for what comes after. All others by the grouping that timm gives
    for the purpose, with the head where timm has the classifier; there a final norm may belong to the last block.
    """
    if isinstance(backbone, VisionTransformer | Eva | Beit):
        num_blocks = len(backbone.blocks)
        return {name: num_blocks + 1 - _vit_layer(name, num_blocks) for name in names}
    matcher = getattr(backbone, "group_matcher", None)  # a few of timm's models, and all others, have none
    if matcher is None:
        return None
    after = "<after>"  # matches nothing, so it lands where a classifier does
    layers = group_with_matcher(((name, None) for name in (*names, after)), matcher(coarse=False), reverse=True)
    return {name: layers[after] - layers[name] for name in names}


def _vit_layer(name: str, num_blocks: int) -> int:
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return 0 if _BEFORE_BLOCKS.match(name) else num_blocks + 1


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step for each matrix is scaled to its own length.

    ::

        g = grad + weight_decay * w            (1-D: g = grad)
        g = g * eta * |w| / |g|                (1-D, or a norm of 0: unchanged)
        mu = momentum * mu + g
        w = w - lr * mu

    Source: You et al. (arXiv 1708.03888), algorithm 1, with the exemptions of Barlow Twins (arXiv 2103.03230).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        assert closure is None, "LARS takes no closure"
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            updates = {parameter: local_part(parameter.grad) for parameter in parameters}
            matrices = [parameter for parameter in parameters if parameter.dim() != 1]
            for matrix in matrices:
                updates[matrix] = updates[matrix].add(local_part(matrix), alpha=group["weight_decay"])
            if matrices:
                norms = torch.stack([x.norm() for m in matrices for x in (local_part(m), updates[m])])
                lengths = norms_of_whole(matrices, norms).unflatten(0, (-1, 2))  # [P, 2]: of weight and update
                for matrix, (length, update_length) in zip(matrices, lengths, strict=True):
                    ratio = group["eta"] * length / update_length
                    updates[matrix] = updates[matrix] * torch.where((length > 0) & (update_length > 0), ratio, 1.0)
            for parameter in parameters:
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                moment = local_part(state["momentum_buffer"]).mul_(group["momentum"]).add_(updates[parameter])
                local_part(parameter).add_(moment, alpha=-group["lr"])
        return None


def build_optimizer(config: OptimConfig, student: nn.Module) -> torch.optim.Optimizer:
    """The optimiser over `parameter_groups`; learning rate and weight decay are set before each step.

    Raises:
        ConfigError: see `parameter_groups`.
    """
    groups = parameter_groups(config, student)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    return LARS(groups)


def set_hyperparameters(
    optimizer: torch.optim.Optimizer, lr: float, weight_decay: float, *, freeze_last_layer: bool = False
) -> None:
    """The learning rate of each group, times its `lr_scale`, and the weight decay of those that have any.

    `freeze_last_layer` sets both to 0 for prototypes that are frozen by learning rate, whose moments go on: in AdamW a
    learning rate of 0 is enough, the others would gather the decay in their momentum. It does nothing for prototypes
    that are frozen by their gradient.
    """
    for group in optimizer.param_groups:
        frozen = freeze_last_layer and group["last_layer"]
        group["lr"] = 0.0 if frozen else lr * group["lr_scale"]
        group["weight_decay"] = weight_decay if group["decays"] and not frozen else 0.0


@torch.no_grad()
def clip_gradients_(
    student: nn.Module, max_norm: float | None, mode: Literal["parameter", "module", "global"]
) -> Tensor:
    """Scale down, in place, gradients whose L2 norm exceeds `max_norm`, by max_norm / (norm + 1e-6).

    The norm is each gradient's own (`parameter`, as the authors of DINO do), that of each child of the student
    (`module`, DINOv2: backbone, heads and predictor) or that of all (`global`, as `torch.nn.utils.clip_grad_norm_`).
    None only measures. Parameters without gradient do not count, sharded gradients count as a whole. Nothing is read
    back from the device.

    Returns:
        [], the L2 norm of all gradients together, before clipping.

    Raises:
        ValueError: there is no gradient at all.
    """
    gradients = {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}
    if not gradients:
        raise ValueError("no parameter of the student has a gradient: clipping comes after the backward pass")
    parts = [local_part(gradient) for gradient in gradients.values()]
    norms = norms_of_whole(list(gradients.values()), torch.stack(torch._foreach_norm(parts)))  # [P]
    if max_norm is not None:
        factors = (max_norm / (_norms_to_clip(norms, list(gradients), mode) + 1e-6)).clamp_(max=1.0)
        torch._foreach_mul_(parts, list(factors))
    return torch.linalg.vector_norm(norms)


def _norms_to_clip(norms: Tensor, names: Sequence[str], mode: Literal["parameter", "module", "global"]) -> Tensor:
    """For each of P gradients the norm that counts for it: [P] -> [P]."""
    if mode == "parameter":
        return norms
    if mode == "global":
        return torch.linalg.vector_norm(norms).expand_as(norms)
    sizes = [len(list(child)) for _, child in groupby(names, key=lambda name: name.partition(".")[0])]
    return torch.cat([torch.linalg.vector_norm(child).expand_as(child) for child in norms.split(sizes)])


def cancel_last_layer_gradients_(*heads: nn.Module | None) -> None:
    """Leave the prototypes, if there are any, out of the next optimiser step: no update, no decay, no moments."""
    for head in heads:
        last_layer = None if head is None else head.last_layer
        if last_layer is not None:
            assert isinstance(last_layer, nn.Module)
            for parameter in last_layer.parameters():
                parameter.grad = None
