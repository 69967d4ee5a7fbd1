"""The command `export`: from the name of a run to the checkpoint that is meant; `dino_core.export` does the rest."""

from __future__ import annotations

from pathlib import Path

from dino_core.config import ConfigError
from dino_core.export import Export, ExportError, Format, Network, check_target, export_backbone
from orchestrator.config import RunConfig
from orchestrator.records import CHECKPOINTS_DIR, SWEEP_FILE, TRIALS_DIR
from orchestrator.runs import find_folder

_CHECKPOINTS = "step_*"
_MANIFEST_FILE = "MANIFEST.json"  # that of dino_core.checkpoint, which imports torch


def export(run: str, to: Format, folder: Path, network: Network) -> Export:
    """Write the backbone of a run's newest whole checkpoint, or of the one that is named, into `folder`.

    Args:
        run: a name in the storage folder, the path of a run, or the path of a checkpoint.

    Raises:
        ConfigError: there is no such run, it has no checkpoint, or its backbone cannot be written there.
    """
    place = find_checkpoints(run, RunConfig().cluster.storage)
    try:
        check_target(to, folder)
    except ExportError as error:
        raise ConfigError(str(error)) from error

    from dino_core.checkpoint import CheckpointError  # imports torch

    checkpoint = newest_whole(run, place)
    try:
        return export_backbone(checkpoint, to, folder, network=network)
    except (ExportError, CheckpointError) as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror}") from error


def find_checkpoints(run: str, storage: str) -> Path:
    """The checkpoint that is meant, or the folder of a run's checkpoints. Imports no torch.

    Args:
        run: a name in the storage folder, the path of a run, or the path of a checkpoint.
        storage: `cluster.storage`.

    Raises:
        ConfigError: there is no such run, it has no checkpoint, or it is a sweep.
    """
    path = Path(run)
    if path.is_dir() and (path.match(_CHECKPOINTS) or (path / _MANIFEST_FILE).exists()):
        return path.resolve()
    for folder in (Path(storage) / run, path):
        if (folder / SWEEP_FILE).exists():
            trials = sorted((folder / TRIALS_DIR).glob("*/"))
            example = f", such as {trials[0]}" if trials else ""
            raise ConfigError(f"{run}: is a sweep; name one of its trials{example}")
    place = find_folder(run, storage, "run") / CHECKPOINTS_DIR
    if not any(place.glob(_CHECKPOINTS)):
        raise ConfigError(
            f"{run}: has no checkpoint yet; they come every pretrain.checkpoint_every_steps and at the end"
        )
    return place


def newest_whole(run: str, place: Path) -> Path:
    """Of what `find_checkpoints` found, the checkpoint that is named or the newest that is whole.

    Raises:
        ConfigError: none is whole.
    """
    from dino_core.checkpoint import latest_checkpoint  # imports torch

    checkpoint = latest_checkpoint(place) if place.name == CHECKPOINTS_DIR else place
    if checkpoint is None:
        raise ConfigError(f"{run}: no checkpoint in {place} is whole")
    return checkpoint
