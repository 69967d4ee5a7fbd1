"""What a suite is, and which there are. Imports no torch, and neither may a suite's module: the command line asks it.

A suite is an object of a module of its own, `orchestrator/evaluate/<name>.py`, named `SUITE`; what it computes is in
`dino_core.eval`. It is checked first, with all others that the command names, and only then are features computed.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dino_core.config import CheckedConfig, ConfigError
from orchestrator.overrides import did_you_mean

if TYPE_CHECKING:
    from orchestrator.evaluate.job import Job

SUITES = {
    "knn": "k-NN classification of test images among the training images",
    "segmentation": "attention of the class token, and masks made of it, against objects",
    "video": "video object segmentation by label propagation",
    "retrieval": "mAP of images of the same class or object: own labels, or revisited Oxford and Paris",
    "copy_detection": "mAP of changed copies of images, for each kind of change",
    "label_free": "scores that need no label: RankMe, LiDAR, alpha-ReQ, effective rank, uniformity, alignment",
}
"""Every suite by name, with a line for people."""


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """What a suite found."""

    metrics: Mapping[str, float]
    """By names such as `top1_k20`, which become `evaluate/<suite>/top1_k20`; shares are in per cent."""
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """What is no single number, such as a row for each class: rows by column, under the table's name."""
    notes: tuple[str, ...] = ()
    """What people should know of these numbers, a sentence each."""


class Suite(Protocol):
    """A protocol of the papers."""

    @property
    def name(self) -> str:
        """As on the command line."""

    @property
    def options(self) -> type[CheckedConfig]:
        """Its options, with `path` = `name`: they are given as `<name>.<option>=value`. Types as in `RunConfig`, and
        tuples of any length."""

    def check(self, job: Job, options: Any) -> None:
        """Raise ConfigError, naming the key, if target, data and options do not go together. Computes no features."""

    def run(self, job: Job, options: Any, folder: Path) -> SuiteResult:
        """Compute it. `folder` is empty: files that are written into it become artifacts of the result.

        Raises RunFailed if the features are not finite, or no image can be read.
        """


def load_suite(name: str) -> Suite:
    """The suite of that name.

    Raises:
        ConfigError: There is none; names the nearest.
    """
    if name not in SUITES:
        near = did_you_mean(name, SUITES) or f"; there is {', '.join(SUITES)}"
        raise ConfigError(f"no suite {name!r}{near}")
    suite: Suite = importlib.import_module(f"orchestrator.evaluate.{name}").SUITE
    return suite
