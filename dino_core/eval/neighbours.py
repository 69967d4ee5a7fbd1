"""Nearest neighbours by cosine similarity: exact in bounded memory, or by Faiss.

Axes: n gallery features, m queries, D features, k neighbours.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_SIMILARITIES = 2**27
"""Those that are kept at once, of all threads together: 512 MiB of fp32."""
_QUERIES = 1024
_GALLERY = 2**16
"""Rows of one chunk of each, at most."""
_TILE = 4096
"""Gallery rows of one matrix product. Its result is still in a CPU's cache when the maxima of groups are taken."""
_GROUP = 16
"""Gallery rows that are represented by the most similar of them at first; they lie in one cache line."""


@torch.no_grad()
def nearest_neighbours(gallery: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` gallery features that are most similar to each query, by cosine similarity in fp32.

    Above the features it needs normalised copies of the queries and of 65,536 gallery features, 12 bytes for each of
    the m * k results, and at most 600 MB for similarities, whatever the sizes; more where k is in the thousands. On a
    CPU each thread takes queries of its own: while it works, `torch.get_num_threads()` is 1 for the whole process.

    Args:
        gallery: [n, D], of any floating-point type; normalised here.
        queries: [m, D].
        k: <= n.

    Returns:
        similarities: [m, k], fp32, the largest first.
        places: [m, k], int64, in the gallery. Of equally similar features the first in the gallery come first.

    Raises:
        ValueError: empty or mismatched inputs, features that are not finite, k out of range.
    """
    check_features(gallery, queries, k)
    queries = F.normalize(queries.to(gallery.device).float(), dim=1)
    similarities = queries.new_empty(len(queries), 0)
    places = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    chunk = _even(len(gallery), _GALLERY)
    for start in range(0, len(gallery), chunk):
        rows = F.normalize(gallery[start : start + chunk].float(), dim=1)
        similarities, places = _merge(rows, queries, start, k, similarities, places)
    return similarities, places


def _merge(
    rows: Tensor, queries: Tensor, start: int, k: int, similarities: Tensor, places: Tensor
) -> tuple[Tensor, Tensor]:
    """The best [m, <= k] of what was found before and of gallery features [r, D], which begin at place `start`."""
    num = min(k, places.shape[1] + len(rows))
    merged = similarities.new_empty(len(queries), num), places.new_empty(len(queries), num)
    tile = _round_up(_even(len(rows), _TILE))
    num_tiles = -(-len(rows) // tile)
    num_threads = torch.get_num_threads() if rows.device.type == "cpu" else 1
    limit = max(1, min(_QUERIES, _SIMILARITIES // (num_threads * num_tiles * tile), -(-len(queries) // num_threads)))
    chunk = _even(len(queries), limit)
    rooms: SimpleQueue[Tensor] = SimpleQueue()
    for _ in range(num_threads):
        rooms.put(rows.new_empty(num_tiles * chunk * tile))

    def search(at: int) -> None:
        part = slice(at, at + chunk)
        num_queries = len(queries[part])
        room = rooms.get()
        table = room[: num_tiles * num_queries * tile].view(num_tiles, num_queries, tile)
        try:
            found, where = _search(rows, queries[part], min(k, len(rows)), table)
        finally:
            rooms.put(room)
        where += start
        if places.shape[1]:  # of equal similarities, those found before come first
            found, order = torch.cat([similarities[part], found], dim=1).sort(dim=1, descending=True, stable=True)
            where = torch.cat([places[part], where], dim=1).gather(1, order)
        merged[0][part], merged[1][part] = found[:, :num], where[:, :num]

    with _single_threads(rows.device), ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(search, range(0, len(queries), chunk)))
    return merged


@contextmanager
def _single_threads(device: torch.device) -> Iterator[None]:
    """On a CPU torch's operations have one thread each: several that need not wait for one another are faster."""
    num_threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _search(rows: Tensor, queries: Tensor, k: int, table: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities [c, k] and places [c, k] of the nearest among `rows` [r, D], by groups of these.

    A row is among the nearest k only if its group is among the k groups of the largest maxima: otherwise each of these
    holds a row that comes before it.

    Args:
        table: room for similarities, [tiles, c, rows of a tile].
    """
    tile, num_groups = table.shape[2], _round_up(len(rows)) // _GROUP
    grouped = 2 * k < num_groups
    maxima = []
    for number, part in enumerate(rows.split(tile)):
        torch.mm(queries, part.T, out=table[number, :, : len(part)])
        table[number, :, len(part) :] = -2.0  # less than any cosine
        if grouped:
            maxima.append(F.max_pool1d(table[number], _GROUP))
    if grouped:
        groups = _largest(torch.cat(maxima, dim=1), k)  # [c, k]
        per_tile = tile // _GROUP
        query = torch.arange(len(queries), device=rows.device)[:, None]
        line = (groups // per_tile * len(queries) + query) * per_tile + groups % per_tile
        values = table.view(-1, _GROUP).index_select(0, line.flatten()).view(len(queries), -1)  # [c, k * group]
        inside = _largest(values, k)
        places = groups.gather(1, inside // _GROUP) * _GROUP + inside % _GROUP
    else:
        values = table.transpose(0, 1).flatten(1)
        inside = places = _largest(values, k)
    similarities, order = values.gather(1, inside).sort(dim=1, descending=True, stable=True)
    return similarities, places.gather(1, order)


def _largest(values: Tensor, k: int) -> Tensor:
    """The places of the k largest values of each row [c, n], ascending [c, k]; of equal values the first count."""
    least = _kth_largest(values, k)[:, None]
    chosen = values >= least
    places = chosen.nonzero()[:, 1]
    if len(places) > len(values) * k:  # some rows have more than k, by values equal to the k-th
        above = values > least
        room = k - above.count_nonzero(dim=1)[:, None]
        level = chosen ^ above
        places = (above | (level & (level.cumsum(dim=1, dtype=torch.int32) <= room))).nonzero()[:, 1]
    return places.view(-1, k)


def _kth_largest(values: Tensor, k: int) -> Tensor:
    """[c, n] -> [c]."""
    if values.device.type != "cpu":
        return values.topk(k, dim=1).values[:, -1]
    place = values.shape[1] - k  # NumPy's partition takes a fifth of the time of torch's topk
    return torch.from_numpy(np.partition(values.numpy(), place, axis=1)[:, place].copy())


def _even(num: int, limit: int) -> int:
    """The size of the fewest chunks of at most `limit`, all alike as far as possible."""
    return -(-num // -(-num // limit))


def _round_up(num: int) -> int:
    return -(-num // _GROUP) * _GROUP


def faiss_neighbours(
    gallery: Tensor, queries: Tensor, k: int, *, num_lists: int, num_probes: int
) -> tuple[Tensor, Tensor]:
    """As `nearest_neighbours`, by Faiss on the CPU: approximate, for galleries of millions.

    The gallery is cut into `num_lists` cells by k-means, and only the `num_probes` cells nearest to a query are
    searched, all of their members exactly (`IndexIVFFlat`). As many probes as lists, or `num_lists` = 1, search
    everything.

    Args:
        num_lists: 1 to n; 4 to 16 times the square root of n is usual.
        num_probes: 1 to `num_lists`.

    Returns:
        Those of `nearest_neighbours`. Where the cells that were searched hold fewer than k features, the rest has
        similarity -inf and place -1. The order of equally similar features is Faiss's own.

    Source: Johnson et al. (arXiv 1702.08734).

    Raises:
        ValueError: as `nearest_neighbours`, and for lists or probes out of range.
        ModuleNotFoundError: no Faiss; it comes with the extra `faiss`.
    """
    check_features(gallery, queries, k)
    if not 1 <= num_lists <= len(gallery):
        raise ValueError(f"num_lists = {num_lists}: must be >= 1 and <= {len(gallery)}, the number of gallery features")
    if not 1 <= num_probes <= num_lists:
        raise ValueError(f"num_probes = {num_probes}: must be >= 1 and <= {num_lists}, num_lists")
    faiss = _faiss()
    rows, asked = (F.normalize(features.cpu().float(), dim=1).numpy() for features in (gallery, queries))
    index = faiss.IndexFlatIP(rows.shape[1])
    if num_lists > 1:
        index = faiss.IndexIVFFlat(index, rows.shape[1], num_lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = 1  # it only warns
        index.train(rows)
        index.nprobe = num_probes
    index.add(rows)
    similarities, places = map(torch.from_numpy, index.search(asked, k))
    similarities[places < 0] = -torch.inf
    return similarities.to(gallery.device), places.to(gallery.device)


def faiss_is_installed() -> bool:
    return importlib.util.find_spec("faiss") is not None


def _faiss() -> Any:
    if not faiss_is_installed():
        raise ModuleNotFoundError("the search `faiss` needs the package faiss-cpu: install the extra `faiss`")
    import faiss

    return faiss


def check_features(gallery: Tensor, queries: Tensor, k: int) -> None:
    """Raises ValueError for what cannot be searched."""
    for name, features in (("gallery", gallery), ("queries", queries)):
        if features.dim() != 2 or features.numel() == 0:
            raise ValueError(f"{name} {list(features.shape)}: must be [n, D] with n >= 1")
        if not all(
            extreme.isfinite() for extreme in features.aminmax()
        ):  # `features.isfinite()` takes 20 times as long
            raise ValueError(f"{name}: holds infinite values or NaN; must be finite")
    if gallery.shape[1] != queries.shape[1]:
        raise ValueError(f"gallery and queries of {gallery.shape[1]} and {queries.shape[1]} features: must be as many")
    if not 1 <= k <= len(gallery):
        raise ValueError(f"k = {k}: must be >= 1 and <= {len(gallery)}, the number of gallery features")
