from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_core.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from dino_core.config import ConfigError, PretrainConfig, StageConfig, StageCropsConfig
from dino_core.crops import CropBatch
from dino_core.distillation import check_teacher, read_teacher_config, teacher_digest
from dino_core.export import load_backbone
from dino_core.masking import all_patches
from dino_core.passes import teach
from dino_core.train import TrainState, train, train_step
from tests.dino_core.points import NUM_SAMPLES, POINTS, changed

LARGE = changed(POINTS["dinov2"], crops={"num_local_crops": 2})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch(config: PretrainConfig, step: int) -> CropBatch:
    generator, crops = torch.Generator().manual_seed(step), config.crops
    sizes = [(2, crops.global_size), (crops.num_local_crops, crops.local_size)]
    made = [torch.randn(num * config.batch_size, 3, size, size, generator=generator) for num, size in sizes]
    return CropBatch(made[0], made[1], config.batch_size)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a larger run, whose teacher is not its student."""
    state = TrainState.create(changed(LARGE, teacher={"momentum": 0.5}), NUM_SAMPLES)
    for step in range(2):
        train_step(state, batch(LARGE, step))
    return save_checkpoint(state, tmp_path_factory.mktemp("teacher"))


def small(teacher: Path, /, **parts: dict[str, Any]) -> PretrainConfig:
    """A student of half the width."""
    given: dict[str, dict[str, Any]] = {
        "model": {"embed_dim": 8, "drop_path": 0.0},
        "teacher": {"checkpoint": str(teacher), "momentum": 0.9},
        "ibot": {"patches": "all"},
    }
    for part, values in parts.items():
        given[part] = given.get(part, {}) | values
    return changed(LARGE, **given)


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_targets_come_from_the_frozen_teacher_and_the_average_of_the_student_is_kept(teacher: Path) -> None:
    state = TrainState.create(small(teacher), NUM_SAMPLES)
    larger = TrainState.create(LARGE, NUM_SAMPLES)
    load_checkpoint(larger, teacher)
    assert state.frozen_teacher is not None
    frozen, average = weights(state.frozen_teacher), weights(state.teacher)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in larger.teacher.state_dict().items())
    crops = batch(state.config, 0)
    taught = teach(state, crops.global_crops, crops.num_images)
    larger.teacher.eval()
    assert torch.equal(taught.features, larger.teacher.features([crops.global_crops]))
    for step in range(2):
        metrics = train_step(state, batch(state.config, step))
        student = weights(state.student)
        momentum = state.schedules.momentum(step)
        for name, parameter in state.teacher.named_parameters():
            average[name] = momentum * average[name] + (1 - momentum) * student[name]
            assert torch.allclose(parameter, average[name], atol=1e-7), name
    assert metrics["train/masked_share"] == 0
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in state.frozen_teacher.state_dict().items())


def test_all_patches_are_compared_and_none_is_hidden(teacher: Path) -> None:
    found = all_patches((4, 4), 3, "crops")
    part = found.part(1, 2, torch.device("cpu"))
    assert not part.mask.any()
    assert part.rows.tolist() == list(range(2 * 2 * 16))
    assert torch.equal(found.weights(torch.device("cpu")), torch.full((2 * 3 * 16,), 1 / (2 * 3 * 16)))
    state = TrainState.create(small(teacher), NUM_SAMPLES)
    crops = batch(state.config, 0)
    state.student.eval()
    seen = state.student([crops.global_crops], all_patches((4, 4), 8, "crops").part(0, 8, state.device))
    alone, _ = state.student.look_at_patches(
        crops.global_crops, all_patches((4, 4), 8, "crops").part(0, 8, state.device)
    )
    assert torch.equal(seen.patches, alone.patches)  # type: ignore[arg-type]


def test_a_resumed_run_is_the_unbroken_one_and_has_no_copy_of_the_teacher(teacher: Path, tmp_path: Path) -> None:
    stage = StageConfig(steps=2, crops=StageCropsConfig(global_size=24, local_size=16))
    config = dataclasses.replace(small(teacher), stages=(stage,), checkpoint_every_steps=1)
    whole = TrainState.create(config, NUM_SAMPLES)
    saved: list[Path] = []
    batches = (batch(stage.config, step) for stage in whole.stages for step in range(stage.start, stage.stop))
    train(
        whole,
        batches,
        on_log=lambda step, metrics: None,
        on_checkpoint=lambda state: saved.append(save_checkpoint(state, tmp_path)),
    )
    for place in (1, 4):
        again = TrainState.create(config, NUM_SAMPLES)
        load_checkpoint(again, saved[place])
        rest = [(s.config, step) for s in again.stages for step in range(max(s.start, again.step), s.stop)]
        train(
            again,
            (batch(*item) for item in rest),
            on_log=lambda step, metrics: None,
            on_checkpoint=lambda state: None,
        )
        for part in ("student", "teacher", "objective"):
            one, other = getattr(whole, part).state_dict(), getattr(again, part).state_dict()
            assert all(torch.equal(one[name], other[name]) for name in one), part
    assert json.loads((saved[0] / "state.json").read_text())["frozen_teacher"] == teacher_digest(str(teacher))
    assert load_backbone(saved[-1]).num_features == 8, "the average of the student is what is exported"


def test_other_weights_than_when_the_run_began_are_refused(teacher: Path, tmp_path: Path) -> None:
    state = TrainState.create(small(teacher), NUM_SAMPLES)
    saved = save_checkpoint(state, tmp_path / "run")
    other = TrainState.create(dataclasses.replace(LARGE, seed=9), NUM_SAMPLES)
    path = save_checkpoint(other, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"pretrain\.teacher\.checkpoint = .* has other weights than when"):
        load_checkpoint(TrainState.create(small(path), NUM_SAMPLES), saved)
    (path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ConfigError, match=r"pretrain\.teacher\.checkpoint = .*damaged"):
        TrainState.create(small(path), NUM_SAMPLES)


def test_the_configuration_of_a_checkpoint_is_read_as_it_was(teacher: Path) -> None:
    assert read_teacher_config(str(teacher)) == changed(LARGE, teacher={"momentum": 0.5})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"head": {"num_prototypes": 30}}, r"pretrain\.head\.num_prototypes = 30: must be 24, that of the frozen"),
        (
            {"ibot": {"head": "untied", "num_prototypes": 30}},
            r"pretrain\.ibot\.num_prototypes = 30: must be 24, as wide as the patches' head",
        ),
        ({"model": {"patch_size": 8}}, r"pretrain\.crops\.global_size = 16: gives the frozen .* 4 x 4 .* 2 x 2"),
        ({"head": {"batch_norm": True}}, r"pretrain\.teacher\.ema_buffers = False: must be true with"),
        ({"teacher": {"update": "previous_step"}}, r"pretrain\.teacher\.update = previous_step: must be ema with"),
        ({"ibot": {"class_view": "full"}}, r"pretrain\.ibot\.class_view = full: must be masked"),
    ],
)
def test_what_does_not_fit_is_refused(teacher: Path, parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainState.create(small(teacher, **parts), NUM_SAMPLES)


def test_a_teacher_without_what_is_needed_is_refused(teacher: Path, tmp_path: Path) -> None:
    plain = changed(LARGE, ibot={"weight": 0.0})
    path = save_checkpoint(TrainState.create(plain, NUM_SAMPLES), tmp_path)
    with pytest.raises(ConfigError, match=r"pretrain\.ibot\.weight = 1: must be 0, the frozen teacher of"):
        check_teacher(small(path))
    for wrong, reason in ((path / "state.json", "is a file without configuration"), (tmp_path, "is no checkpoint")):
        with pytest.raises(ConfigError, match=rf"pretrain\.teacher\.checkpoint = {wrong}: {reason}"):
            check_teacher(small(wrong))
