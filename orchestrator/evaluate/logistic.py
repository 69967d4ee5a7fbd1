"""The suite `logistic`: multinomial logistic regression on frozen features, for small sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dino_core.config import ConfigError, number
from orchestrator.errors import RunFailed
from orchestrator.evaluate.few_labels import FewLabels, check_few_labels, choose
from orchestrator.evaluate.suite import SuiteResult

if TYPE_CHECKING:
    from orchestrator.evaluate.job import Job


@dataclass(frozen=True, kw_only=True)
class LogisticOptions(FewLabels):
    """Logistic regression as DINOv2's (arXiv 2304.07193), which takes 45 values of C; all of them see all images."""

    path: ClassVar[str] = "logistic"

    c_low: float = number(1e-6, gt=0)
    """The smallest C, the weight of the loss against half the squared length of the weights."""
    c_high: float = number(1e5, gt=0)
    """The largest C."""
    num_c: int = number(12, ge=1)
    """Values of C, in equal ratios; 1: `c_low` alone."""
    validation_share: float = number(0.1, gt=0, le=0.9)
    """Share of each class's training images on which C is chosen."""
    refit: bool = True
    """Whether the chosen C is fitted again on all training images, as DINOv2 does."""
    normalise: bool = False
    """Whether features get length 1 first."""
    max_iterations: int = number(1000, ge=1)
    """Of L-BFGS, for each C."""
    tolerance: float = number(1e-4, gt=0)
    """L-BFGS ends where no element of the gradient of the mean loss is larger; DINOv2 asks its own solver for 1e-12."""
    seed: int = number(0, ge=0)
    """Of what is held out."""

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.c_low > self.c_high:
            problems.append(f"c_low = {self.c_low}: must not exceed c_high = {self.c_high}")
        return problems


class Logistic:
    """Metrics `top1`, per cent, and `c`, that of the chosen classifier; a table of all C by validation images."""

    name = "logistic"
    options = LogisticOptions

    def check(self, job: Job, options: LogisticOptions) -> None:
        job.check_labelled(self.name)
        check_few_labels(job, options)
        images = job.images("train")
        assert images.split.labels is not None
        if len(set(images.split.labels[images.ids].tolist())) < 2:
            raise ConfigError(f"data.source = {job.config.data.source}: has one class; logistic needs two")

    def run(self, job: Job, options: LogisticOptions, folder: Path) -> SuiteResult:
        import numpy as np
        import torch.nn.functional as F

        from dino_core.eval.logistic import logistic_regression

        train, test = (job.features(job.images(part)) for part in ("train", "test"))
        chosen = choose(train.labels, options)
        rows, queries = (F.normalize(x, dim=1) if options.normalise else x for x in (train.rows[chosen], test.rows))
        try:
            found = logistic_regression(
                rows,
                train.labels[chosen],
                queries,
                test.labels,
                np.geomspace(options.c_low, options.c_high, options.num_c).tolist(),
                validation_share=options.validation_share,
                refit=options.refit,
                max_iterations=options.max_iterations,
                tolerance=options.tolerance,
                seed=options.seed,
            )
        except ValueError as error:  # too few images
            raise RunFailed(f"logistic: {error}") from error
        notes = []
        if not found.converged:
            notes.append(f"the classifier has not converged in logistic.max_iterations = {options.max_iterations}")
        if options.num_c > 1 and found.strength in (min(found.validation), max(found.validation)):
            notes.append(f"C = {found.strength:.3g} is at an end of its range: a wider one may be better")
        validation = [{"c": c, "validation_top1": top1} for c, top1 in found.validation.items()]
        return SuiteResult(
            metrics={"top1": found.top1, "c": found.strength},
            tables={"validation": validation} if validation else {},
            notes=tuple(notes),
        )


SUITE = Logistic()
