"""Golden values: parameter groups and clipping of the authors of DINO, multipliers of the learning rate of DINOv2
(facebookresearch/dino, facebookresearch/dinov2 at b8931f7), layers of timm. LARS: see test_official_trace."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from dino_core.backbones import build_backbone
from dino_core.config import ConfigError, ModelConfig, OptimConfig
from dino_core.heads import DINOHead
from dino_core.networks import CropNetwork
from dino_core.optim import (
    LARS,
    build_optimizer,
    cancel_last_layer_gradients_,
    clip_gradients_,
    parameter_groups,
    set_hyperparameters,
)


def sines(shape: tuple[int, ...], shift: float, scale: float = 2.0) -> Tensor:
    values = scale * np.sin(0.7 * np.arange(math.prod(shape)) + shift)
    return torch.from_numpy(values).float().reshape(*shape)


def small_student(predictor: bool = False, norm_last_layer: bool = True) -> nn.Module:
    """Children as of a CropNetwork, of a few weights."""
    torch.manual_seed(0)
    head = DINOHead(6, 5, hidden_dim=8, bottleneck_dim=4, norm_last_layer=norm_last_layer)
    children: dict[str, nn.Module] = {"backbone": nn.Linear(4, 6), "head": head}
    return nn.ModuleDict(children | ({"predictor": nn.Linear(4, 4)} if predictor else {}))


@cache
def timm_student(backbone: str) -> CropNetwork:
    with torch.device("meta"):  # names and shapes are all that counts
        return CropNetwork(timm.create_model(backbone, num_classes=0), DINOHead(8, 5, hidden_dim=8))


def by_name(student: nn.Module, **changes: Any) -> dict[str, dict[str, Any]]:
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    groups = parameter_groups(OptimConfig(**changes), student)
    return {names[id(p)]: {k: v for k, v in g.items() if k != "params"} for g in groups for p in g["params"]}


def lr_scales(student: nn.Module, **changes: Any) -> dict[str, float]:
    return {name: group["lr_scale"] for name, group in by_name(student, **changes).items()}


# Groups


def test_groups_are_the_official_ones():
    network = CropNetwork(
        build_backbone(ModelConfig(backbone="vit_tiny_patch16_224"), 224), DINOHead(192, 32, norm_last_layer=False)
    )
    decayed, free = parameter_groups(OptimConfig(), network)
    assert [len(decayed["params"]), sum(p.numel() for p in decayed["params"])] == [56, 10613920]
    assert [len(free["params"]), sum(p.numel() for p in free["params"])] == [102, 34880]
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    assert {"backbone.cls_token", "backbone.pos_embed", "backbone.patch_embed.proj.weight"} <= decayed_names
    assert {"head.last_layer.weight_g", "head.last_layer.weight_v"} <= decayed_names
    order = list(names)  # moments in checkpoints are numbered by this order
    assert [order.index(id(p)) for p in decayed["params"]] == sorted(order.index(id(p)) for p in decayed["params"])


def test_frozen_parameters_are_in_no_group():
    student = small_student()
    grouped = {id(p) for group in parameter_groups(OptimConfig(), student) for p in group["params"]}
    assert grouped == {id(p) for p in student.parameters() if p.requires_grad}
    assert id(student["head"].last_layer.weight_g) not in grouped


@settings(max_examples=24, deadline=None)
@given(
    st.sampled_from([1.0, 0.9, 0.65]),
    st.sampled_from([1.0, 0.2, 0.0]),
    st.booleans(),
    st.sampled_from(["gradient", "lr"]),
)
def test_groups_are_few_and_hold_each_parameter_once(layer_decay, patch_embed, decay_tokens, freeze_by):
    student = timm_student("vit_tiny_patch16_224")
    config = OptimConfig(
        layer_decay=layer_decay,
        patch_embed_lr_mult=patch_embed,
        decay_tokens=decay_tokens,
        freeze_last_layer_by=freeze_by,
    )
    groups = parameter_groups(config, student)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in student.parameters() if p.requires_grad)
    extra = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    assert json.loads(json.dumps(extra)) == extra
    assert len({json.dumps(group) for group in extra}) == len(extra)
    assert [group["decays"] for group in extra] == sorted((group["decays"] for group in extra), reverse=True)
    num_scales = (14 if layer_decay < 1 else 1) + (patch_embed != 1)
    assert len({group["lr_scale"] for group in extra}) == num_scales
    assert len([group for group in extra if group["last_layer"]]) == (freeze_by == "lr")
    if num_scales == 1 and freeze_by == "gradient":
        assert len(extra) == 2


TOKENS = {
    "vit_small_patch14_reg4_dinov2": {"cls_token", "reg_token", "pos_embed"},
    "deit_tiny_distilled_patch16_224": {"cls_token", "dist_token", "pos_embed"},
    "beit_base_patch16_224": {"cls_token"} | {f"blocks.{i}.attn.relative_position_bias_table" for i in range(12)},
    "swin_tiny_patch4_window7_224": {
        f"layers.{stage}.blocks.{i}.attn.relative_position_bias_table"
        for stage, depth in enumerate((2, 2, 6, 2))
        for i in range(depth)
    },
    "mvitv2_tiny": None,
    "resnet18": set(),
}


@pytest.mark.parametrize("backbone", TOKENS)
def test_tokens_and_positions_are_decayed_only_if_asked(backbone):
    student = timm_student(backbone)
    free = {name for name, p in student.named_parameters() if p.dim() == 1 or name.endswith(".bias")}
    with_tokens = {name for name, group in by_name(student).items() if group["decays"]}
    without = {name for name, group in by_name(student, decay_tokens=False).items() if group["decays"]}
    assert not with_tokens & free
    expected = TOKENS[backbone]
    if expected is None:
        expected = {n for n, _ in student.backbone.named_parameters() if n.endswith((".rel_pos_h", ".rel_pos_w"))}
        assert len(expected) == 20
    assert with_tokens - without == {f"backbone.{name}" for name in expected}


def test_mask_tokens_and_the_authors_register_tokens_are_tokens_too():
    student = small_student()
    for name in ("mask_token", "register_tokens", "weight_token_like"):
        student["backbone"].register_parameter(name, nn.Parameter(torch.zeros(1, 1, 6)))
    decayed = {name for name, group in by_name(student, decay_tokens=False).items() if group["decays"]}
    assert decayed & {f"backbone.{n}" for n, _ in student["backbone"].named_parameters()} == {
        "backbone.weight",
        "backbone.weight_token_like",
    }


# Multiples of the learning rate


def test_layer_decay_of_a_vit_is_that_of_dinov2():
    # dinov2.utils.param_groups.get_params_groups_with_decay(vit_small(num_register_tokens=4), 0.9, 0.2) and of its head
    scales = lr_scales(timm_student("vit_small_patch14_reg4_dinov2"), layer_decay=0.9, patch_embed_lr_mult=0.2)
    golden = {
        "backbone.cls_token": 0.2541865828329001,
        "backbone.pos_embed": 0.2541865828329001,
        "backbone.reg_token": 0.2541865828329001,
        "backbone.patch_embed.proj.weight": 0.05083731656658002,
        "backbone.patch_embed.proj.bias": 0.05083731656658002,
        "backbone.blocks.0.norm1.weight": 0.2824295364810001,
        "backbone.blocks.5.mlp.fc1.weight": 0.4782969000000001,
        "backbone.blocks.11.ls2.gamma": 0.9,
        "backbone.norm.weight": 1.0,
        "backbone.norm.bias": 1.0,
        "head.mlp.0.weight": 1.0,
        "head.last_layer.weight_v": 1.0,
    }
    assert {name: scales[name] for name in golden} == golden


def test_what_pools_after_the_blocks_of_a_vit_is_not_slowed_and_what_stands_before_is():
    for backbone, after, before in (
        ("vit_base_patch16_siglip_224", "attn_pool.latent", "pos_embed"),
        ("vit_base_patch16_clip_224", "norm.weight", "norm_pre.weight"),
        ("beit_base_patch16_224", "fc_norm.weight", "cls_token"),
        ("vit_small_patch16_dinov3", "norm.weight", "reg_token"),
    ):
        scales = lr_scales(timm_student(backbone), layer_decay=0.5)
        assert scales[f"backbone.{after}"] == 1, backbone
        assert scales[f"backbone.{before}"] == 0.5**13, backbone
        assert scales["backbone.blocks.0.norm1.weight"] == 0.5**12, backbone


@pytest.mark.parametrize("backbone", ["resnet50", "convnext_atto", "swin_tiny_patch4_window7_224", "inception_v3"])
def test_layer_decay_of_other_models_is_timms_with_the_head_as_classifier(backbone):
    with torch.device("meta"):
        model = timm.create_model(backbone, num_classes=7)
    names = {id(p): name for name, p in model.named_parameters()}
    expected = {
        names[id(p)]: g["lr_scale"] for g in param_groups_layer_decay(model, layer_decay=0.8) for p in g["params"]
    }
    scales = lr_scales(timm_student(backbone), layer_decay=0.8)
    for name, _ in timm_student(backbone).backbone.named_parameters():
        assert scales[f"backbone.{name}"] == pytest.approx(expected[name], rel=1e-12), name
    assert {scale for name, scale in scales.items() if name.startswith("head.")} == {1.0}


def test_the_layers_of_convnets():
    resnet = lr_scales(timm_student("resnet50"), layer_decay=0.5)
    assert resnet["backbone.conv1.weight"] == 0.5**17  # 16 blocks and the stem
    assert resnet["backbone.layer4.2.conv3.weight"] == 0.5
    convnext = lr_scales(timm_student("convnext_atto"), layer_decay=0.5)
    assert convnext["backbone.stem.0.weight"] == 0.5**13  # 12 blocks and the stem
    assert convnext["backbone.stages.3.blocks.1.mlp.fc1.weight"] == 0.5
    assert convnext["backbone.head.norm.weight"] == 1


@pytest.mark.parametrize("backbone", ["caformer_s18", "linear"])
def test_layers_that_are_not_known_are_an_error(backbone):
    student = small_student() if backbone == "linear" else timm_student(backbone)
    with pytest.raises(ConfigError, match=r"pretrain\.optim\.layer_decay = 0\.9: must be 1, .* (Linear|MetaFormer)"):
        parameter_groups(OptimConfig(layer_decay=0.9), student)


def test_a_patch_embedding_that_is_not_there_is_an_error():
    with pytest.raises(ConfigError, match=r"pretrain\.optim\.patch_embed_lr_mult = 0\.2: must be 1, a ResNet has no"):
        build_optimizer(OptimConfig(patch_embed_lr_mult=0.2), timm_student("resnet18"))


# Hyper-parameters of a step


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_weight_decay_is_of_the_first_group_only(name):
    student = small_student()
    optimizer = build_optimizer(OptimConfig(name=name), student)
    set_hyperparameters(optimizer, 0.25, 0.5)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.25, 0.5), (0.25, 0.0)]
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with torch.no_grad():
        for index in (0, 2, 4):
            student["head"].mlp[index].bias.fill_(1)
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    optimizer.step()
    for n, p in student.named_parameters():
        if n.endswith(".bias") or not p.requires_grad:
            assert torch.equal(p, before[n]), n
        else:
            assert p.norm() < before[n].norm(), n


def test_each_group_has_its_multiple_of_the_learning_rate():
    student = CropNetwork(
        build_backbone(ModelConfig(backbone="vit_tiny_patch16_224", embed_dim=8, depth=2, num_heads=2), 32),
        DINOHead(8, 5, hidden_dim=8),
    )
    optimizer = build_optimizer(OptimConfig(name="sgd", layer_decay=0.5), student)
    set_hyperparameters(optimizer, 0.25, 0.0)
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, layers_above in (
        ("backbone.cls_token", 3),
        ("backbone.patch_embed.proj.bias", 3),
        ("backbone.blocks.0.mlp.fc1.weight", 2),
        ("backbone.blocks.1.norm2.bias", 1),
        ("backbone.norm.weight", 0),
        ("head.mlp.0.bias", 0),
    ):
        moved = before[name] - student.get_parameter(name)
        torch.testing.assert_close(moved, torch.full_like(moved, 0.25 * 0.5**layers_above), atol=1e-7, rtol=1e-6)


def one_step(student: nn.Module, optimizer: torch.optim.Optimizer, shift: float, **freeze: bool) -> None:
    for index, parameter in enumerate(student.parameters()):
        parameter.grad = sines(tuple(parameter.shape), shift + index) if parameter.requires_grad else None
    set_hyperparameters(optimizer, 0.1, 0.5, **freeze)
    optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_prototypes_frozen_by_learning_rate_stand_still_while_their_moments_run(name):
    student = small_student(norm_last_layer=False)
    optimizer = build_optimizer(OptimConfig(name=name, freeze_last_layer_by="lr"), student)
    assert [group["last_layer"] for group in optimizer.param_groups].count(True) == 1
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    one_step(student, optimizer, 0.1, freeze_last_layer=True)
    still = {n for n, p in student.named_parameters() if torch.equal(p, before[n])}
    assert still == {"head.last_layer.weight_g", "head.last_layer.weight_v"}
    weight = student["head"].last_layer.weight_v
    state = optimizer.state[weight]
    if name == "adamw":
        assert state["step"] == 1
        torch.testing.assert_close(state["exp_avg"], 0.1 * weight.grad)
    elif name == "sgd":  # without the decay, which would else act later
        torch.testing.assert_close(state["momentum_buffer"], weight.grad)
    else:
        torch.testing.assert_close(state["momentum_buffer"], 0.001 * weight.norm() / weight.grad.norm() * weight.grad)
    one_step(student, optimizer, 0.4)
    assert not torch.equal(weight, before["head.last_layer.weight_v"])


def test_the_two_ways_of_freezing_differ_afterwards_in_the_prototypes_alone():
    students = []
    for by in ("gradient", "lr"):
        student = small_student()
        optimizer = build_optimizer(OptimConfig(freeze_last_layer_by=by), student)
        for index, parameter in enumerate(student.parameters()):
            parameter.grad = sines(tuple(parameter.shape), index) if parameter.requires_grad else None
        if by == "gradient":
            cancel_last_layer_gradients_(student["head"])
        set_hyperparameters(optimizer, 0.1, 0.5, freeze_last_layer=True)
        optimizer.step()
        one_step(student, optimizer, 0.4)
        students.append(student)
    first, second = (dict(student.named_parameters()) for student in students)
    assert [name for name in first if not torch.equal(first[name], second[name])] == ["head.last_layer.weight_v"]


def test_cancelled_prototypes_do_not_move_and_gather_no_moments():
    student = small_student()
    head = student["head"]
    optimizer = build_optimizer(OptimConfig(), student)
    set_hyperparameters(optimizer, 0.1, 0.5, freeze_last_layer=True)  # by gradient: of no effect here
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    head(torch.randn(4, 6)).square().sum().backward()
    cancel_last_layer_gradients_(head)
    optimizer.step()
    moved = {name for name, p in head.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if not name.startswith("last_layer")}
    assert head.last_layer.weight_v not in optimizer.state


def test_a_head_without_prototypes_has_nothing_to_freeze():
    student = small_student()
    head = student["head"]
    head.last_layer = None
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    cancel_last_layer_gradients_(head)
    assert all(parameter.grad is not None for parameter in student.parameters())
    groups = parameter_groups(OptimConfig(freeze_last_layer_by="lr"), student)
    assert [group["last_layer"] for group in groups] == [False, False]


# Clipping


def test_clipping_is_per_parameter_and_official():
    layer = nn.Linear(4, 3)
    layer.weight.grad, layer.bias.grad = sines((3, 4), 0.1), sines((3,), 0.2, 0.3)
    unclipped = layer.bias.grad.clone()
    norm = clip_gradients_(layer, 1.5, "parameter")
    assert norm.item() == pytest.approx(math.hypot(4.9114203453063965, 0.38561588525772095), rel=1e-6)
    expected = [0.060980357229709625, 0.4381762444972992, 0.6092910170555115, 0.49384668469429016]
    assert layer.weight.grad[0].tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(layer.bias.grad, unclipped)


@pytest.mark.parametrize("mode", ["parameter", "module", "global"])
def test_no_clipping_only_measures(mode):
    layer = nn.Linear(4, 3)
    layer.weight.grad = sines((3, 4), 0.1)  # and no gradient for the bias
    before = layer.weight.grad.clone()
    assert clip_gradients_(layer, None, mode).item() == pytest.approx(before.norm().item())
    assert torch.equal(layer.weight.grad, before)


def gradients(scale: float, device: str = "cpu") -> nn.Module:
    student = small_student(predictor=True).to(device)
    for index, parameter in enumerate(student.parameters()):
        if parameter.requires_grad:
            parameter.grad = sines(tuple(parameter.shape), index, scale).to(device)
    student["backbone"].bias.grad = None
    for parameter in student["predictor"].parameters():
        parameter.grad *= 1e-3
    return student


@pytest.mark.parametrize("max_norm", [0.1, 3.0, 1e4])
@pytest.mark.parametrize("mode", ["module", "global"])
def test_clipping_together_is_torchs(mode, max_norm):
    ours, theirs = gradients(2.0), gradients(2.0)
    norm = clip_gradients_(ours, max_norm, mode)
    parts = theirs.children() if mode == "module" else [theirs]
    norms = [nn.utils.clip_grad_norm_(part.parameters(), max_norm) for part in parts]
    assert norm.item() == pytest.approx(math.hypot(*(float(n) for n in norms)), rel=1e-6)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == (name in ("backbone.bias", "head.last_layer.weight_g"))
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)


def test_a_module_is_clipped_by_its_own_norm():
    student = gradients(2.0)
    before = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    clip_gradients_(student, 1.0, "module")
    for child in ("backbone", "head"):
        grads = [p.grad for p in student[child].parameters() if p.grad is not None]
        assert torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))).item() == pytest.approx(1, rel=1e-5)
    for name, parameter in student["predictor"].named_parameters():  # short enough
        assert torch.equal(parameter.grad, before[f"predictor.{name}"])


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.sampled_from(["parameter", "module", "global"]))
def test_clipping_never_lengthens_and_keeps_directions(scale, max_norm, mode):
    student = gradients(scale)
    before = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    norm = clip_gradients_(student, max_norm, mode).item()
    after = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    assert norm == pytest.approx(math.hypot(*(float(g.norm()) for g in before.values())), rel=1e-5)
    for name, grad in after.items():
        assert grad.norm() <= before[name].norm()
        torch.testing.assert_close(grad * before[name].norm(), before[name] * grad.norm(), rtol=1e-4, atol=1e-12)
    if mode == "global":
        assert math.hypot(*(float(g.norm()) for g in after.values())) <= max_norm * (1 + 1e-5)


@pytest.mark.parametrize("mode", ["parameter", "module", "global"])
def test_clipping_reads_nothing_back_from_the_device(mode):
    student = gradients(2.0, device="meta")  # without values: whoever reads one fails
    assert clip_gradients_(student, 1.0, mode).is_meta


@pytest.mark.parametrize("mode", ["parameter", "module", "global"])
def test_no_gradient_at_all_is_an_error(mode):
    with pytest.raises(ValueError, match="no parameter of the student has a gradient"):
        clip_gradients_(small_student(), 3.0, mode)


# LARS


def test_lars_scales_matrices_and_leaves_vectors():
    matrix, vector = nn.Parameter(sines((3, 4), 0.1)), nn.Parameter(sines((3,), 0.2))
    optimizer = LARS([{"params": [matrix]}, {"params": [vector]}], lr=0.5, weight_decay=0.1)
    start = [matrix.detach().clone(), vector.detach().clone()]
    steps = []
    for _ in range(2):
        matrix.grad, vector.grad = sines((3, 4), 0.7), sines((3,), 0.9)
        before = matrix.detach().clone()
        update = matrix.grad + 0.1 * before
        steps.append(0.001 * before.norm() / update.norm() * update)
        optimizer.step()
    momentum = [steps[0], 0.9 * steps[0] + steps[1]]
    torch.testing.assert_close(matrix.detach(), start[0] - 0.5 * (momentum[0] + momentum[1]))
    torch.testing.assert_close(vector.detach(), start[1] - 0.5 * (1 + 1.9) * sines((3,), 0.9))
