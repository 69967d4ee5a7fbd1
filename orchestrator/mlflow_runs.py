"""What MLflow is to show of a folder of records: its runs with their names, params, tags, inputs and files.

Only reads the disk; `orchestrator.tracking` sends what it finds. docs/tracking.md is the table of all of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.data.urls import is_url, split_query
from orchestrator.records import (
    CHECKPOINTS_DIR,
    COMPARISON_FILES,
    ENVIRONMENT_FILE,
    EVALUATIONS_DIR,
    LEDGER_FILE,
    METRICS_FILE,
    PICTURES_DIR,
    REPORT_FILE,
    RUN_FILE,
    SUMMARY_FILE,
    SWEEP_FILE,
    TARGET_FILE,
    TRIALS_DIR,
    RunRecord,
    RunState,
    read_json,
    read_lines,
    read_states,
)

PARAM_LENGTH = 6000
"""MLflow cuts longer values without a word; the whole value is in the artifact run.json."""
TAG_LENGTH = 8000
DIGEST_LENGTH = 36
CONTEXT_TAG = "mlflow.data.context"


@dataclass(frozen=True)
class DataInput:
    """A data set that a run read, as MLflow's inputs have them."""

    name: str
    digest: str
    source_type: str
    source: str
    """JSON, as MLflow's data sources of that type write it."""
    schema: str
    profile: str
    context: str
    """training | evaluation"""


@dataclass(frozen=True)
class MlflowRun:
    """One MLflow run to be: a folder of records, its state, and its parent's folder."""

    folder: Path
    name: str
    state: RunState
    started_at: float
    """When it was first started, in seconds since 1970."""
    tags: dict[str, str]
    params: dict[str, str]
    artifacts: tuple[str, ...]
    """Files in the folder that are uploaded, once they are there and again when they change."""
    inputs: tuple[DataInput, ...] = ()
    parent: Path | None = None

    def files(self) -> Iterator[tuple[Path, str | None]]:
        """Files to upload that are there now, each with the artifact folder that it belongs into."""
        for name in self.artifacts:
            if (self.folder / name).is_file():
                yield self.folder / name, None
        for name in (PICTURES_DIR, EVALUATIONS_DIR):
            for path in sorted((self.folder / name).rglob("*")):
                place = path.relative_to(self.folder)
                # A name with a dot before it is one that its writer has not finished.
                if path.is_file() and path.name != METRICS_FILE and not any(p.startswith(".") for p in place.parts):
                    yield path, place.parent.as_posix()


def runs_to_show(folder: Path) -> Iterator[MlflowRun]:
    """The runs of a sweep's or a run's folder, parents first; only those that were started. An evaluated target that is
    no run is one here."""
    states = read_states(folder)
    started: dict[str, float] = {}
    for _, entry in read_lines(folder / LEDGER_FILE):
        started.setdefault(entry["run"], entry["time"])
    parent = None
    if (folder / TARGET_FILE).exists():
        if folder.name in states:
            yield _target_run(folder, read_json(folder / TARGET_FILE), states[folder.name], started[folder.name])
        return
    if (folder / SWEEP_FILE).exists():
        if folder.name not in states:
            return
        sweep = read_json(folder / SWEEP_FILE)
        yield _sweep_run(folder, sweep, states[folder.name], started[folder.name])
        parent = folder
        folders = [folder / TRIALS_DIR / trial["trial_id"] for trial in sweep["trials"]]
    else:
        folders = [folder]
    for run_dir in folders:
        if not (run_dir / RUN_FILE).exists():
            continue
        record = RunRecord.read(run_dir)
        if record.run_id in states:
            yield _run(run_dir, record, states[record.run_id], started[record.run_id], parent)


def _sweep_run(folder: Path, sweep: dict[str, Any], state: RunState, started_at: float) -> MlflowRun:
    tags = {"sweep": sweep["sweep"], "recipe": sweep["recipe"], "kind": "sweep"}
    tags |= _recorded_tags(folder / SUMMARY_FILE) | _end(state)
    tags |= {"mlflow.source.name": f"sweep {sweep['sweep']}", "mlflow.source.type": "LOCAL"}
    params: dict[str, Any] = {f"space/{key}": json.dumps(values) for key, values in sweep["space"].items()}
    rows = sweep.get("rows", {})  # sweeps written before there were rows have none
    params |= {"rows": ", ".join(rows)} if rows else {}
    # A search or a population adds trials as it goes, and a param is told once.
    count = sweep["num_trials"] * sweep["seeds"] if sweep.get("design") == "optuna" else len(sweep["trials"])
    count = sweep.get("num_segments") or count
    params |= {"seeds": sweep["seeds"], "trials": count, "metric": sweep["metric"]}
    params |= {name: sweep[name] for name in ("mode", "metric_why") if name in sweep}
    files = (SWEEP_FILE, REPORT_FILE, *COMPARISON_FILES.values())
    return MlflowRun(folder, folder.name, state, started_at, _fitting(tags), _texts(params), files)


def _run(run_dir: Path, record: RunRecord, state: RunState, started_at: float, parent: Path | None) -> MlflowRun:
    commit = record.git_commit or ""
    tags = {
        "kind": "trial" if parent else "run",
        "recipe": record.recipe,
        "seed": str(record.seed),
        "sweep": record.sweep or "",
        "trial": run_dir.name if parent else "",
        "git_commit": commit,
        "git_dirty": str(commit.endswith("-dirty")) if commit else "",
        "data_digest": record.data_digest or "",
        "checkpoints": str(run_dir / CHECKPOINTS_DIR),
        "mlflow.source.git.commit": commit.removesuffix("-dirty"),
        "mlflow.source.name": f"sweep {record.sweep}" if parent else f"pretrain {record.recipe}",
        "mlflow.source.type": "LOCAL",
    }
    if record.segment is not None:
        tags |= {name: str(value) for name, value in asdict(record.segment).items() if value is not None}
    tags |= _recorded_tags(run_dir / ENVIRONMENT_FILE) | _end(state)
    if "ray_submission_id" in tags:
        tags |= {"mlflow.source.type": "JOB"}
    params = record.config | record.labels | {f"derived/{name}": value for name, value in record.derived.items()}
    files = (RUN_FILE, REPORT_FILE, ENVIRONMENT_FILE)
    return MlflowRun(
        folder=run_dir,
        name=run_dir.name,
        state=state,
        started_at=started_at,
        tags=_fitting(tags),
        params=_texts(params),
        artifacts=files,
        inputs=_inputs(record),
        parent=parent,
    )


def _target_run(folder: Path, content: dict[str, Any], state: RunState, started_at: float) -> MlflowRun:
    """Of what was evaluated and is no run."""
    target: dict[str, Any] = content["target"]
    tags = {"kind": "evaluation", "target": str(target["name"]), "mlflow.source.type": "LOCAL"}
    tags |= {"mlflow.source.name": f"evaluate {target['name']}"} | _end(state)
    params = {f"target/{name}": value for name, value in target.items() if value is not None}
    return MlflowRun(folder, folder.name, state, started_at, _fitting(tags), _texts(params), (TARGET_FILE,))


def _end(state: RunState) -> dict[str, str]:
    return {} if state.event == "started" else {"ended": state.event, "reason": state.reason}


def _recorded_tags(path: Path) -> dict[str, str]:
    return {name: str(value) for name, value in read_json(path).items()} if path.exists() else {}


def _fitting(tags: dict[str, str]) -> dict[str, str]:
    return {name: value[:TAG_LENGTH] for name, value in tags.items() if value}


def _texts(params: dict[str, Any]) -> dict[str, str]:
    return {name: str(value)[:PARAM_LENGTH] for name, value in params.items()}


def _inputs(record: RunRecord) -> tuple[DataInput, ...]:
    """The splits that a run trains on and is evaluated with."""
    if not record.data or record.data_digest is None:
        return ()
    source = str(record.config["data.source"])  # holds no password: such a source is refused
    source_type, described = _described(source, record.data["kind"])
    stem = re.split(r"[/:]", split_query(source)[0].rstrip("/"))[-1] or source
    found = []
    for context, split in (("training", "train"), ("evaluation", "test")):
        count, classes = record.data[f"num_{split}"], record.data["num_classes"]
        if not count:
            continue
        name = f"{stem}/{record.config[f'data.{split}_split']}"[:500]
        profile = json.dumps({"num_rows": count, "num_classes": classes})
        digest = record.data_digest[:DIGEST_LENGTH]
        found.append(DataInput(name, digest, source_type, described, _schema(bool(classes)), profile, context))
    return tuple(found)


def _described(source: str, kind: str) -> tuple[str, str]:
    """Type and JSON of a source, for those that MLflow knows in the form in which `mlflow.data.get_source` reads it."""
    if not is_url(source):
        local = source.startswith("/")
        return "local" if local else kind, json.dumps({"uri": source})
    scheme = source.partition("://")[0].lower()
    if scheme in ("http", "https"):
        return "http", json.dumps({"url": source})
    return scheme, json.dumps({"uri": source})


def _schema(labelled: bool) -> str:
    """Images of any size and, where there are labels, a class each, as MLflow writes tensors."""

    def tensor(dtype: str, shape: list[int]) -> str:
        return json.dumps([{"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": shape}}])

    spec = {"features": tensor("uint8", [-1, -1, -1, 3])}
    return json.dumps({"mlflow_tensorspec": spec | ({"targets": tensor("int64", [-1])} if labelled else {})})
