"""Logistic regression on frozen features, for small sets: the optimum of a convex problem, without a schedule."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from dino_core.eval.low_shot import hold_out


@dataclass(frozen=True)
class LogisticResult:
    """What came out."""

    top1: float
    """Per cent of the test images, by the classifier of the chosen C."""
    strength: float
    """The chosen C."""
    validation: dict[float, float]
    """Per cent of the validation images for each C; empty if only one was given."""
    converged: bool
    """Whether the last classifier reached its tolerance within `max_iterations`."""


def logistic_regression(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    strengths: Sequence[float],
    *,
    validation_share: float = 0.1,
    refit: bool = True,
    max_iterations: int = 1000,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> LogisticResult:
    """Multinomial logistic regression by L-BFGS (scikit-learn's), C chosen on a part of the training images.

    ::

        minimise |W|^2 / 2 + C sum_i cross-entropy(softmax(W x_i + b), y_i)

    Two classes have one vector of weights, the difference of both, as scikit-learn has it. The classifiers of the grid
    are fitted from the smallest C to the largest, each from the one before.

    Args:
        train: [n, D], as they are: whether features are normalised matters for C.
        train_labels: [n], integers >= 0, of two classes or more.
        test: [m, D].
        test_labels: [m].
        strengths: C, each > 0; of equally good ones the smallest is chosen.
        validation_share: Of each class of the training images, for the choice of C; not used for a single C.
        refit: Fit the chosen C again on all training images.
        max_iterations: Of L-BFGS, for each C.
        tolerance: It ends when no element of the gradient, divided by C n, is larger.
        seed: Of the choice of validation images.

    Computed in float64. Source: DINOv2 (arXiv 2304.07193), `eval/log_regression.py`, which chooses among 45 values from
    1e-6 to 1e5 on a random tenth of the training images, of all classes together, and then fits all.

    Raises:
        ValueError: mismatched or not finite inputs, one class only, or a C out of range.
    """
    for name, features, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if features.dim() != 2 or features.numel() == 0 or labels.shape != features.shape[:1]:
            shapes = f"{list(features.shape)} with labels {list(labels.shape)}"
            raise ValueError(f"{name} {shapes}: must be [n, D] with n >= 1 and a label per row")
        if not all(extreme.isfinite() for extreme in features.aminmax()):
            raise ValueError(f"{name}: holds infinite values or NaN; must be finite")
    if not strengths or min(strengths) <= 0:
        raise ValueError(f"strengths = {tuple(strengths)}: must hold at least one C, each > 0")
    num_classes = len(train_labels.unique())
    if num_classes < 2:
        raise ValueError(f"train_labels: hold {num_classes} class; must hold 2 or more")
    rows, known, queries, truth = (
        tensor.cpu().numpy() for tensor in (train.double(), train_labels, test.double(), test_labels)
    )
    fit = partial(_fit, max_iterations=max_iterations, tolerance=tolerance)
    validation: dict[float, float] = {}
    if len(strengths) == 1:
        model = fit(LogisticRegression(), rows, known, strengths[0])
    else:
        fitted, held = (places.cpu().numpy() for places in hold_out(train_labels, validation_share, seed))
        path = LogisticRegression(warm_start=True)
        for strength in sorted(strengths):
            fit(path, rows[fitted], known[fitted], strength)
            validation[strength] = 100 * path.score(rows[held], known[held])
            if validation[strength] > max([-1.0, *list(validation.values())[:-1]]):
                model = copy.deepcopy(path)
        if refit:
            model = fit(LogisticRegression(), rows, known, model.C)
    converged = bool((model.n_iter_ < max_iterations).all())
    return LogisticResult(100 * model.score(queries, truth), float(model.C), validation, converged)


def _fit(
    model: LogisticRegression, rows: Any, labels: Any, strength: float, *, max_iterations: int, tolerance: float
) -> LogisticRegression:
    model.set_params(C=strength, max_iter=max_iterations, tol=tolerance)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the result says so
        model.fit(rows, labels)
    return model
