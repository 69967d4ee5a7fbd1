"""Delivery to stores as they fail: many writers on one SQLite file; a server that is late, killed, slow or forgetful.

Everything is real: processes, SQLite, an MLflow server with PostgreSQL behind it.
"""

from __future__ import annotations

import json
import logging.handlers
import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from orchestrator import cli
from orchestrator.config import RunConfig, TrackingConfig
from orchestrator.delivery import Delivery
from orchestrator.overrides import flatten, override
from orchestrator.records import Event, Journal, Ledger, RunRecord, write_json
from orchestrator.summary import Summary
from orchestrator.tracking import Target, connect, deliver, ensure_experiment
from orchestrator.trials import load_from_disk, load_from_mlflow
from tests.orchestrator.servers import MlflowServer, SlowProxy, wait_until

NUM_WRITERS, NUM_STEPS = 20, 30
METRICS = ("train/loss", "train/lr", "eval/knn_top1")


def value(run: int, step: int, metric: int) -> float:
    """What is logged there: no two the same."""
    return run + step / 100 + metric / 7


def make_run(folder: Path, seed: int = 0, run_id: str | None = None) -> RunRecord:
    record = RunRecord(
        run_id=run_id or folder.name,
        experiment="test",
        recipe="quickstart",
        seed=seed,
        config={"data.source": "digits"} | {f"pretrain.key{i}": i for i in range(120)},
    )
    record.write(folder)
    return record


def log_steps(journal: Journal, run: int, steps: range, pause_s: float) -> None:
    for step in steps:
        journal.log(step, {name: value(run, step, i) for i, name in enumerate(METRICS)})
        time.sleep(pause_s)


def runs_of(client: MlflowClient, experiment: str) -> list[Run]:
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(client.search_runs([found.experiment_id]))


def children(client: MlflowClient, experiment: str) -> list[Run]:
    return [run for run in runs_of(client, experiment) if "mlflow.parentRunId" in run.data.tags]


def check_complete(
    client: MlflowClient, experiment: str, runs: dict[str, int], num_steps: int, parent: str | None = None
) -> None:
    """Every run is there once, with every point once, in order, as it was logged."""
    stored = runs_of(client, experiment)
    assert Counter(run.info.run_name for run in stored) == Counter([*runs, *([parent] if parent else [])])
    assert {run.info.status for run in stored} == {"FINISHED"}
    for run in stored:
        if run.info.run_name == parent:
            continue
        assert len(run.data.params) == 121
        for i, metric in enumerate(METRICS):
            history = client.get_metric_history(run.info.run_id, metric)
            points = sorted((point.step, point.value) for point in history)
            assert points == [(step, value(runs[run.info.run_name], step, i)) for step in range(num_steps)]
            assert [p.step for p in sorted(history, key=lambda p: p.timestamp)] == [step for step, _ in points]


def write_run(root: str, index: int, uri: str, barrier: object) -> None:
    """One driver with one run: all of them begin at once, on a store that does not exist yet."""
    folder = Path(root) / f"run-{index}"
    record = make_run(folder, index)
    barrier.wait(120)  # type: ignore[attr-defined]
    with closing(Journal(folder)) as journal, closing(Ledger(folder)) as ledger:
        ledger.record(record.run_id, "started")
        handler = logging.handlers.BufferingHandler(100)
        logging.getLogger("orchestrator.delivery").addHandler(handler)
        delivery = Delivery(folder, "writers", Target.of(TrackingConfig(uri=uri)), every_s=0.1)
        delivery.start()
        log_steps(journal, index, range(NUM_STEPS), 0.05)
        ledger.record(record.run_id, "finished")
        left = delivery.finish(120.0)
    complaints = [message.getMessage() for message in handler.buffer]
    (Path(root) / f"{folder.name}.json").write_text(json.dumps({"left": left, "complaints": complaints}))


@pytest.mark.timeout(400)
def test_twenty_writers_on_one_fresh_sqlite_file_lose_and_repeat_nothing(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}"
    context = multiprocessing.get_context("forkserver")  # imports MLflow once for all of them
    barrier = context.Barrier(NUM_WRITERS)
    processes = [
        context.Process(target=write_run, args=(str(tmp_path), i, uri, barrier), daemon=True)
        for i in range(NUM_WRITERS)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * NUM_WRITERS
    told = [json.loads((tmp_path / f"run-{i}.json").read_text()) for i in range(NUM_WRITERS)]
    assert told == [{"left": None, "complaints": []}] * NUM_WRITERS
    check_complete(MlflowClient(uri), "writers", {f"run-{i}": i for i in range(NUM_WRITERS)}, NUM_STEPS)


class GrowingSweep:
    """A sweep whose trials record steps and pictures, from a thread, until they are told to end."""

    def __init__(self, folder: Path, trials: list[str]) -> None:
        self.folder, self.trials = folder, trials
        self.seconds: list[float] = []
        """How long each step took to be recorded."""
        self.num_steps = 0
        definition = {"sweep": "s", "recipe": "quickstart", "space": {}, "seeds": 1, "metric": "train/loss"}
        write_json(folder / "sweep.json", definition | {"trials": [{"trial_id": trial} for trial in trials]})
        for i, trial in enumerate(trials):
            make_run(folder / "trials" / trial, i, run_id=f"{folder.name}.{trial}")
        self._ledger = Ledger(folder)
        for run in self._run_ids():
            self._ledger.record(run, "started")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._train)
        self._thread.start()

    def _run_ids(self) -> list[str]:
        return [self.folder.name, *(f"{self.folder.name}.{trial}" for trial in self.trials)]

    def _train(self) -> None:
        with ExitStack() as stack:
            run_dirs = [self.folder / "trials" / trial for trial in self.trials]
            journals = [stack.enter_context(closing(Journal(run_dir))) for run_dir in run_dirs]
            while not self._stop.wait(0.1):
                for i, (run_dir, journal) in enumerate(zip(run_dirs, journals, strict=True)):
                    begin = time.perf_counter()
                    log_steps(journal, i, range(self.num_steps, self.num_steps + 1), 0.0)
                    self.seconds.append(time.perf_counter() - begin)
                    if self.num_steps % 50 == 0:
                        picture = run_dir / "pictures" / f"step_{self.num_steps:08}" / "crops.png"
                        picture.parent.mkdir(parents=True)
                        picture.write_bytes(picture_of(i, self.num_steps))
                self.num_steps += 1

    def end(self) -> None:
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(10)
        for run in reversed(self._run_ids()):
            self._ledger.record(run, "finished")
        self._ledger.close()


def picture_of(run: int, step: int) -> bytes:
    return f"{run} {step}".encode() * 1000


@pytest.fixture
def grow(tmp_path: Path) -> Iterator[Callable[[], GrowingSweep]]:
    """Starts a sweep of four trials; ends it if the test did not."""
    with ExitStack() as stack:

        def start() -> GrowingSweep:
            sweep = GrowingSweep(tmp_path / "growing", ["a", "b", "c", "d"])
            stack.callback(sweep.end)
            return sweep

        yield start


@pytest.mark.timeout(900)
def test_a_server_killed_under_a_running_sweep_loses_and_repeats_nothing(
    mlflow_server: MlflowServer, grow: Callable[[], GrowingSweep], tmp_path: Path
) -> None:
    """The server is not there when the sweep begins, and is killed and started again while it trains."""
    client = MlflowClient(mlflow_server.uri)
    sweep = grow()
    delivery = Delivery(sweep.folder, "killed", Target.of(TrackingConfig(uri=mlflow_server.uri)), every_s=0.2)
    delivery.start()
    wait_until(lambda: delivery.problem is not None, 60, "nobody noticed that there is no server")
    mlflow_server.start()

    def num_points() -> int:
        found = client.get_experiment_by_name("killed")
        stored = client.search_runs([found.experiment_id]) if found else []
        return sum(len(client.get_metric_history(run.info.run_id, METRICS[0])) for run in stored)

    wait_until(lambda: num_points() > 100, 120, "nothing arrives")
    mlflow_server.kill()
    wait_until(lambda: delivery.problem is not None, 60, "nobody noticed that the server is gone")
    steps_at_the_kill = sweep.num_steps
    mlflow_server.start()
    assert sweep.num_steps > steps_at_the_kill, "training waited"
    sweep.end()
    assert delivery.finish(300.0) is None
    # A busy machine can hold up any step; waiting for attempts would hold up many.
    assert sorted(sweep.seconds)[-4] < 0.5, "steps waited for the server"
    check_complete(
        client, "killed", {trial: i for i, trial in enumerate(sweep.trials)}, sweep.num_steps, sweep.folder.name
    )
    for run in children(client, "killed"):
        copy = Path(client.download_artifacts(run.info.run_id, "pictures", str(tmp_path)))
        found = {path.parent.name: path.read_bytes() for path in copy.rglob("crops.png")}
        index = sweep.trials.index(run.info.run_name)
        assert found == {f"step_{s:08}": picture_of(index, s) for s in range(0, sweep.num_steps, 50)}
        shutil.rmtree(copy)
    # What `compare` reads from the server is what it reads from the disk.
    tracked = {trial.name: trial.curves for trial in load_from_mlflow("killed", mlflow_server.uri)}
    assert tracked == {trial.name: trial.curves for trial in load_from_disk(sweep.folder)}


@pytest.fixture
def slow_proxy(mlflow_server: MlflowServer) -> Iterator[SlowProxy]:
    if not mlflow_server.is_up():
        mlflow_server.start()
    with closing(SlowProxy(mlflow_server.port)) as proxy:
        yield proxy


def test_a_slow_server_slows_no_step_and_no_end(slow_proxy: SlowProxy, grow: Callable[[], GrowingSweep]) -> None:
    slow_proxy.delay_s = 2.0
    sweep = grow()
    delivery = Delivery(sweep.folder, "slow", Target.of(TrackingConfig(uri=slow_proxy.uri)), every_s=0.1)
    delivery.start()
    wait_until(lambda: slow_proxy.num_requests >= 3, 60, "nothing is sent")
    steps = sweep.num_steps
    wait_until(lambda: slow_proxy.num_requests >= 5, 60, "nothing is sent")
    assert sweep.num_steps - steps > 15, "training waited"
    assert sorted(sweep.seconds)[-4] < 0.5
    begin = time.monotonic()
    assert delivery.finish(2.0) is not None, "it cannot be done yet, and nobody was told"
    assert time.monotonic() - begin < 10.0
    delivery.join(60)
    assert not delivery.is_alive(), "it goes on, beside the next driver"
    sweep.end()
    slow_proxy.delay_s = 0.0
    again = Delivery(sweep.folder, "slow", Target.of(TrackingConfig(uri=slow_proxy.uri)))
    again.start()
    assert again.finish(60.0) is None
    runs = {trial: i for i, trial in enumerate(sweep.trials)}
    check_complete(MlflowClient(slow_proxy.uri), "slow", runs, sweep.num_steps, sweep.folder.name)


def test_answers_that_come_too_late_make_no_second_run(
    slow_proxy: SlowProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server did what it was asked, but the client had given up: the run is there, and is found."""
    folder = tmp_path / "late"
    record = make_run(folder)
    target = Target.of(TrackingConfig(uri=slow_proxy.uri))
    client = connect(target)
    with closing(Journal(folder)) as journal, closing(Ledger(folder)) as ledger:
        ledger.record(record.run_id, "started")
        log_steps(journal, 0, range(10), 0.005)
        ensure_experiment(client, "late", target)
        create_run = client.create_run

        def create_late(*arguments: object, **named: object) -> object:
            slow_proxy.answer_delay_s = 4.0
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
                try:
                    return create_run(*arguments, **named)
                finally:
                    slow_proxy.answer_delay_s = 0.0

        monkeypatch.setattr(client, "create_run", create_late)
        with pytest.raises(MlflowException, match=r"timed out|[Tt]imeout"):
            deliver(client, folder, "late", target)
        wait_until(lambda: len(runs_of(client, "late")) == 1, 60, "the server did not do what it was asked")
        (made,) = runs_of(client, "late")
        # Had it been asked again before that call arrived, there would be another.
        create_run(made.info.experiment_id, tags=made.data.tags, run_name="late")
        assert len(runs_of(client, "late")) == 2
        ledger.record(record.run_id, "finished")
        deliver(client, folder, "late", target)
    check_complete(client, "late", {"late": 0}, 10)


TINY_VIT = {
    "pretrain.batch_size": 4,
    "pretrain.steps": 8,
    "pretrain.model.backbone": "vit_tiny_patch16_224",
    "pretrain.model.patch_size": 8,
    "pretrain.model.embed_dim": 12,
    "pretrain.model.depth": 1,
    "pretrain.model.num_heads": 2,
    "pretrain.head.num_prototypes": 8,
    "pretrain.head.hidden_dim": 8,
    "pretrain.head.bottleneck_dim": 4,
    "pretrain.crops.num_local_crops": 0,
    "pretrain.crops.global_size": 16,
    "tracking.checkpoints": "last",
}


@pytest.fixture(scope="module")
def finished_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three trials with a checkpoint each: a good one, a better one that failed, and a worse one."""
    from dino_core.checkpoint import save_checkpoint
    from dino_core.train import TrainState

    folder = tmp_path_factory.mktemp("storage") / "swept"
    config = override(RunConfig(), TINY_VIT)
    definition = {"sweep": "s", "recipe": "r", "experiment": "registered", "space": {}, "seeds": 1}
    ends: dict[str, tuple[float, Event]] = {
        "good": (70.0, "finished"),
        "broken": (80.0, "failed"),
        "bad": (60.0, "finished"),
    }
    definition |= {"metric": "eval/knn_top1", "mode": "max", "trials": [{"trial_id": trial} for trial in ends]}
    write_json(folder / "sweep.json", definition)
    with closing(Ledger(folder)) as ledger:
        ledger.record("swept", "started")
        for seed, (trial, (knn, end)) in enumerate(ends.items()):
            run_dir = folder / "trials" / trial
            RunRecord(
                run_id=f"swept.{trial}",
                experiment="registered",
                recipe="r",
                seed=seed,
                config=flatten(config) | {"pretrain.seed": seed},
                data_digest="d" * 32,
                sweep="swept",
            ).write(run_dir)
            ledger.record(f"swept.{trial}", "started")
            with closing(Journal(run_dir)) as journal:
                journal.log(8, {"eval/knn_top1": knn})
            state = TrainState.create(override(config, {"pretrain.seed": seed}).pretrain, 16)
            state.step = 8
            save_checkpoint(state, run_dir / "checkpoints")
            ledger.record(f"swept.{trial}", end)
        Summary.of(folder, Target.of(TrackingConfig())).write_report()
        ledger.record("swept", "failed", "broken")
    return folder


@pytest.fixture(params=["a SQLite file", "a server with PostgreSQL"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "a SQLite file":
        return f"sqlite:///{tmp_path / 'mlflow.db'}"
    server: MlflowServer = request.getfixturevalue("mlflow_server")
    if not server.is_up():
        server.start()
    return server.uri


def test_the_best_healthy_trial_is_registered_and_loads(
    store: str,
    finished_sweep: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import timm
    import torch
    from safetensors.torch import load_file

    from dino_core.checkpoint import verify_checkpoint

    storage = tmp_path / "storage"
    shutil.copytree(finished_sweep, storage / "swept")
    arguments = ["register", "swept", "tiny-vit", f"cluster.storage={storage}", f"tracking.uri={store}"]
    assert cli.main(arguments) == 0
    assert "good registered as version 1 of the model tiny-vit" in capsys.readouterr().out
    assert cli.main(arguments) == 0
    assert "good is already version 1 of the model tiny-vit" in capsys.readouterr().out

    client = MlflowClient(store)
    (version,) = client.search_model_versions("name = 'tiny-vit'")
    runs = {run.info.run_name: run for run in runs_of(client, "registered")}
    assert version.run_id == runs["good"].info.run_id
    expected = {"metric": "eval/knn_top1", "value": "70.0", "value_step": "8", "data_digest": "d" * 32}
    assert expected.items() <= version.tags.items()
    copy = client.download_artifacts(version.run_id, "backbone/step_00000008", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)  # as docs/tracking.md says; MLflow looks up names in no other
    by_address = mlflow.artifacts.download_artifacts("models:/tiny-vit/1", dst_path=str(tmp_path / "copy"))
    assert (
        sorted(os.listdir(by_address)) == sorted(os.listdir(copy)) == ["README.md", "config.json", "model.safetensors"]
    )
    model = timm.create_model(f"local-dir:{by_address}", pretrained=True).eval()
    trained = load_file(finished_sweep / "trials" / "good" / "checkpoints" / "step_00000008" / "model.safetensors")
    weights = model.state_dict()
    assert weights and all(torch.equal(weights[name], trained[f"teacher.backbone.{name}"]) for name in weights)

    checkpoints = {
        name: [a.path for a in client.list_artifacts(run.info.run_id, "checkpoints")] for name, run in runs.items()
    }
    assert checkpoints == {
        "swept": [],
        "good": ["checkpoints/step_00000008"],
        "bad": ["checkpoints/step_00000008"],
        "broken": [],  # it did not end well
    }
    whole = client.download_artifacts(version.run_id, "checkpoints/step_00000008", str(tmp_path))
    verify_checkpoint(Path(whole))

    parent = runs["swept"]
    assert parent.data.metrics == {
        "best/eval/knn_top1": 70.0,
        "trials/finished": 2.0,
        "trials/failed": 1.0,
        "trials/stopped": 0.0,
        "trials/interrupted": 0.0,
    }
    assert parent.data.tags["best_trial"] == "good"
    files = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert files == {"sweep.json", "report.html", "comparison.md", "comparison.csv"}
