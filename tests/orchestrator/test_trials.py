"""Finding and reading trials by names of many kinds, on disk and in MLflow."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import mlflow
import pytest

from orchestrator import mlflow_trials, records, tracking
from orchestrator.config import TrackingConfig
from orchestrator.trials import (
    CompareError,
    TrialSummary,
    check_metric,
    common_definition,
    load_trials,
)

COMMIT, DIGEST = "0a1b" * 10, "sha256:77"


def png(colour: str) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(content, "PNG")
    return content.getvalue()


def write_run(folder: Path, run_id: str, seed: int, sweep: str | None = None) -> None:
    records.RunRecord(
        run_id=run_id,
        experiment="temperature" if sweep else "alone",
        recipe="quickstart",
        seed=seed,
        config={"pretrain.seed": seed, "pretrain.head.num_prototypes": 64},
        derived={"steps_per_epoch": 2.0},
        sweep=sweep,
        git_commit=COMMIT,
        data_digest=DIGEST,
    ).write(folder)
    journal = records.Journal(folder)
    for step in (0, 10):
        journal.log(step, {"train/loss": 4.0 - seed, "train/kl": 1.0, "cost/device_hours": 0.1 * step})
    journal.log(10, {"eval/rankme": 20.0 + seed})
    journal.close()


def write_pictures(run_dir: Path, step: int, **files: bytes) -> None:
    folder = run_dir / "pictures" / f"step_{step:08}"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / f"{name}.png").write_bytes(content)


def end(folder: Path, *run_ids: str) -> None:
    ledger = records.Ledger(folder)
    for run_id in run_ids:
        ledger.record(run_id, "finished")
    ledger.close()


def write_sweep(root: Path, name: str, metric: str = "train/kl", mode: str = "min") -> Path:
    folder = root / name
    trials = [f"t{seed}" for seed in (0, 1)]
    definition: dict[str, Any] = {"sweep": "temperature", "recipe": "quickstart", "space": {}, "seeds": 2}
    definition |= {"metric": metric, "mode": mode, "trials": [{"trial_id": trial} for trial in trials]}
    records.write_json(folder / records.SWEEP_FILE, definition)
    for seed, trial in enumerate(trials):
        write_run(folder / records.TRIALS_DIR / trial, f"{name}.{trial}", seed, name)
    end(folder, name, *(f"{name}.{trial}" for trial in trials))
    return folder


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two trials, with pictures, and a lone run."""
    root = tmp_path_factory.mktemp("runs")
    sweep = write_sweep(root, "temperature-1")
    write_pictures(sweep / "trials" / "t0", 5, attention=png("red"))
    write_pictures(sweep / "trials" / "t0", 10, attention=png("blue"), crops=png("green"), text=b"no picture")
    write_run(root / "lone", "lone", seed=5)
    end(root / "lone", "lone")
    return root


@pytest.fixture(scope="module")
def uri(storage: Path) -> str:
    """A store to which they were delivered, with pictures as artifacts."""
    target = tracking.Target.of(TrackingConfig(uri=f"sqlite:///{storage.parent / 'mlflow.db'}"))
    client = tracking.connect(target)
    tracking.deliver(client, storage / "temperature-1", "temperature", target)
    tracking.deliver(client, storage / "lone", "alone", target)
    run = storage / "temperature-1" / "trials" / "t0"
    run_id = records.read_json(run / tracking.STATE_FILE)["run_id"]
    for folder in sorted((run / "pictures").iterdir()):
        client.log_artifacts(run_id, str(folder), f"pictures/{folder.name}")
    return target.uri


def names(trials: list[TrialSummary]) -> list[str]:
    return [trial.name for trial in trials]


def test_several_names_of_every_kind_at_once(storage: Path, uri: str) -> None:
    (run_id,) = {trial.run_id for trial in load_trials(["alone"], uri=uri)}
    for first in (str(storage / "temperature-1"), "temperature-1"):
        found = load_trials([first, run_id], storage=str(storage), uri=uri)
        assert names(found) == ["t0", "t1", "lone"]
    assert names(load_trials([str(storage / "lone"), "temperature"], storage="nowhere", uri=uri)) == [
        "lone",
        "t0",
        "t1",
    ]
    assert names(load_trials([str(storage / "temperature-1" / "trials" / "t1")], uri=uri)) == ["t1"]


def test_in_mlflow_a_sweep_goes_by_its_name_and_by_its_parents_id(storage: Path, uri: str) -> None:
    parent = records.read_json(storage / "temperature-1" / tracking.STATE_FILE)["run_id"]
    for name in ("temperature-1", parent):
        assert names(load_trials([name], storage="nowhere", uri=uri)) == ["t0", "t1"]
    assert names(load_trials(["t1"], storage="nowhere", uri=uri)) == ["t1"]


def test_a_run_that_is_named_twice_comes_once_wherever_it_is_read(storage: Path, uri: str) -> None:
    found = load_trials(["temperature-1", "temperature", "temperature-1/trials/t0"], storage=str(storage), uri=uri)
    assert names(found) == ["t0", "t1"]


def test_disk_and_mlflow_tell_the_same(storage: Path, uri: str) -> None:
    on_disk = load_trials(["temperature-1"], storage=str(storage))
    tracked = load_trials(["temperature"], storage="nowhere", uri=uri)
    for ours, theirs in zip(tracked, on_disk, strict=True):
        for name in ("name", "status", "params", "seed", "curves", "experiment", "record_name"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert (ours.git_commit, ours.data_digest) == (theirs.git_commit, theirs.data_digest) == (COMMIT, DIGEST)
        assert ours.definition == theirs.definition is not None
    assert (on_disk[0].uri, tracked[0].uri) == (str(storage / "temperature-1" / "trials" / "t0"), uri)


def test_pictures_are_the_newest_and_read_when_asked_for(storage: Path, uri: str) -> None:
    for found in (load_trials(["temperature-1"], storage=str(storage)), load_trials(["temperature"], uri=uri)):
        first, second = found
        assert "pictures" not in vars(first)
        assert first.pictures is not None
        assert (first.pictures.step, first.pictures.files) == (10, {"attention": png("blue"), "crops": png("green")})
        assert second.pictures is None


def test_sweeps_that_agree_say_together_what_they_are_ranked_by(tmp_path: Path) -> None:
    for name, metric in (("a", "train/kl"), ("b", "train/kl"), ("c", "train/loss")):
        write_sweep(tmp_path, name, metric)
    write_run(tmp_path / "lone", "lone", 0)

    def definition(*given: str) -> Any:
        return common_definition(load_trials(given, storage=str(tmp_path)))

    assert definition("a")["trials"] == [{"trial_id": "t0"}, {"trial_id": "t1"}]
    assert definition("a", "b", "lone") == definition("b")
    assert definition("a", "b")["metric"] == "train/kl"
    assert definition("a", "c") is definition("lone") is None


def test_a_metric_that_nobody_logged_is_refused_with_the_nearest(storage: Path) -> None:
    trials = load_trials(["temperature-1"], storage=str(storage))
    check_metric("train/loss", trials)
    with pytest.raises(CompareError, match="--metric train/los: no trial logged it; there is train/loss"):
        check_metric("train/los", trials)


def test_unknown_names_and_ids_are_refused(storage: Path, uri: str) -> None:
    with pytest.raises(CompareError, match="no experiment 'temprature'; there is 'temperature'"):
        load_trials(["temprature"], uri=uri)
    for name in ("0" * 32, "it's"):
        with pytest.raises(CompareError, match="no experiment"):
            load_trials([name], uri=uri)


def test_each_history_is_asked_for_once_and_those_of_the_machine_are_not(
    storage: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = tracking.connect(tracking.Target.of(TrackingConfig(uri=uri)))
    run_id = records.read_json(storage / "lone" / tracking.STATE_FILE)["run_id"]
    client.log_metric(run_id, "system/cpu_utilization_percentage", 50.0)
    asked: list[tuple[str, str]] = []
    original = mlflow.MlflowClient.get_metric_history

    def count(self: mlflow.MlflowClient, run_id: str, key: str) -> Any:
        asked.append((run_id, key))
        return original(self, run_id, key)

    monkeypatch.setattr(mlflow.MlflowClient, "get_metric_history", count)
    (lone,) = load_trials([run_id], uri=uri)
    assert sorted(key for _, key in asked) == ["cost/device_hours", "eval/rankme", "train/kl", "train/loss"]
    assert sorted(lone.curves) == sorted(key for _, key in asked)


def test_a_run_of_a_tracking_server_has_a_page(storage: Path, uri: str) -> None:
    run_id = records.read_json(storage / "lone" / tracking.STATE_FILE)["run_id"]
    run = tracking.connect(tracking.Target(uri, None)).get_run(run_id)
    page = mlflow_trials.page_of(run, "https://user:secret@mlflow.example:5000/")
    assert page == f"https://mlflow.example:5000/#/experiments/{run.info.experiment_id}/runs/{run_id}"
    assert mlflow_trials.page_of(run, uri) == uri


def test_a_login_in_the_address_of_a_server_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    with pytest.raises(CompareError) as refused:
        load_trials(["e"])
    assert "127.0.0.1:9" in str(refused.value)
    assert "secret" not in str(refused.value)
