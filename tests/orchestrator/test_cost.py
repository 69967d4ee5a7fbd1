"""Counted operations against closed forms, published-size tables and real steps; memory against real tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dino_core.config import ConfigError, PretrainConfig
from dino_core.crops import CropBatch
from dino_core.methods import METHODS
from dino_core.networks import build_student, build_teacher
from dino_core.train import TrainState, train_step
from orchestrator.cost import cost_key, measure
from orchestrator.overrides import override
from sweeps.recipes import dino_resnet50, dino_vits16, quickstart


def closed_form(p: PretrainConfig, width: int, depth: int, patch: int) -> float:
    """Operations of a DINO step of a ViT for one image: matrix products and attention, 2 for each multiplication."""

    def vit(side: int) -> tuple[float, float]:
        """Of a forward pass over one crop: all, and of these the patch embedding."""
        patches = (side // patch) ** 2
        tokens = patches + 1
        embedding = 2 * patches * 3 * patch**2 * width
        return embedding + depth * tokens * 24 * width**2 + depth * 4 * tokens**2 * width, embedding

    h, b, k = p.head.hidden_dim, p.head.bottleneck_dim, p.head.num_prototypes
    assert k is not None and p.head.num_layers == 3
    head = 2 * (width * h + h * h + h * b + b * k)
    large, small, local = *[vit(s) for s in (p.crops.global_size, p.crops.local_size)], p.crops.num_local_crops
    student = 2 * large[0] + local * small[0] + (2 + local) * head
    backward = 2 * student - (2 * large[1] + local * small[1])  # pixels need no gradient
    return student + backward + 2 * (large[0] + head)


@pytest.mark.parametrize(
    ("width", "depth", "patch", "local", "expected"),
    [
        (192, 12, 16, 8, 31.24),
        (384, 12, 16, 8, 113.43),
        (384, 12, 8, 8, 517.1),
        (768, 12, 16, 8, 434.8),
        (1024, 24, 16, 8, 1526),
        (384, 12, 16, 0, 73.7),
        (384, 12, 16, 2, 83.6),
        (384, 12, 16, 6, 103.5),
        (384, 12, 16, 10, 123.4),
    ],
)
def test_the_closed_form_gives_the_known_sizes(width: int, depth: int, patch: int, local: int, expected: float) -> None:
    pretrain = override(dino_vits16(), {"pretrain.crops.num_local_crops": local}).pretrain
    digits = 4 if expected != round(expected, 1) else 3
    assert float(f"{closed_form(pretrain, width, depth, patch) / 1e9:.{digits + 1}g}") == pytest.approx(
        expected, rel=10 ** (1 - digits) / 2
    )


@pytest.mark.parametrize(
    ("changes", "width", "depth", "patch"),
    [
        ({"pretrain.batch_size": 32}, 384, 12, 16),
        ({"pretrain.model.backbone": "vit_base_patch16_224", "pretrain.batch_size": 16}, 768, 12, 16),
        ({"pretrain.crops.num_local_crops": 0, "pretrain.model.depth": 2}, 384, 2, 16),
        ({"pretrain.model.patch_size": 8, "pretrain.model.depth": 1, "pretrain.model.drop_path": 0}, 384, 1, 8),
        ({"pretrain.accumulate_steps": 4, "pretrain.model.depth": 1, "pretrain.model.drop_path": 0}, 384, 1, 16),
    ],
)
def test_a_vit_is_counted_as_by_the_closed_form(changes: dict[str, Any], width: int, depth: int, patch: int) -> None:
    config = override(dino_vits16(), changes)
    crops = 2 + config.pretrain.crops.num_local_crops
    loss = 2 * crops * 65536  # each crop's logits times the summed targets
    cost = measure(config)
    assert cost.flops.total == closed_form(config.pretrain, width, depth, patch) + loss
    if (width, depth, patch) == (384, 12, 16):
        assert round(cost.backbone / 1e6, 2) == 21.67  # as the paper says
        assert round(cost.head / 1e6, 2) == 22.35


def test_a_resnet_is_counted_by_its_layers() -> None:
    cost = measure(override(dino_resnet50(), {"pretrain.batch_size": 8}))
    flops = cost.flops
    assert round(cost.backbone / 1e6, 2) == 23.51
    assert round(flops.total / 1e9, 2) == 102.25
    assert round(flops.backbone / 1e9, 2) == 8.17  # 4.09 G multiplications with addition, as its authors' tables have


def real_step(changes: dict[str, Any]) -> float:
    """Operations for each image of a real step, by torch's own count."""
    config = override(quickstart(), changes).pretrain
    state = TrainState.create(config, 100)
    num, crops = config.batch_size, config.crops
    large = torch.randn(2 * num, 3, crops.global_size, crops.global_size)
    small = torch.randn(crops.num_local_crops * num, 3, crops.local_size, crops.local_size)
    batch = CropBatch(large, small if len(small) else None, num)
    with FlopCounterMode(display=False) as counter:
        train_step(state, batch, diagnose=False)
    return counter.get_total_flops() / num


_GROUPS = {"pretrain.loss.koleo_group_size": 4}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pretrain.model.backbone": "resnet18", **dict.fromkeys(("patch_size", "embed_dim", "depth", "num_heads"))},
        {"pretrain.model.drop_path": 0.1, "pretrain.model.activation_checkpointing": True},
        {"pretrain.accumulate_steps": 2},
        METHODS["simclr"],
        METHODS["byol"],
        METHODS["ibot"],
        {**METHODS["dinov2"], "pretrain.ibot.class_view": "full", "pretrain.accumulate_steps": 2, **_GROUPS},
    ],
    ids=["ViT", "ResNet", "computed again", "in parts", "two-sided", "predictor", "patches", "patches, own head"],
)
def test_the_count_is_that_of_a_real_step(changes: dict[str, Any]) -> None:
    named = {key if "." in key else f"pretrain.model.{key}": value for key, value in changes.items()}
    small = {"pretrain.batch_size": 8, **named}
    # Fused attention, which a CPU has and torch's meta device has not, computes a part of it again.
    assert measure(override(quickstart(), small)).flops.total == pytest.approx(real_step(small), rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_counted(method: str) -> None:
    cost = measure(override(quickstart(), METHODS[method]))
    parts = (cost.flops.teacher, cost.flops.student, cost.flops.backward)
    assert cost.flops.total == sum(parts) and math.isfinite(cost.flops.total)
    assert (cost.flops.teacher == 0) == (method == "simclr")
    assert 1 < cost.flops.backward / cost.flops.student <= 2


def test_activation_checkpointing_pays_memory_with_another_forward_pass() -> None:
    changes = {"pretrain.batch_size": 16, "pretrain.model.depth": 4, "pretrain.head.num_prototypes": 256}
    plain = measure(override(dino_vits16(), changes))
    again = measure(override(dino_vits16(), changes | {"pretrain.model.activation_checkpointing": True}))
    assert again.activations < 0.6 * plain.activations
    blocks = again.flops.backward - plain.flops.backward  # three of four: the last is still there
    assert 0.6 * plain.flops.student < blocks < 0.75 * plain.flops.student


def test_what_changes_the_cost_of_a_step_is_in_its_key() -> None:
    base = quickstart()
    same = {"pretrain.optim.lr": 1e-4, "pretrain.seed": 3, "pretrain.steps": 9, "pretrain.teacher.temp": 0.07}
    assert cost_key(override(base, same)) == cost_key(base)
    for key, value in {
        "pretrain.batch_size": 32,
        "pretrain.crops.num_local_crops": 4,
        "pretrain.head.num_prototypes": 128,
        "pretrain.model.depth": 3,
        "pretrain.precision": "bf16",
        "cluster.num_workers": 2,
        "pretrain.parallel_strategy": "fsdp",
        "pretrain.ibot.weight": 1.0,
    }.items():
        assert cost_key(override(base, {key: value})) != cost_key(base), key


@pytest.mark.parametrize("method", ["dino", "byol", "dinov2"])
def test_weights_are_what_an_update_leaves_in_memory(method: str) -> None:
    config = override(quickstart(), METHODS[method])
    student = build_student(config.pretrain)
    teacher = build_teacher(student, config.pretrain)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = [*student.parameters(), *teacher.parameters(), *(p.grad for p in trained if p.grad is not None)]
    held += [value for state in optimizer.state.values() for value in state.values() if value.dim() > 0]
    cost = measure(config)
    assert cost.weights == sum(tensor.numel() * tensor.element_size() for tensor in held)
    assert cost.checkpoint == cost.weights - 4 * sum(parameter.numel() for parameter in trained)


def test_activations_are_those_of_a_real_forward_pass() -> None:
    config = override(quickstart(), {"pretrain.batch_size": 8})
    pretrain = config.pretrain
    student = build_student(pretrain)
    parameters = {p.untyped_storage().data_ptr() for p in student.parameters()}
    saved: dict[int, int] = {}
    kept = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            kept.append(tensor)
        return tensor

    crops = pretrain.crops
    groups = [torch.randn(8 * n, 3, s, s) for n, s in ((2, crops.global_size), (2, crops.local_size))]
    student.begin_pass(0, 0, num_images=8, share=8)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = student(groups).crops
    real, counted = sum(saved.values()), measure(config).activations
    assert logits.shape == (32, pretrain.head.num_prototypes)
    # fused attention, which a CPU has and torch's meta device has not, keeps less
    assert real <= counted <= 1.5 * real


def test_more_workers_share_the_step_but_not_the_weights() -> None:
    one = measure(quickstart())
    two = measure(override(quickstart(), {"cluster.num_workers": 2}))
    assert two.weights == one.weights
    assert two.logits == one.logits // 2
    assert two.activations == pytest.approx(one.activations / 2, rel=0.02)


def test_sharded_weights_are_shared_but_for_what_stays_whole() -> None:
    sharded = {"pretrain.parallel_strategy": "fsdp"}
    one, alone = measure(quickstart()), measure(override(quickstart(), sharded))
    two = measure(override(quickstart(), {**sharded, "cluster.num_workers": 2}))
    in_parts = measure(override(quickstart(), {**sharded, "cluster.num_workers": 2, "pretrain.accumulate_steps": 2}))
    assert alone.weights == one.weights
    assert two.weights == pytest.approx(one.weights / 2 + 4 * one.head, abs=4)
    assert in_parts.weights == pytest.approx(two.weights + 4 * (one.backbone + one.head), rel=0.01)
    assert two.checkpoint == one.checkpoint


def test_accumulation_holds_one_part_of_the_batch_at_a_time_and_a_queue_stays() -> None:
    one, parts = measure(quickstart()), measure(override(quickstart(), {"pretrain.accumulate_steps": 4}))
    assert parts.weights == one.weights
    assert parts.activations == pytest.approx(one.activations / 4, rel=0.05)
    # 4 crops x 3 tensors of a quarter of the student's images, 2 x 2 of all of the teacher's
    assert parts.logits == 4 * 256 * (4 * 3 * 16 + 4 * 64)
    moco = measure(override(quickstart(), METHODS["moco_v2"]))
    short = measure(override(quickstart(), {**METHODS["moco_v2"], "pretrain.loss.queue_size": 1}))
    assert moco.weights - short.weights == 4 * 64 * 65535


def test_a_model_that_cannot_be_built_is_a_config_error() -> None:
    config = override(dino_resnet50(), {"pretrain.model.backbone": "vgg11", "pretrain.model.drop_path": 0.1})
    with pytest.raises(ConfigError, match=r"pretrain\.model\.drop_path = 0\.1: .* has no stochastic depth"):
        measure(config)
