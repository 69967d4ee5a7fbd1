from __future__ import annotations

import pytest
import torch

from dino_core.eval import hold_out, logistic_regression


def problem(num, seed, classes=3, width=8):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (num,), generator=generator)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    return centres[labels] + 1.5 * torch.randn(num, width, generator=generator), labels


def by_torch(rows, labels, strength):
    """The optimum by torch's L-BFGS in float64: a function from features to logits."""
    weights = torch.zeros(int(labels.max()) + 1, rows.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(weights), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        logits = rows.double() @ weights.T + bias
        value = 0.5 * (weights**2).sum() + strength * torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        value.backward()
        return value

    optimizer.step(loss)
    return lambda features: (features.double() @ weights.T + bias).detach()


@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
def test_torch_agrees(strength):
    """On predictions exactly: scikit-learn stops at a gradient of 1e-8 here, torch at 1e-9."""
    (rows, labels), (queries, truth) = problem(90, 0), problem(500, 1)
    found = logistic_regression(rows, labels, queries, truth, (strength,), tolerance=1e-8)
    expected = (by_torch(rows, labels, strength)(queries).argmax(dim=1) == truth).double().mean().item()
    assert found.top1 == pytest.approx(100 * expected, abs=1e-9)
    assert (found.strength, found.validation, found.converged) == (strength, {}, True)


def test_c_is_chosen_on_held_out_images():
    (rows, labels), (queries, truth) = problem(120, 0), problem(400, 1)
    grid = (10.0, 1e-6, 0.01)
    found = logistic_regression(rows, labels, queries, truth, grid, validation_share=0.25, tolerance=1e-8)
    fitted, held = hold_out(labels, 0.25)
    expected = {
        strength: logistic_regression(rows[fitted], labels[fitted], rows[held], labels[held], (strength,)).top1
        for strength in grid
    }
    assert found.validation == pytest.approx(expected)
    assert list(found.validation) == sorted(grid)
    assert found.strength == min(strength for strength in grid if expected[strength] == max(expected.values()))
    assert found.top1 == logistic_regression(rows, labels, queries, truth, (found.strength,), tolerance=1e-8).top1
    part = logistic_regression(rows, labels, queries, truth, grid, validation_share=0.25, tolerance=1e-8, refit=False)
    of_part = logistic_regression(rows[fitted], labels[fitted], queries, truth, (found.strength,), tolerance=1e-8)
    assert part.top1 == pytest.approx(of_part.top1, abs=0.3)


def test_a_limit_that_was_reached_is_told():
    (rows, labels), (queries, truth) = problem(90, 0), problem(50, 1)
    assert not logistic_regression(rows, labels, queries, truth, (100.0,), max_iterations=2).converged


def test_two_classes_one_image_each():
    rows = torch.eye(2)
    assert logistic_regression(rows, torch.tensor([4, 9]), rows, torch.tensor([4, 3]), (1.0,)).top1 == 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": torch.zeros(4, dtype=torch.long)}, "hold 1 class; must hold 2 or more"),
        ({"train_labels": torch.zeros(3, dtype=torch.long)}, "a label per row"),
        ({"test": torch.eye(4) / 0}, "test: holds infinite values or NaN"),
        ({"strengths": ()}, "at least one C"),
        ({"strengths": (1.0, -1.0)}, "each > 0"),
        ({"strengths": (1.0, 2.0)}, "holds out none of 4 images of 4 classes"),
        ({"strengths": (1.0, 2.0), "validation_share": 1.0}, "share = 1.0: must be > 0 and < 1"),
    ],
)
def test_degenerate_input_is_an_error(changes, message):
    arguments = {"train": torch.eye(4), "train_labels": torch.arange(4), "test": torch.eye(4)}
    arguments |= {"test_labels": torch.arange(4), "strengths": (1.0,)}
    with pytest.raises(ValueError, match=message):
        logistic_regression(**(arguments | changes))
