"""Numbers of the authors' code that are too fine, or span too many modules, for the tests of one module."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_core.centering import center_teacher
from dino_core.losses import dino_loss
from dino_core.schedules import cosine_schedule


def sines(shape: Sequence[int], shift: float) -> Tensor:
    return torch.from_numpy(2 * np.sin(0.7 * np.arange(math.prod(shape)) + shift)).float().reshape(*shape)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (
            cosine_schedule(0.002, 1e-6, 1000, 100),
            {
                0: 0.0,
                1: 2.0202020202020203e-05,
                50: 0.00101010101010101,
                99: 0.002,
                100: 0.002,
                101: 0.0019999939107039617,
                550: 0.0010005,
                999: 1.0060892960385022e-06,
            },
        ),
        (cosine_schedule(0.996, 1, 1000), {0: 0.996, 1: 0.9960000098695962, 500: 0.998, 999: 0.9999999901304037}),
        (cosine_schedule(0.04, 0.4, 1000), {0: 0.04, 1: 0.04000088826366549, 500: 0.22, 999: 0.3999991117363345}),
    ],
    ids=["learning rate", "momentum", "weight decay"],
)
def test_the_first_and_last_steps_of_a_cosine_are_the_official_ones(schedule, values):
    """Momentum leaves 0.996 by 1e-8 in the first step, which takes all digits of the authors' cosine_scheduler."""
    assert [schedule(step) for step in values] == pytest.approx(list(values.values()), rel=1e-14)


def test_ten_crops_have_the_loss_of_dino_and_of_dinov2():
    """DINO's DINOLoss gives 21.6187801 and DINOv2's, whose trainer adds the pairs of global crops (times 2) to those of
    local ones and divides both by their number, 21.6187782."""
    student, teacher = sines((10, 6, 32), 0.1), sines((2, 6, 32), 1.3)
    loss = dino_loss(student, center_teacher(teacher, torch.zeros(32), 0.07), 0.1).item()
    assert loss == pytest.approx(21.6187801, rel=2e-7)
    assert loss == pytest.approx(21.6187782, rel=2e-7)
