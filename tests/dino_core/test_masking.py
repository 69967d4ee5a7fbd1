"""Masks against the authors' samplers, exact counts, and independence of workers and parts.

The numbers of the authors' code are of 10,000 masks each, made by `ImageFolderMask` of bytedance/ibot and by
`MaskingGenerator` with `collate_data_and_cast` (batches of 50 images) of facebookresearch/dinov2.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dino_core.config import MaskConfig
from dino_core.masking import Masks, draw_masks

NUM = 10_000


def statistics_of(masks: NDArray[np.bool_]) -> dict[str, float]:
    """Of masks [n, H, W]: share that masks anything and, of those, moments of the masked share, its deciles, how often
    a corner and a middle patch are masked, and edges between masked and other patches for each masked one."""
    some = masks[masks.any(axis=(1, 2))]
    shares = some.mean(axis=(1, 2))
    height, width = masks.shape[1:]
    edges = (some[:, 1:] != some[:, :-1]).sum(axis=(1, 2)) + (some[:, :, 1:] != some[:, :, :-1]).sum(axis=(1, 2))
    corners = some[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean()
    return {
        "masked": float(masks.any(axis=(1, 2)).mean()),
        "mean": float(shares.mean()),
        "std": float(shares.std()),
        "decile_1": float(np.quantile(shares, 0.1)),
        "median": float(np.quantile(shares, 0.5)),
        "decile_9": float(np.quantile(shares, 0.9)),
        "corner": float(corners),
        "middle": float(some[:, height // 2, width // 2].mean()),
        "edges": float((edges / some.sum(axis=(1, 2))).mean()),
    }


def drawn(config: MaskConfig, side: int, *, batch_size: int = 50, num: int = NUM) -> NDArray[np.bool_]:
    """[num, side, side]"""
    images = np.arange(batch_size)
    steps = range(num // (2 * batch_size))
    found = [draw_masks(config, (side, side), seed=0, step=s, batch_size=batch_size, images=images) for s in steps]
    return np.concatenate([masks.reshape(-1, side, side) for masks in found])


OFFICIAL = {
    "dinov2": (
        MaskConfig(),
        16,
        (0.5, 0.2977008, 0.1154656, 0.1367188, 0.296875, 0.4570313, 0.0385, 0.5246, 0.7408536),
    ),
    "ibot, mixed": (
        MaskConfig(sampler="ibot"),
        14,
        (0.5028, 0.2925677, 0.1171572, 0.1326531, 0.2908163, 0.4540816, 0.0304296, 0.5588703, 0.6453792),
    ),
    "ibot, fixed": (
        MaskConfig(sampler="ibot", prob=1.0, ratio=(0.3, 0.3)),
        14,
        (1.0, 0.2920832, 0.0062011, 0.2857143, 0.2959184, 0.2959184, 0.02975, 0.5814, 0.6150898),
    ),
    "ibot, random": (
        MaskConfig(sampler="ibot", shape="random"),
        14,
        (0.5039, 0.2975039, 0.1150579, 0.1377551, 0.2959184, 0.4591837, 0.2954951, 0.3050208, 2.6239478),
    ),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_masks_are_distributed_as_the_authors_are(name: str) -> None:
    """Differences of two samples of 10,000: about 5,000 masks for a moment, 20,000 patches for a corner."""
    config, side, official = OFFICIAL[name]
    found = statistics_of(drawn(config, side))
    # five standard errors of the difference, by the spreads that the statistics themselves tell
    allowed = {"masked": 0.035, "mean": 0.0115, "std": 0.006, "corner": 0.02, "middle": 0.05, "edges": 0.03}
    for key, expected in zip(found, official, strict=True):
        assert found[key] == pytest.approx(expected, abs=allowed.get(key, 0.03)), key
    if name == "ibot, fixed":
        assert found["mean"] == pytest.approx(official[1], abs=6e-4)
        assert found["std"] == pytest.approx(official[2], rel=0.1)


@pytest.mark.parametrize("prob", [0.5, 0.37, 1.0])
def test_the_sampler_of_dinov2_masks_an_exact_number_of_crops_with_evenly_spread_ratios(prob: float) -> None:
    config = MaskConfig(sampler="dinov2", shape="random", prob=prob, ratio=(0.1, 0.5))
    for step in range(5):
        masks = draw_masks(config, (10, 10), seed=3, step=step, batch_size=40, images=np.arange(40))
        counts = np.sort(masks.sum(axis=2).ravel())
        num = int(80 * prob)
        assert (counts > 0).sum() == num
        edges = 100 * np.linspace(0.1, 0.5, num + 1)
        assert (counts[80 - num :] >= np.floor(edges[:-1])).all()
        assert (counts[80 - num :] <= np.floor(edges[1:])).all()


@pytest.mark.parametrize("ratio", [0.1, 0.29, 0.5])
@pytest.mark.parametrize("sampler", ["ibot", "dinov2"])
def test_random_masks_have_the_exact_number_of_patches(sampler: Any, ratio: float) -> None:
    config = MaskConfig(sampler=sampler, shape="random", prob=1.0, ratio=(ratio, ratio))
    masks = draw_masks(config, (7, 7), seed=0, step=1, batch_size=20, images=np.arange(20))
    assert (masks.sum(axis=2) == int(49 * ratio)).all()
    assert masks.mean(axis=(0, 1)).min() > 0.05 or ratio < 0.2


@pytest.mark.parametrize("sampler", ["ibot", "dinov2"])
def test_block_masks_never_exceed_their_ratio_by_a_patch(sampler: Any) -> None:
    config = MaskConfig(sampler=sampler, prob=1.0, ratio=(0.3, 0.3))
    counts = draw_masks(config, (14, 14), seed=0, step=0, batch_size=100, images=np.arange(100)).sum(axis=2)
    assert counts.max() <= 0.3 * 196
    assert counts.mean() > 0.28 * 196


@pytest.mark.parametrize("shape", ["block", "random"])
@pytest.mark.parametrize("sampler", ["ibot", "dinov2"])
def test_masks_depend_on_nothing_but_seed_step_place_and_crop(sampler: Any, shape: Any) -> None:
    config = MaskConfig(sampler=sampler, shape=shape)

    def masks(seed: int, step: int, images: NDArray[np.int64]) -> NDArray[np.bool_]:
        return draw_masks(config, (8, 8), seed=seed, step=step, batch_size=12, images=images)

    whole = masks(1, 5, np.arange(12))
    parts = [masks(1, 5, np.arange(start, start + 4)) for start in (0, 4, 8)]
    assert np.array_equal(whole, np.concatenate(parts, axis=1))
    assert not np.array_equal(whole[0], whole[1])
    for other in (masks(2, 5, np.arange(12)), masks(1, 6, np.arange(12))):
        assert not np.array_equal(whole, other)


def test_a_part_of_the_share_has_the_patches_of_its_images() -> None:
    values = np.random.default_rng(0).random((2, 6, 9)) < 0.3
    values[:, 3] = False
    masks, device = Masks(values, "crops"), torch.device("cpu")
    whole = masks.part(0, 6, device)
    assert torch.equal(whole.mask, torch.from_numpy(values.reshape(12, 9)))
    assert torch.equal(whole.rows, whole.mask.flatten().nonzero().flatten())
    tokens = torch.arange(2 * 6 * 9).view(2, 6, 9)
    for first, num in ((0, 2), (2, 2), (3, 1), (4, 2)):
        rows = tokens[:, first : first + num].flatten()[masks.part(first, num, device).rows]
        assert torch.equal(whole.rows[masks.members(first, num, device)], rows)


@pytest.mark.parametrize("divisor", ["crops", "masked_crops", "masked_patches"])
def test_weights_are_those_of_the_divisor(divisor: Any) -> None:
    values = np.zeros((2, 2, 9), dtype=np.bool_)
    values[0, 0, :3] = values[1, 1, :6] = True
    weights = Masks(values, divisor).weights(torch.device("cpu"))
    expected = {
        "crops": [1 / 12] * 3 + [1 / 24] * 6,  # 4 crops, two of them with a mask
        "masked_crops": [1 / 6] * 3 + [1 / 12] * 6,
        "masked_patches": [1 / 9] * 9,
    }[divisor]
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_no_mask_at_all_has_no_weights() -> None:
    masks = dataclasses.replace(Masks(np.zeros((2, 3, 4), dtype=np.bool_), "crops"))
    assert masks.weights(torch.device("cpu")).shape == (0,)
    assert masks.part(0, 3, torch.device("cpu")).rows.shape == (0,)
