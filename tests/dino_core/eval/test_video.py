"""Label propagation: the authors' script on made-up frames, a loop over patches, edges, sizes of frames and masks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_core.eval.layers import intermediate_layers
from dino_core.eval.masks import video_scores
from dino_core.eval.video import (
    frame_labels,
    frame_size,
    patch_labels,
    pixel_features,
    prepare_frame,
    propagate_labels,
)
from tests.dino_core.eval.videos import made_up_video, made_up_vit

MEAN, STD = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)  # the script's, 0.228 instead of 0.229
PATCH = 8


@pytest.mark.parametrize(
    ("labels", "size", "options", "counts", "sums", "scores"),
    [
        (
            (1, 2),
            (64, 128),
            {"num_previous": 2, "radius": 3, "topk": 3},
            [[365, 328], [401, 439], [568, 423], [665, 652], [524, 508]],
            [[6.5176, 6.6503], [7.3514, 7.4295], [9.4733, 8.3305], [11.2546, 11.6447], [9.4941, 9.3370]],
            [[0.62273875, 0.55100103], [0.58666988, 0.49260462]],
        ),
        (
            (1, 2, 3),
            (64, 128),
            {},
            [[307, 253, 146], [336, 133, 65], [482, 227, 182], [623, 355, 36], [528, 285, 83]],
            [
                *([5.5773, 5.4430, 3.1443], [6.5967, 5.0456, 1.0159], [8.3330, 5.4310, 2.9524]),
                *([10.1710, 6.6982, 1.0462], [9.0261, 6.5902, 0.9120]),
            ],
            None,
        ),
        (
            (1, 2),
            (150, 321),  # resized for the backbone, and the masks back
            {"radius": 2},
            [[4218, 1194], [4508, 45], [3818, 1863], [3967, 1534]],
            [[12.5760, 3.9645], [13.5156, 0.4963], [11.6750, 6.5949], [12.3204, 5.0527]],
            [[0.83476374, 0.65343968], [0.25359185, 0.12827050]],
        ),
    ],
    ids=["two objects", "defaults of the paper", "another size"],
)
def test_values_of_the_authors_script(
    labels: tuple[int, ...],
    size: tuple[int, int],
    options: dict[str, int],
    counts: list[list[int]],
    sums: list[list[float]],
    scores: list[list[float]] | None,
) -> None:
    """`eval_video_segmentation.py` and davis2017-evaluation on the same frames and weights.

    Soft labels agree to rounding. A pixel whose two largest ones are equal but for rounding may fall to either.
    """
    frames, masks = made_up_video(len(counts) + 1, *size, labels)
    seen = frame_size(*size, 64, 64)
    assert seen == (64, 128)
    grid = (seen[0] // PATCH, seen[1] // PATCH)
    soft = list(
        propagate_labels(features_of(frames, seen), patch_labels(masks[0], labels, grid), **options)  # type: ignore[arg-type]
    )
    for shares, expected in zip(soft, sums, strict=True):
        torch.testing.assert_close(shares[1:].sum(dim=(1, 2)), torch.tensor(expected), atol=2e-4, rtol=0)
        torch.testing.assert_close(shares.sum(dim=0), torch.ones(grid))
    found = [frame_labels(shares, labels, seen, size) for shares in soft]
    numbers = np.array([[(mask == label).sum() for label in labels] for mask in found])
    assert abs(numbers - counts).max() <= 4
    if scores is not None:
        ours = [[score.region.mean, score.boundary.mean] for score in video_scores([masks[0], *found], masks)]
        np.testing.assert_allclose(ours, scores, rtol=0, atol=2e-3)


def features_of(frames: list[np.ndarray], size: tuple[int, int]) -> Iterator[Tensor]:
    backbone = made_up_vit(*size)
    for frame in frames:
        yield intermediate_layers(backbone, prepare_frame(frame, size, MEAN, STD)[None])[0].patches[0]


@pytest.mark.parametrize("topk", [1, 5, 1000])
@pytest.mark.parametrize("radius", [None, 0, 2, 12])
def test_patch_by_patch(radius: int | None, topk: int) -> None:
    """Of a size that is no multiple of the tiles, with few distinct features, so that many are equally similar."""
    generator = torch.Generator().manual_seed(0)
    height, width, num_previous, temperature = 9, 19, 2, 0.3
    kinds = torch.nn.functional.normalize(torch.randn(6, 5, generator=generator), dim=1)
    frames = [kinds[torch.randint(6, (height, width), generator=generator)] * 3 for _ in range(5)]
    first = torch.rand(3, height, width, generator=generator).softmax(dim=0)
    options = {"num_previous": num_previous, "radius": radius, "topk": topk, "temperature": temperature}
    found = list(propagate_labels(iter(frames), first, **options))  # type: ignore[arg-type]
    assert len(found) == 4
    labels = [first]
    for now in range(1, 5):
        sources = [0, *range(max(1, now - num_previous), now)]
        for y in range(height):
            for x in range(width):
                if (y + 2 * x + now) % 5:  # some of the places
                    continue
                candidates = []
                for source in sources:
                    for v in range(height):
                        for u in range(width):
                            if radius is None or (abs(v - y) <= radius and abs(u - x) <= radius):
                                candidates.append((source, v, u))
                places = tuple(torch.tensor(part) for part in zip(*candidates, strict=True))
                keys = torch.stack(frames)[places] / 3
                similarity = keys @ frames[now][y, x] / 3
                kept = similarity >= similarity.topk(min(topk, len(similarity))).values[-1] - 1e-6
                weights = (similarity[kept] / temperature).exp()
                values = torch.stack(labels)[places[0], :, places[1], places[2]][kept]
                torch.testing.assert_close(found[now - 1][:, y, x], weights @ values / weights.sum())
        labels.append(found[now - 1])


def test_only_the_frames_that_are_needed_are_asked_for() -> None:
    asked = []

    def frames() -> Iterator[Tensor]:
        for number in range(3):
            asked.append(number)
            yield torch.ones(2, 2, 4)

    labels = propagate_labels(frames(), torch.ones(1, 2, 2))
    next(labels)
    assert asked == [0, 1]
    assert list(propagate_labels([torch.ones(2, 2, 4)], torch.ones(1, 2, 2))) == []  # one frame


def test_features_that_tell_nothing_blur() -> None:
    """All sources are equally similar, and all of them count: no order decides."""
    first = torch.zeros(2, 3, 3)
    first[0] = 1
    first[:, 1, 1] = torch.tensor([0.0, 1.0])
    for features in (torch.ones(3, 3, 4), torch.zeros(3, 3, 4)):
        *_, last = propagate_labels([features] * 3, first, radius=None)
        torch.testing.assert_close(last[1], torch.full((3, 3), 1 / 9))


def test_small_temperatures_take_the_most_similar() -> None:
    features = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(0))
    first = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1)).softmax(dim=0)
    (labels,) = propagate_labels([features, features], first, temperature=1e-4)  # exp(1 / 1e-4) is no number
    torch.testing.assert_close(labels, first)


def test_an_object_smaller_than_a_patch() -> None:
    """Lost by the nearest pixel, kept by its area; once lost, no frame has it."""
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[0:2, 0:4] = 5
    assert patch_labels(mask, [5], (2, 2))[1].sum() == 0
    area = patch_labels(mask, [5], (2, 2), "area")
    assert area[1].tolist() == [[8 / 64, 0], [0, 0]]
    torch.testing.assert_close(area.sum(dim=0), torch.ones(2, 2))
    (labels,) = propagate_labels([torch.ones(2, 2, 1)] * 2, patch_labels(mask, [5], (2, 2)))
    assert (frame_labels(labels, [5], (16, 16), (16, 16)) == 0).all()


def test_labels_keep_their_numbers_and_void_is_background() -> None:
    mask = np.zeros((4, 6), dtype=np.uint8)
    mask[:2, :2], mask[2:, 2:4], mask[:2, 4:] = 3, 200, 255
    shares = patch_labels(mask, [3, 200], (2, 3))
    assert shares.argmax(dim=0).tolist() == [[1, 0, 0], [0, 2, 0]]
    expected = np.where(mask == 255, 0, mask)
    assert (frame_labels(patch_labels(mask, [3, 200], (4, 6)), [3, 200], (4, 6), (4, 6)) == expected).all()


def test_equal_shares_go_to_the_first_class() -> None:
    assert (frame_labels(torch.full((3, 2, 2), 1 / 3), [4, 9], (8, 8), (8, 8)) == 0).all()
    shares = torch.tensor([[[0.0]], [[0.5]], [[0.5]]])
    assert (frame_labels(shares, [4, 9], (4, 4), (5, 7)) == np.full((5, 7), 4)).all()


@pytest.mark.parametrize(
    ("size", "short", "multiple", "expected"),
    [
        ((480, 854), 480, 64, (480, 832)),  # DAVIS at 480p
        ((480, 910), 480, 64, (480, 896)),
        ((854, 480), 480, 64, (832, 480)),
        ((480, 480), 480, 64, (480, 480)),
        ((1080, 1920), 224, 14, (224, 392)),
        ((100, 130), 64, 64, (64, 64)),
    ],
)
def test_sizes_of_frames(size: tuple[int, int], short: int, multiple: int, expected: tuple[int, int]) -> None:
    assert frame_size(*size, short, multiple) == expected


def test_pixel_features_are_the_pixels_of_a_patch() -> None:
    images = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    features = pixel_features(images, 4)
    assert features.shape == (2, 2, 3, 48)
    assert sorted(features[1, 1, 2].tolist()) == sorted(images[1, :, 4:8, 8:12].flatten().tolist())


@pytest.mark.parametrize(
    ("options", "features", "message"),
    [
        ({"topk": 0}, torch.ones(2, 2, 4), "topk = 0"),
        ({"radius": -1}, torch.ones(2, 2, 4), "radius = -1"),
        ({"temperature": 0.0}, torch.ones(2, 2, 4), r"temperature = 0\.0"),
        ({"num_previous": -1}, torch.ones(2, 2, 4), "num_previous = -1"),
        ({}, torch.ones(2, 3, 4), r"frame 0 \[2, 3, 4\]: must be \[2, 2, D\]"),
        ({}, torch.full((2, 2, 4), math.nan), "frame 0: must be finite"),
    ],
)
def test_refused(options: dict[str, float], features: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(propagate_labels([features], torch.ones(1, 2, 2), **options))  # type: ignore[arg-type]
