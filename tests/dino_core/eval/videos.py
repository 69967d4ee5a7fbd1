"""A made-up video with masks and a ViT of made-up weights, for tests of dense evaluations."""

from __future__ import annotations

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import nn

Bytes = NDArray[np.uint8]


def made_up_video(
    num_frames: int, height: int = 64, width: int = 128, labels: tuple[int, ...] = (1, 2)
) -> tuple[list[Bytes], list[Bytes]]:
    """Frames [H, W, 3] and masks [H, W]: a textured block for each label, which moves over a textured background."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    frames, masks = [], []
    for time in range(num_frames):
        frame = np.stack([110 + 60 * np.sin(0.11 * (c + 2) * x + 0.07 * y + c) for c in range(3)], axis=2)
        mask = np.zeros((height, width), dtype=np.uint8)
        for order, label in enumerate(labels):
            top = height // 8 + order * height // 3 + time * (1 - 2 * order)
            left = width // 6 + order * width // 3 + 3 * time
            inside = (abs(y - top - height / 6) < height / 6) & (abs(x - left - width / 8) < width / 8)
            texture = 128 + 100 * np.sin(0.9 * (x - left) + 0.5 * (1 + order) * (y - top) + order)
            frame[inside] = np.stack([texture, 255 - texture, np.full_like(texture, 90.0 * order)], axis=2)[inside]
            mask[inside] = label
        frames.append(np.clip(frame, 0, 255).astype(np.uint8))
        masks.append(mask)
    return frames, masks


def made_up_vit(height: int = 64, width: int = 128, patch: int = 8, **settings: object) -> nn.Module:
    """timm's ViT of width 24, 2 blocks and 3 heads. Position embeddings of patches are 0: no size changes them."""
    sizes = {"img_size": (height, width), "patch_size": patch, "embed_dim": 24, "depth": 2, "num_heads": 3}
    backbone = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **{**sizes, **settings})
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            parameter.copy_(made_up_weight(name, tuple(parameter.shape)))
    return backbone.eval()


def made_up_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The same for a name and a shape, wherever it is asked for."""
    values = np.random.RandomState(sum(name.encode())).standard_normal(shape).astype(np.float32)
    if name == "pos_embed":
        values[:, 1:] = 0
    is_matrix = len(shape) > 1 and name not in ("pos_embed", "cls_token")
    spread = 1.5 / np.sqrt(np.prod(shape[1:])) if is_matrix else 0.1
    return torch.from_numpy(values * np.float32(spread)) + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
