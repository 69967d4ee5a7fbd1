from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_core.eval import knn, knn_accuracy


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


def test_lengths_and_chunks_do_not_matter(monkeypatch):
    (gallery, labels), (queries, truth) = blobs(60, 0), blobs(50, 1)
    expected = knn_accuracy(gallery, labels, queries, truth)
    assert 50 < expected < 100
    scaled = queries * torch.linspace(0.1, 9, 50)[:, None]
    monkeypatch.setattr(knn, "_SIMILARITIES_PER_CHUNK", 7 * 60)
    assert knn_accuracy(gallery * torch.linspace(0.1, 9, 60)[:, None], labels, scaled, truth) == expected


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
