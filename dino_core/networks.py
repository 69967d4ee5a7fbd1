"""Student and teacher: a backbone and a head that take crops of several sizes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_core.backbones import build_backbone, check_crop_sizes, num_features
from dino_core.batch_norm import GlobalBatchNorm, use_global_batch_norm
from dino_core.config import ConfigError, PretrainConfig
from dino_core.distributed import world_size
from dino_core.heads import DINOHead
from dino_core.stochastic_depth import depth_masks, remove_stochastic_depth


class CropNetwork(nn.Module):
    """Logits of crops given as one batch per size: one backbone pass per size, one head pass over all crops."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self._depth_masks = depth_masks(backbone)
        self._key = (0, 0, 1)

    def begin_step(self, seed: int, step: int, num_images: int) -> None:
        """Fix what stochastic depth drops in the next forward pass, over `num_images` images on this rank."""
        self._key = (seed, step, num_images)

    def features(self, groups: Sequence[Tensor]) -> Tensor:
        """[n_1, 3, H_1, W_1], [n_2, 3, H_2, W_2], ... -> [n_1 + n_2 + ..., D]."""
        seed, step, num_images = self._key
        features = []
        for index, crops in enumerate(groups):
            if self._depth_masks is not None and self.training:
                num_crops = crops.shape[0] // num_images
                self._depth_masks.begin(
                    seed, step, index, num_crops=num_crops, num_images=num_images, device=crops.device
                )
            features.append(self.backbone(crops))
        return torch.cat(features)

    def forward(self, groups: Sequence[Tensor]) -> Tensor:
        """As `features`, then the head: [n_1 + n_2 + ..., K]."""
        logits: Tensor = self.head(self.features(groups))
        return logits


def build_student(config: PretrainConfig) -> CropNetwork:
    """The student, with weights from torch's global RNG.

    Raises:
        ConfigError: model, head and crops do not fit together.
    """
    backbone = build_backbone(config.model, config.crops.global_size, drop_path=config.model.drop_path)
    check_crop_sizes(backbone, config.model, config.crops)
    head = DINOHead(
        num_features(backbone),
        config.head.num_prototypes,
        num_layers=config.head.num_layers,
        hidden_dim=config.head.hidden_dim,
        bottleneck_dim=config.head.bottleneck_dim,
        norm_last_layer=config.head.norm_last_layer,
        batch_norm=config.head.batch_norm,
    )
    return CropNetwork(backbone, head)


def build_teacher(student: CropNetwork) -> CropNetwork:
    """A copy of the student without stochastic depth and without gradients, in training mode."""
    backbone, head = copy.deepcopy(student.backbone), copy.deepcopy(student.head)
    remove_stochastic_depth(backbone)
    return CropNetwork(backbone, head).requires_grad_(False).train()


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
    if any(isinstance(module, _BatchNorm) and type(module) is not GlobalBatchNorm for module in network.modules()):
        raise ConfigError(
            f"pretrain.model.backbone = {config.model.backbone}: has fused batch norms, which cannot be synchronised "
            f"over {world_size()} workers without GPUs; must be another, or run with cluster.num_workers = 1"
        )
    return network
