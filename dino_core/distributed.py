"""Collectives over the default process group that do nothing where there is none."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def has_process_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    return dist.get_world_size() if has_process_group() else 1


def rank() -> int:
    return dist.get_rank() if has_process_group() else 0


def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """Sum over all ranks, in place."""
    if has_process_group():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max_(tensor: Tensor) -> Tensor:
    """Largest over all ranks, element by element, in place."""
    if has_process_group():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def all_reduce_mean_(tensor: Tensor) -> Tensor:
    """Mean over all ranks, in place."""
    return all_reduce_sum_(tensor).div_(world_size())


def all_gather_rows(tensor: Tensor) -> Tensor:
    """Rows of all ranks, rank 0 first: [n, ...] -> [n * world_size, ...]. Every rank must hold as many rows."""
    if not has_process_group():
        return tensor
    gathered = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return torch.cat(gathered)


def barrier() -> None:
    """Wait for all ranks."""
    if has_process_group():
        dist.barrier()
