"""Trials as MLflow tells of them: from a tracking server or a store's file alone, on any machine, without Ray."""

from __future__ import annotations

import difflib
import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import tracking
from orchestrator.config import TrackingConfig
from orchestrator.lineage import newest_segments
from orchestrator.metric_choice import best_mode
from orchestrator.records import SWEEP_FILE, Segment, read_json
from orchestrator.trials import (
    PICTURES_DIR,
    SEED_KEY,
    CompareError,
    Curve,
    Pictures,
    TrialSummary,
    picture_step,
    png_files,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

_STATUS = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "interrupted", "RUNNING": "running"}
_INFINITY = 1.7976931348623157e308  # what MLflow stores in place of infinity
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_PARENT_TAG = "mlflow.parentRunId"
_CALLS_AT_ONCE = 8
"""A history is a call for each metric of each run, and most of its time is waiting for a server."""
_SYSTEM = "system/"
"""MLflow's own metrics of the machine, which no comparison shows."""


def read_trials(name: str, uri: str | None = None) -> list[TrialSummary]:
    """The runs of an experiment without the parents of its sweeps; else the run, or the trials of the sweep, of that id
    or name.

    Args:
        name: Of the experiment; the id of a run; or the name of a run or sweep.
        uri: Of the store; None is `tracking.Target`'s default.

    Raises:
        CompareError: The store does not exist or cannot be read, there is nothing of that name (naming the nearest), or
            it holds no run.
    """
    target = tracking.Target.of(TrackingConfig(uri=uri))
    if target.uri.startswith("sqlite:///") and not Path(target.uri.removeprefix("sqlite:///")).is_file():
        raise CompareError(
            f"{name}: no such folder of a run or sweep, and no MLflow store at {target.uri} yet; "
            "the first run creates it"
        )
    from mlflow.exceptions import MlflowException

    try:
        trials = _read(tracking.connect(target), name, target)
    except MlflowException as error:
        said = str(error.message).replace(target.uri, _without_login(target.uri))
        raise CompareError(f"cannot read {name!r} from {_without_login(target.uri)}: {said}") from error
    if not trials:
        raise CompareError(f"{name!r} has no runs yet")
    return trials


def _read(client: MlflowClient, name: str, target: tracking.Target) -> list[TrialSummary]:
    experiments = {found.experiment_id: found.name for found in _all_experiments(client)}
    runs = _find_runs(client, name, experiments)
    parents = {run.info.run_id: run for run in runs if run.data.tags.get("kind") == "sweep"}
    parents |= {run.info.run_id: run for run in _parents_of(client, runs, parents)}
    trials = [run for run in runs if run.info.run_id not in parents]
    calls = [(run.info.run_id, key) for run in trials for key in run.data.metrics if not key.startswith(_SYSTEM)]
    with ThreadPoolExecutor(_CALLS_AT_ONCE) as pool:
        histories = dict(zip(calls, pool.map(lambda call: _read_curve(client, *call), calls), strict=True))
    definitions = {run_id: _definition_of(client, parent) for run_id, parent in parents.items()}
    summaries = []
    for run in trials:
        curves = {
            key: histories[run.info.run_id, key] for key in run.data.metrics if (run.info.run_id, key) in histories
        }
        definition = definitions.get(run.data.tags.get(_PARENT_TAG, ""))
        summaries.append(_summary(run, definition, curves, experiments.get(run.info.experiment_id, ""), client, target))
    return newest_segments(summaries)


def _all_experiments(client: MlflowClient) -> Iterator[Experiment]:
    token: str | None = None
    while True:
        page = client.search_experiments(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _find_runs(client: MlflowClient, name: str, experiments: dict[str, str]) -> list[Run]:
    """The runs that a name stands for, oldest first."""
    ids = [experiment for experiment, named in experiments.items() if named == name]
    if ids:
        return _search_runs(client, ids)
    quoted = name.replace("'", "")
    field = "run_id" if _RUN_ID.fullmatch(name) else "run_name"
    found = _search_runs(client, list(experiments), f"attributes.{field} = '{quoted}'") if experiments else []
    if not found:
        raise CompareError(_unknown(name, experiments.values()))
    runs = []
    for run in found:
        children = f"tags.`{_PARENT_TAG}` = '{run.info.run_id}'"
        runs += [run, *_search_runs(client, [run.info.experiment_id], children)]
    return runs


def _parents_of(client: MlflowClient, runs: Iterable[Run], known: Iterable[str]) -> Iterator[Run]:
    """The parents that runs name, those that a search did not find among them too."""
    by_id = {run.info.run_id: run for run in runs}
    for parent in dict.fromkeys(run.data.tags.get(_PARENT_TAG, "") for run in by_id.values()):
        if parent and parent not in known:
            yield by_id.get(parent) or client.get_run(parent)


def _unknown(name: str, experiments: Iterable[str]) -> str:
    names = list(experiments)
    near = difflib.get_close_matches(name, names, n=3) or sorted(names)[:10]
    return f"no experiment {name!r}; " + (f"there is {', '.join(map(repr, near))}" if near else "there is none yet")


def _search_runs(client: MlflowClient, experiments: list[str], query: str = "") -> list[Run]:
    """By their start and, where several started in one millisecond, by their names."""
    found: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(experiments, query, page_token=token)
        found += page
        token = page.token
        if not token:
            return sorted(found, key=lambda run: (run.info.start_time, run.info.run_name or ""))


def _read_curve(client: MlflowClient, run_id: str, metric: str) -> Curve:
    points = {point.step: point.value for point in client.get_metric_history(run_id, metric)}
    return sorted(
        (step, math.copysign(math.inf, value) if abs(value) >= _INFINITY else value) for step, value in points.items()
    )


def _summary(
    run: Run,
    definition: dict[str, Any] | None,
    curves: dict[str, Curve],
    experiment: str,
    client: MlflowClient,
    target: tracking.Target,
) -> TrialSummary:
    params, tags = dict(run.data.params), run.data.tags
    status = _STATUS.get(run.info.status, "not started")
    if status == "finished" and tags.get("ended") == "stopped":
        status = "stopped"
    seed = params.get(SEED_KEY)
    return TrialSummary(
        run_id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        status=status,
        params=params,
        seed=int(seed) if seed is not None else None,
        curves=curves,
        reason=tags.get("reason", "") if status not in ("finished", "running") else "",
        experiment=experiment,
        sweep=tags.get("sweep", ""),
        git_commit=tags.get("git_commit") or tags.get("mlflow.source.git.commit"),
        data_digest=tags.get("data_digest"),
        uri=page_of(run, target.uri),
        record_name=tags.get(tracking.RUN_ID_TAG, ""),
        definition=definition,
        load_pictures=partial(_load_pictures, client, run.info.run_id),
        segment=_segment(tags),
    )


def _segment(tags: Mapping[str, str]) -> Segment | None:
    """Which part of a run it is, of a trial in population-based training."""
    if "generation" not in tags:
        return None
    numbers = {name: int(tags[name]) for name in ("member", "generation", "start_step", "stop_step")}
    return Segment(**numbers, parent=tags.get("parent"))


def _definition_of(client: MlflowClient, parent: Run) -> dict[str, Any] | None:
    """The definition of a sweep, as its parent run holds it; of one that could not keep files, its metric."""
    from mlflow.exceptions import MlflowException

    try:
        with tempfile.TemporaryDirectory() as folder:
            return read_json(Path(client.download_artifacts(parent.info.run_id, SWEEP_FILE, folder)))
    except (MlflowException, OSError):  # not delivered yet, or in a folder of another machine
        metric = parent.data.params.get("metric")
        return {"metric": metric, "mode": parent.data.params.get("mode") or best_mode(metric)} if metric else None


def page_of(run: Run, uri: str) -> str:
    """Where a browser shows the run, on a server with pages; else the address of the store, without its login."""
    uri = _without_login(uri)
    if not uri.startswith(("http://", "https://")):
        return uri
    return f"{uri.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def _without_login(uri: str) -> str:
    """The address without a user and password, which reports must not show."""
    scheme, mark, rest = uri.partition("://")
    authority, slash, path = rest.partition("/")
    return f"{scheme}{mark}{authority.rpartition('@')[2]}{slash}{path}" if mark else uri


def _load_pictures(client: MlflowClient, run_id: str) -> Pictures | None:
    folders = [found.path for found in client.list_artifacts(run_id, PICTURES_DIR) if found.is_dir]
    for path in sorted(folders, key=lambda path: picture_step(Path(path).name), reverse=True):
        with tempfile.TemporaryDirectory() as folder:
            files = png_files(Path(client.download_artifacts(run_id, path, folder)))
        if files:
            return Pictures(picture_step(Path(path).name), files)
    return None
