"""The stages of a run: which steps are whose, and the configuration of each. No torch here.

The first is the run of `pretrain.steps` or `pretrain.epochs`, and those of `pretrain.stages` follow it. Steps, and with
them the order of images, are counted through all of them; each has crops and schedules of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from dino_core.config import ConfigError, PretrainConfig
from dino_core.config_stages import config_of_stage


@dataclass(frozen=True)
class Stage:
    """Some steps of a run."""

    index: int
    start: int
    """The first of its steps."""
    stop: int
    """The step behind its last."""
    config: PretrainConfig
    """The run that it would be alone."""


def num_steps(config: PretrainConfig, num_samples: int) -> int:
    """Steps of the first stage over `num_samples` images.

    Raises:
        ConfigError: there are no images, or no step.
    """
    if num_samples < 1:
        raise ConfigError(f"data.source: holds {num_samples} images, at least 1 is needed")
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    # 0.29 epochs of 100 are 29, not 28.99...
    steps = math.floor(round(config.epochs * (num_samples / config.batch_size), 6))
    if steps < 1:
        raise ConfigError(
            f"pretrain.epochs = {config.epochs:g}: {num_samples} images in batches of {config.batch_size} "
            f"make no full step; must be >= {config.batch_size / num_samples:g}"
        )
    return steps


def stages_of(config: PretrainConfig, num_samples: int) -> tuple[Stage, ...]:
    """The stages of a run over `num_samples` images, at least one.

    Raises:
        ConfigError: as `num_steps`.
    """
    first = num_steps(config, num_samples)
    alone = dataclasses.replace(config, stages=()) if config.stages else config
    stages = [Stage(0, 0, first, alone)]
    for index, stage in enumerate(config.stages, start=1):
        start = stages[-1].stop
        stages.append(Stage(index, start, start + stage.steps, config_of_stage(config, stage, stage.steps / first)))
    return tuple(stages)


def stage_of_state(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that a state before update `step` belongs to; at the end of one, the one that has ended."""
    return next((stage for stage in stages if step <= stage.stop), stages[-1])
