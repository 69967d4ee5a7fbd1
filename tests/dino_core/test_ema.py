from __future__ import annotations

import pytest
import torch

from dino_core.ema import update_ema_


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 1.0])
def test_moves_each_tensor_towards_the_student(momentum):
    torch.manual_seed(0)
    teacher, student = [torch.randn(3, 4), torch.randn(5)], [torch.randn(3, 4), torch.randn(5)]
    expected = [momentum * t + (1 - momentum) * s for t, s in zip(teacher, student, strict=True)]
    kept = [s.clone() for s in student]
    update_ema_(teacher, student, momentum)
    torch.testing.assert_close(teacher, expected)
    assert all(torch.equal(a, b) for a, b in zip(student, kept, strict=True))


def test_at_the_ends_it_is_exact():
    teacher, student = torch.randn(4), torch.randn(4)
    before = teacher.clone()
    update_ema_([teacher], [student], 1.0)
    assert torch.equal(teacher, before)
    update_ema_([teacher], [student], 0.0)
    assert torch.equal(teacher, student)


def test_mistakes_are_errors():
    with pytest.raises(ValueError, match=r"momentum = 1.5"):
        update_ema_([torch.ones(1)], [torch.ones(1)], 1.5)
    with pytest.raises(ValueError, match="1 teacher tensors but 0"):
        update_ema_([torch.ones(1)], [], 0.5)
