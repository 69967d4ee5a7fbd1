"""The parts of `PretrainConfig` for stages behind the first: how long each is, and what is other in it. No torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from dino_core.config_checks import CheckedConfig, ConfigError, number

if TYPE_CHECKING:
    from dino_core.config import PretrainConfig


@dataclass(frozen=True, kw_only=True)
class StageCropsConfig(CheckedConfig):
    """Of `pretrain.crops`, in a stage. None keeps the run's."""

    path: ClassVar[str] = "pretrain.stages.crops"

    num_local_crops: int | None = number(None, ge=0)
    """Local crops per image."""
    global_size: int | None = number(None, ge=1)
    """Pixels per side; position embeddings are interpolated for it when the stage begins."""
    local_size: int | None = number(None, ge=1)
    """Pixels per side."""
    global_scale: tuple[float, float] | None = number(None, gt=0, le=1)
    """Smallest and largest share of the image's area."""
    local_scale: tuple[float, float] | None = number(None, gt=0, le=1)
    """Smallest and largest share of the image's area."""


@dataclass(frozen=True, kw_only=True)
class StageTeacherConfig(CheckedConfig):
    """Of `pretrain.teacher`, in a stage. None keeps the run's."""

    path: ClassVar[str] = "pretrain.stages.teacher"

    temp: float | None = number(None, gt=0)
    """Temperature after the warm-up."""
    warmup_temp: float | None = number(None, gt=0)
    """Temperature of the stage's first step."""
    warmup_temp_epochs: float | None = number(None, ge=0)
    """Epochs from one to the other; None: the run's, compressed."""
    momentum: float | None = number(None, ge=0, le=1)
    """EMA momentum at the stage's first step."""
    final_momentum: float | None = number(None, ge=0, le=1)
    """EMA momentum that the schedule approaches at the stage's end."""


@dataclass(frozen=True, kw_only=True)
class StageOptimConfig(CheckedConfig):
    """Of `pretrain.optim`, in a stage. None keeps the run's."""

    path: ClassVar[str] = "pretrain.stages.optim"

    lr: float | None = number(None, gt=0)
    """Peak learning rate, scaled by the batch size as the run's."""
    min_lr: float | None = number(None, ge=0)
    """Learning rate that the schedule approaches at the stage's end."""
    warmup_epochs: float | None = number(None, ge=0)
    """Linear warm-up from 0; None: the run's, compressed."""
    weight_decay: float | None = number(None, ge=0)
    """At the stage's first step."""
    final_weight_decay: float | None = number(None, ge=0)
    """Approached at the stage's end."""
    freeze_last_layer_epochs: float | None = number(None, ge=0)
    """Epochs in which the prototypes get no update; None: the run's, compressed."""


@dataclass(frozen=True, kw_only=True)
class StageConfig(CheckedConfig):
    """A stage behind the first of a run, such as DINOv2's last steps at a higher resolution: all schedules once more,
    in the time of the stage. Durations that are not given are the run's, shortened by the ratio of the steps."""

    path: ClassVar[str] = "pretrain.stages"

    steps: int = field(metadata={"ge": 1})
    """Length of the stage in optimiser steps, which follow those before it."""
    accumulate_steps: int | None = number(None, ge=1)
    """As `pretrain.accumulate_steps`, for larger crops in the same memory; None keeps the run's."""
    crops: StageCropsConfig = field(default_factory=StageCropsConfig)
    teacher: StageTeacherConfig = field(default_factory=StageTeacherConfig)
    optim: StageOptimConfig = field(default_factory=StageOptimConfig)


_DURATIONS = {"teacher": ("warmup_temp_epochs",), "optim": ("warmup_epochs", "freeze_last_layer_epochs")}
"""What is compressed unless a stage sets it."""


def config_of_stage(config: PretrainConfig, stage: StageConfig, compression: float) -> PretrainConfig:
    """The run that a stage is by itself.

    Args:
        compression: steps of the stage over those of the first.

    Raises:
        ConfigError: it makes no sense together.
    """
    changes: dict[str, Any] = {"stages": (), "steps": stage.steps, "epochs": None}
    if stage.accumulate_steps is not None:
        changes["accumulate_steps"] = stage.accumulate_steps
    for part in ("crops", "teacher", "optim"):
        old, new = getattr(config, part), getattr(stage, part)
        values = {name: getattr(old, name) * compression for name in _DURATIONS.get(part, ())}
        values |= {name: value for name, value in vars(new).items() if value is not None}
        changes[part] = dataclasses.replace(old, **values)
    return dataclasses.replace(config, **changes)


def stage_problems(config: PretrainConfig) -> list[str]:
    """What makes no sense in each stage together with the rest of the run."""
    problems = []
    for index, stage in enumerate(config.stages):
        try:
            config_of_stage(config, stage, 1.0)
        except ConfigError as error:
            problems += [f"stages[{index}]: {line}" for line in str(error).splitlines()]
    return problems
