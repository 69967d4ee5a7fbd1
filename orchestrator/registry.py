"""What reaches MLflow after a run or sweep rather than during it: checkpoints as artifacts, registered models, and all
that an earlier driver could not deliver."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_core.config import ConfigError
from orchestrator.config import RunConfig
from orchestrator.delivery import first_line
from orchestrator.errors import RunFailed
from orchestrator.mlflow_runs import runs_to_show
from orchestrator.overrides import override
from orchestrator.records import (
    CHECKPOINTS_DIR,
    FINAL_EVENTS,
    RUN_FILE,
    SWEEP_FILE,
    TARGET_FILE,
    TRIALS_DIR,
    RunRecord,
    read_json,
)
from orchestrator.runs import check_name, deliver_command, find_folder
from orchestrator.tracking import Delivered, Target, connect, deliver

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from orchestrator.compare import Row

BACKBONE_DIR = "backbone"
"""Artifact folder of the exported backbone."""
UPLOAD_TIMEOUT_S = "3600"
"""Of one file; deliveries during a run give up sooner, but nothing waits for these."""


@dataclass(frozen=True)
class Registered:
    """A version of a registered model."""

    model: str
    version: str
    trial: str
    is_new: bool
    """False: this checkpoint was registered under that name before."""

    def describe(self) -> str:
        """What was done and how to load it."""
        done = "registered as" if self.is_new else "is already"
        return (
            f"{self.trial} {done} version {self.version} of the model {self.model}; to load it:\n"
            f'  folder = mlflow.artifacts.download_artifacts("models:/{self.model}/{self.version}")\n'
            f'  model = timm.create_model(f"local-dir:{{folder}}", pretrained=True).eval()'
        )


def find_records(name: str, storage: str) -> Path:
    """The folder of a sweep or run, or of an evaluated target that is none, by its name or path.

    Raises:
        ConfigError: There is none.
    """
    for folder in (Path(storage) / name, Path(name)):
        if (folder / SWEEP_FILE).exists() or (folder / TARGET_FILE).exists():
            return folder.resolve()
    return find_folder(name, storage, "run")


def target_of(folder: Path, changes: Mapping[str, Any] | None = None) -> Target:
    """Where a folder's records go: as it was configured, unless `changes` says otherwise."""
    if (folder / TARGET_FILE).exists():
        recorded = override(RunConfig(), read_json(folder / TARGET_FILE)["tracking"])
    else:
        recorded = _config(_records(folder)[0])
    return Target.of(override(recorded, changes or {}).tracking)


def _experiment(folder: Path) -> str:
    if (folder / TARGET_FILE).exists():
        return str(read_json(folder / TARGET_FILE)["experiment"])
    return _records(folder)[0].experiment


def _records(folder: Path) -> list[RunRecord]:
    if (folder / SWEEP_FILE).exists():
        trials = read_json(folder / SWEEP_FILE)["trials"]
        return [RunRecord.read(folder / TRIALS_DIR / trial["trial_id"]) for trial in trials]
    return [RunRecord.read(folder)]


def _config(record: RunRecord) -> RunConfig:
    return override(RunConfig(), record.config)


@contextmanager
def _told(target: Target) -> Iterator[None]:
    """Errors of the store as `RunFailed`."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:  # the latter of uploads: requests' errors are among them
        raise RunFailed(f"MLflow at {target.shown}: {first_line(error)}") from error


@contextmanager
def _patient() -> Iterator[None]:
    """Uploads may take their time."""
    before = os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT")
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = UPLOAD_TIMEOUT_S
    try:
        yield
    finally:
        if before is None:
            del os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]
        else:
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = before


def deliver_all(folder: Path, target: Target) -> list[str]:
    """Deliver all that MLflow does not have yet of a sweep or run, checkpoints that were asked for included.

    Returns:
        What was left out, because somebody deleted it in MLflow.

    Raises:
        RunFailed: The store refused or cannot be reached.
    """
    with _told(target):
        client = connect(target)
        left_out = deliver(client, folder, _experiment(folder), target, first=True)
        upload_checkpoints(client, folder, target)
    return left_out


def upload_when_asked(folder: Path, config: RunConfig, target: Target) -> None:
    """At the end of a run or sweep: its checkpoints, if `tracking.checkpoints` asks for them. Says so if it cannot."""
    if config.tracking.checkpoints == "none":
        return
    print(f"uploading the last checkpoints to MLflow at {target.shown}", flush=True)
    try:
        deliver_all(folder, target)
    except RunFailed as error:
        print(f"{error}; later: {deliver_command(folder)}", flush=True)


def upload_checkpoints(client: MlflowClient, folder: Path, target: Target) -> None:
    """The newest whole checkpoint of every run that ended and has `tracking.checkpoints = last`, once."""
    for run in runs_to_show(folder):
        if not (run.folder / RUN_FILE).exists() or run.state.event not in FINAL_EVENTS:
            continue
        state = Delivered.load(run.folder, target)
        if state is None or _config(RunRecord.read(run.folder)).tracking.checkpoints != "last":
            continue
        from dino_core.checkpoint import latest_checkpoint  # imports torch

        checkpoint = latest_checkpoint(run.folder / CHECKPOINTS_DIR)
        if checkpoint is None or f"{CHECKPOINTS_DIR}/{checkpoint.name}" in state.artifacts:
            continue
        with _patient():
            client.log_artifacts(state.run_id, str(checkpoint), f"{CHECKPOINTS_DIR}/{checkpoint.name}")
        state.artifacts[f"{CHECKPOINTS_DIR}/{checkpoint.name}"] = checkpoint.stat().st_mtime
        state.save(run.folder)


def register_best(folder: Path, model: str, target: Target) -> Registered:
    """Make the teacher's backbone of a sweep's best trial (or of a run) a new version of a registered model.

    The best is the first of the sweep's comparison that finished and is healthy. Its backbone is exported to the run's
    artifacts as safetensors in the layout that timm loads; nothing in it is executed on loading.

    Raises:
        RunFailed: No trial qualifies, it has no whole checkpoint, or the store refused or cannot be reached.
    """
    from orchestrator.summary import Summary

    summary = Summary.of(folder, target)
    best, metric = summary.best, summary.comparison.metric
    if best is None:
        raise RunFailed(f"{folder.name}: nothing to register: none finished healthy with a value of {metric}")
    run_dir = folder / TRIALS_DIR / best.trial.name if (folder / SWEEP_FILE).exists() else folder
    deliver_all(folder, target)
    state = Delivered.load(run_dir, target)
    assert state is not None, "it was delivered"

    from dino_core.checkpoint import CheckpointError, latest_checkpoint  # imports torch
    from dino_core.export import ExportError, export_backbone

    checkpoint = latest_checkpoint(run_dir / CHECKPOINTS_DIR)
    if checkpoint is None:
        raise RunFailed(f"{best.trial.name}: no checkpoint in {run_dir / CHECKPOINTS_DIR} is whole")
    with _told(target), _patient(), tempfile.TemporaryDirectory() as temporary:
        client = connect(target)
        known = _version_of(client, model, state.run_id, checkpoint.name)
        if known is not None:
            return Registered(model, known, best.trial.name, is_new=False)
        place = f"{BACKBONE_DIR}/{checkpoint.name}"
        try:
            export_backbone(checkpoint, "hf", Path(temporary) / checkpoint.name)
        except (ExportError, CheckpointError) as error:
            raise RunFailed(f"{best.trial.name}: {error}") from error
        client.log_artifacts(state.run_id, str(Path(temporary) / checkpoint.name), place)
        version = _create_version(client, model, state.run_id, place, _tags(best, run_dir, checkpoint, metric))
    return Registered(model, version, best.trial.name, is_new=True)


def _tags(best: Row, run_dir: Path, checkpoint: Path, metric: str) -> dict[str, str]:
    record = RunRecord.read(run_dir)
    tags = {
        "trial": best.trial.name,
        "sweep": record.sweep or "",
        "recipe": record.recipe,
        "checkpoint": checkpoint.name,
        "backbone": str(record.config["pretrain.model.backbone"]),
        "data_digest": record.data_digest or "",
        "git_commit": record.git_commit or "",
    }
    if best.value is not None:
        tags |= {"metric": metric, "value": repr(best.value), "value_step": str(best.step)}
    return {name: value for name, value in tags.items() if value}


def _version_of(client: MlflowClient, model: str, run_id: str, checkpoint: str) -> str | None:
    versions = client.search_model_versions(f"name = '{model}'")
    return next(
        (str(v.version) for v in versions if v.run_id == run_id and v.tags.get("checkpoint") == checkpoint), None
    )


def _create_version(client: MlflowClient, model: str, run_id: str, place: str, tags: dict[str, str]) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # The run's own artifact address: a server takes no other place for a version of that run.
    source = f"{client.get_run(run_id).info.artifact_uri.rstrip('/')}/{place}"
    description = f"timm backbone {tags['backbone']}, teacher at {tags['checkpoint']}; see README.md in its files"
    return str(client.create_model_version(model, source, run_id, tags, description=description).version)


def check_model_name(model: str) -> None:
    """Raise ConfigError if the name cannot be a registered model's."""
    try:
        check_name(model)
    except ConfigError as error:
        raise ConfigError(f"model {error}") from error
