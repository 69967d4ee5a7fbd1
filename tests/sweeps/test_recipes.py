from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

from dino_core.schedules import build_schedules
from dino_core.stages import num_steps
from orchestrator.catalog import load_recipe, recipes, summary
from orchestrator.overrides import flatten
from orchestrator.preflight import model_problems
from sweeps.recipes import RECIPES

NUM_SAMPLES = {"digits": 1438, "cifar10.parquet": 50_000, "imagenet": 1_281_167, "imagenet22k": 14_197_122}


def values(recipe: str, prefix: str = "pretrain.") -> dict[str, Any]:
    flat = flatten(load_recipe(recipe))
    return {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}


def test_the_recipes_that_are_promised() -> None:
    assert list(recipes()) == [
        *("quickstart", "cifar10_tiny", "cifar10_simclr", "dino_vits16", "dino_resnet50"),
        *("ibot_vits16", "dinov2_vits14", "dinov2_vitl14", "ibot_digits", "dinov2_digits", "dinov2_large_digits"),
        *("dinov2_highres_digits", "dinov2_distilled_digits"),
    ]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_complete(recipe: str) -> None:
    config = load_recipe(recipe)
    assert model_problems(config) == []
    schedules = build_schedules(config.pretrain, NUM_SAMPLES[config.data.source])
    assert schedules.total_steps > schedules.freeze_last_layer_steps


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_says_where_it_is_from_what_it_costs_what_to_expect_and_how_to_run_it(recipe: str) -> None:
    text = inspect.getdoc(RECIPES[recipe]) or ""
    for part in ("Paper: ", "arXiv 2", "Cost: ", "Expected: ", f"python -m orchestrator pretrain {recipe}"):
        assert part in text
    assert 40 < len(summary(RECIPES[recipe])) <= 115


def test_quickstart_fits_the_digits() -> None:
    found = values("quickstart")
    assert load_recipe("quickstart").data.source == "digits"
    assert found["crops.flip_prob"] == 0
    assert found["head.num_prototypes"] <= 1024
    assert found["eval.every_steps"] <= found["steps"] / 3


def test_dino_vits16_is_the_published_recipe() -> None:
    found = values("dino_vits16")
    expected = {
        "model.backbone": "vit_small_patch16_224",
        "model.drop_path": 0.1,
        "epochs": 300.0,
        "batch_size": 1024,
        "head.num_prototypes": 65536,
        "head.norm_last_layer": False,
        "head.batch_norm": False,
        "teacher.temp": 0.07,
        "teacher.warmup_temp": 0.04,
        "teacher.warmup_temp_epochs": 30.0,
        "teacher.momentum": 0.996,
        "teacher.final_momentum": 1.0,
        "student.temp": 0.1,
        "crops.num_local_crops": 8,
        "crops.global_size": 224,
        "crops.local_size": 96,
        "crops.global_scale": (0.4, 1.0),
        "crops.local_scale": (0.05, 0.4),
        "crops.blur_prob": (1.0, 0.1, 0.5),
        "crops.solarize_prob": 0.2,
        "optim.name": "adamw",
        "optim.lr": 5e-4,
        "optim.lr_reference_batch_size": 256,
        "optim.min_lr": 1e-6,
        "optim.warmup_epochs": 10.0,
        "optim.weight_decay": 0.04,
        "optim.final_weight_decay": 0.4,
        "optim.clip_grad": 3.0,
        "optim.freeze_last_layer_epochs": 1.0,
    }
    assert {key: found[key] for key in expected} == expected
    assert build_schedules(load_recipe("dino_vits16").pretrain, 1_281_167).peak_lr == pytest.approx(2e-3)
    assert values("dino_vits16", "cluster.")["num_workers"] == 16


def test_dino_resnet50_is_the_published_recipe() -> None:
    found = values("dino_resnet50")
    expected = {
        "model.backbone": "resnet50",
        "model.drop_path": 0.0,
        "epochs": 100.0,
        "head.norm_last_layer": True,
        "teacher.temp": 0.04,
        "teacher.momentum": 0.996,
        "crops.global_scale": (0.14, 1.0),
        "crops.local_scale": (0.05, 0.14),
        "optim.name": "sgd",
        "optim.lr": 0.03,
        "optim.weight_decay": 1e-4,
        "optim.final_weight_decay": 1e-4,
    }
    assert {key: found[key] for key in expected} == expected


def test_ibot_vits16_is_the_published_recipe() -> None:
    """The arguments of the authors' README; what it does not name is the default of their main_ibot.py."""
    found = values("ibot_vits16")
    expected = {
        "model.backbone": "vit_small_patch16_224",
        "model.drop_path": 0.1,
        "epochs": 800.0,
        "batch_size": 16 * 64,
        "head.num_prototypes": 8192,
        "head.norm_last_layer": False,
        "ibot.head": "shared",
        "ibot.weight": 1.0,
        "ibot.temp": 0.07,
        "ibot.warmup_temp": 0.04,
        "teacher.temp": 0.07,
        "teacher.warmup_temp_epochs": 30.0,
        "crops.num_local_crops": 10,
        "crops.global_scale": (0.25, 1.0),
        "crops.local_scale": (0.05, 0.25),
        "mask.sampler": "ibot",
        "mask.prob": 0.5,  # one of the ratios 0 and 0.3
        "mask.ratio": (0.1, 0.5),  # 0.3 +- 0.2
        "optim.lr": 5e-4,
        "optim.warmup_epochs": 10.0,
        "optim.final_weight_decay": 0.4,
    }
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("recipe", "images", "peak_lr", "steps", "expected"),
    [
        (
            "dinov2_vits14",
            1_281_167,
            0.004 * 2**0.5,
            {"total": 100, "warmup": 10, "temp": 30, "frozen": 1},
            {"head.num_prototypes": 65536, "ibot.head": "shared", "teacher.centering": "center",
             "teacher.momentum": 0.992, "optim.layer_decay": 0.9, "model.drop_path": 0.3, "model.swiglu": False,
             "optim.final_weight_decay": 0.4, "loss.koleo_group_size": 64},
        ),
        (
            "dinov2_vitl14",
            14_197_122,
            2e-4 * 3**0.5,
            {"total": 500, "warmup": 80, "temp": 30, "frozen": 1, "high": 10_000},
            {"head.num_prototypes": 131072, "head.bottleneck_dim": 384, "ibot.head": "untied",
             "ibot.num_prototypes": 131072, "ibot.bottleneck_dim": 256, "teacher.centering": "sinkhorn_knopp",
             "teacher.momentum": 0.994, "optim.layer_decay": 1.0, "model.drop_path": 0.4, "model.swiglu": True,
             "optim.final_weight_decay": 0.2, "loss.koleo_group_size": 32, "batch_size": 96 * 32},
        ),
    ],
)  # fmt: skip
def test_dinov2_is_the_published_recipe(
    recipe: str, images: int, peak_lr: float, steps: dict[str, int], expected: dict[str, Any]
) -> None:
    """ssl_default_config.yaml, and train/vitl14.yaml over it; durations in their epochs of 1250 steps."""
    found = values(recipe)
    common = {
        "model.layer_scale": 1e-5,
        "model.drop_path_schedule": "uniform",
        "mask.prob": 0.5,
        "mask.ratio": (0.1, 0.5),
        "loss.koleo_weight": 0.1,
        "optim.patch_embed_lr_mult": 0.2,
        "crops.global_scale": (0.32, 1.0),
        "crops.local_scale": (0.05, 0.32),
        "crops.local_size": 98,
        "teacher.warmup_temp": 0.04,
        "teacher.temp": 0.07,
    }
    assert {key: found[key] for key in common | expected} == common | expected
    pretrain = load_recipe(recipe).pretrain
    assert build_schedules(pretrain, images).total_steps - num_steps(pretrain, images) == steps.get("high", 0)
    schedules = build_schedules(dataclasses.replace(pretrain, stages=()), images)
    assert schedules.peak_lr == pytest.approx(peak_lr)
    assert schedules.total_steps == pytest.approx(1250 * steps["total"], rel=2e-3)
    assert schedules.freeze_last_layer_steps == pytest.approx(1250 * steps["frozen"], rel=2e-3)
    end_of_warmup = round(1250 * steps["warmup"] * 0.99)
    assert schedules.lr(end_of_warmup) == pytest.approx(0.99 * peak_lr, rel=5e-3)
    assert schedules.teacher_temp(round(1250 * steps["temp"] / 2)) == pytest.approx(0.055, rel=2e-3)
    assert schedules.teacher_temp(round(1250 * steps["temp"] * 1.01)) == 0.07
