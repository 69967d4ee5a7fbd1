"""The suite `label_free`: scores of the training images' features that need no label."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dino_core.config import CheckedConfig, number
from orchestrator.evaluate.suite import SuiteResult

if TYPE_CHECKING:
    from orchestrator.evaluate.features import Images
    from orchestrator.evaluate.job import Job


@dataclass(frozen=True, kw_only=True)
class LabelFreeOptions(CheckedConfig):
    """RankMe (arXiv 2210.02885), LiDAR (2312.04000), alpha-ReQ (2202.05808), uniformity and alignment (2005.10242)."""

    path: ClassVar[str] = "label_free"

    num_images: int = number(25_600, ge=2)
    """Training images, at most, of all scores but LiDAR and alignment; a fixed random choice."""
    num_view_images: int = number(1000, ge=2)
    """Training images, at most, whose views LiDAR and alignment compare."""
    num_views: int = number(10, ge=2)
    """Global crops of each of those, an even number, by the augmentation of the run; the authors of LiDAR take 50."""
    lidar_delta: float = number(1e-4, gt=0)
    """LiDAR: added to the variance between views in each direction."""
    alpha_first: int = number(4, ge=1)
    """alpha-ReQ: the first eigenvalue, counted from 1, that the power law is fitted to."""
    alpha_last: int = number(100, ge=2)
    """alpha-ReQ: the last one."""
    uniformity_t: float = number(2.0, gt=0)
    """Uniformity: exponent of the Gaussian potential."""
    alignment_alpha: float = number(2.0, gt=0)
    """Alignment: power of the distance."""

    def _problems(self) -> list[str]:
        problems = []
        if self.num_views % 2:
            problems.append(f"num_views = {self.num_views}: must be even, global crops are made two at a time")
        if self.alpha_first >= self.alpha_last:
            problems.append(f"alpha_first = {self.alpha_first}: must be below alpha_last = {self.alpha_last}")
        return problems


class LabelFree:
    """Metrics `rankme`, `effective_rank`, `alpha_req`, `uniformity`, `lidar`, `alignment`."""

    name = "label_free"
    options = LabelFreeOptions

    def check(self, job: Job, options: LabelFreeOptions) -> None:
        job.source  # noqa: B018 - raises ConfigError where there is none

    def run(self, job: Job, options: LabelFreeOptions, folder: Path) -> SuiteResult:
        from dino_core.eval.alignment import alignment, uniformity
        from dino_core.eval.rank import alpha_req, effective_rank, lidar, rankme
        from orchestrator.evaluate.views import AugmentedViews

        images = job.images("train")
        rows = job.features(_some(images, options.num_images)).rows
        crops = AugmentedViews(job.target.crops, options.num_views)
        views = job.features(_some(images, options.num_view_images), crops).rows
        scores = {
            "rankme": rankme(rows),
            "effective_rank": effective_rank(rows),
            "alpha_req": alpha_req(rows, options.alpha_first, options.alpha_last),
            "uniformity": uniformity(rows, options.uniformity_t) if len(rows) > 1 else math.nan,
            "lidar": lidar(views, options.lidar_delta),
            "alignment": alignment(views, options.alignment_alpha),
        }
        notes = [
            f"{name} has no value for these features" for name, score in scores.items() if not math.isfinite(score)
        ]
        for name, num in (("rankme", len(rows)), ("lidar", len(views))):
            if num <= job.target.num_features:
                notes.append(
                    f"{name} of {num} images is bounded by them, not by the {job.target.num_features} features"
                )
        metrics = {name: score for name, score in scores.items() if math.isfinite(score)}
        return SuiteResult(metrics=metrics, notes=tuple(notes))


def _some(images: Images, limit: int) -> Images:
    """At most `limit` of them, a fixed choice."""
    from orchestrator.evaluation import fixed_choice

    return replace(images, ids=images.ids[fixed_choice(len(images), limit)])


SUITE = LabelFree()
