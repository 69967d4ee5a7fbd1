"""Run folders: their names, what is written into them before a run starts, and finding them again."""

from __future__ import annotations

import difflib
import re
import secrets
import shlex
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_core.config import ConfigError
from dino_core.schedules import build_schedules
from orchestrator.config import RunConfig
from orchestrator.overrides import flatten, override
from orchestrator.records import RUN_FILE, SWEEP_FILE, RunRecord, Segment

if TYPE_CHECKING:
    from orchestrator.data.sources import Source


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    trial_id: str
    """The same for the same values and seed; letters, digits, '.', '_' and '-' only."""
    changes: dict[str, Any]
    """What its row sets and the varied keys with their values, without the seed."""
    seed: int
    config: RunConfig
    row: str | None = None
    method: str | None = None
    paper: Mapping[str, float] = field(default_factory=dict)
    segment: Segment | None = None
    """Which part of a run it is, in population-based training."""


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_name(name: str) -> str:
    """The name, if it can be a folder's.

    Raises:
        ConfigError: It has other characters than letters, digits, '.', '_' and '-', or is too long.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"name {name!r}: must be 1 to 100 letters, digits, '.', '_' or '-', and open with no mark")
    return name


def new_name(prefix: str) -> str:
    """A name that no earlier run has: the recipe or sweep, the time, and four random digits."""
    return check_name(f"{prefix[:60]}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")


def find_folder(name: str, storage: str, kind: str) -> Path:
    """The folder of an earlier run or sweep, by its name in `storage` or by its path.

    Args:
        name: As printed when it began, or a path to the folder.
        storage: `cluster.storage`.
        kind: "run" or "sweep".

    Raises:
        ConfigError: There is none; names the nearest.
    """
    marker = SWEEP_FILE if kind == "sweep" else RUN_FILE
    for folder in (Path(storage) / name, Path(name)):
        if (folder / marker).exists():
            return folder.resolve()
    there = sorted(path.parent.name for path in Path(storage).glob(f"*/{marker}"))
    near = difflib.get_close_matches(name, there, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else f"; there are {len(there)} in {storage}"
    raise ConfigError(f"no {kind} {name!r} in {storage}{hint}")


def prepare_run(
    config: RunConfig,
    source: Source,
    *,
    run_id: str,
    recipe: str,
    experiment: str,
    data_digest: str,
    commit: str | None,
    method: str | None = None,
    trial: Trial | None = None,
    sweep: str | None = None,
    paper_setting: str = "",
    stop_collapsed: bool = False,
) -> RunRecord:
    """The record of a run that is to start. Computes what follows from the configuration and the data.

    Args:
        data_digest: `source.digest()`, which may have to look at every file, so that trials share one.
        commit: `git_commit()`.
        trial: What the run is in the sweep of that name, if it is a part of one.
        stop_collapsed: Whether the run is to be ended when it has collapsed.

    Raises:
        ConfigError: The run has no step.
    """
    schedules = build_schedules(config.pretrain, len(source.train))
    derived = {
        "total_steps": schedules.total_steps,
        "steps_per_epoch": schedules.steps_per_epoch,
        "peak_lr": schedules.peak_lr,
        "first_momentum": schedules.momentum(0),
        "num_samples": len(source.train),
        "batch_size_per_worker": config.pretrain.batch_size // config.cluster.num_workers,
    }
    return RunRecord(
        run_id=run_id,
        experiment=experiment,
        recipe=recipe,
        seed=config.pretrain.seed,
        config=flatten(with_absolute_paths(config)),
        changes=dict(trial.changes) if trial else {},
        derived={name: float(value) for name, value in derived.items()},
        sweep=sweep,
        row=trial.row if trial else None,
        method=trial.method if trial else method,
        paper=dict(trial.paper) if trial else {},
        paper_setting=paper_setting,
        stop_collapsed=stop_collapsed,
        segment=trial.segment if trial else None,
        git_commit=commit,
        data_digest=data_digest,
        data={
            "kind": source.kind,
            "num_train": len(source.train),
            "num_test": len(source.test) if source.test is not None else 0,
            "num_classes": len(source.classes),
        },
    )


def length_in_words(record: RunRecord) -> str:
    """How long a run is, in steps and in epochs, whichever was asked for."""
    steps, per_epoch = record.derived["total_steps"], record.derived["steps_per_epoch"]
    return f"{steps:,.0f} steps = {steps / per_epoch:,.4g} epochs of {record.derived['num_samples']:,.0f} images"


def with_teacher(config: RunConfig) -> RunConfig:
    """The same run, with the checkpoint itself where `pretrain.teacher.checkpoint` names a run.

    Raises:
        ConfigError: there is none, or not a whole one.
    """
    from dino_core.distillation import read_teacher_config
    from orchestrator.export import find_checkpoints, newest_whole  # imports this module

    name = config.pretrain.teacher.checkpoint
    if name is None:
        return config
    if Path(name).is_file():
        read_teacher_config(name)  # says what is wrong with that
    try:
        found = str(newest_whole(name, find_checkpoints(name, config.cluster.storage)))
    except ConfigError as error:
        raise ConfigError(f"pretrain.teacher.checkpoint = {name}: {error}") from error
    return override(config, {"pretrain.teacher.checkpoint": found})


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same run, wherever its processes stand: relative paths are taken from here."""
    from orchestrator.data.sources import TORCHVISION, absolute_source  # imports numpy

    config = with_teacher(config)
    source, cache = config.data.source, config.cluster.decoded_cache_dir
    changes = {
        "cluster.storage": str(Path(config.cluster.storage).resolve()),
        "data.source": absolute_source(source),
    }
    if source.startswith(TORCHVISION):
        changes["data.root"] = str(Path(config.data.root).expanduser().resolve())
    if cache is not None:
        changes["cluster.decoded_cache_dir"] = str(Path(cache).expanduser().resolve())
    return override(config, changes)


_MAY_CHANGE = "pretrain.parallel_strategy"
"""How a run is computed rather than what."""


def resumed_record(record: RunRecord, changes: Mapping[str, Any]) -> RunRecord:
    """The record of a run that goes on, with another cluster, tracking or parallel strategy if wished.

    Raises:
        ConfigError: A change would alter what is computed.
    """
    fixed = [key for key in changes if key.split(".")[0] not in ("cluster", "tracking") and key != _MAY_CHANGE]
    if fixed:
        raise ConfigError(
            f"{fixed[0]}: a resumed run computes what it began; only cluster.*, tracking.* and {_MAY_CHANGE} can change"
        )
    config = override(override(RunConfig(), record.config), changes)
    return replace(record, config=flatten(with_absolute_paths(config)))


def check_same_images(record: RunRecord, data_digest: str) -> None:
    """Raise ConfigError if the source is not what it was when the run began."""
    if data_digest != record.data_digest:
        raise ConfigError(
            f"data.source = {record.config['data.source']}: other images than when {record.run_id} began; "
            "a resumed run computes what it began"
        )


def resume_command(kind: str, folder: Path) -> str:
    """What to type to go on with an interrupted run or sweep."""
    return _command("sweep" if kind == "sweep" else "pretrain", "--resume", folder=folder)


def deliver_command(folder: Path) -> str:
    """What to type to give MLflow the rest of the record of a run or sweep."""
    return _command("deliver", folder=folder)


def _command(*command: str, folder: Path) -> str:
    words = ["python", "-m", "orchestrator", *command, folder.name]
    storage, here = folder.parent, Path.cwd()
    if storage != here / "runs":
        words.append(f"cluster.storage={storage.relative_to(here) if storage.is_relative_to(here) else storage}")
    return shlex.join(words)


def git_commit() -> str | None:
    """The commit of the working directory, with "-dirty" behind it if files differ; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
