"""The suite `clustering`: k-means against the classes, and maps of features and class means in the plane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dino_core.config import CheckedConfig, ConfigError, number
from orchestrator.evaluate.suite import SuiteResult
from orchestrator.report.charts import drawn_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from orchestrator.evaluate.job import Job


@dataclass(frozen=True, kw_only=True)
class ClusteringOptions(CheckedConfig):
    """k-means, and maps by principal components and t-SNE as in the appendix of DINO (arXiv 2104.14294)."""

    path: ClassVar[str] = "clustering"

    split: Literal["train", "test"] = "test"
    """Whose images are clustered and drawn."""
    num_clusters: int | None = number(None, ge=1)
    """Of k-means; None: as many as classes."""
    num_starts: int = number(10, ge=1)
    """Runs of k-means, of which the one of the least sum of squares counts."""
    normalise: bool = True
    """Whether features get length 1 first."""
    maps: tuple[Literal["pca", "tsne"], ...] = ("pca", "tsne")
    """Maps that are drawn, of features and of class means."""
    num_points: int = number(2000, ge=2)
    """Images drawn, at most; a fixed random choice."""
    perplexity: float = number(20.0, gt=0)
    """t-SNE: about how many neighbours a point keeps; at most a third of the points."""
    tsne_learning_rate: float = number(200.0, gt=0)
    """t-SNE: learning rate."""
    tsne_steps: int = number(5000, ge=250)
    """t-SNE: steps for class means."""
    tsne_image_steps: int = number(1000, ge=250)
    """t-SNE: steps for images."""
    tsne_pca: int = number(30, ge=2)
    """t-SNE: principal components that it starts from."""
    seed: int = number(0, ge=0, le=2**32 - 1)
    """Of k-means and t-SNE."""


class Clustering:
    """Metrics `accuracy` and `purity`, per cent, `nmi` and `ari`, from 0 (below it for `ari`) to 1; a table of images
    by cluster and class; an HTML page of each map."""

    name = "clustering"
    options = ClusteringOptions

    def check(self, job: Job, options: ClusteringOptions) -> None:
        images = job.images(options.split)
        if images.split.labels is None:
            where = "training" if options.split == "train" else "test"
            raise ConfigError(
                f"data.source = {job.config.data.source}: has no labels of its {where} images; clustering compares "
                "clusters with them"
            )
        if options.num_clusters is not None and options.num_clusters > len(images):
            raise ConfigError(f"clustering.num_clusters = {options.num_clusters}: must be <= {len(images)}, the images")

    def run(self, job: Job, options: ClusteringOptions, folder: Path) -> SuiteResult:
        import torch.nn.functional as F

        from dino_core.eval.clustering import agreement, class_means, contingency, kmeans, plane
        from orchestrator.evaluation import fixed_choice

        found = job.features(job.images(options.split))
        rows = F.normalize(found.rows, dim=1) if options.normalise else found.rows
        num_classes = len(found.labels.unique())
        num_clusters = min(options.num_clusters or num_classes, len(rows))
        clusters = kmeans(
            rows, num_clusters, num_starts=options.num_starts, seed=options.seed, normalise=options.normalise
        )
        score = agreement(clusters, found.labels)
        names = [job.source.classes[place] for place in found.labels.unique().tolist()]
        counts = contingency(clusters, found.labels).tolist()
        table = [{"cluster": n, **dict(zip(names, row, strict=True))} for n, row in enumerate(counts)]
        some = fixed_choice(len(rows), options.num_points)
        means, _ = class_means(rows, found.labels)
        for method in options.maps:
            settings: dict[str, Any] = {
                "pca_first": options.tsne_pca,
                "perplexity": options.perplexity,
                "learning_rate": options.tsne_learning_rate,
                "seed": options.seed,
            }
            images = plane(rows[some], method, num_steps=options.tsne_image_steps, **settings)
            labels = [job.source.classes[place] for place in found.labels[some].tolist()]
            _write(folder / f"{method}.html", _points(images, labels, names), f"{job.target.name}: {len(some)} images")
            classes = plane(means, method, num_steps=options.tsne_steps, **settings)
            _write(folder / f"{method}_class_means.html", _named(classes, names), f"{job.target.name}: class means")
        notes = []
        if len(counts) < num_clusters:
            notes.append(f"k-means found {len(counts)} clusters, not {num_clusters}: the features are too much alike")
        if num_clusters != num_classes:
            notes.append(f"accuracy matches {num_clusters} clusters with {num_classes} classes one to one")
        metrics = {"accuracy": score.accuracy, "purity": score.purity, "nmi": score.nmi, "ari": score.ari}
        return SuiteResult(metrics=metrics, tables={"clusters": table}, notes=tuple(notes))


def _points(places: Any, labels: Sequence[str], names: Sequence[str]) -> Figure:
    """A point for each image, coloured by its class."""
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    for name in names:
        some = [i for i, label in enumerate(labels) if label == name]
        figure.add_trace(
            Scatter(x=places[some, 0], y=places[some, 1], mode="markers", name=drawn_text(name), marker={"size": 4})
        )
    return figure


def _named(places: Any, names: Sequence[str]) -> Figure:
    """A point for each class, with its name."""
    from plotly.graph_objects import Figure, Scatter

    texts = [drawn_text(name) for name in names]
    return Figure(Scatter(x=places[:, 0], y=places[:, 1], mode="markers+text", text=texts, textposition="top center"))


def _write(path: Path, figure: Figure, title: str) -> None:
    """A page that needs nothing else."""
    figure.update_layout(title=drawn_text(title), template="plotly_white", xaxis_visible=False, yaxis_visible=False)
    figure.update_yaxes(scaleanchor="x")
    figure.write_html(path, include_plotlyjs=True)


SUITE = Clustering()
