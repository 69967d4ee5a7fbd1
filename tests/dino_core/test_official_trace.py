"""Eight steps from the same weights on the same crops as the authors' code (facebookresearch/dino, main_dino.py).

The golden values were printed by that code on the CPU in fp32: its model, loss, clipping, schedules, parameter groups,
optimisers and teacher update. One thing was replaced there: the position embeddings of the local crops were
interpolated by timm's rule, which is antialiased and does not shift by 0.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dino_core.config import CropsConfig, HeadConfig, ModelConfig, OptimConfig, PretrainConfig, TeacherConfig
from dino_core.crops import CropBatch
from dino_core.train import TrainState, train_step

B, K, STEPS = 6, 32, 8


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(optimizer: str, norm_last_layer: bool) -> PretrainConfig:
    return PretrainConfig(
        steps=STEPS,
        epochs=None,
        batch_size=B,
        model=ModelConfig(
            backbone="vit_tiny_patch16_224", patch_size=8, embed_dim=32, depth=2, num_heads=2, drop_path=0.0
        ),
        head=HeadConfig(num_prototypes=K, hidden_dim=48, bottleneck_dim=16, norm_last_layer=norm_last_layer),
        teacher=TeacherConfig(warmup_temp=0.04, temp=0.07, warmup_temp_epochs=3, momentum=0.9),
        crops=CropsConfig(num_local_crops=2, global_size=32, local_size=16),
        optim=OptimConfig(
            name=optimizer,  # type: ignore[arg-type]
            lr=0.01,
            lr_reference_batch_size=None,
            warmup_epochs=2,
            freeze_last_layer_epochs=2,
            clip_grad=0.3,
        ),
    )


def noise(shape: Sequence[int], *seed: int) -> Tensor:
    """Uniform numbers of standard deviation 1 from numpy's bit stream."""
    draws = np.random.Generator(np.random.PCG64(seed)).random(tuple(shape))
    return torch.from_numpy((draws - 0.5) * math.sqrt(12)).float()


def fill(network: nn.Module) -> None:
    with torch.no_grad():
        for index, (name, parameter) in enumerate(network.named_parameters()):
            values = noise(parameter.shape, index)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.1 * values if name.endswith("weight") else 0.02 * values)
            elif not name.endswith("weight_g"):
                parameter.copy_(values * (parameter[0].numel() ** -0.5 if parameter.shape[0] > 1 else 0.3))


def crops(step: int, size: int) -> Tensor:
    return noise((2 * B, 3, size, size), step, size)


def size_of(network: nn.Module) -> float:
    """Sum of absolute weights, without the biases of attention: those of the keys have no gradient but rounding, which
    Adam blows up to full steps."""
    return sum(p.double().abs().sum().item() for name, p in network.named_parameters() if "qkv.bias" not in name)


@pytest.mark.parametrize(
    ("optimizer", "norm_last_layer", "losses", "teacher", "student", "center"),
    [
        (
            "adamw",
            True,
            [3.6684277, 5.3980546, 3.5597599, 3.0655663, 2.6696224, 2.5521126, 2.7850692, 2.8290470],
            4614.44586,
            4619.07218,
            [0.154867, -0.267469, -0.169121, -0.002211, -0.033772, 0.061028],
        ),
        (
            "adamw",
            False,
            [3.6684277, 5.3980546, 3.5597599, 3.0753706, 2.7136948, 2.5655849, 2.7763312, 2.8215044],
            4614.35824,
            4618.41055,
            [0.154878, -0.266554, -0.168826, -0.002199, -0.033634, 0.061178],
        ),
        (
            "sgd",
            False,
            [3.6684277, 5.3980546, 4.7233224, 4.9737010, 4.4039493, 4.5797949, 3.6266010, 4.2843709],
            4610.38223,
            4546.28052,
            [0.159429, -0.186244, -0.144939, 0.01985, -0.019164, 0.00994],
        ),
        (
            "lars",
            False,
            [3.6684277, 5.3980546, 4.7844453, 5.1095605, 4.6377988, 5.0530143, 3.9176588, 4.7340155],
            4617.82485,
            4617.39857,
            [0.158743, -0.180647, -0.144526, 0.021741, -0.017901, 0.010144],
        ),
    ],
)
def test_losses_weights_and_centre_are_the_official_ones(optimizer, norm_last_layer, losses, teacher, student, center):
    state = TrainState.create(config(optimizer, norm_last_layer), num_samples=B)
    fill(state.student)
    state.teacher.load_state_dict(state.student.state_dict())
    ours = [
        train_step(state, CropBatch(crops(step, 32), crops(step, 16), B))["train/loss"].item() for step in range(STEPS)
    ]
    assert ours == pytest.approx(losses, rel=3e-6)
    assert size_of(state.teacher) == pytest.approx(teacher, rel=2e-7)
    assert size_of(state.student) == pytest.approx(student, rel=2e-7)
    assert state.objective.center[:6].tolist() == pytest.approx(center, abs=2e-6)
