from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from dino_core.eval import agreement, class_means, kmeans, plane
from dino_core.eval.clustering import contingency


def blobs(num=90, seed=0, spread=0.3):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (num,), generator=generator)
    return torch.eye(3, 8)[labels] + spread * torch.randn(num, 8, generator=generator), labels


def by_definition(clusters, labels):
    """Accuracy by trying every matching, NMI by entropies, ARI by counting pairs."""
    clusters, labels = clusters.tolist(), labels.tolist()
    names, classes = sorted(set(clusters)), sorted(set(labels))
    padded = classes + [None] * max(0, len(names) - len(classes))
    accuracy = max(
        sum(dict(zip(names, chosen, strict=True))[c] == y for c, y in zip(clusters, labels, strict=True))
        for chosen in itertools.permutations(padded, len(names))
    )
    num = len(labels)

    def entropy(values):
        return -sum(values.count(v) / num * math.log(values.count(v) / num) for v in set(values))

    both = list(zip(clusters, labels, strict=True))
    mutual, mean = entropy(clusters) + entropy(labels) - entropy(both), (entropy(clusters) + entropy(labels)) / 2
    pairs = list(itertools.combinations(range(num), 2))
    a, b = ([v[i] == v[j] for i, j in pairs] for v in (clusters, labels))
    together, expected = sum(x and y for x, y in zip(a, b, strict=True)), sum(a) * sum(b) / len(pairs)
    most = (sum(a) + sum(b)) / 2
    return 100 * accuracy / num, mutual / mean if mean else 1.0, (together - expected) / (most - expected)


@pytest.mark.parametrize(("num_clusters", "num_classes"), [(3, 3), (5, 3), (2, 4), (1, 3)])
def test_agreement_equals_the_definitions(num_clusters, num_classes):
    generator = torch.Generator().manual_seed(num_clusters)
    clusters = torch.randint(num_clusters, (40,), generator=generator) * 3
    labels = torch.where(torch.rand(40, generator=generator) < 0.4, clusters // 3 % num_classes, 0) + 7
    labels[:num_classes] = torch.arange(num_classes) + 7
    found = agreement(clusters, labels)
    accuracy, nmi, ari = by_definition(clusters, labels)
    assert found.accuracy == pytest.approx(accuracy)
    assert found.nmi == pytest.approx(nmi, abs=1e-9)
    assert found.ari == pytest.approx(ari, abs=1e-9)
    assert found.purity >= found.accuracy
    assert contingency(clusters, labels).sum() == 40


def test_agreement_at_its_ends():
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    same = agreement(5 - labels, labels)
    assert (same.accuracy, same.purity, same.nmi, same.ari) == pytest.approx((100, 100, 1, 1))
    each = agreement(torch.arange(6), labels)
    assert (each.accuracy, each.purity) == (50, 100)
    one = agreement(torch.zeros(6), torch.zeros(6))
    assert (one.accuracy, one.nmi, one.ari) == (100, 1, 1)
    assert agreement(torch.tensor([3]), torch.tensor([8])).accuracy == 100


def test_kmeans_finds_blobs_and_is_scikit_learns():
    from sklearn.cluster import KMeans

    features, labels = blobs()
    clusters = kmeans(features, 3, seed=1)
    assert agreement(clusters, labels).accuracy > 95
    unit = torch.nn.functional.normalize(features, dim=1).numpy()
    assert clusters.tolist() == KMeans(3, n_init=10, random_state=1).fit_predict(unit).tolist()
    scaled = features * torch.linspace(0.1, 9, 90)[:, None]
    assert agreement(kmeans(scaled, 3), clusters).accuracy == 100
    assert agreement(kmeans(scaled, 3, normalise=False), clusters).accuracy < 100


def test_kmeans_by_lloyds_steps():
    """Its clusters are a fixed point: each feature is in that of the nearest mean."""
    features, _ = blobs(spread=0.8)
    clusters = kmeans(features, 4, normalise=False)
    means, _ = class_means(features, clusters)
    assert torch.equal(torch.cdist(features, means).argmin(dim=1), clusters.unique(return_inverse=True)[1])


def test_kmeans_at_its_ends():
    assert kmeans(torch.ones(4, 3), 3).unique().tolist() == [0]
    assert kmeans(torch.ones(1, 3), 1).tolist() == [0]
    assert sorted(kmeans(torch.eye(4), 4).tolist()) == [0, 1, 2, 3]
    for arguments, message in (
        ((torch.eye(3), 4), "num_clusters = 4: must be >= 1 and <= 3"),
        ((torch.eye(3), 0), "num_clusters = 0"),
        ((torch.eye(3) / 0, 2), "infinite values or NaN"),
        ((torch.zeros(0, 3), 1), r"features \[0, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            kmeans(*arguments)
    with pytest.raises(ValueError, match="num_starts = 0"):
        kmeans(torch.eye(3), 2, num_starts=0)
    with pytest.raises(ValueError, match=r"clusters \[2\], labels \[3\]"):
        agreement(torch.zeros(2), torch.zeros(3))


def test_class_means():
    means, classes = class_means(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([9, 2, 9]))
    assert classes.tolist() == [2, 9]
    assert means.tolist() == [[3, 4], [3, 4]]


def test_maps_in_the_plane():
    features, labels = blobs(60, spread=0.1)
    principal = plane(features, "pca")
    centred = (features - features.mean(dim=0)).double()
    singular = torch.linalg.svdvals(centred)[:2]
    np.testing.assert_allclose(np.sqrt((principal**2).sum(axis=0)), singular.numpy(), rtol=1e-6)
    found = plane(features, "tsne", perplexity=8, learning_rate=20, num_steps=300)
    assert found.shape == (60, 2)
    distances = torch.cdist(torch.from_numpy(found), torch.from_numpy(found)).fill_diagonal_(math.inf)
    assert (labels[distances.argmin(dim=1)] == labels).double().mean() > 0.95
    assert np.array_equal(found, plane(features, "tsne", perplexity=8, learning_rate=20, num_steps=300))


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_maps_of_few_points(num, method):
    assert plane(torch.eye(5)[:num], method, num_steps=250).shape == (num, 2)
    assert np.isfinite(plane(torch.ones(num, 1), method, num_steps=250)).all()
