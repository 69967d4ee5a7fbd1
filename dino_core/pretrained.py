"""Weights that the authors of DINO and DINOv2 released, as timm models with the same features.

::

    DINO    *_pretrain.pth          the backbone: ViT-S/16, S/8, B/16, B/8, ResNet-50
            *_full_checkpoint.pth   student and teacher with heads, optimiser, options
    DINOv2  *_pretrain.pth          the backbone: ViT-S/14, B/14, L/14, g/14, each also with four registers
            teacher_checkpoint.pth  the teacher with heads, as its training code writes it

The architecture follows from the names and shapes of the tensors. Files are read without executing anything in them.
Sources: https://github.com/facebookresearch/dino and https://github.com/facebookresearch/dinov2.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_HEAD_WIDTH = 64
"""Width of an attention head in every released ViT; the shapes do not tell it."""

_SCALAR = np.float64().__reduce__()[0]  # what makes a NumPy number again; its home has moved
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    type(np.dtype(np.float64)),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
]
"""What a full checkpoint of DINO holds besides tensors: its options, and learning rates as NumPy numbers."""

_HEADS = ("head.", "dino_head.", "ibot_head.", "fc.")
_BLOCK = re.compile(r"^blocks\.(\d+)\.")
_CHUNK = re.compile(r"^blocks\.\d+\.(\d+\.)")
"""DINOv2 groups its blocks for training; the second number counts through all groups."""


class WeightsError(ValueError):
    """A file that holds no released weights. The message names the file and what is wrong with it."""


@dataclass(frozen=True)
class OfficialWeights:
    """A released backbone, as read from a file."""

    name: str
    """timm model that `arguments` turn into this one."""
    arguments: dict[str, Any]
    """For `timm.create_model`."""
    tensors: dict[str, Tensor]
    """In the authors' names, without prefixes."""
    summary: str
    """In words, with patch size, width, depth, heads, registers and image size."""


def load_official(
    path: Path | str, *, network: Literal["teacher", "student"] = "teacher", image_size: int | None = None
) -> nn.Module:
    """A timm model in evaluation mode with released weights; what was found is logged.

    Its forward gives [n, D]: a ViT's normalised class token, a ResNet's global average. `forward_features` gives all
    normalised tokens of a ViT: class, registers, patches. They are the authors' own at the image size of the training,
    and at any size with registers. Elsewhere they differ a little, for timm interpolates position embeddings with
    antialiasing and to the exact size, the authors without, and by a scale that is off by 0.1 patches.

    Args:
        path: a `.pth` file as released or as training wrote it, or the same names as safetensors.
        network: which one to take where the file has both.
        image_size: pixels per side for which a ViT's position embeddings are interpolated once; None keeps those of the
            training. Either way the model takes every multiple of the patch size.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it cannot be read, or has other tensors than a model of DINO or DINOv2.
        ValueError: `image_size` is no multiple of the patch size.
    """
    found = read_official(path, network=network)
    logger.info("%s: %s", path, found.summary)
    arguments = dict(found.arguments)
    if image_size is not None and "img_size" in arguments:
        if image_size < 1 or image_size % arguments["patch_size"]:
            raise ValueError(
                f"image_size = {image_size}: must be a multiple of the patch size {arguments['patch_size']}"
            )
        arguments["img_size"] = image_size
    model = timm.create_model(found.name, pretrained=False, num_classes=0, **arguments)
    tensors = found.tensors
    if isinstance(model, VisionTransformer):
        tensors = checkpoint_filter_fn(dict(tensors), model)  # registers, SwiGLU, position embeddings
    else:  # batches that batch norm has seen, which no feature depends on
        counts = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("num_batches_tracked")}
        tensors = counts | tensors
    _check_names(path, found.summary, tensors, model)
    model.load_state_dict(tensors)
    return model.eval()


def read_official(path: Path | str, *, network: Literal["teacher", "student"] = "teacher") -> OfficialWeights:
    """The tensors of a released backbone and its architecture; see `load_official`.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it cannot be read, or is neither a ViT nor a ResNet of DINO or DINOv2.
    """
    tensors = _backbone(Path(path), _read(Path(path)), network)
    if "conv1.weight" in tensors and "layer1.0.conv1.weight" in tensors:
        return OfficialWeights("resnet50", {}, tensors, "DINO ResNet-50")
    needed = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "blocks.0.norm1.weight": 1}
    missing = [name for name, dims in needed.items() if name not in tensors or tensors[name].dim() != dims]
    if missing:
        raise WeightsError(
            f"{path}: neither a ViT nor a ResNet of DINO or DINOv2; missing {_some(missing)}; found {_some(tensors)}"
        )
    return _vision_transformer(path, tensors)


def _vision_transformer(path: Path | str, tensors: dict[str, Tensor]) -> OfficialWeights:
    """What the shapes say. DINOv2 is known by its mask token, which only it has."""
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    positions = tensors["pos_embed"].shape[1] - 1  # the first is the class token's
    grid = math.isqrt(positions)
    if grid * grid != positions or width % _HEAD_WIDTH:
        raise WeightsError(
            f"{path}: not of DINO or DINOv2, with {positions} patch positions (must be a square) and width {width} "
            f"(must be a multiple of {_HEAD_WIDTH})"
        )
    depth = 1 + max(int(block[1]) for name in tensors if (block := _BLOCK.match(name)))
    registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
    arguments: dict[str, Any] = {
        "img_size": grid * patch,
        "dynamic_img_size": True,
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": width // _HEAD_WIDTH,
    }
    parts = [f"patch {patch}", f"width {width}", f"depth {depth}", f"{width // _HEAD_WIDTH} heads"]
    name, family = "vit_small_patch16_224.dino", "DINO"
    if "mask_token" in tensors:
        gated = "blocks.0.mlp.w12.weight" in tensors
        size = "giant" if gated else "small"
        name = f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2.lvd142m"
        family = "DINOv2"
        if registers:
            arguments["reg_tokens"] = registers
            parts.append(f"{registers} registers")
        if gated:  # timm multiplies and rounds down
            arguments["mlp_ratio"] = (tensors["blocks.0.mlp.w12.weight"].shape[0] + 0.5) / width
            parts.append("SwiGLU")
    parts.append(f"{grid * patch} pixels")
    return OfficialWeights(name, arguments, tensors, f"{family} ViT, {', '.join(parts)}")


def _read(path: Path) -> Mapping[str, Any]:
    """What a file of torch.save or safetensors holds, without running any of it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except safetensors.SafetensorError as error:
            raise WeightsError(f"{path}: cannot be read: {error}") from error
    if not zipfile.is_zipfile(path):
        raise WeightsError(
            f"{path}: no file of torch.save (1.6 or later), or cut short; safetensors end in .safetensors"
        )
    with torch.serialization.safe_globals(_HARMLESS):
        refused = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if refused:
            raise WeightsError(f"{path}: not read, for it would run code to make {_some(sorted(refused))}")
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except RuntimeError as error:
            raise WeightsError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path}: holds a {type(loaded).__name__}, not tensors by name")
    return loaded


def _backbone(path: Path, loaded: Mapping[str, Any], network: str) -> dict[str, Tensor]:
    """The tensors of one network's backbone, in the names of the released backbones."""
    other = "student" if network == "teacher" else "teacher"
    if other in loaded and network not in loaded:
        raise WeightsError(f"{path}: holds a {other} but no {network}")
    for key in (network, "model"):
        if isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    tensors = {name.removeprefix("module."): value for name, value in loaded.items() if isinstance(value, Tensor)}
    if any(name.startswith(("teacher.", "student.")) for name in tensors):
        tensors = _below(f"{network}.", tensors)
        if not tensors:
            raise WeightsError(f"{path}: holds no {network}")
    inside = _below("backbone.", tensors)
    outside = {name: value for name, value in tensors.items() if not name.startswith(("backbone.", *_HEADS))}
    return {_CHUNK.sub(r"blocks.\1", name): value for name, value in (outside | inside).items()}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _check_names(path: Path | str, summary: str, tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    expected = model.state_dict()
    wrong = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys()),
        "of another shape": [
            f"{name} {list(tensors[name].shape)} instead of {list(expected[name].shape)}"
            for name in sorted(expected.keys() & tensors.keys())
            if tensors[name].shape != expected[name].shape
        ],
    }
    problems = [f"{kind}: {_some(names)}" for kind, names in wrong.items() if names]
    if problems:
        raise WeightsError(f"{path}: looks like {summary}, but has other tensors; {'; '.join(problems)}")


def _some(names: Mapping[str, Any] | list[str]) -> str:
    shown = list(names)[:6]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
