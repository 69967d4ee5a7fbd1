"""Batch norm over the global batch, on devices where torch's `SyncBatchNorm` does not run (all but GPUs).

With it a network with batch norm computes the same with one worker or several, on a CPU as on GPUs.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.distributed as dist
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_core.distributed import has_process_group


class _AllReduceSum(torch.autograd.Function):
    """Sum over all ranks, forward and, as each rank's loss depends on every rank's input, backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


class GlobalBatchNorm(_BatchNorm):
    """`torch.nn.BatchNorm{1,2,3}d` whose training statistics are those of all ranks' rows together.

    The ranks may hold different numbers of rows. Parameters and buffers have the names of torch's batch norms.
    """

    @classmethod
    def replacing(cls, module: _BatchNorm) -> Self:
        """The same batch norm, with the same parameters and buffers."""
        new = cls(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
        for name, parameter in module.named_parameters(recurse=False):
            setattr(new, name, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(new, name, buffer)
        for name, child in module.named_children():
            setattr(new, name, child)
        return new.train(module.training)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input {list(input.shape)}: must be [rows, features, ...]")

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape, normalised over all axes but C and over all ranks."""
        if not (self.training and has_process_group()):
            return super().forward(input)
        self._check_input_dim(input)
        x = input.float()
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
        count = torch.tensor(float(x.numel() // x.shape[1]), device=x.device)
        dist.all_reduce(count)
        mean = _AllReduceSum.apply(x.sum(axes)) / count  # [C]
        centred = x - mean.view(shape)
        variance = _AllReduceSum.apply(centred.square().sum(axes)) / count
        self._update_running(mean, variance, count)
        out = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if not self.track_running_stats:
            return
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance * (count / (count - 1).clamp(min=1)), weight)


class GlobalBatchNormAct(GlobalBatchNorm):
    """timm's `BatchNormAct2d`, a batch norm with dropout and activation behind it, over all ranks."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        out: Tensor = self.act(self.drop(super().forward(input)))
        return out


_REPLACEMENTS: dict[type[nn.Module], type[GlobalBatchNorm]] = {
    nn.BatchNorm1d: GlobalBatchNorm,
    nn.BatchNorm2d: GlobalBatchNorm,
    nn.BatchNorm3d: GlobalBatchNorm,
    BatchNormAct2d: GlobalBatchNormAct,
}


def can_be_synchronised(norm: _BatchNorm) -> bool:
    """Whether nothing is lost by replacing it; a subclass may have a forward pass of its own."""
    return type(norm) in _REPLACEMENTS or isinstance(norm, GlobalBatchNorm | nn.SyncBatchNorm)


def use_global_batch_norm(network: nn.Module) -> nn.Module:
    """Replace every `torch.nn.BatchNorm{1,2,3}d` and timm `BatchNormAct2d` inside `network`, in place.

    Subclasses of them stay, for their forward pass may be another.
    """
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm) and type(child) in _REPLACEMENTS:
                setattr(parent, name, _REPLACEMENTS[type(child)].replacing(child))
    return network
