"""One suite over many points of the component space: what must hold whatever the objective."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from dino_core.checkpoint import load_checkpoint, save_checkpoint
from dino_core.config import ConfigError, PretrainConfig
from dino_core.methods import METHODS, with_method
from dino_core.objectives import Objective
from dino_core.train import TrainState, train_step
from tests.dino_core.points import BASE, NUM_SAMPLES, POINTS, changed, share

T, S, B = 2, 4, 6


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=POINTS, ids=lambda name: name.replace(" ", "_"))
def config(request: pytest.FixtureRequest) -> PretrainConfig:
    return POINTS[request.param]


def objective_of(config: PretrainConfig) -> Objective:
    torch.manual_seed(0)
    out_dim = config.head.num_prototypes or config.head.bottleneck_dim
    objective = Objective(out_dim, config)
    if "center" in objective.state_dict():
        objective.center.normal_(std=0.1)
    return objective


def outputs(config: PretrainConfig, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Student's [S, B, K] and teacher's [T, B, K]."""
    width = config.head.num_prototypes or config.head.bottleneck_dim
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(n, B, width, generator=generator) for n in (S, T))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def tensors(state: TrainState) -> list[Tensor]:
    entries = state.optimizer.state_dict()["state"]
    moments = [value for parameter in sorted(entries) for _, value in sorted(entries[parameter].items())]
    modules = (state.student, state.teacher, state.objective)
    return [t.clone() for t in (*(t for module in modules for t in module.state_dict().values()), *moments)]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ------------------------------------------------------------------------------------------------------- the objective


def test_forward_moves_no_state(config: PretrainConfig) -> None:
    objective = objective_of(config)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    first = objective(*outputs(config), 0.07)
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.state_dict().items())
    assert torch.equal(objective(*outputs(config), 0.07).loss, first.loss)


def test_gradients_reach_the_teacher_only_where_both_sides_are_one(config: PretrainConfig) -> None:
    student, teacher = outputs(config)
    teacher.requires_grad_()
    objective_of(config)(student, teacher, 0.07).loss.backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert (teacher.grad is None) == config.teacher.stop_gradient


def test_the_order_of_the_images_does_not_matter(config: PretrainConfig) -> None:
    objective = objective_of(config)
    student, teacher = outputs(config)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(2))
    loss, targets = objective(student, teacher, 0.07)
    shuffled_loss, shuffled = objective(student[:, order], teacher[:, order], 0.07)
    torch.testing.assert_close(shuffled_loss, loss)
    torch.testing.assert_close(shuffled.values, targets.values[:, order])


def test_the_loss_is_the_mean_of_its_parts(config: PretrainConfig) -> None:
    objective = objective_of(config)
    student, teacher = outputs(config)
    loss, targets = objective(student, teacher, 0.07)
    parts = [objective.loss(student[:, first : first + 2], targets, first) for first in range(0, B, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(), loss)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_finite_in_bf16_and_for_large_outputs(config: PretrainConfig, scale: float) -> None:
    student, teacher = outputs(config, torch.bfloat16)
    loss, targets = objective_of(config)(student * scale, teacher * scale, 0.04)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(tensor.isfinite().all() for tensor in (loss, targets.values, student.grad))


@pytest.mark.parametrize(
    ("student", "teacher"), [((1, 3), (1, 3)), ((2, 0), (2, 0)), ((4, 3), (2, 2)), ((1, 3), (2, 3))]
)
def test_degenerate_input_is_refused(
    config: PretrainConfig, student: tuple[int, int], teacher: tuple[int, int]
) -> None:
    width = config.head.num_prototypes or config.head.bottleneck_dim
    with pytest.raises(ValueError, match=r"must be|needs"):
        objective_of(config)(torch.randn(*student, width), torch.randn(*teacher, width), 0.04)


# ------------------------------------------------------------------------------------------------------------ training


def test_bitwise_equal_twice_and_across_a_checkpoint(config: PretrainConfig, tmp_path: Path) -> None:
    unbroken, broken = (TrainState.create(config, NUM_SAMPLES) for _ in range(2))
    for step in range(4):
        metrics = train_step(unbroken, share(config, step))
        again = train_step(broken, share(config, step))
        assert all(torch.equal(value, again[name]) for name, value in metrics.items())
        if step == 1:
            path = save_checkpoint(broken, tmp_path)
            broken = TrainState.create(dataclasses.replace(config, seed=99), NUM_SAMPLES)
            broken = dataclasses.replace(broken, config=config)
            load_checkpoint(broken, path)
    assert equal(tensors(unbroken), tensors(broken))


def test_what_is_only_for_the_log_changes_nothing(config: PretrainConfig) -> None:
    with_log, without = (TrainState.create(config, NUM_SAMPLES) for _ in range(2))
    for step in range(2):
        train_step(with_log, share(config, step))
        assert set(train_step(without, share(config, step), diagnose=False)) == {"train/loss", "train/grad_norm"}
    assert equal(tensors(with_log), tensors(without))


def test_accumulation_gives_the_large_batch(config: PretrainConfig) -> None:
    if not config.teacher.stop_gradient:
        with pytest.raises(ConfigError, match="accumulate_steps > 1; the gradient through the negatives"):
            dataclasses.replace(config, accumulate_steps=4)
        return
    if config.loss.koleo_weight and config.loss.koleo_group_size != 2:
        with pytest.raises(ConfigError, match="the gradient through the neighbours needs them at once"):
            dataclasses.replace(config, accumulate_steps=4)
        return
    accumulating = dataclasses.replace(config, accumulate_steps=4)
    whole, parts = (TrainState.create(c, NUM_SAMPLES) for c in (config, accumulating))
    if any(isinstance(module, _BatchNorm) for module in whole.student.modules()):
        assert train_step(parts, share(config, 0))["train/loss"].isfinite()
        return
    for step in range(3):
        metrics, again = (train_step(state, share(config, step)) for state in (whole, parts))
        torch.testing.assert_close(again["train/loss"], metrics["train/loss"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(again["train/grad_norm"], metrics["train/grad_norm"], rtol=1e-3, atol=1e-5)


def losses_and_teacher(config: PretrainConfig) -> dict[str, Any]:
    """What every rank computes: it must be the same for any number of ranks."""
    torch.set_num_threads(1)
    state = TrainState.create(config, NUM_SAMPLES)
    metrics = [train_step(state, share(config, step)) for step in range(3)]
    return {
        "metrics": {name: torch.stack([m[name] for m in metrics]) for name in metrics[0]},
        "teacher": state.teacher.state_dict(),
        "objective": state.objective.state_dict(),
    }


def one_rank(index: int, folder: str) -> None:
    warnings.simplefilter("error")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2)
    torch.save({name: losses_and_teacher(config) for name, config in POINTS.items()}, f"{folder}/{index}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(one_rank, args=(str(folder),), nprocs=2, start_method="forkserver")
    return [torch.load(Path(folder, f"{index}.pt"), weights_only=True) for index in range(2)]


@pytest.mark.parametrize("name", POINTS, ids=lambda name: name.replace(" ", "_"))
def test_two_processes_are_one_on_the_whole_batch(ranks: list[dict[str, Any]], name: str) -> None:
    alone = losses_and_teacher(POINTS[name])
    first, second = (result[name] for result in ranks)
    torch.testing.assert_close(first["teacher"], second["teacher"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(first["objective"], second["objective"], rtol=0, atol=0)
    # the first step is equal to rounding; afterwards Adam turns rounding into steps where gradients vanish
    for metric, values in alone["metrics"].items():
        tolerance = 1e-3 if metric == "train/feature_rank" else 2e-5
        torch.testing.assert_close(first["metrics"][metric][0], values[0], rtol=tolerance, atol=1e-5, msg=metric)
    torch.testing.assert_close(first["metrics"]["train/loss"], alone["metrics"]["train/loss"], rtol=3e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------ the teacher's weights


def weights(network: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for n, p in network.named_parameters() if not n.startswith("predictor")])


def test_each_teacher_follows_the_student_as_it_says() -> None:
    # two steps make an epoch
    history: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for update in ("student_copy", "previous_step", "previous_epoch", "ema"):
        config = changed(BASE, teacher={"update": update, "momentum": 0.5, "final_momentum": 0.5})
        state = TrainState.create(config, NUM_SAMPLES)
        history[update] = [(weights(state.student), weights(state.teacher))]
        for step in range(4):
            train_step(state, share(config, step))
            history[update].append((weights(state.student), weights(state.teacher)))
    assert not torch.equal(history["ema"][0][0], history["ema"][4][0]), "nothing moved, nothing was compared"
    for step in range(1, 5):
        student, teacher = history["student_copy"][step]
        assert torch.equal(teacher, student)
        assert torch.equal(history["previous_step"][step][1], history["previous_step"][step - 1][0])
        assert torch.equal(history["previous_epoch"][step][1], history["previous_epoch"][step - step % 2][0])
        mean = (history["ema"][step - 1][1] + history["ema"][step][0]) / 2
        torch.testing.assert_close(history["ema"][step][1], mean)


def test_buffers_stay_the_teachers_own_or_follow_the_student() -> None:
    for ema_buffers in (False, True):
        config = changed(BASE, head={"batch_norm": True}, teacher={"ema_buffers": ema_buffers, "momentum": 0.5})
        state, other = (TrainState.create(config, NUM_SAMPLES) for _ in range(2))
        name = "head.mlp.1.running_mean"
        with torch.no_grad():
            other.teacher([share(config, 0).global_crops])
        own = dict(other.teacher.named_buffers())[name]
        train_step(state, share(config, 0))
        student, teacher = (dict(network.named_buffers())[name] for network in (state.student, state.teacher))
        assert student.abs().sum() > 0
        torch.testing.assert_close(teacher, student / 2 if ema_buffers else own)  # all began at 0
        assert bool(own.any()) != ema_buffers


def test_a_teacher_in_evaluation_mode_reads_running_statistics() -> None:
    config = changed(BASE, head={"batch_norm": True}, teacher={"mode": "eval", "ema_buffers": True})
    state = TrainState.create(config, NUM_SAMPLES)
    assert not any(module.training for module in state.teacher.modules())
    assert train_step(state, share(config, 0))["train/loss"].isfinite()
    with pytest.raises(ConfigError, match="ema_buffers = true"):
        changed(config, teacher={"ema_buffers": False})
    plain = changed(
        BASE, model={"backbone": "resnet10t", "drop_path": 0.0, **dict.fromkeys(SIZES)}, teacher={"mode": "eval"}
    )
    with pytest.raises(ConfigError, match="resnet10t has batch norms, whose running statistics would never move"):
        TrainState.create(plain, NUM_SAMPLES)


SIZES = ("patch_size", "embed_dim", "depth", "num_heads")


def test_the_queue_holds_the_newest_outputs_of_the_teacher() -> None:
    config = POINTS["moco_v2"]
    objective = objective_of(config)
    student, teacher = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    size, width = 40, config.head.bottleneck_dim
    steps = [torch.randn(2, 9, width, generator=torch.Generator().manual_seed(step)) for step in range(3)]
    for outputs in steps:
        objective.update_teacher(student, teacher, outputs, momentum=0.5)
    newest = torch.cat([F.normalize(o.transpose(0, 1).flatten(0, 1), dim=-1) for o in steps])[-size:]
    assert {tuple(row.tolist()) for row in objective.queue} == {tuple(row.tolist()) for row in newest}
    assert int(objective.queue_next) == 3 * 18 % size


# ----------------------------------------------------------------------------------------------------- the named points


@pytest.mark.parametrize("name", METHODS)
def test_every_change_of_a_method_is_a_setting(name: str) -> None:
    config = with_method(PretrainConfig(), name)
    for key, value in METHODS[name].items():
        _, part, field = key.split(".")
        assert getattr(getattr(config, part), field) == value


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown method 'mocov2'; did you mean moco_v2"):
        with_method(BASE, "mocov2")


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"head": {"num_prototypes": None}}, "head.num_prototypes = None: must be >= 2 with loss.name = cross_entropy"),
        ({"loss": {"name": "mse"}, "teacher": {"centering": "softmax"}}, "gives probabilities"),
        ({"loss": {"name": "mse"}, "teacher": {"sharpening": "argmax"}}, "compares outputs and sharpens nothing"),
        ({"loss": {"name": "info_nce"}}, "would make outputs of different steps incomparable"),
        ({"teacher": {"stop_gradient": False}}, "needs pretrain.teacher.update = student_copy, not ema"),
        (
            {"loss": {"name": "mse"}, "teacher": {"stop_gradient": False, "update": "student_copy"}},
            "without negatives both sides would agree on a constant",
        ),
        ({"ibot": {"weight": 1.0}, "loss": {"name": "mse"}}, "patches are compared by cross_entropy"),
        ({"ibot": {"weight": 1.0}, "predictor": {"num_layers": 2}}, "which patches do not have"),
        (
            {"ibot": {"weight": 1.0, "num_prototypes": 8}},
            "ibot.num_prototypes = 8: must be none with pretrain.ibot.head",
        ),
        ({"ibot": {"weight": 1.0}, "mask": {"prob": 0.05}}, "masks none of the 16 global crops"),
        ({"loss": {"weight": 0.0}}, "or there is nothing to learn"),
        ({"loss": {"weight": 0.0}, "ibot": {"weight": 1.0}}, "crops.num_local_crops = 2: must be 0"),
        ({"loss": {"weight": 0.0}, "ibot": {"weight": 1.0, "head": "untied"}}, "ibot.head = untied: must be shared"),
        ({"loss": {"koleo_weight": 0.1, "koleo_group_size": 3}}, "must divide pretrain.batch_size = 8"),
        ({"mask": {"ratio": (0.5, 0.1)}}, "the first value must not exceed the second"),
        (
            {"head": {"batch_norm": True}, "teacher": {"mode": "eval"}},
            "the running statistics that it reads never move",
        ),
        (
            {
                "loss": {"name": "info_nce"},
                "teacher": {"update": "student_copy", "stop_gradient": False, "centering": "none", "mode": "eval"},
            },
            "needs pretrain.teacher.mode = train, as the student is",
        ),
    ],
)
def test_nonsense_is_refused_with_the_reason(parts: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        changed(BASE, **parts)
    assert reason in str(error.value)


@pytest.mark.parametrize("name", ["ibot", "dinov2"])
def test_a_method_is_not_applied_over_masked_patches(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is a change of DINO, .* with pretrain\.ibot\.weight = 1"):
        with_method(POINTS[name], "byol")


def test_no_value_of_all_patches_and_prototypes_is_made() -> None:
    """The student's head sees class tokens and masked patches; the teacher's centre is made without all outputs."""
    config = changed(POINTS["ibot"], mask={"shape": "random", "ratio": (0.1, 0.2)})
    state = TrainState.create(config, NUM_SAMPLES)
    rows: list[int] = []
    for network in (state.student, state.teacher):
        network.head.last_layer.register_forward_hook(lambda _, inputs, output: rows.append(output.shape[0]))
    metrics = train_step(state, share(config, 0))
    num_masked = round(metrics["train/masked_share"].item() * 16 * 16)
    assert 0 < num_masked < 16 * 16 / 4
    assert rows == [16 + num_masked, 1, 32 + num_masked]  # teacher, the mean of all patches, student


def test_the_two_readings_of_the_class_view_and_the_divisor_differ() -> None:
    losses = {}
    for view in ("masked", "full"):
        for divisor in ("crops", "masked_crops"):
            config = changed(
                POINTS["ibot"],
                ibot={"class_view": view, "divisor": divisor},
                mask={"sampler": "dinov2"},
                model={"drop_path": 0.0},
            )
            state = TrainState.create(config, NUM_SAMPLES)
            with torch.no_grad():
                state.student.backbone.mask_token.fill_(2.0)
            metrics = train_step(state, share(config, 0))
            losses[view, divisor] = (metrics["train/class_loss"].item(), metrics["train/patch_loss"].item())
    assert losses["masked", "crops"][0] == losses["masked", "masked_crops"][0] != losses["full", "crops"][0]
    assert losses["masked", "crops"][1] == pytest.approx(losses["full", "crops"][1])
    assert losses["masked", "masked_crops"][1] > 1.5 * losses["masked", "crops"][1]  # up to half have a mask


def test_one_image_has_no_negatives() -> None:
    with pytest.raises(ConfigError, match="batch_size = 1: must be >= 2"):
        dataclasses.replace(POINTS["simclr"], batch_size=1)


def test_a_queue_without_negatives_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"loss\.name = cross_entropy has no negatives"):
        changed(BASE, loss={"queue_size": 64})
