"""Parameter groups, optimisers and gradient clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dino_core.config import OptimConfig


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters: first those with weight decay, then biases and 1-D ones without.

    Class token, position embeddings and prototypes are decayed, as in the authors' DINO code.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (free if name.endswith(".bias") or parameter.dim() == 1 else decayed).append(parameter)
    return [{"params": decayed}, {"params": free, "weight_decay": 0.0}]


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step for each matrix is scaled to its own length.

    ::

        g = grad + weight_decay * w            (1-D: g = grad)
        g = g * eta * |w| / |g|                (1-D, or a norm of 0: unchanged)
        mu = momentum * mu + g
        w = w - lr * mu

    Source: You et al. (arXiv 1708.03888), algorithm 1, with the exemptions of Barlow Twins (arXiv 2103.03230).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        assert closure is None, "LARS takes no closure"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.dim() != 1:
                    update = update.add(parameter, alpha=group["weight_decay"])
                    length, update_length = parameter.norm(), update.norm()
                    ratio = group["eta"] * length / update_length
                    update = update * torch.where((length > 0) & (update_length > 0), ratio, 1.0)
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                parameter.add_(state["momentum_buffer"].mul_(group["momentum"]).add_(update), alpha=-group["lr"])
        return None


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser over `parameter_groups`; learning rate and weight decay are set before each step."""
    groups = parameter_groups(model)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    return LARS(groups)


def set_hyperparameters(
    optimizer: torch.optim.Optimizer, lr: float, weight_decay: float, *, freeze_last_layer: bool = False
) -> None:
    """The learning rate of all groups, the weight decay of the first."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay


@torch.no_grad()
def clip_gradients_(student: nn.Module, max_norm: float | None, mode: str) -> Tensor:
    """Scale down, in place, each parameter's gradient whose L2 norm exceeds `max_norm`: each on its own, unlike
    `torch.nn.utils.clip_grad_norm_`. Nothing is read back from the device.

    Returns:
        [], the L2 norm of all gradients together, before clipping.
    """
    gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    norms = torch._foreach_norm(gradients)
    if max_norm is not None:
        factors = (max_norm / (torch.stack(norms) + 1e-6)).clamp_(max=1.0)
        torch._foreach_mul_(gradients, list(factors))
    return torch.linalg.vector_norm(torch.stack(norms))


def cancel_last_layer_gradients_(head: nn.Module) -> None:
    """Leave the prototypes out of the next optimiser step: no update, no weight decay, no moments."""
    last_layer = head.last_layer
    if last_layer is None:
        return
    assert isinstance(last_layer, nn.Module)
    for parameter in last_layer.parameters():
        parameter.grad = None
