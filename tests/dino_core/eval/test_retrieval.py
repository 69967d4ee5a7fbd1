from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from dino_core.eval import retrieval
from dino_core.eval.retrieval import (
    RankingRules,
    RevisitedQuery,
    average_precision,
    label_scores,
    micro_average_precision,
    multi_scale_features,
    retrieval_scores,
    revisited_scores,
)

PLAIN = RankingRules(interpolation="plain", precision="plain")


def wave(shape: tuple[int, ...], shift: float, pace: float = 0.7) -> torch.Tensor:
    """2 sin(pace i + shift), row by row."""
    places = np.arange(math.prod(shape))
    return torch.tensor(2 * np.sin(pace * places + shift), dtype=torch.float32).reshape(shape)


GALLERY, QUERIES = wave((30, 8), 0.3), wave((5, 8), 1.1, 1.3)
TRUTH = [
    RevisitedQuery(easy=[0, 7, 12], hard=[3, 21], junk=[5, 6, 28]),
    RevisitedQuery(easy=[], hard=[14, 15, 16, 29], junk=[]),
    RevisitedQuery(easy=[2, 9], hard=[], junk=[1, 10, 11, 12, 13]),
    RevisitedQuery(easy=[4], hard=[8, 20], junk=[0]),
    RevisitedQuery(easy=[], hard=[], junk=[3]),
]


def by_definition(queries, gallery, positives, junk, ks=(1, 5, 10)):
    """Plain and trapezoid average precision, plain and revisited precision at k, of a list sorted by hand."""
    aps, precisions = [], []
    for query, wanted, ignored in zip(queries, positives, junk, strict=True):
        similarity = torch.nn.functional.cosine_similarity(query[None].double(), gallery.double()).tolist()
        kept = [number for number in range(len(gallery)) if number not in ignored]
        kept.sort(key=lambda number: (-similarity[number], number in wanted))
        hits = [number in wanted for number in kept]
        if not any(hits):
            continue
        after = [sum(hits[: i + 1]) / (i + 1) for i in range(len(hits))]
        before = [1.0, *after[:-1]]
        places = [i for i, hit in enumerate(hits) if hit]
        aps.append((np.mean([after[i] for i in places]), np.mean([(before[i] + after[i]) / 2 for i in places])))
        cuts = [min(k, places[-1] + 1) for k in ks]
        precisions.append([[sum(hits[:k]) / k for k in ks], [sum(hits[:cut]) / cut for cut in cuts]])
    return 100 * np.mean(aps, axis=0), 100 * np.mean(precisions, axis=0)


@pytest.mark.parametrize(
    ("ranks", "num", "trapezoid", "plain"),
    [
        ([0, 2, 5], 3, 0.6777777777777777, (1 + 2 / 3 + 1 / 2) / 3),
        ([5, 0, 2], 4, 0.5083333333333333, (1 + 2 / 3 + 1 / 2) / 4),
        ([3], 1, 0.125, 0.25),
        ([1, 2, 9, 30], 6, 0.2014934289127837, (1 / 2 + 2 / 3 + 3 / 10 + 4 / 31) / 6),
        ([], 2, 0.0, 0.0),
    ],
)
def test_average_precision_is_that_of_the_official_scripts(ranks, num, trapezoid, plain):
    assert average_precision(ranks, num) == pytest.approx(trapezoid, abs=1e-12)
    assert average_precision(ranks, num, "plain") == pytest.approx(plain, abs=1e-12)


@pytest.mark.parametrize(
    ("protocol", "mean", "of_queries", "at_k"),
    [
        (
            "easy",
            24.15888577653283,
            [10.53221288515406, None, 57.77777777777777, 4.166666666666666],
            [100 / 3, 20 / 3, 10],
        ),
        (
            "medium",
            24.411682204558236,
            [15.42689822217686, 16.07989028944911, 57.77777777777777, 8.362162528829195],
            [25, 10, 12.5],
        ),
        (
            "hard",
            9.230452508638782,
            [6.714743589743589, 16.07989028944911, None, 4.896723646723647],
            [0, 20 / 3, 20 / 3],
        ),
    ],
)
def test_protocols_give_the_numbers_of_the_official_script(protocol, mean, of_queries, at_k):
    """Golden: compute_map of facebookresearch/dino's utils.py on these features and truths."""
    scores = revisited_scores(QUERIES, GALLERY, TRUTH, protocol)
    assert scores.mean_average_precision == pytest.approx(mean, abs=1e-9)
    expected = torch.tensor([math.nan if value is None else value for value in [*of_queries, None]])
    torch.testing.assert_close(scores.average_precisions.float(), expected, equal_nan=True)
    assert [scores.mean_precision[k] for k in (1, 5, 10)] == pytest.approx(at_k)
    assert (scores.num_queries, scores.num_without_positives) == ((3, 2) if None in of_queries else (4, 1))


@given(seed=st.integers(0, 1000), coarse=st.booleans())
def test_equals_a_ranking_made_by_hand(seed, coarse):
    """With features of -1, 0 and 1 most similarities are tied."""
    rng = np.random.default_rng(seed)
    m, n = rng.integers(1, 6), rng.integers(2, 25)
    queries, gallery = (
        torch.tensor(rng.integers(-1, 2, (rows, 3)) if coarse else rng.normal(size=(rows, 3)), dtype=torch.float32)
        for rows in (m, n)
    )
    kinds = rng.integers(0, 4, (m, n))  # 0 positive, 1 junk
    kinds[0, 0] = 0
    positives, junk = ([np.flatnonzero(row == kind).tolist() for row in kinds] for kind in (0, 1))
    if coarse:  # equal cosines are to be equal in bits
        norms = gallery.norm(dim=1).clamp(min=1)
        gallery = gallery / torch.where(norms == 1, 1, math.inf)[:, None]
        gallery[gallery.isnan()] = 0
    (plain, trapezoid), (plain_at, revisited_at) = by_definition(queries, gallery, positives, junk)
    scores = retrieval_scores(queries, gallery, positives, junk)
    assert scores.mean_average_precision == pytest.approx(trapezoid)
    assert list(scores.mean_precision.values()) == pytest.approx(revisited_at)
    scores = retrieval_scores(queries, gallery, positives, junk, PLAIN)
    assert scores.mean_average_precision == pytest.approx(plain)
    assert list(scores.mean_precision.values()) == pytest.approx(plain_at)


def test_plain_and_micro_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(3)
    queries, gallery = torch.randn(12, 6, generator=generator), torch.randn(40, 6, generator=generator)
    relevant = torch.rand(12, 40, generator=generator) < 0.2
    relevant[4] = False
    positives = [row.nonzero()[:, 0].tolist() for row in relevant]
    similarity = torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(gallery, dim=1).T
    each = [average_precision_score(relevant[i], similarity[i]) for i in range(12) if i != 4]
    scores = retrieval_scores(queries, gallery, positives, rules=PLAIN)
    assert scores.mean_average_precision == pytest.approx(100 * np.mean(each), abs=1e-5)
    assert scores.num_without_positives == 1
    together = average_precision_score(relevant.flatten(), similarity.flatten())
    assert micro_average_precision(queries, gallery, positives) == pytest.approx(100 * together, abs=1e-5)


def test_chunks_lengths_and_precision_of_features_do_not_matter(monkeypatch):
    generator = torch.Generator().manual_seed(5)
    features, labels = torch.randn(50, 8, generator=generator), torch.arange(50) % 7
    positives = [(labels == label).nonzero()[:, 0].tolist() for label in labels]
    expected = label_scores(features, labels), micro_average_precision(features, features, positives)
    monkeypatch.setattr(retrieval, "_SIMILARITIES_PER_CHUNK", 3 * 50 + 1)
    longer = features.double() * torch.linspace(0.1, 9, 50)[:, None]
    scores = label_scores(longer, labels)
    torch.testing.assert_close(scores.average_precisions, expected[0].average_precisions)
    assert micro_average_precision(longer, longer, positives) == pytest.approx(expected[1])


def test_labels_among_the_others_and_against_a_gallery():
    features = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [-1, 0.5]])
    labels = torch.tensor([0, 0, 1, 1, 2])
    alone = label_scores(features, labels)
    assert (alone.mean_average_precision, alone.num_without_positives) == (100, 1)  # nothing is like the last one
    assert alone.mean_precision == {1: 100, 5: 100, 10: 100}
    plain = label_scores(features, labels, rules=PLAIN)
    assert plain.mean_precision == pytest.approx({1: 100, 5: 20, 10: 10})
    other = label_scores(features[:2], torch.tensor([0, 1]), features, labels, PLAIN)
    # the second: both of label 1 come behind the two of label 0
    assert other.average_precisions.tolist() == pytest.approx([100, 100 * (1 / 3 + 2 / 4) / 2])
    instances = [[1], [0], [3], [2], []]
    listed = retrieval_scores(features, features, instances, [[i] for i in range(5)])
    assert listed.average_precisions[:4].tolist() == alone.average_precisions[:4].tolist()


def test_features_that_are_all_alike_gain_nothing():
    """Positives rank behind: the order of the gallery says nothing."""
    same = torch.ones(10, 4)
    scores = retrieval_scores(same[:1], same, [[0]], rules=PLAIN)
    assert scores.mean_average_precision == pytest.approx(10)
    assert micro_average_precision(same[:2], same, [[0], []]) == pytest.approx(5)


@pytest.mark.parametrize("depth", [1, 2, 3, 100])
def test_depth_leaves_out_what_comes_later(depth):
    angles = torch.linspace(0, 1, 6)
    gallery = torch.stack([angles.cos(), angles.sin()], dim=1)
    scores = retrieval_scores(gallery[:1], gallery, [[0, 2, 5]], rules=RankingRules(depth=depth))
    expected = average_precision([rank for rank in (0, 2, 5) if rank < depth], 3)
    assert scores.mean_average_precision == pytest.approx(100 * expected)


def test_tiny_galleries_and_all_junk():
    one = torch.ones(1, 3)
    assert retrieval_scores(one, one, [[0]]).mean_average_precision == 100
    scores = retrieval_scores(torch.eye(2), torch.eye(2), [[1], [0]], [[0], []], PLAIN)
    assert scores.average_precisions.tolist() == [100, 50]  # without its junk the first finds at once
    with pytest.raises(ValueError, match="no query has one"):
        retrieval_scores(torch.eye(2), torch.eye(2), [[], []], [[0, 1], [0, 1]])
    with pytest.raises(ValueError, match="no query has one"):
        label_scores(one, torch.tensor([0]))


def test_multi_scale_is_that_of_the_official_script_for_each_image():
    """Golden: multi_scale of facebookresearch/dino's utils.py, one image at a time, with the same stand-in network."""

    def network(images):
        return torch.cat([images.mean((2, 3)), images.amax((2, 3)), images[:, :, 0, -1]], dim=1)

    first, second = wave((1, 3, 32, 24), 0.6, 0.37), wave((1, 3, 37, 50), 0.6, 0.37)
    expected = [
        [
            *(0.00236467, -0.00207196, -0.00300087, 0.51572841, 0.52078509),
            *(0.52228522, 0.12338683, -0.34879592, -0.23048499),
        ],
        [
            *(-3.96215801e-05, 3.21323751e-05, 9.96030212e-05, 0.482861489, 0.483217776),
            *(0.483555079, -0.162485972, -0.311746448, -0.419442832),
        ],
    ]
    for images, features in zip((first, second), expected, strict=True):
        torch.testing.assert_close(multi_scale_features(network, images), torch.tensor([features]))
    batch = torch.cat([first, 3 * first.flip(3)])
    alone = torch.cat([multi_scale_features(network, image[None]) for image in batch])
    torch.testing.assert_close(multi_scale_features(network, batch), alone)
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(2))


def test_multi_scale_cuts_to_whole_patches():
    seen = []

    def network(images):
        seen.append(tuple(images.shape[2:]))
        return images.mean((2, 3))

    multi_scale_features(network, torch.ones(2, 3, 224, 160), multiple=16)
    assert seen == [(224, 160), (144, 112), (112, 80)]
    with pytest.raises(ValueError, match="must be at least 16"):
        multi_scale_features(network, torch.ones(1, 3, 24, 24), multiple=16)
    with pytest.raises(ValueError, match="scales"):
        multi_scale_features(network, torch.ones(1, 3, 24, 24), scales=())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positives": [[0], [3]]}, "positives of query 1: hold 3; must be >= 0 and < 3"),
        ({"positives": [[0], [-1]]}, "hold -1"),
        ({"positives": [[0]]}, "positives of 1 queries: must be 2"),
        ({"junk": [[], [1]]}, "query 1: has images that are both positive and junk"),
        ({"queries": torch.ones(2, 4)}, "4 and 3 features"),
        ({"queries": torch.zeros(0, 3)}, "queries"),
        ({"gallery": torch.eye(3) / 0}, "gallery: holds infinite values or NaN"),
    ],
)
def test_degenerate_input_is_an_error(changes, message):
    arguments = {"queries": torch.eye(3)[:2], "gallery": torch.eye(3), "positives": [[0], [1]]}
    with pytest.raises(ValueError, match=message):
        retrieval_scores(**(arguments | changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RankingRules(interpolation="sum"), "interpolation = sum: must be one of trapezoid, plain"),
        (lambda: RankingRules(precision="sum"), "precision = sum"),
        (lambda: RankingRules(ks=(0,)), "ks = 0"),
        (lambda: RankingRules(depth=0), "depth = 0"),
        (lambda: average_precision([0, 1], 1), "num_positives = 1"),
        (lambda: average_precision([0, 0], 3), "each once"),
        (lambda: revisited_scores(QUERIES, GALLERY, TRUTH, "medum"), "protocol = medum: must be one of easy"),
        (lambda: label_scores(QUERIES, torch.zeros(4)), r"labels \[4\] of queries"),
        (lambda: label_scores(QUERIES, torch.zeros(5), GALLERY), "must both be given"),
        (lambda: micro_average_precision(QUERIES, GALLERY, [[]] * 5), "no query has one"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
