"""Projection heads, from features [n, D] to prototype logits [n, K] or embeddings, and predictors."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are `weight_g` times the direction of `weight_v`.

    Source: Salimans and Kingma (arXiv 1602.07868), equation 2.
    """

    def __init__(self, in_dim: int, out_dim: int, *, learn_length: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=learn_length)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        # the authors leave this layer as nn.Linear makes it; the scale counts for Adam although the direction does not
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        # the fused operator: three times faster here than dividing by the norm
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


def _mlp(
    in_dim: int, hidden_dim: int, out_dim: int, *, num_layers: int, batch_norm: bool, activation: str
) -> nn.Sequential:
    """Linear layers with batch norm and activation between them; weights of standard deviation 0.02, zero biases."""
    if num_layers < 1:
        raise ValueError(f"num_layers = {num_layers}: must be >= 1")
    layers: list[nn.Module] = []
    width = in_dim
    for _ in range(num_layers - 1):
        layers.append(nn.Linear(width, hidden_dim))
        if batch_norm:
            layers.append(nn.BatchNorm1d(hidden_dim))
        layers.append(_ACTIVATIONS[activation]())
        width = hidden_dim
    layers.append(nn.Linear(width, out_dim))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class DINOHead(nn.Module):
    """MLP, L2 normalisation, then weight-normed prototypes without bias.

    Features [n, in_dim] become logits [n, num_prototypes]; with `norm_last_layer` and `bottleneck_norm` these are
    cosines. Without prototypes the output is the bottleneck, [n, bottleneck_dim].

    Args:
        in_dim: D, width of the backbone's features.
        num_prototypes: K; None ends the head with the bottleneck.
        num_layers: linear layers of the MLP, >= 1.
        hidden_dim: width between them.
        bottleneck_dim: width of the last of them.
        norm_last_layer: keep the prototypes at unit length instead of learning their lengths.
        batch_norm: normalise each hidden layer over the batch.
        bottleneck_norm: L2-normalise the bottleneck.
        output_batch_norm: normalise the bottleneck over the batch, without scale and shift, before its L2 norm.
        activation: between the linear layers.

    Source: DINO (arXiv 2104.14294), section 3.1 and appendix C; batch norm on the output as in SimSiam
    (arXiv 2011.10566), section 3.

    Raises:
        ValueError: no layer.
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int | None = 65536,
        *,
        num_layers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
        batch_norm: bool = False,
        bottleneck_norm: bool = True,
        output_batch_norm: bool = False,
        activation: Literal["gelu", "relu"] = "gelu",
    ) -> None:
        super().__init__()
        self.mlp = _mlp(
            in_dim, hidden_dim, bottleneck_dim, num_layers=num_layers, batch_norm=batch_norm, activation=activation
        )
        self.output_norm = nn.BatchNorm1d(bottleneck_dim, affine=False) if output_batch_norm else None
        self.bottleneck_norm = bottleneck_norm
        self.last_layer = (
            None
            if num_prototypes is None
            else WeightNormLinear(bottleneck_dim, num_prototypes, learn_length=not norm_last_layer)
        )
        self.out_dim = bottleneck_dim if num_prototypes is None else num_prototypes

    def forward(self, features: Tensor, predictor: nn.Module | None = None) -> Tensor:
        """[n, in_dim] -> [n, out_dim]. A predictor maps the bottleneck [n, bottleneck_dim] to another like it."""
        x = self.embed(features, predictor)
        return x if self.last_layer is None else self.last_layer(x)

    def embed(self, features: Tensor, predictor: nn.Module | None = None) -> Tensor:
        """What stands in front of the prototypes: [n, in_dim] -> [n, bottleneck_dim]."""
        x = self.mlp(features)
        if self.output_norm is not None:
            x = self.output_norm(x)
        x = self._normalise(x)
        if predictor is not None:
            x = self._normalise(predictor(x))
        return x

    def _normalise(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.bottleneck_norm else x


class Prototypes(nn.Module):
    """A second layer of prototypes behind another head's bottleneck, as iBOT's code has it for patches.

    Embeddings [n, bottleneck_dim], of which `DINOHead.embed` makes them, become logits [n, num_prototypes].

    Source: iBOT (arXiv 2111.07832), the released code without `--shared_head`.
    """

    def __init__(self, bottleneck_dim: int, num_prototypes: int, *, norm_last_layer: bool = True) -> None:
        super().__init__()
        self.last_layer = WeightNormLinear(bottleneck_dim, num_prototypes, learn_length=not norm_last_layer)
        self.out_dim = num_prototypes

    def forward(self, embeddings: Tensor) -> Tensor:
        """[n, bottleneck_dim] -> [n, num_prototypes]."""
        logits: Tensor = self.last_layer(embeddings)
        return logits


class Predictor(nn.Module):
    """The student's own MLP, which BYOL and SimSiam put between their student's and their teacher's embedding.

    Source: BYOL (arXiv 2006.07733), section 3; SimSiam (arXiv 2011.10566), section 3.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_layers: int = 2,
        hidden_dim: int = 4096,
        batch_norm: bool = True,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.mlp = _mlp(dim, hidden_dim, dim, num_layers=num_layers, batch_norm=batch_norm, activation=activation)

    def forward(self, embeddings: Tensor) -> Tensor:
        """[n, dim] -> [n, dim]."""
        predicted: Tensor = self.mlp(embeddings)
        return predicted
