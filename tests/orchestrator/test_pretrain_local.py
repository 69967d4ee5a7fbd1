"""Whole runs of the `local` launcher: complete, killed, interrupted, failing, and under torchrun.

Runs are shared between tests, for a process that imports torch and MLflow costs seconds. Where a process is the point
(SIGKILL, Ctrl-C, torchrun) it is one; all other runs take place in this one.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image
from safetensors.numpy import load_file
from torch.distributed.run import parse_args

from dino_core.checkpoint import latest_checkpoint, verify_checkpoint
from orchestrator import cli
from orchestrator.config import DataConfig, TrackingConfig
from orchestrator.data.split import Source
from orchestrator.errors import RunFailed
from orchestrator.overrides import flatten, override
from orchestrator.pretrain import pretrain
from orchestrator.records import RunRecord, read_curves, read_lines, read_states
from orchestrator.tracking import RUN_ID_TAG, Target, connect, unique_name
from sweeps.recipes import quickstart

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 500.0  # for what takes seconds on an idle machine
STEPS, CHECKPOINT_STEPS = 80, 20
ENDLESS = 10**6

SMALL: dict[str, Any] = {
    "pretrain.batch_size": 16,
    "pretrain.log_every_steps": 1,
    "pretrain.model.embed_dim": 32,
    "pretrain.model.depth": 1,
    "pretrain.model.num_heads": 2,
    "pretrain.head.num_prototypes": 64,
    "pretrain.head.hidden_dim": 32,
    "pretrain.head.bottleneck_dim": 16,
    "pretrain.crops.num_local_crops": 1,
    "pretrain.eval.every_steps": None,
    "pretrain.eval.num_gallery": 200,
    "pretrain.eval.num_label_free": 40,
    "pretrain.eval.num_lidar_images": 10,
    "pretrain.eval.num_queries": 50,
}
FIRST_STEPS = 30
LONG = {
    "pretrain.steps": FIRST_STEPS,
    "pretrain.stages": f"[{{steps: {STEPS - FIRST_STEPS}, crops.global_size: 24, crops.local_size: 12}}]",
    "pretrain.checkpoint_every_steps": CHECKPOINT_STEPS,
}
"""In two stages."""
SLOW = {
    "pretrain.batch_size": 8,
    "pretrain.crops.global_size": 64,
    "pretrain.model.patch_size": 2,
    "pretrain.model.depth": 2,
    "pretrain.eval.num_gallery": 20,
    "pretrain.eval.num_label_free": 40,
    "pretrain.eval.num_lidar_images": 10,
    "pretrain.eval.num_queries": 5,
}
"""Steps of half a second, so that a signal finds the run deep in torch."""
SHORT = {"pretrain.steps": 8, "pretrain.checkpoint_every_steps": None}


@dataclass(frozen=True)
class Store:
    """Where the runs of this module are, and the MLflow store that they share."""

    folder: Path

    @property
    def changes(self) -> dict[str, Any]:
        return {"cluster.storage": str(self.folder / "runs"), "tracking.uri": f"sqlite:///{self.folder / 'mlflow.db'}"}

    def arguments(self, changes: dict[str, Any], recipe: str = "quickstart") -> list[str]:
        """Of the command line, for a small local run."""
        settings = SMALL | SHORT | self.changes | changes
        return ["pretrain", recipe, "--local", *(f"{key}={value}" for key, value in settings.items())]

    def mlflow_run(self, folder: Path) -> Run:
        """The one run in MLflow that stands for a run folder."""
        client = self.client()
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        (run,) = client.search_runs(experiments, f"tags.`{RUN_ID_TAG}` = '{unique_name(folder)}'")
        return client.get_run(run.info.run_id)

    def client(self) -> MlflowClient:
        return connect(Target.of(TrackingConfig(uri=self.changes["tracking.uri"])))


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    output: str

    @property
    def folder(self) -> Path:
        """Of the run that it began or went on with."""
        return Path(re.findall(r"records in (.+)", self.output)[-1])


def command(*arguments: str) -> Ended:
    """The command line, in this process."""
    output = io.StringIO()
    handler = logging.StreamHandler(output)  # pytest's own keep Python from writing warnings to stderr
    logging.getLogger("orchestrator").addHandler(handler)
    try:
        with redirect_stdout(output), redirect_stderr(output):
            code = cli.main(arguments)
    finally:
        logging.getLogger("orchestrator").removeHandler(handler)
    for thread in threading.enumerate():
        if thread.name == "launch":
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "it trains on"
    return Ended(code, output.getvalue())


@contextmanager
def process(here: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Python in a session of its own, in the folder `here`, with its output in here/log; killed at the end."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (here / "log").open("wb") as log:
        running = subprocess.Popen(
            [sys.executable, *arguments], stdout=log, stderr=log, env=environment, cwd=here, start_new_session=True
        )
        try:
            yield running
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
            running.wait()


def wait_until(running: subprocess.Popen[bytes], true: Callable[[], bool]) -> None:
    """Until it is true or the process has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while not true() and running.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def last_step(runs: Path) -> int:
    """The newest step of the only run in a storage folder; -1 before its first."""
    folders = list(runs.glob("quickstart-*"))
    return max((step for step, _ in read_curves(folders[0]).get("train/loss", [])), default=-1) if folders else -1


def journal_points(folder: Path) -> list[tuple[int, str]]:
    return [(line["step"], name) for _, line in read_lines(folder / "metrics.jsonl") for name in line["metrics"]]


def computed(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All curves but those that depend on the clock."""
    clock = ("train/images_per_s", "train/data_wait_share")
    curves = read_curves(folder).items()
    return {name: curve for name, curve in curves if name not in clock and not name.startswith(("cost/", "time/"))}


def final_sums(folder: Path) -> list[str]:
    """SHA-256 of the newest checkpoint's tensors: of all weights and all moments."""
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    files = [newest / name for name in ("model.safetensors", "optimizer.safetensors")]
    return [newest.name, *(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)]


def events(folder: Path) -> list[str]:
    return [entry["event"] for _, entry in read_lines(folder / "ledger.jsonl")]


# --- the shared runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@dataclass(frozen=True)
class Background:
    """What goes on in other processes while this one trains."""

    killed: Future[Path]
    interrupted: Future[Ended]
    torchrun: Future[Ended]


@pytest.fixture(scope="module")
def background(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Background]:
    with ThreadPoolExecutor(3) as pool:
        yield Background(
            killed=pool.submit(kill_after_a_checkpoint, store, tmp_path_factory.mktemp("killed")),
            interrupted=pool.submit(interrupt, store, tmp_path_factory.mktemp("interrupted")),
            torchrun=pool.submit(run_two_processes, store, tmp_path_factory.mktemp("torchrun")),
        )


def kill_after_a_checkpoint(store: Store, here: Path) -> Path:
    """Begin the run of `complete`, and kill it in its second stage. Returns its folder."""
    changes = LONG | {"cluster.storage": str(here / "runs")}
    with process(here, "-m", "orchestrator", *store.arguments(changes)) as running:
        wait_until(running, lambda: any(here.glob(f"runs/*/checkpoints/step_{2 * CHECKPOINT_STEPS:08}")))
    (folder,) = (here / "runs").iterdir()
    return folder


def interrupt(store: Store, here: Path) -> Ended:
    """Ctrl-C in the middle of a run whose folder has a space in its name."""
    runs = here / "my runs"
    endless = SLOW | {"pretrain.steps": ENDLESS, "pretrain.checkpoint_every_steps": 1, "cluster.storage": str(runs)}
    with process(here, "-m", "orchestrator", *store.arguments(endless)) as running:
        wait_until(running, lambda: last_step(runs) >= 1 and any(runs.glob("*/mlflow.json")))
        running.send_signal(signal.SIGINT)
        return Ended(running.wait(PATIENCE_S), (here / "log").read_text())


def run_two_processes(store: Store, here: Path) -> Ended:
    """The run of `complete` by two processes under torchrun, then one by the same two that fails."""
    both = {"cluster.num_workers": 2, "cluster.storage": str(here / "runs")}
    failing = {"pretrain.optim.lr": 1e30, "pretrain.optim.clip_grad": None}
    commands = [store.arguments(LONG | both), store.arguments(both | failing)]
    script = here / "pair.py"
    script.write_text(
        "import json, sys\n"
        "from orchestrator.cli import main\n"
        "print('codes', [main(arguments) for arguments in json.loads(sys.argv[1])])\n"
    )
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    with process(here, *torchrun, str(script), json.dumps(commands)) as running:
        return Ended(running.wait(PATIENCE_S), (here / "log").read_text())


@pytest.fixture(scope="module")
def complete(store: Store, background: Background) -> Ended:
    """A run from beginning to end."""
    return command(*store.arguments(LONG))


# --- 1. a complete run ------------------------------------------------------------------------------------------------


def test_a_complete_run_leaves_its_whole_record(complete: Ended) -> None:
    assert complete.code == 0, complete.output
    folder = complete.folder
    curves = read_curves(folder)
    for name in ("loss", "teacher_entropy", "kl", "lr", "teacher_momentum", "grad_norm", "images_per_s"):
        assert [step for step, _ in curves[f"train/{name}"]] == list(range(STEPS)), name
    assert [step for step, _ in curves["eval/knn_top1"]] == [0, STEPS]
    assert all(0 <= value <= 100 for _, value in curves["eval/knn_top1"])
    assert events(folder) == ["started", "finished"]
    assert curves["train/stage"] == [(step, 1 + (step >= FIRST_STEPS)) for step in range(STEPS)]
    checkpoint = folder / "checkpoints" / f"step_{STEPS:08}"
    assert latest_checkpoint(folder / "checkpoints") == checkpoint
    verify_checkpoint(checkpoint)
    assert len(list((folder / "checkpoints").iterdir())) == quickstart().cluster.keep_checkpoints
    assert folder.name in (folder / "report.html").read_text()
    for text in ("same backbone, random weights", "raw pixels", str(folder / "report.html"), "mlflow server"):
        assert text in complete.output


def test_a_complete_run_is_in_mlflow(complete: Ended, store: Store) -> None:
    folder = complete.folder
    record = RunRecord.read(folder)
    run = store.mlflow_run(folder)
    assert run.info.status == "FINISHED"
    config = override(quickstart(), SMALL | LONG | store.changes | {"cluster.launcher": "local"})
    expected = {key: str(value) for key, value in json.loads(json.dumps(flatten(config))).items()}
    derived = {f"derived/{key}": str(value) for key, value in record.derived.items()}
    assert run.data.params == expected | derived
    assert derived["derived/total_steps"] == f"{STEPS}.0"
    tags = run.data.tags
    assert (tags["recipe"], tags["seed"], tags["kind"]) == ("quickstart", "0", "run")
    assert tags.get("git_commit") == record.git_commit
    assert not (ROOT / ".git").exists() or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", tags["git_commit"])
    assert tags["checkpoints"] == str(folder / "checkpoints")
    client = store.client()
    for name, curve in read_curves(folder).items():
        history = client.get_metric_history(run.info.run_id, name)
        assert sorted((point.step, point.value) for point in history) == curve, name
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"run.json", "report.html", "environment.json", "pictures"}


# --- 2. resuming ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resumed(background: Background) -> Ended:
    killed = background.killed.result()
    assert events(killed) == ["started"], "it was killed too late"
    return command("pretrain", "--resume", killed.name, f"cluster.storage={killed.parent}")


def test_a_killed_run_goes_on_bit_for_bit(complete: Ended, resumed: Ended) -> None:
    assert resumed.code == 0, resumed.output
    assert "bit for bit" not in resumed.output  # but in the warning of circumstances that differ
    assert final_sums(resumed.folder) == final_sums(complete.folder)
    assert computed(resumed.folder) == computed(complete.folder)
    assert max(Counter(journal_points(resumed.folder)).values()) == 1
    assert events(resumed.folder) == ["started", "started", "finished"]


def test_a_resumed_run_is_one_run_in_mlflow(resumed: Ended, store: Store) -> None:
    run = store.mlflow_run(resumed.folder)
    assert run.info.status == "FINISHED"
    history = store.client().get_metric_history(run.info.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in history) == read_curves(resumed.folder)["train/loss"]


def test_resuming_a_finished_run_changes_nothing(complete: Ended) -> None:
    before = final_sums(complete.folder), journal_points(complete.folder)
    again = command("pretrain", "--resume", str(complete.folder))
    assert again.code == 0, again.output
    assert (final_sums(complete.folder), journal_points(complete.folder)) == before


def test_a_resumed_run_cannot_be_another(complete: Ended, store: Store) -> None:
    where = f"cluster.storage={store.changes['cluster.storage']}"
    name = complete.folder.name
    unknown = command("pretrain", "--resume", f"{name[:-1]}_", where)
    assert unknown.code == 2
    assert f"error: no run '{name[:-1]}_' in " in unknown.output
    assert f"did you mean {name}?" in unknown.output
    changed = command("pretrain", "--resume", name, where, "pretrain.optim.lr=1e-2")
    assert changed.code == 2
    assert "error: pretrain.optim.lr: a resumed run computes what it began" in changed.output
    assert events(complete.folder)[-1] == "finished"


def test_a_student_is_distilled_from_a_run(complete: Ended, store: Store) -> None:
    name = complete.folder.name
    smaller = {"pretrain.model.embed_dim": 16, "pretrain.teacher.ema_buffers": "true"}
    ended = command(*store.arguments(smaller | {"pretrain.teacher.checkpoint": name}))
    assert ended.code == 0, ended.output
    checkpoint = complete.folder / "checkpoints" / f"step_{STEPS:08}"
    assert RunRecord.read(ended.folder).config["pretrain.teacher.checkpoint"] == str(checkpoint)
    assert [step for step, _ in read_curves(ended.folder)["eval/knn_top1"]] == [0, 8]
    newest = latest_checkpoint(ended.folder / "checkpoints")
    assert newest is not None
    assert load_file(newest / "model.safetensors")["teacher.backbone.cls_token"].shape == (1, 1, 16)
    wrong = command(*store.arguments(smaller | {"pretrain.teacher.checkpoint": f"{name[:-1]}_"}))
    assert wrong.code == 2
    assert f"error: pretrain.teacher.checkpoint = {name[:-1]}_: no run" in wrong.output
    assert f"did you mean {name}?" in wrong.output


# --- 3. interruptions -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(background: Background) -> Ended:
    return background.interrupted.result()


def test_ctrl_c_ends_a_run_in_order(interrupted: Ended, store: Store) -> None:
    assert interrupted.code == 130, interrupted.output
    folder = interrupted.folder
    assert f"python -m orchestrator pretrain --resume {folder.name} 'cluster.storage=my runs'" in interrupted.output
    assert "Traceback" not in interrupted.output
    assert "terminate called" not in interrupted.output
    assert events(folder) == ["started", "interrupted"]
    assert store.mlflow_run(folder).info.status == "KILLED"


def test_the_printed_command_resumes_and_sigterm_interrupts_too(
    interrupted: Ended, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = interrupted.folder
    (printed,) = re.findall(r"resume with: python -m orchestrator (.+)", interrupted.output)
    reached = last_step(folder.parent)
    monkeypatch.chdir(folder.parent.parent)

    has_ended = threading.Event()

    def terminate() -> None:
        while last_step(folder.parent) <= reached:  # the run's handler is there before its first step
            if has_ended.wait(0.02):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=terminate)
    sender.start()
    ended = command(*shlex.split(printed))
    has_ended.set()
    sender.join()
    assert ended.code == 130, ended.output
    assert events(folder) == ["started", "interrupted"] * 2
    assert max(Counter(journal_points(folder)).values()) == 1
    assert store.mlflow_run(folder).info.status == "KILLED"
    size = (folder / "metrics.jsonl").stat().st_size
    time.sleep(0.2)
    assert (folder / "metrics.jsonl").stat().st_size == size, "it trains on"


def test_a_run_that_does_not_start_is_given_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.data import sources

    def slow(config: DataConfig) -> Source:
        time.sleep(3)
        return original(config)

    original = sources.open_source
    monkeypatch.setattr("orchestrator.data.sources.open_source", slow)
    ended = command(*store.arguments(SLOW | {"pretrain.steps": ENDLESS, "cluster.start_timeout_s": 1.0}))
    assert ended.code == 1, ended.output
    assert "no first step within 1 s (cluster: no Ray)" in ended.output
    assert events(ended.folder) == ["started", "failed"]
    assert store.mlflow_run(ended.folder).info.status == "FAILED"


# --- 4. and 7. images of one's own ------------------------------------------------------------------------------------


def picture(number: int, kind: str) -> bytes:
    """An encoded image of noise around a colour that tells its class, number % 3."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 60, (20 + number % 7, 24, 3), dtype=np.uint8)
    pixels[..., number % 3] += 150
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


BROKEN = {
    "cut.jpg": (picture(0, "JPEG")[:-120], "damaged: "),
    "empty.png": (b"", "empty file"),
    "text.jpg": (b"these are words", "not an image in a format that is read"),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 training and 15 test images in three classes; three of the former and one of the latter are unreadable."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(60):
        kind = ("JPEG", "PNG")[number % 2]
        split, label = "test" if number % 4 == 3 else "train", ("red", "green", "blue")[number % 3]
        path = root / split / label / f"{number}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, kind))
    for (name, (data, _)), old in zip(BROKEN.items(), (0, 4, 8), strict=True):
        (victim,) = root.glob(f"train/*/{old}.*")
        victim.unlink()
        victim.with_name(name).write_bytes(data)
    next(root.glob("test/*/15.*")).write_bytes(b"")
    return root


def bad_samples(folder: Path) -> dict[str, str]:
    """The listed files and why; each must be there once."""
    listed = [(line["name"], line["reason"]) for _, line in read_lines(folder / "bad_samples.jsonl")]
    assert len(dict(listed)) == len(listed)
    return dict(listed)


def test_unreadable_images_are_skipped_counted_and_listed_once(photos: Path, store: Store) -> None:
    ended = command(*store.arguments({"data.source": photos, "data.max_bad_fraction": 0.07}))
    assert ended.code == 0, ended.output
    listed = bad_samples(ended.folder)
    assert {Path(name).name for name in listed} == set(BROKEN)
    for name, reason in listed.items():
        assert reason.startswith(BROKEN[Path(name).name][1])
    curves = read_curves(ended.folder)
    assert curves["data/unreadable_images"][-1] == (8, 3)
    # A batch that is not full would have ended the run; see `dino_core.train.train_step`.
    assert [step for step, _ in curves["train/loss"]] == list(range(8))
    assert len(curves["eval/knn_top1"]) == 2
    assert f"Unreadable images were skipped: 3, listed in {ended.folder / 'bad_samples.jsonl'}" in ended.output
    assert ended.output.count("15.PNG: empty file") == 1
    assert store.mlflow_run(ended.folder).data.metrics["data/unreadable_images"] == 3


def test_too_many_unreadable_images_end_the_run(photos: Path, store: Store) -> None:
    config = override(quickstart(), SMALL | SHORT | store.changes | {"data.source": str(photos)})
    before = set((store.folder / "runs").iterdir())
    message = r"[1-3] of 45 images are unreadable, more than the 0 that data.max_bad_fraction = 0.01 allows"
    with pytest.raises(RunFailed, match=message) as caught:
        pretrain(config, recipe="quickstart", local=True)
    (folder,) = set((store.folder / "runs").iterdir()) - before
    assert str(caught.value).startswith(f"{folder.name}: TooManyBadSamples: ")
    assert any(f"{name}: {why}" in str(caught.value) for name, why in bad_samples(folder).items())
    assert events(folder) == ["started", "failed"]
    assert str(caught.value).endswith(read_states(folder)[folder.name].reason.removeprefix("RunFailed: "))
    run = store.mlflow_run(folder)
    assert run.info.status == "FAILED"
    assert "images are unreadable" in run.data.tags["reason"]


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_images_without_labels(kind: str, store: Store, tmp_path: Path) -> None:
    source = tmp_path / ("images" if kind == "folder" else "images.parquet")
    encoded = [picture(number, "PNG") for number in range(1, 38)] + [data for data, _ in BROKEN.values()]
    if kind == "folder":
        source.mkdir()
        for number, data in enumerate(encoded):
            (source / f"{number}.png").write_bytes(data)
    else:
        pq.write_table(pa.table({"image": encoded}), source)
    # Evaluations between the first and the last are due, but have no time.
    no_time = {"pretrain.eval.every_steps": 1, "pretrain.eval.max_share": 1e-9}
    ended = command(*store.arguments({"data.source": source, "data.max_bad_fraction": 0.1, **no_time}))
    assert ended.code == 0, ended.output
    assert len(bad_samples(ended.folder)) == 3
    curves = read_curves(ended.folder)
    assert curves["time/evaluations_left_out"] == [(step, step) for step in range(1, 8)]
    assert [step for step, share in curves["time/evaluation_share"] if 0 < share < 1] == [0, 8]
    scores = {"eval/rankme", "eval/lidar", "eval/alpha_req"}
    assert {name for name in curves if name.startswith("eval/")} == {*scores, "eval/unreadable_images"}
    assert all([step for step, _ in curves[name]] == [0, 8] for name in scores)
    assert len(list(ended.folder.glob("pictures/step_00000008/*.png"))) == 3
    assert [step for step, _ in curves["train/loss"]] == list(range(8))
    assert store.mlflow_run(ended.folder).info.status == "FINISHED"
    if kind == "folder":
        (source / "1.png").unlink()
    else:
        pq.write_table(pa.table({"image": encoded[1:]}), source)
    again = command("pretrain", "--resume", str(ended.folder))
    assert again.code == 2
    assert f"data.source = {source}: other images than when" in again.output


def test_real_photos_in_parquet(store: Store, shared_data: Path) -> None:
    changes = {
        **store.changes,
        "data.source": shared_data / "cifar10.parquet",
        "pretrain.steps": 2,
        "pretrain.batch_size": 16,
        "pretrain.model.depth": 1,
        "pretrain.eval.num_gallery": 200,
        "pretrain.eval.num_label_free": 40,
        "pretrain.eval.num_lidar_images": 10,
        "pretrain.eval.num_queries": 50,
    }
    ended = command("pretrain", "cifar10_tiny", "--local", *(f"{key}={value}" for key, value in changes.items()))
    assert ended.code == 0, ended.output
    curves = read_curves(ended.folder)
    assert [step for step, _ in curves["eval/knn_top1"]] == [0, 2]
    assert [step for step, _ in curves["eval/raw_pixel_knn_top1"]] == [0]
    loss = curves["train/loss"][0][1]
    assert abs(loss / math.log(4096) - 1) < 0.1  # nothing is learned yet


# --- 5. numbers that are not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrain.optim.lr": 1e30}, r"NonFiniteLossError: the loss of step 1 is nan"),
        # Whoever looks first, the run ends with a reason: the loss, a checkpoint, the features.
        ({"pretrain.optim.lr": 1e39}, r"CheckpointError: .*step_00000001: not written, for student.* not finite"),
        ({"pretrain.optim.lr": 1e30, "pretrain.steps": 1}, r"the features of training images at step 1 are not finite"),
    ],
    ids=["loss", "checkpoint", "features"],
)
def test_numbers_that_are_not_finite_end_the_run(changes: dict[str, Any], message: str, store: Store) -> None:
    settings = {"pretrain.optim.clip_grad": None, "pretrain.checkpoint_every_steps": 1}
    ended = command(*store.arguments(settings | changes))
    assert ended.code == 1
    assert re.search(f"error: {ended.folder.name}: .*{message}", ended.output), ended.output
    assert events(ended.folder) == ["started", "failed"]
    assert store.mlflow_run(ended.folder).info.status == "FAILED"
    for file in ended.folder.glob("checkpoints/*/*.safetensors"):
        assert all(np.isfinite(tensor).all() for tensor in load_file(file).values())


# --- 6. torchrun ------------------------------------------------------------------------------------------------------


def test_two_processes_compute_what_one_does(complete: Ended, background: Background, store: Store) -> None:
    ended = background.torchrun.result()
    assert ended.code == 0, ended.output
    assert ended.output.count("codes [0, 1]") == 2, ended.output
    folder, _ = (Path(found) for found in re.findall(r"records in (.+)", ended.output))
    assert events(folder) == ["started", "finished"]
    one, two = read_curves(complete.folder), read_curves(folder)
    for name in ("train/loss", "train/teacher_entropy"):
        assert [value for _, value in two[name]][:20] == pytest.approx([value for _, value in one[name]][:20], rel=1e-3)
    assert two["eval/knn_top1"][0] == one["eval/knn_top1"][0]
    assert RunRecord.read(folder).derived["batch_size_per_worker"] == 8
    assert max(Counter(journal_points(folder)).values()) == 1
    assert store.mlflow_run(folder).info.status == "FINISHED"


def test_a_failure_of_two_processes_is_told_like_that_of_one(background: Background, store: Store) -> None:
    ended = background.torchrun.result()
    _, folder = (Path(found) for found in re.findall(r"records in (.+)", ended.output))
    assert f"error: {folder.name}: NonFiniteLossError: the loss of step 1 is nan" in ended.output
    assert "Traceback" not in ended.output
    assert events(folder) == ["started", "failed"]
    assert store.mlflow_run(folder).info.status == "FAILED"


def test_the_readmes_torchrun_command_is_understood() -> None:
    (line,) = re.findall(r"^torchrun (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    understood = parse_args(shlex.split(line))  # it takes abbreviations of its options wherever they stand
    assert (understood.module, understood.training_script, understood.nproc_per_node) == (True, "orchestrator", "2")
    ended = command(*understood.training_script_args, "--dry-run")
    assert ended.code == 0
    assert re.search(r"cluster.num_workers +2", ended.output)


@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 1)])
def test_processes_must_be_as_many_as_workers(
    processes: int, workers: int, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    ended = command(*store.arguments({"cluster.num_workers": workers}))
    assert ended.code == 2
    assert f"error: cluster.num_workers = {workers}: this launch has {processes} processes" in ended.output
    assert "records in" not in ended.output
