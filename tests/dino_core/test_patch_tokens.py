"""Patch tokens of timm's ViTs with a mask token, and the options of the model that DINOv2 needs."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_core.backbones import build_backbone
from dino_core.checkpoint import save_checkpoint
from dino_core.config import ConfigError, ModelConfig
from dino_core.export import ExportError, export_backbone, load_backbone
from dino_core.masking import MaskedPatches
from dino_core.patch_tokens import add_mask_token, adopt_patch_tokens, forward_with_patches, remove_mask_token
from dino_core.stochastic_depth import StochasticDepth
from dino_core.train import TrainState
from tests.dino_core.points import NUM_SAMPLES, POINTS, changed

TINY = ModelConfig(backbone="vit_tiny_patch16_224", patch_size=4, embed_dim=16, depth=2, num_heads=2)
VITS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"patch_size": 4},
    "deit3_small_patch16_224": {"patch_size": 4},
    "vit_small_patch14_reg4_dinov2": {"patch_size": 4},
    "eva02_tiny_patch14_224": {"patch_size": 4, "pooling": "token"},
    "beit_base_patch16_224": {"patch_size": 4, "pooling": "token"},
}


def masked_of(mask: torch.Tensor) -> MaskedPatches:
    return MaskedPatches(mask, mask.flatten().nonzero().flatten())


@pytest.mark.parametrize("name", VITS)
def test_a_masked_patch_is_not_seen_and_the_others_are(name: str) -> None:
    torch.manual_seed(0)
    model = dataclasses.replace(TINY, backbone=name, **VITS[name])
    backbone = build_backbone(model, 16).eval()
    assert adopt_patch_tokens(backbone, name, 16) == (4, 4)
    add_mask_token(backbone)
    crops = torch.randn(3, 3, 16, 16)
    plain = backbone(crops)
    features, tokens = forward_with_patches(backbone, crops)
    assert torch.equal(features, plain)
    assert tokens.shape == (3, 16, 16)
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[0, 5] = mask[2, :8] = True
    with torch.no_grad():
        backbone.mask_token.normal_()
    features, tokens = forward_with_patches(backbone, crops, masked_of(mask))
    changed_pixels = crops.clone()
    changed_pixels[0, :, 4:8, 4:8] += 1  # patch 5
    changed_pixels[2, :, :8] += 1  # patches 0 to 7
    again = forward_with_patches(backbone, changed_pixels, masked_of(mask))
    assert torch.equal(again[0], features)
    assert torch.equal(again[1], tokens)
    assert torch.equal(features[1], plain[1])
    assert not torch.equal(features[0], plain[0])
    changed_pixels[0, :, :4, :4] += 1
    assert not torch.equal(forward_with_patches(backbone, changed_pixels, masked_of(mask))[0][0], features[0])
    assert torch.equal(backbone(crops), plain), "nothing is masked outside such a pass"


def test_local_sizes_and_copies_have_their_own_patches() -> None:
    backbone = build_backbone(TINY, 16).eval()
    adopt_patch_tokens(backbone, "", 16)
    add_mask_token(backbone)
    teacher = copy.deepcopy(backbone)
    remove_mask_token(teacher)
    assert {n for n, _ in backbone.named_parameters()} - {n for n, _ in teacher.named_parameters()} == {"mask_token"}
    crops = torch.randn(2, 3, 8, 8)
    assert forward_with_patches(teacher, crops)[1].shape == (2, 4, 16)
    assert torch.equal(forward_with_patches(teacher, crops)[1], forward_with_patches(backbone, crops)[1])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"backbone": "resnet10t"}, "no class token"),
        ({"backbone": "swin_tiny_patch4_window7_224"}, "no class token"),
        ({"backbone": "vit_tiny_patch16_224", "pooling": "avg", "patch_size": 4}, "not its class token; set"),
        ({"backbone": "xcit_nano_12_p16_224", "patch_size": 16}, "cannot be masked"),
    ],
)
def test_backbones_without_patches_to_mask_are_refused(model: dict[str, Any], reason: str) -> None:
    sizes = dict.fromkeys(("patch_size", "embed_dim", "depth", "num_heads"))
    size = 224 if "swin" in model["backbone"] else 32
    config = ModelConfig(**{"drop_path": 0.0, **sizes, **model})
    with pytest.raises(ConfigError, match=rf"pretrain\.ibot\.weight: must be 0 with .*{reason}"):
        adopt_patch_tokens(build_backbone(config, size), config.backbone, size)


def test_the_students_mask_token_learns_and_the_teacher_has_none() -> None:
    from dino_core.train import train_step
    from tests.dino_core.points import share

    config = changed(POINTS["dinov2"], optim={"layer_decay": 0.5, "patch_embed_lr_mult": 0.2})
    state = TrainState.create(config, NUM_SAMPLES)
    token = state.student.backbone.mask_token
    assert torch.equal(token, torch.zeros_like(token))
    train_step(state, share(config, 0))
    assert (token != 0).all()
    assert not hasattr(state.teacher.backbone, "mask_token")
    (group,) = (g for g in state.optimizer.param_groups if any(p is token for p in g["params"]))
    assert (group["lr_scale"], group["decays"]) == (0.5**3, True)  # below two blocks and the norm, as all tokens


def test_layer_scale_swiglu_and_uniform_depth_are_built() -> None:
    model = dataclasses.replace(
        TINY, embed_dim=24, num_heads=3, layer_scale=0.3, swiglu=True, drop_path=0.4, drop_path_schedule="uniform"
    )
    backbone: Any = build_backbone(model, 16, drop_path=0.4)
    for block in backbone.blocks:
        assert torch.equal(block.ls1.gamma, torch.full((24,), 0.3))
        # DINOv2's code: (int(4 * 24 * 2 / 3) + 7) // 8 * 8
        assert (block.mlp.fc1.out_features, block.mlp.fc2.in_features) == (128, 64)
        assert isinstance(block.mlp.act, torch.nn.SiLU)
    rates = [module.drop_prob for module in backbone.modules() if isinstance(module, StochasticDepth)]
    assert rates == [0.4] * 4


def test_the_sizes_of_swiglu_are_those_of_the_large_models() -> None:
    with torch.device("meta"):
        backbone: Any = build_backbone(
            ModelConfig(backbone="vit_large_patch14_224", swiglu=True, layer_scale=1e-5, depth=1, drop_path=0.0), 224
        )
    assert (backbone.blocks[0].mlp.fc1.out_features, backbone.blocks[0].mlp.fc2.in_features) == (5472, 2736)


@pytest.mark.parametrize("key", ["swiglu", "layer_scale"])
def test_a_convnet_has_neither(key: str) -> None:
    config = ModelConfig(backbone="resnet10t", **{key: 1})
    with pytest.raises(ConfigError, match=rf"pretrain\.model\.{key} = "):
        build_backbone(config, 32)


def test_backbones_are_loaded_without_the_mask_token_and_swiglu_is_not_promised_to_timm(tmp_path: Path) -> None:
    config = POINTS["swiglu, layer scale, uniform depth"]
    state = TrainState.create(config, NUM_SAMPLES)
    path = save_checkpoint(state, tmp_path)
    crops = torch.randn(2, 3, 16, 16)
    state.student.eval()
    for network in ("teacher", "student"):
        model = load_backbone(path, network).model  # type: ignore[arg-type]
        torch.testing.assert_close(model(crops), getattr(state, network).backbone(crops))
    with pytest.raises(ExportError, match="only onnx can hold it"):
        export_backbone(path, "timm", tmp_path / "out")
