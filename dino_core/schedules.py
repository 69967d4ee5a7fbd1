"""Schedules: plain functions of the step (0 is the first update). No torch here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dino_core.config import ConfigError, PretrainConfig, Shape
from dino_core.stages import Stage, num_steps, stages_of

Schedule = Callable[[int], float]


def _linspace(start: float, stop: float, num: int, index: int) -> float:
    """Element `index` of `num` equally spaced values that include both ends; `start` if there is only one."""
    if num > 1 and index == num - 1:
        return stop
    return start + index * ((stop - start) / (num - 1) if num > 1 else 0.0)


def cosine_schedule(base: float, final: float, total_steps: int, warmup_steps: int = 0, start: float = 0.0) -> Schedule:
    """Linear warm-up from `start` to `base`, then half a cosine from `base` towards `final`.

    With W = `warmup_steps` and N = `total_steps` - W::

        step < W:   W equally spaced values, the last of them `base`
        otherwise:  final + (base - final) / 2 * (1 + cos(pi * (step - W) / N))

    `base` therefore comes twice and `final` is approached but not reached. Source: DINO (arXiv 2104.14294), section 3.2
    and the authors' array of the same values.

    Raises:
        ValueError: the warm-up does not fit into the run; when called, a step outside of the run.
    """
    if total_steps < 1:
        raise ValueError(f"total_steps = {total_steps}: must be >= 1")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps = {warmup_steps}: must lie between 0 and total_steps = {total_steps}")

    def schedule(step: int) -> float:
        if not 0 <= step < total_steps:
            raise ValueError(f"step = {step}: must be >= 0 and < total_steps = {total_steps}")
        if step < warmup_steps:
            return _linspace(start, base, warmup_steps, step)
        progress = (step - warmup_steps) / (total_steps - warmup_steps)
        return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))

    return schedule


def wsd_schedule(
    base: float, final: float, total_steps: int, warmup_steps: int = 0, decay_steps: int = 0, start: float = 0.0
) -> Schedule:
    """Warm-up, stable, decay: linear from `start` to `base`, then `base`, then from `base` towards `final`.

    With W = `warmup_steps` and D = `decay_steps`::

        step < W:                  W equally spaced values, the last of them `base`
        step < total_steps - D:    base
        otherwise:                 final + (base - final) * (1 - sqrt((step - (total_steps - D)) / D))

    All steps before the decay have the value that they would have in a run of any other length. `final` is approached
    but not reached. Source: Hägele et al. (arXiv 2405.18392), section 3, whose 1 - sqrt ends lower than a linear decay
    and with 20 % of the steps at about the loss of a cosine; the three phases are from MiniCPM (arXiv 2404.06395).

    Raises:
        ValueError: warm-up and decay do not fit into the run; when called, a step outside of the run.
    """
    if total_steps < 1:
        raise ValueError(f"total_steps = {total_steps}: must be >= 1")
    if warmup_steps < 0 or decay_steps < 0 or warmup_steps + decay_steps > total_steps:
        raise ValueError(
            f"warmup_steps = {warmup_steps}, decay_steps = {decay_steps}: must be >= 0 and together at most "
            f"total_steps = {total_steps}"
        )

    def schedule(step: int) -> float:
        if not 0 <= step < total_steps:
            raise ValueError(f"step = {step}: must be >= 0 and < total_steps = {total_steps}")
        if step < warmup_steps:
            return _linspace(start, base, warmup_steps, step)
        into_decay = step - (total_steps - decay_steps)
        if into_decay <= 0:
            return base
        return final + (base - final) * (1 - math.sqrt(into_decay / decay_steps))

    return schedule


def shaped_schedule(shape: Shape, base: float, final: float, total_steps: int) -> Schedule:
    """From `base` towards `final` over the run: by half a cosine, in a straight line, or not at all (`constant`).

    As in `cosine_schedule`, `final` is approached but not reached.

    Raises:
        ValueError: as `cosine_schedule`; when called, a step outside of the run.
    """
    if shape == "cosine":
        return cosine_schedule(base, final, total_steps)
    if total_steps < 1:
        raise ValueError(f"total_steps = {total_steps}: must be >= 1")

    def schedule(step: int) -> float:
        if not 0 <= step < total_steps:
            raise ValueError(f"step = {step}: must be >= 0 and < total_steps = {total_steps}")
        return base if shape == "constant" else base + (final - base) * step / total_steps

    return schedule


def linear_warmup_schedule(start: float, final: float, warmup_steps: int) -> Schedule:
    """`warmup_steps` equally spaced values from `start` to `final`, both included, then `final` for ever.

    Raises:
        ValueError: `warmup_steps` is negative; when called, a negative step.
    """
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps = {warmup_steps}: must be >= 0")

    def schedule(step: int) -> float:
        if step < 0:
            raise ValueError(f"step = {step}: must be >= 0")
        return _linspace(start, final, warmup_steps, step) if step < warmup_steps else final

    return schedule


@dataclass(frozen=True)
class Schedules:
    """All schedules of one run, and the lengths that follow from its configuration and the number of images."""

    lr: Schedule
    weight_decay: Schedule
    momentum: Schedule
    """Of the teacher."""
    teacher_temp: Schedule
    patch_temp: Schedule
    """Of the teacher's patches, where they are masked."""
    total_steps: int
    freeze_last_layer_steps: int
    """The prototypes get no update in steps below this; in later stages, see `last_layer_is_frozen`."""
    steps_per_epoch: float
    """Not rounded: an epoch may end inside a batch."""
    epoch: Callable[[int], int]
    """The epoch that a step begins in."""
    peak_lr: float
    """The learning rate after warm-up, scaled by the batch size."""
    notes: tuple[str, ...] = ()
    """What was computed from the batch size, and what may surprise, a line each."""
    stages: tuple[tuple[int, Schedules], ...] = ()
    """The first step and the own schedules, which begin at 0, of each stage of a run that has several."""

    def last_layer_is_frozen(self, step: int) -> bool:
        """Whether the prototypes get no update in a step."""
        start, own = next(((s, own) for s, own in reversed(self.stages) if s <= step), (0, self))
        return step - start < own.freeze_last_layer_steps


def build_schedules(config: PretrainConfig, num_samples: int) -> Schedules:
    """The schedules of a run over `num_samples` images.

    Durations in epochs are rounded to steps. The teacher's temperature moves every step: the ends of its warm-up are
    those of the authors' DINO code, the path between them has no stairs. With `teacher.temp_by_epoch` it has them: the
    warm-up is rounded to epochs, and each step has the value of the epoch that it begins in.

    In a run of several stages each has schedules of its own, over its own steps.

    A warm-up that is longer than the run is not squeezed into it: the run is the beginning of a longer one, and `notes`
    says so.

    Raises:
        ConfigError: there are no images, the run has no step, or a warm-up runs into the decay of `wsd`.
    """
    stages = stages_of(config, num_samples)
    if len(stages) > 1:
        return _joined(stages, [build_schedules(stage.config, num_samples) for stage in stages])
    total_steps = num_steps(config, num_samples)
    steps_per_epoch = num_samples / config.batch_size

    def warmup(key: str, epochs: float, *, whole_epochs: bool = False) -> int:
        steps = round((round(epochs) if whole_epochs else epochs) * steps_per_epoch)
        if steps > total_steps:
            notes.append(f"pretrain.{key} = {epochs:g}: is {steps} steps; the run of {total_steps} steps ends before")
        return steps

    def epoch(step: int) -> int:
        return step * config.batch_size // num_samples  # in whole numbers, which no length of run makes inexact

    notes: list[str] = []
    optim, teacher, ibot = config.optim, config.teacher, config.ibot
    lr_warmup = warmup("optim.warmup_epochs", optim.warmup_epochs)
    temp_warmup = warmup("teacher.warmup_temp_epochs", teacher.warmup_temp_epochs, whole_epochs=teacher.temp_by_epoch)

    def temperature(start: float, final: float) -> Schedule:
        if not teacher.temp_by_epoch:
            return linear_warmup_schedule(start, final, temp_warmup)
        # the authors' DINO code looks it up in an array by the epoch
        stairs = linear_warmup_schedule(start, final, round(teacher.warmup_temp_epochs))
        return lambda step: stairs(epoch(step))

    peak_lr = _peak_lr(config, notes)
    frozen = round(optim.freeze_last_layer_epochs * steps_per_epoch)
    if config.head.num_prototypes is not None and frozen >= total_steps:
        notes.append(
            f"pretrain.optim.freeze_last_layer_epochs = {optim.freeze_last_layer_epochs:g}: is {frozen} steps; the "
            f"prototypes never move in the run of {total_steps} steps"
        )
    if teacher.update == "previous_epoch" and epoch(total_steps) == 0:
        notes.append(
            f"pretrain.teacher.update = previous_epoch: the teacher never moves in the run of {total_steps} steps, "
            f"its first epoch has {steps_per_epoch:g}"
        )
    queue = config.loss.queue_size
    if queue is not None and queue > 2 * min(num_samples, total_steps * config.batch_size):
        notes.append(
            f"pretrain.loss.queue_size = {queue}: holds more than the {2 * num_samples} teacher outputs of an epoch or "
            f"the {2 * total_steps * config.batch_size} of the run; images meet themselves or random directions in it"
        )
    return Schedules(
        lr=_lr_schedule(config, peak_lr, total_steps, lr_warmup),
        weight_decay=shaped_schedule(
            optim.weight_decay_schedule, optim.weight_decay, optim.final_weight_decay, total_steps
        ),
        momentum=_momentum_schedule(config, total_steps, notes),
        teacher_temp=temperature(teacher.warmup_temp, teacher.temp),
        patch_temp=temperature(ibot.warmup_temp or teacher.warmup_temp, ibot.temp or teacher.temp),
        total_steps=total_steps,
        freeze_last_layer_steps=frozen,
        steps_per_epoch=steps_per_epoch,
        epoch=epoch,
        peak_lr=peak_lr,
        notes=tuple(notes),
    )


def _joined(stages: Sequence[Stage], schedules: Sequence[Schedules]) -> Schedules:
    """One after the other. Epochs go on, as the order of images does."""
    first = schedules[0]

    def join(name: str) -> Schedule:
        def schedule(step: int) -> float:
            stage = next((stage for stage in stages if step < stage.stop), stages[-1])
            value: float = getattr(schedules[stage.index], name)(step - stage.start)
            return value

        return schedule

    later = [
        f"pretrain.stages[{place}]: {note}"
        for place, own in enumerate(schedules[1:])
        for note in own.notes
        if note not in first.notes
    ]
    return dataclasses.replace(
        first,
        lr=join("lr"),
        weight_decay=join("weight_decay"),
        momentum=join("momentum"),
        teacher_temp=join("teacher_temp"),
        patch_temp=join("patch_temp"),
        total_steps=stages[-1].stop,
        notes=(*first.notes, *later),
        stages=tuple((stage.start, own) for stage, own in zip(stages, schedules, strict=True)),
    )


def _lr_schedule(config: PretrainConfig, peak_lr: float, total_steps: int, warmup_steps: int) -> Schedule:
    optim = config.optim
    if warmup_steps > total_steps:
        return linear_warmup_schedule(0.0, peak_lr, warmup_steps)
    if optim.schedule == "cosine":
        return cosine_schedule(peak_lr, optim.min_lr, total_steps, warmup_steps)
    decay_steps = round(optim.decay_fraction * total_steps)
    if warmup_steps + decay_steps > total_steps:
        raise ConfigError(
            f"pretrain.optim.decay_fraction = {optim.decay_fraction:g}: is {decay_steps} steps, which do not fit "
            f"behind the warm-up of {warmup_steps} into the run of {total_steps}; must be at most "
            f"{math.floor(100 * (1 - warmup_steps / total_steps)) / 100:g}"
        )
    return wsd_schedule(peak_lr, optim.min_lr, total_steps, warmup_steps, decay_steps)


def _peak_lr(config: PretrainConfig, notes: list[str]) -> float:
    """The learning rate after warm-up: scaled with the batch size (Goyal et al., arXiv 1706.02677) or with its square
    root (Krizhevsky, arXiv 1404.5997), or not at all."""
    optim, reference = config.optim, config.optim.lr_reference_batch_size
    if reference is None or reference == config.batch_size:
        return optim.lr
    ratio, power = config.batch_size / reference, ""
    if optim.lr_scaling == "sqrt":
        ratio, power = math.sqrt(ratio), " ^ 0.5"
    peak = optim.lr * ratio
    notes.append(
        f"pretrain.optim.lr = {optim.lr:g}: peak {peak:g} = {optim.lr:g} x ({config.batch_size} / {reference}){power}"
    )
    return peak


def _momentum_schedule(config: PretrainConfig, total_steps: int, notes: list[str]) -> Schedule:
    """The teacher's momentum; every value to the power batch size / reference, if there is a reference.

    Source of the power: Busbridge et al. (arXiv 2307.13813), definition 1.2, the EMA scaling rule.
    """
    teacher, reference = config.teacher, config.teacher.momentum_reference_batch_size
    schedule = shaped_schedule(teacher.momentum_schedule, teacher.momentum, teacher.final_momentum, total_steps)
    if reference is None or reference == config.batch_size:
        return schedule
    power = config.batch_size / reference
    notes.append(
        f"pretrain.teacher.momentum = {teacher.momentum:g}: starts at {teacher.momentum**power:.7g} = "
        f"{teacher.momentum:g} ^ ({config.batch_size} / {reference}), later values to the same power"
    )
    return lambda step: schedule(step) ** power
