"""What the command line can call a target. Imports no torch, so that a wrong name is told at once.

::

    RUN                 the newest whole checkpoint of a run, by the run's name or folder
    CHECKPOINT          the folder of a checkpoint
    FILE                weights that the authors of DINO or DINOv2 released (.pth, .pt, .safetensors)
    NAME                a timm model with its pretrained weights; also local-dir:FOLDER and hf-hub:OWNER/NAME
    random:NAME         the architecture of a run, a checkpoint or a timm name, with random weights
    pixels              the pixels themselves
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dino_core.backbone_names import backbone_names, check_backbone_name
from dino_core.config import ConfigError
from orchestrator.export import find_checkpoints
from orchestrator.overrides import did_you_mean
from orchestrator.records import RUN_FILE

PIXELS = "pixels"
RANDOM = "random:"
OF_TIMM = ("local-dir:", "hf-hub:")
_RELEASED = (".pth", ".pt", ".safetensors")


@dataclass(frozen=True)
class Named:
    """What a name means."""

    name: str
    """As it was given."""
    kind: Literal["pixels", "checkpoint", "released", "timm"]
    place: Path | None = None
    """The checkpoint, or the folder of a run's checkpoints."""

    @property
    def is_random(self) -> bool:
        """Whether only its architecture is meant."""
        return self.name.startswith(RANDOM)

    @property
    def inner(self) -> str:
        """The name without `random:`."""
        return self.name.removeprefix(RANDOM)

    @property
    def checkpoints(self) -> Path:
        assert self.place is not None
        return self.place


def resolve(name: str, storage: str) -> Named:
    """What a target's name means; a folder comes before a timm model of that name.

    Args:
        storage: `cluster.storage`, where names of runs are looked for.

    Raises:
        ConfigError: Nothing (naming the nearest), a run without checkpoints, or a sweep.
    """
    inner = name.removeprefix(RANDOM)
    if name == PIXELS:
        return Named(name, "pixels")
    if any(path.is_dir() for path in (Path(storage) / inner, Path(inner))):
        return Named(name, "checkpoint", find_checkpoints(inner, storage))
    if name.startswith(OF_TIMM):
        return Named(name, "timm")
    if Path(name).suffix in _RELEASED and inner == name:
        if not Path(name).is_file():
            raise ConfigError(f"{name}: no such file")
        return Named(name, "released")
    try:
        # A tag behind the dot says which weights.
        check_backbone_name(inner if name != inner else inner.partition(".")[0])
    except ConfigError as error:
        runs = [path.parent.name for path in Path(storage).glob(f"*/{RUN_FILE}")]
        near = did_you_mean(inner, [*runs, *backbone_names(), PIXELS])
        raise ConfigError(
            f"no run in {storage}, checkpoint, or timm model {inner!r}{near}; see docs/evaluation.md"
        ) from error
    return Named(name, "timm")
