"""Crops of several sizes in one pass give what they give in one pass each, features and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from dino_core.config import ConfigError, PretrainConfig
from dino_core.masking import MaskedPatches, rank_masks
from dino_core.networks import CropNetwork, Outputs, build_student, build_teacher
from dino_core.packing import PackedAttention, pack, tokens_of
from dino_core.train import TrainState, train_step
from tests.dino_core.points import BASE, NUM_SAMPLES, POINTS, changed, share

B = 4
TINY = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
DROPPED = {"drop_path": 0.4, "drop_path_schedule": "uniform"}
SUB_BATCH = {**DROPPED, "drop_path_mode": "sub_batch", "drop_path_group_size": 2}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"backbone": "vit_tiny_patch16_224"},
    "registers, LayerScale, sub-batches": {"num_register_tokens": 2, "layer_scale": 0.1, **SUB_BATCH},
    "mean of the patches": {"pooling": "avg"},
    "SwiGLU, sub-batches, recomputed": {"swiglu": True, "activation_checkpointing": True, **SUB_BATCH},
    "recomputed": {"activation_checkpointing": True},
    "positions beside the class token": {"backbone": "deit3_small_patch16_224"},
    "class and distillation token": {"backbone": "deit_tiny_distilled_patch16_224"},
    "norm in front, norms after the branches": {"backbone": "vit_base_patch16_rpn_224", "pooling": "avg"},
    "parallel layers": {"backbone": "vit_small_patch16_18x2_224"},
}


def crops() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n * B, 3, size, size, generator=generator) for n, size in ((2, 16), (4, 8))]


def both(config: PretrainConfig) -> tuple[CropNetwork, CropNetwork]:
    """The same network with one pass per size, and with one for both."""
    torch.manual_seed(0)
    separate = build_student(config).train()
    if separate.grid is not None:
        nn.init.normal_(separate.backbone.get_parameter("mask_token"))
    packed = build_student(changed(config, model={"packing": True})).train()
    packed.load_state_dict(separate.state_dict())
    return separate, packed


def run(network: CropNetwork, masked: MaskedPatches | None = None) -> tuple[Outputs, dict[str, Tensor]]:
    """Outputs and gradients of one step's forward and backward pass."""
    network.zero_grad()
    network.begin_pass(1, 2, num_images=B, share=B)
    outputs: Outputs = network(crops(), masked)
    loss = sum(o.sin().mean() for o in outputs if o is not None)
    assert isinstance(loss, Tensor)
    loss.backward()
    return outputs, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def check_the_same(config: PretrainConfig, masked: MaskedPatches | None = None) -> None:
    separate, packed = both(config)
    calls: list[int] = []
    block = packed.backbone.get_submodule("blocks.1")
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(2):  # its own passes leave nothing behind
        (expected, gradients), (found, of_packed) = run(separate, masked), run(packed, masked)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
        assert of_packed.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(of_packed[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())
    assert len(calls) == (4 if config.model.activation_checkpointing else 2), "one pass, through the blocks' hooks"


@pytest.mark.parametrize("name", MODELS)
def test_features_and_gradients_are_those_of_separate_passes(name: str) -> None:
    check_the_same(changed(BASE, model={**TINY, **DROPPED, **MODELS[name]}))


@pytest.mark.parametrize("class_view", ["masked", "full"])
@pytest.mark.parametrize("mode", [DROPPED, SUB_BATCH], ids=["mask", "sub_batch"])
def test_masked_patches_are_packed_too(class_view: str, mode: dict[str, Any]) -> None:
    config = changed(POINTS["ibot"], model={**mode, "num_register_tokens": 1}, ibot={"class_view": class_view})
    masks = rank_masks(config.mask, (4, 4), seed=1, step=2, share=B, divisor="crops")
    masked = masks.part(0, B, torch.device("cpu"))
    assert len(masked.rows)
    check_the_same(config, masked)


def test_in_bf16_it_rounds_no_more_than_separate_passes() -> None:
    separate, packed = both(changed(BASE, model={**TINY, **DROPPED}))
    exact = run(separate)[0].features
    with torch.autocast("cpu", dtype=torch.bfloat16):
        errors = [(run(network)[0].features - exact).norm() for network in (separate, packed)]
    assert 0 < errors[1] < 1.2 * errors[0]


def test_attention_written_out_is_the_fused_one() -> None:
    separate, packed = both(changed(BASE, model=TINY))
    expected = run(separate)[0]
    for module in packed.modules():
        if isinstance(module, PackedAttention):
            module.fused_attn = False  # type: ignore[misc]  # as TIMM_FUSED_ATTN=0 has it
    torch.testing.assert_close(run(packed)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_packed_backbone_is_the_same_model_for_one_batch() -> None:
    backbone = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=16, dynamic_img_size=True, reg_tokens=1, **TINY
    ).eval()
    images = crops()[0]
    expected, names = backbone(images), list(backbone.state_dict())
    pack(backbone)
    assert isinstance(backbone, timm.models.VisionTransformer)
    assert list(backbone.state_dict()) == names
    assert torch.equal(backbone(images), expected)
    assert torch.equal(copy.deepcopy(backbone)(images), expected)
    _, tokens = backbone(crops(), [None, None])
    assert [t.shape[1] for t in tokens] == [tokens_of(backbone, c) for c in crops()] == [1 + 1 + 16, 1 + 1 + 4]


def test_the_teacher_and_a_network_of_ones_own_take_part() -> None:
    config = changed(BASE, model={**TINY, **DROPPED, "packing": True})
    teacher = build_teacher(build_student(config), config)
    assert not teacher.packing
    own = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=16, dynamic_img_size=True, **TINY)
    state = TrainState.create(config, NUM_SAMPLES, backbone=own)
    assert train_step(state, share(config, 0))["train/loss"].isfinite()
    assert not any(isinstance(module, PackedAttention) for module in own.modules()), "the caller's stays as it was"


@pytest.mark.parametrize(
    ("backbone", "reason"),
    [
        ("resnet10t", "ResNet is no timm VisionTransformer"),
        ("eva02_tiny_patch14_224", "Eva is no timm VisionTransformer"),
        ("vit_base_patch16_xp_224", r"has blocks of another kind \(ParallelScalingBlock\)"),
        ("vit_dlittle_patch16_reg1_gap_256", r"has attention of another kind \(DiffAttention\)"),
    ],
)
def test_what_cannot_be_packed_is_refused_with_the_reason(backbone: str, reason: str) -> None:
    plain = dict.fromkeys(("patch_size", "embed_dim", "depth", "num_heads"))
    sizes = plain if backbone == "resnet10t" else TINY
    config = changed(BASE, model={**sizes, "backbone": backbone, "drop_path": 0.0, "packing": True})
    with pytest.raises(
        ConfigError, match=rf"pretrain.model.packing = True: must be false with .* {backbone}: .*{reason}"
    ):
        build_student(config)


def test_random_dropout_is_refused() -> None:
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, drop_rate=0.1, **TINY)
    with pytest.raises(NotImplementedError, match="drops tokens or values at random"):
        pack(backbone)
