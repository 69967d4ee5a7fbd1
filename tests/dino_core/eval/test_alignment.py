from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dino_core.eval import alignment as module
from dino_core.eval.alignment import alignment, uniformity


def features(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("t", [2.0, 0.5])
@pytest.mark.parametrize("pairs", [2**24, 100])
def test_uniformity_is_that_of_all_distances(t: float, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAIRS_PER_CHUNK", pairs)
    rows = features(37, 5)
    distances = torch.pdist(F.normalize(rows.double(), dim=1))
    expected = float(distances.square().mul(-t).exp().mean().log())
    assert uniformity(rows, t) == pytest.approx(expected, rel=1e-5)


def test_uniformity_by_hand() -> None:
    assert uniformity(torch.ones(4, 3)) == pytest.approx(0, abs=1e-6)
    opposite = torch.tensor([[1.0, 0.0], [-5.0, 0.0]])  # |x - y|^2 = 4
    assert uniformity(opposite) == pytest.approx(-8)
    assert uniformity(opposite, 1.0) == pytest.approx(-4)


def test_alignment_by_hand() -> None:
    same, square = torch.ones(1, 3, 2), torch.tensor([[[1.0, 0.0], [0.0, 7.0], [-2.0, 0.0]]])
    assert alignment(same) == pytest.approx(0, abs=1e-6)
    assert alignment(square) == pytest.approx((2 + 2 + 4) / 3)
    assert alignment(square, 1.0) == pytest.approx((math.sqrt(2) * 2 + 2) / 3)
    assert alignment(torch.cat([same, square])) == pytest.approx((2 + 2 + 4) / 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniformity(features(1, 3)), r"features \[1, 3\]: must be \[n, D\] with n >= 2"),
        (lambda: uniformity(features(4, 3), 0), "t = 0: must be > 0"),
        (lambda: uniformity(torch.full((3, 3), math.nan)), "must be finite"),
        (lambda: alignment(features(4, 3)), r"must be \[n, q, D\]"),
        (lambda: alignment(features(4, 1, 3)), "q >= 2"),
        (lambda: alignment(features(4, 2, 3), -1), "alpha = -1: must be > 0"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
