"""The training loop. Read this first.

`TrainState` is everything that a run is at one moment, `train_step` makes one update of it, `train` makes all of them.
What is logged at step s describes the weights before update s.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dino_core.backbones import compile_backbone
from dino_core.config import ConfigError, PretrainConfig
from dino_core.crops import CropBatch
from dino_core.distillation import load_frozen_teacher, teacher_digest
from dino_core.distributed import all_reduce_mean_, has_process_group, world_size
from dino_core.networks import CropNetwork, build_student, build_teacher, synchronise_batch_norm
from dino_core.objectives import Objective
from dino_core.optim import build_optimizer, cancel_last_layer_gradients_, clip_gradients_, set_hyperparameters
from dino_core.passes import backward_in_parts, backward_through_both_sides, teach
from dino_core.resolution import carry_over
from dino_core.schedules import Schedules, build_schedules
from dino_core.sharding import assemble, shard, skeleton_of
from dino_core.stages import Stage, stages_of
from dino_core.step_metrics import step_metrics

OnLog = Callable[[int, dict[str, float]], None]
OnCheckpoint = Callable[["TrainState"], None]
Evaluate = Callable[["TrainState"], dict[str, float]]


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or NaN. Raised before weights, optimiser, teacher, centre or step move.

    Only the running statistics of batch norms, which nothing here reads in training, have seen the batch.
    """

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(step, loss)
        self.step = step
        self.loss = loss

    def __str__(self) -> str:
        return f"the loss of step {self.step} is {self.loss}"


@dataclass
class TrainState:
    """A run between two steps. Nothing else is needed to continue it: no global RNG is used after `create`."""

    config: PretrainConfig
    """Of the stage that it is in."""
    schedules: Schedules
    """Of the whole run."""
    student: CropNetwork
    teacher: CropNetwork
    objective: Objective
    optimizer: torch.optim.Optimizer
    parallel_student: nn.Module
    """The student itself or, in a process group with `ddp`, its wrapper that averages gradients and shares its weights.
    """
    device: torch.device
    scaler: torch.amp.GradScaler
    """Of the loss, for fp16; does nothing at other precisions."""
    stages: tuple[Stage, ...]
    """Of the whole run, which mostly has one."""
    num_samples: int
    """Images of an epoch."""
    frozen_teacher: CropNetwork | None = None
    """Where targets come from a checkpoint: its teacher, in evaluation mode."""
    frozen_digest: str | None = None
    """Of its weights."""
    own_backbone: nn.Module | None = None
    """What `create` was given in place of a timm model."""
    step: int = 0
    """The next update."""
    stage: int = 0
    """Which of the stages it is in; at the end of one it is still in that, until `enter_stage`."""
    skeleton: nn.Module | None = None
    """Where the networks are sharded: the teacher's backbone without memory, for `teacher_backbone`."""

    @classmethod
    def create(
        cls,
        config: PretrainConfig,
        num_samples: int,
        device: str | torch.device = "cpu",
        *,
        backbone: nn.Module | None = None,
    ) -> TrainState:
        """The state before step 0 of a run over `num_samples` images; every rank of a process group calls it.

        Weights are drawn on the CPU from `config.seed` alone, so they are the same on every device and rank. torch's
        global RNG is left as it was found.

        Args:
            backbone: a module from images [n, 3, H, W] to features [n, D], used with its weights in place of
                `config.model`; it is copied. All ranks must pass the same.

        Raises:
            ConfigError: the configuration does not fit together, or not to the number of workers.
        """
        device = torch.device(device)
        if config.batch_size % (world_size() * config.accumulate_steps):
            raise ConfigError(
                f"pretrain.batch_size = {config.batch_size}: must be a multiple of cluster.num_workers = "
                f"{world_size()}"
                + (f" times pretrain.accumulate_steps = {config.accumulate_steps}" * (config.accumulate_steps > 1))
            )
        schedules, stages = build_schedules(config, num_samples), stages_of(config, num_samples)
        config = stages[0].config
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            student = build_student(config, backbone)
            objective = Objective(student.head.out_dim, config).to(device)
        is_sharded = config.parallel_strategy == "fsdp" and has_process_group()
        if not is_sharded:  # else it goes there in parts
            student.to(device)
        student = synchronise_batch_norm(student, config, device).train()
        teacher = build_teacher(student, config)
        skeleton = None
        if is_sharded:
            skeleton = skeleton_of(teacher.backbone)
            shard(student, teacher, config, device)
        if config.model.compile:
            compile_backbone(student.backbone)
            compile_backbone(teacher.backbone)
        parallel: nn.Module = student
        if has_process_group() and not is_sharded:
            parallel = DistributedDataParallel(student, gradient_as_bucket_view=True)
        optimizer = build_optimizer(config.optim, student)
        scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        frozen, digest = None, None
        if config.teacher.checkpoint is not None:
            frozen = load_frozen_teacher(config, student).to(device)
            digest = teacher_digest(config.teacher.checkpoint)
        return cls(
            *(config, schedules, student, teacher, objective, optimizer, parallel, device, scaler),
            *(stages, num_samples, frozen, digest, backbone),
            skeleton=skeleton,
        )

    @property
    def target_network(self) -> CropNetwork:
        """What gives the targets: the frozen teacher where there is one."""
        return self.teacher if self.frozen_teacher is None else self.frozen_teacher

    @property
    def is_sharded(self) -> bool:
        """Whether this rank holds a part of every weight (`parallel_strategy`)."""
        return self.skeleton is not None

    def teacher_backbone(self) -> nn.Module:
        """The teacher's backbone to look at, whole on every rank; every rank calls it. A copy where it is sharded."""
        return self.teacher.backbone if self.skeleton is None else assemble(self.skeleton, self.teacher.backbone)

    def enter_stage(self, index: int) -> None:
        """Build networks and optimiser for another stage of the run, in place; every rank of a process group calls it.

        Student, teacher, centres and queue go on, with position embeddings interpolated for the stage's crops. The
        optimiser begins anew, as DINOv2's high-resolution phase does, which is a training of its own from the weights:
        moments of interpolated embeddings would be averages of no gradients, and the warm-up of the stage's learning
        rate is what new moments need.
        """
        if index == self.stage:
            return
        self.optimizer.state.clear()  # its memory is needed for what is built
        self.optimizer.zero_grad(set_to_none=True)
        new = TrainState.create(self.stages[index].config, self.num_samples, self.device, backbone=self.own_backbone)
        carry_over(self.student, new.student)
        carry_over(self.teacher, new.teacher)
        new.objective.load_state_dict(self.objective.state_dict())
        if self.scaler.is_enabled():
            new.scaler.load_state_dict(self.scaler.state_dict())
        self.config, self.student, self.teacher, self.objective = new.config, new.student, new.teacher, new.objective
        self.frozen_teacher, self.skeleton = new.frozen_teacher, new.skeleton
        self.optimizer, self.parallel_student, self.scaler = new.optimizer, new.parallel_student, new.scaler
        self.stage = index

    def autocast(self) -> torch.autocast:
        """What forward passes run under."""
        dtype = torch.float16 if self.config.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.config.precision != "fp32")


def train_step(state: TrainState, crops: CropBatch, *, diagnose: bool = True) -> dict[str, Tensor]:
    """One update from this rank's share of the global batch; `state.step` moves on by one.

    Order (DINO, arXiv 2104.14294, algorithm 1, and the authors' code): hyper-parameters of this step, forward of
    teacher and student, loss, backward, clip, keep the prototypes still at first, optimiser, teacher, centre.

    Args:
        diagnose: compute the metrics that only a log needs; nothing else depends on it.

    Returns:
        Metrics of all ranks together, before the update, as scalars on the device: train/loss, train/grad_norm (before
        clipping) and, with `diagnose`, those of `step_metrics`.

    Raises:
        NonFiniteLossError: before anything moved.
        ValueError: the crops are not a share of the global batch.
    """
    config, schedules, step = state.config, state.schedules, state.step
    groups = _crop_groups(state, crops)
    state.optimizer.zero_grad(set_to_none=True)
    if config.teacher.stop_gradient:
        taught = teach(state, groups[0], crops.num_images)
        losses = backward_in_parts(state, groups, taught.aims, crops.num_images)
    else:
        losses, taught = backward_through_both_sides(state, groups, crops.num_images)
    mean_loss = all_reduce_mean_(losses.total.clone())
    if state.scaler.is_enabled():  # it cannot be asked twice to unscale, so the loss is looked at before
        _stop_unless_finite(state, mean_loss)

    state.scaler.unscale_(state.optimizer)
    optim, heads = config.optim, (state.student.head, state.student.patch_head)
    frozen = schedules.last_layer_is_frozen(step)
    cancelled = frozen and optim.freeze_last_layer_by == "gradient"
    if cancelled and not optim.clip_before_freeze:
        cancel_last_layer_gradients_(*heads)
    grad_norm = clip_gradients_(state.student, optim.clip_grad, optim.clip_mode)
    if not state.scaler.is_enabled():  # the one time that the host waits for the device, as late as can be
        _stop_unless_finite(state, mean_loss)
    if cancelled:
        cancel_last_layer_gradients_(*heads)
    metrics = {"train/loss": mean_loss, "train/grad_norm": grad_norm}
    if diagnose:
        metrics |= step_metrics(state, mean_loss, losses, taught.features, taught.aims)

    set_hyperparameters(
        state.optimizer,
        schedules.lr(step),
        schedules.weight_decay(step),
        freeze_last_layer=frozen and optim.freeze_last_layer_by == "lr",
    )
    move_teacher = partial(
        state.objective.update_teacher,
        state.student,
        state.teacher,
        taught.outputs,
        momentum=schedules.momentum(step),
        epoch_ended=schedules.epoch(step + 1) > schedules.epoch(step),
        patches=taught.patch_sum,
    )
    if state.objective.updates_before_step:
        move_teacher()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if not state.objective.updates_before_step:
        move_teacher()
    state.step += 1
    return metrics


def _stop_unless_finite(state: TrainState, loss: Tensor) -> None:
    """All ranks see the same mean loss, so all stop or none."""
    if not torch.isfinite(loss):
        state.optimizer.zero_grad(set_to_none=True)
        raise NonFiniteLossError(state.step, float(loss))


def _crop_groups(state: TrainState, crops: CropBatch) -> list[Tensor]:
    """The crops by size, after checking that their numbers are what the configuration says."""
    share = state.config.batch_size // world_size()
    if crops.num_images != share:
        raise ValueError(f"crops of {crops.num_images} images: must be {share}, this rank's share of the global batch")
    groups = [crops.global_crops] if crops.local_crops is None else [crops.global_crops, crops.local_crops]
    found = [group.shape[0] for group in groups]
    num_local = state.config.crops.num_local_crops
    expected = [2 * share, num_local * share] if num_local else [2 * share]
    if found != expected:
        raise ValueError(f"{found} crops (global, local): must be {expected}")
    return groups


def train(
    state: TrainState,
    batches: Iterable[CropBatch],
    *,
    on_log: OnLog,
    on_checkpoint: OnCheckpoint,
    evaluate: Evaluate | None = None,
    stop_step: int | None = None,
) -> None:
    """Train from `state.step` to the end of the run; `batches` begins with the batch of `state.step`.

    With `stop_step` it ends before that step instead, which changes nothing in those before it: schedules are those of
    the whole run. What follows speaks of that end.

    Calls, all with the state between two updates:
      `on_log(step, metrics)` every `log_every_steps` and for the last step, besides for every evaluation;
      `evaluate(state)` before step 0, every `eval.every_steps` and after the last step (logged at the step to come);
      `on_checkpoint(state)` every `checkpoint_every_steps`, after each stage, and at the end, before the last
        evaluation.

    A stage is entered before anything else is done with the state at its first step, whose batch has its crops.

    A state that is already at the end is checkpointed and evaluated. Whatever happens, `batches` is closed if it is an
    iterator that can be.

    Raises:
        NonFiniteLossError: see `train_step`.
        RuntimeError: `batches` ended too early.
        ValueError: `stop_step` lies outside of the run.
    """
    config, total = state.config, state.schedules.total_steps
    if stop_step is not None:
        if not 1 <= stop_step <= total:
            raise ValueError(f"stop_step = {stop_step}: must be >= 1 and at most the {total} steps of the run")
        total = stop_step
    iterator = iter(batches)
    clock = _Clock(config.batch_size)
    try:
        while state.step < total:
            if state.step == state.stages[state.stage].stop:
                with clock.paused():
                    state.enter_stage(state.stage + 1)
            if evaluate is not None and _is_due(state.step, config.eval.every_steps, at_start=True):
                with clock.paused():
                    on_log(state.step, evaluate(state))
            crops = clock.wait_for(iterator, state.step, total)
            step = state.step
            log_now = _is_due(step, config.log_every_steps, at_start=True) or step + 1 == total
            metrics = train_step(state, crops, diagnose=log_now)
            clock.num_steps += 1
            if log_now:
                on_log(step, _to_floats(metrics) | _schedule_metrics(state, step) | clock.read())
            ended = state.step == state.stages[state.stage].stop
            if state.step < total and (ended or _is_due(state.step, config.checkpoint_every_steps)):
                on_checkpoint(state)
    finally:
        close = getattr(iterator, "close", None)  # generators and data loaders' iterators have it, others need none
        if close is not None:
            close()
    on_checkpoint(state)
    if evaluate is not None:
        on_log(state.step, evaluate(state))


def _is_due(step: int, every: int | None, *, at_start: bool = False) -> bool:
    return at_start if step == 0 else every is not None and step % every == 0


def _to_floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    """All values in one transfer from the device."""
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))


def _schedule_metrics(state: TrainState, step: int) -> dict[str, float]:
    schedules = state.schedules
    patches = {"train/patch_temp": schedules.patch_temp(step)} if state.config.ibot.weight else {}
    stage = {"train/stage": state.stage + 1} if len(state.stages) > 1 else {}
    return {
        "train/lr": schedules.lr(step),
        "train/weight_decay": schedules.weight_decay(step),
        "train/teacher_momentum": schedules.momentum(step),
        "train/teacher_temp": schedules.teacher_temp(step),
        "train/epoch": step / schedules.steps_per_epoch,
        **patches,
        **stage,
    }


class _Clock:
    """Speed since the last reading, without the time of evaluations."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._restart()

    def _restart(self) -> None:
        self.num_steps = 0
        self._waited_s = 0.0
        self._paused_s = 0.0
        self._started = time.perf_counter()

    def wait_for(self, batches: Iterator[CropBatch], step: int, total: int) -> CropBatch:
        began = time.perf_counter()
        crops = next(batches, None)
        self._waited_s += time.perf_counter() - began
        if crops is None:
            raise RuntimeError(f"the batches ended before step {step} of {total}")
        return crops

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Images per second over all workers, and the share of the time in which the model waited for data."""
        elapsed = max(time.perf_counter() - self._started - self._paused_s, 1e-9)
        speed, share = self.num_steps * self._batch_size / elapsed, self._waited_s / elapsed
        self._restart()
        return {"train/images_per_s": speed, "train/data_wait_share": min(share, 1.0)}


class _CallableModule(ModuleType):
    """So that `dino_core.train(state, ...)` works although `dino_core.train` is this module."""

    def __call__(self, state: TrainState, batches: Iterable[CropBatch], **callables: Any) -> None:
        train(state, batches, **callables)


sys.modules[__name__].__class__ = _CallableModule
