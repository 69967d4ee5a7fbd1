from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dino_core.config import ConfigError, OptimConfig, PretrainConfig, TeacherConfig
from dino_core.schedules import (
    build_schedules,
    cosine_schedule,
    linear_warmup_schedule,
    shaped_schedule,
    wsd_schedule,
)


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


def test_wsd_warms_up_stays_and_falls_by_one_minus_sqrt():
    schedule = wsd_schedule(1.0, 0.2, total_steps=12, warmup_steps=3, decay_steps=4)
    falling = [0.2 + 0.8 * share for share in (1, 1 - 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5)]  # 1 - sqrt of 0, 1/4, 1/2, 3/4
    expected = [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, *falling]
    assert [schedule(step) for step in range(12)] == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="step = 12"):
        schedule(12)


def test_wsd_without_a_decay_stays_and_without_a_stable_part_falls_from_the_start():
    assert [wsd_schedule(2.0, 0.0, 3)(step) for step in range(3)] == [2.0, 2.0, 2.0]
    assert [wsd_schedule(2.0, 0.0, 4, 0, 4)(step) for step in (0, 1)] == [2.0, 1.0]


@pytest.mark.parametrize(("total", "warmup", "decay"), [(0, 0, 0), (10, 6, 5), (10, -1, 2), (10, 2, -1)])
def test_wsd_that_does_not_fit_is_an_error(total, warmup, decay):
    with pytest.raises(ValueError, match="steps = "):
        wsd_schedule(1.0, 0.0, total, warmup, decay)


def test_shapes_between_two_values():
    assert [shaped_schedule("linear", 1.0, 3.0, 4)(step) for step in range(4)] == [1.0, 1.5, 2.0, 2.5]
    assert [shaped_schedule("constant", 1.0, 3.0, 4)(step) for step in range(4)] == [1.0] * 4
    cosine = cosine_schedule(1.0, 3.0, 4)
    assert [shaped_schedule("cosine", 1.0, 3.0, 4)(step) for step in range(4)] == [cosine(step) for step in range(4)]
    for shape in ("linear", "constant", "cosine"):
        with pytest.raises(ValueError, match="step = 4"):
            shaped_schedule(shape, 1.0, 3.0, 4)(4)
        with pytest.raises(ValueError, match="total_steps = 0"):
            shaped_schedule(shape, 1.0, 3.0, 0)


def stable(steps: int):
    """wsd with constant weight decay and momentum, 12.5 steps per epoch, one of them warm-up."""
    optim = OptimConfig(schedule="wsd", weight_decay_schedule="constant", warmup_epochs=1, decay_fraction=0.25)
    teacher = TeacherConfig(momentum_schedule="constant", momentum=0.99)
    return build_schedules(config(steps=steps, epochs=None, optim=optim, teacher=teacher), 100)


def test_the_stable_part_of_a_run_does_not_depend_on_its_length():
    short, long = stable(80), stable(400)
    for step in range(61):  # the decay of the short one begins with its second value at step 61
        for name in ("lr", "weight_decay", "momentum", "teacher_temp"):
            assert getattr(short, name)(step) == getattr(long, name)(step)
    assert short.lr(61) < long.lr(61)
    assert (short.weight_decay(79), short.momentum(79)) == (0.04, 0.99)


def test_the_ema_scaling_rule_holds_for_every_shape():
    teacher = TeacherConfig(
        momentum=0.9, final_momentum=1.0, momentum_schedule="linear", momentum_reference_batch_size=4
    )
    schedules = build_schedules(config(steps=10, epochs=None, teacher=teacher), 100)
    assert schedules.momentum(5) == pytest.approx(0.95**2)


def test_a_decay_that_runs_into_the_warmup_is_refused():
    optim = OptimConfig(schedule="wsd", warmup_epochs=1, decay_fraction=0.5)  # 12 steps of warm-up, 10 of decay
    with pytest.raises(ConfigError, match=r"pretrain.optim.decay_fraction = 0.5: is 10 steps, .* at most 0.4"):
        build_schedules(config(steps=20, epochs=None, optim=optim), 100)
    build_schedules(config(steps=20, epochs=None, optim=OptimConfig(schedule="wsd", warmup_epochs=1)), 100)
    build_schedules(config(steps=5, epochs=None, optim=optim), 100)  # the beginning of a longer run, all warm-up


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


def test_scaling_rules_of_the_learning_rate_are_said():
    def peak(optim: OptimConfig, batch_size: int) -> tuple[float, tuple[str, ...]]:
        schedules = build_schedules(config(optim=optim, batch_size=batch_size), 4096)
        return schedules.peak_lr, schedules.notes

    linear = OptimConfig(lr=0.0005, warmup_epochs=1)
    assert peak(linear, 1024) == (0.002, ("pretrain.optim.lr = 0.0005: peak 0.002 = 0.0005 x (1024 / 256)",))
    assert peak(linear, 256) == (0.0005, ())
    # DINOv2: base_lr * sqrt(batch size / 1024), of ViT-L in its paper 0.004 at 2048 images
    root = OptimConfig(lr=0.004, lr_scaling="sqrt", lr_reference_batch_size=1024, warmup_epochs=1)
    value, notes = peak(root, 2048)
    assert value == pytest.approx(0.00565685425)
    assert notes == ("pretrain.optim.lr = 0.004: peak 0.00565685 = 0.004 x (2048 / 1024) ^ 0.5",)
    assert peak(OptimConfig(lr=0.1, lr_scaling="sqrt", lr_reference_batch_size=None, warmup_epochs=1), 64) == (0.1, ())


def test_the_ema_scaling_rule_raises_every_value_of_the_momentum():
    def run(batch_size: int, reference: int | None):
        teacher = TeacherConfig(momentum=0.996, momentum_reference_batch_size=reference)
        optim = OptimConfig(lr_reference_batch_size=None, warmup_epochs=0)
        return build_schedules(config(steps=100, epochs=None, batch_size=batch_size, teacher=teacher, optim=optim), 512)

    plain, scaled = run(64, None), run(64, 1024)
    # 0.996 ^ (1 / 16), 0.998 ^ (1 / 16): the middle of the cosine
    assert scaled.momentum(0) == pytest.approx(0.999749530, abs=1e-9)
    assert scaled.momentum(50) == pytest.approx(0.999874883, abs=1e-9)
    for step in range(100):  # 16 small steps move the teacher as far as one large one
        assert scaled.momentum(step) ** 16 == pytest.approx(plain.momentum(step), rel=1e-12)
    assert scaled.notes == (
        "pretrain.teacher.momentum = 0.996: starts at 0.9997495 = 0.996 ^ (64 / 1024), later values to the same power",
    )
    assert [run(64, 64).momentum(step) for step in range(100)] == [plain.momentum(step) for step in range(100)]
    assert plain.notes == run(64, 64).notes == ()
    assert run(64, 16).momentum(0) == pytest.approx(0.996**4)
    with pytest.raises(ValueError, match="step = 100"):
        scaled.momentum(100)


def test_a_momentum_of_one_or_none_stays_so_at_any_batch_size():
    teacher = TeacherConfig(momentum=0.0, final_momentum=0.0, momentum_reference_batch_size=1024)
    assert build_schedules(config(teacher=teacher), 100).momentum(3) == 0.0
    teacher = TeacherConfig(momentum=1.0, final_momentum=1.0, momentum_reference_batch_size=1024)
    assert build_schedules(config(teacher=teacher), 100).momentum(3) == 1.0


def by_epoch(num_samples: int, batch_size: int, warmup_epochs: float, epochs: float = 8.0):
    teacher = TeacherConfig(warmup_temp=0.04, temp=0.07, warmup_temp_epochs=warmup_epochs, temp_by_epoch=True)
    optim = OptimConfig(lr_reference_batch_size=None, warmup_epochs=1)
    return build_schedules(config(epochs=epochs, batch_size=batch_size, teacher=teacher, optim=optim), num_samples)


def test_the_temperature_by_epoch_is_the_authors_array():
    # numpy.concatenate((numpy.linspace(0.04, 0.07, 3), numpy.ones(5) * 0.07)), indexed by the epoch, 4 steps each
    schedules = by_epoch(num_samples=32, batch_size=8, warmup_epochs=3)
    array = [0.04, 0.055, 0.07, 0.07, 0.07, 0.07, 0.07, 0.07]
    assert [schedules.teacher_temp(step) for step in range(32)] == pytest.approx(
        [value for value in array for _ in range(4)], abs=1e-15
    )
    with pytest.raises(ValueError, match="step = -1"):
        schedules.teacher_temp(-1)


def test_an_epoch_that_ends_inside_a_step_ends_with_that_step():
    # 2.5 steps per epoch: epoch 1 begins within step 2, so step 3 is its first; epoch 2 is steps 5 to 7
    schedules = by_epoch(num_samples=20, batch_size=8, warmup_epochs=3.4)
    expected = [0.04, 0.04, 0.04, 0.055, 0.055, 0.07, 0.07, 0.07]
    assert [schedules.teacher_temp(step) for step in range(8)] == pytest.approx(expected, abs=1e-15)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**7), st.integers(1, 4096), st.integers(0, 10**6))
def test_the_epoch_of_a_step_is_exact(num_samples, batch_size, epoch):
    schedules = by_epoch(num_samples, batch_size, warmup_epochs=10**7, epochs=float(batch_size))
    first = -(-epoch * num_samples // batch_size)  # the first step that begins in the epoch
    assume(first * batch_size // num_samples == epoch)  # a batch may be larger than the epoch
    value = linear_warmup_schedule(0.04, 0.07, 10**7)
    assert schedules.epoch(first) == epoch
    assert schedules.teacher_temp(first) == value(epoch)
    if first:
        assert schedules.teacher_temp(first - 1) < value(epoch)


def test_a_warmup_by_epoch_that_is_longer_than_the_run_is_said_in_steps():
    (note,) = by_epoch(num_samples=32, batch_size=8, warmup_epochs=9.4).notes
    assert note == "pretrain.teacher.warmup_temp_epochs = 9.4: is 36 steps; the run of 32 steps ends before"


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
        "pretrain.optim.lr",
        "pretrain.optim.freeze_last_layer_epochs",
    ]
    assert [note.partition(" = ")[0] for note in long.notes] == ["pretrain.optim.lr"]


def test_no_images_are_an_error():
    with pytest.raises(ConfigError, match=r"data.source"):
        build_schedules(config(), 0)


def test_schedules_need_no_torch():
    code = "import sys, dino_core.schedules, dino_core.backbone_names, dino_core.config; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_teacher_that_would_never_move_is_noted():
    teacher = TeacherConfig(update="previous_epoch")
    notes = build_schedules(config(steps=5, epochs=None, teacher=teacher), 100).notes
    assert any(note.startswith("pretrain.teacher.update = previous_epoch: the teacher never moves") for note in notes)
    notes = build_schedules(config(steps=50, epochs=None, teacher=teacher), 100).notes
    assert not any("previous_epoch" in note for note in notes)
