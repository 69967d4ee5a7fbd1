"""The suite `retrieval`: how well images of the same object or class are found, by mean average precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from dino_core.config import CheckedConfig, ConfigError, number
from orchestrator.evaluate.suite import SuiteResult

if TYPE_CHECKING:
    from dino_core.eval.retrieval import RankingRules, RetrievalScores
    from orchestrator.evaluate.features import Features
    from orchestrator.evaluate.job import Job
    from orchestrator.evaluate.views import View


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions(CheckedConfig):
    """Image retrieval by the cosine of features: revisited Oxford and Paris as in DINO (arXiv 2104.14294, section
    4.2.1), or labelled images of one's own."""

    path: ClassVar[str] = "retrieval"

    source: str | None = None
    """Folder or URL in the layout of revisited Oxford and Paris; None: labelled images of `data.source`, where all of
    one label are positives of each other."""
    queries: Literal["test", "train"] = "test"
    """Split of `data.source` whose images are searched for."""
    gallery: Literal["others", "train"] = "others"
    """Where: among the other queries, or among the training images."""
    resize: Literal["whole", "crop"] | None = None
    """`whole`: the image made smaller until its longer side is `image_size`; `crop`: the centre crop of the other
    suites. None: `whole` of `source`, `crop` of `data.source`."""
    image_size: int | None = number(None, ge=1)
    """Pixels; None: `features.image_size`."""
    multi_scale: bool = False
    """The mean of features at the scales 1, 1/sqrt(2) and 1/2, instead of those at 1."""
    crop_queries: bool = False
    """Cut the box of the ground truth out of each query, as the authors of the revisited sets do; DINO does not."""
    interpolation: Literal["trapezoid", "plain"] = "trapezoid"
    """Area under precision over recall: `trapezoid` as in the revisited sets and DINO, `plain` as in scikit-learn."""
    precision: Literal["revisited", "plain"] = "revisited"
    """Precision at k: `plain` is positives among the first k over k; `revisited` takes for k the rank of the last
    positive where that is smaller."""
    k: tuple[int, ...] = number((1, 5, 10), ge=1)
    """For the precision at k."""


class Retrieval:
    """Metrics `map` and `p<k>`, per cent; with `source` for each protocol: `map_medium`, `p10_hard`, ..."""

    name = "retrieval"
    options = RetrievalOptions

    def check(self, job: Job, options: RetrievalOptions) -> None:
        from orchestrator.evaluate.revisited_layout import read_revisited_layout
        from orchestrator.evaluate.views_retrieval import check_view, retrieval_view

        whole = _is_whole(options)
        if job.target.kind == "pixels" and (whole or options.multi_scale):
            raise ConfigError(
                "retrieval: pixels are compared at one size only: retrieval.resize=crop retrieval.multi_scale=false"
            )
        if options.source is not None:
            defaults = type(options)()
            changed = [key for key in ("queries", "gallery") if getattr(options, key) != getattr(defaults, key)]
            if changed:
                raise ConfigError(f"retrieval.{changed[0]}: is of data.source, and retrieval.source has its own")
            layout = read_revisited_layout("retrieval.source", options.source)
            if options.crop_queries and layout.boxes is None:
                raise ConfigError("retrieval.crop_queries = True: must be false, the ground truth lacks boxes (bbx)")
        else:
            _check_labels(job, options)
        view = retrieval_view(job.target, options.image_size, whole=whole, multi_scale=options.multi_scale)
        key = "retrieval.image_size" if options.image_size else "features.image_size"
        advice = "; retrieval.resize=crop makes squares of all" if whole else ""
        check_view(job.target, view, f"{key} = {view.size}", advice)

    def run(self, job: Job, options: RetrievalOptions, folder: Path) -> SuiteResult:
        from dino_core.eval.retrieval import RankingRules

        rules = RankingRules(interpolation=options.interpolation, precision=options.precision, ks=options.k)
        return _run_labels(job, options, rules) if options.source is None else _run_revisited(job, options, rules)


SUITE = Retrieval()


def _is_whole(options: RetrievalOptions) -> bool:
    return options.resize == "whole" or (options.resize is None and options.source is not None)


def _check_labels(job: Job, options: RetrievalOptions) -> None:
    """Raise ConfigError unless the images of `data.source` have labels, and a query something to find."""
    if options.crop_queries:
        raise ConfigError("retrieval.crop_queries = True: must be false without retrieval.source, which has the boxes")
    if options.queries == options.gallery == "train":
        raise ConfigError("retrieval.gallery = train: must be others where retrieval.queries = train")
    source = job.config.data.source
    labels: dict[str, Any] = {}
    for part in dict.fromkeys((options.queries, "train" if options.gallery == "train" else options.queries)):
        if part == "test" and job.source.test is None:
            notes = "".join(f"; {note}" for note in job.source.notes())
            raise ConfigError(
                f"data.source = {source}: has no split {job.config.data.test_split} (data.test_split); "
                f"retrieval.queries=train searches among the training images{notes}"
            )
        images = job.images(part)
        if images.split.labels is None:
            raise ConfigError(
                f"data.source = {source}: has no labels of its {'training' if part == 'train' else 'test'} images; "
                "retrieval needs them, or retrieval.source in the layout of revisited Oxford and Paris"
            )
        labels[part] = images.split.labels[images.ids]
    queries = labels[options.queries]
    if options.gallery == "train":
        found = bool(np.isin(queries, labels["train"]).any())
    else:
        found = len(np.unique(queries)) < len(queries)
    if not found:
        where = "the training images" if options.gallery == "train" else "the other queries"
        raise ConfigError(f"data.source = {source}: no query has an image of its label among {where}")


def _run_labels(job: Job, options: RetrievalOptions, rules: RankingRules) -> SuiteResult:
    from dino_core.eval.retrieval import label_scores
    from orchestrator.evaluate.views_retrieval import retrieval_view

    view: View = job.centre_crop()  # whose features other suites take too
    if _is_whole(options) or options.multi_scale or options.image_size:
        whole = _is_whole(options)
        view = retrieval_view(job.target, options.image_size, whole=whole, multi_scale=options.multi_scale)
    queries = job.features(job.images(options.queries), view)
    if options.gallery == "others":
        scores = label_scores(queries.rows, queries.labels, rules=rules)
    else:
        gallery = job.features(job.images("train"), view)
        scores = label_scores(queries.rows, queries.labels, gallery.rows, gallery.labels, rules)
    table = []
    for label, name in enumerate(job.source.classes):
        found = scores.average_precisions[(queries.labels == label) & ~scores.average_precisions.isnan()]
        if len(found):
            table.append({"class": name, "queries": len(found), "map": round(float(found.mean()), 4)})
    return SuiteResult(metrics=_metrics(scores, ""), tables={"per_class": table}, notes=_left_out(scores, ""))


def _run_revisited(job: Job, options: RetrievalOptions, rules: RankingRules) -> SuiteResult:
    from dino_core.eval.retrieval import PROTOCOLS, RevisitedQuery, revisited_scores
    from orchestrator.evaluate.image_files import images_of_files
    from orchestrator.evaluate.revisited_layout import read_revisited_layout
    from orchestrator.evaluate.views_retrieval import retrieval_view

    layout = read_revisited_layout("retrieval.source", options.source)
    found: dict[str, Features] = {}
    for part, names in (("gallery", layout.gallery), ("queries", layout.queries)):
        boxes = layout.boxes if options.crop_queries and part == "queries" else None
        view = retrieval_view(
            job.target, options.image_size, whole=_is_whole(options), multi_scale=options.multi_scale, boxes=boxes
        )
        found[part] = job.features(images_of_files(job, layout.place, names, part), view)
    place = {sample: row for row, sample in enumerate(found["gallery"].ids.tolist())}
    truth = [
        RevisitedQuery(
            **{
                kind: [place[sample] for sample in getattr(layout.truth[query], kind) if sample in place]
                for kind in ("easy", "hard", "junk")
            }
        )
        for query in found["queries"].ids.tolist()
    ]
    metrics: dict[str, float] = {}
    notes: list[str] = []
    table: list[dict[str, Any]] = [{"query": layout.queries[query]} for query in found["queries"].ids.tolist()]
    for protocol, (kinds, _) in PROTOCOLS.items():
        if not any(getattr(query, kind) for query in truth for kind in kinds):
            notes.append(f"{protocol}: no query has a positive image")
            continue
        scores = revisited_scores(found["queries"].rows, found["gallery"].rows, truth, protocol, rules)
        metrics |= _metrics(scores, f"_{protocol}")
        notes += _left_out(scores, f"{protocol}: ")
        for row, value in zip(table, scores.average_precisions.tolist(), strict=True):
            row[f"ap_{protocol}"] = "" if np.isnan(value) else round(value, 4)
    return SuiteResult(metrics=metrics, tables={"per_query": table}, notes=tuple(notes))


def _metrics(scores: RetrievalScores, suffix: str) -> dict[str, float]:
    at_k = {f"p{k}{suffix}": value for k, value in scores.mean_precision.items()}
    return {f"map{suffix}": scores.mean_average_precision, **at_k}


def _left_out(scores: RetrievalScores, before: str) -> tuple[str, ...]:
    num = scores.num_without_positives
    total = len(scores.average_precisions)
    return (f"{before}queries without a positive image, left out: {num} of {total}",) if num else ()
