"""MLflow, and everything that touches it.

Nothing that trains ever talks to a tracking server. Runs leave records on disk (`orchestrator.records`), and the driver
delivers them: `deliver` compares what the records say with what it noted as delivered, and sends the difference. So one
process writes to the store, a dead server costs a run nothing, and whatever was not delivered is delivered by the next
call, in order and once. `Delivery` is the thread that calls it while a run goes on.

Shape in MLflow: an experiment per sweep (or recipe), a parent run per sweep, a child run per trial; params under their
dotted keys, derived values under ``derived/``, metrics by optimiser step.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.config import TrackingConfig
from orchestrator.records import (
    CHECKPOINTS_DIR,
    METRICS_FILE,
    REPORT_FILE,
    RUN_FILE,
    SWEEP_FILE,
    TRIALS_DIR,
    Event,
    RunRecord,
    RunState,
    read_json,
    read_lines,
    read_states,
    write_json,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

STATE_FILE = "mlflow.json"
RUN_ID_TAG = "orchestrator.run_id"
_STATUS: dict[Event, str] = {
    "started": "RUNNING",
    "finished": "FINISHED",
    "stopped": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}
_POINTS_PER_CALL = 200  # MLflow takes 1000 metrics and 1 MB a request


@dataclass(frozen=True)
class Target:
    """Where records go."""

    uri: str
    artifacts: str | None
    """Artifact folder of new experiments; None leaves it to the server."""

    @classmethod
    def of(cls, tracking: TrackingConfig) -> Target:
        """`tracking.uri`, else MLFLOW_TRACKING_URI, else a SQLite file and an artifact folder under ./mlruns."""
        uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
        if uri:
            local = uri.startswith("sqlite:///")
            folder = Path(uri.removeprefix("sqlite:///")).resolve().parent if local else None
            return cls(uri, (folder / "artifacts").as_uri() if folder else None)
        folder = Path("mlruns").resolve()
        return cls(f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri())

    def open_command(self) -> str:
        """The command that shows the record in a browser."""
        if self.uri.startswith(("http://", "https://")):
            return f"open {self.uri}"
        path = Path(self.uri.removeprefix("sqlite:///"))
        uri = f"sqlite:///{os.path.relpath(path)}" if self.uri.startswith("sqlite:///") else self.uri
        python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable
        return f"{python} -m mlflow server --backend-store-uri {uri}   # then open http://127.0.0.1:5000"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def connect(target: Target) -> MlflowClient:
    """A client of the store, which is created first if it is a SQLite file that does not exist.

    Two processes that create one store at the same time break it, so this is done under a lock beside the file.
    """
    # A call to a dead server must fail soon: the defaults (7 retries, 120 s) add up to four minutes each.
    for name, value in (
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "10"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
    ):
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name, level in (
        ("alembic", "WARNING"),
        ("mlflow.store.db.utils", "WARNING"),
        ("urllib3.connectionpool", "ERROR"),
    ):
        logging.getLogger(name).setLevel(level)
    if not target.uri.startswith("sqlite:///"):
        return MlflowClient(tracking_uri=target.uri)
    database = Path(target.uri.removeprefix("sqlite:///"))
    with _locked(database.with_name(f".{database.name}.lock")):
        return MlflowClient(tracking_uri=target.uri)  # creates the tables


def ensure_experiment(client: MlflowClient, name: str, target: Target) -> str:
    """The id of the experiment, which is created if there is none of that name."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            location = f"{target.artifacts}/{name}" if target.artifacts else None
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:  # another driver was faster
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


@dataclass
class _Delivered:
    """What MLflow already has of one run; kept beside its records."""

    uri: str
    run_id: str
    status: str = "RUNNING"
    offset: int = 0
    params: bool = False
    artifacts: dict[str, float] = field(default_factory=dict)
    """File name to modification time."""

    @classmethod
    def load(cls, folder: Path, uri: str) -> _Delivered | None:
        path = folder / STATE_FILE
        if not path.exists():
            return None
        state = cls(**json.loads(path.read_text()))
        return state if state.uri == uri else None

    def save(self, folder: Path) -> None:
        write_json(folder / STATE_FILE, asdict(self))


@dataclass(frozen=True)
class _Item:
    """One MLflow run to be: a folder of records, its state, and its parent's folder."""

    folder: Path
    name: str
    state: RunState
    tags: dict[str, str]
    params: dict[str, Any]
    artifacts: tuple[str, ...]
    parent: Path | None = None


def _items(folder: Path) -> Iterator[_Item]:
    """The runs of a sweep's or a run's folder, parents first; only those that were started."""
    states = read_states(folder)
    parent = None
    if (folder / SWEEP_FILE).exists():
        sweep = read_json(folder / SWEEP_FILE)
        if folder.name not in states:
            return
        tags = {"sweep": sweep["sweep"], "recipe": sweep["recipe"], "kind": "sweep"}
        params: dict[str, Any] = {f"space/{key}": json.dumps(values) for key, values in sweep["space"].items()}
        rows = sweep.get("rows", {})  # sweeps written before there were rows have none
        params |= {"rows": ", ".join(rows)} if rows else {}
        # A search adds trials as it goes, and a param is told once.
        count = sweep["num_trials"] * sweep["seeds"] if sweep.get("design") == "optuna" else len(sweep["trials"])
        params |= {"seeds": sweep["seeds"], "trials": count, "metric": sweep["metric"]}
        params |= {name: sweep[name] for name in ("mode", "metric_why") if name in sweep}
        yield _Item(folder, folder.name, states[folder.name], tags, params, (SWEEP_FILE, REPORT_FILE))
        parent = folder
        folders = [folder / TRIALS_DIR / trial["trial_id"] for trial in sweep["trials"]]
    else:
        folders = [folder]
    for run_dir in folders:
        if not (run_dir / RUN_FILE).exists():
            continue
        record = RunRecord.read(run_dir)
        if record.run_id in states:
            yield _run_item(run_dir, record, states[record.run_id], parent)


def _run_item(run_dir: Path, record: RunRecord, state: RunState, parent: Path | None) -> _Item:
    tags = {
        "kind": "trial" if parent else "run",
        "recipe": record.recipe,
        "seed": str(record.seed),
        "sweep": record.sweep or "",
        "trial": run_dir.name if parent else "",
        "git_commit": record.git_commit or "",
        "mlflow.source.git.commit": record.git_commit or "",
        "data_digest": record.data_digest or "",
        "checkpoints": str(run_dir / CHECKPOINTS_DIR),
    }
    params = record.config | record.labels | {f"derived/{name}": value for name, value in record.derived.items()}
    tags = {name: value for name, value in tags.items() if value}
    return _Item(run_dir, run_dir.name, state, tags, params, (RUN_FILE, REPORT_FILE), parent)


def deliver(
    client: MlflowClient, folder: Path, experiment: str, target: Target, hurry: Callable[[], bool] = lambda: False
) -> None:
    """Bring MLflow up to date with the records in a sweep's or a run's folder.

    States go first, so that an interrupted sweep is marked at once even if metrics are still to be sent. When `hurry`
    says so, the rest is left to the next call.

    Raises:
        mlflow.exceptions.MlflowException: The store refused or could not be reached; call again later.
    """
    items = list(_items(folder))
    if not items:
        return
    experiment_id = ensure_experiment(client, experiment, target)
    delivered: dict[Path, _Delivered] = {}
    for item in items:
        parent_id = delivered[item.parent].run_id if item.parent else None
        delivered[item.folder] = _ensure_run(client, item, experiment_id, parent_id, target)
    changed = [item for item in items if _deliver_status(client, item, delivered[item.folder])]
    for item in changed:
        _deliver_reason(client, item, delivered[item.folder])
    for item in items:
        for deliver_part in (_deliver_params, _deliver_metrics, _deliver_artifacts):
            if hurry():
                return
            deliver_part(client, item, delivered[item.folder], hurry)


def _ensure_run(
    client: MlflowClient, item: _Item, experiment_id: str, parent_id: str | None, target: Target
) -> _Delivered:
    state = _Delivered.load(item.folder, target.uri)
    if state is not None:
        return state
    unique = unique_name(item.folder)
    # A driver that died between creating the run and noting its id left a run that is found by its tag.
    found = client.search_runs([experiment_id], f"tags.`{RUN_ID_TAG}` = '{unique}'", max_results=1)
    if found:
        run_id = found[0].info.run_id
    else:
        tags = item.tags | {RUN_ID_TAG: unique, "mlflow.user": os.environ.get("USER", "")}
        if parent_id:
            tags["mlflow.parentRunId"] = parent_id
        run_id = client.create_run(experiment_id, tags=tags, run_name=item.name).info.run_id
    state = _Delivered(uri=target.uri, run_id=run_id)
    state.save(item.folder)
    return state


def unique_name(folder: Path) -> str:
    """A name for a run that no run of another storage folder has, of characters that a search query takes."""
    return f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"


def _deliver_status(client: MlflowClient, item: _Item, state: _Delivered) -> bool:
    """Whether there was something to tell."""
    status = _STATUS[item.state.event]
    if status == state.status:
        return False
    if status == "RUNNING":
        client.update_run(state.run_id, status=status)
    else:
        client.set_terminated(state.run_id, status=status, end_time=int(item.state.time * 1000))
    return True


def _deliver_reason(client: MlflowClient, item: _Item, state: _Delivered) -> None:
    if item.state.event != "started":
        client.set_tag(state.run_id, "ended", item.state.event)
        client.set_tag(state.run_id, "reason", item.state.reason[:8000])
        for name, value in item.state.numbers.items():  # sent twice, a point of the same time is kept once
            client.log_metric(state.run_id, name, value, timestamp=int(item.state.time * 1000), step=0)
    state.status = _STATUS[item.state.event]
    state.save(item.folder)


def _deliver_params(client: MlflowClient, item: _Item, state: _Delivered, hurry: Callable[[], bool]) -> None:
    from mlflow.entities import Param

    if state.params:
        return
    params = [Param(name, str(value)[:6000]) for name, value in item.params.items()]
    for start in range(0, len(params), 100):
        client.log_batch(state.run_id, params=params[start : start + 100])
        if hurry():
            return  # the next call sends all of them again, which changes nothing
    state.params = True
    state.save(item.folder)


def _deliver_metrics(client: MlflowClient, item: _Item, state: _Delivered, hurry: Callable[[], bool]) -> None:
    from mlflow.entities import Metric

    points: list[Metric] = []
    end = state.offset

    def send() -> None:
        # Sent twice after a crash between the two lines below, a point with the same key, step and time is kept once.
        client.log_batch(state.run_id, metrics=points)
        state.offset = end
        state.save(item.folder)

    for offset, record in read_lines(item.folder / METRICS_FILE, state.offset):
        end = offset
        moment = int(record["time"] * 1000)
        points += [Metric(name, value, moment, record["step"]) for name, value in record["metrics"].items()]
        if len(points) >= _POINTS_PER_CALL:
            send()
            points = []
            if hurry():
                return
    if points:
        send()


def _deliver_artifacts(client: MlflowClient, item: _Item, state: _Delivered, hurry: Callable[[], bool]) -> None:
    for name in item.artifacts:
        if hurry():
            return
        path = item.folder / name
        if path.exists() and state.artifacts.get(name) != path.stat().st_mtime:
            client.log_artifact(state.run_id, str(path))
            state.artifacts[name] = path.stat().st_mtime
            state.save(item.folder)


class Delivery(threading.Thread):
    """Delivers the records of one folder while its runs go on. Never raises into the run; says once when it cannot."""

    def __init__(self, folder: Path, experiment: str, target: Target, *, every_s: float = 2.0) -> None:
        super().__init__(name="mlflow-delivery", daemon=True)
        self._folder, self._experiment, self._target, self._every_s = folder, experiment, target, every_s
        self._wake = threading.Event()
        self._ending = threading.Event()
        self._deadline = float("inf")
        self.problem: str | None = None
        """Why the last attempt failed; None when everything on disk is delivered."""

    def run(self) -> None:
        client: MlflowClient | None = None
        pause = self._every_s
        while True:
            ending = self._ending.is_set()
            try:
                client = client or connect(self._target)
                # What ends a run must not wait behind the metrics of a pass that began before.
                hurry = partial(lambda began_before: began_before and self._ending.is_set(), not ending)
                deliver(client, self._folder, self._experiment, self._target, hurry)
                self.problem, pause = None, self._every_s
            except Exception as error:  # noqa: BLE001 - whatever MLflow or the network raise must not end a run
                if self.problem is None:
                    logger.warning(
                        "MLflow at %s: %s. Training goes on; records are kept and delivered later.",
                        self._target.uri,
                        _first_line(error),
                    )
                self.problem = _first_line(error)
                pause = min(2 * pause, 30.0)
            if ending and (self.problem is None or time.monotonic() + pause > self._deadline):
                return
            self._wake.wait(1.0 if ending else pause)
            self._wake.clear()

    def finish(self, timeout_s: float) -> str | None:
        """Deliver what is left, for `timeout_s` seconds at most, and end. Returns why something is left, or None."""
        self._deadline = time.monotonic() + timeout_s
        self._ending.set()
        self._wake.set()
        self.join(timeout_s + 1.0)
        if self.is_alive():
            return self.problem or f"{self._target.uri} does not answer"
        return self.problem


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return textwrap.shorten(lines[0], 200, placeholder=" ...") if lines else type(error).__name__
