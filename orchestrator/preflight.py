"""What can be known to fail before anything starts, from names and sizes alone: no torch, no ray, no data."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from dino_core.backbone_names import check_backbone_name, setting_problems, sizing
from dino_core.config import ConfigError, CropsConfig
from dino_core.config_stages import config_of_stage
from dino_core.distillation import check_teacher
from dino_core.schedules import build_schedules
from dino_core.stages import stages_of
from orchestrator.config import DataConfig, RunConfig
from orchestrator.ray_cluster import Capacity, check_fits_before_start

if TYPE_CHECKING:
    from orchestrator.data.split import Source

logger = logging.getLogger(__name__)


def model_problems(config: RunConfig) -> list[str]:
    """A line for each thing that the backbone, its crops and the workers cannot do together."""
    model, crops = config.pretrain.model, config.pretrain.crops
    try:
        check_backbone_name(model.backbone)
    except ConfigError as error:
        return [str(error)]
    problems = setting_problems(model)
    kind = sizing(model.backbone)
    if kind.multiples_of_patch:
        named = re.search(r"patch(\d+)", model.backbone)
        patch = model.patch_size or (int(named[1]) if named else 1)
        sizes = [(f"pretrain.crops.{name}", getattr(crops, name)) for name in _sizes_used(crops)]
        for place, stage in enumerate(config.pretrain.stages):
            own = config_of_stage(config.pretrain, stage, 1.0).crops
            sizes += [(f"pretrain.stages[{place}].crops.{name}", getattr(own, name)) for name in _sizes_used(own)]
        for key, size in sizes:
            if size % patch:
                problems.append(f"{key} = {size}: must be a multiple of the patch size {patch}")
    return problems


def _sizes_used(crops: CropsConfig) -> tuple[str, ...]:
    return ("global_size", "local_size") if crops.num_local_crops else ("global_size",)


def check_launcher(config: RunConfig) -> None:
    """Raise ConfigError if a single run asks for the launcher of sweeps."""
    if config.cluster.launcher == "trial":
        raise ConfigError("cluster.launcher = trial: is for the trials of a sweep; must be local or train for one run")


def check_model(config: RunConfig) -> None:
    """Raise ConfigError with all of `model_problems`."""
    problems = model_problems(config)
    if problems:
        raise ConfigError("\n".join(problems))


def open_sources(
    configs: Iterable[RunConfig], opened: Mapping[DataConfig, Source] | None = None
) -> dict[DataConfig, Source]:
    """The sources of all runs, after checking that each run fits its data and, where it starts Ray here, this machine.

    Those among `opened` are not opened again, and then no warning is given of what can run but is odd.
    Raises ConfigError with the problems of all runs.
    """
    from orchestrator.data.plan import index_plan  # imports numpy
    from orchestrator.data.sources import open_source

    sources: dict[DataConfig, Source] = dict(opened or {})
    broken: set[DataConfig] = set()
    problems: list[str] = []
    notes: list[str] = []
    for config in configs:
        try:
            _check_fits(config)
            if config.data not in sources and config.data not in broken:
                broken.add(config.data)
                sources[config.data] = open_source(config.data)
                broken.remove(config.data)
            if config.data in sources:
                notes += build_schedules(config.pretrain, sources[config.data].num_samples).notes
                index_plan(config, sources[config.data].train)
                _check_teacher(config)
                _check_stages(config, sources[config.data].num_samples)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    for note in dict.fromkeys(notes) if opened is None else ():
        logger.warning(note)
    return sources


def _check_teacher(config: RunConfig) -> None:
    """Raise ConfigError if there is no frozen teacher where one is named, or it does not fit the student."""
    if config.pretrain.teacher.checkpoint is not None:
        from orchestrator.runs import with_teacher  # imports what few runs need

        check_teacher(with_teacher(config).pretrain)


def _check_stages(config: RunConfig, num_samples: int) -> None:
    """Raise ConfigError if the networks of one stage cannot go on in the next; imports torch if there are several."""
    if config.pretrain.stages:
        from dino_core.resolution import check_stages

        check_stages(stages_of(config.pretrain, num_samples))


def _check_fits(config: RunConfig) -> None:
    _check_storage(config.cluster.storage)
    if config.cluster.launcher == "local":
        if config.cluster.use_gpu and not Capacity.of_this_machine().gpus:
            raise ConfigError("cluster.use_gpu = True: this machine has no GPU; must be false")
        return
    try:
        check_fits_before_start(config)
    except ConfigError as error:
        raise ConfigError(f"{error}; if another cluster is meant, name it by cluster.address") from error


def _check_storage(storage: str) -> None:
    """Raise ConfigError if no folder can be made there; makes none."""
    folder = os.path.abspath(storage)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        reason = "cannot be written" if os.path.isdir(folder) else "is no folder"
        raise ConfigError(f"cluster.storage = {storage}: {folder} {reason}; must be a folder, or a place for a new one")
