from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dino_core.config import PretrainConfig, StudentConfig, TeacherConfig
from dino_core.diagnostics import kl_to_student, teacher_entropy
from dino_core.objectives import Objective


def objective_of(out_dim: int = 5, student_temp: float = 0.1, **teacher: Any) -> Objective:
    config = PretrainConfig(teacher=TeacherConfig(**teacher), student=StudentConfig(temp=student_temp))
    return Objective(out_dim, config)


def networks() -> tuple[nn.Module, nn.Module]:
    student, teacher = nn.Linear(3, 2), nn.Linear(3, 2)
    teacher.requires_grad_(False)
    return student, teacher


def test_forward_changes_nothing():
    objective = objective_of()
    objective.center.fill_(0.5)
    student, teacher = torch.randn(4, 3, 5, requires_grad=True), torch.randn(2, 3, 5)
    first = objective(student, teacher, 0.04)
    assert torch.equal(objective.center, torch.full((5,), 0.5))
    assert torch.equal(objective(student, teacher, 0.04).loss, first.loss)
    assert not first.targets.values.requires_grad
    assert first.loss.requires_grad


def test_update_teacher_moves_weights_and_centre():
    objective = objective_of(center_momentum=0.75)
    student, teacher = networks()
    expected = [0.9 * t + 0.1 * s for t, s in zip(teacher.parameters(), student.parameters(), strict=True)]
    logits = torch.randn(2, 3, 5)
    objective.update_teacher(student, teacher, logits, momentum=0.9)
    torch.testing.assert_close(list(teacher.parameters()), [e.detach() for e in expected], check_stride=False)
    torch.testing.assert_close(objective.center, 0.25 * logits.mean(dim=(0, 1)))


def test_without_centring_the_centre_stays_and_is_0():
    objective = objective_of(centering="none")
    logits = torch.randn(2, 3, 5)
    objective.update_teacher(*networks(), logits, momentum=0.9)
    assert "center" not in objective.state_dict()
    probs = objective(torch.randn(4, 3, 5), logits, 0.1).targets.values
    torch.testing.assert_close(probs, torch.softmax(logits / 0.1, dim=-1))


def test_the_centre_is_saved():
    objective = objective_of()
    objective.center.fill_(2)
    restored = objective_of()
    restored.load_state_dict(objective.state_dict())
    assert torch.equal(restored.center, objective.center)


def test_kl_is_that_of_the_pairs_of_the_loss():
    student, logits = torch.randn(4, 3, 5), torch.randn(2, 3, 5)
    loss, (probs, *_) = objective_of()(student, logits, 0.2)
    pairs = [
        (probs[t] * (probs[t].log() - torch.log_softmax(student[s] / 0.1, dim=-1))).sum(dim=-1).mean()
        for t in range(2)
        for s in range(4)
        if s != t
    ]
    torch.testing.assert_close(kl_to_student(loss, teacher_entropy(probs)), torch.stack(pairs).mean())
