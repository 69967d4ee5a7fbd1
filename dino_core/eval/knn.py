"""Weighted k-nearest-neighbour classification of frozen features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SIMILARITIES_PER_CHUNK = 2**25
"""Bounds the memory of one chunk of queries (128 MiB of fp32)."""


@torch.no_grad()
def knn_accuracy(
    gallery: Tensor,
    gallery_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of queries whose class wins the vote of their `k` nearest gallery features, in per cent.

    ::

        similarity = cosine(query, gallery)
        vote of each of the k nearest = exp(similarity / temperature), for its class

    Args:
        gallery: [n, D]; normalised here, computed in fp32.
        gallery_labels: [n], integers >= 0.
        queries: [m, D].
        query_labels: [m], integers >= 0; a class that is not in the gallery counts as wrong.
        k: <= n.
        temperature: > 0.

    Source: DINO (arXiv 2104.14294), section 4.1; Wu et al. (arXiv 1805.01978), section 3.4.

    Raises:
        ValueError: empty or mismatched inputs, features that are not finite, k or temperature out of range.
    """
    _check(gallery, gallery_labels, queries, query_labels, k, temperature)
    gallery = F.normalize(gallery.float(), dim=1)
    queries = F.normalize(queries.to(gallery.device).float(), dim=1)
    gallery_labels = gallery_labels.to(gallery.device, torch.int64)
    query_labels = query_labels.to(gallery.device, torch.int64)
    num_classes = int(gallery_labels.max()) + 1
    chunk = max(1, _SIMILARITIES_PER_CHUNK // max(len(gallery), num_classes))
    correct = torch.zeros((), dtype=torch.int64, device=gallery.device)
    for rows, labels in zip(queries.split(chunk), query_labels.split(chunk), strict=True):
        similarity, nearest = (rows @ gallery.T).topk(k, dim=1)  # [c, k], the most similar first
        votes = ((similarity - similarity[:, :1]) / temperature).exp()  # the common factor leaves the winner as it is
        ballots = votes.new_zeros(len(rows), num_classes)
        ballots.scatter_add_(1, gallery_labels[nearest], votes)
        correct += (ballots.argmax(dim=1) == labels).sum()
    return 100.0 * int(correct) / len(queries)


def _check(
    gallery: Tensor, gallery_labels: Tensor, queries: Tensor, query_labels: Tensor, k: int, temperature: float
) -> None:
    for name, features, labels in (("gallery", gallery, gallery_labels), ("queries", queries, query_labels)):
        if features.dim() != 2 or len(features) == 0:
            raise ValueError(f"{name} {list(features.shape)}: must be [n, D] with n >= 1")
        if labels.shape != features.shape[:1]:
            raise ValueError(f"labels {list(labels.shape)} of {name} {list(features.shape)}: must be one per row")
        if not torch.isfinite(features).all():
            raise ValueError(f"{name}: holds infinite values or NaN; must be finite")
        if labels.min() < 0:
            raise ValueError(f"labels of {name}: hold {int(labels.min())}; must be >= 0")
    if gallery.shape[1] != queries.shape[1]:
        raise ValueError(f"gallery and queries of {gallery.shape[1]} and {queries.shape[1]} features: must be as many")
    if not 1 <= k <= len(gallery):
        raise ValueError(f"k = {k}: must be >= 1 and <= {len(gallery)}, the number of gallery features")
    if temperature <= 0:
        raise ValueError(f"temperature = {temperature}: must be > 0")
