"""Twenty steps from the same weights on the same crops as the authors' code (facebookresearch/dino).

official_trace.json holds what that code printed on the CPU in fp32; benchmarks/official_trace.py made it, makes weights
and crops for both sides, and benchmarks/README.md tells how, and how large the rounding is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.official_trace import STEPS, TRACES, crops, fill, steps_per_epoch, sums
from dino_core.crops import CropBatch
from dino_core.train import TrainState, train_step

OFFICIAL = json.loads(Path(__file__).with_name("official_trace.json").read_text())["traces"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", TRACES)
def test_twenty_steps_are_the_official_ones(name):
    config, official = TRACES[name], OFFICIAL[name]
    state = TrainState.create(config, num_samples=config.batch_size * steps_per_epoch(config))
    fill(state.student)
    state.teacher.load_state_dict(state.student.state_dict())
    losses, norms, students, teachers = [], [], [], []
    for step in range(STEPS):
        metrics = train_step(state, CropBatch(*crops(config, step), config.batch_size))
        losses.append(metrics["train/loss"].item())
        norms.append(metrics["train/grad_norm"].item())
        students.append(sum(sums(state.student)))
        teachers.append(sum(sums(state.teacher)))
    assert losses == pytest.approx(official["loss"], rel=1e-6)
    assert norms == pytest.approx(official["grad_norm"], rel=1e-5)
    assert students == pytest.approx(official["student"], rel=5e-8)
    assert teachers == pytest.approx(official["teacher"], rel=3e-7)
    assert sums(state.student) == pytest.approx(official["student_parameters"], rel=5e-6)
    assert sums(state.teacher) == pytest.approx(official["teacher_parameters"], rel=2e-6)
    assert state.objective.center.tolist() == pytest.approx(official["center"], abs=1e-6)
    for key in ("lr", "weight_decay", "momentum"):
        schedule = getattr(state.schedules, key)
        assert [schedule(step) for step in range(STEPS)] == pytest.approx(official[key], rel=1e-12)
