from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_core.eval import knn, knn_accuracies, knn_accuracy


def blobs(num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four directions with noise, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (num,), generator=generator)
    return torch.eye(4, 16)[labels] + 0.4 * torch.randn(num, 16, generator=generator), labels


def by_definition(gallery, gallery_labels, queries, query_labels, k, temperature):
    correct = 0
    for query, label in zip(queries, query_labels.tolist(), strict=True):
        similarity = torch.nn.functional.cosine_similarity(query[None], gallery)
        votes: dict[int, float] = {}
        for index in similarity.argsort(descending=True)[:k].tolist():
            name = int(gallery_labels[index])
            votes[name] = votes.get(name, 0.0) + float((similarity[index].double() / temperature).exp())
        correct += max(votes, key=lambda name: votes[name]) == label
    return 100 * correct / len(queries)


@given(seed=st.integers(0, 100), k=st.integers(1, 40), temperature=st.floats(0.02, 2))
@settings(deadline=None, max_examples=25)
def test_equals_the_definition(seed, k, temperature):
    gallery, queries = blobs(40, seed), blobs(25, seed + 1000)
    expected = by_definition(*gallery, *queries, k, temperature)
    assert knn_accuracy(*gallery, *queries, k=k, temperature=temperature) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("temperature", "official"),
    [
        (0.07, {10: 93.33333333333333, 20: 93.66666666666667, 100: 93.66666666666667, 200: 93.66666666666667}),
        (1.0, {10: 93.0, 20: 93.0, 100: 91.33333333333333, 200: 91.0}),
    ],
)
def test_values_of_the_authors_script(temperature, official):
    """`knn_classifier` of DINO's eval_knn.py (7c446df), run on these features at length 1."""
    found = knn_accuracies(*blobs(600, 0), *blobs(300, 1), tuple(official), temperature)
    assert found == pytest.approx(official)


def test_the_nearest_outvotes_the_many_only_at_low_temperature():
    gallery = torch.tensor([[1.0, 0.0], [0.9, 0.5], [0.9, 0.5]])
    labels, query, truth = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert knn_accuracy(gallery, labels, query, truth, k=3, temperature=0.07) == 100
    assert knn_accuracy(gallery, labels, query, truth, k=3, temperature=10) == 0


def test_few_queries_unknown_classes_and_tiny_temperatures_are_fine():
    gallery, labels = torch.eye(3), torch.tensor([0, 1, 2])
    queries, truth = torch.eye(3), torch.tensor([0, 1, 9])
    assert knn_accuracy(gallery, labels, queries, truth, k=2, temperature=1e-4) == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 4}, "k = 4: must be >= 1 and <= 3"),
        ({"k": 0}, "k = 0"),
        ({"temperature": 0.0}, r"temperature = 0.0"),
        ({"queries": torch.eye(4)[:3]}, "3 and 4 features"),
        ({"queries": torch.zeros(0, 3), "query_labels": torch.zeros(0, dtype=torch.long)}, "queries"),
        ({"gallery_labels": torch.tensor([0, 1])}, r"labels \[2\] of gallery"),
        ({"query_labels": torch.tensor([0, 1, -1])}, "labels of queries: hold -1"),
        ({"gallery": torch.eye(3) / 0}, "gallery: holds infinite values or NaN"),
    ],
)
def test_degenerate_input_is_an_error(changes, message):
    labels = torch.tensor([0, 1, 2])
    arguments = {"gallery": torch.eye(3), "gallery_labels": labels, "queries": torch.eye(3), "query_labels": labels}
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**({"k": 1} | arguments | changes))


def test_several_k_at_once_are_those_of_one_each():
    gallery, queries = blobs(60, 0), blobs(50, 1)
    found = knn_accuracies(*gallery, *queries, ks=(20, 1, 7))
    assert found == {k: knn_accuracy(*gallery, *queries, k=k) for k in (20, 1, 7)}
    assert 50 < found[20] < 100


def test_a_k_beyond_the_gallery_is_refused_or_means_all_of_it():
    gallery, queries = blobs(6, 0), blobs(30, 1)
    with pytest.raises(ValueError, match=r"k = 7: must be >= 1 and <= 6"):
        knn_accuracies(*gallery, *queries, ks=(3, 7))
    found = knn_accuracies(*gallery, *queries, ks=(3, 6, 7, 200), large_k="clamp")
    assert found[6] == found[7] == found[200]
    assert list(found) == [3, 6, 7, 200]


@pytest.mark.parametrize("k", [1, 5, 20, 60])
def test_scikit_learn_agrees(k):
    """Exactly: its weights are a function of distances, here 1 - cosine."""
    from sklearn.neighbors import KNeighborsClassifier

    (gallery, labels), (queries, truth) = blobs(60, 3), blobs(400, 4)
    labels = labels * 5 + 2  # not every number is a class
    theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    theirs.fit(gallery.numpy(), labels.numpy())
    expected = 100 * theirs.score(queries.numpy(), truth.numpy() * 5 + 2)
    assert knn_accuracy(gallery, labels, queries, truth * 5 + 2, k=k) == pytest.approx(expected, abs=1e-9)


def test_one_class_and_one_image_of_each_are_enough():
    gallery, queries = torch.randn(5, 3), torch.randn(4, 3)
    assert knn_accuracy(gallery, torch.full((5,), 7), queries, torch.tensor([7, 7, 7, 0]), k=5) == 75
    assert knn_accuracy(torch.eye(3)[:1], torch.tensor([2]), torch.eye(3)[:1], torch.tensor([2]), k=1) == 100


def test_equal_votes_go_to_the_smallest_label_and_equal_neighbours_to_the_first():
    gallery, query, truth = torch.eye(2)[[0, 0, 0, 1]], torch.eye(2)[:1], torch.tensor([3])
    assert knn_accuracy(gallery, torch.tensor([5, 3, 5, 3]), query, truth, k=2) == 100  # a tie of 5 and 3
    assert knn_accuracy(gallery, torch.tensor([5, 3, 3, 3]), query, truth, k=1) == 0
    assert knn_accuracy(gallery, torch.tensor([3, 5, 5, 3]), query, truth, k=1) == 100


def test_votes_in_chunks(monkeypatch):
    gallery, queries = blobs(60, 0), blobs(50, 1)
    expected = knn_accuracies(*gallery, *queries, ks=(3, 20))
    monkeypatch.setattr(knn, "_BALLOTS", 28)  # 7 queries at once
    assert knn_accuracies(*gallery, *queries, ks=(3, 20)) == expected


def test_a_query_for_which_nothing_was_found_is_wrong():
    gallery, queries = blobs(10, 0), blobs(3, 1)

    def nothing(gallery, queries, k):
        return torch.full((3, k), -torch.inf), torch.full((3, k), -1)

    assert knn_accuracies(*gallery, *queries, ks=(2,), search=nothing) == {2: 0}
