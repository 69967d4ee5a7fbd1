"""Options of suites that learn from labels: how many of these are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dino_core.config import CheckedConfig, ConfigError, number

if TYPE_CHECKING:
    from torch import Tensor

    from orchestrator.evaluate.job import Job


@dataclass(frozen=True, kw_only=True)
class FewLabels(CheckedConfig):
    """A part of each class of the training images."""

    label_share: float | None = number(None, gt=0, le=1)
    """Low-shot: the share of each class's training images that is learned from, at least one image; None: all."""
    labels_per_class: int | None = number(None, ge=1)
    """n per class: so many training images of each class; None: all."""
    label_seed: int = number(0, ge=0)
    """Of the choice by `label_share` or `labels_per_class`, in which fewer images are a part of more."""

    def _problems(self) -> list[str]:
        if self.label_share is not None and self.labels_per_class is not None:
            return [f"label_share = {self.label_share}: must be none where labels_per_class is given"]
        return []


def check_few_labels(job: Job, options: FewLabels) -> None:
    """Raise ConfigError if a class has fewer images than `labels_per_class`."""
    import torch

    images = job.images("train")
    assert images.split.labels is not None
    labels = torch.from_numpy(images.split.labels[images.ids])
    if options.labels_per_class is not None:
        counts = torch.bincount(labels)
        counts[counts == 0] = len(labels)  # not among these images
        label = int(counts.argmin())
        if counts[label] < options.labels_per_class:
            raise ConfigError(
                f"{options.path}.labels_per_class = {options.labels_per_class}: must be <= {int(counts[label])}, the "
                f"training images of class {job.source.classes[label]}"
            )


def choose(labels: Tensor, options: FewLabels) -> Tensor:
    """Places of the images that are learned from, ascending."""
    import torch

    from dino_core.eval.low_shot import choose_per_class

    if options.label_share is None and options.labels_per_class is None:
        return torch.arange(len(labels))
    return choose_per_class(labels, num=options.labels_per_class, share=options.label_share, seed=options.label_seed)
