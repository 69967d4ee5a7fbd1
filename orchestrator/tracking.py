"""MLflow, and everything that is sent to it.

Nothing that trains ever talks to a tracking server. Runs leave records on disk (`orchestrator.records`), and the driver
delivers them: `deliver` compares what the records say (`orchestrator.mlflow_runs`) with what it noted as delivered, and
sends the difference. So one process writes, a dead server costs a run nothing, and whatever was not delivered is
delivered by the next call, in order and once. `orchestrator.delivery` is the thread that calls it while a run goes on.

Shape in MLflow: an experiment per sweep (or recipe), a parent run per sweep, a child run per trial; docs/tracking.md
says what is where.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from orchestrator.config import TrackingConfig
from orchestrator.mlflow_runs import CONTEXT_TAG, MlflowRun, runs_to_show
from orchestrator.records import EVALUATIONS_DIR, METRICS_FILE, SYSTEM_FILE, Event, read_lines, write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

T = TypeVar("T")

STATE_FILE = "mlflow.json"
RUN_ID_TAG = "orchestrator.run_id"
PARENT_TAG = "mlflow.parentRunId"
_STATUS: dict[Event, str] = {
    "started": "RUNNING",
    "finished": "FINISHED",
    "stopped": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}
_POINTS_PER_CALL = 200  # MLflow takes 1000 metrics and 1 MB a request
_PARAMS_PER_CALL = 100  # MLflow's limit, which holds for tags too
_SQLITE = "sqlite:///"


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
            folder = Path(uri.removeprefix(_SQLITE)).resolve().parent if uri.startswith(_SQLITE) else None
            return cls(uri, (folder / "artifacts").as_uri() if folder else None)
        folder = Path("mlruns").resolve()
        return cls(f"{_SQLITE}{folder / 'mlflow.db'}", (folder / "artifacts").as_uri())

    @property
    def shown(self) -> str:
        """`uri` without the password that MLFLOW_TRACKING_URI may hold."""
        return re.sub(r"(://[^/:@]*):.*@", r"\1:***@", re.sub(r"(password=)[^&]*", r"\1***", self.uri))

    @property
    def database(self) -> Path | None:
        """The SQLite file, if it is one."""
        return Path(self.uri.removeprefix(_SQLITE)) if self.uri.startswith(_SQLITE) else None

    def open_command(self) -> str:
        """The command that shows the record in a browser."""
        if self.uri.startswith(("http://", "https://")):
            return f"open {self.shown}"
        uri = f"{_SQLITE}{os.path.relpath(self.database)}" if self.database else self.shown
        python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable
        return f"{python} -m mlflow server --backend-store-uri {uri}   # then open http://127.0.0.1:5000"


@contextmanager
def _one_writer(target: Target) -> Iterator[None]:
    """The turn to write to a SQLite file, which has one writer at a time; other stores need none.

    Two processes that create one store at the same time break it. Later, of two transactions that read before they
    write, SQLite fails one at once ("database is locked"), however long it was told to wait.
    """
    database = target.database
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f".{database.name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def connect(target: Target) -> MlflowClient:
    """A client of the store, which is created first if it is a SQLite file that does not exist."""
    for name, value in (
        # A call to a dead server must fail soon: the defaults (7 retries, 120 s) add up to four minutes each. Tried
        # again by itself, a call that a slow server answers too late would create a second run.
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "10"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
    ):
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name, level in (
        ("alembic", "WARNING"),
        ("mlflow.store.db.utils", "CRITICAL"),  # what it raises is told in a line; it logs a traceback besides
        ("urllib3.connectionpool", "ERROR"),
    ):
        logging.getLogger(name).setLevel(level)
    with _one_writer(target):
        if target.database is not None and not target.database.exists():
            # Of a process that ended while it made the tables, a store would be left that no other can open.
            unfinished = target.database.with_name(f".{target.database.name}.new")
            unfinished.unlink(missing_ok=True)
            MlflowClient(tracking_uri=f"{_SQLITE}{unfinished}")
            unfinished.replace(target.database)
        return MlflowClient(tracking_uri=target.uri)


def ensure_experiment(client: MlflowClient, name: str, target: Target) -> str:
    """The id of the experiment, which is created if there is none of that name."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            location = f"{target.artifacts}/{name}" if target.artifacts else None
            with _one_writer(target):
                return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:  # another driver was faster
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        with _one_writer(target):
            client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


@dataclass
class Delivered:
    """What MLflow already has of one run; kept beside its records."""

    uri: str
    run_id: str = ""
    """Empty: MLflow was asked to create the run, and whether it did is not known yet."""
    doubtful: bool = False
    """It was asked more than once, so that a slow server may have made the run twice."""
    status: str = "RUNNING"
    tags: dict[str, str] = field(default_factory=dict)
    params: bool = False
    inputs: bool = False
    offset: int = 0
    """Bytes of the journal."""
    system_offset: int = 0
    evaluations_offset: int = 0
    artifacts: dict[str, float] = field(default_factory=dict)
    """File to modification time."""

    @classmethod
    def load(cls, folder: Path, target: Target) -> Delivered | None:
        """None if nothing was delivered to that store."""
        path = folder / STATE_FILE
        if not path.exists():
            return None
        state = cls(**json.loads(path.read_text()))
        return state if state.uri == target.shown else None

    def save(self, folder: Path) -> None:
        write_json(folder / STATE_FILE, asdict(self))


def unique_name(folder: Path) -> str:
    """A name for a run that no run of another storage folder has, of characters that a search query takes."""
    return f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"


def deliver(
    client: MlflowClient,
    folder: Path,
    experiment: str,
    target: Target,
    hurry: Callable[[], bool] = lambda: False,
    *,
    first: bool = False,
) -> list[str]:
    """Bring MLflow up to date with the records in a sweep's or a run's folder.

    States go first, so that an interrupted sweep is marked at once even if metrics are still to be sent. When `hurry`
    says so, the rest is left to the next call.

    Args:
        first: Look whether the store still has what it was given before; one that was emptied gets all of it again.

    Returns:
        Why something was left out for good: runs that somebody deleted in MLflow. Restored there, they are continued.

    Raises:
        mlflow.exceptions.MlflowException: The store refused or could not be reached; call again later.
    """
    runs = list(runs_to_show(folder))
    sending = _Sending(client, target, experiment, hurry)
    if first and runs:
        sending.forget_emptied_store(runs)
    for run in runs:
        sending.find_or_create(run)
    changed = [run for run in runs if sending.apart(run, sending.status)]
    for run in changed:
        sending.apart(run, sending.end)
    for run in runs:
        parts = (sending.params, sending.tags, sending.inputs, sending.metrics, sending.system)
        for part in (*parts, sending.evaluations, sending.files):
            if hurry():
                return list(sending.deleted.values())
            sending.apart(run, part)
    return list(sending.deleted.values())


class _Sending:
    """One call of `deliver`."""

    def __init__(self, client: MlflowClient, target: Target, experiment: str, hurry: Callable[[], bool]) -> None:
        self._client, self._target, self._experiment, self._hurry = client, target, experiment, hurry
        self._states: dict[Path, Delivered] = {}
        self.deleted: dict[Path, str] = {}
        """Runs that somebody deleted in MLflow, and how to say so."""

    def write(self, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
        with _one_writer(self._target):
            return call(*arguments, **named)

    def apart(self, run: MlflowRun, part: Callable[[MlflowRun, Delivered], T]) -> T | None:
        """Send a part of a run. A run that was deleted in MLflow is left out and does not hold up the others."""
        from mlflow.exceptions import MlflowException

        if run.folder in self.deleted:
            return None
        state = self._states[run.folder]
        try:
            return part(run, state)
        except MlflowException as error:
            stage = self._stage(state) if error.error_code in _REFUSALS else "active"
            if stage == "deleted":
                self.deleted[run.folder] = f"{run.name} was deleted in MLflow; its record is kept in {run.folder}"
                return None
            if stage == "missing":
                (run.folder / STATE_FILE).unlink()  # the next call begins it anew
            raise

    def _stage(self, state: Delivered) -> Literal["active", "deleted", "missing"]:
        from mlflow.exceptions import MlflowException

        try:
            found = self._client.get_run(state.run_id).info.lifecycle_stage
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return "missing"
            raise
        return "deleted" if found == "deleted" else "active"

    def forget_emptied_store(self, runs: list[MlflowRun]) -> None:
        """If the store no longer knows the topmost run, what was noted of all of them is of another store."""
        state = Delivered.load(runs[0].folder, self._target)
        if state is not None and state.run_id and self._stage(state) == "missing":
            for run in runs:
                (run.folder / STATE_FILE).unlink(missing_ok=True)

    def find_or_create(self, run: MlflowRun) -> None:
        state = Delivered.load(run.folder, self._target)
        if state is None or not state.run_id:
            state = self._find(run, doubtful=state is not None) or self._create(run, doubtful=state is not None)
            state.save(run.folder)
        self._states[run.folder] = state

    def _find(self, run: MlflowRun, *, doubtful: bool) -> Delivered | None:
        """A driver that died between creating a run and noting its id left one that is found by its tag."""
        # One that is deleted may be a double of one that is not.
        found = sorted(self._same_runs(run), key=lambda same: same.info.lifecycle_stage == "deleted")
        if not found:
            return None
        return Delivered(self._target.shown, found[0].info.run_id, doubtful, found[0].info.status)

    def _same_runs(self, run: MlflowRun) -> list[Run]:
        from mlflow.entities import ViewType

        query = f"tags.`{RUN_ID_TAG}` = '{unique_name(run.folder)}'"
        return list(self._client.search_runs([self._experiment_id], query, ViewType.ALL))

    @cached_property
    def _experiment_id(self) -> str:
        return ensure_experiment(self._client, self._experiment, self._target)

    def _create(self, run: MlflowRun, *, doubtful: bool) -> Delivered:
        state = Delivered(self._target.shown, doubtful=doubtful)
        state.save(run.folder)
        made = self.write(
            self._client.create_run,
            self._experiment_id,
            start_time=int(run.started_at * 1000),
            tags=self._all_tags(run) | {RUN_ID_TAG: unique_name(run.folder), "mlflow.user": os.environ.get("USER", "")},
            run_name=run.name,
        )
        state.run_id, state.tags = made.info.run_id, self._all_tags(run)
        return state

    def _all_tags(self, run: MlflowRun) -> dict[str, str]:
        return run.tags | ({PARENT_TAG: self._states[run.parent].run_id} if run.parent else {})

    def status(self, run: MlflowRun, state: Delivered) -> bool:
        """Whether there was something to tell."""
        status = _STATUS[run.state.event]
        if status == state.status:
            return False
        if status == "RUNNING":
            self.write(self._client.update_run, state.run_id, status=status)
        else:
            self.write(self._client.set_terminated, state.run_id, status, int(run.state.time * 1000))
        state.status = status  # noted on disk by `end`
        return True

    def end(self, run: MlflowRun, state: Delivered) -> None:
        """What belongs to a status: why, and figures such as the hours that an early stop saved."""
        from mlflow.entities import Metric

        moment = int(run.state.time * 1000)  # sent twice, a point of the same time is kept once
        numbers = [Metric(name, value, moment, 0) for name, value in run.state.numbers.items()]
        if numbers:
            self.write(self._client.log_batch, state.run_id, metrics=numbers)
        self.tags(run, state)
        state.save(run.folder)

    def tags(self, run: MlflowRun, state: Delivered) -> None:
        """Those that are new or have changed."""
        from mlflow.entities import RunTag

        now = self._all_tags(run)
        changed = [RunTag(name, value) for name, value in now.items() if state.tags.get(name) != value]
        if changed:
            self.write(self._client.log_batch, state.run_id, tags=changed)
        for name in state.tags.keys() - now.keys():  # a resumed run has not ended
            self.write(self._client.delete_tag, state.run_id, name)
        if state.tags != now:
            state.tags = now
            state.save(run.folder)

    def params(self, run: MlflowRun, state: Delivered) -> None:
        if state.params:
            return
        # A run that was found by its tag may have some, and MLflow takes no other value for them: of a run that was
        # resumed on another cluster, those that it began with stay.
        there = self._client.get_run(state.run_id).data.params
        from mlflow.entities import Param

        params = [Param(name, value) for name, value in run.params.items() if name not in there]
        for start in range(0, len(params), _PARAMS_PER_CALL):
            self.write(self._client.log_batch, state.run_id, params=params[start : start + _PARAMS_PER_CALL])
            if self._hurry():
                return
        state.params = True
        state.save(run.folder)

    def inputs(self, run: MlflowRun, state: Delivered) -> None:
        """The data sets; one that is there already is kept once."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        if state.inputs or not run.inputs:
            return
        inputs = [
            DatasetInput(
                Dataset(data.name, data.digest, data.source_type, data.source, data.schema, data.profile),
                [InputTag(CONTEXT_TAG, data.context)],
            )
            for data in run.inputs
        ]
        self.write(self._client.log_inputs, state.run_id, inputs)
        state.inputs = True
        state.save(run.folder)

    def metrics(self, run: MlflowRun, state: Delivered) -> None:
        """What is new in the journal, in its order."""
        for end in self._points(run, state, METRICS_FILE, state.offset):
            state.offset = end
            state.save(run.folder)

    def system(self, run: MlflowRun, state: Delivered) -> None:
        for end in self._points(run, state, SYSTEM_FILE, state.system_offset):
            state.system_offset = end
            state.save(run.folder)

    def evaluations(self, run: MlflowRun, state: Delivered) -> None:
        """What was measured afterwards."""
        for end in self._points(run, state, f"{EVALUATIONS_DIR}/{METRICS_FILE}", state.evaluations_offset):
            state.evaluations_offset = end
            state.save(run.folder)

    def _points(self, run: MlflowRun, state: Delivered, name: str, offset: int) -> Iterator[int]:
        """Send what is behind `offset` in pieces; yields how far they reach.

        Sent twice after a crash before that is noted, a point with the same key, step and time is kept once.
        """
        from mlflow.entities import Metric

        points: list[Metric] = []
        end = offset
        for end, record in read_lines(run.folder / name, offset):
            moment = int(record["time"] * 1000)
            points += [Metric(key, value, moment, record["step"]) for key, value in record["metrics"].items()]
            if len(points) >= _POINTS_PER_CALL:
                self.write(self._client.log_batch, state.run_id, metrics=points)
                yield end
                points = []
                if self._hurry():
                    return
        if points:
            self.write(self._client.log_batch, state.run_id, metrics=points)
        if end > offset:
            yield end

    def files(self, run: MlflowRun, state: Delivered) -> None:
        for path, place in run.files():
            if self._hurry():
                return
            name, changed_at = path.relative_to(run.folder).as_posix(), path.stat().st_mtime
            if state.artifacts.get(name) != changed_at:
                self._client.log_artifact(state.run_id, str(path), place)
                state.artifacts[name] = changed_at
                state.save(run.folder)
        if state.doubtful and state.status != "RUNNING":
            self._remove_doubles(run, state)

    def _remove_doubles(self, run: MlflowRun, state: Delivered) -> None:
        """What a server made of a call that it had seemed to fail; nothing was ever sent to it."""
        for other in self._same_runs(run):
            if other.info.run_id != state.run_id and other.info.lifecycle_stage != "deleted":
                self.write(self._client.delete_run, other.info.run_id)
        state.doubtful = False
        state.save(run.folder)


_REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")
