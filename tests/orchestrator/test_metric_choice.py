"""By what trials are ranked, what is refused, and what label-free scores would have picked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import spearmanr

from dino_core.config import ConfigError
from orchestrator.config import RunConfig
from orchestrator.metric_choice import (
    KNN,
    LIDAR,
    RANKME,
    choice_for_trials,
    choose_metric,
    comparison_problems,
    label_free_agreement,
    resolve_metric,
    spearman,
)
from orchestrator.overrides import override
from orchestrator.run_sweep import _write_plan
from orchestrator.sweep import METRICS, Row, Sweep, expand
from orchestrator.trials import TrialSummary
from sweeps.recipes import quickstart

TEMP, K, LR = "pretrain.teacher.temp", "pretrain.head.num_prototypes", "pretrain.optim.lr"


def trial(name: str, **values: float) -> TrialSummary:
    curves = {f"eval/{metric}": [(0, 1.0), (10, value)] for metric, value in values.items()}
    return TrialSummary(run_id=name, name=name, status="finished", curves=curves)


def problems(metric: str, key: str, values: list[Any], **settings: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        expand(Sweep(base="quickstart", space={key: values}, metric=metric, **settings))
    return str(caught.value).splitlines()


# --- the choice -------------------------------------------------------------------------------------------------------


def test_k_nn_with_labels_and_a_label_free_score_without() -> None:
    assert (choose_metric(True).metric, choose_metric(True).mode) == (KNN, "max")
    assert (choose_metric(False).metric, choose_metric(False).mode) == (RANKME, "max")
    assert {choose_metric(labels).metric for labels in (True, False)} <= set(METRICS)


@pytest.mark.parametrize(("metric", "mode"), [("train/loss", "min"), ("train/kl", "min"), (LIDAR, "max"), (KNN, "max")])
def test_a_metric_says_which_end_is_better(metric: str, mode: str) -> None:
    assert resolve_metric(metric, None, has_labels=False).mode == mode
    assert resolve_metric(metric, "min", has_labels=True).mode == "min"
    assert resolve_metric(metric, None, has_labels=True).sentence.startswith(
        f"Trials are ranked by {metric}, {'larger' if mode == 'max' else 'smaller'} is better: it was asked for"
    )


def test_recorded_trials_follow_their_sweep_else_what_they_have() -> None:
    definition = {"metric": "train/loss", "mode": "min", "metric_why": "it was asked for"}
    labelled, bare = [trial("a", knn_top1=50, rankme=3)], [trial("a", rankme=3)]
    assert choice_for_trials(labelled, definition).metric == "train/loss"
    assert choice_for_trials(labelled, {"metric": KNN, "mode": "max"}).metric == KNN  # of an older version
    assert choice_for_trials(labelled).metric == KNN
    assert choice_for_trials(bare) == choose_metric(False)
    assert choice_for_trials([trial("a")]).metric == KNN


def test_mode_alone_and_alpha_req_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sweep\.mode = max: must be none beside sweep\.metric = none"):
        Sweep(base="quickstart", mode="max")
    with pytest.raises(ConfigError, match=r"sweep\.metric = eval/alpha_req: cannot rank, it is best near 1"):
        Sweep(base="quickstart", metric="eval/alpha_req")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["train/loss", "train/kl", "train/teacher_entropy", "train/loss_below_uniform"])
@pytest.mark.parametrize(
    ("key", "values"),
    [
        (TEMP, [0.04, 0.07]),
        ("pretrain.student.temp", [0.1, 0.2]),
        (K, [64, 256]),
        ("pretrain.teacher.centering", ["center", "sinkhorn_knopp"]),
        ("pretrain.crops.num_local_crops", [2, 4]),
        ("pretrain.crops.global_scale", [(0.4, 1.0), (0.6, 1.0)]),
    ],
)
def test_a_loss_cannot_compare_what_makes_its_own_targets(metric: str, key: str, values: list[Any]) -> None:
    (line,) = problems(metric, key, values)
    assert line.startswith(
        f"sweep.metric = {metric}: cannot compare trials with different {key}, which makes the targets"
    )
    assert line.endswith("must be eval/knn_top1 or, without labels, eval/rankme, or none to have it chosen")


def test_rows_and_methods_are_looked_into() -> None:
    rows = {"a": Row(), "b": Row(changes={K: 512, TEMP: 0.05}), "c": Row(method="byol")}
    with pytest.raises(ConfigError) as caught:
        expand(Sweep(base="quickstart", rows=rows, metric="train/loss"))
    assert "pretrain.teacher.temp" in str(caught.value)
    assert " and " in str(caught.value)


def test_a_loss_compares_what_leaves_its_targets_alone() -> None:
    space = {LR: [1e-3, 1e-4], "pretrain.optim.weight_decay": [0.0, 0.1], "pretrain.teacher.momentum": [0.9, 0.99]}
    assert len(expand(Sweep(base="quickstart", space=space, metric="train/loss"))) == 8
    assert len(expand(Sweep(base="quickstart", space={TEMP: [0.05]}, metric="train/loss"))) == 1  # the same in all


@pytest.mark.parametrize("metric", [None, KNN, RANKME, LIDAR, "train/feature_rank"])
def test_what_does_not_follow_the_temperature_compares_temperatures(metric: str | None) -> None:
    assert len(expand(Sweep(base="quickstart", space={TEMP: [0.04, 0.07], K: [64, 256]}, metric=metric))) == 4


def test_lidar_cannot_compare_augmentations() -> None:
    (line,) = problems(LIDAR, "pretrain.crops.jitter_prob", [0.0, 0.8])
    assert "which makes the views whose spread it measures" in line
    assert len(expand(Sweep(base="quickstart", space={"pretrain.crops.num_local_crops": [0, 2]}, metric=LIDAR))) == 2


def test_every_key_that_is_looked_at_is_a_setting() -> None:
    config = RunConfig()
    for metric in ("train/loss", LIDAR):
        assert comparison_problems(metric, [config, config]) == []


# --- in the record of a sweep -----------------------------------------------------------------------------------------


def small(tmp_path: Path, **changes: Any) -> RunConfig:
    return override(quickstart(), {"cluster.storage": str(tmp_path / "runs"), **changes})


def unlabelled(tmp_path: Path) -> dict[str, Any]:
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir(exist_ok=True)
    for number in range(70):
        Image.new("L", (9, 9), number).save(folder / f"{number}.png")
    return {"data.source": str(folder)}


def definition(sweep: Sweep) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((_write_plan(sweep).folder / "sweep.json").read_text())
    return found


def test_the_plan_holds_what_was_chosen_and_why(tmp_path: Path) -> None:
    with_labels = definition(Sweep(base=small(tmp_path), space={TEMP: [0.04, 0.07]}))
    assert (with_labels["metric"], with_labels["mode"]) == (KNN, "max")
    assert with_labels["metric_why"] == choose_metric(True).why
    without = small(tmp_path, **unlabelled(tmp_path))
    bare = definition(Sweep(base=without, space={TEMP: [0.04, 0.07]}, scheduler="asha", grace_steps=50))
    assert (bare["metric"], bare["mode"], bare["metric_why"]) == (RANKME, "max", choose_metric(False).why)
    asked = definition(Sweep(base=without, space={LR: [1e-3, 1e-4]}, metric="train/loss"))
    assert (asked["metric"], asked["mode"], asked["metric_why"]) == ("train/loss", "min", "it was asked for")


def test_a_score_that_is_switched_off_cannot_rank(tmp_path: Path) -> None:
    base = small(tmp_path, **unlabelled(tmp_path), **{"pretrain.eval.num_label_free": 0})
    message = r"pretrain\.eval\.num_label_free = 0: must be >= 1, trials are ranked by eval/rankme"
    with pytest.raises(ConfigError, match=message):
        _write_plan(Sweep(base=base, space={TEMP: [0.04, 0.07]}))
    no_lidar = small(tmp_path, **{"pretrain.eval.num_lidar_images": 0})
    with pytest.raises(ConfigError, match=r"pretrain\.eval\.num_lidar_images = 0: must be >= 1"):
        _write_plan(Sweep(base=no_lidar, space={TEMP: [0.04, 0.07]}, metric=LIDAR))
    assert not (tmp_path / "runs").exists()


# --- regret -----------------------------------------------------------------------------------------------------------


def test_regret_is_what_the_pick_lacks() -> None:
    trials = [
        trial("a", knn_top1=70.0, rankme=20.0, lidar=9.0, alpha_req=1.9),
        trial("b", knn_top1=75.0, rankme=12.0, lidar=11.0, alpha_req=0.2),
        trial("c", knn_top1=40.0, rankme=3.0, lidar=2.0, alpha_req=1.1),
        trial("d", rankme=99.0),  # failed before it was evaluated
        trial("e", knn_top1=math.nan, rankme=99.0),
    ]
    rank, views, alpha = label_free_agreement(trials)
    assert (rank.score, rank.picked, rank.knn, rank.regret, rank.num_trials) == (RANKME, "a", 70.0, 5.0, 3)
    assert rank.correlation == pytest.approx(0.5)
    assert (views.picked, views.regret) == ("b", 0.0)
    assert views.correlation == pytest.approx(1)
    assert (alpha.picked, alpha.regret) == ("c", 35.0)
    assert alpha.correlation == pytest.approx(-0.5)  # the distance from 1 counts: 0.9, 0.8, 0.1
    assert rank.sentence == (
        "By eval/rankme alone one would have picked a: 70.0 % k-NN, 5.0 below the best, rank correlation +0.50 over 3 "
        "trials."
    )
    assert label_free_agreement(trials[:2]) == ()


@pytest.mark.parametrize(
    ("x", "y"), [([1, 2, 3, 4], [1, 3, 2, 4]), ([1, 1, 2, 5, 5], [9, 2, 2, 1, 7]), ([3.5, -1, 2], [0, 0, 1])]
)
def test_rank_correlation_is_scipys(x: list[float], y: list[float]) -> None:
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert spearman(x, [1.0] * len(x)) is None
