"""Twenty steps with masked patches from the same weights, crops and masks as the authors' code of iBOT and of DINOv2.

official_patch_trace.json holds what that code gave on the CPU in fp32; benchmarks/official_patch_trace.py made it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.official_patch_trace import PATCH_TRACES
from benchmarks.official_trace import STEPS, crops, fill, steps_per_epoch, sums
from dino_core.crops import CropBatch
from dino_core.train import TrainState, train_step

OFFICIAL = json.loads(Path(__file__).with_name("official_patch_trace.json").read_text())["traces"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", PATCH_TRACES)
def test_twenty_steps_are_the_official_ones(name: str) -> None:
    (_, config), official = PATCH_TRACES[name], OFFICIAL[name]
    state = TrainState.create(config, num_samples=config.batch_size * steps_per_epoch(config))
    fill(state.student)
    state.teacher.load_state_dict(state.student.state_dict(), strict=False)  # all but the mask token
    found: dict[str, list[float]] = {key: [] for key in official if isinstance(official[key][0], float)}
    for step in range(STEPS):
        metrics = train_step(state, CropBatch(*crops(config, step), config.batch_size))
        for key in ("loss", "class_loss", "patch_loss", "koleo", "grad_norm"):
            if key in found:
                found[key].append(metrics[f"train/{key}"].item())
        found["student"].append(sum(sums(state.student)))
        found["teacher"].append(sum(sums(state.teacher)))
    tolerances = {"grad_norm": 1e-5, "student": 5e-8, "teacher": 3e-7}
    for key in found.keys() - {"student_parameters", "teacher_parameters", "center", "patch_center"}:
        assert found[key] == pytest.approx(official[key], rel=tolerances.get(key, 1e-6)), key
    assert sums(state.student) == pytest.approx(official["student_parameters"], rel=5e-6)
    assert sums(state.teacher) == pytest.approx(official["teacher_parameters"], rel=2e-6)
    for key in ("center", "patch_center"):
        if key in official:
            assert getattr(state.objective, key).tolist() == pytest.approx(official[key], abs=1e-6)
