"""Student and teacher: a backbone, a head and perhaps the student's predictor, for crops of several sizes.

Axes: n crops, D features, K outputs of a head, M masked patches.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_core.activation_checkpointing import checkpoint_activations
from dino_core.backbones import adopt_backbone, build_backbone, check_crop_sizes, num_features
from dino_core.batch_norm import can_be_synchronised, use_global_batch_norm
from dino_core.config import ConfigError, HeadConfig, PretrainConfig
from dino_core.config_problems import depth_group_problems
from dino_core.distributed import world_size
from dino_core.heads import DINOHead, Predictor, Prototypes
from dino_core.masking import MaskedPatches
from dino_core.packing import pack, tokens_of
from dino_core.patch_tokens import add_mask_token, adopt_patch_tokens, forward_with_patches, remove_mask_token
from dino_core.stochastic_depth import CropGroup, depth_masks, remove_stochastic_depth
from dino_core.sub_batch_depth import drop_sub_batches


class Outputs(NamedTuple):
    """What a network gives for crops."""

    crops: Tensor | None
    """[n_1 + n_2 + ..., K]; None where nothing compares class tokens."""
    features: Tensor
    """[n_1 + n_2 + ..., D], what they are made from."""
    patches: Tensor | None = None
    """[M, K of the patches' head], where patches are masked."""


class CropNetwork(nn.Module):
    """Outputs for crops given as one batch per size: one backbone pass per size, one head pass over all crops.

    Args:
        patch_head: of masked patches, if they have one of their own, or prototypes of their own behind `head`.
        grid: H, W, patches of a global crop, where patches are masked.
        class_view: see `IBOTConfig`.
        class_outputs: whether class tokens go through the head.
        packing: one backbone pass over all crops, by a backbone that `pack` has seen to.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: DINOHead,
        predictor: Predictor | None = None,
        *,
        patch_head: DINOHead | Prototypes | None = None,
        grid: tuple[int, int] | None = None,
        class_view: Literal["masked", "full"] = "masked",
        class_outputs: bool = True,
        packing: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.predictor = predictor
        self.patch_head = patch_head
        self.grid = grid
        self.class_view = class_view
        self.class_outputs = class_outputs
        self.packing = packing
        self._depth_masks = depth_masks(backbone)
        self._part = _Part(seed=0, step=0, num_images=1, first_image=0, share=1)

    def begin_pass(self, seed: int, step: int, *, num_images: int, first_image: int = 0, share: int) -> None:
        """Fix what stochastic depth drops in the next forward pass.

        Args:
            num_images: in the pass, from number `first_image` on of the `share` images of this rank.
        """
        self._part = _Part(seed, step, num_images, first_image, share)

    def features(self, groups: Sequence[Tensor]) -> Tensor:
        """[n_1, 3, H_1, W_1], [n_2, 3, H_2, W_2], ... -> [n_1 + n_2 + ..., D]."""
        return torch.cat(self._look([*enumerate(groups)])[0])

    def _look(
        self, seen: Sequence[tuple[int, Tensor]], masked: MaskedPatches | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Features of numbered groups of crops and, if patches of the first one are masked, its patch tokens."""
        if self.packing and len(seen) > 1:
            return self._look_at_once(seen, masked)
        features, tokens = [], None
        for place, (index, crops) in enumerate(seen):
            self._begin([(index, crops)])
            if masked is not None and place == 0:
                of_crops, tokens = forward_with_patches(self.backbone, crops, masked)
                features.append(of_crops)
            else:
                features.append(self.backbone(crops))
        return features, tokens

    def _look_at_once(
        self, seen: Sequence[tuple[int, Tensor]], masked: MaskedPatches | None
    ) -> tuple[list[Tensor], Tensor | None]:
        self._begin(seen, packed=True)
        masks = [None if masked is None or place else masked.mask for place in range(len(seen))]
        features, tokens = self.backbone([crops for _, crops in seen], masks)
        if masked is None:
            return features, None
        return features, tokens[0][:, tokens[0].shape[1] - masked.mask.shape[1] :]

    def _begin(self, seen: Sequence[tuple[int, Tensor]], *, packed: bool = False) -> None:
        """Draw what stochastic depth drops in a pass over numbered groups of crops, one of them unless it is packed."""
        part = self._part
        if self._depth_masks is not None and self.training:
            self._depth_masks.begin_pass(
                part.seed,
                part.step,
                [
                    CropGroup(index, len(crops) // part.num_images, tokens_of(self.backbone, crops) if packed else None)
                    for index, crops in seen
                ],
                num_images=part.num_images,
                device=seen[0][1].device,
                first_image=part.first_image,
                share=part.share,
            )

    def forward(self, groups: Sequence[Tensor], masked: MaskedPatches | None = None) -> Outputs:
        """The outputs of all crops and, of the first group, those of its `masked` patches, which it does not see."""
        seen = [*enumerate(groups)]
        if masked is None:
            features = torch.cat(self._look(seen)[0])
            return Outputs(self.head(features, self.predictor), features)
        full = self.class_view == "full"
        if full:  # a pass of its own for the masked crops
            seen.insert(0, (len(groups), groups[0]))
        found, tokens = self._look(seen, masked)
        features = torch.cat(found[1:] if full else found)
        assert tokens is not None
        outputs, patches = self._project(features, tokens.flatten(0, 1)[masked.rows])
        return Outputs(outputs, features, patches)

    def look_at_patches(self, crops: Tensor, masked: MaskedPatches) -> tuple[Outputs, Tensor]:
        """As a teacher sees crops: all of them, and the outputs of the patches that the student does not see.

        Returns:
            The outputs, and all patch tokens [n, N, D].
        """
        self._begin([(0, crops)])
        features, tokens = forward_with_patches(self.backbone, crops)
        outputs, patches = self._project(features, tokens.flatten(0, 1)[masked.rows])
        return Outputs(outputs, features, patches), tokens

    @property
    def head_of_patches(self) -> DINOHead | Prototypes:
        return self.head if self.patch_head is None else self.patch_head

    def embed_patches(self, patches: Tensor) -> Tensor:
        """What stands in front of the patches' prototypes: [n, D] -> [n, bottleneck_dim]."""
        return (self.patch_head if isinstance(self.patch_head, DINOHead) else self.head).embed(patches)

    def _project(self, features: Tensor, patches: Tensor) -> tuple[Tensor | None, Tensor]:
        """Through the heads; in one pass if there is only one MLP, as its batch norm sees one batch."""
        if not self.class_outputs:
            return None, self.head(patches)
        if isinstance(self.patch_head, Prototypes):
            embeddings = self.head.embed(torch.cat([features, patches]))
            assert self.head.last_layer is not None
            return self.head.last_layer(embeddings[: len(features)]), self.patch_head(embeddings[len(features) :])
        if self.patch_head is not None:
            return self.head(features, self.predictor), self.patch_head(patches)
        both = self.head(torch.cat([features, patches]))
        return both[: len(features)], both[len(features) :]


class _Part(NamedTuple):
    """Which images of which step a forward pass is about."""

    seed: int
    step: int
    num_images: int
    first_image: int
    share: int


def build_student(config: PretrainConfig, backbone: nn.Module | None = None) -> CropNetwork:
    """The student, with weights from torch's global RNG; a given `backbone` is copied and keeps its own.

    Raises:
        ConfigError: model, head and crops do not fit together.
    """
    crops = config.crops
    name = config.model.backbone if backbone is None else type(backbone).__name__
    if backbone is None:
        backbone = build_backbone(config.model, crops.global_size, drop_path=config.model.drop_path)
        check_crop_sizes(backbone, config.model, crops)
        in_dim = num_features(backbone)
    else:
        backbone, in_dim = _own_backbone(backbone, config)
    _change_passes(backbone, config, name)
    settings, ibot, packing = config.head, config.ibot, config.model.packing
    head = _head(in_dim, settings)
    predictor = None
    if config.predictor.num_layers:
        predictor = Predictor(
            settings.bottleneck_dim,
            num_layers=config.predictor.num_layers,
            hidden_dim=config.predictor.hidden_dim,
            batch_norm=config.predictor.batch_norm,
            activation=settings.activation,
        )
    if not ibot.weight:
        return CropNetwork(backbone, head, predictor, packing=packing)
    grid = adopt_patch_tokens(backbone, name, crops.global_size)
    add_mask_token(backbone)
    patch_head: DINOHead | Prototypes | None = None
    if ibot.head == "shared_mlp":
        num_prototypes = ibot.num_prototypes or settings.num_prototypes
        assert num_prototypes is not None
        patch_head = Prototypes(settings.bottleneck_dim, num_prototypes, norm_last_layer=settings.norm_last_layer)
    if ibot.head == "untied":
        own = dataclasses.replace(
            settings,
            num_prototypes=ibot.num_prototypes or settings.num_prototypes,
            bottleneck_dim=ibot.bottleneck_dim or settings.bottleneck_dim,
        )
        patch_head = _head(in_dim, own)
    return CropNetwork(
        backbone,
        head,
        patch_head=patch_head,
        grid=grid,
        class_view=ibot.class_view,
        class_outputs=config.loss.weight > 0,
        packing=packing,
    )


def _change_passes(backbone: nn.Module, config: PretrainConfig, name: str) -> None:
    """What changes how a backbone computes, and no weight of it.

    Raises:
        ConfigError: it cannot.
    """
    model = config.model
    if model.packing:
        try:
            pack(backbone)
        except NotImplementedError as error:
            raise ConfigError(
                f"pretrain.model.packing = True: must be false with pretrain.model.backbone = {name}: {error}"
            ) from error
    if model.drop_path_mode == "sub_batch":
        if problems := depth_group_problems(config, world_size()):
            raise ConfigError(f"pretrain.{problems[0]}")
        try:
            drop_sub_batches(backbone, model.drop_path_group_size)
        except NotImplementedError as error:
            raise ConfigError(
                f"pretrain.model.drop_path_mode = sub_batch: must be mask with pretrain.model.backbone = {name}: "
                f"{error}"
            ) from error


def _head(in_dim: int, settings: HeadConfig) -> DINOHead:
    return DINOHead(
        in_dim,
        settings.num_prototypes,
        num_layers=settings.num_layers,
        hidden_dim=settings.hidden_dim,
        bottleneck_dim=settings.bottleneck_dim,
        norm_last_layer=settings.norm_last_layer,
        batch_norm=settings.batch_norm,
        bottleneck_norm=settings.bottleneck_norm,
        output_batch_norm=settings.output_batch_norm,
        activation=settings.activation,
    )


def _own_backbone(module: nn.Module, config: PretrainConfig) -> tuple[nn.Module, int]:
    """A copy of a user's module that can be trained, saved and restored, and the width of its features.

    Raises:
        ConfigError: it cannot.
    """
    backbone, crops = copy.deepcopy(module), config.crops
    problem = f"pretrain.model.backbone = {type(module).__name__}: "
    in_dim = adopt_backbone(backbone, crops.global_size)
    if crops.num_local_crops and (width := adopt_backbone(backbone, crops.local_size)) != in_dim:
        raise ConfigError(
            f"{problem}must give features of one width, not {in_dim} for crops of {crops.global_size} pixels and "
            f"{width} for {crops.local_size}"
        )
    tensors = backbone.state_dict()
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel()]
    if len(set(storages)) < len(storages):
        raise ConfigError(f"{problem}has weights that share memory, which a checkpoint cannot hold; must have none")
    if not_finite := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ConfigError(
            f"{problem}must be finite, {', '.join(not_finite[:3])} is not; make it a non-persistent buffer"
        )
    if unused := _unused_parameters(backbone, crops.global_size):
        raise ConfigError(
            f"{problem}does not use its trainable {', '.join(unused[:3])}; remove them or set requires_grad_(False)"
        )
    if config.model.activation_checkpointing:
        try:
            checkpoint_activations(backbone)
        except NotImplementedError as error:
            raise ConfigError(f"pretrain.model.activation_checkpointing = True: {error}") from error
    return backbone, in_dim


def _unused_parameters(backbone: nn.Module, image_size: int) -> list[str]:
    """Trainable parameters without a part in the features; gradients of several workers wait for them for ever."""
    trial = copy.deepcopy(backbone).eval()
    trial(torch.zeros(2, 3, image_size, image_size)).sum().backward()
    return [name for name, p in trial.named_parameters() if p.requires_grad and p.grad is None]


def build_teacher(student: CropNetwork, config: PretrainConfig) -> CropNetwork:
    """A copy of the student without stochastic depth, predictor and gradients.

    Raises:
        ConfigError: it would read running statistics that never move.
    """
    backbone, head = copy.deepcopy(student.backbone), copy.deepcopy(student.head)
    remove_stochastic_depth(backbone)
    remove_mask_token(backbone)
    teacher = CropNetwork(
        backbone,
        head,
        patch_head=copy.deepcopy(student.patch_head),
        grid=student.grid,
        class_outputs=student.class_outputs,
    ).requires_grad_(False)
    settings = config.teacher
    norms = [module for module in teacher.modules() if isinstance(module, _BatchNorm)]
    if settings.ema_buffers:
        for norm in norms:
            norm.momentum = 0.0  # its own passes leave the running statistics alone
    if settings.checkpoint is not None and not settings.ema_buffers and norms:
        raise ConfigError(
            "pretrain.teacher.ema_buffers = False: must be true with pretrain.teacher.checkpoint; "
            f"{config.model.backbone} has batch norms, and the average of the student sees no crops"
        )
    if settings.mode == "eval" and not settings.ema_buffers and norms:
        raise ConfigError(
            "pretrain.teacher.mode = eval: needs pretrain.teacher.ema_buffers = true; "
            f"{config.model.backbone} has batch norms, whose running statistics would never move"
        )
    return teacher.train(settings.mode == "train")


def synchronise_batch_norm(network: CropNetwork, config: PretrainConfig, device: torch.device) -> CropNetwork:
    """With several workers, make batch norms use the statistics of the global batch.

    Raises:
        ConfigError: there are several workers, and the backbone has batch norms with a forward pass of their own.
    """
    if world_size() == 1:
        return network
    if any(isinstance(module, _BatchNorm) and not can_be_synchronised(module) for module in network.modules()):
        raise ConfigError(
            f"pretrain.model.backbone = {config.model.backbone}: has batch norms of its own kind, which cannot be "
            f"synchronised over {world_size()} workers; must be another, or run with cluster.num_workers = 1"
        )
    if device.type != "cuda":
        use_global_batch_norm(network)
        return network
    converted: CropNetwork = convert_sync_batchnorm(network)  # timm's also knows the batch norms that timm fuses
    return converted
