"""A frozen teacher from a checkpoint, for the distillation of a smaller student (DINOv2, arXiv 2304.07193, section 5).

The losses are those of any run. What is other: targets come from the teacher of an earlier run with its heads, which
never moves, while the moving average of the student's weights, the teacher of other runs, is only kept.
No torch here until something is loaded.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

from dino_core.config import ConfigError, PretrainConfig

if TYPE_CHECKING:
    from dino_core.networks import CropNetwork

_KEY = "pretrain.teacher.checkpoint"
_STATE_FILE, _MANIFEST_FILE, _MODEL_FILE = "state.json", "MANIFEST.json", "model.safetensors"
T = TypeVar("T")


def read_teacher_config(checkpoint: str) -> PretrainConfig:
    """The configuration that a checkpoint's networks were built by.

    Raises:
        ConfigError: it is no checkpoint of a run, or one of another release.
    """
    path = Path(checkpoint)
    if not (path / _STATE_FILE).is_file():
        what = "is a file without configuration and heads" if path.is_file() else "is no checkpoint of a run"
        raise ConfigError(
            f"{_KEY} = {checkpoint}: {what}; must be a folder that a run has written, such as runs/NAME/checkpoints/"
            "step_00000500, for the teacher's heads are needed"
        )
    try:
        stored = json.loads((path / _STATE_FILE).read_text())["config"]
        return _from_json(PretrainConfig, stored)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{_KEY} = {checkpoint}: is damaged or of another release: {error}") from error


def check_teacher(config: PretrainConfig) -> None:
    """Compare the heads and patches of the frozen teacher, if the run has one, with those of the student.

    Raises:
        ConfigError: as `read_teacher_config`, or they do not fit.
    """
    if config.teacher.checkpoint is None:
        return
    theirs = read_teacher_config(config.teacher.checkpoint)
    problems = []
    where = f"the frozen teacher of {_KEY} = {config.teacher.checkpoint}"
    if config.loss.weight and not theirs.loss.weight:
        problems.append(f"pretrain.loss.weight = {config.loss.weight:g}: must be 0, {where} has no outputs of images")
    elif config.loss.weight and config.head.num_prototypes != theirs.head.num_prototypes:
        problems.append(
            f"pretrain.head.num_prototypes = {config.head.num_prototypes}: must be {theirs.head.num_prototypes}, that "
            f"of {where}"
        )
    elif config.loss.weight and _out_dim(config) != _out_dim(theirs):
        problems.append(
            f"pretrain.head.bottleneck_dim = {config.head.bottleneck_dim}: must be {_out_dim(theirs)}, as wide as the "
            f"head of {where}"
        )
    if config.ibot.weight and not theirs.ibot.weight:
        problems.append(f"pretrain.ibot.weight = {config.ibot.weight:g}: must be 0, {where} has learned no patches")
    elif config.ibot.weight and (own := _patch_dim(config)) != (needed := _patch_dim(theirs)):
        key = "ibot.num_prototypes" if config.ibot.head == "untied" else "head.num_prototypes"
        problems.append(f"pretrain.{key} = {own}: must be {needed}, as wide as the patches' head of {where}")
    if problems:
        raise ConfigError("\n".join(problems))


def _out_dim(config: PretrainConfig) -> int:
    return config.head.num_prototypes or config.head.bottleneck_dim


def _patch_dim(config: PretrainConfig) -> int | None:
    own = config.ibot.num_prototypes if config.ibot.head == "untied" else None
    return own or config.head.num_prototypes


def teacher_digest(checkpoint: str) -> str:
    """SHA-256 of the checkpoint's weights, as its manifest has it.

    Raises:
        ConfigError: there is no whole manifest.
    """
    try:
        content = json.loads((Path(checkpoint) / _MANIFEST_FILE).read_text())
        return str(content["files"][_MODEL_FILE]["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{_KEY} = {checkpoint}: has no whole {_MANIFEST_FILE}") from error


def build_frozen_teacher(config: PretrainConfig, student: CropNetwork) -> CropNetwork:
    """The network of the teacher of `config.teacher.checkpoint`, with random weights from torch's global RNG.

    It is in evaluation mode without gradients, for crops of the run's size.

    Raises:
        ConfigError: it does not fit the student, or not the crops.
    """
    from dino_core.networks import build_student, build_teacher

    assert config.teacher.checkpoint is not None
    check_teacher(config)
    theirs = read_teacher_config(config.teacher.checkpoint)
    only_global = dataclasses.replace(theirs, crops=dataclasses.replace(theirs.crops, num_local_crops=0))
    network = build_teacher(build_student(only_global), theirs).eval()
    if student.grid is not None:
        from dino_core.patch_tokens import count_patches

        side = config.crops.global_size
        found = count_patches(network.backbone, side)
        if found != student.grid:
            raise ConfigError(
                f"pretrain.crops.global_size = {side}: gives the frozen teacher of {_KEY} = "
                f"{config.teacher.checkpoint} {found[0]} x {found[1]} patches and the student {student.grid[0]} x "
                f"{student.grid[1]}; both must have patches of the same size"
            )
    _check_size(network, config)
    return network


def _check_size(network: CropNetwork, config: PretrainConfig) -> None:
    from dino_core.backbones import try_images

    size = config.crops.global_size
    try:
        try_images(network.backbone, size)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"pretrain.crops.global_size = {size}: the frozen teacher of {_KEY} = {config.teacher.checkpoint} does not "
            f"take it: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def load_frozen_teacher(config: PretrainConfig, student: CropNetwork) -> CropNetwork:
    """The teacher of `config.teacher.checkpoint` with its weights; torch's global RNG is left as it was found.

    Raises:
        ConfigError: as `build_frozen_teacher`; the checkpoint is damaged, or its networks are not those of its
            configuration.
    """
    import torch
    from safetensors.torch import load_file

    from dino_core.checkpoint import CheckpointError, verify_checkpoint

    assert config.teacher.checkpoint is not None
    check_teacher(config)
    path = Path(config.teacher.checkpoint)
    try:
        verify_checkpoint(path)
    except CheckpointError as error:
        raise ConfigError(f"{_KEY} = {path}: {error}") from error
    with torch.random.fork_rng(devices=[]):
        network = build_frozen_teacher(config, student)
    prefix = "teacher."
    tensors = load_file(path / _MODEL_FILE).items()
    try:
        network.load_state_dict({name.removeprefix(prefix): t for name, t in tensors if name.startswith(prefix)})
    except RuntimeError as error:  # a run with a backbone of one's own
        raise ConfigError(f"{_KEY} = {path}: is not the network of its configuration: {error}") from error
    return network


def _from_json(kind: type[T], stored: dict[str, Any]) -> T:
    """A configuration class from the dictionary of `dataclasses.asdict` after JSON, where tuples are lists."""
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        if item.name not in stored:  # of an earlier release, that did as the default does
            continue
        value, hint = stored[item.name], hints[item.name]
        if dataclasses.is_dataclass(hint):
            value = _from_json(hint, value)  # type: ignore[arg-type]
        elif isinstance(value, list):
            inner = get_args(hint)[:1]
            listed = item.metadata.get("listed", False)
            value = tuple(_from_json(inner[0], element) if listed else element for element in value)
        values[item.name] = value
    return kind(**values)
