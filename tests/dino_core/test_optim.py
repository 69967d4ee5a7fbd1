"""Golden values: the authors' parameter groups and clipping (facebookresearch/dino). LARS: see test_official_trace."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dino_core.backbones import build_backbone
from dino_core.config import ModelConfig, OptimConfig
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


def test_groups_are_the_official_ones():
    network = CropNetwork(
        build_backbone(ModelConfig(backbone="vit_tiny_patch16_224"), 224), DINOHead(192, 32, norm_last_layer=False)
    )
    decayed, free = parameter_groups(network)
    assert [len(decayed["params"]), sum(p.numel() for p in decayed["params"])] == [56, 10613920]
    assert [len(free["params"]), sum(p.numel() for p in free["params"])] == [102, 34880]
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    assert {"backbone.cls_token", "backbone.pos_embed", "backbone.patch_embed.proj.weight"} <= decayed_names
    assert {"head.last_layer.weight_g", "head.last_layer.weight_v"} <= decayed_names


def test_frozen_parameters_are_in_no_group():
    head = DINOHead(6, 5, hidden_dim=8, bottleneck_dim=4)
    grouped = {id(p) for group in parameter_groups(head) for p in group["params"]}
    assert grouped == {id(p) for p in head.parameters() if p.requires_grad}
    assert id(head.last_layer.weight_g) not in grouped


def test_clipping_is_per_parameter_and_official():
    layer = nn.Linear(4, 3)
    layer.weight.grad, layer.bias.grad = sines((3, 4), 0.1), sines((3,), 0.2, 0.3)
    unclipped = layer.bias.grad.clone()
    norm = clip_gradients_(layer.parameters(), 1.5)
    assert norm.item() == pytest.approx(math.hypot(4.9114203453063965, 0.38561588525772095), rel=1e-6)
    expected = [0.060980357229709625, 0.4381762444972992, 0.6092910170555115, 0.49384668469429016]
    assert layer.weight.grad[0].tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(layer.bias.grad, unclipped)


def test_no_clipping_only_measures():
    layer = nn.Linear(4, 3)
    layer.weight.grad = sines((3, 4), 0.1)  # and no gradient for the bias
    before = layer.weight.grad.clone()
    assert clip_gradients_(layer.parameters(), None).item() == pytest.approx(before.norm().item())
    assert torch.equal(layer.weight.grad, before)


def test_cancelled_prototypes_do_not_move_and_gather_no_moments():
    head = DINOHead(6, 5, hidden_dim=8, bottleneck_dim=4)
    optimizer = build_optimizer(OptimConfig(), head)
    set_hyperparameters(optimizer, 0.1, 0.5)
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    head(torch.randn(4, 6)).square().sum().backward()
    cancel_last_layer_gradients_(head)
    optimizer.step()
    moved = {name for name, p in head.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if not name.startswith("last_layer")}
    assert head.last_layer.weight_v not in optimizer.state


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_weight_decay_is_of_the_first_group_only(name):
    head = DINOHead(6, 5, hidden_dim=8, bottleneck_dim=4)
    optimizer = build_optimizer(OptimConfig(name=name), head)
    set_hyperparameters(optimizer, 0.25, 0.5)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.25, 0.5), (0.25, 0.0)]
    for parameter in head.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with torch.no_grad():
        for index in (0, 2, 4):
            head.mlp[index].bias.fill_(1)
    before = {n: p.detach().clone() for n, p in head.named_parameters()}
    optimizer.step()
    for n, p in head.named_parameters():
        if n.endswith(".bias") or not p.requires_grad:
            assert torch.equal(p, before[n]), n
        else:
            assert p.norm() < before[n].norm(), n


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
