"""Linear classification of frozen features by SGD: one classifier, or a grid of them in one pass over the features.

Axes: B images, S tokens of a backbone, D features, C classes, L learning rates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_core.eval.layers import intermediate_layers

Batches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]
"""From an epoch to its batches: tokens [B, S, D] and labels [B]; of each epoch as many."""


@dataclass(frozen=True)
class Probe:
    """What a linear classifier sees of the tokens, and how fast it learns."""

    lr: float
    """At the first step, > 0."""
    num_blocks: int = 1
    """Class tokens of so many last blocks, next to each other."""
    avgpool: bool = False
    """And the averaged patches of the last block."""

    def inputs(self, tokens: Tensor) -> Tensor:
        """[B, S, D] -> [B, num_blocks * D], or [B, (num_blocks + 1) * D]."""
        first = tokens.shape[1] - 1 - self.num_blocks
        return tokens[:, first : tokens.shape[1] - (not self.avgpool)].flatten(1)


@torch.no_grad()
def probe_tokens(backbone: nn.Module, images: Tensor, num_blocks: int) -> Tensor:
    """What probes see of images [B, 3, H, W]: [B, S, D], S = `num_blocks` + 1, fp32.

    Class tokens of the last blocks, behind the backbone's last norm and the last block's at the end; then the averaged
    patches of the last block.

    Raises:
        ValueError: as `intermediate_layers` does, or the backbone has no class token.
    """
    outputs = intermediate_layers(backbone, images, num_blocks)
    tokens = [output.class_token for output in outputs if output.class_token is not None]
    if len(tokens) < num_blocks:
        raise ValueError(f"{type(backbone).__name__}: has no class token; probe its pooled features")
    return torch.stack([*tokens, outputs[-1].patches.mean(dim=(1, 2))], dim=1)


def pooled_tokens(features: Tensor) -> Tensor:
    """Pooled features [B, D] as the tokens [B, 2, D] of which `Probe(lr)` sees just these. No copy is made."""
    return features[:, None].expand(-1, 2, -1)


def shuffled_batches(tokens: Tensor, labels: Tensor, batch_size: int, seed: int = 0) -> Batches:
    """Batches of precomputed tokens [n, S, D], in an order by seed and epoch; the last may be smaller."""

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        for places in torch.randperm(len(tokens), generator=generator).to(tokens.device).split(batch_size):
            yield tokens[places], labels[places]

    return batches


class LinearProbes:
    """Linear classifiers that are trained at once, each as if it were alone.

    Softmax cross-entropy, SGD with momentum 0.9 and no weight decay; weights begin as normal numbers of deviation 0.01,
    the same for all probes of one input, biases at 0. The learning rate falls along a cosine to 0.

    Args:
        probes: Those with the same input share the products with it.
        classes: [C], the labels that there are, ascending.
        seed: Of the first weights.

    Source: `eval_linear.py` of DINO (arXiv 2104.14294); `eval/linear.py` of DINOv2 (arXiv 2304.07193).

    Raises:
        ValueError: no probe, the same one twice, or a learning rate out of range.
    """

    def __init__(self, probes: Sequence[Probe], classes: Tensor, seed: int = 0) -> None:
        if not probes or len(set(probes)) < len(probes):
            raise ValueError(f"probes: must be one or more, all different, not {list(probes)}")
        for probe in probes:
            if not (probe.lr > 0 and math.isfinite(probe.lr)) or probe.num_blocks < 1:
                raise ValueError(f"{probe}: must have lr > 0 and num_blocks >= 1")
        self.probes = list(probes)
        self._classes, self._seed = classes, seed
        ordered = sorted(probes, key=lambda probe: (probe.num_blocks, probe.avgpool))
        grouped = itertools.groupby(ordered, key=lambda probe: (probe.num_blocks, probe.avgpool))
        self._groups = [_Group(list(group)) for _, group in grouped]

    def fit(
        self, batches: Batches, num_epochs: int, num_steps: int, *, lr_by: Literal["step", "epoch"] = "step"
    ) -> None:
        """Train for `num_epochs` of `num_steps` batches each.

        Args:
            lr_by: Whether the learning rate changes at each step (DINOv2) or each epoch (DINO).

        Raises:
            ValueError: tokens of another shape than the probes see, or labels that are not among the classes.
        """
        for epoch in range(num_epochs):
            for step, (tokens, labels) in enumerate(batches(epoch)):
                progress = (epoch + (step / num_steps if lr_by == "step" else 0)) / num_epochs
                wanted = self._places(labels)
                for group in self._groups:
                    group.step(tokens, wanted, (1 + math.cos(math.pi * progress)) / 2, len(self._classes), self._seed)

    @torch.no_grad()
    def accuracies(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[Probe, float]:
        """Per cent of right answers of each probe; NaN for one whose weights are not finite any more."""
        correct = dict.fromkeys(self.probes, 0)
        total = 0
        for tokens, labels in batches:
            total += len(labels)
            for group in self._groups:
                winners = self._classes[group.logits(tokens).argmax(dim=2)]  # [B, L]
                for probe, hits in zip(group.probes, (winners == labels[:, None]).sum(dim=0).tolist(), strict=True):
                    correct[probe] += hits
        finite = {probe: ok for group in self._groups for probe, ok in zip(group.probes, group.finite(), strict=True)}
        return {probe: 100 * correct[probe] / total if finite[probe] else math.nan for probe in self.probes}

    def _places(self, labels: Tensor) -> Tensor:
        places = torch.searchsorted(self._classes, labels).clamp(max=len(self._classes) - 1)
        if not torch.equal(self._classes[places], labels):
            raise ValueError("labels: hold a class that is not among the classes of the probes")
        return places


class _Group:
    """Probes of one input: weights [L, C, D], which no probe shares with another."""

    def __init__(self, probes: list[Probe]) -> None:
        self.probes = probes
        self._weights = self._biases = self._weight_steps = self._bias_steps = torch.empty(0)

    def _begin(self, inputs: Tensor, num_classes: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        first = 0.01 * torch.randn(num_classes, inputs.shape[1], generator=generator)
        self._weights = first.to(inputs.device).repeat(len(self.probes), 1, 1)
        self._biases = inputs.new_zeros(len(self.probes), num_classes)
        self._weight_steps, self._bias_steps = torch.zeros_like(self._weights), torch.zeros_like(self._biases)
        self._lrs = torch.tensor([probe.lr for probe in self.probes], device=inputs.device)

    def logits(self, tokens: Tensor) -> Tensor:
        """[B, L, C]"""
        return self._logits(self._inputs(tokens))

    def _logits(self, inputs: Tensor) -> Tensor:
        num, num_classes, _ = self._weights.shape
        return torch.addmm(self._biases.flatten(), inputs, self._weights.flatten(0, 1).T).view(-1, num, num_classes)

    def _inputs(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 3 or tokens.shape[1] <= self.probes[0].num_blocks:
            raise ValueError(
                f"tokens {list(tokens.shape)}: must be [B, S, D] with S > {self.probes[0].num_blocks}, the blocks seen"
            )
        return self.probes[0].inputs(tokens)

    @torch.no_grad()
    def step(self, tokens: Tensor, places: Tensor, lr_share: float, num_classes: int, seed: int) -> None:
        """One step of SGD on the mean cross-entropy."""
        inputs = self._inputs(tokens)
        if not len(self._weights):
            self._begin(inputs, num_classes, seed)
        gradient = self._logits(inputs).softmax(dim=2)
        gradient -= F.one_hot(places, num_classes)[:, None]
        gradient /= len(inputs)  # of the logits, [B, L, C]
        self._weight_steps.mul_(0.9).add_((gradient.flatten(1).T @ inputs).view_as(self._weights))
        self._bias_steps.mul_(0.9).add_(gradient.sum(dim=0))
        lrs = lr_share * self._lrs
        self._weights.sub_(lrs[:, None, None] * self._weight_steps)
        self._biases.sub_(lrs[:, None] * self._bias_steps)

    def finite(self) -> list[bool]:
        return torch.isfinite(self._weights).flatten(1).all(dim=1).tolist()


def best_probe(accuracies: dict[Probe, float]) -> Probe:
    """The probe of the highest accuracy, of equal ones the first.

    Raises:
        ValueError: the weights of none are finite.
    """
    finite = {probe: accuracy for probe, accuracy in accuracies.items() if math.isfinite(accuracy)}
    if not finite:
        raise ValueError("no linear probe has finite weights at its end: lower learning rates are needed")
    return max(finite, key=lambda probe: finite[probe])
