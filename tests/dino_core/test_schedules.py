from __future__ import annotations

import subprocess
import sys

import pytest

from dino_core.config import ConfigError, OptimConfig, PretrainConfig, TeacherConfig
from dino_core.schedules import build_schedules, cosine_schedule, linear_warmup_schedule


def config(**changes: object) -> PretrainConfig:
    values: dict[str, object] = {"epochs": 2.0, "batch_size": 8, "optim": OptimConfig(warmup_epochs=1)}
    return PretrainConfig(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (
            cosine_schedule(0.002, 1e-6, 1000, 100),
            {
                0: 0,
                1: 2.0202e-5,
                50: 1.0101e-3,
                99: 0.002,
                100: 0.002,
                101: 0.001999993911,
                550: 0.0010005,
                999: 1.006089e-6,
            },
        ),
        (cosine_schedule(0.996, 1, 1000), {0: 0.996, 1: 0.9960000099, 500: 0.998, 999: 0.9999999901}),
        (cosine_schedule(0.04, 0.4, 1000), {1: 0.04000088826, 500: 0.22, 999: 0.3999991117}),
    ],
)
def test_cosine_has_the_official_values(schedule, values):
    for step, value in values.items():
        assert schedule(step) == pytest.approx(value, rel=5e-6, abs=1e-12)


def test_cosine_of_one_warmup_step_starts_at_start():
    schedule = cosine_schedule(1.0, 0.0, 3, warmup_steps=1, start=0.25)
    assert [schedule(step) for step in range(3)] == [0.25, 1.0, 0.5]


def test_warmup_may_fill_the_run():
    schedule = cosine_schedule(1.0, 0.0, 3, warmup_steps=3)
    assert [schedule(step) for step in range(3)] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("step", [-1, 10])
def test_steps_outside_of_the_run_are_errors(step):
    with pytest.raises(ValueError, match=f"step = {step}"):
        cosine_schedule(1, 0, 10)(step)


@pytest.mark.parametrize(("total", "warmup"), [(0, 0), (10, 11), (10, -1)])
def test_lengths_that_do_not_fit_are_errors(total, warmup):
    with pytest.raises(ValueError, match="steps = "):
        cosine_schedule(1, 0, total, warmup)


def test_linear_warmup_includes_both_ends():
    schedule = linear_warmup_schedule(0.04, 0.07, 3)
    assert [schedule(step) for step in range(5)] == pytest.approx([0.04, 0.055, 0.07, 0.07, 0.07], abs=1e-15)
    assert linear_warmup_schedule(0.04, 0.07, 1)(0) == 0.04
    assert linear_warmup_schedule(0.04, 0.07, 0)(0) == 0.07
    with pytest.raises(ValueError, match="step = -1"):
        schedule(-1)
    with pytest.raises(ValueError, match="warmup_steps = -1"):
        linear_warmup_schedule(0, 1, -1)


def test_durations_in_epochs_become_steps():
    schedules = build_schedules(
        config(
            optim=OptimConfig(lr=0.5, warmup_epochs=1, freeze_last_layer_epochs=0.5),
            teacher=TeacherConfig(warmup_temp=0.02, temp=0.06, warmup_temp_epochs=0.4),
        ),
        num_samples=100,
    )
    assert schedules.total_steps == 25
    assert schedules.steps_per_epoch == 12.5
    assert schedules.freeze_last_layer_steps == 6
    assert schedules.peak_lr == 0.5 * 8 / 256
    assert schedules.lr(0) == 0
    assert schedules.lr(11) == schedules.lr(12) == schedules.peak_lr
    assert [schedules.teacher_temp(step) for step in range(6)] == pytest.approx([0.02, 0.03, 0.04, 0.05, 0.06, 0.06])
    assert schedules.momentum(0) == pytest.approx(0.996, abs=1e-15)
    assert schedules.weight_decay(0) == pytest.approx(0.04, abs=1e-15)


def test_the_learning_rate_is_scaled_only_if_asked():
    optim = OptimConfig(lr=0.5, lr_reference_batch_size=None, warmup_epochs=0)
    assert build_schedules(config(optim=optim), 100).lr(0) == 0.5


@pytest.mark.parametrize(
    ("epochs", "num_samples", "batch_size", "steps"), [(0.29, 100, 1, 29), (0.7, 10, 1, 7), (3, 10, 4, 7)]
)
def test_steps_of_a_run(epochs, num_samples, batch_size, steps):
    optim = OptimConfig(warmup_epochs=0)
    assert build_schedules(config(epochs=epochs, batch_size=batch_size, optim=optim), num_samples).total_steps == steps


def test_a_run_too_short_is_an_error_that_names_the_key():
    with pytest.raises(ConfigError, match=r"pretrain.epochs = 0.05: 100 images in batches of 8 make no full step"):
        build_schedules(config(epochs=0.05), 100)


def test_a_run_may_end_within_its_warmup_and_is_then_the_beginning_of_a_longer_one():
    teacher = TeacherConfig(warmup_temp=0.02, temp=0.06, warmup_temp_epochs=1)
    short = build_schedules(config(steps=5, epochs=None, teacher=teacher), 100)
    long = build_schedules(config(steps=500, epochs=None, teacher=teacher), 100)
    assert [short.lr(step) for step in range(5)] == pytest.approx([long.lr(step) for step in range(5)], rel=1e-12)
    assert [short.teacher_temp(step) for step in range(5)] == [long.teacher_temp(step) for step in range(5)]
    assert short.lr(0) == 0.0 < short.lr(4) < short.peak_lr / 2
    assert [note.partition(" = ")[0] for note in short.notes] == [
        "pretrain.optim.warmup_epochs",
        "pretrain.teacher.warmup_temp_epochs",
    ]
    assert long.notes == ()


def test_no_images_are_an_error():
    with pytest.raises(ConfigError, match=r"data.source"):
        build_schedules(config(), 0)


def test_schedules_need_no_torch():
    code = "import sys, dino_core.schedules, dino_core.backbone_names, dino_core.config; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
