"""Released weights. The expected features were measured with the authors' own models, given the same tensors."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import resnet50

from dino_core.pretrained import WeightsError, load_official, read_official

WIDTH, DEPTH, PATCH, GRID = 128, 2, 4, 3  # two heads of 64; images of 12 pixels

# facebookresearch/dino 7c446df, facebookresearch/dinov2 b8931f7; float32 on a CPU. Of the normalised tokens of one
# image: the first numbers of the class token, of the last patch, and the sum of all, each times its weight.
GOLDEN: dict[str, tuple[list[float], list[float], float]] = {
    "dino": (
        [-3.51906, 0.5872, 2.52676, 3.00039, 1.55178],
        [-3.00397, 1.1023, 2.88397, 1.41601, 1.29161],
        -150.7121,
    ),
    "dinov2": (
        [1.33148, 0.00626, -2.02994, -2.11922, -0.6427],
        [0.24603, 0.15551, -0.94707, -0.46099, -1.39992],
        -34.8412,
    ),
    "dinov2 registers": (
        [1.33236, -0.03448, -1.92168, -2.41254, -0.868],
        [0.34865, 0.00938, -0.47755, -0.53766, -1.41767],
        -8.8761,
    ),
    "dinov2 registers, 20 pixels": (
        [1.13349, -0.10107, -2.04802, -2.65767, -0.32863],
        [-0.0993, 0.09287, 0.35777, -0.18652, 0.36137],
        33.9907,
    ),
    "dinov2 swiglu": (
        [0.08259, -0.34599, -1.98742, -1.55225, -0.02573],
        [-1.14687, -0.23484, -1.37281, -0.90342, -1.78189],
        -22.6247,
    ),
}


def wave(shape: tuple[int, ...], start: float) -> Tensor:
    """Numbers in [-1, 1] that look random and are the same everywhere."""
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(start + steps * 12.9898 + steps.square() * 0.0713).float().reshape(shape)


def layout(*, registers: int = 0, gated: bool = False, v2: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes as released."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + GRID**2, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    hidden = 4 * WIDTH
    if gated:
        hidden = (hidden * 2 // 3 + 7) // 8 * 8
    layers = {
        "attn.qkv": (3 * WIDTH, WIDTH),
        "attn.proj": (WIDTH, WIDTH),
        "mlp.w12" if gated else "mlp.fc1": (2 * hidden if gated else hidden, WIDTH),
        "mlp.w3" if gated else "mlp.fc2": (WIDTH, hidden),
    }
    for block in range(DEPTH):
        for name, (rows, columns) in layers.items():
            shapes |= {f"blocks.{block}.{name}.weight": (rows, columns), f"blocks.{block}.{name}.bias": (rows,)}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"blocks.{block}.{name}"] = (WIDTH,)
        if v2:
            shapes |= {f"blocks.{block}.ls{n}.gamma": (WIDTH,) for n in (1, 2)}
    if v2:
        shapes["mask_token"] = (1, WIDTH)
    if registers:
        shapes["register_tokens"] = (1, registers, WIDTH)
    return shapes


def weights(**kind: Any) -> dict[str, Tensor]:
    tensors = {}
    for index, (name, shape) in enumerate(sorted(layout(**kind).items())):
        values = wave(shape, index)
        if len(shape) in (2, 4):
            tensors[name] = values * 1.5 / math.sqrt(math.prod(shape[1:]))
        elif "norm" in name and name.endswith("weight"):
            tensors[name] = 1 + 0.2 * values
        else:
            tensors[name] = 0.5 * values
    return tensors


KINDS: dict[str, dict[str, Any]] = {
    "dino": {},
    "dinov2": {"v2": True},
    "dinov2 registers": {"v2": True, "registers": 4},
    "dinov2 registers, 20 pixels": {"v2": True, "registers": 4},
    "dinov2 swiglu": {"v2": True, "gated": True},
}


def image(kind: str) -> Tensor:
    side = 20 if "20" in kind else PATCH * GRID
    return wave((1, 3, side, side), 0.5)


def figures(tokens: Tensor) -> tuple[list[float], list[float], float]:
    """What is compared, of the tokens of one image [1, N, D]."""
    return tokens[0, 0, :5].tolist(), tokens[0, -1, :5].tolist(), (tokens * wave(tuple(tokens.shape), 1)).sum().item()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.pth"


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_authors_model(kind: str, path: Path) -> None:
    torch.save(weights(**KINDS[kind]), path)
    model = load_official(path)
    with torch.no_grad():
        tokens = model.forward_features(image(kind))
        features = model(image(kind))
    head, tail, total = figures(tokens)
    assert head == pytest.approx(GOLDEN[kind][0], abs=2e-5)
    assert tail == pytest.approx(GOLDEN[kind][1], abs=2e-5)
    assert total == pytest.approx(GOLDEN[kind][2], abs=2e-3)
    torch.testing.assert_close(features, tokens[:, 0])


def test_resnet_has_the_features_of_torchvisions(path: Path) -> None:
    torch.manual_seed(0)
    theirs = resnet50()
    theirs.fc = nn.Identity()  # as main_dino.py has it
    for name, buffer in theirs.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    torch.save({"teacher": {f"module.backbone.{name}": t for name, t in theirs.state_dict().items()}}, path)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(load_official(path, image_size=64)(images), theirs.eval()(images))


def test_resnet_without_the_counts_of_batch_norm(path: Path) -> None:
    tensors = resnet50().state_dict()  # with a classifier, too
    torch.save({name: tensor for name, tensor in tensors.items() if "num_batches" not in name}, path)
    assert load_official(path).num_features == 2048


def test_full_checkpoint_as_the_authors_write_it(path: Path) -> None:
    student, teacher = weights(), {name: 0.5 * tensor for name, tensor in weights().items()}
    heads = {"head.mlp.0.weight": torch.zeros(2, WIDTH), "head.last_layer.weight_v": torch.zeros(4, 2)}
    content = {
        "student": {f"module.{name}": t for name, t in _backbone(student, heads).items()},
        "teacher": _backbone(teacher, heads),
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(1e-4), "params": [0]}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", local_crops_scale=(0.05, 0.4)),
        "dino_loss": {"center": torch.zeros(1, 4)},
    }
    torch.save(content, path)
    assert_same(load_official(path), teacher)
    assert_same(load_official(path, network="student"), student)


def _backbone(tensors: dict[str, Tensor], heads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"backbone.{name}": tensor for name, tensor in tensors.items()} | heads


def assert_same(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    found = model.state_dict()
    for name in ("cls_token", "pos_embed", "blocks.1.mlp.fc2.weight", "norm.bias"):
        assert torch.equal(found[name], tensors[name])


def test_training_checkpoints_of_dinov2(path: Path) -> None:
    tensors = weights(v2=True)
    chunked = {name.replace("blocks.", "blocks.0.", 1) if ".0." in name else name: t for name, t in tensors.items()}
    chunked = {name.replace("blocks.1.", "blocks.1.1.", 1): t for name, t in chunked.items()}
    assert "blocks.0.0.norm1.weight" in chunked and "blocks.1.1.norm1.weight" in chunked
    heads = {"dino_head.mlp.0.weight": torch.zeros(2, 2), "ibot_head.last_layer.weight_v": torch.zeros(2, 2)}
    teacher = _backbone(chunked, heads)
    torch.save({"teacher": teacher}, path)
    assert_same(load_official(path), tensors)
    student = {f"student.{name}": 2 * tensor for name, tensor in teacher.items()}
    torch.save({"model": {f"teacher.{name}": t for name, t in teacher.items()} | student, "iteration": 5}, path)
    assert_same(load_official(path), tensors)
    assert_same(load_official(path, network="student"), {name: 2 * t for name, t in tensors.items()})


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(weights(), path)
    assert_same(load_official(path), weights())


@pytest.mark.parametrize("kind", ["dino", "dinov2", "dinov2 registers"])
def test_position_embeddings_may_be_interpolated_once_or_each_time(kind: str, path: Path) -> None:
    torch.save(weights(**KINDS[kind]), path)
    images = wave((1, 3, 24, 24), 0)
    resized = load_official(path, image_size=24)
    grid = (24 // PATCH) ** 2
    assert resized.pos_embed.shape[1] == grid if "registers" in kind else grid + 1  # type: ignore[union-attr]
    with torch.no_grad():
        torch.testing.assert_close(resized(images), load_official(path)(images))


def test_what_was_found_is_reported(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(weights(v2=True, registers=4), path)
    found = read_official(path)
    assert found.summary == "DINOv2 ViT, patch 4, width 128, depth 2, 2 heads, 4 registers, 12 pixels"
    assert found.arguments["reg_tokens"] == 4
    with caplog.at_level("INFO", "dino_core"):
        model = load_official(path)
    assert f"{path}: {found.summary}" in caplog.text
    assert not model.training
    assert model.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)  # type: ignore[index]


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    tensors = weights() | {name: tensor for name, tensor in changes.items() if tensor is not None}
    return {name: tensor for name, tensor in tensors.items() if changes.get(name, tensor) is not None}


BAD = [
    (changed(**{"norm.bias": None}), "missing: norm.bias"),
    (changed(reg_token=torch.zeros(1)), "unexpected: reg_token"),
    (changed(**{"norm.bias": torch.zeros(3)}), r"of another shape: norm.bias \[3\] instead of \[128\]"),
    (changed(pos_embed=None), "neither a ViT nor a ResNet of DINO or DINOv2; missing pos_embed; found blocks.0"),
    (changed(pos_embed=torch.zeros(1, 9, WIDTH)), "8 patch positions"),
    (changed(**{"patch_embed.proj.weight": torch.zeros(100, 3, 4, 4)}), "width 100"),
    ({"layer1.0.conv1.weight": torch.zeros(1), "conv1.weight": torch.zeros(1)}, "missing: bn1.bias, bn1.running_mean"),
    ({"student": weights()}, "holds a student but no teacher"),
    ({"model": {"student.backbone.norm.bias": torch.zeros(1)}}, "holds no teacher"),
    (torch.zeros(3), "holds a Tensor, not tensors by name"),
    ({"teacher": weights(), "args": Path("x")}, "not read, for it would run code to make .*Path"),
]


@pytest.mark.parametrize(("content", "message"), BAD, ids=[message for _, message in BAD])
def test_other_files_are_refused(content: Any, message: str, path: Path) -> None:
    torch.save(content, path)
    with pytest.raises(WeightsError, match=message) as raised:
        load_official(path)
    assert str(path) in str(raised.value)
    assert len(str(raised.value)) < 400


def test_files_that_cannot_be_read(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_official(path)
    torch.save(weights(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"no file of torch\.save"):
        load_official(path)
    cut = path.with_suffix(".safetensors")
    cut.write_bytes(b"\x08")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_official(cut)


def test_image_size_must_fit_the_patches(path: Path) -> None:
    torch.save(weights(), path)
    with pytest.raises(ValueError, match="image_size = 18: must be a multiple of the patch size 4"):
        load_official(path, image_size=18)
