"""Population-based training: its decisions on closed forms, a folder as its only memory, and training on digits."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dino_core.checkpoint import checkpoint_path
from dino_core.config import ConfigError
from orchestrator import population
from orchestrator.catalog import load_recipe
from orchestrator.compare import compare
from orchestrator.dry_run import print_sweep
from orchestrator.effects import analyse, importance
from orchestrator.launch import launch_local
from orchestrator.lineage import continued, in_words
from orchestrator.overrides import override
from orchestrator.population import POPULATION_FILE, Member, Population, explore, next_generation, num_replaced
from orchestrator.records import Event, Journal, Ledger, RunRecord, read_curves, read_json, read_lines
from orchestrator.run_sweep import _Plan, _resumed_search, _write_plan, resume_sweep
from orchestrator.space import IntUniform, LogUniform, Space, Uniform
from orchestrator.sweep import Row, Sweep, check, expand
from orchestrator.tables import render, schedule_table
from orchestrator.trials import load_from_disk
from orchestrator.worker import read_failure

LR, DECAY, TEMP = "pretrain.optim.lr", "pretrain.optim.weight_decay", "pretrain.teacher.temp"
KNN = "eval/knn_top1"

SMALL: dict[str, Any] = {
    "pretrain.steps": 7,
    "pretrain.batch_size": 16,
    "pretrain.log_every_steps": 1,
    "pretrain.model.embed_dim": 32,
    "pretrain.model.depth": 1,
    "pretrain.head.hidden_dim": 32,
    "pretrain.head.num_prototypes": 64,
    "pretrain.eval.every_steps": None,
    "pretrain.eval.num_gallery": 64,
    "pretrain.eval.num_queries": 64,
    "pretrain.eval.num_label_free": 0,
    "pretrain.eval.num_lidar_images": 0,
    "pretrain.eval.num_pictures": 0,
}


def populated(members: int = 4, **more: Any) -> Sweep:
    settings: dict[str, Any] = {
        "name": "pbt",
        "base": "quickstart",
        "space": {LR: LogUniform(1e-5, 1e-1), DECAY: Uniform(0.0, 0.5)},
        "design": "qmc",
        "num_trials": members,
        "scheduler": "pbt",
        "generation_steps": 3,
    }
    return Sweep(**settings | more)


# --- decisions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("members", "quantile", "count"), [(2, 0.25, 1), (4, 0.25, 1), (5, 0.25, 2), (3, 0.5, 1)])
def test_as_many_are_replaced_as_there_are_better_ones(members: int, quantile: float, count: int) -> None:
    assert num_replaced(members, quantile) == count


def moved(values: Any, value: Any, *, resample_prob: float = 0.0, times: int = 60) -> Counter[Any]:
    space = Space({LR: values}, {}, (LR,))
    rng = np.random.default_rng(0)
    return Counter(explore(space, {LR: value}, rng, resample_prob)[LR] for _ in range(times))


@pytest.mark.parametrize(
    ("values", "value", "found"),
    [
        (LogUniform(1e-4, 1e-1), 1e-2, {0.008, 0.012}),
        (LogUniform(1e-4, 1e-2), 1e-2, {0.008, 0.01}),
        (Uniform(0.9, 1.0), 0.95, {0.94, 0.96}),
        (Uniform(0.9, 1.0), 0.905, {0.9, 0.915}),
        (IntUniform(1, 9), 3, {2, 4}),
        (IntUniform(1, 1000, log=True), 100, {80, 120}),
        (IntUniform(1, 9, step=4), 9, {5, 9}),
        ([1, 2, 5], 2, {1, 5}),
        ([1, 2, 5], 5, {2}),
        ([1, 2, 5], 1, {2}),
        ([7], 7, {7}),
    ],
)
def test_a_perturbed_value_is_beside_the_old_one_and_in_its_range(values: Any, value: Any, found: set[Any]) -> None:
    counts = moved(values, value)
    assert set(counts) == found
    assert min(counts.values()) >= 60 / len(found) / 2, "up as often as down"


def test_a_value_drawn_anew_can_be_any() -> None:
    assert len(moved(LogUniform(1e-4, 1e-1), 1e-2, resample_prob=1.0)) > 50
    anew = moved(LogUniform(1e-4, 1e-1), 1e-2, resample_prob=0.25, times=400)
    assert 60 <= 400 - anew[0.008] - anew[0.012] <= 140


def members_of(sweep: Sweep) -> list[Member]:
    return [Member(trial.trial_id, trial.changes) for trial in expand(sweep)]


def test_the_last_go_on_from_the_first_and_the_others_as_they_are() -> None:
    sweep = populated(8, exploit_quantile=0.25)
    checked, members = check(sweep), members_of(sweep)
    scores = [50.0, 10.0, 70.0, 40.0, 20.0, 60.0, 90.0, 30.0]
    found = next_generation(checked, 1, members, scores, "max")
    for place, (point, parent) in enumerate(found):
        if place in (1, 4):
            assert parent in (members[2].trial, members[6].trial)
            old = members[2 if parent == members[2].trial else 6].point
            assert point.keys() == old.keys()
            assert point != old
        else:
            assert (point, parent) == (members[place].point, members[place].trial)
    least = next_generation(checked, 1, members, scores, "min")
    assert {least[2][1], least[6][1]} <= {members[1].trial, members[4].trial}


def test_decisions_follow_from_seed_generation_member_and_results_alone() -> None:
    sweep = populated(8)
    members, scores = members_of(sweep), [float(place) for place in range(8)]
    first = next_generation(check(sweep), 1, members, scores, "max")
    assert next_generation(check(sweep), 1, members, scores, "max") == first
    assert next_generation(check(sweep), 2, members, scores, "max")[:2] != first[:2]
    other = check(replace(sweep, design_seed=1))
    assert next_generation(other, 1, members, scores, "max")[:2] != first[:2]
    assert first[0] != first[1]


def test_who_failed_is_replaced_and_never_gone_on_from() -> None:
    sweep = populated(4)
    checked, members = check(sweep), members_of(sweep)
    one_left = next_generation(checked, 1, members, [None, None, 5.0, None], "max")
    assert [parent for _, parent in one_left] == [members[2].trial] * 4
    assert one_left[2] == (members[2].point, members[2].trial)
    one_failed = next_generation(checked, 1, members, [1.0, None, 5.0, 3.0], "max")
    assert [parent for _, parent in one_failed] == [members[place].trial for place in (0, 2, 2, 3)]
    with pytest.raises(ValueError, match="no member has ended generation 0 with a score"):
        next_generation(checked, 1, members, [None] * 4, "max")


def test_settings_that_do_not_go_together_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    scale, blur = "pretrain.crops.global_scale", "pretrain.crops.blur_sigma"
    space = {scale: [(0.4, 1.0), (0.2, 0.9)], blur: [(0.1, 2.0), (0.1, 1.0)]}
    sweep = populated(design="grid", num_trials=None, space=space)
    checked, members = check(sweep), members_of(sweep)
    proposals = iter([{scale: (0.9, 0.2), blur: (0.1, 2.0)}, {scale: (0.3, 0.9), blur: (0.1, 2.0)}])
    monkeypatch.setattr(population, "explore", lambda *args: next(proposals))
    found = next_generation(checked, 1, members, [4.0, 3.0, 2.0, 1.0], "max")
    assert found[3] == ({scale: (0.3, 0.9), blur: (0.1, 2.0)}, members[0].trial)


def test_random_search_is_beaten_where_the_best_setting_moves() -> None:
    """The paper's toy (arXiv 1711.09846, figure 2): each coordinate has a gradient only if its own setting is on."""

    def final(adapts: bool, seed: int) -> float:
        sweep = populated(2, space={LR: Uniform(1e-6, 1), DECAY: Uniform(0, 1)}, design_seed=seed, resample_prob=0.0)
        checked, (one, other) = check(sweep), members_of(sweep)
        members = [replace(one, point={LR: 1.0, DECAY: 0.0}), replace(other, point={LR: 1e-6, DECAY: 1.0})]
        weights = {member.trial: (0.9, 0.9) for member in members}
        best = -math.inf
        for generation in range(1, 60):
            for member in members:
                x, y = weights[member.trial]
                for _ in range(4):
                    x, y = x - 0.02 * member.point[LR] * x, y - 0.02 * member.point[DECAY] * y
                weights[member.trial] = (x, y)
            scores: list[float | None] = [1.2 - sum(w * w for w in weights[member.trial]) for member in members]
            best = max(best, *(score for score in scores if score is not None))
            if adapts:
                decided = next_generation(checked, generation, members, scores, "max")
                weights = {m.trial: weights[parent] for m, (_, parent) in zip(members, decided, strict=True)}
                members = [replace(m, point=point) for m, (point, _) in zip(members, decided, strict=True)]
        return best

    assert final(False, 0) < 0.4
    assert min(final(True, seed) for seed in range(3)) > 1.0


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generation_steps": None}, r"sweep\.generation_steps = None: must be a whole number >= 1"),
        ({"design": "optuna"}, r"sweep\.design = optuna: must be one of grid, random, qmc with"),
        ({"rows": {"a": Row()}}, r"sweep\.scheduler = pbt: must be another one for a sweep with rows"),
        ({"seeds": 2}, r"sweep\.seeds = 2: must be 1 with sweep\.scheduler = pbt; run the sweep again"),
        ({"exploit_quantile": 0.6}, r"sweep\.exploit_quantile = 0\.6: must be > 0 and <= 0\.5"),
        ({"conditions": {LR: {TEMP: [0.04]}}}, r"sweep\.conditions: must be none with"),
        ({"num_trials": 1}, "makes a population of 1; must make 2 members or more"),
        ({"space": {"pretrain.head.num_prototypes": [64, 128]}, "num_trials": 2}, "decides the weights that there are"),
        ({"space": {"pretrain.batch_size": [16, 32]}, "num_trials": 2}, "decides which images a step has"),
        ({"space": {"pretrain.crops.global_size": [32, 64]}, "num_trials": 2}, "decides the shape of position emb"),
        ({"space": {"pretrain.crops.num_local_crops": [2, 4]}, "num_trials": 2}, "changes what a step costs"),
        ({"space": {"pretrain.seed": [0, 1]}, "num_trials": 2}, "fixes weights and order of the images"),
        ({"space": {"data.source": ["digits", "x"]}, "num_trials": 2}, "decides what the images are"),
        ({"space": {"pretrain.optim.name": ["sgd", "adamw"]}, "num_trials": 2}, "is no value that each step reads"),
        ({"changes": {"cluster.launcher": "train"}}, r"cluster\.launcher = train: must be trial with"),
        ({"changes": {"cluster.num_workers": 2}}, r"cluster\.num_workers = 2 must be 1"),
        ({"space": {TEMP: [0.04, 0.07]}, "num_trials": 2, "metric": "train/loss"}, "cannot compare trials with diff"),
    ],
)  # fmt: skip
def test_what_no_population_can_do_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(populated(**settings))


def test_a_run_of_one_generation_is_refused(tmp_path: Path) -> None:
    sweep = populated(changes={**SMALL, "cluster.storage": str(tmp_path)}, generation_steps=7)
    message = r"sweep\.generation_steps = 7: no member would ever be replaced; must be less than the 7 steps of a run"
    with pytest.raises(ConfigError, match=message):
        _write_plan(sweep)
    with pytest.raises(ConfigError, match=message):
        print_sweep(sweep, expand(sweep), lambda _: None)
    assert not list(tmp_path.iterdir())


def test_the_dry_run_says_what_a_population_does() -> None:
    lines: list[str] = []
    sweep = populated(changes=SMALL)
    print_sweep(sweep, expand(sweep), lines.append)
    assert any(line.startswith("  m03-g00-s0 ") for line in lines)
    (told,) = (line for line in lines if line.startswith("  scheduler "))
    assert told.endswith(
        "pbt: 4 members; after every 3 steps the last 1 of them go on from one of the first 1, with settings perturbed "
        "or, with probability 0.25, drawn anew"
    )
    assert any(line.startswith("  steps ") and line.endswith("7 per trial, 28 in all") for line in lines)


# --- the folder -------------------------------------------------------------------------------------------------------


def write(tmp_path: Path, **more: Any) -> _Plan:
    changes = {**SMALL, "cluster.storage": str(tmp_path), **more.pop("changes", {})}
    return _write_plan(populated(**{"changes": changes, **more}))


def end(plan: _Plan, trial_id: str, knn: float, event: Event = "finished") -> None:
    """What worker and driver leave of a segment."""
    journal = Journal(plan.run_dir(trial_id))
    journal.log(plan.records[trial_id].last_step, {KNN: knn})
    journal.close()
    (plan.run_dir(trial_id) / "checkpoints").mkdir()
    ledger = Ledger(plan.folder)
    ledger.record(f"{plan.folder.name}.{trial_id}", event)
    ledger.close()


def resumed(plan: _Plan) -> _Plan:
    """The plan as another process reads it from the folder."""
    definition = read_json(plan.folder / "sweep.json")
    ids = [trial["trial_id"] for trial in definition["trials"]]
    records = {trial_id: RunRecord.read(plan.run_dir(trial_id)) for trial_id in ids}
    found = _resumed_search(plan.folder, definition, records)
    assert isinstance(found, Population)
    again = _Plan(plan.folder, definition, records, found)
    again.add(found.lost(records))
    return again


def score(trial_id: str) -> float:
    return int(hashlib.sha256(trial_id.encode()).hexdigest(), 16) % 100


def decisions(plan: _Plan) -> list[Any]:
    return [line["members"] for _, line in read_lines(plan.folder / POPULATION_FILE)]


def test_a_resumed_population_has_the_same_trials(tmp_path: Path) -> None:
    whole, broken = write(tmp_path / "a"), write(tmp_path / "b")
    assert whole.search is not None
    assert whole.search.left() == 8
    while True:
        for trial_id in whole.open_trials():
            end(whole, trial_id, score(trial_id))
        if not whole.ask():
            break
    for _ in range(2):
        assert isinstance(broken.search, Population)
        for trial_id in broken.open_trials()[:2]:
            end(broken, trial_id, score(trial_id))
        broken = resumed(broken)  # in the middle of a generation
        for trial_id in broken.open_trials():
            end(broken, trial_id, score(trial_id))
        assert broken.search is not None
        noted = [trial.trial_id for trial, _ in broken.search.ask()]  # neither records nor list are written
        broken = resumed(broken)
        assert broken.open_trials() == noted
    assert decisions(broken) == decisions(whole)
    told = [[(name, r.changes, r.segment) for name, r in plan.records.items()] for plan in (broken, whole)]
    assert told[0] == told[1]
    assert len(whole.records) == read_json(whole.folder / "sweep.json")["num_segments"] == 12
    segments = [record.segment for record in whole.records.values() if record.segment]
    assert [(s.start_step, s.stop_step) for s in segments[::4]] == [(0, 3), (3, 6), (6, 7)]
    assert all((s.parent is None) == (s.generation == 0) for s in segments)
    assert whole.search.describe() == "population: 3 of 3 generations, 2 times a member replaced"


def test_a_population_goes_on_by_its_own_launcher_only(tmp_path: Path) -> None:
    plan = write(tmp_path)
    with pytest.raises(ConfigError, match=r"cluster\.launcher = train: must be trial with sweep\.scheduler = pbt"):
        resume_sweep(plan.folder.name, {"cluster.launcher": "train"}, storage=str(tmp_path))
    assert not (plan.folder / "ledger.jsonl").exists()


def test_checkpoints_go_when_nobody_can_need_them(tmp_path: Path) -> None:
    plan = write(tmp_path)
    there = []
    for _ in range(3):
        for trial_id in plan.open_trials():
            end(plan, trial_id, score(trial_id))
        plan.ask()
        there.append(sorted({path.parent.name[4:7] for path in plan.folder.glob("trials/*/checkpoints")}))
    assert there == [["g00"], ["g01"], ["g01", "g02"]]


def test_a_failed_member_is_replaced_and_not_tried_again(tmp_path: Path) -> None:
    plan = write(tmp_path)
    for trial_id in plan.open_trials():
        end(plan, trial_id, 50.0, "failed" if trial_id.startswith("m02") else "finished")
    assert resumed(plan).open_trials() == ["m02-g00-s0"], "before anything was decided"
    plan.ask()
    assert decisions(plan)[1][2]["parent"] == "m00-g00-s0"
    assert resumed(plan).open_trials() == [f"m0{member}-g01-s0" for member in range(4)]
    for trial_id in plan.open_trials():
        end(plan, trial_id, math.nan)
    assert plan.ask() == []
    assert plan.search is not None
    assert plan.search.describe().endswith("; no member has ended the last one with a value of eval/knn_top1")


# --- training ---------------------------------------------------------------------------------------------------------


def train(plan: _Plan) -> None:
    """The open trials one after the other in this process, as the launcher `local` trains."""
    ledger = Ledger(plan.folder)
    for trial_id in plan.open_trials():
        ledger.record(f"{plan.folder.name}.{trial_id}", "started")
        launch_local(plan.run_dir(trial_id))
        assert read_failure(plan.run_dir(trial_id)) is None
        ledger.record(f"{plan.folder.name}.{trial_id}", "finished")
    ledger.close()


def weights(plan: _Plan, trial_id: str, step: int) -> list[bytes]:
    path = checkpoint_path(plan.run_dir(trial_id) / "checkpoints", step)
    return [(path / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]


def test_who_is_replaced_goes_on_with_anothers_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two members, of which the one with a rate of 1 has forgotten what features are.
    plan = write(tmp_path, space={LR: [1e-3, 1.0]}, design="grid", num_trials=None)
    train(plan)
    assert plan.ask() == ["m00-g01-s0", "m01-g01-s0"]
    knn = {trial_id: read_curves(plan.run_dir(trial_id))[KNN][-1] for trial_id in plan.records if "g00" in trial_id}
    assert {step for step, _ in knn.values()} == {3}
    best, last = sorted(knn, key=lambda trial_id: -knn[trial_id][1])
    kept, child = best.replace("g00", "g01"), last.replace("g00", "g01")
    scores = [line["scores"] for _, line in read_lines(plan.folder / POPULATION_FILE)][1]
    assert scores == {trial_id: value for trial_id, (_, value) in knn.items()}
    found = plan.records[child].segment
    assert found is not None
    assert (found.parent, found.start_step, found.stop_step) == (best, 3, 6)
    assert plan.records[child].config[LR] != plan.records[kept].config[LR] == plan.records[best].config[LR]

    # As if nothing had been perturbed: the same settings make the same weights, whoever's segment it is.
    unperturbed = replace(plan.records[child], config=plan.records[kept].config)
    twin = plan.run_dir("twin")
    unperturbed.write(twin)
    launch_local(twin)
    train(plan)
    assert weights(plan, "twin", 6) == weights(plan, kept, 6) != weights(plan, child, 6)
    first = {name: read_curves(plan.run_dir(name))["train/loss"][0] for name in (kept, child, "twin")}
    assert first[child] == first[kept] == first["twin"], "a loss is that of the weights before its step"
    assert first[child][0] == 3

    # And a member that nobody replaced has trained as a run that was never cut.
    whole = plan.run_dir("whole")
    replace(plan.records[best], segment=None).write(whole)
    launch_local(whole)
    for name in ("twin", "whole"):
        (plan.run_dir(name) / "run.json").unlink()
    monkeypatch.setattr(population, "explore", lambda space, point, rng, resample_prob: point)
    plan = resumed(plan)
    plan.ask()
    train(plan)
    assert plan.ask() == []
    lineages = {name: in_words(trial) for name, trial in trials_of(plan).items()}
    uncut = [name for name, told in lineages.items() if told == f"{best[:3]} 0-7"]
    assert all(weights(plan, name, 7) == weights(plan, "whole", 7) for name in uncut)
    assert len(set(lineages.values())) == 2
    check_comparison(plan)


def trials_of(plan: _Plan) -> dict[str, Any]:
    return {trial.name: trial for trial in load_from_disk(plan.folder)}


def check_comparison(plan: _Plan) -> None:
    """The members of the last generation with all of their lineage."""
    trials = load_from_disk(plan.folder)
    assert [trial.name for trial in trials] == ["m00-g02-s0", "m01-g02-s0"]
    for trial in trials:
        assert [step for step, _ in trial.curves["train/loss"]] == list(range(7))
        assert [step for step, _ in trial.curves[KNN]] == [0, 3, 6, 7]
        hours = [value for _, value in trial.curves["cost/device_hours"]]
        assert hours == sorted(hours), "adds up over the segments"
        assert [each.name[4:7] for each in trial.lineage] == ["g00", "g01"]
    comparison = compare(trials)
    assert len(comparison.groups) == 2
    table = schedule_table(comparison)
    assert table is not None
    assert [row[0] for row in table.rows] == ["0-3", "3-6", "6-7"]
    text = render(comparison, "markdown")
    assert f"**Schedule of {comparison.rows[0].trial.name}**" in text
    assert "weights from" in text
    assert "A member of a population stands there with the settings of its newest segment" in text
    assert analyse(comparison).main == {}
    assert "population" in importance(comparison).reason
    assert list(comparison.frame()["lineage"]) == [in_words(row.trial) for row in comparison.rows]


def test_members_with_the_same_settings_are_no_repeats_of_one_another(tmp_path: Path) -> None:
    plan = write(tmp_path, space={LR: [1e-3, 2e-3]}, design="grid", num_trials=None)
    for trial_id in plan.open_trials():
        end(plan, trial_id, score(trial_id))
    trials = [replace(trial, params={**trial.params, LR: "0.001"}) for trial in load_from_disk(plan.folder)]
    assert [len(group.rows) for group in compare(trials).groups] == [1, 1]


def test_curves_go_on_where_the_parents_segment_ends() -> None:
    before = {"a": [(0, 1.0), (2, 2.0), (3, 3.0), (4, 9.0)], "cost/device_hours": [(2, 0.5), (3, 1.0)]}
    own = {"a": [(3, 4.0), (5, 5.0)], "b": [(5, 6.0)], "cost/device_hours": [(3, 0.1), (5, 0.25)]}
    assert continued(before, own, 3) == {
        "a": [(0, 1.0), (2, 2.0), (3, 4.0), (5, 5.0)],
        "b": [(5, 6.0)],
        "cost/device_hours": [(2, 0.5), (3, 1.1), (5, 1.25)],
    }


def test_a_parents_damaged_checkpoint_is_told(tmp_path: Path) -> None:
    plan = write(tmp_path, space={LR: [1e-3, 2e-3]}, design="grid", num_trials=None)
    for trial_id in plan.open_trials():
        end(plan, trial_id, score(trial_id))
    child, _ = plan.ask()
    launch_local(plan.run_dir(child))
    reason = read_failure(plan.run_dir(child))
    assert reason is not None
    assert "step_00000003/MANIFEST.json: there is no such file" in reason


def test_a_recipe_with_other_settings_than_the_defaults_can_be_populated() -> None:
    sweep = populated(base=override(load_recipe("cifar10_tiny"), {"data.source": "digits"}))
    assert [trial.trial_id for trial in expand(sweep)] == [f"m0{member}-g00-s0" for member in range(4)]
