"""Collectives over the default process group that do nothing where there is none."""

from __future__ import annotations

from typing import Any

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


class _GatherRows(torch.autograd.Function):
    """`all_gather_rows`, and backward the sum over all ranks of the gradients of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.num_rows = tensor.shape[0]
        return all_gather_rows(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = all_reduce_sum_(grads[0].clone())
        return total[rank() * ctx.num_rows : (rank() + 1) * ctx.num_rows]


def all_gather_rows_with_gradient(tensor: Tensor) -> Tensor:
    """As `all_gather_rows`; each rank's loss may depend on the rows of every rank."""
    if not has_process_group():
        return tensor
    gathered: Tensor = _GatherRows.apply(tensor)
    return gathered


def barrier() -> None:
    """Wait for all ranks."""
    if has_process_group():
        dist.barrier()
