"""Retrieval by frozen features: average precision and precision at k of galleries ranked by cosine.

What papers define differently is an argument with a name, and scores tell how many queries count. One rule is the same
everywhere: a positive ranks behind all negatives of the same similarity, so that features that are all alike gain
nothing from the order of the gallery.

Axes: m queries, n gallery images, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Interpolation = Literal["trapezoid", "plain"]
"""Area under precision over recall: see `average_precision`."""

PrecisionRule = Literal["revisited", "plain"]
"""Precision at k: see `RankingRules`."""

Protocol = Literal["easy", "medium", "hard"]

PROTOCOLS: Mapping[Protocol, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
"""Which images are positive and which are junk, left out of the ranking (arXiv 1803.11285, section 3.2)."""

SCALES = (1.0, 2**-0.5, 0.5)
"""Of the multi-scale features of DINO's evaluation."""

_SIMILARITIES_PER_CHUNK = 2**22
"""Bounds the memory of one chunk of queries (about 150 MiB, most of it keys and indices of the sort)."""


@dataclass(frozen=True, kw_only=True)
class RankingRules:
    """How ranks become scores."""

    interpolation: Interpolation = "trapezoid"
    """See `average_precision`."""
    precision: PrecisionRule = "revisited"
    """Positives among the first k over k ("plain"); "revisited" takes for k the rank of the last positive where that is
    smaller, so that a query with fewer than k positives can reach 100."""
    ks: tuple[int, ...] = (1, 5, 10)
    """For the precision at k."""
    depth: int | None = None
    """Only the first `depth` of a ranking count, a positive behind them is not found; None for all. DINO's copy
    detection takes 20."""

    def __post_init__(self) -> None:
        _check_choice("interpolation", self.interpolation, ("trapezoid", "plain"))
        _check_choice("precision", self.precision, ("revisited", "plain"))
        for name, value in (*(("ks", k) for k in self.ks), ("depth", self.depth)):
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be >= 1")


@dataclass(frozen=True, kw_only=True)
class RetrievalScores:
    """Means over the queries that have a positive, in per cent."""

    mean_average_precision: float
    mean_precision: dict[int, float]
    """By k."""
    average_precisions: Tensor
    """[m], float64, per cent; NaN where a query has no positive."""

    @property
    def num_queries(self) -> int:
        """Queries with a positive."""
        return len(self.average_precisions) - self.num_without_positives

    @property
    def num_without_positives(self) -> int:
        """Queries left out."""
        return int(self.average_precisions.isnan().sum())


@dataclass(frozen=True, kw_only=True)
class RevisitedQuery:
    """Ground truth of one query in the revisited Oxford and Paris sets: numbers of gallery images from 0."""

    easy: Sequence[int]
    hard: Sequence[int]
    junk: Sequence[int]


def average_precision(
    ranks: Sequence[int] | Tensor, num_positives: int, interpolation: Interpolation = "trapezoid"
) -> float:
    """Of one ranking, 0 to 1.

    ::

        r_j = rank of the j-th positive that was found, from 0; j from 0
        after_j = (j + 1) / (r_j + 1),  before_j = j / r_j, or 1 where r_j = 0
        plain = sum after_j / num_positives
        trapezoid = sum (before_j + after_j) / 2 / num_positives

    The trapezoid is that of the Holidays, Oxford and Paris sets and of DINO's evaluations; "plain" that of
    scikit-learn. A single positive at rank r > 0 has 1 / (r + 1) by the plain one and half of it by the trapezoid.

    Args:
        ranks: of the positives that were found, in any order; junk does not count.
        num_positives: all that there are, found or not; >= 1.

    Raises:
        ValueError: no positives, more ranks than positives, ranks below 0 or twice.
    """
    found = torch.as_tensor(ranks, dtype=torch.int64).sort().values
    if num_positives < 1 or len(found) > num_positives:
        raise ValueError(f"num_positives = {num_positives}: must be >= 1 and >= {len(found)}, the number of ranks")
    if len(found) and (found[0] < 0 or (found.diff() == 0).any()):
        raise ValueError(f"ranks {found.tolist()}: must be >= 0, each once")
    _check_choice("interpolation", interpolation, ("trapezoid", "plain"))
    return float(_areas(found, torch.arange(len(found)), interpolation).sum()) / num_positives


def retrieval_scores(
    queries: Tensor,
    gallery: Tensor,
    positives: Sequence[Sequence[int]],
    junk: Sequence[Sequence[int]] | None = None,
    rules: RankingRules | None = None,
) -> RetrievalScores:
    """Scores of queries whose positives are listed.

    Args:
        queries: [m, D]; normalised here, computed in fp32.
        gallery: [n, D].
        positives: of each query, numbers of gallery images from 0; a query with none is left out and counted.
        junk: of each query, gallery images that are neither right nor wrong and are taken out of its ranking.

    Raises:
        ValueError: empty or mismatched inputs, features that are not finite, numbers that are not in the gallery,
            an image that is both positive and junk, or no query with a positive.
    """
    queries, gallery = _normalised(queries, gallery)
    junk = [()] * len(queries) if junk is None else junk
    marks = {
        name: _flat_numbers(name, lists, len(queries), len(gallery))
        for name, lists in (("positives", positives), ("junk", junk))
    }

    def relevance(first: int, last: int) -> tuple[Tensor, Tensor]:
        wanted, ignored = (_mask(*marks[name], first, last, gallery) for name in ("positives", "junk"))
        both = (wanted & ignored).any(dim=1)
        if both.any():
            raise ValueError(f"query {first + int(both.int().argmax())}: has images that are both positive and junk")
        return wanted, ignored

    return _scores(queries, gallery, relevance, rules or RankingRules())


def revisited_scores(
    queries: Tensor,
    gallery: Tensor,
    truth: Sequence[RevisitedQuery],
    protocol: Protocol,
    rules: RankingRules | None = None,
) -> RetrievalScores:
    """Scores by the easy, medium or hard protocol of revisited Oxford and Paris.

    Args:
        queries: [m, D].
        gallery: [n, D].
        truth: of each query.

    Source: Revisiting Oxford and Paris (arXiv 1803.11285), section 3.

    Raises:
        ValueError: as `retrieval_scores`, or an unknown protocol.
    """
    _check_choice("protocol", protocol, tuple(PROTOCOLS))
    positive, junk = (
        [[number for name in names for number in getattr(query, name)] for query in truth]
        for names in PROTOCOLS[protocol]
    )
    return retrieval_scores(queries, gallery, positive, junk, rules)


def label_scores(
    queries: Tensor,
    query_labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    rules: RankingRules | None = None,
) -> RetrievalScores:
    """Scores of labelled images: all of the same label, of class or instance, are positive.

    Args:
        queries: [m, D].
        query_labels: [m], integers.
        gallery: [n, D]; without it each query is searched among the other queries.
        gallery_labels: [n], integers.

    Raises:
        ValueError: as `retrieval_scores`, or labels that are not one per row.
    """
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("gallery and gallery_labels: must both be given, or none of them")
    among_others = gallery is None
    if gallery is None or gallery_labels is None:
        gallery, gallery_labels = queries, query_labels
    for name, rows, labels in (("queries", queries, query_labels), ("gallery", gallery, gallery_labels)):
        if labels.shape != rows.shape[:1]:
            raise ValueError(f"labels {list(labels.shape)} of {name} {list(rows.shape)}: must be one per row")
    queries, gallery = _normalised(queries, gallery)
    wanted_label, label = query_labels.to(gallery.device)[:, None], gallery_labels.to(gallery.device)

    def relevance(first: int, last: int) -> tuple[Tensor, Tensor]:
        positive = wanted_label[first:last] == label
        junk = torch.zeros_like(positive)
        if among_others:
            junk.diagonal(offset=first).fill_(True)
            positive.diagonal(offset=first).fill_(False)
        return positive, junk

    return _scores(queries, gallery, relevance, rules or RankingRules())


@torch.no_grad()
def micro_average_precision(
    queries: Tensor,
    gallery: Tensor,
    positives: Sequence[Sequence[int]],
    interpolation: Interpolation = "plain",
) -> float:
    """Average precision of all m n pairs in one ranking, in per cent: one threshold must serve for all queries.

    Queries without positives belong to it, as pairs that must rank low.

    Args:
        queries: [m, D].
        gallery: [n, D].
        positives: of each query, numbers of gallery images from 0.

    Source: Image Similarity Challenge (arXiv 2106.09672), section 4, of all pairs.

    Raises:
        ValueError: as `retrieval_scores`.
    """
    queries, gallery = _normalised(queries, gallery)
    rows, numbers = _flat_numbers("positives", positives, len(queries), len(gallery))
    if not len(rows):
        raise ValueError("positives: no query has one")
    _check_choice("interpolation", interpolation, ("trapezoid", "plain"))

    def relevance(first: int, last: int) -> tuple[Tensor]:
        return (_mask(rows, numbers, first, last, gallery),)

    right = torch.cat([similarity[positive] for similarity, positive in _similarities(queries, gallery, relevance)])
    right = right.sort().values  # [p], the least similar first
    # places[i]: how many negatives reach i of the positives, the least similar ones, and no more
    places = torch.zeros(len(right) + 1, dtype=torch.int64, device=right.device)
    for similarity, positive in _similarities(queries, gallery, relevance):
        reached = torch.searchsorted(right, similarity[~positive], right=True)
        places += torch.bincount(reached, minlength=len(places))
    negatives_above = places.flip(0).cumsum(0)[:-1]  # [p], of the most similar positive first
    order = torch.arange(len(right), device=right.device)
    return 100 * float(_areas((negatives_above + order).cpu(), order.cpu(), interpolation).sum()) / len(right)


@torch.no_grad()
def multi_scale_features(
    backbone: Callable[[Tensor], Tensor], images: Tensor, scales: Sequence[float] = SCALES, multiple: int = 1
) -> Tensor:
    """Features [B, D] of images at several sizes: their mean, normalised to length 1 for each image.

    Smaller images are made by bilinear interpolation without smoothing, as in DINO's evaluation; there the norm is that
    of the whole batch, which is right for a batch of one only.

    Args:
        backbone: turns images [B, 3, H, W] into features [B, D].
        images: [B, 3, H, W], normalised.
        scales: > 0.
        multiple: rows and columns beyond a multiple of this are cut off at each size, as a ViT's patches do.

    Raises:
        ValueError: no scales, scales out of range, or an image that is smaller than `multiple` at one of them.
    """
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales = {list(scales)}: must be one or more, > 0")
    total: Tensor | None = None
    for scale in scales:
        pixels = images if scale == 1 else F.interpolate(images, scale_factor=scale, mode="bilinear")
        height, width = (side // multiple * multiple for side in pixels.shape[-2:])
        if not height or not width:
            raise ValueError(
                f"scale {scale:g} of images {list(images.shape)}: gives {list(pixels.shape[-2:])} pixels, "
                f"must be at least {multiple}"
            )
        features = backbone(pixels[..., :height, :width]).float()
        total = features if total is None else total + features
    assert total is not None
    return F.normalize(total / len(scales), dim=1)


def _scores(
    queries: Tensor, gallery: Tensor, relevance: Callable[[int, int], tuple[Tensor, Tensor]], rules: RankingRules
) -> RetrievalScores:
    parts = [
        _ranked(similarity, positive, junk, rules)
        for similarity, positive, junk in _similarities(queries, gallery, relevance)
    ]
    areas, precisions = (torch.cat(columns) for columns in zip(*parts, strict=True))
    if areas.isnan().all():
        raise ValueError("positives: no query has one")
    return RetrievalScores(
        mean_average_precision=100 * float(areas.nanmean()),
        mean_precision={k: 100 * float(precisions[:, i].nanmean()) for i, k in enumerate(rules.ks)},
        average_precisions=100 * areas,
    )


def _ranked(similarity: Tensor, positive: Tensor, junk: Tensor, rules: RankingRules) -> tuple[Tensor, Tensor]:
    """Average precision [c] and precision at each k [c, len(ks)] of c queries, float64 on the CPU, NaN for those
    without positives.

    One sort gives ranks and relevance: the keys hold the similarity's bits in the order of falling values, then a bit
    that puts negatives before positives; junk has a key above all others.
    """
    bits = (similarity + 0.0).view(torch.int32)  # -0 becomes 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = (positive.long() - 2 * ordered.long()).masked_fill_(junk, 2**40)
    # On the CPU, NumPy's sort takes a fifth of the time of torch's, which makes indices too.
    keys = torch.from_numpy(np.sort(keys.numpy(), axis=1)) if keys.device.type == "cpu" else keys.sort(dim=1).values
    rows, ranks = (column.cpu() for column in (keys & 1 == 1).nonzero(as_tuple=True))  # by row, then by rank
    num = len(similarity)
    counts = torch.bincount(rows, minlength=num)  # [c]
    order = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    found = ranks < (similarity.shape[1] if rules.depth is None else rules.depth)
    total = torch.where(counts > 0, counts, math.nan).double()
    areas = _summed(rows[found], _areas(ranks[found], order[found], rules.interpolation), num) / total
    last = torch.zeros(num, dtype=torch.int64).scatter_reduce(0, rows, ranks + 1, "amax")
    precisions = []
    for k in rules.ks:
        hits = _summed(rows[found], (ranks[found] < k).double(), num)
        cut = last.clamp(min=1, max=k) if rules.precision == "revisited" else k
        precisions.append(torch.where(counts > 0, hits / cut, math.nan))
    return areas, torch.stack(precisions, dim=1) if precisions else areas.new_zeros(num, 0)


def _areas(ranks: Tensor, order: Tensor, interpolation: Interpolation) -> Tensor:
    """What each positive adds to `num_positives` times the average precision, float64 [p].

    Args:
        ranks: [p], of positives.
        order: [p], how many positives of the same ranking come before.
    """
    after = (order + 1).double() / (ranks + 1)
    if interpolation == "plain":
        return after
    before = torch.where(ranks > 0, order.double() / ranks.clamp(min=1), 1.0)
    return (before + after) / 2


def _summed(rows: Tensor, values: Tensor, num_rows: int) -> Tensor:
    return torch.zeros(num_rows, dtype=torch.float64).index_add_(0, rows, values)


def _similarities(
    queries: Tensor, gallery: Tensor, relevance: Callable[[int, int], tuple[Tensor, ...]]
) -> Iterator[tuple[Tensor, ...]]:
    """Chunk by chunk of the queries: their cosines to the gallery [c, n], and what `relevance` says of these."""
    chunk = max(1, _SIMILARITIES_PER_CHUNK // len(gallery))
    for first in range(0, len(queries), chunk):
        last = min(first + chunk, len(queries))
        yield queries[first:last] @ gallery.T, *relevance(first, last)


def _normalised(queries: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    for name, features in (("queries", queries), ("gallery", gallery)):
        if features.dim() != 2 or features.numel() == 0:
            raise ValueError(f"{name} {list(features.shape)}: must be [n, D] with n >= 1")
        if not torch.isfinite(features).all():
            raise ValueError(f"{name}: holds infinite values or NaN; must be finite")
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries and gallery of {queries.shape[1]} and {gallery.shape[1]} features: must be as many")
    gallery = F.normalize(gallery.float(), dim=1)
    return F.normalize(queries.to(gallery.device).float(), dim=1), gallery


def _flat_numbers(
    name: str, lists: Sequence[Sequence[int]], num_queries: int, num_gallery: int
) -> tuple[Tensor, Tensor]:
    """The query and the gallery number of each entry, both [p], by query."""
    if len(lists) != num_queries:
        raise ValueError(f"{name} of {len(lists)} queries: must be {num_queries}, the number of queries")
    rows = torch.arange(num_queries).repeat_interleave(torch.tensor([len(numbers) for numbers in lists]))
    numbers = torch.tensor([int(number) for numbers in lists for number in numbers], dtype=torch.int64)
    outside = (numbers < 0) | (numbers >= num_gallery)
    if outside.any():
        where = int(outside.int().argmax())
        raise ValueError(
            f"{name} of query {int(rows[where])}: hold {int(numbers[where])}; must be >= 0 and < {num_gallery}, "
            "the number of gallery images"
        )
    return rows, numbers


def _mask(rows: Tensor, numbers: Tensor, first: int, last: int, gallery: Tensor) -> Tensor:
    """Which gallery images are listed for the queries from `first` to before `last`: bool [last - first, n]."""
    begin, end = torch.searchsorted(rows, torch.tensor([first, last])).tolist()
    mask = torch.zeros(last - first, len(gallery), dtype=torch.bool, device=gallery.device)
    mask[(rows[begin:end] - first).to(gallery.device), numbers[begin:end].to(gallery.device)] = True
    return mask


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} = {value}: must be one of {', '.join(allowed)}")
