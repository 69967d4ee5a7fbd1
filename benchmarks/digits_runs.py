"""Runs of the recipe `quickstart` in this process, without Ray, for benchmarks that compare many of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dino_core.crops import MultiCrop
from dino_core.train import NonFiniteLossError, TrainState, train
from orchestrator.config import RunConfig
from orchestrator.data.loaders import make_loader
from orchestrator.data.plan import index_plan
from orchestrator.data.sources import open_source
from orchestrator.data.stream import Batch, Batches, as_tensors
from orchestrator.evaluation import make_evaluate
from orchestrator.overrides import override
from sweeps.recipes import quickstart

Curves = dict[str, list[tuple[int, float]]]


def configured(changes: Mapping[str, Any]) -> RunConfig:
    """`quickstart` with changes by dotted key."""
    return override(quickstart(), changes)


class DigitsRuns:
    """Trains one configuration after the other; those with the same seed and crops share the crops."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._made_for: object = None
        self._batches: list[dict[str, Any]] = []

    def train(self, config: RunConfig) -> tuple[Curves, str]:
        """The (step, value) pairs of every metric, and why the run failed ("" if it did not)."""
        source = open_source(config.data)
        state = TrainState.create(config.pretrain, len(source.train))
        crops = MultiCrop(config.pretrain.crops, config.pretrain.seed)
        curves: Curves = {}

        def on_log(step: int, metrics: dict[str, float]) -> None:
            for name, value in metrics.items():
                curves.setdefault(name, []).append((step, value))

        made = self._crops(config, crops, state.schedules.total_steps)
        try:
            train(
                state,
                (crops.finish(batch, "cpu") for batch in made),
                on_log=on_log,
                on_checkpoint=lambda state: None,
                evaluate=make_evaluate(config, source),
            )
        except NonFiniteLossError as error:
            return curves, str(error)
        return curves, ""

    def _crops(self, config: RunConfig, crops: MultiCrop, steps: int) -> Iterator[Batch]:
        pretrain = config.pretrain
        same = (config.data, pretrain.crops, pretrain.seed, pretrain.batch_size)
        if same != self._made_for:
            self._made_for, self._batches = same, []
        source = open_source(config.data)
        batches = Batches(
            split=source.train,
            loader=make_loader(config, source, "train"),
            crops=crops,
            plan=index_plan(config, source.train),
            start_step=0,
            stop_step=steps,
        )
        for step in range(steps):
            if step == len(self._batches):
                self._batches.append(batches.make(step))
            yield as_tensors(self._batches[step])
