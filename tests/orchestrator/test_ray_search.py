"""A search and a population on a real Ray: trials that follow from others, and a driver that dies in the middle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from orchestrator import run_sweep
from orchestrator.catalog import load_recipe
from orchestrator.lineage import in_words
from orchestrator.overrides import override
from orchestrator.population import POPULATION_FILE
from orchestrator.records import RunRecord, read_curves, read_lines, read_states
from orchestrator.search import SEARCH_FILE, Asked, Search, propose
from orchestrator.space import LogUniform
from orchestrator.sweep import Sweep, check
from orchestrator.trials import load_from_disk, load_trials

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

LR = "pretrain.optim.lr"


TINY: dict[str, Any] = {
    "pretrain.steps": 4,
    "pretrain.batch_size": 16,
    "pretrain.log_every_steps": 1,
    "pretrain.model.depth": 1,
    "pretrain.head.num_prototypes": 64,
    "pretrain.eval.every_steps": None,
}


def test_a_search_goes_on_where_its_driver_died(ray_head: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tiny = TINY | {
        "tracking.uri": uri,
        "cluster.address": ray_head.address,
        "cluster.storage": str(tmp_path / "runs"),
        "cluster.max_concurrent_trials": 1,
    }
    sweep = Sweep(
        name="lr",
        base=override(load_recipe("quickstart"), tiny),
        space={LR: LogUniform(1e-5, 1e-2)},
        design="optuna",
        num_trials=3,
        num_startup_trials=1,
        objectives={"train/loss": "min"},
    )
    ask = Search.ask

    def die(search: Search) -> Any:
        ask(search)  # the suggestion is noted, its records are not yet written
        raise OSError("the driver dies")

    with monkeypatch.context() as patch:
        patch.setattr(Search, "ask", die)
        with pytest.raises(OSError, match="the driver dies"):
            run_sweep.run_sweep(sweep)
    (folder,) = (tmp_path / "runs").iterdir()
    noted = [line["trials"] for _, line in read_lines(folder / SEARCH_FILE)]
    assert [len(trials) for trials in noted] == [1, 1]
    listed = json.loads((folder / "sweep.json").read_text())["trials"]
    assert [trial["trial_id"] for trial in listed] == noted[0]

    result = run_sweep.resume_sweep(folder.name, storage=str(tmp_path / "runs"))

    assert result.ok
    lines = [line for _, line in read_lines(folder / SEARCH_FILE)]
    assert [line["trials"] for line in lines][:2] == noted
    ids = [trial for line in lines for trial in line["trials"]]
    definition = json.loads((folder / "sweep.json").read_text())
    assert [trial["trial_id"] for trial in definition["trials"]] == ids
    assert len(set(ids)) == 3
    ended = {run: state.event for run, state in read_states(folder).items()}
    assert ended == {f"{folder.name}.{trial}": "finished" for trial in ids} | {folder.name: "finished"}
    records = [RunRecord.read(folder / "trials" / trial) for trial in ids]
    assert [record.config[LR] for record in records] == [line["point"][LR] for line in lines]
    losses = [read_curves(folder / "trials" / trial)["train/loss"][-1][1] for trial in ids]
    history = [
        Asked({LR: record.config[LR]}, (trial,), outcome="finished", values=(loss,))
        for trial, record, loss in zip(ids, records, losses, strict=True)
    ]
    checked = check(sweep)
    assert [propose(checked, ["min"], history[:number])[0].trials for number in range(3)] == [(trial,) for trial in ids]
    assert {trial.name for trial in load_from_disk(folder)} == set(ids)

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("lr")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {folder.name, *ids}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs[folder.name].data.params["trials"] == "3"


def test_the_segments_of_a_population_go_on_from_one_another(ray_head: Any, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tiny = TINY | {
        "pretrain.eval.num_gallery": 64,
        "pretrain.eval.num_queries": 64,
        "pretrain.eval.num_label_free": 0,
        "pretrain.eval.num_lidar_images": 0,
        "pretrain.eval.num_pictures": 0,
        "tracking.uri": uri,
        "cluster.address": ray_head.address,
        "cluster.storage": str(tmp_path / "runs"),
        "cluster.data_cpus": 1,
    }
    sweep = Sweep(
        name="pbt",
        base=override(load_recipe("quickstart"), tiny),
        space={LR: [1e-3, 1.0]},
        scheduler="pbt",
        generation_steps=2,
    )

    result = run_sweep.run_sweep(sweep)

    assert result.ok
    trials = result.folder / "trials"
    decided = [line["members"] for _, line in read_lines(result.folder / POPULATION_FILE)]
    assert [[each["trial"] for each in members] for members in decided] == [
        [f"m00-g0{generation}-s0", f"m01-g0{generation}-s0"] for generation in (0, 1)
    ]
    (parent,) = {each["parent"] for each in decided[1]}
    knn = {each["trial"]: read_curves(trials / each["trial"])["eval/knn_top1"][-1][1] for each in decided[0]}
    assert knn[parent] == max(knn.values())
    losses = [read_curves(trials / each["trial"])["train/loss"] for each in decided[1]]
    assert [[step for step, _ in curve] for curve in losses] == [[2, 3]] * 2
    assert losses[0][0] == losses[1][0], "both go on from the same weights"
    assert losses[0][1] != losses[1][1], "with other settings"

    from_disk = load_trials([str(result.folder)])
    from_mlflow = load_trials([result.folder.name], storage=str(tmp_path), uri=uri)
    assert [in_words(trial) for trial in from_mlflow] == [in_words(trial) for trial in from_disk]
    assert {in_words(trial).split(", ")[-1][-3:] for trial in from_disk} <= {"2-4", "0-4"}
    for disk, mlflow in zip(from_disk, from_mlflow, strict=True):
        assert disk.curves["train/loss"] == mlflow.curves["train/loss"]
        assert [step for step, _ in disk.curves["train/loss"]] == [0, 1, 2, 3]
    runs = MlflowClient(uri).search_runs([MlflowClient(uri).get_experiment_by_name("pbt").experiment_id])
    (whole,) = (run for run in runs if run.data.tags["kind"] == "sweep")
    assert whole.data.params["trials"] == "4"
    parents = {run.info.run_name: run.data.tags.get("parent") for run in runs if run.data.tags["kind"] == "trial"}
    assert parents == {each["trial"]: each["parent"] for members in decided for each in members}
