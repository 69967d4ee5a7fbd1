"""Few labels: which images of each class a classifier may learn from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def choose_per_class(labels: Tensor, *, num: int | None = None, share: float | None = None, seed: int = 0) -> Tensor:
    """Places of some images of each class, ascending.

    Each class has a random order of its own, made from `seed`; the first of it are taken. So fewer images are a part of
    more, and a class's choice does not depend on the other classes.

    Args:
        labels: [n], integers >= 0.
        num: Images of each class, for n-per-class protocols; each class must have as many.
        share: In (0, 1]; of each class so much is taken, rounded to the nearest (halves up), and at least one image.
            The low-shot splits of ImageNet (1 %, 10 %) are lists of files of this kind.
        seed: Of the choice, >= 0.

    Raises:
        ValueError: no labels, both or neither of `num` and `share`, one of them out of range, or a class with fewer
            than `num` images.
    """
    if labels.dim() != 1 or len(labels) == 0:
        raise ValueError(f"labels {list(labels.shape)}: must be [n] with n >= 1")
    if (num is None) == (share is None):
        raise ValueError(f"num = {num}, share = {share}: one of them must be given")
    if num is not None and num < 1:
        raise ValueError(f"num = {num}: must be >= 1")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"share = {share}: must be > 0 and <= 1")
    chosen = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0].cpu()
        if num is not None and len(members) < num:
            raise ValueError(f"num = {num}: class {label} has {len(members)} images")
        order = np.random.default_rng([seed, label]).permutation(len(members))
        count = num if num is not None else max(1, int(len(members) * (share or 0) + 0.5))
        chosen.append(members[torch.from_numpy(order[:count])])
    return torch.cat(chosen).sort().values.to(labels.device)


def hold_out(labels: Tensor, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Places of training images and of validation images, both ascending.

    Of each class `share` is held out, rounded to the nearest (halves up), but never all of it; the choice is that of
    `choose_per_class`.

    Args:
        labels: [n], integers >= 0.
        share: > 0 and < 1.
        seed: Of the choice, >= 0.

    Raises:
        ValueError: share out of range, or so small that nothing is held out.
    """
    if not 0 < share < 1:
        raise ValueError(f"share = {share}: must be > 0 and < 1")
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0].cpu()
        order = np.random.default_rng([seed, label]).permutation(len(members))
        held[members[torch.from_numpy(order[: min(len(members) - 1, int(len(members) * share + 0.5))])]] = True
    if not held.any():
        raise ValueError(f"share = {share}: holds out none of {len(labels)} images of {len(labels.unique())} classes")
    return (~held).nonzero()[:, 0].to(labels.device), held.nonzero()[:, 0].to(labels.device)
