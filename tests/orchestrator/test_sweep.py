from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino_core.config import ConfigError
from dino_core.methods import METHODS
from orchestrator.config import RunConfig
from orchestrator.overrides import override
from orchestrator.preflight import open_sources
from orchestrator.records import RunRecord
from orchestrator.run_sweep import _write_plan
from orchestrator.sweep import (
    MAX_TRIALS,
    Row,
    Sweep,
    expand,
    setting_keys,
    short_names,
    with_settings,
    with_vary,
)
from orchestrator.sweep_file import load_sweep, parse_vary
from orchestrator.trials import load_from_disk
from sweeps.recipes import quickstart

TEMP, MOMENTUM = "pretrain.teacher.temp", "pretrain.teacher.momentum"
PATH_SAFE = re.compile(r"[A-Za-z0-9._-]{1,100}")


def grid(**changes: Any) -> Sweep:
    space = {TEMP: [0.04, "7e-2"], MOMENTUM: [0.99, 0.996]}
    return Sweep(**({"base": "quickstart", "space": space} | changes))


def problems(sweep: Sweep) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        expand(sweep)
    return str(caught.value).splitlines()


# --- expansion --------------------------------------------------------------------------------------------------------


def test_every_combination_is_a_trial_with_its_values_and_nothing_else_changed() -> None:
    trials = expand(grid())
    assert [trial.changes for trial in trials] == [
        {TEMP: 0.04, MOMENTUM: 0.99},
        {TEMP: 0.04, MOMENTUM: 0.996},
        {TEMP: 0.07, MOMENTUM: 0.99},
        {TEMP: 0.07, MOMENTUM: 0.996},
    ]
    for trial in trials:
        assert trial.config == override(quickstart(), trial.changes)
        assert trial.seed == 0


def test_seeds_count_up_from_the_base_and_are_shared_by_all_combinations() -> None:
    trials = expand(grid(seeds=2, changes={"pretrain.seed": 5}))
    assert [(t.seed, t.config.pretrain.seed) for t in trials] == [(5, 5)] * 4 + [(6, 6)] * 4
    assert [t.changes for t in trials[:4]] == [t.changes for t in trials[4:]]
    assert expand(Sweep(base=quickstart(), seeds=3))[2].trial_id == "s2"


def test_trial_ids_are_readable_and_do_not_depend_on_the_other_trials() -> None:
    ids = [trial.trial_id for trial in expand(grid())]
    assert ids == [
        "temp_0.04-momentum_0.99-s0",
        "temp_0.04-momentum_0.996-s0",
        "temp_0.07-momentum_0.99-s0",
        "temp_0.07-momentum_0.996-s0",
    ]
    assert {t.trial_id for t in expand(grid(seeds=3))} > set(ids)
    more = grid(space={TEMP: [0.05, 0.04, 0.07], MOMENTUM: [0.9, 0.99, 0.996]})
    assert {t.trial_id for t in expand(more)} > set(ids)


def test_trial_ids_spell_pairs_none_and_names_that_end_alike() -> None:
    space = {
        "pretrain.crops.global_scale": ["[0.4,1]"],
        "pretrain.optim.clip_grad": [None],
        "pretrain.optim.lr": [1e-5],
    }
    assert expand(grid(space=space))[0].trial_id == "global_scale_0.4_1.0-clip_grad_none-lr_1e-05-s0"
    assert short_names([TEMP, "pretrain.student.temp"]) == {
        TEMP: "teacher.temp",
        "pretrain.student.temp": "student.temp",
    }
    assert short_names([TEMP, "pretrain.teacher.warmup_temp"])[TEMP] == "temp"


@given(st.lists(st.text(max_size=300), min_size=1, max_size=5, unique=True), st.integers(1, 2))
def test_trial_ids_are_unique_and_can_be_folders(sources: list[str], seeds: int) -> None:
    trials = expand(grid(space={"data.source": sources, TEMP: [0.1, 0.2]}, seeds=seeds))
    ids = [trial.trial_id for trial in trials]
    assert len(set(ids)) == len(sources) * 2 * seeds
    assert all(PATH_SAFE.fullmatch(trial_id) for trial_id in ids)
    assert [
        trial.trial_id for trial in expand(grid(space={"data.source": sources, TEMP: [0.1, 0.2]}, seeds=seeds))
    ] == ids


def test_the_length_of_a_run_can_vary_either_way() -> None:
    assert [t.config.pretrain.steps for t in expand(grid(space={"pretrain.epochs": [1, 2]}))] == [None, None]
    assert [t.config.pretrain.epochs for t in expand(grid(space={"pretrain.epochs": [1, 2]}))] == [1, 2]


# --- problems ---------------------------------------------------------------------------------------------------------


def test_all_problems_of_the_definition_are_reported_at_once() -> None:
    space = {
        TEMP: [0.04, 0, "x", 0.040],
        "pretrain.teacher.tmp": [1],
        "pretrain.optim": [1],
        MOMENTUM: 0.99,
        "pretrain.optim.name": "sgd",
        "pretrain.optim.lr": [],
        "cluster.num_workers": [1, 2],
        "pretrain.seed": [1, 2],
        "pretrain.steps": [10],
    }
    lines = problems(grid(space=space, seeds=2, changes={TEMP: 1, "data.sorce": "x", "pretrain.epochs": 3}))
    assert lines[0] == "data.sorce: unknown key; did you mean data.source?"
    assert lines[1:4] == [
        f"{TEMP} = 0: must be a number > 0",
        f"{TEMP} = x: must be a number > 0",
        f"{TEMP} = 0.04: given twice among the values to vary",
    ]
    assert lines[4] == "pretrain.teacher.tmp: unknown key; did you mean pretrain.teacher.temp?"
    assert lines[5].startswith("pretrain.optim: is a group of settings")
    assert lines[6:9] == [
        f"{MOMENTUM} = 0.99: must be a list of values to vary, such as [1, 2]",
        "pretrain.optim.name = sgd: must be a list of values to vary, such as [1, 2]",
        "pretrain.optim.lr = []: must be a list of values to vary, such as [1, 2]",
    ]
    assert lines[9:] == [
        "cluster.num_workers: is the same for all trials of a sweep and cannot vary",
        "pretrain.seed: cannot vary while sweep.seeds = 2; use one of the two",
        f"{TEMP} = 1: the sweep varies {TEMP}; choose its values by --vary",
        "pretrain.epochs = 3: the sweep varies pretrain.steps; choose its values by --vary",
    ]


def test_problems_between_settings_name_their_trials() -> None:
    sweep = grid(
        space={"pretrain.batch_size": [64, 63, 62], "pretrain.crops.local_size": [8, 6]},
        changes={"cluster.num_workers": 2},
    )
    assert problems(sweep) == [
        "pretrain.crops.local_size = 6: must be a multiple of the patch size 4 "
        "(batch_size_64-local_size_6, batch_size_62-local_size_6)",
        "pretrain.batch_size = 63: must be a multiple of cluster.num_workers = 2, such as 62 or 64 "
        "(batch_size_63-local_size_8, batch_size_63-local_size_6)",
    ]


def test_a_problem_of_all_trials_names_none() -> None:
    backbone = {"pretrain.model.backbone": "vit_tinny_patch16_224"}
    (line,) = problems(grid(changes=backbone))
    assert line.startswith("pretrain.model.backbone = vit_tinny_patch16_224: timm has no model of this name")
    assert "vit_tiny_patch16_224" in line.split("did you mean")[1]
    assert problems(grid(changes={"pretrain.batch_size": 3, "cluster.num_workers": 2}))[0].endswith("such as 2 or 4")


def test_shared_changes_are_only_checked_together_with_those_of_a_trial() -> None:
    # quickstart's batch of 64 does not suit 3 workers, but no trial has it
    trials = expand(grid(space={"pretrain.batch_size": [63, 66]}, changes={"cluster.num_workers": 3}))
    assert [t.config.pretrain.batch_size for t in trials] == [63, 66]


def test_a_grid_too_large_to_mean_it_is_refused_at_once() -> None:
    space = {key: [i / 100 + 0.01 for i in range(50)] for key in (TEMP, MOMENTUM, "pretrain.student.temp")}
    assert problems(grid(space=space)) == [f"sweep.space: makes 125000 trials; must be at most {MAX_TRIALS}"]


def test_a_seed_past_the_last_is_refused() -> None:
    assert problems(grid(seeds=2, changes={"pretrain.seed": 2**32 - 1}))[0].startswith("pretrain.seed = 4294967296: ")


# --- rows -------------------------------------------------------------------------------------------------------------

CROPS, UPDATE = "pretrain.crops.num_local_crops", "pretrain.teacher.update"


def rows(**changes: Any) -> Sweep:
    named = {
        "dino": Row(paper={"eval/knn_top1": 72.8}),
        "copy": Row(changes={UPDATE: "student_copy"}, paper={"eval/knn_top1": 0.1, "eval/linear_top1": 0.1}),
        "byol": Row(method="byol", changes={CROPS: "1", "pretrain.teacher.momentum": 0.99}),
    }
    return Sweep(**({"base": "quickstart", "rows": named} | changes))


def test_each_row_is_its_method_and_then_its_changes() -> None:
    dino, copy, byol = expand(rows())
    assert [t.trial_id for t in (dino, copy, byol)] == ["dino-s0", "copy-s0", "byol-s0"]
    assert [(t.row, t.method) for t in (dino, copy, byol)] == [("dino", None), ("copy", None), ("byol", "byol")]
    assert dino.config == quickstart()
    assert (dino.changes, dino.paper) == ({}, {"eval/knn_top1": 72.8})
    assert copy.config == override(quickstart(), {UPDATE: "student_copy"})
    assert copy.paper == {"eval/knn_top1": 0.1, "eval/linear_top1": 0.1}
    assert byol.config == override(quickstart(), METHODS["byol"] | {CROPS: 1, "pretrain.teacher.momentum": 0.99})
    assert (byol.changes[CROPS], byol.changes["pretrain.teacher.momentum"]) == (1, 0.99)
    assert byol.config.pretrain.loss.name == "mse"


def test_rows_are_crossed_with_the_space_and_the_seeds() -> None:
    trials = expand(rows(space={"pretrain.optim.lr": [1e-3, 1e-4]}, seeds=2))
    assert [t.trial_id for t in trials[:4]] == [
        "dino-lr_0.001-s0",
        "dino-lr_0.0001-s0",
        "copy-lr_0.001-s0",
        "copy-lr_0.0001-s0",
    ]
    assert [t.trial_id for t in trials[6:8]] == ["dino-lr_0.001-s1", "dino-lr_0.0001-s1"]
    assert len({t.trial_id for t in trials}) == 12
    assert [t.paper for t in trials if t.row == "copy"] == [{"eval/knn_top1": 0.1, "eval/linear_top1": 0.1}] * 4


def test_a_change_for_all_trials_reaches_the_rows_that_do_not_set_the_key() -> None:
    changed = expand(rows(changes={CROPS: 5, "pretrain.epochs": 2}))
    assert [t.config.pretrain.crops.num_local_crops for t in changed] == [5, 5, 1]
    assert [t.config.pretrain.epochs for t in changed] == [2, 2, 2]
    assert [t.config.pretrain.steps for t in changed] == [None] * 3


def test_a_change_that_would_reach_no_row_and_a_varied_key_of_a_row_are_refused() -> None:
    lengths = {"a": Row(changes={"pretrain.epochs": 1}), "b": Row(changes={"pretrain.steps": 3})}
    assert problems(Sweep(base="quickstart", rows=lengths, changes={"pretrain.steps": 7})) == [
        "pretrain.steps = 7: every row of the sweep sets its own"
    ]
    varied = {UPDATE: ["ema", "student_copy"], "pretrain.teacher.momentum": [0.9]}
    assert problems(rows(space=varied)) == [
        f"{UPDATE}: cannot vary, it is set by rows copy, byol",
        "pretrain.teacher.momentum: cannot vary, it is set by row byol",
    ]


def test_all_problems_of_all_rows_are_reported_with_their_names() -> None:
    wrong = {
        "a b": Row(),
        "byoll": Row(method="byoll"),
        "key": Row(changes={TEMP: 0, "pretrain.teacher.tmp": 1, "cluster.num_workers": 2, "pretrain.seed": 3}),
        "paper": Row(paper={"eval/knn_top": 1.0, "eval/knn_top1": "x", "train/loss": float("nan")}),  # type: ignore[dict-item]
    }
    assert problems(Sweep(base="quickstart", rows=wrong, seeds=2)) == [
        "sweep.rows.a b: must be called by 1 to 40 letters, digits, '.', '_' or '-', and open with no mark",
        "sweep.rows.byoll: unknown method 'byoll'; did you mean byol?; must be one of dino, ibot, dinov2, "
        "byol, simsiam, simclr, moco_v2, swav",
        f"sweep.rows.key: {TEMP} = 0: must be a number > 0",
        "sweep.rows.key: pretrain.teacher.tmp: unknown key; did you mean pretrain.teacher.temp?",
        "sweep.rows.key: cluster.num_workers: is the same for all trials of a sweep and cannot be set by a row",
        "sweep.rows.key: pretrain.seed: cannot be set by a row while sweep.seeds = 2; use one of the two",
        "sweep.rows.paper: paper eval/knn_top: unknown metric; did you mean eval/knn_top1 or eval/linear_top1?",
        "sweep.rows.paper: paper eval/knn_top1 = x: must be a number",
        "sweep.rows.paper: paper train/loss = nan: must be a number",
    ]


def test_rows_that_compute_nothing_sensible_are_refused_before_anything_starts() -> None:
    nonsense = {
        "fine": Row(),
        "sk": Row(changes={"pretrain.loss.name": "mse", "pretrain.teacher.centering": "sinkhorn_knopp"}),
        "nce": Row(changes={"pretrain.loss.name": "info_nce"}),
    }
    first, second = problems(Sweep(base="quickstart", rows=nonsense))
    assert first.startswith("pretrain.teacher.centering = sinkhorn_knopp: gives probabilities")
    assert first.endswith(" (sk)")
    assert second.startswith("pretrain.teacher.centering = center: must be none with loss.name = info_nce")
    assert second.endswith(" (nce)")


def test_two_trials_cannot_have_one_name() -> None:
    twins = {"a": Row(), "a-source_x": Row()}
    sweep = Sweep(base="quickstart", rows=twins, space={"data.source": ["x-source_x", "x"]})
    (line,) = problems(sweep)
    assert line.startswith(
        "sweep.rows.a-source_x: must be called otherwise, two trials would be a-source_x-source_x-s0"
    )


def test_rows_and_the_papers_numbers_are_written_down_before_anything_starts(tmp_path: Path) -> None:
    sweep = rows(
        paper_setting="ImageNet", changes={"cluster.storage": str(tmp_path)}, space={"pretrain.optim.lr": [1e-3]}
    )
    plan = _write_plan(sweep)
    written = {trial.row: trial for trial in load_from_disk(plan.folder)}
    assert {row: (trial.name, trial.paper, trial.paper_setting) for row, trial in written.items()} == {
        "byol": ("byol-lr_0.001-s0", {}, ""),
        "copy": ("copy-lr_0.001-s0", {"eval/knn_top1": 0.1, "eval/linear_top1": 0.1}, "ImageNet"),
        "dino": ("dino-lr_0.001-s0", {"eval/knn_top1": 72.8}, "ImageNet"),
    }
    assert written["byol"].params["method"] == "byol"
    record = RunRecord.read(plan.folder / "trials" / "copy-lr_0.001-s0")
    assert record.changes == {UPDATE: "student_copy", "pretrain.optim.lr": 1e-3}
    definition = json.loads((plan.folder / "sweep.json").read_text())
    assert definition["rows"]["byol"]["changes"] == {CROPS: "1", "pretrain.teacher.momentum": 0.99}
    assert definition["paper_setting"] == "ImageNet"


def test_a_method_comes_before_the_changes_of_all_trials() -> None:
    sweep = Sweep(base="quickstart", method="swav", changes={TEMP: 0.3}, space={CROPS: [1, 2]})
    configs = [t.config for t in expand(sweep)]
    assert configs == [override(quickstart(), METHODS["swav"] | {TEMP: 0.3, CROPS: n}) for n in (1, 2)]
    assert [t.method for t in expand(sweep)] == ["swav", "swav"]
    with pytest.raises(ConfigError, match=r"sweep\.method = swav: must be none for a sweep with rows"):
        rows(method="swav")
    with pytest.raises(ConfigError, match=r"sweep\.method: unknown method 'swaw'; did you mean swav"):
        Sweep(base="quickstart", method="swaw")


# --- the sweep's own settings -----------------------------------------------------------------------------------------


def test_settings_of_the_sweep_and_of_its_trials() -> None:
    sweep = with_settings(
        grid(),
        {"sweep.scheduler": "asha", "sweep.grace_steps": "20", "sweep.seeds": "2", "pretrain.steps": "9"},
    )
    assert (sweep.scheduler, sweep.grace_steps, sweep.seeds) == ("asha", 20, 2)
    assert {t.config.pretrain.steps for t in expand(sweep)} == {9}
    assert set(setting_keys()) >= {
        f"sweep.{name}" for name in ("name", "seeds", "metric", "mode", "scheduler", "grace_steps", "reduction_factor")
    } | {
        *("sweep.method", "sweep.paper_setting", "sweep.brackets", "sweep.stop_collapsed", "sweep.design"),
        *("sweep.design_seed", "sweep.num_trials", "sweep.num_startup_trials", "sweep.resolution"),
    }


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sweep.seds": 1}, "sweep.seds: unknown key; did you mean sweep.seeds?"),
        ({"sweep.seeds": 0}, "sweep.seeds = 0: must be a whole number >= 1"),
        ({"sweep.scheduler": "ash"}, "sweep.scheduler = ash: must be one of none, asha, median, hyperband, pbt"),
        ({"sweep.reduction_factor": 1}, "sweep.reduction_factor = 1: must be a whole number >= 2"),
        ({"sweep.scheduler": "asha"}, "sweep.grace_steps = None: must be a whole number >= 1 when"),
        ({"sweep.scheduler": "median"}, "sweep.grace_steps = None: must be a whole number >= 1 when"),
        ({"sweep.scheduler": "hyperband", "sweep.grace_steps": 5}, "sweep.brackets = 1: must be >= 2 with"),
        ({"sweep.brackets": 2}, "sweep.brackets = 2: must be 1 with sweep.scheduler = none"),
        ({"sweep.scheduler": "pbt"}, "sweep.generation_steps = None: must be a whole number >= 1 when"),
        ({"sweep.stop_collapsed": "perhaps"}, "sweep.stop_collapsed = perhaps: must be true or false"),
        ({"sweep.name": "../x"}, "sweep.name '../x': must be 1 to 100 letters"),
        ({"sweep.base": "x"}, "sweep.base: unknown key"),
    ],
)
def test_wrong_settings_of_the_sweep(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_settings(grid(), changes)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize("scheduler", ["asha", "median", "hyperband"])
def test_schedulers_need_evaluations_to_judge_by(scheduler: str) -> None:
    judged: dict[str, Any] = {"scheduler": scheduler, "grace_steps": 10, "changes": {"pretrain.eval.every_steps": None}}
    judged["brackets"] = 2 if scheduler == "hyperband" else 1
    assert problems(grid(**judged))[0].startswith("pretrain.eval.every_steps = None: must be a whole number >= 1 when")
    assert len(expand(grid(**judged, metric="train/feature_rank"))) == 4


def test_vary_adds_to_the_space_or_replaces_in_it() -> None:
    sweep = grid(changes={"pretrain.epochs": 3, "pretrain.student.temp": 0.2})
    varied = with_vary(sweep, {MOMENTUM: ["0.5"], "pretrain.steps": ["7"], "pretrain.student.temp": ["0.3"]})
    assert [t.trial_id for t in expand(varied)] == [
        "teacher.temp_0.04-momentum_0.5-steps_7-student.temp_0.3-s0",
        "teacher.temp_0.07-momentum_0.5-steps_7-student.temp_0.3-s0",
    ]


def test_vary_splits_at_top_level_commas() -> None:
    assert parse_vary(["a=1,2", "b=[0.4,1],(0.1, 1)", "c= x , y=z"]) == {
        "a": ["1", "2"],
        "b": ["[0.4,1]", "(0.1, 1)"],
        "c": ["x", "y=z"],
    }
    with pytest.raises(ConfigError) as caught:
        parse_vary(["a", "b=1,,2", "c=[1,2", "c=1]", "d=1", "d=2", "e="])
    assert str(caught.value).splitlines() == [
        "--vary a: must be key=value,value,... or key=low..high",
        "--vary b=1,,2: has an empty value; must be key=value,value,...",
        "--vary c=[1,2: the brackets do not match",
        "--vary c=1]: the brackets do not match",
        "--vary d: given twice; put all its values into one --vary",
        "--vary e=: has an empty value; must be key=value,value,...",
    ]


# --- by name or file --------------------------------------------------------------------------------------------------


def test_a_sweep_comes_before_a_recipe_of_its_name_and_a_recipe_varies_nothing() -> None:
    assert len(expand(load_sweep("quickstart"))) == 4
    recipe = load_sweep("cifar10_tiny")
    assert (recipe.name, recipe.recipe, recipe.space) == ("cifar10_tiny", "cifar10_tiny", {})


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match="unknown sweep 'temprature'; did you mean temperature"):
        load_sweep("temprature")
    with pytest.raises(ConfigError, match="unknown recipe 'quik'"):
        expand(grid(base="quik"))


def write(tmp_path: Path, text: str, name: str) -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_a_python_file(tmp_path: Path) -> None:
    text = "from orchestrator.sweep import Sweep\nSWEEP = Sweep(base='quickstart', space={'pretrain.seed': [1, 2]})\n"
    sweep = load_sweep(write(tmp_path, text, "my-sweep.py"))
    assert (sweep.name, [t.seed for t in expand(sweep)]) == ("my-sweep", [1, 2])
    named = load_sweep(write(tmp_path, text.replace("base=", "name='mine', base="), "my-sweep.py"))
    assert named.name == "mine"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("x = 1\n", ": must define SWEEP = Sweep(...)"),
        ("SWEEP = 3\n", ": must define SWEEP = Sweep(...)"),
        ("x = (\n", ", line 1: '(' was never closed"),
        ("\nimport no_such_module\n", ", line 2: ModuleNotFoundError: No module named 'no_such_module'"),
        ("from orchestrator.sweep import Sweep\nSWEEP = Sweep(bse='x')\n", ", line 2: TypeError: "),
        ("x = 1\nx / 0\n", ", line 2: ZeroDivisionError: division by zero"),
        ("open('not there.txt')\n", ", line 1: FileNotFoundError: "),
    ],
)
def test_a_python_file_that_is_no_sweep(tmp_path: Path, text: str, line: str) -> None:
    path = write(tmp_path, text, "mine.py")
    with pytest.raises(ConfigError) as caught:
        load_sweep(path)
    assert str(caught.value).startswith(path + line)


@pytest.mark.parametrize("rows", ["{'a': {'method': 'byol'}}", "[Row()]"])
def test_rows_of_a_python_file_are_rows(tmp_path: Path, rows: str) -> None:
    text = f"from orchestrator.sweep import Row, Sweep\nSWEEP = Sweep(base='quickstart', rows={rows})\n"
    with pytest.raises(ConfigError, match=r"sweep\.rows: must be a mapping from names to Row"):
        load_sweep(write(tmp_path, text, "mine.py"))


def test_a_settings_file(tmp_path: Path) -> None:
    text = """
        base: quickstart
        seeds: 2
        scheduler: asha
        grace_steps: 50
        pretrain: {steps: 100, optim.lr: 1e-4}
        cluster.num_workers: 2
        space:
          pretrain.teacher.temp: [0.04, 0.07]
          pretrain:
            crops: {global_scale: [[0.4, 1], [0.14, 1]]}
    """
    sweep = load_sweep(write(tmp_path, text, "abl.yaml"))
    trials = expand(sweep)
    assert (sweep.name, sweep.recipe, sweep.scheduler, len(trials)) == ("abl", "quickstart", "asha", 8)
    config = trials[-1].config
    assert (config.pretrain.steps, config.pretrain.optim.lr, config.cluster.num_workers) == (100, 1e-4, 2)
    assert (config.pretrain.teacher.temp, config.pretrain.crops.global_scale) == (0.07, (0.14, 1.0))


def test_rows_in_a_settings_file(tmp_path: Path) -> None:
    text = """
        base: quickstart
        paper_setting: ImageNet
        rows:
          dino:
          temp_0.04: {changes: {pretrain: {teacher.temp: 4e-2}}, paper: {eval/knn_top1: 69.6, eval/linear_top1: 75}}
          byol: {method: byol, changes: {pretrain.predictor.num_layers: 3}}
    """
    sweep = load_sweep(write(tmp_path, text, "abl.yaml"))
    assert sweep.rows == {
        "dino": Row(),
        "temp_0.04": Row(changes={TEMP: 0.04}, paper={"eval/knn_top1": 69.6, "eval/linear_top1": 75}),
        "byol": Row(method="byol", changes={"pretrain.predictor.num_layers": 3}),
    }
    assert sweep.paper_setting == "ImageNet"
    assert [t.trial_id for t in expand(sweep)] == ["dino-s0", "temp_0.04-s0", "byol-s0"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("base: quickstart\nrows: [1]", "{path}: rows = [1]: must hold rows by name"),
        ("base: quickstart\nrows: {a: 3}", "{path}: rows.a = 3: must hold any of method, changes, paper"),
        ("base: quickstart\nrows: {a: {papr: {}}}", "{path}: rows.a.papr: unknown key; did you mean paper?"),
        ("base: quickstart\nrows: {a: {method: 3}}", "{path}: rows.a.method = 3: must be the name of a method"),
        ("base: quickstart\nrows: {a: {changes: 3}}", "{path}: rows.a.changes = 3: must hold values by dotted key"),
        (
            "base: quickstart\nrows: {a: {changes: {pretrain: {seed: 1}, pretrain.seed: 2}}}",
            "{path}: rows.a.changes: pretrain.seed: given twice",
        ),
        ("space: {pretrain.seed: [1]}", "{path}: base = None: must be the name of a recipe: quickstart"),
        ("base: quikstart", "unknown recipe 'quikstart'; did you mean quickstart?"),
        ("base: quickstart\nsedes: 2", "{path}: sedes: unknown key; did you mean"),
        ("base: quickstart\nseeds: two", "sweep.seeds = two: must be a whole number >= 1"),
        ("base: quickstart\nspace: [1]", "{path}: space = [1]: must hold a list of values under each key"),
        ("base: quickstart\nbase: quickstart", "{path}, line 2, column 1: base: given twice"),
    ],
)
def test_a_settings_file_that_is_no_sweep(tmp_path: Path, text: str, line: str) -> None:
    path = write(tmp_path, text, "abl.yaml")
    with pytest.raises(ConfigError) as caught:
        load_sweep(path)
    assert str(caught.value).startswith(line.format(path=path))


# --- with the data, before anything starts ----------------------------------------------------------------------------


def test_problems_with_the_data_of_all_runs_are_found_before_anything_starts(tmp_path: Path) -> None:
    base = quickstart()
    configs = [
        override(base, {"data.source": str(tmp_path / "nowhere")}),
        override(base, {"data.source": str(tmp_path)}),
        override(base, {"pretrain.epochs": 0.01}),
        override(base, {"cluster.num_workers": 64, "cluster.address": None}),
        base,
    ]
    with pytest.raises(ConfigError) as caught:
        open_sources(configs)
    lines = str(caught.value).splitlines()
    assert [line.split(" = ")[0] for line in lines] == [
        "data.source",
        "data.source",
        "pretrain.epochs",
        "cluster.num_workers",
    ]
    assert open_sources([base])[base.data].num_samples > 1400


def test_a_sweep_is_a_frozen_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        grid().seeds = 3  # type: ignore[misc]
    assert Sweep(base=RunConfig()).recipe == "custom"
