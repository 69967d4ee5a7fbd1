"""The built-in sweeps: that they expand, say what they are, and hold the paper's rows and numbers.

The tables below were copied from the paper (arXiv 2104.14294) by themselves, column by column as it prints them, so
that a slip in a sweep file shows.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest

from dino_core.schedules import build_schedules
from orchestrator.catalog import load_recipe, summary, sweep_module, sweep_names
from orchestrator.config import RunConfig
from orchestrator.overrides import flatten
from orchestrator.runs import Trial
from orchestrator.sweep import expand
from orchestrator.sweep_file import load_sweep
from sweeps.recipes import RECIPES

SWEEPS = sweep_names()
WITH_ROWS = [name for name in SWEEPS if any(row.paper for row in load_sweep(name).rows.values())]
BLIND = {("backbone", "quickstart"), ("backbone", "cifar10_tiny")}
"""Bases whose own sizes hide what the rows set."""
KNN, LINEAR = "eval/knn_top1", "eval/linear_top1"


def trials(name: str, base: str | None = None) -> dict[str, Trial]:
    """The trials of a sweep by row."""
    sweep = load_sweep(name)
    return {t.row or t.trial_id: t for t in expand(dataclasses.replace(sweep, base=base or sweep.base))}


def papers(name: str, *metrics: str) -> list[tuple[float | None, ...]]:
    return [tuple(row.paper.get(metric) for metric in metrics) for row in load_sweep(name).rows.values()]


def by_key(name: str, key: str, metric: str = KNN) -> dict[Any, float]:
    """The paper's number by the value of one key, over the trials of a sweep on its own base."""
    return {flatten(trial.config)[key]: trial.paper[metric] for trial in trials(name).values()}


def test_the_sweeps_that_are_promised() -> None:
    assert set(SWEEPS) == {
        *("components", "crops", "methods", "methods_resnet50", "byol_moco", "centering", "teacher", "multi_crop"),
        *("prototypes", "head", "head_depth", "crop_scale", "center_momentum", "temperature", "batch_size", "backbone"),
        *("attention_heads", "epochs", "collapse", "momentum", "quickstart", "student_temperature"),
        *("temperature_warmup", "momentum_schedule", "crop_sizes", "lr_weight_decay", "lr_search", "screening"),
        *("dinov2_components", "dinov2_components_digits", "population"),
    }


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_says_what_it_is_what_the_paper_did_and_how_to_run_it(name: str) -> None:
    text = sweep_module(name).__doc__ or ""
    assert f"    python -m orchestrator sweep {name}" in text
    assert 40 < len(summary(sweep_module(name))) <= 115
    paper = "2304.07193" if name.startswith("dinov2") else "2104.14294"
    assert not load_sweep(name).rows or all(part in text for part in (f"Paper: arXiv {paper}", "Cost there: "))
    assert "dino_vits16" in text or load_sweep(name).base != "quickstart" or name == "quickstart"


@pytest.mark.parametrize("name", WITH_ROWS)
def test_rows_say_at_what_scale_the_paper_measured(name: str) -> None:
    sweep = load_sweep(name)
    assert "ImageNet-1k" in sweep.paper_setting
    assert ("arXiv 2304.07193" if name.startswith("dinov2") else "arXiv 2104.14294") in sweep.paper_setting


@pytest.mark.parametrize("base", ["quickstart", "cifar10_tiny", "dino_vits16"])
@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_expands_on_every_recipe_of_a_vit(name: str, base: str) -> None:
    sweep = load_sweep(name)
    if name == "attention_heads" and base == "quickstart":
        pytest.skip("6 heads do not divide a width of 64")
    if name == "dinov2_components" and base != "dino_vits16":
        pytest.skip("patches of 14 pixels do not divide the crops; dinov2_components_digits is for them")
    found = list(trials(name, base).values())
    plain = flatten(load_recipe(base))
    configs = [flatten(trial.config) for trial in found]
    assert len(found) == max(len(sweep.rows), 1) * len(list(expand(dataclasses.replace(sweep, rows={}, base=base))))
    for trial, config in zip(found, configs, strict=True):
        changed = {key for key, value in config.items() if value != plain[key]}
        assert changed <= {*trial.changes, *sweep.changes, "pretrain.steps"}
    assert len({str(config) for config in configs}) == len(configs) or (name, base) in BLIND


# --- the tables -------------------------------------------------------------------------------------------------------

# Table 7: method, momentum, SK, multi-crop, loss, predictor, k-NN, linear
TABLE_7 = """
dino            y n y cross_entropy n 72.8 76.1
no_momentum     n n y cross_entropy n 0.1  0.1
sinkhorn_knopp  y y y cross_entropy n 72.2 76.0
no_multi_crop   y n n cross_entropy n 67.9 72.5
mse             y n y mse           n 52.6 62.4
predictor       y n y cross_entropy y 71.8 75.6
byol            y n n mse           y 66.6 71.4
moco_v2         y n n info_nce      n 62.0 71.6
swav            n y y cross_entropy n 64.7 71.8
"""

# Table 14: loss, multi-crop, centring, batch norm, predictor, linear
TABLE_14 = """
dino                cross_entropy y y n n 76.1
dino_mse            mse           y y n n 62.4
dino_predictor      cross_entropy y y n y 75.6
dino_global         cross_entropy n y n n 72.5
moco_v2             info_nce      n n y n 71.4
moco_v2_multi_crop  info_nce      y n y n 73.4
byol                mse           n n y y 71.4
byol_no_predictor   mse           n n y n 0.1
mse_center          mse           n y n n 52.6
byol_multi_crop     mse           y n y y 64.8
"""

# Table 15: momentum, operation, linear
TABLE_15 = """
ema_center           y center         76.1
ema_softmax          y softmax        75.8
ema_sinkhorn_knopp   y sinkhorn_knopp 76.0
copy_center          n center         0.1
copy_softmax         n softmax        72.2
copy_sinkhorn_knopp  n sinkhorn_knopp 71.8
"""


def ticks(*marks: bool) -> list[str]:
    return ["y" if mark else "n" for mark in marks]


def columns(config: RunConfig) -> dict[str, str]:
    """What the columns of the tables would print for a configuration."""
    pretrain = config.pretrain
    momentum, knopp, local, centre, norm, predictor = ticks(
        pretrain.teacher.update == "ema",
        pretrain.teacher.centering == "sinkhorn_knopp",
        pretrain.crops.num_local_crops > 0,
        pretrain.teacher.centering == "center",
        pretrain.head.batch_norm,
        pretrain.predictor.num_layers > 0,
    )
    marks = {"momentum": momentum, "SK": knopp, "crops": local, "centre": centre, "norm": norm, "predictor": predictor}
    return marks | {"loss": pretrain.loss.name, "operation": pretrain.teacher.centering}


@pytest.mark.parametrize("base", ["quickstart", "dino_vits16"])
@pytest.mark.parametrize(
    ("name", "table", "parts", "metrics"),
    [
        ("components", TABLE_7, ("momentum", "SK", "crops", "loss", "predictor"), (KNN, LINEAR)),
        ("byol_moco", TABLE_14, ("loss", "crops", "centre", "norm", "predictor"), (LINEAR,)),
        ("centering", TABLE_15, ("momentum", "operation"), (LINEAR,)),
    ],
)
def test_the_rows_are_those_of_the_table(
    name: str, table: str, parts: tuple[str, ...], metrics: tuple[str, ...], base: str
) -> None:
    printed = [line.split() for line in table.strip().splitlines()]
    found = trials(name, base)
    assert list(found) == [row for row, *_ in printed]
    for row, *cells in printed:
        made = columns(found[row].config)
        assert [made[part] for part in parts] == cells[: len(parts)], row
        assert [found[row].paper[metric] for metric in metrics] == [float(cell) for cell in cells[len(parts) :]], row


def test_centred_rows_of_the_bridge_have_prototypes_and_the_others_none() -> None:
    heads = {row: trial.config.pretrain.head.num_prototypes for row, trial in trials("byol_moco").items()}
    without = {"moco_v2", "moco_v2_multi_crop", "byol", "byol_no_predictor", "byol_multi_crop"}
    assert {row for row, prototypes in heads.items() if prototypes is None} == without


@pytest.mark.parametrize(
    "places",
    [
        "components/dino centering/ema_center teacher/momentum methods/dino",
        "components/no_momentum centering/copy_center teacher/student_copy",
        "components/sinkhorn_knopp centering/ema_sinkhorn_knopp",
        "components/no_multi_crop multi_crop/dino crops/local_0",
        "components/byol methods/byol multi_crop/byol",
        "components/moco_v2 methods/moco_v2 multi_crop/moco_v2",
        "components/swav methods/swav",
        "crops/local_6 multi_crop/dino_local_6",
    ],
)
def test_a_run_is_the_same_and_has_one_number_in_every_table_that_has_it(places: str) -> None:
    found = [trials(name, "dino_vits16")[row] for name, _, row in (place.partition("/") for place in places.split())]
    assert all(trial.config == found[0].config for trial in found)
    for metric in (KNN, LINEAR):
        assert len({trial.paper[metric] for trial in found if metric in trial.paper}) == 1


def test_same_recipe_table() -> None:
    rows = ["moco_v2", "byol", "swav", "dino"]
    for name in ("methods", "methods_resnet50"):
        assert [row.method for row in load_sweep(name).rows.values()] == rows == list(load_sweep(name).rows)
    # table 13: linear and k-NN of ResNet-50, then of ViT-small
    table = [(71.1, 62.9, 71.6, 62.0), (72.7, 65.4, 71.4, 66.6), (74.1, 65.4, 71.8, 64.7), (74.5, 65.6, 76.1, 72.8)]
    both = zip(papers("methods_resnet50", LINEAR, KNN), papers("methods", LINEAR, KNN), strict=True)
    assert [(*resnet, *vit) for resnet, vit in both] == table


def test_multi_crop_in_other_methods() -> None:
    # appendix E: k-NN and linear with two crops, then with six local ones
    table = {
        "byol": (66.6, 71.4, 59.8, 64.8),
        "swav": (60.5, 68.5, 64.7, 71.8),
        "moco_v2": (62.0, 71.6, 65.4, 73.4),
        "dino": (67.9, 72.5, 72.7, 75.9),
    }
    found = trials("multi_crop")
    for method, numbers in table.items():
        without, with_local = found[method], found[f"{method}_local_6"]
        assert [t.config.pretrain.crops.num_local_crops for t in (without, with_local)] == [0, 6]
        assert [t.method for t in (without, with_local)] == [method, method]
        assert [t.paper[m] for t in (without, with_local) for m in (KNN, LINEAR)] == list(numbers)


def test_cost_table() -> None:
    # table 8: local crops, linear after 300 epochs, hours, GB
    assert [
        (n, *numbers)
        for n, numbers in zip((0, 2, 6, 10), papers("crops", LINEAR, "cost/hours", "cost/gpu_memory_gb"), strict=True)
    ] == [(0, 72.5, 45.9, 9.3), (2, 74.5, 51.0, 10.5), (6, 75.9, 60.9, 12.9), (10, 76.1, 72.6, 15.4)]
    assert by_key("crops", "pretrain.crops.num_local_crops", LINEAR) == {0: 72.5, 2: 74.5, 6: 75.9, 10: 76.1}


@pytest.mark.parametrize(
    ("name", "key", "numbers"),
    [
        ("teacher", "teacher.update", {"student_copy": 0.1, "previous_step": 0.1, "previous_epoch": 66.6, "ema": 72.8}),
        ("prototypes", "head.num_prototypes", {1024: 67.8, 4096: 69.3, 16384: 69.2, 65536: 69.7, 262144: 69.1}),
        ("center_momentum", "teacher.center_momentum", {0: 69.1, 0.9: 69.7, 0.99: 69.4, 0.999: 0.1}),
        ("batch_size", "batch_size", {128: 57.9, 256: 59.1, 512: 59.6, 1024: 59.9}),
        ("attention_heads", "model.num_heads", {6: 72.8, 8: 73.1, 12: 73.7, 16: 73.8}),
        ("epochs", "epochs", {100: 70.9, 300: 72.8, 800: 74.5}),
        ("crop_scale", "crops.global_scale", {(s, 1.0): n for s, n in (
            (0.08, 65.6), (0.16, 68.0), (0.24, 69.7), (0.32, 69.8), (0.48, 69.5))}),
        ("crop_scale", "crops.local_scale", {(0.05, s): n for s, n in (
            (0.08, 65.6), (0.16, 68.0), (0.24, 69.7), (0.32, 69.8), (0.48, 69.5))}),
        ("backbone", "model.backbone", {
            "vit_small_patch16_224": 74.5, "vit_small_patch8_224": 78.3,
            "vit_base_patch16_224": 76.1, "vit_base_patch8_224": 77.4}),
    ],
)  # fmt: skip
def test_tables_of_one_setting(name: str, key: str, numbers: dict[Any, float]) -> None:
    assert by_key(name, f"pretrain.{key}") == numbers


# DINOv2, table 1: k-NN and linear, from iBOT down
TABLE_1 = """
ibot 72.9 82.3
reproduction 74.5 83.2
layer_scale_depth 75.4 82.0
prototypes 76.6 81.9
koleo 78.9 82.5
swiglu 78.7 83.1
patch_size 78.9 83.5
teacher_momentum 79.4 83.6
warm_ups 80.5 83.8
batch_size 81.7 84.7
sinkhorn_knopp 81.7 84.7
untied_heads 82.0 84.5
"""


@pytest.mark.parametrize("name", ["dinov2_components", "dinov2_components_digits"])
def test_rows_of_dinov2_add_up(name: str) -> None:
    printed = [line.split() for line in TABLE_1.strip().splitlines()]
    rows = load_sweep(name).rows
    assert [[row, *map(str, numbers)] for row, numbers in zip(rows, papers(name, KNN, LINEAR), strict=True)] == printed
    flat = [flatten(trial.config) for trial in trials(name).values()]
    own = [{k for k in b if a[k] != b[k]} for a, b in pairwise(flat)]
    assert all(own), "every row changes something"
    sets = [set(row.changes) for row in rows.values()]
    assert all(above < below for above, below in pairwise(sets)), "and keeps what the others did"
    last = trials(name)["untied_heads"].config.pretrain
    assert (last.ibot.head, last.teacher.centering, last.loss.koleo_weight) == ("untied", "sinkhorn_knopp", 0.1)
    assert last.model.swiglu


def test_head_tables() -> None:
    heads = {row: (t.config.pretrain.head, t.paper) for row, t in trials("head").items()}
    assert {(head.batch_norm, head.activation): paper for head, paper in heads.values()} == {
        (False, "gelu"): {KNN: 69.7},
        (True, "gelu"): {KNN: 68.6},
        (False, "relu"): {KNN: 68.9},
    }
    # appendix C: all linear layers of the head, of which the prototypes are one where there is a bottleneck
    depth = {(row.changes["pretrain.head.bottleneck_norm"], row.changes["pretrain.head.num_layers"]): row.paper[KNN]
             for row in load_sweep("head_depth").rows.values()}  # fmt: skip
    assert depth == {
        **{(True, total - 1): knn for total, knn in ((2, 62.2), (3, 68.0), (4, 69.3))},
        **{(False, total): knn for total, knn in ((1, 61.6), (2, 62.9), (3, 0.1), (4, 0.1))},
    }
    assert {t.config.pretrain.head.num_prototypes for t in trials("head_depth").values()} == {4096}


@pytest.mark.parametrize("base", [name for name, recipe in RECIPES.items() if recipe().pretrain.head.num_prototypes])
def test_temperatures_are_constant_but_for_the_one_that_rises(base: str) -> None:
    found = trials("temperature", base)
    assert {row: trial.paper[KNN] for row, trial in found.items()} == {
        "argmax": 43.9,
        "temp_0.02": 66.7,
        "temp_0.04": 69.6,
        "temp_0.06": 68.7,
        "temp_0.08": 0.1,
        "temp_0.04_to_0.07": 69.7,
    }
    for row, trial in found.items():
        pretrain = dataclasses.replace(trial.config.pretrain, epochs=100, steps=None)
        schedule = build_schedules(pretrain, 10_000).teacher_temp
        steps_per_epoch = 10_000 / trial.config.pretrain.batch_size
        ends = [schedule(step) for step in (0, round(30 * steps_per_epoch), round(90 * steps_per_epoch))]
        if row == "temp_0.04_to_0.07":
            assert ends == pytest.approx([0.04, 0.07, 0.07])
        elif row != "argmax":
            assert ends == [float(row.removeprefix("temp_"))] * 3
    assert [row for row, t in found.items() if t.config.pretrain.teacher.sharpening == "argmax"] == ["argmax"]


def test_the_learning_rate_goes_with_the_batch() -> None:
    peaks = [build_schedules(t.config.pretrain, 1_281_167).peak_lr for t in trials("batch_size").values()]
    assert peaks == pytest.approx([5e-4 * size / 256 for size in (128, 256, 512, 1024)])
    assert {t.config.pretrain.crops.num_local_crops for t in trials("batch_size").values()} == {0}


def test_quickstart_and_momentum_are_grids() -> None:
    assert load_sweep("quickstart").space == {
        "pretrain.teacher.temp": [0.04, 0.07],
        "pretrain.teacher.momentum": [0.99, 0.996],
    }
    assert load_sweep("momentum").space == {"pretrain.teacher.momentum": [0.9, 0.99, 0.996, 0.9995]}


def test_momentum_schedules_have_base_end_and_shape() -> None:
    found = {}
    for name, trial in trials("momentum_schedule").items():
        teacher = trial.config.pretrain.teacher
        schedules = build_schedules(trial.config.pretrain, 1437)
        last = schedules.momentum(schedules.total_steps - 1)
        found[name] = (teacher.momentum_schedule, schedules.momentum(0), pytest.approx(last, abs=5e-4))
    assert len(found) == 9
    assert found["cosine_0.996_to_1"] == ("cosine", pytest.approx(0.996), 1.0)
    assert found["linear_0.9_to_1"] == ("linear", 0.9, 1.0)
    assert found["constant_0.99"] == ("constant", 0.99, 0.99)
