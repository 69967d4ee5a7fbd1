"""The suite `video`: video object segmentation by carrying on the first frame's mask, in the layout of DAVIS."""

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
    from dino_core.eval.masks import ObjectScores
    from orchestrator.evaluate.job import Job
    from orchestrator.evaluate.mask_layouts import Masked

PREDICTIONS_DIR = "predictions"
_FEWEST_FRAMES = 3
_SHOWN_FRAMES = 5


@dataclass(frozen=True, kw_only=True)
class VideoOptions(CheckedConfig):
    """Label propagation as in DINO (arXiv 2104.14294, section 4.2.2), J and F as in DAVIS (arXiv 1704.00675)."""

    path: ClassVar[str] = "video"

    source: str | None = None
    """Videos in the layout of DAVIS: a folder or a tar archive, path or URL."""
    subset: str = "val"
    """The list of sequences, `ImageSets/<year>/<subset>.txt`."""
    year: str | None = None
    """Of the list; None: 2017, else 2016."""
    resolution: str = "480p"
    """Sub-folder of JPEGImages and Annotations."""
    sequences: tuple[str, ...] = ()
    """Sequences; empty: all of the list."""
    num_frames: int | None = number(None, ge=_FEWEST_FRAMES)
    """First frames of each sequence; None: all."""
    size: int = number(480, ge=1)
    """Pixels of a frame's shorter side as the backbone sees it, a multiple of the patch."""
    multiple: int = number(64, ge=1)
    """The longer side is rounded down to a multiple of this, itself one of the patch."""
    num_previous: int = number(7, ge=0)
    """Frames before the current one whose labels are used beside the first's."""
    radius: int | None = number(12, ge=0)
    """Patches up, down, left and right from which labels may come; None: any distance."""
    topk: int = number(5, ge=1)
    """Most similar patches, of all these frames, whose labels count."""
    temperature: float = number(0.1, gt=0)
    """A patch's label weighs exp(cosine similarity / temperature)."""
    first_mask: Literal["nearest", "area"] = "nearest"
    """The first mask by patches: the label of each one's middle, or the share of it that each object covers."""
    tolerance: float = number(0.008, gt=0, le=1)
    """Distance at which boundaries still agree, as a share of the diagonal."""
    pixels_patch: int = number(8, ge=1)
    """Side of the patches whose pixels are the features of the target `pixels`."""
    pictures: bool = True
    """Whether a strip of frames with the predicted masks is drawn for each sequence."""


class Video:
    """Metrics `j_and_f`, mean, recall and decay of J and F, and `first_mask_j_and_f`, the floor; per cent."""

    name = "video"
    options = VideoOptions

    def check(self, job: Job, options: VideoOptions) -> None:
        from dino_core.eval.masks import object_labels

        sequences = _sequences(options)
        for sequence in sequences:
            where = f"video.source = {options.source}: {sequence.name}"
            if len(sequence) < _FEWEST_FRAMES:
                raise ConfigError(
                    f"{where} has {len(sequence)} frames; must be {_FEWEST_FRAMES} at least, for neither the first nor "
                    "the last one counts"
                )
            sequence.check_sizes(where)
            sizes = {sequence.image_size(place) for place in range(len(sequence))}
            if len(sizes) > 1:
                raise ConfigError(f"{where} has frames of {len(sizes)} sizes; must be of one")
            if not object_labels(sequence.mask(0)):
                raise ConfigError(f"{where}: the first mask, {sequence.masks[0]}, holds no object")
        _check_patches(job, options, {sequence.image_size(0) for sequence in sequences})

    def run(self, job: Job, options: VideoOptions, folder: Path) -> SuiteResult:
        from dino_core.eval.masks import video_scores

        rows: list[dict[str, Any]] = []
        for sequence in _sequences(options):
            truth = [sequence.mask(place) for place in range(len(sequence))]
            predicted = _predict(job, options, sequence, truth[0])
            _write(folder, sequence, predicted, options, job.config.data.max_pixels)
            scores = video_scores(predicted, truth, tolerance=options.tolerance)
            floor = video_scores([truth[0]] * len(truth), truth, tolerance=options.tolerance)
            rows += [_row(sequence, *pair) for pair in zip(scores, floor, strict=True)]
        means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name not in _NAMES}
        return SuiteResult(metrics=means, tables={"objects": rows})


_NAMES = ("sequence", "object", "frames")


def _sequences(options: VideoOptions) -> list[Masked]:
    from orchestrator.evaluate.mask_layouts import davis_sequences

    if options.source is None:
        raise ConfigError("video.source: must be given, a folder or tar archive in the layout of DAVIS")
    return davis_sequences(
        "video.source",
        options.source,
        subset=options.subset,
        year=options.year,
        resolution=options.resolution,
        chosen=options.sequences,
        num_frames=options.num_frames,
    )


def _check_patches(job: Job, options: VideoOptions, sizes: set[tuple[int, int]]) -> None:
    """Raise ConfigError unless frames can be cut into patches, and the backbone gives features of them."""
    import torch

    from dino_core.eval.layers import intermediate_layers, patch_size

    is_pixels = job.target.kind == "pixels"
    patch = options.pixels_patch if is_pixels else patch_size(job.target.backbone)
    for name in ("size", "multiple"):
        value = getattr(options, name)
        if value % patch:
            near = [n for n in (value // patch * patch, (value // patch + 1) * patch) if n]
            raise ConfigError(
                f"video.{name} = {value}: must be a multiple of the patch size {patch}, such as "
                f"{' or '.join(map(str, near))}"
            )
    if is_pixels:
        return
    for size in {_resized(options, size) for size in sizes}:
        try:
            intermediate_layers(job.target.backbone, torch.zeros(1, 3, *size))
        except ValueError as error:
            raise ConfigError(
                f"{job.target.name}: gives no features of patches for the suite video: {error}"
            ) from error


def _resized(options: VideoOptions, size: tuple[int, int]) -> tuple[int, int]:
    from dino_core.eval.video import frame_size

    return frame_size(*size, options.size, options.multiple)


def _predict(job: Job, options: VideoOptions, sequence: Masked, first: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Masks of all frames, the given one first."""
    from dino_core.eval.masks import object_labels
    from dino_core.eval.video import frame_labels, patch_labels, propagate_labels
    from orchestrator.evaluate.views_dense import FramePatches

    image = job.target.image
    resized = _resized(options, first.shape)
    pixels = options.pixels_patch if job.target.kind == "pixels" else None
    found = job.features(
        sequence.as_images(job.config.data.max_pixels), FramePatches(resized, image.mean, image.std, pixels)
    )
    if found.left_out:
        place, reason = next(iter(found.left_out.items()))
        raise RunFailed(f"{sequence.folder.address}/{sequence.images[place]} cannot be read: {reason}")
    labels = object_labels(first)
    grid = found.rows.shape[1], found.rows.shape[2]
    parameter = next(job.target.backbone.parameters(), found.rows)  # labels are carried where the backbone is
    shares = propagate_labels(
        (frame.to(parameter.device) for frame in found.rows),
        patch_labels(first, labels, grid, options.first_mask),
        num_previous=options.num_previous,
        radius=options.radius,
        topk=options.topk,
        temperature=options.temperature,
    )
    return [first, *(frame_labels(each, labels, resized, first.shape) for each in shares)]


def _row(sequence: Masked, found: ObjectScores, floor: ObjectScores) -> dict[str, Any]:
    """One object of a sequence, per cent."""
    row: dict[str, Any] = {"sequence": sequence.name, "object": found.label, "frames": len(sequence)}
    row["j_and_f"] = 50 * (found.region.mean + found.boundary.mean)
    for letter, measure in (("j", found.region), ("f", found.boundary)):
        row |= {f"{letter}_{name}": 100 * getattr(measure, name) for name in ("mean", "recall", "decay")}
    return row | {"first_mask_j_and_f": 50 * (floor.region.mean + floor.boundary.mean)}


def _write(
    folder: Path, sequence: Masked, predicted: Sequence[NDArray[np.uint8]], options: VideoOptions, max_pixels: int
) -> None:
    """The masks as palette PNGs in DAVIS's layout of results, and a strip of frames."""
    from dino_core.eval.pictures import labels_picture
    from orchestrator.evaluate.mask_layouts import write_mask
    from orchestrator.pictures import encode_png

    palette = sequence.palette(0)
    place = folder / PREDICTIONS_DIR / sequence.name
    place.mkdir(parents=True)
    for stem, mask in zip(sequence.stems, predicted, strict=True):
        write_mask(place / f"{stem}.png", mask, palette)
    if options.pictures:
        shown = np.unique(np.linspace(0, len(sequence) - 1, _SHOWN_FRAMES).round().astype(int)).tolist()
        images = sequence.as_images(max_pixels)
        frames = [images.loader.load(images.split, n) for n in shown]
        (folder / "pictures").mkdir(exist_ok=True)
        picture = labels_picture(frames, [predicted[n] for n in shown], palette)
        (folder / "pictures" / f"{sequence.name}.png").write_bytes(encode_png(picture))


SUITE = Video()
