"""Two processes over gloo: sharing the weights out must not change a number, nor what a checkpoint holds."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dino_core.backbones import build_backbone
from dino_core.checkpoint import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from dino_core.config import ConfigError, ModelConfig, PretrainConfig, StageConfig, StageCropsConfig
from dino_core.distributed import rank, world_size
from dino_core.eval.features import extract_features
from dino_core.eval.pictures import patch_features
from dino_core.safetensors_file import header, in_order, raw_bytes
from dino_core.sharding import local_part, unit_names, whole_tensor
from dino_core.train import TrainState, train_step
from tests.dino_core.points import BASE, NUM_SAMPLES, POINTS, changed, share

STEPS = 3
STOP = 2  # where checkpoints are written

PLAIN = changed(BASE, optim={"clip_grad": 0.05})
CASES: dict[str, PretrainConfig] = {
    "parts, clip parameter": dataclasses.replace(PLAIN, accumulate_steps=2),
    "dinov2, recomputed, clip module": dataclasses.replace(
        changed(
            POINTS["dinov2"],
            loss={"koleo_group_size": 2},
            model={"activation_checkpointing": True, "layer_scale": 0.1},
            optim={"layer_decay": 0.8, "patch_embed_lr_mult": 0.2, "clip_grad": 0.05, "clip_mode": "module"},
        ),
        accumulate_steps=2,
    ),
    "lars, clip global": changed(
        PLAIN,
        head={"norm_last_layer": False},
        optim={"name": "lars", "lr": 0.5, "clip_mode": "global", "freeze_last_layer_by": "lr"},
    ),
    "packed, sub-batches": POINTS["packed, sub-batches, recomputed"],
    "convnet": changed(
        dataclasses.replace(PLAIN, model=ModelConfig(backbone="resnet10t", drop_path=0.0)),
        optim={"name": "sgd", "lr": 0.01},
    ),
    "bf16": dataclasses.replace(PLAIN, precision="bf16"),
    "fp16": dataclasses.replace(PLAIN, precision="fp16"),
}
WAYS = [("ddp", "fsdp"), ("fsdp", "fsdp"), ("fsdp", "ddp"), ("alone", "fsdp")]
"""How a checkpoint was written, and how the run goes on."""
EXACT = {name: config for name, config in CASES.items() if config.precision == "fp32" and name != "convnet"}


def strategy(config: PretrainConfig, name: str) -> PretrainConfig:
    return dataclasses.replace(config, parallel_strategy=name)  # type: ignore[arg-type]


def advance(state: TrainState, until: int = STEPS) -> dict[str, Tensor]:
    """Train; all metrics, [steps] each."""
    metrics = [train_step(state, share(state.config, step)) for step in range(state.step, until)]
    return {name: torch.stack([m[name] for m in metrics]) for name in metrics[0]}


def values(state: TrainState) -> dict[str, Tensor]:
    """All that a run is, whole; every rank calls it."""
    found = {f"{i}.{k}": v for i, d in state.optimizer.state_dict()["state"].items() for k, v in d.items()}
    for part, module in (("student", state.student), ("teacher", state.teacher), ("objective", state.objective)):
        found |= {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()}
    return {name: whole_tensor(tensor).clone() for name, tensor in found.items()}


def run(config: PretrainConfig, num_steps: int) -> dict[str, Any]:
    state = TrainState.create(config, NUM_SAMPLES)
    return {"metrics": advance(state, num_steps), "values": values(state)}


def share_of_numbers(state: TrainState) -> dict[str, float]:
    """Which share of its numbers each part of a state has on this rank."""
    moments = [value for d in state.optimizer.state.values() for value in d.values() if value.dim()]
    parts = {"student": [*state.student.parameters()], "teacher": [*state.teacher.parameters()], "moments": moments}
    return {
        name: sum(local_part(t).numel() for t in tensors) / sum(t.numel() for t in tensors)
        for name, tensors in parts.items()
    }


def checkpoints(folder: Path) -> dict[str, Any]:
    """Write by either way of two processes and go on by both, from those of one process too."""
    config, found = CASES["dinov2, recomputed, clip module"], dict[str, Any]()
    for how in ("ddp", "fsdp"):
        state = TrainState.create(strategy(config, how), NUM_SAMPLES)
        advance(state, STOP)
        save_checkpoint(state, folder / how)
        advance(state)
        found[f"unbroken {how}"] = values(state)
    for written, how in WAYS:
        state = TrainState.create(strategy(config, how), NUM_SAMPLES)
        load_checkpoint(state, folder / written / f"step_{STOP:08d}")
        again = save_checkpoint(state, folder / f"{written} by {how}")
        found[f"same bytes {written} {how}"] = [
            (again / name).read_bytes() == (folder / written / again.name / name).read_bytes()
            for name in (MODEL_FILE, OPTIMIZER_FILE)
        ]
        advance(state)
        found[f"{written} {how}"] = values(state)
    if rank() == 1:  # only one rank knows of it
        next(p for p in state.student.parameters() if local_part(p).numel()).data.to_local().view(-1)[0] = torch.nan
    with pytest.raises(CheckpointError, match="holds values that are not finite"):
        save_checkpoint(state, folder / "fsdp")
    found["left"] = sorted(path.name for path in (folder / "fsdp").iterdir())
    return found


def looks() -> dict[str, Any]:
    """What is seen of the teacher's backbone while training, and whether training goes on as without."""
    images, found = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(3)), dict[str, Any]()
    for how in ("ddp", "fsdp"):
        state = TrainState.create(strategy(PLAIN, how), NUM_SAMPLES)
        advance(state, 1)
        backbone = state.teacher_backbone()
        found[how] = {"features": extract_features(backbone, [images]), "maps": patch_features(backbone, images)}
        found[how]["losses"] = advance(state, 3)["train/loss"]
        found[how]["shares"] = share_of_numbers(state)
    return found


def staged() -> dict[str, Any]:
    """A run that goes on at another resolution, with position embeddings that one rank holds alone."""
    stage = StageConfig(steps=2, crops=StageCropsConfig(global_size=24, local_size=16))
    found = {}
    for how in ("ddp", "fsdp"):
        config = dataclasses.replace(strategy(PLAIN, how), steps=2, stages=(stage,))
        state = TrainState.create(config, NUM_SAMPLES)
        advance(state, 2)
        state.enter_stage(1)
        advance(state, 4)
        found[how] = values(state)
        found[f"shares {how}"] = share_of_numbers(state)
    return found


class Scaled(nn.Module):
    """Has a parameter that cannot be shared out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 8)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.linear(images.mean((2, 3))) * self.scale
        return features


def refusal() -> str:
    with pytest.raises(ConfigError) as error:
        TrainState.create(strategy(changed(PLAIN, model={"drop_path": 0.0}), "fsdp"), NUM_SAMPLES, backbone=Scaled())
    return str(error.value)


def one_rank(index: int, folder: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2)
    result: dict[str, Any] = {
        name: {how: run(strategy(config, how), 3 if name in EXACT else 2) for how in ("ddp", "fsdp")}
        for name, config in CASES.items()
    }
    result |= {"checkpoints": checkpoints(Path(folder)), "looks": looks(), "staged": staged(), "refusal": refusal()}
    torch.save(result, f"{folder}/{index}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    state = TrainState.create(CASES["dinov2, recomputed, clip module"], NUM_SAMPLES)
    advance(state, STOP)
    save_checkpoint(state, folder / "alone")
    torch.set_num_threads(threads)
    mp.start_processes(one_rank, args=(str(folder),), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{index}.pt", weights_only=True) for index in range(2)]


def close(found: dict[str, Tensor], expected: dict[str, Tensor], *, rtol: float, atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=atol, equal_nan=True, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_it_trains_as_ddp_does(ranks: list[dict[str, Any]], name: str) -> None:
    """Accumulation, recomputed blocks, ways of clipping and optimisers with it; to rounding, which AdamW makes larger
    where a gradient is next to nothing."""
    sharded, plain = ranks[0][name]["fsdp"], ranks[0][name]["ddp"]
    if name in EXACT:
        losses = {key: value for key, value in plain["metrics"].items() if "rank" not in key}
        close({key: sharded["metrics"][key] for key in losses}, losses, rtol=2e-5, atol=1e-6)
        close(sharded["values"], plain["values"], rtol=1e-5, atol=3e-5 if EXACT[name].optim.name == "adamw" else 1e-5)
    else:
        tolerance = 1e-3 if name == "convnet" else 2e-2
        torch.testing.assert_close(
            sharded["metrics"]["train/loss"], plain["metrics"]["train/loss"], rtol=tolerance, atol=0
        )
    close(ranks[1][name]["fsdp"]["values"], sharded["values"], rtol=0, atol=0)
    assert not torch.equal(plain["metrics"]["train/grad_norm"][0], torch.zeros(()))


def test_half_precision_is_that_of_autocast(ranks: list[dict[str, Any]]) -> None:
    for name, key in (("bf16", "train/grad_norm"), ("fp16", "train/loss_scale")):
        torch.testing.assert_close(
            ranks[0][name]["fsdp"]["metrics"][key], ranks[0][name]["ddp"]["metrics"][key], rtol=0.1, atol=0
        )
    assert {value.dtype for value in ranks[0]["bf16"]["fsdp"]["values"].values()} <= {torch.float32}


def test_each_rank_holds_its_share(ranks: list[dict[str, Any]]) -> None:
    """All but tokens and the like, whose first axis is 1, halved between two."""
    first, second = (result["looks"]["fsdp"]["shares"] for result in ranks)
    for part in ("student", "teacher", "moments"):
        assert first[part] + second[part] == pytest.approx(1)
        assert max(first[part], second[part]) < 0.6
    assert set(ranks[0]["looks"]["ddp"]["shares"].values()) == {1.0}


def test_the_backbone_can_be_looked_at(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        sharded, plain = result["looks"]["fsdp"], result["looks"]["ddp"]
        for key in ("features", "maps", "losses"):
            torch.testing.assert_close(sharded[key], plain[key], rtol=1e-5, atol=1e-4 if key == "maps" else 1e-5)


def test_the_next_stage_is_sharded_too(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        close(result["staged"]["fsdp"], result["staged"]["ddp"], rtol=1e-5, atol=3e-5)
        assert max(result["staged"]["shares fsdp"].values()) < 0.6


@pytest.mark.parametrize(("written", "how"), WAYS)
def test_checkpoints_go_on_either_way(ranks: list[dict[str, Any]], written: str, how: str) -> None:
    found = ranks[0]["checkpoints"]
    assert found[f"same bytes {written} {how}"] == [True, True]
    close(found[f"{written} {how}"], found["unbroken ddp"], rtol=1e-5, atol=3e-5)
    if written == how:
        close(found[f"{written} {how}"], found[f"unbroken {how}"], rtol=0, atol=0)


def test_one_process_goes_on_from_two(ranks: list[dict[str, Any]], folder: Path) -> None:
    assert (rank(), world_size()) == (0, 1)
    for how in ("ddp", "fsdp"):
        state = TrainState.create(strategy(CASES["dinov2, recomputed, clip module"], how), NUM_SAMPLES)
        assert not state.is_sharded, "there is nobody to share with"
        load_checkpoint(state, folder / how / f"step_{STOP:08d}")
        advance(state)
        close(values(state), ranks[0]["checkpoints"]["unbroken ddp"], rtol=1e-5, atol=3e-5)


def test_checkpoints_hold_whole_tensors(ranks: list[dict[str, Any]], folder: Path) -> None:
    written = [folder / how / f"step_{STOP:08d}" for how in ("ddp", "fsdp")]
    for name in (MODEL_FILE, OPTIMIZER_FILE):
        shapes = []
        for path in written:
            with safe_open(path / name, "pt") as file:
                shapes.append({key: file.get_slice(key).get_shape() for key in file.keys()})  # noqa: SIM118
        assert shapes[0] == shapes[1]
    states = [json.loads((path / STATE_FILE).read_text()) for path in written]
    assert states[0]["optimizer"] == states[1]["optimizer"]


def test_a_bad_part_on_one_rank_is_not_saved(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert result["checkpoints"]["left"] == [f"step_{STOP:08d}"]


def test_what_cannot_be_shared_out_is_refused(ranks: list[dict[str, Any]]) -> None:
    expected = "pretrain.parallel_strategy = fsdp: must be ddp, backbone.scale of "
    assert all(result["refusal"].startswith(expected) for result in ranks)
    with pytest.raises(ConfigError, match=r"pretrain\.parallel_strategy = fsdp: must be ddp with pretrain\.model\.com"):
        strategy(changed(PLAIN, model={"compile": True}), "fsdp")


@pytest.mark.parametrize(
    ("model", "units"),
    [
        (PLAIN.model, ["blocks.0", "blocks.1"]),
        (ModelConfig(backbone="resnet10t", drop_path=0.0), [f"layer{i}.0" for i in range(1, 5)]),
        (ModelConfig(backbone="resnet10t", drop_path=0.0, activation_checkpointing=True), None),
    ],
)
def test_units_are_what_the_backbone_calls(model: ModelConfig, units: list[str] | None) -> None:
    backbone = build_backbone(model, 16)
    names = unit_names(backbone, 16)
    assert units is None or names == units
    calls: list[str] = []
    for name in names:
        backbone.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    backbone(torch.zeros(2, 3, 16, 16))
    assert calls == names


def test_files_are_those_of_the_library() -> None:
    tensors = {
        "b": torch.arange(6.0).view(2, 3).t(),
        "a": torch.tensor(3),
        "ü": torch.ones(3, dtype=torch.bfloat16),
        "d": torch.tensor([True, False, True]),
        "c": torch.zeros(0, 4),
        "e": torch.tensor(2.5, dtype=torch.float64),
        "f": torch.arange(3, dtype=torch.uint8),
        "g": torch.arange(3, dtype=torch.int32),
    }
    ordered = in_order(tensors)
    expected = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    assert header(ordered) + b"".join(raw_bytes(tensor) for tensor in ordered.values()) == expected
    with pytest.raises(ValueError, match=r"z is of torch\.complex64: must be one of torch\.int64"):
        in_order({"z": torch.zeros(1, dtype=torch.complex64)})
