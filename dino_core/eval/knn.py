"""Weighted k-nearest-neighbour classification of frozen features.

Axes: n gallery features, m queries, D features, k neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from dino_core.eval.neighbours import check_features, nearest_neighbours

_BALLOTS = 2**24
"""Bounds the memory of the votes of some queries for all classes (64 MiB of fp32)."""


def knn_accuracy(
    gallery: Tensor,
    gallery_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of queries whose class wins the vote of their `k` nearest gallery features, in per cent.

    `knn_accuracies` for one k, which must be <= n.
    """
    return knn_accuracies(gallery, gallery_labels, queries, query_labels, (k,), temperature)[k]


@torch.no_grad()
def knn_accuracies(
    gallery: Tensor,
    gallery_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    *,
    large_k: Literal["refuse", "clamp"] = "refuse",
    search: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] = nearest_neighbours,
) -> dict[int, float]:
    """Share of queries whose class wins the vote of their k nearest gallery features, in per cent, for each k.

    ::

        similarity = cosine(query, gallery)
        vote of each of the k nearest = exp(similarity / temperature), for its class

    Neighbours are searched once for all k, and gallery and queries may have any size. Of equally similar neighbours the
    first in the gallery count, of equal votes the smallest label wins.

    Args:
        gallery: [n, D]; normalised here, computed in fp32.
        gallery_labels: [n], integers >= 0.
        queries: [m, D].
        query_labels: [m], integers >= 0; a class that is not in the gallery counts as wrong.
        ks: each >= 1.
        temperature: > 0.
        large_k: What a k > n is: an error, or the vote of all n.
        search: What finds neighbours, called with gallery, queries and k: `nearest_neighbours`, which says what memory
            it needs, or `faiss_neighbours` with its options bound.

    Source: DINO (arXiv 2104.14294), section 4.1; Wu et al. (arXiv 1805.01978), section 3.4. The authors' script fails
    below 100 queries and at k > n.

    Raises:
        ValueError: empty or mismatched inputs, features that are not finite, k or temperature out of range.
    """
    for name, features, labels in (("gallery", gallery, gallery_labels), ("queries", queries, query_labels)):
        if labels.shape != features.shape[:1]:
            raise ValueError(f"labels {list(labels.shape)} of {name} {list(features.shape)}: must be one per row")
        if len(labels) and labels.min() < 0:
            raise ValueError(f"labels of {name}: hold {int(labels.min())}; must be >= 0")
    if not ks:
        raise ValueError("ks: must hold at least one k")
    if temperature <= 0:
        raise ValueError(f"temperature = {temperature}: must be > 0")
    used = {k: min(k, max(1, len(gallery))) if large_k == "clamp" else k for k in ks}
    for extreme in (min(used.values()), max(used.values())):
        check_features(gallery, queries, extreme)
    similarities, places = search(gallery, queries, max(used.values()))
    classes, inverse = gallery_labels.to(places.device, torch.int64).unique(return_inverse=True)
    truth = query_labels.to(places.device, torch.int64)
    correct = dict.fromkeys(used.values(), 0)
    chunk = max(1, _BALLOTS // len(classes))
    for start in range(0, len(places), chunk):
        part = slice(start, start + chunk)
        for k, winner in _winners(
            similarities[part], inverse[places[part]], sorted(correct), temperature, len(classes)
        ):
            found = similarities[part, 0] > -torch.inf  # a search by Faiss may find nothing
            correct[k] += int(((classes[winner] == truth[part]) & found).sum())
    return {k: 100.0 * correct[used[k]] / len(truth) for k in ks}


def _winners(
    similarities: Tensor, labels: Tensor, ks: Sequence[int], temperature: float, num_classes: int
) -> list[tuple[int, Tensor]]:
    """For each k, ascending, the class [c] that most of the first k of the votes [c, k] are for."""
    # A factor that all votes of a query share leaves the winner as it is.
    weights = ((similarities - similarities[:, :1].clamp(min=-2.0)) / temperature).exp()
    ballots = weights.new_zeros(len(weights), num_classes)
    winners = []
    for first, k in zip([0, *ks], ks, strict=False):
        ballots.scatter_add_(1, labels[:, first:k], weights[:, first:k])
        winners.append((k, ballots.argmax(dim=1)))
    return winners
