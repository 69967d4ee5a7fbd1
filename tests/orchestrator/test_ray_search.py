"""A search on a real Ray: trials that are added while others run, and a driver that dies in the middle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from orchestrator import run_sweep
from orchestrator.catalog import load_recipe
from orchestrator.overrides import override
from orchestrator.records import RunRecord, read_curves, read_lines, read_states
from orchestrator.search import SEARCH_FILE, Asked, Search, propose
from orchestrator.space import LogUniform
from orchestrator.sweep import Sweep, check
from orchestrator.trials import load_from_disk

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

LR = "pretrain.optim.lr"


def test_a_search_goes_on_where_its_driver_died(ray_head: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tiny = {
        "pretrain.steps": 4,
        "pretrain.batch_size": 16,
        "pretrain.log_every_steps": 1,
        "pretrain.model.depth": 1,
        "pretrain.head.num_prototypes": 64,
        "pretrain.eval.every_steps": None,
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
