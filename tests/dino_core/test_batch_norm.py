from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_core.batch_norm import GlobalBatchNorm, use_global_batch_norm
from dino_core.distributed import all_reduce_sum_, rank, world_size


def run() -> dict[str, Tensor]:
    """Outputs of this rank's rows, summed gradients and running statistics after two steps."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        BatchNormAct2d(6, act_layer=nn.SiLU),
        nn.Conv2d(6, 5, 3, stride=2),
        BatchNormAct2d(5, act_layer=nn.PReLU),
        nn.Conv2d(5, 4, 1),
        BatchNormAct2d(4, apply_act=False),
        nn.BatchNorm2d(4),
    )
    if world_size() > 1:
        use_global_batch_norm(network)
    for step in range(2):
        network.zero_grad()
        generator = torch.Generator().manual_seed(step)
        images, weights = torch.randn(6, 3, 9, 9, generator=generator), torch.randn(6, 4, 3, 3, generator=generator)
        outputs = network(images.chunk(world_size())[rank()])
        (outputs * weights.chunk(world_size())[rank()]).sum().backward()
    gradients = {f"{name}.grad": all_reduce_sum_(p.grad) for name, p in network.named_parameters()}
    return {"outputs": outputs.detach(), **gradients, **dict(network.named_buffers())}


def one_rank(index: int, folder: str) -> None:
    warnings.simplefilter("error")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2)
    torch.save(run(), f"{folder}/{index}.pt")
    dist.destroy_process_group()


def test_fused_batch_norms_of_two_processes_are_those_of_one(tmp_path):
    mp.start_processes(one_rank, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    first, second = (torch.load(Path(tmp_path, f"{index}.pt"), weights_only=True) for index in range(2))
    threads = torch.get_num_threads()
    alone = run()
    torch.set_num_threads(threads)
    outputs = torch.cat([first.pop("outputs"), second.pop("outputs")])
    torch.testing.assert_close(outputs, alone.pop("outputs"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["regnetx_002", "test_efficientnet", "test_byobnet"])
def test_whole_models_are_replaced_and_stay_what_they_are(name):
    plain = timm.create_model(name, num_classes=0).train()
    network = copy.deepcopy(plain)
    parameters = dict(network.named_parameters())
    use_global_batch_norm(network)
    assert any(isinstance(module, BatchNormAct2d) for module in plain.modules())
    assert all(isinstance(module, GlobalBatchNorm) for module in network.modules() if isinstance(module, _BatchNorm))
    assert all(parameter is parameters[name] for name, parameter in network.named_parameters())
    assert list(network.state_dict()) == list(plain.state_dict())
    images = torch.randn(4, 3, 32, 32)
    for mode in (True, False):
        assert torch.equal(network.train(mode)(images), plain.train(mode)(images))
    torch.testing.assert_close(network.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_a_batch_norm_of_ones_own_stays():
    class Own(nn.BatchNorm2d):
        pass

    network = use_global_batch_norm(nn.Sequential(Own(3)))
    assert type(network[0]) is Own
