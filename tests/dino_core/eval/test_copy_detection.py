from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from dino_core.eval.copy_detection import copy_descriptor, copy_detection_scores, gem, learn_whitening
from dino_core.eval.retrieval import RankingRules, average_precision, micro_average_precision, retrieval_scores


def chirp(shape: tuple[int, ...], shift: float) -> torch.Tensor:
    places = np.arange(math.prod(shape))
    return torch.tensor(2 * np.sin(0.37 * places**2 + shift), dtype=torch.float32).reshape(shape)


WHITENING_SET = chirp((40, 6), 0.4) * torch.arange(1, 7) + torch.arange(6)
IMAGES = chirp((3, 6), 0.9) * torch.arange(1, 7)
FLAT = torch.tensor([1, 1, 1, 1, 1, 1e-4])  # leaves the last direction below the floor


def cosines(features: torch.Tensor) -> list[float]:
    rows = torch.nn.functional.normalize(features, dim=1)
    similarity = rows @ rows.T
    return [float(similarity[i, j]) for i, j in ((0, 1), (0, 2), (1, 2))]


def test_gem_is_that_of_the_official_script():
    """Golden: the pooling of facebookresearch/dino's eval_copy_detection.py, run on these patches."""
    places = np.arange(48)
    patches = torch.tensor(2 * np.sin(0.7 * places + 0.2), dtype=torch.float32).reshape(2, 3, 2, 4)
    expected = [
        [1.36055315, 1.14827633, 1.38955522, 1.46394777],
        [1.04267299, 1.40301919, 1.46306396, 1.34233308],
    ]
    torch.testing.assert_close(gem(patches), torch.tensor(expected))
    token = torch.ones(2, 5)
    descriptor = copy_descriptor(token, patches)
    assert descriptor.shape == (2, 9)
    assert descriptor[:, :5].eq(1).all()
    assert torch.equal(copy_descriptor(None, patches), gem(patches))


def test_gem_lies_between_mean_and_maximum():
    patches = torch.tensor([[[[1.0], [2.0]], [[3.0], [-4.0]]]])  # [1, 2, 2, 1]
    assert float(gem(patches, power=1)) == pytest.approx((1 + 2 + 3) / 4, abs=1e-5)
    assert float(gem(patches, power=60)) == pytest.approx(3, rel=0.03)
    assert float(gem(patches)) == pytest.approx(((1 + 16 + 81) / 4) ** 0.25)
    assert float(gem(-patches.abs())) == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize(
    ("scale", "covariance", "dim", "expected"),
    [
        (1, "uncentred", None, [0.176761, -0.279836, 0.246919]),
        (1, "centred", None, [0.238383, -0.284301, 0.227272]),
        (1, "centred", 3, [0.35577, -0.30056, -0.159549]),
        (FLAT, "uncentred", None, [0.507182, -0.126493, 0.082829]),
        (FLAT, "centred", None, [0.53846, -0.099098, 0.121193]),
    ],
)
def test_whitening_is_that_of_the_official_class(scale, covariance, dim, expected):
    """Golden: PCA of facebookresearch/dino's utils.py on these covariances, the mean taken off as its script does."""
    whitening = learn_whitening(WHITENING_SET * scale, covariance, dim)
    assert cosines(whitening(IMAGES * scale)) == pytest.approx(expected, abs=2e-6)


def test_centred_whitening_is_that_of_scikit_learn():
    whitening = learn_whitening(WHITENING_SET, dim=4)
    white = whitening(WHITENING_SET)
    torch.testing.assert_close(white.T @ white / len(white), torch.eye(4), atol=1e-5, rtol=0)
    pca = PCA(n_components=4, whiten=True, svd_solver="full").fit(WHITENING_SET.double().numpy())
    assert cosines(whitening(IMAGES)) == pytest.approx(
        cosines(torch.tensor(pca.transform(IMAGES.double().numpy()))), abs=1e-6
    )


def test_fewer_images_than_features_are_whitened_within_bounds():
    few = WHITENING_SET[:3]
    assert learn_whitening(few)(IMAGES).isfinite().all()
    white = learn_whitening(few, dim=2)(few)
    torch.testing.assert_close(white.T @ white / 3, torch.eye(2), atol=1e-4, rtol=0)


def test_scores_by_attack_and_overall():
    angles = torch.linspace(0, 1.5, 6)
    database = torch.stack([angles.cos(), angles.sin()], dim=1)
    turned = angles + 0.2  # 0.2 from its own, 0.1 from the next
    queries = torch.cat([database, torch.stack([turned.cos(), turned.sin()], dim=1), database[:1]])
    positives = [*([i] for i in range(6)), *([i] for i in range(6)), []]
    attacks = ["none"] * 6 + ["turned"] * 6 + ["no copy"]
    scores = copy_detection_scores(queries, database, positives, attacks, RankingRules(interpolation="plain"))
    assert list(scores.by_attack) == ["none", "turned"]
    assert scores.by_attack["none"].mean_average_precision == 100
    expected = [100 * average_precision([rank], 1, "plain") for rank in (1, 1, 1, 1, 1, 0)]
    assert scores.by_attack["turned"].average_precisions.tolist() == pytest.approx(expected)
    assert scores.overall.mean_average_precision == pytest.approx((600 + sum(expected)) / 12)
    assert scores.overall.num_without_positives == 1
    assert scores.micro_by_attack["none"] == 100
    alone = retrieval_scores(queries[6:12], database, positives[6:12], rules=RankingRules(interpolation="plain"))
    assert scores.by_attack["turned"].mean_average_precision == alone.mean_average_precision
    assert scores.micro_average_precision == micro_average_precision(queries, database, positives)
    copies_only = micro_average_precision(queries[:12], database, positives[:12])
    assert scores.micro_average_precision < copies_only  # an image that is no copy, and looks like one


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gem(torch.ones(2, 3, 4)), r"patches \[2, 3, 4\]"),
        (lambda: gem(torch.ones(1, 2, 2, 3), power=0), "power = 0"),
        (lambda: copy_descriptor(torch.ones(3, 4), torch.ones(2, 1, 1, 4)), r"must be \[2, D\]"),
        (lambda: learn_whitening(WHITENING_SET[:1]), "n >= 2"),
        (lambda: learn_whitening(torch.ones(4, 3)), "all the same"),
        (lambda: learn_whitening(WHITENING_SET / 0), "infinite values or NaN"),
        (
            lambda: learn_whitening(WHITENING_SET, "official"),
            "covariance = official: must be one of centred",
        ),
        (lambda: learn_whitening(WHITENING_SET, dim=7), "dim = 7: must be >= 1 and <= 6"),
        (lambda: learn_whitening(WHITENING_SET, floor=0), "floor = 0"),
        (lambda: copy_detection_scores(IMAGES, IMAGES, [[0], [1], [2]], ["a"]), "attacks of 1 queries: must be 3"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
