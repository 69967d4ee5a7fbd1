from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import qmc

from dino_core.config import ConfigError
from orchestrator.catalog import load_recipe
from orchestrator.definition import design_definition, design_lines
from orchestrator.metric_choice import choose_metric
from orchestrator.overrides import flatten, override
from orchestrator.space import IntUniform, LogUniform, Uniform
from orchestrator.sweep import Row, Sweep, check, expand, with_settings, with_vary
from orchestrator.sweep_file import load_sweep, parse_vary

TEMP, MOMENTUM, LR = "pretrain.teacher.temp", "pretrain.teacher.momentum", "pretrain.optim.lr"
STUDENT, CROPS = "pretrain.student.temp", "pretrain.crops.num_local_crops"
LAYERS, WIDTH = "pretrain.head.num_layers", "pretrain.head.hidden_dim"


def sweep(design: str, space: dict[str, Any], **more: Any) -> Sweep:
    return Sweep(**({"base": "quickstart", "space": space, "design": design} | more))


def points(defined: Sweep) -> list[dict[str, Any]]:
    return [trial.changes for trial in expand(defined)]


def refused(defined: Sweep) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        expand(defined)
    return str(caught.value).splitlines()


# --- one at a time ----------------------------------------------------------------------------------------------------


def test_every_row_changes_one_thing() -> None:
    # the quickstart has 0.04 and two local crops
    trials = expand(sweep("one_at_a_time", {TEMP: [0.02, 0.04, 0.07], CROPS: [0, 2]}, seeds=2))
    assert [trial.changes for trial in trials[:4]] == [{}, {TEMP: 0.02}, {TEMP: 0.07}, {CROPS: 0}]
    assert [t.trial_id for t in trials] == [
        *("base-s0", "temp_0.02-s0", "temp_0.07-s0", "num_local_crops_0-s0"),
        *("base-s1", "temp_0.02-s1", "temp_0.07-s1", "num_local_crops_0-s1"),
    ]
    base = flatten(override(load_recipe("quickstart"), {"pretrain.seed": 1}))
    changed = [{key for key, value in flatten(trial.config).items() if value != base[key]} for trial in trials[4:]]
    assert changed == [set(), {TEMP}, {TEMP}, {CROPS}]


def test_one_at_a_time_goes_around_each_row_and_around_the_changes() -> None:
    rows = {"a": Row(), "b": Row(changes={MOMENTUM: 0.9})}
    defined = sweep("one_at_a_time", {TEMP: [0.04, 0.07]}, rows=rows, changes={STUDENT: 0.3})
    assert [trial.trial_id for trial in expand(defined)] == [
        "a-base-s0",
        "a-temp_0.07-s0",
        "b-base-s0",
        "b-temp_0.07-s0",
    ]
    assert points(sweep("one_at_a_time", {TEMP: [0.04, 0.07]}, method="dino")) == [{}, {TEMP: 0.07}]


def test_one_at_a_time_needs_something_to_change() -> None:
    space = {TEMP: [0.04], WIDTH: [64], LR: [1e-4]}
    assert refused(sweep("one_at_a_time", space, conditions={WIDTH: {LAYERS: [2]}})) == [
        f"{TEMP} = 0.04: has no other value than the base's",
        f"{WIDTH}: does not vary around the base, where its condition does not hold",
    ]


# --- grids with conditions --------------------------------------------------------------------------------------------


def test_a_grid_with_conditions_has_no_configuration_twice() -> None:
    space = {LAYERS: [1, 2], WIDTH: [64, 128], TEMP: [0.04, 0.07]}
    trials = expand(sweep("grid", space, conditions={WIDTH: {LAYERS: [2]}}))
    assert [trial.trial_id for trial in trials] == [
        "num_layers_1-temp_0.04-s0",
        "num_layers_1-temp_0.07-s0",
        "num_layers_2-hidden_dim_64-temp_0.04-s0",
        "num_layers_2-hidden_dim_64-temp_0.07-s0",
        "num_layers_2-hidden_dim_128-temp_0.04-s0",
        "num_layers_2-hidden_dim_128-temp_0.07-s0",
    ]
    assert len({str(flatten(trial.config)) for trial in trials}) == 6


def test_a_row_may_decide_whether_a_key_varies() -> None:
    rows = {"one": Row(changes={LAYERS: 1}), "two": Row(changes={LAYERS: 2})}
    trials = expand(sweep("grid", {WIDTH: [64, 128]}, rows=rows, conditions={WIDTH: {LAYERS: [2]}}))
    assert [trial.trial_id for trial in trials] == ["one-s0", "two-hidden_dim_64-s0", "two-hidden_dim_128-s0"]


def test_a_range_needs_a_design_that_draws() -> None:
    for design, more in (("grid", {}), ("one_at_a_time", {})):
        (line,) = refused(sweep(design, {LR: LogUniform(1e-4, 1e-2)}, **more))
        assert line == (
            f"{LR} = 0.0001..0.01:log: is a range, from which sweep.design = {design} cannot choose; give a list of "
            "values, or draw from it by sweep.design = random, qmc or optuna with sweep.num_trials"
        )


# --- drawn designs ----------------------------------------------------------------------------------------------------

MIXED: dict[str, Any] = {
    LR: LogUniform(1e-4, 1e-2),
    MOMENTUM: Uniform(0.9, 0.999),
    CROPS: IntUniform(2, 8, step=2),
    LAYERS: [1, 2, 3],
    WIDTH: [64, 128],
}


@pytest.mark.parametrize("design", ["random", "qmc"])
@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_drawn_configurations_differ_lie_in_their_ranges_and_follow_from_the_seed(
    design: str, count: int, seed: int
) -> None:
    defined = sweep(design, MIXED, num_trials=count, design_seed=seed, conditions={WIDTH: {LAYERS: [2, 3]}})
    checked = check(defined)
    drawn = checked.points("")
    assert len(drawn) == count
    assert len({tuple(point.items()) for point in drawn}) == count
    for point in drawn:
        assert 1e-4 <= point[LR] <= 1e-2
        assert 0.9 <= point[MOMENTUM] <= 0.999
        assert point[CROPS] in (2, 4, 6, 8)
        assert (WIDTH in point) == (point[LAYERS] > 1)
        assert point.get(WIDTH, 64) in (64, 128)
    assert checked.points("") == drawn
    more = check(sweep(design, MIXED, num_trials=count + 3, design_seed=seed, conditions={WIDTH: {LAYERS: [2, 3]}}))
    assert more.points("")[:count] == drawn
    other = check(sweep(design, MIXED, num_trials=count, design_seed=seed ^ 1, conditions={WIDTH: {LAYERS: [2, 3]}}))
    assert other.points("") != drawn


def test_a_qmc_design_is_more_even_than_independent_draws() -> None:
    space = {MOMENTUM: Uniform(0.0, 1.0), "pretrain.teacher.final_momentum": Uniform(0.0, 1.0)}

    def discrepancy(design: str, seed: int) -> float:
        drawn = check(sweep(design, space, num_trials=64, design_seed=seed)).points("")
        return float(qmc.discrepancy(np.array([list(point.values()) for point in drawn])))

    qmcs, randoms = ([discrepancy(design, seed) for seed in range(10)] for design in ("qmc", "random"))
    assert max(qmcs) < min(randoms)
    assert np.mean(qmcs) < np.mean(randoms) / 5


def test_the_shares_of_random_values_are_those_of_their_distributions() -> None:
    drawn = check(sweep("random", MIXED, num_trials=2000, conditions={WIDTH: {LAYERS: [2, 3]}})).points("")
    assert np.mean([point[LR] < 1e-3 for point in drawn]) == pytest.approx(0.5, abs=0.04)  # by logarithms
    assert np.mean([point[CROPS] == 2 for point in drawn]) == pytest.approx(0.25, abs=0.04)
    assert np.mean([point[LAYERS] == 1 for point in drawn]) == pytest.approx(1 / 3, abs=0.04)


@pytest.mark.parametrize("design", ["random", "qmc"])
def test_a_space_of_lists_is_drawn_from_until_it_is_used_up(design: str) -> None:
    space = {TEMP: [0.04, 0.07], LAYERS: [1, 2], WIDTH: [64, 128]}
    conditions = {WIDTH: {LAYERS: [2]}}
    assert len(points(sweep(design, space, num_trials=6, conditions=conditions))) == 6
    assert refused(sweep(design, space, num_trials=7, conditions=conditions)) == [
        "sweep.num_trials = 7: the space holds only 6 different configurations"
    ]
    assert refused(sweep(design, {CROPS: IntUniform(1, 3)}, num_trials=4)) == [
        "sweep.num_trials = 4: only 3 different configurations were found"
    ]


def test_drawn_configurations_are_shared_by_rows_and_seeds() -> None:
    rows = {"a": Row(), "b": Row(changes={TEMP: 0.07})}
    trials = expand(sweep("random", {LR: LogUniform(1e-4, 1e-2)}, rows=rows, num_trials=3, seeds=2))
    rates = [(trial.row, trial.seed, trial.changes[LR]) for trial in trials]
    drawn = [rate for row, seed, rate in rates if (row, seed) == ("a", 0)]
    assert len(set(drawn)) == 3
    assert rates == [(row, seed, rate) for seed in (0, 1) for row in ("a", "b") for rate in drawn]


# --- fractional factorials --------------------------------------------------------------------------------------------


def test_a_fractional_factorial_takes_the_second_value_for_high() -> None:
    space = {TEMP: [0.04, 0.07], STUDENT: [0.1, 0.2], MOMENTUM: [0.99, 0.9]}
    assert [tuple(point.values()) for point in points(sweep("fractional_factorial", space, resolution="III"))] == [
        (0.04, 0.1, 0.9),
        (0.07, 0.1, 0.99),
        (0.04, 0.2, 0.99),
        (0.07, 0.2, 0.9),
    ]


def test_named_interactions_of_keys() -> None:
    space = {TEMP: [0.04, 0.07], STUDENT: [0.1, 0.2], MOMENTUM: [0.99, 0.9], LR: [1e-3, 1e-4], CROPS: [0, 2]}
    assert len(points(sweep("fractional_factorial", space, interactions=[(TEMP, LR), (TEMP, CROPS)]))) == 8
    assert len(points(sweep("fractional_factorial", space, interactions=[(TEMP, LR), (STUDENT, CROPS)]))) == 16


def test_what_a_fractional_factorial_cannot_be() -> None:
    space = {TEMP: [0.04, 0.07, 0.1], STUDENT: [0.1], MOMENTUM: [0.99, 0.9]}
    pairs = [(TEMP, "pretrain.student.tmp"), (TEMP, TEMP)]
    conditions = {MOMENTUM: {TEMP: [0.04]}}
    assert refused(sweep("fractional_factorial", space, interactions=pairs, conditions=conditions)) == [
        f"{TEMP} = 0.04, 0.07, 0.1: must have two values for sweep.design = fractional_factorial",
        f"{STUDENT} = 0.1: must have two values for sweep.design = fractional_factorial",
        "sweep.conditions: must be none for sweep.design = fractional_factorial, whose keys all vary",
        "sweep.interactions: pretrain.student.tmp does not vary; did you mean pretrain.student.temp?",
        f"sweep.interactions: {TEMP} x {TEMP}: must be of two different keys",
    ]


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"design": "random"}, "sweep.num_trials = None: must be a whole number >= 1 when sweep.design = random"),
        ({"num_trials": 3}, "sweep.num_trials: must be none when sweep.design = grid, it is for random, qmc, optuna"),
        ({"resolution": "IV"}, "sweep.resolution: must be none when sweep.design = grid, it is for fra"),
        ({"interactions": [(TEMP, LR)]}, "sweep.interactions: must be none when sweep.design = grid"),
        ({"objectives": {"train/loss": "min"}}, "sweep.objectives: must be none when sweep.design = grid"),
        ({"design": "fractional_factorial"}, "sweep.resolution = None: must be III, IV or V when sweep.design ="),
        ({"interactions": ["ab"]}, "sweep.interactions = ['ab']: must be a list of pairs of dotted keys"),
        ({"conditions": [1]}, "sweep.conditions = [1]: must be a mapping"),
        (
            {"design": "optuna", "num_trials": 3, "objectives": {"eval/knn": "max"}},
            "sweep.objectives.eval/knn: no run logs it; did you mean eval/knn_top1",
        ),
        (
            {"design": "optuna", "num_trials": 3, "objectives": {"eval/alpha_req": "max"}},
            "sweep.objectives.eval/alpha_req: cannot rank, it is best near 1",
        ),
        (
            {"design": "optuna", "num_trials": 3, "objectives": {"train/loss": "least"}},
            "sweep.objectives.train/loss = least: must be max or min",
        ),
        ({"design": "optuna", "num_trials": 3, "rows": {"a": Row()}}, "sweep.design = optuna: must be another one"),
    ],
)  # fmt: skip
def test_settings_that_do_not_suit_the_design(more: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Sweep(**({"base": "quickstart", "space": {TEMP: [0.04, 0.07]}} | more))
    assert str(caught.value).startswith(line)


def test_a_design_needs_a_space_and_a_bounded_number_of_trials() -> None:
    assert refused(sweep("random", {}, num_trials=3)) == [
        "sweep.space: varies nothing; sweep.design = random needs keys to vary"
    ]
    assert refused(sweep("random", {LR: Uniform(0.1, 1)}, num_trials=6000, seeds=2)) == [
        "sweep.num_trials: makes 12000 trials; must be at most 10000"
    ]


def test_a_design_by_the_command_line() -> None:
    vary = parse_vary([f"{LR}=1e-4..1e-2:log", f"{CROPS}=2..8:step=2", f"{TEMP}=0.04,0.07", "data.source=../x,y..z"])
    assert vary == {
        LR: {"low": "1e-4", "high": "1e-2", "log": True},
        CROPS: {"low": "2", "high": "8", "step": "2"},
        TEMP: ["0.04", "0.07"],
        "data.source": ["../x", "y..z"],
    }
    defined = with_vary(Sweep(base="quickstart"), {key: vary[key] for key in (LR, CROPS, TEMP)})
    defined = with_settings(defined, {"sweep.design": "qmc", "sweep.num_trials": "4", "sweep.design_seed": "7"})
    assert len(points(defined)) == 4
    assert check(defined).space.values == {
        LR: LogUniform(1e-4, 1e-2),
        CROPS: IntUniform(2, 8, step=2),
        TEMP: [0.04, 0.07],
    }
    for text in ("1e-4..", "1e-4..1e-2:lg", "1...5", "1..2,3"):
        with pytest.raises(ConfigError, match=r"must be one range, low\.\.high, low\.\.high:log or"):
            parse_vary([f"{LR}={text}"])


def test_objectives_and_interactions_on_the_command_line() -> None:
    base = Sweep(base="quickstart", space={TEMP: [0.04, 0.07], LR: [1e-3, 1e-4]})
    searched = {"sweep.design": "optuna", "sweep.num_trials": 2}
    found = with_settings(base, searched | {"sweep.objectives": "eval/knn_top1:max, cost/device_hours:min"})
    assert found.objectives == {"eval/knn_top1": "max", "cost/device_hours": "min"}
    found = with_settings(base, {"sweep.design": "fractional_factorial", "sweep.interactions": f"{TEMP}*{LR}"})
    assert found.interactions == [(TEMP, LR)]
    for key, text in (
        ("objectives", "eval/knn_top1"),
        ("objectives", ":max"),
        ("interactions", "a*b*c"),
        ("interactions", ""),
    ):
        with pytest.raises(ConfigError, match=rf"sweep\.{key} = .*must be"):
            with_settings(base, searched | {f"sweep.{key}": text})


# --- the page about them ----------------------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sweeps.md"


def test_the_files_on_the_page_are_sweeps(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    found = {}
    for number, block in enumerate(blocks):
        path = tmp_path / f"sweep_{number}.yaml"
        path.write_text(block)
        defined = load_sweep(str(path))
        shape = bool(defined.conditions), bool(defined.rows), defined.scheduler
        found[defined.design, *shape] = len(expand(defined))
    assert found == {
        ("grid", False, True, "none"): 4,
        ("qmc", False, False, "none"): 16,
        ("one_at_a_time", False, False, "none"): 5,
        ("fractional_factorial", False, False, "none"): 8,
        ("grid", True, False, "none"): 5,
        ("optuna", False, False, "none"): 8,
        ("qmc", False, False, "pbt"): 6,
    }


def test_the_errors_on_the_page_are_those_of_the_code() -> None:
    texts = re.findall(r"```text\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    page = {line for text in texts for line in text.splitlines()}
    lines: list[str] = []
    with pytest.raises(ConfigError) as caught:
        parse_vary([f"{LR}=1...5"])
    lines += str(caught.value).splitlines()
    lines += refused(sweep("random", {LR: Uniform(0.0, 1.0)}, num_trials=2))
    lines += refused(sweep("random", {"pretrain.batch_size": Uniform(32, 64)}, num_trials=2))
    lines += refused(sweep("grid", {LR: LogUniform(1e-4, 1e-2)}))
    lines += refused(sweep("grid", {LAYERS: [1, 2, 3], WIDTH: [64, 128]}, conditions={WIDTH: {LAYERS: [4]}}))
    assert len(lines) == 5
    assert set(lines) <= page


def test_a_dry_run_says_what_is_aliased_and_what_pairs_share() -> None:
    defined = load_sweep("screening")
    choice = choose_metric(has_labels=True)
    lines = design_lines(check(defined), expand(defined), choice)
    assert lines["design"] == (
        "fractional_factorial: 8 of 32 combinations, resolution III "
        "(lr = student.temp x momentum, num_local_crops = teacher.temp x student.temp x momentum)"
    )
    assert lines["aliased"].startswith("teacher.temp = lr x num_local_crops; student.temp = momentum x lr; ")
    assert "teacher.temp x student.temp = momentum x num_local_crops" in lines["aliased"]
    assert lines["pairing"].startswith("trials of one seed share order and weights; crops partly")
    definition = design_definition(check(defined), expand(defined), choice)
    assert definition["factorial"]["runs"] == 8
    assert definition["factorial"]["generators"][LR] == f"{STUDENT} x {MOMENTUM}"
    assert definition["paired"]["crops"] == {CROPS: "the global ones, and as many local ones as both have"}
    json.dumps(definition)


def test_losses_of_other_targets_are_no_objective() -> None:
    space = {"pretrain.teacher.temp": Uniform(0.02, 0.1)}
    searched = sweep("optuna", space, num_trials=3, objectives={"train/loss": "min"})
    assert "train/loss" in refused(searched)[0]
