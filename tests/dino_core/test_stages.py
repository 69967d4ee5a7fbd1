from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from dino_core.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint
from dino_core.config import (
    ConfigError,
    ModelConfig,
    PretrainConfig,
    StageConfig,
    StageCropsConfig,
    StageOptimConfig,
    StageTeacherConfig,
)
from dino_core.crops import CropBatch
from dino_core.resolution import check_stages
from dino_core.schedules import build_schedules
from dino_core.stages import stage_of_state, stages_of
from dino_core.train import TrainState, train
from tests.dino_core.points import BASE, NUM_SAMPLES, POINTS, changed

LARGER = StageConfig(steps=3, crops=StageCropsConfig(global_size=24, local_size=16))
FIRST, TOTAL = 4, 7


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def staged(config: PretrainConfig = BASE, *stages: StageConfig, **changes: Any) -> PretrainConfig:
    return dataclasses.replace(config, stages=stages or (LARGER,), **changes)


def batch(config: PretrainConfig, step: int) -> CropBatch:
    generator, crops = torch.Generator().manual_seed(step), config.crops
    sizes = [(2, crops.global_size), (crops.num_local_crops, crops.local_size)]
    made = [torch.randn(num * config.batch_size, 3, size, size, generator=generator) for num, size in sizes]
    return CropBatch(made[0], made[1] if crops.num_local_crops else None, config.batch_size)


def batches(state: TrainState) -> Iterator[CropBatch]:
    for stage in state.stages:
        yield from (batch(stage.config, step) for step in range(max(state.step, stage.start), stage.stop))


def run(state: TrainState, folder: Path | None = None, stop_step: int | None = None) -> dict[int, dict[str, float]]:
    """Train to the end; what was logged, by step."""
    logged: dict[int, dict[str, float]] = {}
    train(
        state,
        batches(state),
        on_log=logged.__setitem__,
        on_checkpoint=lambda state: None if folder is None else void(save_checkpoint(state, folder)),
        stop_step=stop_step,
    )
    return logged


def void(_: object) -> None:
    return None


def tensors(state: TrainState) -> dict[str, Tensor]:
    found = {f"{i}.{k}": v for i, d in state.optimizer.state_dict()["state"].items() for k, v in d.items()}
    for part in (state.student, state.teacher, state.objective):
        found |= {f"{type(part).__name__}.{id(part) == id(state.teacher)}.{n}": t for n, t in part.state_dict().items()}
    return found


def test_a_stage_has_all_schedules_again_in_its_own_time() -> None:
    config = dataclasses.replace(
        changed(
            BASE,
            optim={"lr": 0.1, "warmup_epochs": 2.0, "freeze_last_layer_epochs": 1.0, "min_lr": 0.0},
            teacher={"warmup_temp": 0.04, "temp": 0.07, "warmup_temp_epochs": 4.0, "momentum": 0.9},
        ),
        steps=40,
        stages=(
            StageConfig(steps=10, optim=StageOptimConfig(lr=0.01), teacher=StageTeacherConfig(temp=0.1)),
            StageConfig(steps=5, optim=StageOptimConfig(warmup_epochs=0.0)),
        ),
    )
    schedules = build_schedules(config, 80)  # 10 steps an epoch: a warm-up of 20 steps, frozen for 10
    assert schedules.total_steps == 55
    assert (schedules.epoch(54), schedules.steps_per_epoch) == (5, 10.0)
    assert [schedules.lr(step) for step in (0, 19, 20, 30)] == pytest.approx([0, 0.1, 0.1, 0.05])
    assert [schedules.lr(step) for step in (40, 44, 45)] == pytest.approx([0, 0.01, 0.01]), "5 of 10 steps"
    assert schedules.lr(50) == 0.1
    assert [schedules.teacher_temp(step) for step in (0, 40, 49, 50)] == pytest.approx([0.04, 0.04, 0.1, 0.04])
    assert [schedules.momentum(step) for step in (0, 40, 50)] == [0.9, 0.9, 0.9]
    assert schedules.momentum(39) > 0.99 > schedules.momentum(45)
    frozen = [step for step in range(55) if schedules.last_layer_is_frozen(step)]
    assert frozen == [*range(10), 40, 41, 50], "a quarter of the first stage's 40 steps, of 10, of 5 (1.25)"
    with pytest.raises(ValueError, match="step"):
        schedules.lr(55)


def test_stages_by_step() -> None:
    stages = stages_of(staged(BASE, LARGER, StageConfig(steps=2)), NUM_SAMPLES)
    assert [(stage.start, stage.stop) for stage in stages] == [(0, 4), (4, 7), (7, 9)]
    assert [stage.config.crops.global_size for stage in stages] == [16, 24, 16], "each is a change of the run"
    assert [stage_of_state(stages, step).index for step in (0, 4, 5, 7, 8, 9)] == [0, 0, 1, 1, 2, 2]
    alone = stages_of(BASE, NUM_SAMPLES)
    assert [(stage.start, stage.stop, stage.config) for stage in alone] == [(0, 4, BASE)]


@pytest.mark.parametrize("name", ["dino", "dinov2", "moco_v2", "previous epoch"])
@pytest.mark.parametrize("interrupted", [2, FIRST, 6])
def test_a_resumed_run_is_the_unbroken_one(name: str, interrupted: int, tmp_path: Path) -> None:
    config = staged(POINTS[name], log_every_steps=1, checkpoint_every_steps=2)
    whole = TrainState.create(config, NUM_SAMPLES)
    logged = run(whole, tmp_path)
    assert list(logged) == list(range(TOTAL)), "one axis of steps"
    assert [values["train/stage"] for values in logged.values()] == [1] * FIRST + [2] * 3
    again = TrainState.create(config, NUM_SAMPLES)
    load_checkpoint(again, checkpoint_path(tmp_path, interrupted))
    assert (again.step, again.stage) == (interrupted, int(interrupted > FIRST))
    repeated = run(again)
    one, other = tensors(whole), tensors(again)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    clock = {"train/images_per_s", "train/data_wait_share"}
    assert {s: {k: v for k, v in m.items() if k not in clock} for s, m in repeated.items()} == {
        s: {k: v for k, v in m.items() if k not in clock} for s, m in logged.items() if s >= interrupted
    }


def test_what_goes_on_and_what_begins_anew() -> None:
    config = staged(changed(BASE, model={"num_register_tokens": 2}, teacher={"momentum": 0.5}))
    state = TrainState.create(config, NUM_SAMPLES)
    run(state, stop_step=FIRST)
    before = {part: dict(getattr(state, part).state_dict()) for part in ("student", "teacher", "objective")}
    global_rng = torch.get_rng_state()
    state.enter_stage(1)
    assert torch.equal(torch.get_rng_state(), global_rng)
    assert (state.step, state.config.crops.global_size) == (FIRST, 24)
    assert state.optimizer.state_dict()["state"] == {}
    assert {p for group in state.optimizer.param_groups for p in group["params"]} <= set(state.student.parameters())
    positions = "backbone.pos_embed"
    for part, tensors in before.items():
        found = getattr(state, part).state_dict()
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            if name != positions:
                assert torch.equal(found[name], tensor), name
    for part in ("student", "teacher"):
        old, new = before[part][positions], getattr(state, part).state_dict()[positions]
        num_other = old.shape[1] - 4
        assert torch.equal(new, resample_abs_pos_embed(old, [3, 3], [2, 2], num_other)), part
    assert not torch.equal(before["student"][positions], before["teacher"][positions])


def test_a_network_of_ones_own_goes_on() -> None:
    module = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 16))
    config = staged(changed(BASE, model={"drop_path": 0.0}))
    state = TrainState.create(config, NUM_SAMPLES, backbone=module)
    run(state, stop_step=FIRST)
    weight = state.student.backbone[2].weight.clone()  # type: ignore[index, operator, union-attr]
    state.enter_stage(1)
    assert torch.equal(state.student.backbone[2].weight, weight)  # type: ignore[index, arg-type, union-attr]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"accumulate_steps": 3}, r"pretrain\.stages\[0\]: pretrain\.accumulate_steps = 3: must divide"),
        ({"crops": StageCropsConfig(global_scale=(0.5, 0.1))}, r"pretrain\.stages\[0\]: pretrain\.crops\.global_scale"),
    ],
)
def test_a_stage_that_makes_no_sense_is_refused(stage: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        staged(BASE, StageConfig(steps=2, **stage))


@pytest.mark.parametrize(
    ("model", "sizes", "message"),
    [
        ({}, (25, 16), r"stages\[0\]: pretrain\.crops\.global_size = 25: must be a multiple of the patch size 8"),
        ({"backbone": "beit_base_patch16_224"}, (24, 8), r"must be 16 .* whose backbone.blocks.0.* depends on it"),
        ({"backbone": "beitv2_base_patch16_224", "drop_path": 0.0}, (16, 8), ""),
    ],
)
def test_networks_that_cannot_go_on_are_refused(model: dict[str, Any], sizes: tuple[int, int], message: str) -> None:
    small = ModelConfig(patch_size=8, embed_dim=16, depth=1, num_heads=2)
    stage = StageConfig(steps=2, crops=StageCropsConfig(global_size=sizes[0], local_size=sizes[1]))
    config = staged(dataclasses.replace(changed(BASE, crops={"num_local_crops": 0}), model=small), stage)
    config = changed(config, model=model)
    if message:
        with pytest.raises(ConfigError, match=message):
            check_stages(stages_of(config, NUM_SAMPLES))
    else:
        check_stages(stages_of(config, NUM_SAMPLES))
