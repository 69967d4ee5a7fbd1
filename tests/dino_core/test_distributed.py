"""Two processes over gloo against one: the number of workers must not change a number."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dino_core.centering import sinkhorn_knopp, update_center_, update_center_by_sum_
from dino_core.config import ConfigError, CropsConfig, HeadConfig, LossConfig, ModelConfig, OptimConfig, PretrainConfig
from dino_core.crops import CropBatch
from dino_core.diagnostics import feature_rank, feature_std, prototype_usage, target_std
from dino_core.distributed import all_gather_rows, all_reduce_mean_, all_reduce_sum_, rank, world_size
from dino_core.masking import Masks
from dino_core.objectives import Objective
from dino_core.train import NonFiniteLossError, TrainState, train_step

STEPS, NUM_SAMPLES = 4, 12

CONFIG = PretrainConfig(
    seed=7,
    steps=STEPS,
    epochs=None,
    batch_size=6,
    model=ModelConfig(backbone="vit_tiny_patch16_224", patch_size=8, embed_dim=16, depth=3, num_heads=2, drop_path=0.2),
    head=HeadConfig(num_prototypes=24, hidden_dim=32, bottleneck_dim=8),
    crops=CropsConfig(num_local_crops=3, global_size=16, local_size=8),
    optim=OptimConfig(lr=0.001, lr_reference_batch_size=None, warmup_epochs=0, freeze_last_layer_epochs=1),
)


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(2, 6, 3, 16, 16, generator=generator), torch.randn(3, 6, 3, 8, 8, generator=generator)


def share(step: int) -> CropBatch:
    """This rank's rows of the global batch."""
    num_images = CONFIG.batch_size // world_size()
    rows = slice(rank() * num_images, (rank() + 1) * num_images)
    crops = (crops[:, rows].flatten(0, 1).contiguous() for crops in global_batch(step))
    return CropBatch(*crops, num_images)


def run() -> dict[str, Any]:
    """What every rank computes; each value must be the same for any number of ranks."""
    torch.set_num_threads(1)
    state = TrainState.create(CONFIG, NUM_SAMPLES)
    metrics = [train_step(state, share(step)) for step in range(STEPS)]
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).chunk(world_size())[rank()]
    center = torch.ones(5)
    update_center_(center, logits, 0.9)
    return {
        "metrics": {name: torch.stack([m[name] for m in metrics]) for name in metrics[0]},
        "teacher": state.teacher.state_dict(),
        "center": state.objective.center,
        "of_logits": {
            "center": center,
            "sinkhorn_knopp": all_gather_rows(sinkhorn_knopp(logits, 0.2)),
            "feature_std": feature_std(logits),
            "feature_rank": feature_rank(logits),
            "target_std": target_std(logits[None]),
            "prototype_usage": prototype_usage(logits.softmax(dim=-1)[None]),
            "mean": all_reduce_mean_(logits.sum()) * world_size(),
        },
    }


def of_patches() -> dict[str, Any]:
    """What depends on masked patches, of which the ranks have different numbers; the last has none in one case."""
    found: dict[str, Any] = {}
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    for name, first in (("uneven", 3), ("one rank empty", 8)):
        own = logits if world_size() == 1 else (logits[:first], logits[first:])[rank()]
        probs = torch.zeros(8, 5)
        start = 0 if rank() == 0 else first
        probs[start : start + len(own)] = sinkhorn_knopp(own, 0.01, may_be_empty=True)
        center = torch.ones(5)
        update_center_by_sum_(center, own.sum(dim=0), torch.tensor(float(len(own))), 0.9)
        found[name] = {"sinkhorn_knopp": all_reduce_sum_(probs), "center": center}
    masks = np.random.default_rng(0).random((2, 6, 9)) < 0.3
    masks[:, 4:] = False
    share = 6 // world_size()
    values = masks[:, rank() * share : (rank() + 1) * share]
    for divisor in ("crops", "masked_crops", "masked_patches"):
        weights = torch.zeros(masks.shape)
        mine = weights[:, rank() * share : (rank() + 1) * share]
        mine[torch.from_numpy(values)] = Masks(values, divisor).weights(torch.device("cpu"))
        found[divisor] = all_reduce_mean_(weights)
    features = torch.randn(2, 12, 7, generator=torch.Generator().manual_seed(1))
    share = 12 // world_size()
    for size in (None, 4, 3, 12):
        config = dataclasses.replace(CONFIG, batch_size=12, loss=LossConfig(koleo_weight=1.0, koleo_group_size=size))
        whole = features.clone().requires_grad_()
        own = whole[:, rank() * share : (rank() + 1) * share].flatten(0, 1)
        loss = Objective(24, config).koleo(own, share)
        (gradient,) = torch.autograd.grad(loss, whole)
        found[f"koleo, {size}"] = {"loss": all_reduce_mean_(loss.detach()), "gradient": all_reduce_mean_(gradient)}
    return found


def run_with_batch_norm() -> dict[str, Any]:
    """Losses, and the teacher with its running statistics, of a convnet with batch norm everywhere."""
    config = dataclasses.replace(
        CONFIG,
        model=ModelConfig(backbone="resnet10t", drop_path=0.0),
        head=dataclasses.replace(CONFIG.head, batch_norm=True),
    )
    state = TrainState.create(config, NUM_SAMPLES)
    losses = [train_step(state, share(step))["train/loss"] for step in range(3)]
    return {"losses": torch.stack(losses), "teacher": state.teacher.state_dict()}


def stop_on_nan() -> dict[str, Any]:
    """One rank has bad crops; what becomes of every rank."""
    state = TrainState.create(CONFIG, NUM_SAMPLES)
    before = [tensor.clone() for tensor in state.student.state_dict().values()]
    crops = share(0)
    if rank() == 1:
        crops.global_crops[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError):
        train_step(state, crops)
    after = state.student.state_dict().values()
    return {"unmoved": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "step": state.step}


def messages() -> dict[str, str]:
    """Why configurations do not run on two workers without GPUs."""
    changes = {
        "odd batch": {"batch_size": 5},
    }
    found = {}
    for name, change in changes.items():
        with pytest.raises(ConfigError) as error:
            TrainState.create(dataclasses.replace(CONFIG, **change), NUM_SAMPLES)  # type: ignore[arg-type]
        found[name] = str(error.value)
    return found


def one_rank(index: int, folder: str) -> None:
    warnings.simplefilter("error")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2)
    result = {"run": run(), "batch_norm": run_with_batch_norm(), "nan": stop_on_nan(), "messages": messages()}
    result["patches"] = of_patches()
    torch.save(result, f"{folder}/{index}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(one_rank, args=(str(folder),), nprocs=2, start_method="forkserver")
    return [torch.load(Path(folder, f"{index}.pt"), weights_only=True) for index in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    threads = torch.get_num_threads()
    result = run()
    torch.set_num_threads(threads)
    return result


def test_losses_are_those_of_one_process(ranks, alone):
    for result in ranks:
        assert set(result["run"]["metrics"]) == set(alone["metrics"])
        for name, values in alone["metrics"].items():
            torch.testing.assert_close(result["run"]["metrics"][name], values, rtol=1e-4, atol=1e-6, msg=name)


def test_batch_norm_is_that_of_the_global_batch(ranks):
    alone = run_with_batch_norm()
    first, second = (result["batch_norm"] for result in ranks)
    torch.testing.assert_close(first["losses"][0], alone["losses"][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(first["losses"], alone["losses"], rtol=1e-3, atol=0)
    assert any("running_var" in name for name in alone["teacher"])
    torch.testing.assert_close(first["teacher"], second["teacher"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(first["teacher"], alone["teacher"], rtol=1e-2, atol=1e-3)


def test_stochastic_depth_had_a_say(alone):
    state = TrainState.create(
        dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, drop_path=0.0)), NUM_SAMPLES
    )
    expected = alone["metrics"]["train/loss"][0].item()
    assert train_step(state, share(0))["train/loss"].item() != pytest.approx(expected, rel=1e-3)


def test_teachers_and_centres_stay_the_same_on_all_ranks(ranks, alone):
    first, second = (result["run"] for result in ranks)
    torch.testing.assert_close(first["teacher"], second["teacher"], rtol=0, atol=0)
    torch.testing.assert_close(first["center"], second["center"], rtol=0, atol=0)
    torch.testing.assert_close(first["teacher"], alone["teacher"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(first["center"], alone["center"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["center", "sinkhorn_knopp", "feature_std", "mean"])
def test_collectives_see_the_global_batch(ranks, alone, name):
    for result in ranks:
        torch.testing.assert_close(result["run"]["of_logits"][name], alone["of_logits"][name])


def test_masked_patches_and_neighbours_are_those_of_the_global_batch(ranks):
    """Whatever each rank has of them: targets, centres, weights by each divisor, KoLeo with its gradient."""
    alone = of_patches()
    assert alone["uneven"]["sinkhorn_knopp"].isfinite().all()
    for result in ranks:
        assert result["patches"].keys() == alone.keys()
        for name, values in alone.items():
            torch.testing.assert_close(result["patches"][name], values, rtol=1e-5, atol=1e-6, msg=name)


def test_one_bad_rank_stops_all(ranks):
    assert [result["nan"] for result in ranks] == [{"unmoved": True, "step": 0}] * 2


def test_configurations_that_two_cpu_workers_cannot_run(ranks):
    found = ranks[0]["messages"]
    assert found["odd batch"] == "pretrain.batch_size = 5: must be a multiple of cluster.num_workers = 2"


def test_without_a_process_group_collectives_do_nothing():
    assert (rank(), world_size()) == (0, 1)
    tensor = torch.tensor([1.0, 2.0])
    assert all_gather_rows(tensor) is tensor
    assert all_reduce_mean_(tensor).tolist() == [1.0, 2.0]
