"""Activation checkpointing: a backbone's blocks are computed again in the backward pass instead of being remembered.

timm chooses the blocks and hands them to `torch.utils.checkpoint` (without re-entering autograd, its default). What it
computes again must be what it computed before: stochastic depth needs the masks of that pass, and running statistics
must not move a second time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_core.stochastic_depth import Bookmark, depth_masks


def checkpoint_activations(backbone: nn.Module) -> None:
    """Switch it on for a model with timm's `set_grad_checkpointing`.

    Stochastic depth by `StochasticDepth` and batch norms of any kind are taken care of. Another layer whose forward
    pass changes its state would change it twice.

    Raises:
        NotImplementedError: the model cannot.
    """
    switch = getattr(backbone, "set_grad_checkpointing", None)
    if switch is None:
        raise NotImplementedError(f"{type(backbone).__name__} has no set_grad_checkpointing")
    try:
        switch(True)
    except AssertionError as error:  # how timm's models say that they cannot
        raise NotImplementedError(str(error)) from error
    passes = _Passes()
    backbone.register_forward_pre_hook(passes.enter)
    backbone.register_forward_hook(passes.leave, always_call=True)


_GUARD = "guarded_against_recomputation_by"
"""Attribute of a batch norm that has its hooks. A copy of the backbone copies hooks, attribute and passes alike."""


class _Passes:
    """Hooks around each training pass of a backbone. Any of its layers called outside them is being recomputed."""

    def __init__(self) -> None:
        self.running = False
        self._bookmarking: torch.autograd.graph.saved_tensors_hooks | None = None

    def enter(self, backbone: nn.Module, inputs: tuple[Any, ...]) -> None:
        for module in backbone.modules():  # at every pass: batch norms may have been replaced by global ones
            if isinstance(module, _BatchNorm) and module.__dict__.get(_GUARD) is not self:
                module.__dict__[_GUARD] = self
                guard = _RunningStatistics(self)
                module.register_forward_pre_hook(guard.set_aside)
                module.register_forward_hook(guard.put_back, always_call=True)
        self.running = True
        masks = depth_masks(backbone)
        # nothing is computed on the meta device, and whoever counts there what autograd saves has hooks of his own
        first: Tensor = inputs[0] if isinstance(inputs[0], Tensor) else inputs[0][0]  # of several groups, packed
        if masks is None or not backbone.training or not torch.is_grad_enabled() or first.is_meta:
            return

        # A block's inputs are saved when it is entered, and fetched right before it is computed again.
        def save(tensor: Tensor) -> tuple[Bookmark | None, Tensor]:
            return masks.bookmark(), tensor

        def fetch(saved: tuple[Bookmark | None, Tensor]) -> Tensor:
            masks.resume(saved[0])
            return saved[1]

        self._bookmarking = torch.autograd.graph.saved_tensors_hooks(save, fetch)
        self._bookmarking.__enter__()

    def leave(self, backbone: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.running = False
        if self._bookmarking is not None:
            self._bookmarking.__exit__()
            self._bookmarking = None


class _RunningStatistics:
    """Hooks around a batch norm that lend it copies of its running statistics while it is recomputed."""

    def __init__(self, passes: _Passes) -> None:
        self._passes = passes
        self._kept: dict[str, Tensor] = {}

    def set_aside(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if norm.training and not self._passes.running:
            self._kept = dict(norm.named_buffers(recurse=False))
            for name, buffer in self._kept.items():
                setattr(norm, name, buffer.clone())

    def put_back(self, norm: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        for name, buffer in self._kept.items():
            setattr(norm, name, buffer)
        self._kept = {}
