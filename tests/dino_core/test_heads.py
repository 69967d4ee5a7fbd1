"""Golden values: the authors' DINOHead (facebookresearch/dino), run on the CPU in fp32 with the same sines."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_core.heads import DINOHead, Predictor, Prototypes
from dino_core.networks import CropNetwork


def sines(shape: Sequence[int], shift: float, scale: float = 2.0) -> Tensor:
    values = scale * np.sin(0.7 * np.arange(math.prod(shape)) + shift)
    return torch.from_numpy(values).float().reshape(*shape)


def fill(head: nn.Module) -> None:
    with torch.no_grad():
        for index, (name, parameter) in enumerate(head.named_parameters()):
            is_length = name.endswith("weight_g")
            parameter.copy_(
                1 + sines(parameter.shape, index, 0.25) if is_length else sines(parameter.shape, index, 0.5)
            )


@pytest.mark.parametrize(
    ("num_layers", "batch_norm", "first", "last", "input_gradient", "weight_gradient"),
    [
        (
            3,
            False,
            [-0.2117, -0.077935, 0.451992, -0.806432, 1.002253],
            [-0.25678, -0.022843, 0.394441, -0.7581, 0.973153],
            [0.00097, 0.034853, 0.052344, 0.045217, 0.016824, -0.019482],
            [2.973734, 0.751137, -1.818942, -3.577228],
        ),
        (
            1,
            False,
            [-0.233693, 0.182104, -0.107579, 0.037075, 0.020266],
            [-0.241016, 0.192488, -0.118661, 0.047155, 0.011506],
            [0.025551, 0.030492, 0.021093, 0.001773, -0.01838, -0.029889],
            [-1.060403, -3.525319, 3.590339, -1.834468],
        ),
        (
            2,
            True,
            [0.375114, -0.722398, 1.045235, -1.212504, 1.135214],
            [0.366167, -0.713643, 1.038487, -1.209599, 1.136808],
            [0.017232, 0.014451, 0.004873, -0.006996, -0.015575, -0.016829],
            [-0.41627, -0.099854, 0.25542, 0.482216],
        ),
    ],
)
def test_has_the_official_values(num_layers, batch_norm, first, last, input_gradient, weight_gradient):
    head = DINOHead(
        6, 5, num_layers=num_layers, hidden_dim=8, bottleneck_dim=4, norm_last_layer=False, batch_norm=batch_norm
    )
    fill(head)
    features = sines((4, 6), 0.3).requires_grad_()
    logits = head(features)
    (logits * sines(logits.shape, 0.9)).sum().backward()
    assert logits[0].tolist() == pytest.approx(first, abs=2e-6)
    assert logits[3].tolist() == pytest.approx(last, abs=2e-6)
    assert features.grad is not None
    assert features.grad[1].tolist() == pytest.approx(input_gradient, abs=2e-6)
    assert head.last_layer.weight_v.grad is not None
    assert head.last_layer.weight_v.grad[0].tolist() == pytest.approx(weight_gradient, abs=4e-6)


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_lengths_of_prototypes_are_learnt_only_if_asked(norm_last_layer):
    head = DINOHead(6, 5, hidden_dim=8, bottleneck_dim=4, norm_last_layer=norm_last_layer)
    assert torch.equal(head.last_layer.weight_g, torch.ones(5, 1))
    assert head.last_layer.weight_g.requires_grad is not norm_last_layer
    assert list(head.last_layer.state_dict()) == ["weight_g", "weight_v"]
    assert head(100 * sines((4, 6), 0.3)).abs().max() <= 1 + 1e-6  # cosines


def test_initial_weights_are_those_of_the_paper():
    torch.manual_seed(0)
    head = DINOHead(192, 4096, hidden_dim=256)
    for layer in head.mlp:
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
            assert not layer.bias.any()
    # nn.Linear's own: uniform up to 1 / sqrt(256)
    assert head.last_layer.weight_v.std().item() == pytest.approx(1 / 16 / math.sqrt(3), rel=0.01)
    assert head.last_layer.weight_v.abs().max().item() <= 1 / 16
    with pytest.raises(ValueError, match="num_layers = 0"):
        DINOHead(6, 5, num_layers=0)


def test_without_prototypes_the_head_ends_with_the_bottleneck():
    head = DINOHead(6, None, num_layers=2, hidden_dim=8, bottleneck_dim=4, output_batch_norm=True)
    assert head.out_dim == 4
    assert not any("last_layer" in name for name, _ in head.named_parameters())
    out = head(sines((10, 6), 0.3))
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(10))
    plain = DINOHead(
        6, None, num_layers=2, hidden_dim=8, bottleneck_dim=4, output_batch_norm=True, bottleneck_norm=False
    )
    out = plain(sines((10, 6), 0.3))
    torch.testing.assert_close(out.mean(dim=0), torch.zeros(4), rtol=0, atol=1e-6)
    assert not torch.allclose(out.norm(dim=-1), torch.ones(10))


def test_a_predictor_stands_between_bottleneck_and_prototypes():
    head, predictor = DINOHead(6, 5, num_layers=2, hidden_dim=8, bottleneck_dim=4), Predictor(4, hidden_dim=8)
    features = sines((10, 6), 0.3)
    bottleneck = F.normalize(head.mlp(features), dim=-1)
    expected = head.last_layer(F.normalize(predictor(bottleneck), dim=-1))
    torch.testing.assert_close(head(features, predictor), expected)
    assert head(features, predictor).abs().max() <= 1, "still cosines"
    assert not torch.allclose(head(features), expected)


@pytest.mark.parametrize(("activation", "kind"), [("gelu", nn.GELU), ("relu", nn.ReLU)])
def test_the_activation_is_that_named(activation, kind):
    head = DINOHead(6, 5, hidden_dim=8, bottleneck_dim=4, activation=activation)
    assert [type(layer) for layer in head.mlp] == [nn.Linear, kind, nn.Linear, kind, nn.Linear]


def test_patches_may_have_prototypes_of_their_own_behind_the_class_tokens_mlp():
    """iBOT's code: one MLP and one batch norm over all of them, L2 norm, then two layers."""
    torch.manual_seed(0)
    head, own = DINOHead(6, 5, num_layers=2, hidden_dim=8, bottleneck_dim=4, batch_norm=True), Prototypes(4, 7)
    network = CropNetwork(nn.Identity(), head, patch_head=own)
    features, patches = sines((10, 6), 0.3), sines((4, 6), 1.1)
    outputs, of_patches = network._project(features, patches)
    bottleneck = F.normalize(head.mlp(torch.cat([features, patches])), dim=-1)
    torch.testing.assert_close(outputs, head.last_layer(bottleneck[:10]))
    torch.testing.assert_close(of_patches, own(bottleneck[10:]))
    assert of_patches.shape == (4, 7)
    assert own(bottleneck).abs().max() <= 1, "cosines"
    torch.testing.assert_close(network.embed_patches(patches), head.embed(patches))
    assert {name for name, _ in own.named_parameters()} == {"last_layer.weight_g", "last_layer.weight_v"}
