from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dino_core.diagnostics import (
    center_norm,
    distance_to_uniform,
    feature_rank,
    feature_std,
    prototype_usage,
    target_std,
    teacher_entropy,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rank_by_definition(features: Tensor) -> float:
    """Of the singular values themselves, in double precision."""
    rows = features.double()
    singular = torch.linalg.svdvals(rows - rows.mean(dim=0))
    return torch.special.entr(singular / singular.sum()).sum().exp().item()


def test_entropy_knows_both_collapses():
    assert teacher_entropy(torch.full((2, 3, 64), 1 / 64)).item() == pytest.approx(math.log(64))
    assert teacher_entropy(torch.eye(64)[None]).item() == 0
    assert distance_to_uniform(torch.tensor(math.log(64)), 64).item() == pytest.approx(0, abs=1e-6)


def test_usage_tells_hard_targets_from_one_hot_collapse():
    assert prototype_usage(torch.eye(64)[None]).item() == pytest.approx(64)
    assert prototype_usage(torch.eye(64)[:1].expand(2, 5, 64)).item() == pytest.approx(1)
    assert prototype_usage(torch.full((2, 3, 64), 1 / 64)).item() == pytest.approx(64)
    half = torch.eye(64)[torch.tensor([[0, 1], [1, 0]])]  # [2, 2, 64], two prototypes in turn
    assert prototype_usage(half).item() == pytest.approx(2)
    probs = randn(2, 3, 8).softmax(dim=-1)
    mean = probs.reshape(6, 8).mean(dim=0)
    assert prototype_usage(probs).item() == pytest.approx(math.exp(-(mean * mean.log()).sum().item()))


def test_centre_norm():
    assert center_norm(torch.tensor([3.0, 0.0, -4.0], dtype=torch.bfloat16)).item() == 5


def test_feature_std_is_1_when_spread_and_0_when_collapsed():
    assert feature_std(randn(4000, 32)).item() == pytest.approx(1, abs=0.01)
    assert feature_std(randn(1, 32).repeat(100, 1) * torch.rand(100, 1)).item() == pytest.approx(0, abs=2e-3)


def test_target_std_is_that_of_all_rows():
    outputs = randn(2, 50, 16)
    assert target_std(outputs).item() == feature_std(outputs.reshape(100, 16)).item()
    assert target_std(torch.eye(64)[:1].expand(2, 5, 64)).item() == pytest.approx(0, abs=1e-3)
    assert target_std(torch.eye(64)[:16][None]).item() == pytest.approx(math.sqrt(16 / 64 * 15 / 16))


@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0])
@pytest.mark.parametrize(
    ("num_rows", "dim", "filled"), [(300, 48, 48), (20, 48, 48), (20, 200, 5), (300, 48, 3), (300, 48, 1)]
)
def test_rank_is_that_of_the_singular_values(num_rows: int, dim: int, filled: int, offset: float):
    spread = randn(num_rows, filled) @ randn(filled, dim, seed=1)
    found = feature_rank(spread + offset).item()
    assert found == pytest.approx(rank_by_definition(spread), rel=0.02, abs=0.05)
    assert found <= min(num_rows - 1, filled) * 1.02 + 0.05


@pytest.mark.parametrize("decay", [0.3, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e12])
def test_rank_of_a_falling_spectrum(decay: float, scale: float):
    """Unscaled, entries near the smallest floats keep the eigenvalues from converging."""
    features = randn(256, 384) * torch.exp(-torch.arange(384) / decay) * scale
    assert feature_rank(features).item() == pytest.approx(rank_by_definition(features), rel=0.05)


@pytest.mark.parametrize(
    "features",
    [torch.zeros(64, 32), torch.full((64, 32), 3.3), 1000 * randn(1, 32).repeat(100, 1), randn(1, 8)],
    ids=["zeros", "one value", "all alike", "one row"],
)
def test_features_without_differences_have_rank_1(features: Tensor):
    assert feature_rank(features).item() == 1


def test_rank_of_what_is_not_finite_is_nan_and_no_error():
    features = randn(8, 4)
    features[2, 1] = math.inf
    assert feature_rank(features).isnan()
    assert feature_rank(torch.full((8, 4), 1e30)).isnan()


def test_rank_is_computed_in_fp32_under_autocast():
    features = randn(64, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = feature_rank(features)
    assert under.dtype == torch.float32
    assert torch.equal(under, feature_rank(features.float()))
    assert under.shape == ()
