"""The suite `linear`: linear classifiers by SGD on frozen features, a grid of them in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from dino_core.config import ConfigError, number
from orchestrator.errors import RunFailed
from orchestrator.evaluate.few_labels import FewLabels, check_few_labels, choose
from orchestrator.evaluate.suite import SuiteResult

if TYPE_CHECKING:
    from torch import Tensor

    from dino_core.eval.linear import Batches, Probe
    from orchestrator.evaluate.features import Images
    from orchestrator.evaluate.job import Job


@dataclass(frozen=True, kw_only=True)
class LinearOptions(FewLabels):
    """Linear probes of DINO (arXiv 2104.14294, section 4.1) and DINOv2 (arXiv 2304.07193, section 7)."""

    path: ClassVar[str] = "linear"

    lr: tuple[float, ...] = number((1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1), gt=0)
    """Learning rates at the first step, a probe for each; the default is DINOv2's grid."""
    blocks: tuple[int, ...] = number((1, 4), ge=1)
    """Last blocks whose class tokens a probe sees, probes for each."""
    avgpool: Literal["with", "without", "both"] = "both"
    """Whether a probe sees the averaged patches of the last block too; `both`: probes with and without."""
    epochs: int = number(30, ge=1)
    """Passes over the training images; DINO takes 100 and DINOv2 ten of ImageNet."""
    batch_size: int = number(256, ge=1)
    """Images per step."""
    scale_lr: bool = True
    """Whether learning rates are for 256 images per step, as the papers' are, or are taken as they are."""
    lr_by: Literal["step", "epoch"] = "step"
    """When the learning rate moves along its cosine: at each step (DINOv2) or each epoch (DINO)."""
    select: Literal["validation", "test"] = "validation"
    """Which images choose among the probes: training images that are held out, or the test images, as in the papers."""
    validation_share: float = number(0.1, gt=0, le=0.9)
    """Share of each class's training images that is held out where several probes are chosen from."""
    augment: bool = False
    """Random resized crops and flips, new ones each epoch: the backbone sees every image in every epoch."""
    crop_scale: tuple[float, float] = number((0.08, 1.0), gt=0, le=1)
    """Augmentation: smallest and largest share of the image's area."""
    seed: int = number(0, ge=0)
    """Of first weights, order, augmentation and what is held out."""

    def _problems(self) -> list[str]:
        problems = super()._problems()
        for name in ("lr", "blocks"):
            values = getattr(self, name)
            if len(set(values)) < max(1, len(values)):
                problems.append(f"{name} = {list(values)}: must be one or more different values")
        if self.crop_scale[0] > self.crop_scale[1]:
            problems.append(f"crop_scale = {list(self.crop_scale)}: the first value must not exceed the second")
        return problems


class Linear:
    """Metrics `top1` of the probe that was chosen and `top1_best_on_test`, per cent; a table of all probes."""

    name = "linear"
    options = LinearOptions

    def check(self, job: Job, options: LinearOptions) -> None:
        job.check_labelled(self.name)
        check_few_labels(job, options)
        if _has_class_token(job):
            _check_blocks(job, max(options.blocks))

    def run(self, job: Job, options: LinearOptions, folder: Path) -> SuiteResult:
        from dino_core.eval.linear import LinearProbes, best_probe

        num_blocks = max(options.blocks) if _has_class_token(job) else 0
        probes = _grid(options, pooled=not num_blocks)
        parts = {"train": job.images("train"), "test": job.images("test")}
        parts["train"] = _some(parts["train"], choose(_labels(parts["train"]), options))
        by_validation = options.select == "validation" and len(probes) > 1
        if by_validation:
            parts |= _held_out(parts["train"], options)
        batches, labels, num_steps = _training(job, parts["train"], options, num_blocks)
        trained = LinearProbes(list(probes), labels.unique(), options.seed)
        trained.fit(batches, options.epochs, num_steps, lr_by=options.lr_by)
        found = {
            name: trained.accuracies(_in_order(job, images, num_blocks, options.batch_size))
            for name, images in parts.items()
            if name != "train"
        }
        try:
            chosen, best = best_probe(found["validation" if by_validation else "test"]), best_probe(found["test"])
        except ValueError as error:
            raise RunFailed(f"linear.lr = {list(options.lr)}: {error}") from error
        rows = [
            {"lr": lr, "blocks": probe.num_blocks if num_blocks else None, "avgpool": probe.avgpool}
            | {f"{name}_top1": accuracies[probe] for name, accuracies in found.items()}
            | {"chosen": probe == chosen}
            for probe, lr in probes.items()
        ]
        metrics = {"top1": found["test"][chosen], "top1_best_on_test": found["test"][best]}
        return SuiteResult(
            metrics=metrics,
            tables={"probes": rows},
            notes=tuple(_notes(job, options, probes, found["test"], num_blocks)),
        )


def _grid(options: LinearOptions, *, pooled: bool) -> dict[Probe, float]:
    """The probes, with the learning rates that were asked for."""
    from dino_core.eval.linear import Probe

    scale = options.batch_size / 256 if options.scale_lr else 1.0
    pools = {"with": (True,), "without": (False,), "both": (False, True)}[options.avgpool]
    inputs = [(1, False)] if pooled else [(blocks, pool) for blocks in options.blocks for pool in pools]
    return {Probe(lr * scale, blocks, pool): lr for blocks, pool in inputs for lr in options.lr}


def _notes(
    job: Job, options: LinearOptions, probes: dict[Probe, float], found: dict[Probe, float], num_blocks: int
) -> Iterator[str]:
    if not num_blocks:
        yield f"{job.target.architecture} has no class token: the probes see its pooled features"
    if options.select == "test" and len(probes) > 1:
        yield f"top1 is the best of {len(probes)} probes on the test images, as in the papers, and so too high"
    if diverged := sum(math.isnan(accuracy) for accuracy in found.values()):
        yield f"{diverged} of {len(probes)} probes diverged"


def _has_class_token(job: Job) -> bool:
    """Whether the backbone gives class tokens of its blocks; else probes see pooled features."""
    import torch

    from dino_core.eval.layers import intermediate_layers

    size = job.target.image.size
    try:
        return intermediate_layers(job.target.backbone, torch.zeros(1, 3, size, size))[0].class_token is not None
    except ValueError:
        return False


def _check_blocks(job: Job, most: int) -> None:
    import torch

    from dino_core.eval.layers import intermediate_layers

    size = job.target.image.size
    try:
        intermediate_layers(job.target.backbone, torch.zeros(1, 3, size, size), most)
    except ValueError as error:
        raise ConfigError(f"linear.blocks = {most}: {str(error).partition(': ')[2]}") from error


def _labels(images: Images) -> Tensor:
    import torch

    assert images.split.labels is not None
    return torch.from_numpy(images.split.labels[images.ids])


def _some(images: Images, places: Tensor) -> Images:
    return replace(images, ids=images.ids[places.numpy()])


def _held_out(images: Images, options: LinearOptions) -> dict[str, Images]:
    """The training images without those that choose among probes, and these.

    Raises:
        RunFailed: There are too few.
    """
    from dino_core.eval.low_shot import hold_out

    try:
        fitted, held = hold_out(_labels(images), options.validation_share, options.seed)
    except ValueError as error:
        raise RunFailed(f"linear.validation_{error}; a larger share, or linear.select = test") from error
    return {"train": _some(images, fitted), "validation": _some(images, held)}


def _training(job: Job, images: Images, options: LinearOptions, num_blocks: int) -> tuple[Batches, Tensor, int]:
    """Batches of each epoch, the labels of all images that can be read, and steps per epoch."""
    from dino_core.eval.linear import shuffled_batches
    from orchestrator.evaluate.views_linear import AugmentedTokens, as_tokens, crop_and_flip

    if not options.augment:
        known = _tokens(job, images, num_blocks)
        batches = shuffled_batches(*known, options.batch_size, options.seed)
        return batches, known[1], -(-len(known[1]) // options.batch_size)
    crops = crop_and_flip(job.target.crops, options.crop_scale)

    def augmented(epoch: int) -> tuple[Tensor, Tensor]:
        found = job.features(images, AugmentedTokens(crops, epoch, options.seed, num_blocks), keep=False)
        return as_tokens(found.rows), found.labels

    first = augmented(0)

    def epochs(epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
        known = augmented(epoch) if epoch else first
        return shuffled_batches(*known, options.batch_size, options.seed)(epoch)

    return epochs, first[1], -(-len(first[1]) // options.batch_size)


def _in_order(job: Job, images: Images, num_blocks: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    tokens, labels = _tokens(job, images, num_blocks)
    return zip(tokens.split(batch_size), labels.split(batch_size), strict=True)


def _tokens(job: Job, images: Images, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Tokens [n, S, D] of the centre crops, and labels [n]."""
    from orchestrator.evaluate.views_linear import Tokens, as_tokens

    crop = job.centre_crop()
    view = Tokens(crop.size, crop.crop_fraction, crop.mean, crop.std, num_blocks) if num_blocks else crop
    found = job.features(images, view)
    return as_tokens(found.rows), found.labels


SUITE = Linear()
