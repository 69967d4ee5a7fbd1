from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dino_core.losses import (
    dino_loss,
    ibot_patch_loss,
    info_nce_loss,
    koleo_loss,
    koleo_loss_in_groups,
    mse_loss,
)


def sines(shape: Sequence[int], shift: float, scale: float = 2.0) -> Tensor:
    """The reference inputs: scale * sin(0.7 i + shift), row by row."""
    values = scale * np.sin(0.7 * np.arange(math.prod(shape)) + shift)
    return torch.from_numpy(values).float().reshape(*shape)


def by_definition(student: Tensor, probs: Tensor, temp: float) -> Tensor:
    """Equation 3 of the paper, pair by pair."""
    terms = [
        -(probs[t] * torch.log_softmax(student[s] / temp, dim=-1)).sum(dim=-1).mean()
        for t in range(len(probs))
        for s in range(len(student))
        if s != t
    ]
    return torch.stack(terms).mean()


@given(
    num_teacher=st.integers(1, 3),
    num_more=st.integers(0, 3),
    num_images=st.integers(1, 3),
    num_prototypes=st.integers(2, 9),
    temp=st.floats(0.02, 2),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_equals_the_definition_with_its_gradient(num_teacher, num_more, num_images, num_prototypes, temp, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (max(2, num_teacher + num_more), num_images, num_prototypes)
    student = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    probs = torch.randn((num_teacher, *shape[1:]), generator=generator, dtype=torch.float64).mul(9).softmax(dim=-1)
    loss, expected = dino_loss(student, probs, temp), by_definition(student, probs, temp)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(3 * loss, student)
    (expected_gradient,) = torch.autograd.grad(3 * expected, student)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_prototypes", [1024, 4096, 60000, 65536, 131072, 262144])
def test_uniform_logits_give_ln_k(num_prototypes):
    probs = torch.full((2, 1, num_prototypes), 1 / num_prototypes)
    loss = dino_loss(torch.zeros(4, 1, num_prototypes), probs, 0.1)
    table = {
        1024: 6.931472,
        4096: 8.317766,
        60000: 11.0021,
        65536: 11.090355,
        131072: 11.783502,
        262144: 12.476649,
    }
    assert loss.item() == pytest.approx(table[num_prototypes], abs=2e-6)
    assert loss.item() == pytest.approx(math.log(num_prototypes), rel=1e-6)


def test_half_precision_logits_are_computed_in_fp32():
    student = sines((4, 3, 8), 0.1).bfloat16().requires_grad_()
    probs = sines((2, 3, 8), 1.3).softmax(dim=-1)
    loss = dino_loss(student, probs, 0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, by_definition(student.detach().float(), probs, 0.1))
    loss.backward()
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16


def test_the_teacher_gets_no_gradient_and_inputs_are_left_alone():
    student, probs = sines((3, 2, 5), 0.1).requires_grad_(), sines((2, 2, 5), 1.3).softmax(dim=-1).requires_grad_()
    before = student.detach().clone()
    dino_loss(student, probs, 0.1).backward()
    assert probs.grad is None
    assert torch.equal(student.detach(), before)


def test_a_crop_is_not_compared_with_itself():
    student, probs = sines((2, 2, 5), 0.1), sines((1, 2, 5), 1.3).softmax(dim=-1)
    loss = dino_loss(student, probs, 0.1)
    student[0] += 5 * sines((2, 5), 0.4)
    assert dino_loss(student, probs, 0.1) == loss
    student[1] += 5 * sines((2, 5), 0.4)
    assert dino_loss(student, probs, 0.1) != loss


@pytest.mark.parametrize(
    ("student", "teacher", "temp"),
    [
        ((4, 3, 8), (2, 3, 7), 0.1),
        ((4, 3, 8), (2, 2, 8), 0.1),
        ((4, 24), (2, 24), 0.1),
        ((4, 0, 8), (2, 0, 8), 0.1),
        ((1, 3, 8), (1, 3, 8), 0.1),
        ((2, 3, 8), (3, 3, 8), 0.1),
        ((4, 3, 8), (2, 3, 8), 0.0),
    ],
)
def test_degenerate_input_is_an_error(student, teacher, temp):
    with pytest.raises(ValueError, match=r"must be|needs"):
        dino_loss(torch.zeros(student), torch.zeros(teacher), temp)


def test_koleo_has_the_official_values():
    assert koleo_loss(sines((6, 8), 0.2)).item() == pytest.approx(0.4390309, abs=1e-6)
    collapsed = koleo_loss(sines((1, 8), 0.2).repeat(6, 1)).item()
    assert collapsed == pytest.approx(17.0782261, abs=1e-5)
    assert collapsed == pytest.approx(-math.log(1e-8 * (1 + math.sqrt(8))), rel=1e-5)


def test_koleo_ignores_lengths_and_pushes_neighbours_apart():
    features = sines((6, 8), 0.2)
    scaled = features * torch.arange(1.0, 7.0)[:, None]
    torch.testing.assert_close(koleo_loss(scaled), koleo_loss(features))
    leaf = features.clone().requires_grad_()
    loss = koleo_loss(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert koleo_loss(features - 0.01 * gradient) < loss


@pytest.mark.parametrize("shape", [(1, 8), (0, 8), (2, 3, 8)])
def test_koleo_needs_neighbours(shape):
    with pytest.raises(ValueError, match=r"must be \[B, D\] with B >= 2"):
        koleo_loss(torch.ones(shape))


def test_koleo_in_groups_is_the_sum_over_crops_of_the_mean_over_groups():
    features = sines((2, 12, 8), 0.2)
    expected = sum(koleo_loss(group) for crop in features for group in crop.split(6)) / 2
    torch.testing.assert_close(koleo_loss_in_groups(features, 6), expected)
    assert koleo_loss_in_groups(features, 12).item() == pytest.approx(sum(koleo_loss(crop).item() for crop in features))
    with pytest.raises(ValueError, match="B a multiple of 5"):
        koleo_loss_in_groups(features, 5)


def test_patches_that_tell_nothing_have_the_masked_share_of_ln_k():
    """The official divisor counts crops without a mask: mask_prob x ln 8 = 1.03972."""
    counts = [3, 1, 0, 0]
    weights = torch.cat([torch.full((count,), 1 / (count * len(counts))) for count in counts if count])
    loss = ibot_patch_loss(torch.zeros(4, 8), torch.full((4, 8), 1 / 8), weights, 0.1)
    assert loss.item() == pytest.approx(1.03972, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_of_patches_and_its_gradient_are_those_of_the_definition(dtype):
    student = sines((7, 9), 0.4).to(dtype).requires_grad_()
    probs = torch.softmax(sines((7, 9), 1.1).to(dtype) / 0.3, dim=-1)
    weights = torch.arange(1.0, 8.0, dtype=dtype)
    expected = (weights * -(probs * torch.log_softmax(student / 0.2, dim=-1)).sum(dim=-1)).sum()
    (expected_gradient,) = torch.autograd.grad(expected, student)
    loss = ibot_patch_loss(student, probs, weights, 0.2)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], expected_gradient)


def test_no_masked_patch_has_no_loss_and_a_gradient_of_zero():
    head = torch.nn.Linear(4, 9)
    loss = ibot_patch_loss(head(torch.zeros(0, 4)), torch.zeros(0, 9), torch.zeros(0), 0.1)
    loss.backward()
    assert loss.item() == 0
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


@pytest.mark.parametrize(
    ("student", "teacher", "weights", "temp"),
    [((3, 4), (3, 5), 3, 0.1), ((3, 4), (3, 4), 2, 0.1), ((3, 4), (3, 4), 3, 0)],
)
def test_patches_that_do_not_match_are_refused(student, teacher, weights, temp):
    with pytest.raises(ValueError, match="must be"):
        ibot_patch_loss(torch.zeros(student), torch.zeros(teacher), torch.zeros(weights), temp)


def test_gradients_in_half_precision_are_scaled_before_they_are_rounded():
    """At K = 65536 an entry of the gradient is below the smallest half, until the loss scale lifts it."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(4, 32, 65536, generator=generator).half()
    probs = torch.softmax(torch.rand(2, 32, 65536, generator=generator) / 0.04, dim=-1)
    gradients = []
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 65536.0)):
        student = logits.to(dtype).requires_grad_()
        (dino_loss(student, probs, 0.1) * scale).backward()
        gradients.append(student.grad.double() / scale)
    exact, half = gradients
    assert half.isfinite().all()
    torch.testing.assert_close(half.norm(), exact.norm(), rtol=1e-3, atol=0)
    assert (half - exact).norm() < 2e-3 * exact.norm()
    assert (half.abs().sum() / exact.abs().sum()).item() == pytest.approx(1, abs=0.01)


# --------------------------------------------------------------------------------------------- mse_loss, info_nce_loss


def pairs_of(student: Tensor, targets: Tensor) -> list[tuple[int, int]]:
    return [(s, t) for t in range(len(targets)) for s in range(len(student)) if s != t]


@given(num_teacher=st.integers(1, 2), num_more=st.integers(0, 2), num_images=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_mse_is_the_mean_squared_distance_of_the_pairs(num_teacher, num_more, num_images, seed):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(max(2, num_teacher + num_more), num_images, 5, generator=generator)
    targets = F.normalize(torch.randn(num_teacher, num_images, 5, generator=generator), dim=-1)
    unit = F.normalize(student, dim=-1)
    expected = torch.stack([(unit[s] - targets[t]).square().sum(dim=-1).mean() for s, t in pairs_of(student, targets)])
    torch.testing.assert_close(mse_loss(student, targets), expected.mean(), rtol=1e-5, atol=1e-6)


def info_nce_by_definition(student: Tensor, keys: Tensor, temp: float, queue: Tensor | None) -> Tensor:
    """Term by term, with lists of negatives."""
    unit = F.normalize(student, dim=-1)
    terms = []
    for s, t in pairs_of(student, keys):
        for b in range(student.shape[1]):
            others = [keys[u, n] for u in range(len(keys)) for n in range(keys.shape[1]) if n != b]
            negatives = others if queue is None else list(queue)
            scores = torch.stack([unit[s, b] @ key for key in [keys[t, b], *negatives]]) / temp
            terms.append(torch.logsumexp(scores, dim=0) - scores[0])
    return torch.stack(terms).mean()


@pytest.mark.parametrize("queue_size", [None, 7])
@pytest.mark.parametrize(("num_teacher", "num_student"), [(1, 2), (2, 2), (2, 5)])
def test_info_nce_is_its_definition_with_its_gradients(num_teacher, num_student, queue_size):
    torch.manual_seed(0)
    raw = [torch.randn(n, 4, 6, dtype=torch.float32, requires_grad=True) for n in (num_student, num_teacher)]
    queue = None if queue_size is None else F.normalize(torch.randn(queue_size, 6), dim=-1)
    gradients = []
    for loss in (
        lambda s, k: info_nce_loss(s, k, 0.2, queue=queue),
        lambda s, k: info_nce_by_definition(s, k, 0.2, queue),
    ):
        value = loss(raw[0], F.normalize(raw[1], dim=-1))
        gradients.append([value.detach(), *torch.autograd.grad(value, raw)])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


def test_two_crops_of_one_network_give_nt_xent():
    """SimCLR's algorithm 1: of 2N views each is told from the 2N - 2 of other images."""
    torch.manual_seed(1)
    views = F.normalize(torch.randn(2, 5, 8), dim=-1)
    flat = views.flatten(0, 1)
    scores = (flat @ flat.T / 0.1).fill_diagonal_(-math.inf)
    positives = torch.cat([torch.arange(5, 10), torch.arange(5)])
    nt_xent = F.cross_entropy(scores, positives)
    torch.testing.assert_close(info_nce_loss(views, views, 0.1), nt_xent)


def test_info_nce_of_equal_outputs_is_the_logarithm_of_the_number_of_choices():
    same = F.normalize(torch.ones(2, 5, 8), dim=-1)
    assert info_nce_loss(same, same, 0.2).item() == pytest.approx(math.log(1 + 2 * 4), rel=1e-6)
    assert info_nce_loss(same, same, 0.2, queue=same[0]).item() == pytest.approx(math.log(1 + 5), rel=1e-6)


def test_info_nce_needs_negatives_and_a_temperature():
    with pytest.raises(ValueError, match="at least 2 images"):
        info_nce_loss(torch.ones(2, 1, 4), torch.ones(2, 1, 4), 0.2)
    with pytest.raises(ValueError, match=r"temp = 0\.0: must be > 0"):
        info_nce_loss(torch.ones(2, 2, 4), torch.ones(2, 2, 4), 0.0)
