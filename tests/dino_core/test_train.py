from __future__ import annotations

import dataclasses
import math
import pickle
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dino_core
from dino_core.backbones import build_backbone
from dino_core.checkpoint import load_checkpoint, save_checkpoint
from dino_core.config import (
    ConfigError,
    CropsConfig,
    EvalConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    TeacherConfig,
)
from dino_core.crops import CropBatch
from dino_core.train import NonFiniteLossError, TrainState, train, train_step

NUM_SAMPLES = 20
GOLDEN = Path(__file__).with_name("golden_losses.txt")

CONFIG = PretrainConfig(
    seed=3,
    steps=10,
    epochs=None,
    batch_size=4,
    model=ModelConfig(backbone="vit_tiny_patch16_224", patch_size=4, embed_dim=16, depth=3, num_heads=2, drop_path=0.2),
    head=HeadConfig(num_prototypes=24, hidden_dim=32, bottleneck_dim=8),
    teacher=TeacherConfig(warmup_temp=0.04, temp=0.07, warmup_temp_epochs=1, momentum=0.9),
    crops=CropsConfig(num_local_crops=3, global_size=16, local_size=8),
    optim=OptimConfig(lr=0.01, lr_reference_batch_size=None, warmup_epochs=0.4, freeze_last_layer_epochs=0.6),
    log_every_steps=4,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def changed(**changes: Any) -> PretrainConfig:
    return dataclasses.replace(CONFIG, **changes)


def noise(shape: Sequence[int], *seed: int) -> Tensor:
    """Uniform numbers of standard deviation 1 from numpy's bit stream: the same under every version of torch."""
    draws = np.random.Generator(np.random.PCG64(seed)).random(tuple(shape))
    return torch.from_numpy((draws - 0.5) * math.sqrt(12)).float()


def batch(step: int, config: PretrainConfig = CONFIG) -> CropBatch:
    def crops(num: int, size: int) -> Tensor:
        return noise((num * config.batch_size, 3, size, size), step, size)

    sizes, num_local = config.crops, config.crops.num_local_crops
    local = crops(num_local, sizes.local_size) if num_local else None
    return CropBatch(crops(2, sizes.global_size), local, config.batch_size)


def batches(config: PretrainConfig = CONFIG, start: int = 0, stop: int = 1000) -> Iterator[CropBatch]:
    return (batch(step, config) for step in range(start, stop))


def fill(state: TrainState) -> None:
    """Neither torch's RNG nor timm's initialisation decides the golden curve."""
    with torch.no_grad():
        for index, (name, parameter) in enumerate(state.student.named_parameters()):
            values = noise(parameter.shape, index)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.1 * values if name.endswith("weight") else 0.02 * values)
            elif not name.endswith("weight_g"):
                parameter.copy_(values * (parameter[0].numel() ** -0.5 if parameter.shape[0] > 1 else 0.3))
    state.teacher.load_state_dict(state.student.state_dict())


def snapshot(state: TrainState) -> list[Tensor]:
    moments = [v for entry in state.optimizer.state.values() for v in entry.values()]
    tensors = [*state.student.state_dict().values(), *state.teacher.state_dict().values(), state.objective.center]
    return [tensor.clone() for tensor in (*tensors, *moments)]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Recorder:
    """What `train` called, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.metrics: dict[int, dict[str, float]] = {}

    def on_log(self, step: int, metrics: dict[str, float]) -> None:
        self.calls.append(("eval" if "eval/x" in metrics else "log", step))
        self.metrics.setdefault(step, {}).update(metrics)

    def on_checkpoint(self, state: TrainState) -> None:
        self.calls.append(("checkpoint", state.step))

    def evaluate(self, state: TrainState) -> dict[str, float]:
        return {"eval/x": float(state.step)}

    def run(self, state: TrainState, stream: Any, stop_step: int | None = None) -> None:
        called = {"on_log": self.on_log, "on_checkpoint": self.on_checkpoint, "evaluate": self.evaluate}
        train(state, stream, **called, stop_step=stop_step)


# ------------------------------------------------------------------------------------------------------------- create


def test_a_seed_gives_the_same_weights_and_leaves_the_global_rng_alone():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = TrainState.create(CONFIG, NUM_SAMPLES)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    assert equal(snapshot(first), snapshot(TrainState.create(CONFIG, NUM_SAMPLES)))
    assert not equal(snapshot(first), snapshot(TrainState.create(changed(seed=4), NUM_SAMPLES)))


def test_the_teacher_starts_as_the_student_without_gradients():
    state = TrainState.create(CONFIG, NUM_SAMPLES)
    student, teacher = state.student.state_dict(), state.teacher.state_dict()
    assert list(student) == list(teacher)
    assert equal(list(student.values()), list(teacher.values()))
    assert not any(p.requires_grad for p in state.teacher.parameters())
    assert {p.data_ptr() for p in state.student.parameters()}.isdisjoint(
        p.data_ptr() for p in state.teacher.parameters()
    )
    assert state.student.training
    assert state.teacher.training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"crops": CropsConfig(global_size=16, local_size=10)},
            "crops.local_size = 10: must be a multiple of the patch",
        ),
        (
            {"crops": CropsConfig(global_size=18, local_size=8)},
            "crops.global_size = 18: must be a multiple of the patch",
        ),
        ({"model": ModelConfig(backbone="vit_tinny_patch16_224")}, "model.backbone = vit_tinny_patch16_224: "),
    ],
)
def test_a_configuration_that_cannot_run_is_an_error_at_once(changes, message):
    with pytest.raises(ConfigError, match=f"pretrain.{message}"):
        TrainState.create(changed(**changes), NUM_SAMPLES)


# --------------------------------------------------------------------------------------------------------------- step


def run_losses(state: TrainState) -> list[float]:
    return [train_step(state, crops)["train/loss"].item() for crops in batches(state.config, stop=10)]


def test_ten_losses_are_the_golden_ones():
    """After a change that is meant to change numbers: put the printed losses into the file."""
    state = TrainState.create(CONFIG, NUM_SAMPLES)
    fill(state)
    losses = run_losses(state)
    print("\n".join(f"{loss:.7f}" for loss in losses))
    assert losses == pytest.approx([float(line) for line in GOLDEN.read_text().split()], rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_twice_the_same_is_bitwise_the_same(precision):
    states = []
    for noise in range(2):
        state = TrainState.create(changed(precision=precision), NUM_SAMPLES)
        torch.manual_seed(noise)  # must not matter
        states.append((run_losses(state), snapshot(state)))
    assert states[0][0] == states[1][0]
    assert equal(states[0][1], states[1][1])


def test_bf16_is_close_to_fp32_and_keeps_fp32_weights():
    losses = {}
    for precision in ("fp32", "bf16"):
        state = TrainState.create(changed(precision=precision), NUM_SAMPLES)
        losses[precision] = run_losses(state)
        assert {p.dtype for p in [*state.student.parameters(), *state.teacher.parameters()]} == {torch.float32}
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"][:3] == pytest.approx(losses["fp32"][:3], rel=0.1)


def set_scale(state: TrainState, scale: float) -> None:
    state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": scale})


def test_fp16_scales_the_loss_and_skips_steps_that_overflow():
    state = TrainState.create(changed(precision="fp16"), NUM_SAMPLES)
    before = [parameter.clone() for parameter in state.student.parameters()]
    set_scale(state, 2.0**60)
    train_step(state, batch(0))
    assert equal(before, list(state.student.parameters())), "the gradient overflowed"
    set_scale(state, 2.0**4)
    metrics = train_step(state, batch(1))
    assert metrics["train/loss_scale"] == 2**4
    assert metrics["train/grad_norm"].isfinite()
    assert not equal(before, list(state.student.parameters()))
    fp32 = TrainState.create(CONFIG, NUM_SAMPLES)
    fp32.step = 1
    expected = train_step(fp32, batch(1))
    torch.testing.assert_close(metrics["train/grad_norm"], expected["train/grad_norm"], rtol=0.05, atol=0)


def test_in_fp16_too_nothing_moves_where_the_loss_is_not_finite():
    state = TrainState.create(changed(precision="fp16"), NUM_SAMPLES)
    bad = batch(0)
    bad.global_crops[0, 0, 0, 0] = math.nan
    before = snapshot(state)
    with pytest.raises(NonFiniteLossError):
        train_step(state, bad)
    assert equal(before, snapshot(state))
    assert train_step(state, batch(0))["train/loss"].isfinite(), "another batch can follow"


def test_the_loss_scale_is_a_part_of_the_checkpoint(tmp_path):
    state, other = (TrainState.create(changed(precision="fp16"), NUM_SAMPLES) for _ in range(2))
    set_scale(state, 2.0**7)
    train_step(state, batch(0))
    load_checkpoint(other, save_checkpoint(state, tmp_path))
    assert other.scaler.state_dict() == state.scaler.state_dict()
    assert other.scaler.get_scale() != TrainState.create(changed(precision="fp16"), NUM_SAMPLES).scaler.get_scale()


def test_prototypes_stay_until_they_thaw():
    state = TrainState.create(CONFIG, NUM_SAMPLES)
    assert state.schedules.freeze_last_layer_steps == 3
    start = state.student.head.last_layer.weight_v.detach().clone()
    moved = []
    for crops in batches(stop=5):
        train_step(state, crops)
        moved.append(not torch.equal(state.student.head.last_layer.weight_v, start))
    assert moved == [False, False, False, True, True]


def test_metrics_describe_the_step_before_its_update():
    state = TrainState.create(CONFIG, NUM_SAMPLES)
    metrics = train_step(state, batch(0))
    assert state.step == 1
    assert set(metrics) == {
        "train/loss",
        "train/teacher_entropy",
        "train/kl",
        "train/grad_norm",
        "train/feature_std",
        "train/feature_rank",
        "train/target_std",
        "train/prototype_usage",
        "train/loss_below_uniform",
        "train/center_norm",
    }
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    torch.testing.assert_close(metrics["train/loss"], metrics["train/teacher_entropy"] + metrics["train/kl"])
    assert 0 < metrics["train/feature_std"] < 1
    norm = torch.stack([p.grad.norm() for p in state.student.parameters() if p.grad is not None]).norm()
    assert metrics["train/grad_norm"] >= norm  # which is clipped


def test_the_first_step_uses_a_centre_of_0_and_the_second_that_of_the_first():
    state = TrainState.create(CONFIG, NUM_SAMPLES)
    with torch.no_grad():
        logits = state.teacher([batch(0).global_crops]).crops
    train_step(state, batch(0))
    torch.testing.assert_close(state.objective.center, 0.1 * logits.mean(dim=0))


@pytest.mark.parametrize("num_local", [0, 1])
def test_few_local_crops(num_local):
    config = changed(crops=dataclasses.replace(CONFIG.crops, num_local_crops=num_local))
    state = TrainState.create(config, NUM_SAMPLES)
    assert train_step(state, batch(0, config))["train/loss"].isfinite()


class Pixels(nn.Module):
    """A network of someone's own: two layers on the mean of 4x4 patches, so that any size of crop will do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 12, 4, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def tied() -> Pixels:
    module = Pixels()
    module.again = module.layers[0].weight
    return module


def masked() -> Pixels:
    module = Pixels()
    module.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    return module


def idle() -> Pixels:
    module = Pixels()
    module.idle = nn.Linear(2, 2)
    return module


def test_a_module_of_ones_own_is_a_backbone():
    module = Pixels()
    state = TrainState.create(CONFIG, NUM_SAMPLES, backbone=module)
    before = [parameter.clone() for parameter in module.parameters()]
    assert equal(before, list(state.student.backbone.parameters())), "its weights are where training starts"
    for step in range(3):
        assert train_step(state, batch(step))["train/loss"].isfinite()
    assert equal(before, list(module.parameters())), "it was copied"
    assert not equal(before, list(state.student.backbone.parameters()))


def test_a_timm_model_of_ones_own_keeps_its_stochastic_depth():
    module = build_backbone(CONFIG.model, 16, drop_path=0.0)
    dropping = build_backbone(CONFIG.model, 16, drop_path=0.5)
    dropping.load_state_dict(module.state_dict())
    losses = [
        train_step(TrainState.create(CONFIG, NUM_SAMPLES, backbone=own), batch(0))["train/loss"]
        for own in (module, module, dropping)
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Flatten(), "must give features of one width, not 768 for crops of 16 pixels and 192 for 8"),
        (nn.Conv2d(3, 4, 3), r"Conv2d: must turn images \[2, 3, 16, 16\] into features \[2, D\]"),
        (tied(), "Pixels: has weights that share memory"),
        (masked(), "Pixels: must be finite, mask is not"),
        (idle(), r"Pixels: does not use its trainable idle\.weight, idle\.bias"),
    ],
)
def test_a_module_that_gives_no_features_is_refused(module, reason):
    with pytest.raises(ConfigError, match=reason):
        TrainState.create(CONFIG, NUM_SAMPLES, backbone=module)


def test_a_convnet_with_batch_norm_trains():
    config = changed(
        model=ModelConfig(backbone="resnet18", drop_path=0.0),
        head=HeadConfig(num_prototypes=24, hidden_dim=32, bottleneck_dim=8, batch_norm=True, norm_last_layer=False),
        optim=OptimConfig(name="lars", lr=0.3, warmup_epochs=0),
        crops=dataclasses.replace(CONFIG.crops, global_size=32, local_size=32),
    )
    state = TrainState.create(config, NUM_SAMPLES)
    statistics = state.teacher.backbone.bn1.running_mean.clone()
    for step in range(2):
        assert train_step(state, batch(step, config))["train/loss"].isfinite()
    # the teacher normalises by its own batches: its statistics are not an average of the student's
    assert not torch.equal(state.teacher.backbone.bn1.running_mean, statistics)
    assert not torch.equal(state.teacher.backbone.bn1.running_mean, state.student.backbone.bn1.running_mean)


@pytest.mark.parametrize(
    ("crops", "message"),
    [
        (CropBatch(torch.zeros(4, 3, 16, 16), torch.zeros(6, 3, 8, 8), 2), "crops of 2 images: must be 4"),
        (CropBatch(torch.zeros(8, 3, 16, 16), None, 4), r"\[8\] crops \(global, local\): must be \[8, 12\]"),
        (CropBatch(torch.zeros(8, 3, 16, 16), torch.zeros(8, 3, 8, 8), 4), r"\[8, 8\] crops"),
    ],
)
def test_crops_that_are_not_the_batch_are_errors(crops, message):
    with pytest.raises(ValueError, match=message):
        train_step(TrainState.create(CONFIG, NUM_SAMPLES), crops)


def test_a_loss_that_is_not_finite_stops_before_anything_moves():
    state = TrainState.create(CONFIG, NUM_SAMPLES)
    for step in range(2):
        train_step(state, batch(step))
    before = snapshot(state)
    crops = batch(2)
    crops.global_crops[0, 0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteLossError, match="the loss of step 2 is nan") as error:
        train_step(state, crops)
    assert state.step == error.value.step == 2
    assert equal(snapshot(state), before)
    copy = pickle.loads(pickle.dumps(error.value))  # noqa: S301
    assert (copy.step, str(copy)) == (2, str(error.value))
    assert train_step(state, batch(2))["train/loss"].isfinite()


# --------------------------------------------------------------------------------------------------------------- loop


def test_what_is_called_when():
    config = changed(checkpoint_every_steps=5, eval=EvalConfig(every_steps=3))
    recorder = Recorder()
    recorder.run(TrainState.create(config, NUM_SAMPLES), batches())
    assert recorder.calls == [
        ("eval", 0),
        ("log", 0),
        ("eval", 3),
        ("log", 4),
        ("checkpoint", 5),
        ("eval", 6),
        ("log", 8),
        ("eval", 9),
        ("log", 9),
        ("checkpoint", 10),
        ("eval", 10),
    ]


def test_by_default_it_evaluates_and_saves_at_the_ends_only():
    recorder = Recorder()
    recorder.run(TrainState.create(CONFIG, NUM_SAMPLES), batches())
    assert [call for call in recorder.calls if call[0] != "log"] == [("eval", 0), ("checkpoint", 10), ("eval", 10)]


def test_a_finished_run_is_saved_and_evaluated_without_data():
    state = TrainState.create(CONFIG, NUM_SAMPLES)
    state.step = 10
    recorder = Recorder()
    recorder.run(state, iter(()))
    assert recorder.calls == [("checkpoint", 10), ("eval", 10)]


def test_no_evaluation_is_needed():
    recorder = Recorder()
    state = TrainState.create(CONFIG, NUM_SAMPLES)
    dino_core.train(state, batches(), on_log=recorder.on_log, on_checkpoint=recorder.on_checkpoint)
    assert [call for call in recorder.calls if call[0] == "eval"] == []
    assert state.step == 10


def test_logged_metrics():
    recorder = Recorder()
    recorder.run(TrainState.create(CONFIG, NUM_SAMPLES), batches())
    state = TrainState.create(CONFIG, NUM_SAMPLES)
    losses = run_losses(state)
    for step in (0, 4, 8, 9):
        metrics = recorder.metrics[step]
        assert metrics["train/loss"] == losses[step]
        assert metrics["train/epoch"] == step * 4 / 20
        assert metrics["train/lr"] == state.schedules.lr(step)
        assert metrics["train/weight_decay"] == state.schedules.weight_decay(step)
        assert metrics["train/teacher_momentum"] == state.schedules.momentum(step)
        assert metrics["train/teacher_temp"] == state.schedules.teacher_temp(step)
        assert metrics["train/images_per_s"] > 0
        assert 0 <= metrics["train/data_wait_share"] <= 1
        assert set(metrics) >= {"train/teacher_entropy", "train/kl", "train/grad_norm", "train/feature_std"}
        assert all(type(value) is float for value in metrics.values())


def test_speed_counts_waiting_for_data_but_not_evaluation():
    def slow() -> Iterator[CropBatch]:
        for crops in batches():
            time.sleep(0.05)
            yield crops

    recorder = Recorder()

    def evaluate(state: TrainState) -> dict[str, float]:
        time.sleep(0.4)
        return {"eval/x": 0.0}

    config = changed(log_every_steps=100, eval=EvalConfig(every_steps=2))
    began = time.perf_counter()
    train(
        TrainState.create(config, NUM_SAMPLES),
        slow(),
        on_log=recorder.on_log,
        on_checkpoint=recorder.on_checkpoint,
        evaluate=evaluate,
    )
    elapsed = time.perf_counter() - began
    last = recorder.metrics[9]
    seconds = 9 * 4 / last["train/images_per_s"]
    assert 9 * 0.05 < seconds < elapsed - 4 * 0.4
    assert last["train/data_wait_share"] * seconds > 9 * 0.05


def test_resuming_continues_where_it_stopped():
    whole = TrainState.create(CONFIG, NUM_SAMPLES)
    everything = Recorder()
    everything.run(whole, batches())
    state = TrainState.create(CONFIG, NUM_SAMPLES)
    for step in range(4):
        train_step(state, batch(step))
    recorder = Recorder()
    recorder.run(state, batches(start=4))
    assert recorder.calls == [("log", 4), ("log", 8), ("log", 9), ("checkpoint", 10), ("eval", 10)]
    assert recorder.metrics[9]["train/loss"] == everything.metrics[9]["train/loss"]
    assert equal(snapshot(state), snapshot(whole))


class Stream:
    """An iterator that knows whether it was closed."""

    def __init__(self, stop: int) -> None:
        self.crops = batches(stop=stop)
        self.closed = False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> CropBatch:
        return next(self.crops)

    def close(self) -> None:
        self.closed = True


def test_a_run_in_two_parts_is_bitwise_the_whole_one():
    whole, parts = (TrainState.create(CONFIG, NUM_SAMPLES) for _ in range(2))
    Recorder().run(whole, batches())
    recorder = Recorder()
    for start, stop in ((0, 6), (6, 10)):
        recorder.run(parts, batches(start=start, stop=stop), stop_step=stop)
        assert recorder.calls[-3:] == [("log", stop - 1), ("checkpoint", stop), ("eval", stop)]
    assert equal(snapshot(parts), snapshot(whole))
    for stop in (0, 11):
        with pytest.raises(ValueError, match=f"stop_step = {stop}: must be >= 1 and at most the 10 steps of the run"):
            Recorder().run(whole, batches(), stop_step=stop)


def test_with_wsd_the_first_steps_of_a_run_do_not_depend_on_its_length():
    optim = dataclasses.replace(CONFIG.optim, schedule="wsd", decay_fraction=0.25, weight_decay_schedule="constant")
    teacher = dataclasses.replace(CONFIG.teacher, momentum_schedule="constant")
    states = {}
    for steps in (8, 12, 16):  # they decay from steps 6, 9 and 12 on
        config = changed(steps=steps, optim=optim, teacher=teacher)
        states[steps] = TrainState.create(config, NUM_SAMPLES)
        for step in range(7):  # the first step of a decay still has the whole rate
            train_step(states[steps], batch(step, config))
    assert equal(snapshot(states[8]), snapshot(states[16]))
    assert equal(snapshot(states[12]), snapshot(states[16]))
    for steps in (8, 16):
        train_step(states[steps], batch(7, states[steps].config))
    assert not equal(snapshot(states[8]), snapshot(states[16])), "one of the two is decaying by now"
    cosine = [TrainState.create(changed(steps=steps), NUM_SAMPLES) for steps in (8, 16)]
    for step in range(7):
        for state in cosine:
            train_step(state, batch(step))
    assert not equal(snapshot(cosine[0]), snapshot(cosine[1])), "a cosine does depend on it"


def test_batches_that_end_too_early_are_an_error_and_closed():
    stream = Stream(3)
    with pytest.raises(RuntimeError, match="the batches ended before step 3 of 10"):
        Recorder().run(TrainState.create(CONFIG, NUM_SAMPLES), stream)
    assert stream.closed


def test_batches_are_closed_at_the_end_and_not_read_ahead():
    stream = Stream(11)
    Recorder().run(TrainState.create(CONFIG, NUM_SAMPLES), stream)
    assert stream.closed
    assert len(list(stream.crops)) == 1


def test_a_list_of_batches_will_do():
    recorder = Recorder()
    recorder.run(TrainState.create(CONFIG, NUM_SAMPLES), list(batches(stop=10)))
    assert recorder.calls[-1] == ("eval", 10)
