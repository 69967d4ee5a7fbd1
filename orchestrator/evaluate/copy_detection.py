"""The suite `copy_detection`: is a changed image found by its original, for each kind of change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dino_core.config import CheckedConfig, ConfigError, number
from orchestrator.evaluate.suite import SuiteResult

if TYPE_CHECKING:
    from dino_core.eval.copy_detection import CopyScores, Whitening
    from orchestrator.evaluate.features import Features, Images
    from orchestrator.evaluate.job import Job
    from orchestrator.evaluate.views_retrieval import CopyView

DATABASE = "database"
"""As `whitening`: the images of the database themselves."""


@dataclass(frozen=True, kw_only=True)
class CopyDetectionOptions(CheckedConfig):
    """Copy detection as in DINO (arXiv 2104.14294, section 4.2.1)."""

    path: ClassVar[str] = "copy_detection"

    source: str | None = None
    """Folder or URL with `database/`, `queries/` and `groundtruth.csv` (columns query, positive, attack)."""
    descriptor: Literal["class_gem", "pooled"] = "class_gem"
    """`class_gem`: class token and GeM-pooled patches of the last block (without a class token the latter alone);
    `pooled`: the features of the other suites. Raw pixels are their own."""
    gem_power: float = number(4.0, gt=0)
    """Exponent of the generalised mean: 1 is the mean of what is above 0, large ones go to the maximum."""
    resize: Literal["squeeze", "crop"] = "squeeze"
    """`squeeze`: the whole image, made a square; `crop`: the centre crop of the other suites."""
    image_size: int | None = number(None, ge=1)
    """Pixels per side; None: `features.image_size`. DINO takes 320."""
    whitening: str | None = None
    """Images that PCA whitening is learned on: a path, URL or set as `data.source` names it, or `database` for those
    of the database; None: no whitening."""
    whitening_covariance: Literal["centred", "uncentred"] = "centred"
    """`uncentred` is that of DINO's script: of the features with their mean, which is then taken off what is
    whitened."""
    whitening_dim: int | None = number(None, ge=1)
    """Directions kept, the strongest; None: all, as DINO does."""
    num_whitening: int = number(20_000, ge=2)
    """Images of a `whitening` source used, a fixed random choice."""
    distractors: str | None = None
    """Images that are added to the database: a path, URL or set as `data.source` names it."""
    num_distractors: int = number(10_000, ge=1)
    """Of them used, a fixed random choice."""
    interpolation: Literal["trapezoid", "plain"] = "trapezoid"
    """Area under precision over recall of each query: `trapezoid` as in Copydays and DINO, `plain` as in scikit-learn.
    The micro average precision is always plain."""
    depth: int | None = number(None, ge=1)
    """Positives at a later rank count as not found; None: all count. DINO's script takes 20."""


class CopyDetection:
    """Metrics `map`, `micro_ap` and `map_<attack>`, per cent."""

    name = "copy_detection"
    options = CopyDetectionOptions

    def check(self, job: Job, options: CopyDetectionOptions) -> None:
        from orchestrator.evaluate.copy_layout import read_copy_layout
        from orchestrator.evaluate.image_files import open_other_source
        from orchestrator.evaluate.views_retrieval import check_view

        layout = read_copy_layout("copy_detection.source", options.source)
        if options.distractors is not None:
            open_other_source(job, "copy_detection.distractors", options.distractors)
        if options.whitening is not None:
            num = len(layout.database)
            if options.whitening != DATABASE:
                num = len(open_other_source(job, "copy_detection.whitening", options.whitening).train)
            if num < 2:
                raise ConfigError(f"copy_detection.whitening = {options.whitening}: must have two images or more")
        elif options.whitening_dim is not None:
            raise ConfigError("copy_detection.whitening_dim: must be none without copy_detection.whitening")
        view = _view(job, options)
        key = "copy_detection.image_size" if options.image_size else "features.image_size"
        advice = "; copy_detection.descriptor=pooled takes its pooled features" if view.gem_power is not None else ""
        width = check_view(job.target, view, f"{key} = {view.size}", advice)
        if options.whitening_dim is not None and options.whitening_dim > width:
            raise ConfigError(
                f"copy_detection.whitening_dim = {options.whitening_dim}: must be <= {width}, the descriptor's width"
            )

    def run(self, job: Job, options: CopyDetectionOptions, folder: Path) -> SuiteResult:
        import torch

        from dino_core.eval.copy_detection import copy_detection_scores
        from dino_core.eval.retrieval import RankingRules
        from orchestrator.evaluate.copy_layout import read_copy_layout
        from orchestrator.evaluate.image_files import images_of_files

        layout = read_copy_layout("copy_detection.source", options.source)
        view = _view(job, options)
        database, queries = (
            job.features(images_of_files(job, layout.place, names, part), view)
            for part, names in (("database", layout.database), ("queries", layout.queries))
        )
        rows = database.rows
        if options.distractors is not None:
            rows = torch.cat([rows, job.features(_extra_images(job, options, "distractors"), view).rows])
        asked = queries.rows
        if options.whitening is not None:
            whitening = _whitening(job, options, view, database)
            rows, asked = whitening(rows), whitening(asked)
        place = {sample: row for row, sample in enumerate(database.ids.tolist())}
        kept = queries.ids.tolist()
        positives = [[place[sample] for sample in layout.positives[query] if sample in place] for query in kept]
        attacks = [layout.attacks[query] for query in kept]
        rules = RankingRules(interpolation=options.interpolation, precision="plain", ks=(1,), depth=options.depth)
        scores = copy_detection_scores(asked, rows, positives, attacks, rules)
        notes = [f"{len(rows)} images are searched, {len(kept)} queries asked"]
        if scores.overall.num_without_positives:
            notes.append(
                f"queries that are no copies, which count in micro_ap alone: {scores.overall.num_without_positives}"
            )
        if layout.num_unused:
            notes.append(f"images beside the database that groundtruth.csv does not name: {layout.num_unused}")
        return SuiteResult(metrics=_metrics(scores), tables={"per_attack": _table(scores)}, notes=tuple(notes))


SUITE = CopyDetection()


def _view(job: Job, options: CopyDetectionOptions) -> CopyView:
    from orchestrator.evaluate.views_retrieval import CopyView

    image = job.target.image
    power = options.gem_power if options.descriptor == "class_gem" and job.target.kind != "pixels" else None
    fraction = image.crop_fraction if options.resize == "crop" else None
    return CopyView(options.image_size or image.size, fraction, image.mean, image.std, power)


def _extra_images(job: Job, options: CopyDetectionOptions, key: str) -> Images:
    from orchestrator.evaluate.image_files import images_of_source, open_other_source

    source = open_other_source(job, f"copy_detection.{key}", getattr(options, key))
    return images_of_source(job, source, getattr(options, f"num_{key}"), key)


def _whitening(job: Job, options: CopyDetectionOptions, view: CopyView, database: Features) -> Whitening:
    from dino_core.eval.copy_detection import learn_whitening
    from orchestrator.errors import RunFailed

    found = database
    if options.whitening != DATABASE:
        found = job.features(_extra_images(job, options, "whitening"), view)
    try:
        return learn_whitening(found.rows, options.whitening_covariance, options.whitening_dim)
    except ValueError as error:  # features that are all the same, or of one image that can be read
        raise RunFailed(f"copy_detection.whitening = {options.whitening}: {error}") from error


def _metrics(scores: CopyScores) -> dict[str, float]:
    by_attack = {f"map_{attack}": found.mean_average_precision for attack, found in scores.by_attack.items()}
    return {"map": scores.overall.mean_average_precision, "micro_ap": scores.micro_average_precision, **by_attack}


def _table(scores: CopyScores) -> list[dict[str, Any]]:
    rows = [(attack, found, scores.micro_by_attack[attack]) for attack, found in scores.by_attack.items()]
    return [
        {
            "attack": attack,
            "queries": found.num_queries,
            "map": round(found.mean_average_precision, 4),
            "first": round(found.mean_precision[1], 4),
            "micro_ap": round(micro, 4),
        }
        for attack, found, micro in (*rows, ("all", scores.overall, scores.micro_average_precision))
    ]
