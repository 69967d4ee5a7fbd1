"""Student and teacher: a backbone, a head and perhaps the student's predictor, for crops of several sizes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_core.activation_checkpointing import checkpoint_activations
from dino_core.backbones import adopt_backbone, build_backbone, check_crop_sizes, num_features
from dino_core.batch_norm import GlobalBatchNorm, use_global_batch_norm
from dino_core.config import ConfigError, PretrainConfig
from dino_core.distributed import world_size
from dino_core.heads import DINOHead, Predictor
from dino_core.stochastic_depth import depth_masks, remove_stochastic_depth


class CropNetwork(nn.Module):
    """Outputs for crops given as one batch per size: one backbone pass per size, one head pass over all crops."""

    def __init__(self, backbone: nn.Module, head: DINOHead, predictor: Predictor | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.predictor = predictor
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
        part = self._part
        features = []
        for index, crops in enumerate(groups):
            if self._depth_masks is not None and self.training:
                self._depth_masks.begin(
                    part.seed,
                    part.step,
                    index,
                    num_crops=crops.shape[0] // part.num_images,
                    num_images=part.num_images,
                    device=crops.device,
                    first_image=part.first_image,
                    share=part.share,
                )
            features.append(self.backbone(crops))
        return torch.cat(features)

    def forward(self, groups: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Outputs [n_1 + n_2 + ..., K], and as `features` the features that they are made from, without gradient."""
        features = self.features(groups)
        return self.head(features, self.predictor), features.detach()


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
    if backbone is None:
        backbone = build_backbone(config.model, crops.global_size, drop_path=config.model.drop_path)
        check_crop_sizes(backbone, config.model, crops)
        in_dim = num_features(backbone)
    else:
        backbone = copy.deepcopy(backbone)
        in_dim = adopt_backbone(backbone, crops.global_size)
        if crops.num_local_crops and (width := adopt_backbone(backbone, crops.local_size)) != in_dim:
            raise ConfigError(
                f"pretrain.model.backbone = {type(backbone).__name__}: must give features of one width, not {in_dim} "
                f"for crops of {crops.global_size} pixels and {width} for {crops.local_size}"
            )
        if config.model.activation_checkpointing:
            try:
                checkpoint_activations(backbone)
            except NotImplementedError as error:
                raise ConfigError(f"pretrain.model.activation_checkpointing = True: {error}") from error
    settings = config.head
    head = DINOHead(
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
    predictor = None
    if config.predictor.num_layers:
        predictor = Predictor(
            settings.bottleneck_dim,
            num_layers=config.predictor.num_layers,
            hidden_dim=config.predictor.hidden_dim,
            batch_norm=config.predictor.batch_norm,
            activation=settings.activation,
        )
    return CropNetwork(backbone, head, predictor)


def build_teacher(student: CropNetwork, config: PretrainConfig) -> CropNetwork:
    """A copy of the student without stochastic depth, predictor and gradients.

    Raises:
        ConfigError: it would read running statistics that never move.
    """
    backbone, head = copy.deepcopy(student.backbone), copy.deepcopy(student.head)
    remove_stochastic_depth(backbone)
    teacher = CropNetwork(backbone, head).requires_grad_(False)
    settings = config.teacher
    has_batch_norm = any(isinstance(module, _BatchNorm) for module in teacher.modules())
    if settings.mode == "eval" and not settings.ema_buffers and has_batch_norm:
        raise ConfigError(
            "pretrain.teacher.mode = eval: needs pretrain.teacher.ema_buffers = true; "
            f"{config.model.backbone} has batch norms, whose running statistics would never move"
        )
    return teacher.train(settings.mode == "train")


def synchronise_batch_norm(network: CropNetwork, config: PretrainConfig, device: torch.device) -> CropNetwork:
    """With several workers, make batch norms use the statistics of the global batch.

    Raises:
        ConfigError: the backbone fuses its batch norms with other layers, and there are several workers and no GPU.
    """
    if world_size() == 1:
        return network
    if device.type == "cuda":
        converted: CropNetwork = convert_sync_batchnorm(network)  # timm's also knows the batch norms that timm fuses
        return converted
    use_global_batch_norm(network)
    if any(isinstance(module, _BatchNorm) and not isinstance(module, GlobalBatchNorm) for module in network.modules()):
        raise ConfigError(
            f"pretrain.model.backbone = {config.model.backbone}: has batch norms of its own kind, which cannot be "
            f"synchronised over {world_size()} workers without GPUs; must be another, or run with "
            "cluster.num_workers = 1"
        )
    return network
