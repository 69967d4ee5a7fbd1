"""k-NN search of 50,000 gallery features for 10,000 queries: time and memory, beside scikit-learn and Faiss.

    python -m benchmarks.knn [--gallery 50000] [--queries 10000] [--width 384] [--k 20] [--rounds 3] [--json]

Each contender gets the same features, not normalised, in a process of its own, and returns similarities and places of
the k nearest by cosine. Contenders take turns, so that what else the machine does meets all of them. Printed are

- wall and CPU seconds of the search, normalisation and building an index included, imports and features not;
- the peak of resident memory above what the process had when the features were there and libraries had run once on a
  small problem;
- the share of places that are the same as ours.

README.md has figures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Search = Callable[[Array, Array, int], tuple[Array, Array]]

NUM_CLUSTERS = 100
SPREAD = 3.0
"""Features are directions of this many clusters with noise so many times as long in each of the axes."""


class Cost(NamedTuple):
    wall_s: float
    cpu_s: float
    memory_mb: float


def features(num: int, width: int, seed: int) -> Array:
    generator = np.random.default_rng([seed, 1])
    centres = np.random.default_rng(0).standard_normal((NUM_CLUSTERS, width), dtype=np.float32)
    rows = generator.standard_normal((num, width), dtype=np.float32)
    rows *= SPREAD
    rows += centres[generator.integers(NUM_CLUSTERS, size=num)]
    return rows


def ours(gallery: Array, queries: Array, k: int) -> tuple[Array, Array]:
    import torch

    from dino_core.eval.neighbours import nearest_neighbours

    similarities, places = nearest_neighbours(torch.from_numpy(gallery), torch.from_numpy(queries), k)
    return similarities.numpy(), places.numpy()


def scikit_learn(gallery: Array, queries: Array, k: int) -> tuple[Array, Array]:
    from sklearn.neighbors import NearestNeighbors

    found = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine", n_jobs=-1).fit(gallery)
    distances, places = found.kneighbors(queries)
    return 1 - distances, places


def faiss_flat(gallery: Array, queries: Array, k: int) -> tuple[Array, Array]:
    import faiss

    rows, asked = gallery.copy(), queries.copy()
    faiss.normalize_L2(rows)
    faiss.normalize_L2(asked)
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    similarities, places = index.search(asked, k)
    return similarities, places


CONTENDERS: dict[str, Search] = {"dino_core": ours, "scikit-learn": scikit_learn, "faiss": faiss_flat}


def _measure(search: Search, sizes: tuple[int, int, int], k: int, out: Connection) -> None:
    """Send cost and places of a search in this process."""
    gallery, queries = (features(num, sizes[2], seed) for seed, num in enumerate(sizes[:2]))
    search(gallery[:2000].copy(), queries[:200].copy(), k)  # libraries make their threads and load their kernels
    before = _resident()
    peak, done = [before], threading.Event()

    def watch() -> None:  # the kernel's high-water mark would count what came before
        while not done.wait(0.005):
            peak[0] = max(peak[0], _resident())

    watching = threading.Thread(target=watch)
    watching.start()
    start, cpu = time.perf_counter(), time.process_time()
    _, places = search(gallery, queries, k)
    cost = time.perf_counter() - start, time.process_time() - cpu
    done.set()
    watching.join()
    out.send((Cost(*cost, (peak[0] - before) / 1e6), places.astype(np.int64)))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(name: str, sizes: tuple[int, int, int], k: int) -> tuple[Cost, Array]:
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(CONTENDERS[name], sizes, k, send))
    process.start()
    send.close()
    try:
        found: tuple[Cost, Array] = receive.recv()
    finally:
        process.join()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gallery", type=int, default=50_000, help="gallery features (50000)")
    parser.add_argument("--queries", type=int, default=10_000, help="queries (10000)")
    parser.add_argument("--width", type=int, default=384, help="numbers of a feature (384)")
    parser.add_argument("--k", type=int, default=20, help="neighbours (20)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (3)")
    parser.add_argument("--json", action="store_true", help="print the medians as JSON on the last line")
    options = parser.parse_args(arguments)
    sizes = options.gallery, options.queries, options.width
    costs: dict[str, list[Cost]] = {name: [] for name in CONTENDERS}
    same: dict[str, float] = {}
    for _ in range(options.rounds):
        reference: Array | None = None
        for name, found in costs.items():
            cost, places = measure(name, sizes, options.k)
            reference = places if reference is None else reference
            same[name] = float((places == reference).mean())
            found.append(cost)
            print(
                f"{name:<14}{cost.wall_s:7.2f} s {cost.cpu_s:7.2f} CPU s {cost.memory_mb:8.0f} MB above the features, "
                f"{100 * same[name]:.2f} % the same places",
                flush=True,
            )
    medians = {name: Cost(*map(statistics.median, zip(*found, strict=True))) for name, found in costs.items()}
    ratios = {
        name: statistics.median(a.wall_s / b.wall_s for a, b in zip(costs["dino_core"], costs[name], strict=True))
        for name in list(CONTENDERS)[1:]
    }
    for name, ratio in ratios.items():
        print(f"dino_core takes {ratio:.2f} times the time of {name} (median of {options.rounds} rounds)")
    if options.json:
        figures = {f"{name}_{part}": value for name, cost in medians.items() for part, value in cost._asdict().items()}
        figures |= {f"ratio_{name}": ratio for name, ratio in ratios.items()}
        print(json.dumps({name.replace("-", "_"): round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
