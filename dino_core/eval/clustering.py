"""Clusters of frozen features, how they agree with classes, and maps of features in the plane.

Axes: n images, D features, k clusters, C classes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.manifold import TSNE
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """How clusters and classes of the same images agree."""

    accuracy: float
    """Per cent of the images whose cluster is matched with their class, by the matching one to one for which that is
    most; a cluster that is left over counts as wrong."""
    purity: float
    """Per cent of the images that are of the most frequent class of their cluster. It grows with the clusters' number:
    100 where each image is a cluster."""
    nmi: float
    """Mutual information over the mean of both entropies, 0 to 1; 1 where both are of one part."""
    ari: float
    """Rand index adjusted for chance (Hubert and Arabie, 1985): 1 for the same parts, about 0 for parts by chance."""


def kmeans(
    features: Tensor, num_clusters: int, *, num_starts: int = 10, seed: int = 0, normalise: bool = True
) -> Tensor:
    """The cluster of each of features [n, D], int64 [n], by Lloyd's algorithm from k-means++ (scikit-learn).

    Of features that are all the same there is one cluster, whatever was asked for.

    Args:
        num_clusters: 1 to n.
        num_starts: Runs with other first centres, of which the one of the least sum of squares counts.
        normalise: Take features of length 1, whose squared distance is 2 - 2 cosine.

    Raises:
        ValueError: no features, not finite, or counts out of range.
    """
    _check(features)
    if not 1 <= num_clusters <= len(features):
        raise ValueError(f"num_clusters = {num_clusters}: must be >= 1 and <= {len(features)}, the number of features")
    if num_starts < 1:
        raise ValueError(f"num_starts = {num_starts}: must be >= 1")
    rows = features.cpu().float()
    rows = F.normalize(rows, dim=1) if normalise else rows
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different features than clusters
        found = KMeans(num_clusters, n_init=num_starts, random_state=seed).fit_predict(rows.numpy())
    return torch.from_numpy(found.astype(np.int64)).to(features.device)


def agreement(clusters: Tensor, labels: Tensor) -> Agreement:
    """How clusters [n] and labels [n], integers of any kind, agree.

    Source of the accuracy: Xie et al. (arXiv 1511.06335), section 4.2; the matching is the Hungarian algorithm's.

    Raises:
        ValueError: empty, or not as many of each.
    """
    if clusters.dim() != 1 or clusters.shape != labels.shape or len(labels) == 0:
        raise ValueError(f"clusters {list(clusters.shape)}, labels {list(labels.shape)}: must be [n] with n >= 1")
    found, truth = clusters.cpu(), labels.cpu()
    counts = contingency(found, truth).numpy()
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return Agreement(
        accuracy=100 * float(counts[rows, columns].sum()) / len(truth),
        purity=100 * float(counts.max(axis=1).sum()) / len(truth),
        nmi=float(normalized_mutual_info_score(truth.numpy(), found.numpy())),
        ari=float(adjusted_rand_score(truth.numpy(), found.numpy())),
    )


def contingency(clusters: Tensor, labels: Tensor) -> Tensor:
    """Images of each cluster and class, int64 [k, C], both in ascending order of the numbers that there are."""
    (first, rows), (second, columns) = (values.unique(return_inverse=True) for values in (clusters, labels))
    return torch.bincount(rows * len(second) + columns, minlength=len(first) * len(second)).view(len(first), -1)


def class_means(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each class's features, fp32 [C, D], and the classes [C], ascending."""
    _check(features)
    classes, places = labels.unique(return_inverse=True)
    sums = features.new_zeros(len(classes), features.shape[1], dtype=torch.float32).index_add_(
        0, places, features.float()
    )
    return sums / torch.bincount(places)[:, None], classes


def plane(
    features: Tensor,
    method: Literal["pca", "tsne"],
    *,
    pca_first: int = 30,
    perplexity: float = 20.0,
    learning_rate: float = 200.0,
    num_steps: int = 5000,
    seed: int = 0,
) -> NDArray[np.float64]:
    """A map of features [n, D] in the plane, [n, 2].

    By principal components, which keep distances along the two widest directions, or by t-SNE (van der Maaten and
    Hinton, 2008), in which only who is near whom means something. The defaults of t-SNE are those by which DINO's
    appendix (arXiv 2104.14294) maps ImageNet's class means.

    Args:
        pca_first: t-SNE starts from so many principal components, or fewer where n or D is smaller.
        perplexity: About how many neighbours each point keeps; at most (n - 1) / 3 is used.
        learning_rate, num_steps: Of t-SNE.
        seed: Of t-SNE, which begins at the first two components, and of approximate principal components.

    Raises:
        ValueError: no features, or not finite.
    """
    _check(features)
    rows = features.cpu().double().numpy()
    num = len(rows)
    if (rows == rows[0]).all():
        return np.zeros((num, 2))
    size = min(pca_first if method == "tsne" else 2, *rows.shape)
    reduced = PCA(size, random_state=seed).fit_transform(rows)
    if size < 2:
        reduced = np.column_stack([reduced, np.zeros(num)])
    if method == "pca" or num < 4:  # three points or fewer have no near and far
        return np.asarray(reduced[:, :2], dtype=np.float64)
    found = TSNE(
        perplexity=min(perplexity, (num - 1) / 3),
        learning_rate=learning_rate,
        max_iter=num_steps,
        init="pca",
        random_state=seed,
    ).fit_transform(reduced.astype(np.float32))
    return np.asarray(found, dtype=np.float64)


def _check(features: Tensor) -> None:
    if features.dim() != 2 or features.numel() == 0:
        raise ValueError(f"features {list(features.shape)}: must be [n, D] with n >= 1")
    if not all(extreme.isfinite() for extreme in features.aminmax()):
        raise ValueError("features: hold infinite values or NaN; must be finite")
