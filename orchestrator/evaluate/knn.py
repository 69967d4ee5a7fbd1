"""The suite `knn`: weighted k-NN classification of the test images among the training images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dino_core.config import CheckedConfig, number
from orchestrator.evaluate.suite import SuiteResult

if TYPE_CHECKING:
    from orchestrator.evaluate.job import Job


@dataclass(frozen=True, kw_only=True)
class KnnOptions(CheckedConfig):
    """Weighted k-NN as in DINO (arXiv 2104.14294, section 4.1)."""

    path: ClassVar[str] = "knn"

    k: tuple[int, ...] = number((10, 20, 100, 200), ge=1)
    """Neighbours that vote, a result for each; of a smaller gallery all do."""
    temperature: float = number(0.07, gt=0)
    """A neighbour's vote weighs exp(cosine similarity / temperature)."""


class Knn:
    """Metrics `top1_k<k>`, per cent."""

    name = "knn"
    options = KnnOptions

    def check(self, job: Job, options: KnnOptions) -> None:
        job.check_labelled(self.name)

    def run(self, job: Job, options: KnnOptions, folder: Path) -> SuiteResult:
        from dino_core.eval.knn import knn_accuracy

        gallery, queries = (job.features(job.images(part)) for part in ("train", "test"))
        num = len(gallery.rows)
        metrics = {
            f"top1_k{k}": knn_accuracy(
                gallery.rows, gallery.labels, queries.rows, queries.labels, min(k, num), options.temperature
            )
            for k in options.k
        }
        too_many = ", ".join(str(k) for k in options.k if k > num)
        notes = (f"of a gallery of {num} images all vote for k = {too_many}",) if too_many else ()
        return SuiteResult(metrics=metrics, notes=notes)


SUITE = Knn()
