"""Fully sharded data parallelism: each rank keeps a part of every weight, gradient, moment and teacher weight.

By torch's FSDP2 (`fully_shard`; Zhao et al., arXiv 2304.11277, after ZeRO, arXiv 1910.02054). Every parameter is cut
along its first axis into one part per rank. A unit, which is a block of the backbone, what the backbone has besides,
or one layer stack of a head, is gathered when it is called, and its gradients are averaged and cut again. What works
on each weight for itself (optimiser, moving average) works on the parts as they are; norms of whole tensors are sums
over the ranks.
"""

from __future__ import annotations

import copy
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from dino_core.backbones import try_images
from dino_core.config import ConfigError, PretrainConfig
from dino_core.distributed import all_reduce_sum_, rank, world_size

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    from dino_core.networks import CropNetwork

_STACKS = re.compile(r"blocks|stages|layers|layer\d+|s\d+")
"""How timm's models, and many others, call what they are stacked from."""

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this rank holds a part of it."""
    module = sys.modules.get("torch.distributed.tensor")  # where it was never imported nothing is sharded
    return module is not None and isinstance(tensor, module.DTensor)


@torch.no_grad()
def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, which shares its memory; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def norms_of_whole(tensors: Sequence[Tensor], norms: Tensor) -> Tensor:
    """L2 norms of whole tensors from those of this rank's parts, [P] -> [P]; of tensors that are whole, the same."""
    if not any(is_sharded(tensor) for tensor in tensors):
        return norms
    return all_reduce_sum_(norms.square()).sqrt()


@torch.no_grad()
def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on its device; every rank calls it. Any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor.detach()


@torch.no_grad()
def part_like(tensor: Tensor, read: Callable[[int, int], Tensor], device: torch.device) -> Tensor:
    """A sharded tensor in parts as `tensor` is, made from this rank's rows alone.

    Args:
        read: the rows from the first number up to the second of the whole tensor.
    """
    from torch.distributed.tensor import DTensor

    assert is_sharded(tensor)
    local = tensor.to_local()
    rows_per_rank = -(-tensor.shape[0] // world_size())
    first = min(rank() * rows_per_rank, tensor.shape[0])
    rows = read(first, first + len(local)) if len(local) else local.new_empty(local.shape)
    return DTensor.from_local(
        rows.to(device),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def shard(student: CropNetwork, teacher: CropNetwork, config: PretrainConfig, device: torch.device) -> None:
    """Shard both networks, in place, over all ranks; they may still lie on the CPU, and go to `device` unit by unit.

    Units of the backbone are gathered at `precision`, and so is what flows through them, as in DINOv2. That averages
    the backbone's gradients in half precision too, and those of the heads in fp32 (arXiv 2304.07193, section 5); here
    all are averaged in fp32. What lies outside of units, units with batch norm and the heads are gathered in fp32, and
    autocast makes of them what it does without sharding.

    Raises:
        ConfigError: a parameter cannot be cut.
    """
    from torch.distributed.device_mesh import init_device_mesh

    for name, parameter in student.named_parameters():
        if not parameter.dim() or not parameter.is_contiguous():
            raise ConfigError(
                f"pretrain.parallel_strategy = fsdp: must be ddp, {name} of {config.model.backbone} "
                + ("is a single number, which cannot be shared out" if not parameter.dim() else "is not contiguous")
            )
    mesh = init_device_mesh(device.type, (world_size(),))
    units = unit_names(student.backbone, config.crops.global_size)
    for network in (student, teacher):
        _shard_network(network, units, mesh, _HALF.get(config.precision))
        network.to(device)  # buffers beside the units


def _shard_network(network: CropNetwork, units: Sequence[str], mesh: DeviceMesh, half: torch.dtype | None) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    for name in units:
        unit = network.backbone.get_submodule(name)
        has_norm = any(isinstance(module, _BatchNorm) for module in unit.modules())
        if half is None or has_norm:  # a batch norm wants its scale as precise as its running statistics
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        else:
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    network.backbone.register_forward_hook(_in_memory_of_its_own)
    # Until the backward pass a student keeps what that begins with: the heads, and little besides the blocks. Patch
    # tokens are no output of the backbone, by whose gradient it would be gathered again.
    keep = any(parameter.requires_grad for parameter in network.parameters())
    keep_rest = keep and (bool(units) or network.grid is not None)
    fully_shard(network.backbone, mesh=mesh, reshard_after_forward=not keep_rest)
    # not the heads themselves, whose parts are called one by one
    for head in (network.head, network.patch_head, network.predictor):
        for part in (getattr(head, "mlp", None), getattr(head, "last_layer", None)):
            if isinstance(part, nn.Module):
                fully_shard(part, mesh=mesh, reshard_after_forward=not keep)


def _in_memory_of_its_own(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Features, and tokens of packed crops, that are no views, such as the first row of all tokens: of a view the
    backward hooks could be lost."""
    return tree_map_only(Tensor, torch.clone, output)


def unit_names(backbone: nn.Module, image_size: int) -> list[str]:
    """The names of what a backbone is sharded by: the members of its stacks that it calls one by one, if any.

    A member that is not called itself, but taken apart, cannot be gathered by its call. Runs two images.
    """
    candidates = []
    for name, child in backbone.named_children():
        if _STACKS.fullmatch(name):
            inner = isinstance(child, nn.ModuleList | nn.Sequential)
            candidates += [f"{name}.{part}" for part, _ in child.named_children()] if inner else [name]
    candidates = [name for name in candidates if any(True for _ in backbone.get_submodule(name).parameters())]
    calls: Counter[str] = Counter()

    def counted(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, inputs: calls.update([name])

    hooks = [backbone.get_submodule(name).register_forward_pre_hook(counted(name)) for name in candidates]
    try:
        try_images(backbone, image_size)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name in candidates if calls[name]]


def set_gradient_sync(network: nn.Module, sync: bool) -> None:
    """Whether the next backward passes average gradients, or add them up on each rank, whole and in fp32."""
    for part in _parts(network):
        part.set_requires_gradient_sync(sync, recurse=False)


def _parts(network: nn.Module) -> Iterator[Any]:
    from torch.distributed.fsdp import FSDPModule

    return (module for module in network.modules() if isinstance(module, FSDPModule))


def skeleton_of(module: nn.Module) -> nn.Module:
    """A copy without memory, taken before it is sharded, that `assemble` can fill."""
    return copy.deepcopy(module).to("meta")


@torch.no_grad()
def assemble(skeleton: nn.Module, sharded: nn.Module) -> nn.Module:
    """A plain copy of a sharded module, whole on every rank and in fp32; every rank calls it."""
    whole = copy.deepcopy(skeleton)
    for name, parameter in sharded.named_parameters():
        owner, _, last = name.rpartition(".")
        value = nn.Parameter(whole_tensor(parameter), requires_grad=parameter.requires_grad)
        setattr(whole.get_submodule(owner), last, value)
    for name, buffer in sharded.named_buffers():  # those that no checkpoint holds too
        owner, _, last = name.rpartition(".")
        whole.get_submodule(owner)._buffers[last] = buffer.clone()
    return whole
