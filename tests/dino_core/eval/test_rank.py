"""RankMe, LiDAR and alpha-ReQ against closed forms, and against numpy and scikit-learn on the same features."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LinearRegression
from torch import Tensor

from dino_core.eval import alpha_req, effective_rank, lidar, rankme


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(n: int, d: int, seed: int = 0) -> Tensor:
    """[n, d], columns of length 1 at right angles, each with mean 0."""
    rows = randn(n, d, seed=seed)
    return torch.linalg.qr(rows - rows.mean(dim=0))[0]


def spectrum(singular: Tensor, n: int = 300) -> Tensor:
    """Centred features [n, D] with exactly these singular values, turned in some way."""
    rotation = torch.linalg.qr(randn(len(singular), len(singular), seed=1))[0]
    return orthonormal(n, len(singular)) * singular @ rotation


digits = torch.from_numpy(load_digits().data)


# --- RankMe -----------------------------------------------------------------------------------------------------------


def test_equal_directions_count_as_many_as_there_are():
    assert rankme(spectrum(torch.ones(24).double())) == pytest.approx(24)
    assert rankme(torch.eye(7)) == pytest.approx(7)


@pytest.mark.parametrize("filled", [1, 2, 9])
def test_a_subspace_has_its_dimension(filled: int):
    singular = torch.zeros(32, dtype=torch.float64)
    singular[:filled] = 3.0
    assert rankme(spectrum(singular)) == pytest.approx(filled, rel=1e-6)


def test_a_geometric_spectrum():
    """Singular values r^i, i = 0, 1, ...: the entropy is (-r log r - (1 - r) log(1 - r)) / (1 - r)."""
    r = 0.5
    expected = math.exp((-r * math.log(r) - (1 - r) * math.log(1 - r)) / (1 - r))  # 4
    assert rankme(spectrum(r ** torch.arange(60).double())) == pytest.approx(expected, rel=1e-4)
    assert expected == pytest.approx(4)


@pytest.mark.parametrize("features", [digits, digits[:20], digits.float() * 1e-20, digits * 1e200, -digits])
def test_rank_is_the_papers_formula_by_numpy(features: Tensor):
    singular = np.linalg.svd(features.double().numpy() / float(features.abs().max()), compute_uv=False)
    p = singular / singular.sum() + 1e-7
    assert rankme(features) == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=2e-4)
    assert 1 < rankme(features) <= min(features.shape)


def test_features_that_do_not_differ_have_rank_1():
    for score in (rankme(torch.full((50, 8), 0.3)), rankme(torch.zeros(50, 8)), rankme(randn(1, 8))):
        assert score == pytest.approx(1)


def test_the_effective_rank_is_that_of_centred_features():
    rows = spectrum(torch.tensor([5.0, 3.0, 2.0]).double())
    far = rows + 100 * torch.ones(3).double()
    expected = math.exp(-sum(p * math.log(p) for p in (0.5, 0.3, 0.2)))
    assert effective_rank(rows) == pytest.approx(rankme(rows)) == pytest.approx(expected)
    assert effective_rank(far) == pytest.approx(expected)
    assert rankme(far) < 1.1
    assert effective_rank(torch.ones(5, 3)) == 1


# --- LiDAR ------------------------------------------------------------------------------------------------------------


def views(between: Tensor, within: Tensor) -> Tensor:
    """[n, 2, D] whose images differ by `between` [n, D], and each one's views by plus and minus `within` [n, D]."""
    return torch.stack([between + within, between - within], dim=1)


def test_without_differences_between_views_it_is_the_rank_of_the_covariance():
    """S_w = delta I, so the shares are those of the eigenvalues of S_b: for 1, 1/2, 1/4, ... 4 directions."""
    between = spectrum(0.5 ** (torch.arange(60).double() / 2))
    assert lidar(views(between, torch.zeros_like(between))) == pytest.approx(4, rel=1e-4)


def test_directions_are_measured_by_the_spread_of_views():
    """Both spreads known: the eigenvalues are b / (w + delta), direction by direction."""
    n, d, delta = 400, 12, 0.01
    columns = orthonormal(n, 2 * d) * math.sqrt(n)  # covariance 1
    b, w = torch.linspace(1, 9, d).double(), torch.linspace(0.1, 2, d).double()
    rotation = torch.linalg.qr(randn(d, d, seed=2))[0]
    found = lidar(views(columns[:, :d] * b.sqrt() @ rotation, columns[:, d:] * w.sqrt() @ rotation), delta)
    shares = b / (w + delta) / (b / (w + delta)).sum()
    assert found == pytest.approx(torch.special.entr(shares).sum().exp().item())
    # Where images differ in proportion to their views, all directions count alike.
    alike = views(columns[:, :d] * (w + delta).sqrt() @ rotation, columns[:, d:] * w.sqrt() @ rotation)
    assert lidar(alike, delta) == pytest.approx(d)


def test_it_is_the_spectrum_of_scikit_learns_discriminant_analysis():
    """Images as classes: their eigenvalues are proportional where delta is small beside the spread of views."""
    n, q, d = 40, 6, 8
    features = (randn(n, 1, d) * torch.linspace(0.5, 4, d) + randn(n, q, d, seed=3)) @ randn(d, d, seed=4)
    analysis = LinearDiscriminantAnalysis(solver="eigen", n_components=d)
    analysis.fit(features.flatten(0, 1).numpy(), np.repeat(np.arange(n), q))
    p = analysis.explained_variance_ratio_
    assert lidar(features, 1e-9) == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=1e-5)


def test_images_that_do_not_differ_have_rank_1():
    same = randn(1, 4, 8).expand(30, 4, 8)
    for score in (lidar(same), lidar(torch.zeros(30, 4, 8)), lidar(randn(1, 4, 8)), lidar(torch.full((5, 2, 3), 7.1))):
        assert score == pytest.approx(1)


def test_rounding_is_no_difference():
    """A collapsed backbone gives every image the same but for the last bits."""
    constant = torch.linspace(-3, 2, 32).expand(200, 32) * (1 + randn(200, 1).clamp(-1, 1) * 1e-7)
    assert constant.float().std(dim=0).max() > 0
    assert rankme(constant.float()) == pytest.approx(1)
    assert lidar(constant.float().unflatten(0, (50, 4))) == pytest.approx(1)
    assert math.isnan(alpha_req(constant.float()))


def test_fewer_images_than_directions_bound_the_rank():
    assert lidar(randn(10, 3, 64)) <= 9 + 1e-6


# --- alpha-ReQ --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.5])
@pytest.mark.parametrize("dim", [12, 200])
def test_the_exponent_of_a_power_law(alpha: float, dim: int):
    singular = torch.arange(1, dim + 1).double() ** (-alpha / 2)
    assert alpha_req(spectrum(singular) * 1e-3 + 5) == pytest.approx(alpha, abs=1e-6)


def test_only_the_range_counts():
    singular = torch.arange(1, 151).double() ** -0.75
    singular[:3] *= torch.tensor([90.0, 40.0, 7.0])
    singular[100:] *= 1e-3
    assert alpha_req(spectrum(singular)) == pytest.approx(1.5)
    assert alpha_req(spectrum(singular), first=1) > 2


def test_it_is_scikit_learns_line_through_its_spectrum():
    variances = PCA().fit(digits.numpy()).explained_variance_
    place = np.arange(4, 1 + (variances > 1e-9).sum())
    line = LinearRegression().fit(np.log(place)[:, None], np.log(variances[place - 1]), sample_weight=1 / place)
    assert alpha_req(digits) == pytest.approx(-line.coef_[0])


def test_without_a_spectrum_there_is_no_exponent():
    for features in (
        torch.ones(50, 8),
        torch.zeros(50, 8),
        randn(1, 8),
        randn(5, 64),
        spectrum(torch.ones(4).double()),
    ):
        assert math.isnan(alpha_req(features))
    assert math.isfinite(alpha_req(randn(6, 64)))  # five eigenvalues, of which two count


# --- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [rankme, alpha_req])
def test_what_they_do_not_take(score: Callable[[Tensor], float]):
    for wrong in (torch.ones(5), torch.ones(0, 4), torch.ones(2, 3, 4)):
        with pytest.raises(ValueError, match=r"must be \[n, D\]"):
            score(wrong)
    with pytest.raises(ValueError, match="must be finite"):
        score(torch.tensor([[1.0, math.nan]]))


def test_what_lidar_does_not_take():
    for wrong in (torch.ones(5, 4), torch.ones(0, 2, 4), torch.ones(3, 1, 4)):
        with pytest.raises(ValueError, match=r"must be \[n, q, D\]"):
            lidar(wrong)
    with pytest.raises(ValueError, match="must be finite"):
        lidar(torch.full((2, 2, 2), math.inf))
    for delta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="delta"):
            lidar(randn(3, 2, 4), delta)
    with pytest.raises(ValueError, match="first"):
        alpha_req(randn(30, 9), first=5, last=5)
