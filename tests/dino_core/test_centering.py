from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_core.centering import center_teacher, sinkhorn_knopp, update_center_, update_center_by_sum_
from dino_core.config import PretrainConfig
from dino_core.objectives import Objective


def sines(shape: Sequence[int], shift: float, scale: float = 2.0) -> Tensor:
    values = scale * np.sin(0.7 * np.arange(math.prod(shape)) + shift)
    return torch.from_numpy(values).float().reshape(*shape)


def test_three_steps_have_the_official_losses_and_centres():
    student, teacher = sines((4, 3, 8), 0.1), sines((2, 3, 8), 1.3)
    objective = Objective(8, PretrainConfig())
    expected = [
        (0.04, 17.5410919, [-0.035039, 0.025427, 0.073935, 0.08767, 0.060172, 0.004375, -0.05348, -0.086183]),
        (0.04, 17.5929775, None),
        (0.07, 18.1844406, [-0.094957, 0.068907, 0.200364, 0.237586, 0.163067, 0.011856, -0.144931, -0.233555]),
    ]
    for temp, loss, center in expected:
        assert objective(student, teacher, temp).loss.item() == pytest.approx(loss, rel=1e-6)
        update_center_(objective.center, teacher, 0.9)
        if center is not None:
            assert objective.center.tolist() == pytest.approx(center, abs=1e-6)


def test_targets_are_sharpened_and_centred():
    logits = sines((2, 3, 8), 1.3)
    center = sines((8,), 0.4)
    expected = torch.softmax((logits - center) / 0.05, dim=-1)
    torch.testing.assert_close(center_teacher(logits, center, 0.05), expected)
    with pytest.raises(ValueError, match=r"temp = 0"):
        center_teacher(logits, center, 0.0)


def test_sinkhorn_knopp_has_the_official_values():
    targets = sinkhorn_knopp(0.1 * sines((4, 8), 0.5), 0.07)
    expected = [0.387533, 0.323852, 0.158669, 0.038839, 0.007776, 0.00333, 0.007526, 0.072476]
    assert targets[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_sinkhorn_knopp_uses_all_prototypes_equally():
    targets = sinkhorn_knopp(sines((16, 8), 0.5), 1.0, num_iters=200)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(16))
    torch.testing.assert_close(targets.sum(dim=0), torch.full((8,), 2.0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("temp", [1e-4, 1e3])
def test_sinkhorn_knopp_is_finite_at_any_temperature(temp):
    logits = sines((6, 8), 0.5, scale=50)
    targets = sinkhorn_knopp(logits, temp)
    assert targets.isfinite().all()
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))
    assert torch.equal(logits, sines((6, 8), 0.5, scale=50))


def test_a_rank_may_have_no_row():
    assert sinkhorn_knopp(torch.zeros(0, 8), 0.1, may_be_empty=True).shape == (0, 8)


def test_the_centre_by_sums_is_that_by_rows_and_stays_without_any():
    rows = sines((5, 8), 0.3)
    by_rows, by_sum = sines((8,), 1.0), sines((8,), 1.0)
    update_center_(by_rows, rows, 0.8)
    update_center_by_sum_(by_sum, rows.sum(dim=0), torch.tensor(5.0), 0.8)
    torch.testing.assert_close(by_sum, by_rows)
    before = by_sum.clone()
    update_center_by_sum_(by_sum, torch.zeros(8), torch.tensor(0.0), 0.8)
    assert torch.equal(by_sum, before)


@pytest.mark.parametrize(
    ("shape", "temp", "num_iters"), [((2, 3, 8), 0.1, 3), ((0, 8), 0.1, 3), ((4, 8), 0, 3), ((4, 8), 0.1, 0)]
)
def test_sinkhorn_knopp_rejects_degenerate_input(shape, temp, num_iters):
    with pytest.raises(ValueError, match="must be"):
        sinkhorn_knopp(torch.ones(shape), temp, num_iters)


def test_one_iteration_is_the_softmax_over_the_batch():
    """The paper's first line divides each prototype by its sum over the batch, the second each row by its own."""
    logits = sines((5, 7), 0.4)
    weights = torch.exp(logits.double() / 0.3)
    weights = weights / weights.sum(dim=0)
    torch.testing.assert_close(
        sinkhorn_knopp(logits, 0.3, num_iters=1).double(),
        weights / weights.sum(dim=1, keepdim=True),
        rtol=1e-5,
        atol=1e-7,
    )
