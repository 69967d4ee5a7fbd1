from __future__ import annotations

from typing import Any

import pytest
import torch

from dino_core.config import ConfigError
from dino_core.methods import METHODS
from dino_core.networks import build_student, build_teacher
from orchestrator.dry_run import measure
from orchestrator.overrides import override
from orchestrator.preflight import check_model
from sweeps.recipes import dino_resnet50, dino_vits16, quickstart


def test_parameters_are_those_of_the_paper() -> None:
    vit = measure(override(dino_vits16(), {"pretrain.batch_size": 16}))
    assert round(vit.backbone / 1e6, 2) == 21.67
    assert round(vit.head / 1e6, 2) == 22.35
    resnet = measure(override(dino_resnet50(), {"pretrain.batch_size": 8}))
    assert round(resnet.backbone / 1e6, 2) == 23.51


@pytest.mark.parametrize("method", ["dino", "byol"])
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
    assert measure(config).weights == sum(tensor.numel() * tensor.element_size() for tensor in held)


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
        logits, _ = student(groups)
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


@pytest.mark.parametrize(
    "changes",
    [
        {"pretrain.crops.local_size": 9},
        {"pretrain.crops.global_size": 18, "pretrain.crops.local_size": 8},
        {"pretrain.model.backbone": "vit_tiny_patch16_224", "pretrain.model.patch_size": None},
        {"pretrain.model.backbone": "resnet18", "pretrain.model.drop_path": 0},
        {"pretrain.model.backbone": "vit_tinny_patch16_224"},
    ],
)
def test_what_is_refused_without_torch_is_what_building_refuses(changes: dict[str, Any]) -> None:
    config = override(quickstart(), changes)
    with pytest.raises(ConfigError) as built:
        measure(config)
    with pytest.raises(ConfigError) as checked:
        check_model(config)
    refused = [{line.split(":")[0] for line in str(error.value).splitlines()} for error in (built, checked)]
    assert refused[0] <= refused[1]  # the check goes on after the first problem
