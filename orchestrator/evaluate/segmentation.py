"""The suite `segmentation`: how well what the class token attends to fits objects, and what patches look like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from dino_core.config import CheckedConfig, ConfigError, number
from orchestrator.errors import RunFailed
from orchestrator.evaluate.suite import SuiteResult

if TYPE_CHECKING:
    from torch import Tensor

    from dino_core.eval.attention import Sizes
    from orchestrator.evaluate.job import Job
    from orchestrator.evaluate.mask_layouts import Masked


@dataclass(frozen=True, kw_only=True)
class SegmentationOptions(CheckedConfig):
    """Masks of attention as in DINO (arXiv 2104.14294, figure 4), judged by its first author's rule."""

    path: ClassVar[str] = "segmentation"

    source: str | None = None
    """Images: a folder or a tar archive, path or URL; without `masks` in the layout of DAVIS."""
    masks: str | None = None
    """Folder or tar archive with a mask of the same stem for each image."""
    names: str | None = None
    """Text file with the stems of the images that are meant, a line each; None: all."""
    subset: str = "val"
    """DAVIS: the list of sequences, `ImageSets/<year>/<subset>.txt`."""
    year: str | None = None
    """DAVIS: of the list; None: 2017, else 2016."""
    resolution: str = "480p"
    """DAVIS: sub-folder of JPEGImages and Annotations."""
    sequences: tuple[str, ...] = ()
    """DAVIS: sequences; empty: all of the list."""
    num_images: int | None = number(None, ge=1)
    """A fixed random choice of images, of which a smaller one is a part; None: all."""
    size: int | None = number(480, ge=1)
    """Pixels of an image's shorter side as the backbone sees it; None: its own. What fills no patch is cut off."""
    shape: Literal["keep", "square"] = "keep"
    """Keep the image's shape, or make it `size` x `size`, as `visualize_attention.py` does unless told otherwise."""
    mass: tuple[float, ...] = number((0.6, 0.8), gt=0, le=1)
    """Shares of the attention that masks hold: 0.6 in the paper's figure, 0.8 in its appendix."""
    void: Literal["ignore", "background"] = "ignore"
    """Pixels of label 255: left out, or background, as in the author's code."""
    num_pictures: int = number(8, ge=0)
    """Images of which pictures are drawn."""

    def _problems(self) -> list[str]:
        problems = []
        if not self.mass:
            problems.append("mass = (): must hold one share at least")
        if self.shape == "square" and self.size is None:
            problems.append("size = none: must be a number for shape = square")
        if self.masks is None and self.names is not None:
            problems.append(
                "names: is for images with masks of the same stems, segmentation.masks; DAVIS has sequences"
            )
        return problems


class Segmentation:
    """Metrics, per cent, of each mass: `jaccard_60`, for each object the head that fits it best; `mean_map_jaccard_60`,
    the mean of the heads; `one_head_jaccard_60`, the head that is best for all; and `whole_image_jaccard`, a floor."""

    name = "segmentation"
    options = SegmentationOptions

    def check(self, job: Job, options: SegmentationOptions) -> None:
        from dino_core.eval.attention import has_attention_maps
        from dino_core.eval.masks import object_labels

        if not has_attention_maps(job.target.backbone):
            raise ConfigError(
                f"{job.target.name}: gives no attention of a class token; the suite segmentation needs a ViT of plain "
                "attention with a class token"
            )
        parts = _images(options)
        for part in parts:
            part.check_sizes(f"segmentation.source = {options.source}")
        if not any(object_labels(part.mask(place)) for part in parts for place in range(len(part))):
            raise ConfigError(f"segmentation.source = {options.source}: no mask holds an object")
        _check_sizes(job, options, parts)

    def run(self, job: Job, options: SegmentationOptions, folder: Path) -> SuiteResult:
        fits: dict[float, list[_Fit]] = {mass: [] for mass in options.mass}
        floors: list[float] = []
        rows: list[dict[str, Any]] = []
        num_drawn = num_empty = 0
        for part in _images(options):
            for sizes, maps, places in _attention(job, options, part):
                for heads, place in zip(maps, places, strict=True):
                    truth = _truth(part, place, sizes)
                    image = _Image(part, place, sizes, heads, truth)
                    found, floor = _fit(image, options)
                    if floor is None:
                        num_empty += 1
                    else:
                        floors.append(floor)
                        for mass, fit in found.items():
                            fits[mass].append(fit)
                        rows.append(_row(image, found))
                    if num_drawn < options.num_pictures:
                        _draw(job, options, image, folder / "pictures")
                        num_drawn += 1
        if not floors:
            raise RunFailed(f"segmentation.source = {options.source}: no image with an object can be read")
        metrics, heads_table = _summary(fits)
        metrics["whole_image_jaccard"] = 100 * float(np.mean(floors))
        notes = ["the truth chooses the head for each object, so jaccard_* grows with the number of heads"]
        if num_empty:
            notes.append(f"{num_empty} images without an object do not count")
        return SuiteResult(metrics=metrics, tables={"images": rows, "heads": heads_table}, notes=tuple(notes))


@dataclass(frozen=True)
class _Image:
    part: Masked
    place: int
    sizes: Sizes
    heads: Tensor
    """[heads, h, w]"""
    truth: NDArray[np.uint8]

    @property
    def name(self) -> str:
        return f"{self.part.name}/{self.part.stems[self.place]}".strip("/")


@dataclass(frozen=True)
class _Fit:
    """Jaccard of an image's objects at one mass."""

    heads: NDArray[np.float64]
    """[objects, heads]"""
    mean_map: NDArray[np.float64]
    """[objects, 1]"""


def _images(options: SegmentationOptions) -> list[Masked]:
    """Images in parts that are read alike: the sequences, or all of a folder."""
    from orchestrator.evaluate.mask_layouts import davis_sequences, image_mask_pairs

    if options.source is None:
        raise ConfigError("segmentation.source: must be given, a folder or tar archive of images")
    if options.masks is not None:
        parts = [image_mask_pairs("segmentation", options.source, options.masks, options.names)]
    else:
        try:
            parts = davis_sequences(
                "segmentation.source",
                options.source,
                subset=options.subset,
                year=options.year,
                resolution=options.resolution,
                chosen=options.sequences,
            )
        except ConfigError as error:
            raise ConfigError(f"{error}; or segmentation.masks must name the masks of a folder of images") from error
    return _choose(parts, options.num_images)


def _choose(parts: Sequence[Masked], limit: int | None) -> list[Masked]:
    from orchestrator.evaluation import fixed_choice

    ends = np.cumsum([len(part) for part in parts])
    chosen = fixed_choice(int(ends[-1]), limit)
    kept = []
    for part, end in zip(parts, ends.tolist(), strict=True):
        places = chosen[(chosen >= end - len(part)) & (chosen < end)] - (end - len(part))
        if len(places):
            kept.append(part.take(places.tolist()))
    return kept


def _check_sizes(job: Job, options: SegmentationOptions, parts: Sequence[Masked]) -> None:
    """Raise ConfigError unless the backbone takes the smallest and the largest of the images."""
    import torch

    from dino_core.eval.attention import attention_maps

    sizes = {_sizes(job, options, part, place).seen for part in parts for place in range(len(part))}
    for seen in {min(sizes, key=np.prod), max(sizes, key=np.prod)}:
        try:
            attention_maps(job.target.backbone, torch.zeros(1, 3, *seen))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"segmentation.size = {options.size}: {job.target.name} does not take {seen[1]} x {seen[0]} pixels: "
                f"{next(iter(str(error).splitlines()), type(error).__name__)}"
            ) from error


def _sizes(job: Job, options: SegmentationOptions, part: Masked, place: int) -> Sizes:
    from dino_core.eval.attention import image_sizes
    from dino_core.eval.layers import patch_size

    height, width = part.image_size(place)
    try:
        return image_sizes(
            height, width, options.size, patch_size(job.target.backbone), square=options.shape == "square"
        )
    except ValueError as error:
        raise ConfigError(f"segmentation.size = {options.size}: {part.images[place]}: {error}") from error


def _attention(job: Job, options: SegmentationOptions, part: Masked) -> list[tuple[Sizes, Tensor, list[int]]]:
    """Attention maps [n, heads, h, w] of the readable images, and which they are, by size."""
    from orchestrator.evaluate.views_dense import ImageAttention

    groups: dict[Sizes, list[int]] = {}
    for place in range(len(part)):
        groups.setdefault(_sizes(job, options, part, place), []).append(place)
    image = job.target.image
    found = []
    for sizes, places in groups.items():
        images = part.as_images(job.config.data.max_pixels, places)
        maps = job.features(images, ImageAttention(*sizes, image.mean, image.std))
        found.append((sizes, maps.rows, maps.ids.tolist()))
    return found


def _truth(part: Masked, place: int, sizes: Sizes) -> NDArray[np.uint8]:
    from dino_core.eval.attention import prepare_mask

    return prepare_mask(part.mask(place), sizes)


def _fit(image: _Image, options: SegmentationOptions) -> tuple[dict[float, _Fit], float | None]:
    """Of each mass; and the floor, None without an object."""
    import torch

    from dino_core.eval.attention import enlarge, mass_masks, mean_best_jaccard, object_jaccards

    ignore_void = options.void == "ignore"
    patch = image.sizes.seen[0] // image.heads.shape[1]

    def judged(maps: Tensor, mass: float) -> NDArray[np.float64]:
        return object_jaccards(enlarge(mass_masks(maps, mass), patch), image.truth, ignore_void=ignore_void)

    mean_map = image.heads.mean(dim=0, keepdim=True)
    fits = {mass: _Fit(judged(image.heads, mass), judged(mean_map, mass)) for mass in options.mass}
    whole = object_jaccards(torch.ones(1, *image.sizes.seen, dtype=torch.bool), image.truth, ignore_void=ignore_void)
    return fits, mean_best_jaccard([whole]) if len(whole) else None


def _row(image: _Image, fits: dict[float, _Fit]) -> dict[str, Any]:
    """An image, per cent."""
    from dino_core.eval.attention import mean_best_jaccard

    row: dict[str, Any] = {"image": image.name}
    for mass, fit in fits.items():
        row["objects"] = len(fit.heads)
        row[f"jaccard_{100 * mass:g}"] = 100 * mean_best_jaccard([fit.heads])
        row[f"mean_map_jaccard_{100 * mass:g}"] = 100 * mean_best_jaccard([fit.mean_map])
    return row


def _summary(fits: dict[float, list[_Fit]]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics, and a table of the heads by themselves."""
    from dino_core.eval.attention import mean_best_jaccard

    metrics: dict[str, float] = {}
    heads: list[dict[str, Any]] = []
    for mass, images in fits.items():
        name = f"jaccard_{100 * mass:g}"
        metrics[name] = 100 * mean_best_jaccard([fit.heads for fit in images])
        metrics[f"mean_map_{name}"] = 100 * mean_best_jaccard([fit.mean_map for fit in images])
        single = 100 * np.mean([fit.heads.mean(axis=0) for fit in images], axis=0)
        metrics[f"one_head_{name}"] = float(single.max())
        heads += [{"mass": mass, "head": head, "jaccard": float(value)} for head, value in enumerate(single)]
    return metrics, heads


def _draw(job: Job, options: SegmentationOptions, image: _Image, folder: Path) -> None:
    """Attention and masks by heads; principal components of the patches' features as colours."""
    import torch

    from dino_core.eval.attention import mass_masks
    from dino_core.eval.pictures import as_pixels, features_picture, masks_picture
    from orchestrator.evaluate.views_dense import ImagePatches
    from orchestrator.pictures import encode_png

    view = ImagePatches(*image.sizes, job.target.image.mean, job.target.image.std)
    images = image.part.as_images(job.config.data.max_pixels, [image.place])
    pixels = view.make(images.loader.load(images.split, image.place), image.place)
    (shown,) = as_pixels(pixels[None], view.mean, view.std)
    maps = torch.cat([image.heads.mean(dim=0, keepdim=True), image.heads])
    pictures = {
        "attention": masks_picture(shown, image.truth, image.heads, [mass_masks(maps, mass) for mass in options.mass]),
        "features": features_picture([shown], job.features(images, view).rows),
    }
    for kind, picture in pictures.items():
        path = folder / f"{image.name}-{kind}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(picture))


SUITE = Segmentation()
