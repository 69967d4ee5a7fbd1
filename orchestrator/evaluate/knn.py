"""The suite `knn`: weighted k-NN classification of the test images among the training images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from dino_core.config import ConfigError, number
from orchestrator.evaluate.few_labels import FewLabels, check_few_labels, choose
from orchestrator.evaluate.suite import SuiteResult

if TYPE_CHECKING:
    from orchestrator.evaluate.job import Job


@dataclass(frozen=True, kw_only=True)
class KnnOptions(FewLabels):
    """Weighted k-NN as in DINO (arXiv 2104.14294, section 4.1)."""

    path: ClassVar[str] = "knn"

    k: tuple[int, ...] = number((10, 20, 100, 200), ge=1)
    """Neighbours that vote, a result for each."""
    temperature: float = number(0.07, gt=0)
    """A neighbour's vote weighs exp(cosine similarity / temperature)."""
    large_k: Literal["clamp", "refuse"] = "clamp"
    """What a k is that is larger than the gallery: a vote of all of it, with a note, or an error."""
    search: Literal["exact", "faiss"] = "exact"
    """Exact in bounded memory, or approximate by Faiss (the extra `faiss`), for galleries of millions."""
    num_lists: int | None = number(None, ge=1)
    """Faiss: cells that k-means cuts the gallery into; None: 4 times the square root of its size."""
    num_probes: int = number(32, ge=1)
    """Faiss: cells nearest to a query that are searched; at most `num_lists` are."""


class Knn:
    """Metrics `top1_k<k>`, per cent."""

    name = "knn"
    options = KnnOptions

    def check(self, job: Job, options: KnnOptions) -> None:
        from dino_core.eval.neighbours import faiss_is_installed

        job.check_labelled(self.name)
        check_few_labels(job, options)
        if options.search == "faiss" and not faiss_is_installed():
            raise ConfigError("knn.search = faiss: needs the package faiss-cpu: install the extra `faiss`")
        num = len(job.images("train"))
        if options.large_k == "refuse" and max(options.k) > num:
            raise ConfigError(f"knn.k = {max(options.k)}: must be <= {num}, the gallery, with knn.large_k = refuse")
        if options.num_lists is not None and options.num_lists > num:
            raise ConfigError(f"knn.num_lists = {options.num_lists}: must be <= {num}, the gallery")

    def run(self, job: Job, options: KnnOptions, folder: Path) -> SuiteResult:
        from dino_core.eval.knn import knn_accuracies
        from dino_core.eval.neighbours import faiss_neighbours, nearest_neighbours

        gallery, queries = (job.features(job.images(part)) for part in ("train", "test"))
        chosen = choose(gallery.labels, options)
        num = len(chosen)
        search = nearest_neighbours
        notes = []
        if options.search == "faiss":
            num_lists = min(num, options.num_lists or round(4 * num**0.5))
            num_probes = min(num_lists, options.num_probes)
            search = partial(faiss_neighbours, num_lists=num_lists, num_probes=num_probes)
            notes.append(f"neighbours are approximate: {num_probes} of {num_lists} cells were searched")
        found = knn_accuracies(
            gallery.rows[chosen],
            gallery.labels[chosen],
            queries.rows,
            queries.labels,
            options.k,
            options.temperature,
            large_k="clamp",
            search=search,
        )
        if too_many := ", ".join(str(k) for k in options.k if k > num):
            notes.append(f"of a gallery of {num} images all vote for k = {too_many}")
        return SuiteResult(metrics={f"top1_k{k}": top1 for k, top1 in found.items()}, notes=tuple(notes))


SUITE = Knn()
