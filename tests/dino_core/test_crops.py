"""Multi-crop: boxes, fidelity to Pillow and torchvision, purity, the last step."""

from __future__ import annotations

import math
import pickle
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import functional as tv

from dino_core import colour, crops
from dino_core.config import CropsConfig
from dino_core.crops import MultiCrop, crop_boxes
from tests.dino_core.pictures import IDENTITY, first_photos, official_crop, psnr, smooth_image

LEVEL = 1 / (255 * 0.224)
"""One of 255 levels after normalisation, where it is largest."""
SMALL = {"global_size": 32, "local_size": 16, "num_local_crops": 3}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Boxes


def one_box(height: int, width: int, scale: tuple[float, float], draws: np.ndarray) -> tuple[int, int, int, int]:
    """torchvision's rules, one try after the other."""
    for area_draw, ratio_draw in zip(draws[:10], draws[10:20], strict=True):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * ratio_draw)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=6),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    st.integers(0, 2**32),
)
def test_boxes_follow_the_rules_and_lie_inside(sizes: list[tuple[int, int]], scale: list[float], seed: int) -> None:
    draws = np.random.default_rng(seed).random((len(sizes), 3, 22))
    boxes = crop_boxes(np.array(sizes), np.array([scale] * 3), draws)
    for image, (height, width) in enumerate(sizes):
        for crop in range(3):
            assert tuple(boxes[image, crop]) == one_box(height, width, tuple(scale), draws[image, crop])
            top, left, box_height, box_width = boxes[image, crop]
            assert top >= 0
            assert left >= 0
            assert box_height >= 1
            assert box_width >= 1
            assert top + box_height <= height
            assert left + box_width <= width


# Fidelity to Pillow


@pytest.mark.parametrize(
    ("height", "width", "size"), [(300, 400, 96), (37, 53, 64), (8, 8, 16), (1, 5, 8), (240, 3, 32)]
)
def test_crops_equal_pillows_resize_to_rounding(height: int, width: int, size: int) -> None:
    image = smooth_image(1, height, width)
    off = dict.fromkeys(("flip_prob", "jitter_prob", "grayscale_prob", "solarize_prob"), 0.0)
    config = CropsConfig(global_size=size, local_size=max(1, size // 2), num_local_crops=4, blur_prob=(0, 0, 0), **off)
    multi_crop = MultiCrop(config, seed=2)
    ids = np.arange(3)
    made = multi_crop.make([image] * 3, ids * 0, ids)
    plan = multi_crop.draw(np.array([[height, width]] * 3), ids * 0, ids)
    for row in range(3):
        for crop in range(6):
            name, place = ("global_crops", crop) if crop < 2 else ("local_crops", crop - 2)
            ours = made[name][row, place].transpose(1, 2, 0)
            theirs = official_crop(image, plan.boxes[row, crop], False, IDENTITY, ours.shape[0])
            assert np.abs(ours.astype(int) - theirs).max() <= 1
            assert psnr(ours, theirs) > 55


def check_pipeline(images: list[np.ndarray], config: CropsConfig, least: float, least_cut: float) -> None:
    """Signal-to-noise ratios in dB against Pillow with the same parameters: of all steps, and of cut and resize."""
    multi_crop = MultiCrop(config, seed=11)
    ids = np.arange(len(images))
    plan = multi_crop.draw(np.array([image.shape[:2] for image in images]), ids, ids)
    made = multi_crop.make(images, ids, ids)
    if config.device == "accelerator":
        cut = {name: made[name] for name in ("global_crops", "local_crops")}
        made = levels(multi_crop, made)
    else:
        cut = MultiCrop(replace(config, device="accelerator"), seed=11).make(images, ids, ids)
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    bias = []
    for row, image in enumerate(images):
        for crop in range(multi_crop.num_crops):
            name, place = ("global_crops", crop) if crop < 2 else ("local_crops", crop - 2)
            params, flip, box = plan.params[row, crop], bool(plan.flips[row, crop]), plan.boxes[row, crop]
            for step, ours, wanted in (("all", made, params), ("cut", cut, IDENTITY)):
                pixels = ours[name][row, place].transpose(1, 2, 0).astype(float)
                theirs = official_crop(image, box, flip, wanted, len(pixels))
                errors[name, step].append(float(np.mean((pixels - theirs) ** 2)))
                bias.append(np.mean(pixels - theirs))
    for (name, step), values in errors.items():
        assert 10 * math.log10(255**2 / np.mean(values)) > (least if step == "all" else least_cut), (name, step)
    assert abs(np.mean(bias)) < 0.1


def levels(multi_crop: MultiCrop, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `finish` makes of `arrays`, no longer normalised, as uint8 [B, crops, 3, H, W]."""
    batch = multi_crop.finish(arrays, "cpu")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (multi_crop.config.mean, multi_crop.config.std))
    groups = {"global_crops": batch.global_crops, "local_crops": batch.local_crops}
    return {
        name: ((crops * std + mean) * 255).round().byte().unflatten(0, (-1, batch.num_images)).transpose(0, 1).numpy()
        for name, crops in groups.items()
        if crops is not None
    }


@pytest.mark.parametrize(("device", "least"), [("cpu", 46), ("accelerator", 47)])
def test_the_whole_pipeline_is_faithful_on_photos(shared_data: Path, device: str, least: float) -> None:
    check_pipeline(first_photos(shared_data, 8), CropsConfig(device=device), least, 60)


@pytest.mark.parametrize(("device", "least"), [("cpu", 46), ("accelerator", 47)])
def test_the_whole_pipeline_is_faithful_on_synthetic_images(device: str, least: float) -> None:
    images = [smooth_image(seed, 120 + 10 * seed, 160) for seed in range(8)]
    check_pipeline(images, CropsConfig(global_size=96, local_size=48, num_local_crops=3, device=device), least, 60)


# Single operations


def test_strong_jitter_never_has_a_negative_factor() -> None:
    plan = MultiCrop(CropsConfig(brightness=2.0), 0).draw(np.full((500, 2), 9), np.zeros(500, np.int64), np.arange(500))
    assert plan.params[..., colour.BRIGHTNESS].min() >= 0
    assert plan.params[..., colour.BRIGHTNESS].max() > 2.8


def test_a_flip_is_a_flip() -> None:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[:, :4] = 255
    off = dict.fromkeys(("jitter_prob", "grayscale_prob", "solarize_prob"), 0.0)
    config = CropsConfig(
        global_size=8, num_local_crops=0, global_scale=(1, 1), blur_prob=(0, 0, 0), flip_prob=0.5, **off
    )
    multi_crop = MultiCrop(config, 0)
    ids = np.arange(20)
    crops = multi_crop.make([image] * 20, ids * 0, ids)["global_crops"]
    flips = multi_crop.draw(np.full((20, 2), 8), ids * 0, ids).flips
    whole = crops[..., 0].mean(axis=(2, 3)) < 128
    assert np.array_equal(whole, flips)
    assert 0 < flips.mean() < 1


# Purity


def random_images(n: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*rng.integers(8, 40, 2), 3), dtype=np.uint8) for _ in range(n)]


@pytest.mark.parametrize("device", ["cpu", "accelerator"])
def test_crops_do_not_depend_on_the_batch(device: str) -> None:
    config = CropsConfig(device=device, **SMALL)
    images, epochs, ids = random_images(12), np.arange(12) // 5, np.arange(100, 112)
    multi_crop = MultiCrop(config, seed=4)
    whole = multi_crop.make(images, epochs, ids)
    assert set(whole) == {"global_crops", "local_crops", *(["params"] if device == "accelerator" else [])}
    order = np.random.default_rng(1).permutation(12)
    shuffled = MultiCrop(config, seed=4).make([images[i] for i in order], epochs[order], ids[order])
    single = [multi_crop.make([images[i]], epochs[i : i + 1], ids[i : i + 1]) for i in range(12)]
    for name, arrays in whole.items():
        assert np.array_equal(arrays[order], shuffled[name])
        assert np.array_equal(arrays, np.concatenate([one[name] for one in single]))


def test_the_way_to_colour_small_crops_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images, ids = random_images(20), np.arange(20)
    multi_crop = MultiCrop(CropsConfig(**SMALL), seed=4)
    made = multi_crop.make(images, ids, ids)
    for small in (0, 1000):
        monkeypatch.setattr(crops, "_SMALL_SIDE", small)
        for name, arrays in multi_crop.make(images, ids, ids).items():
            assert np.array_equal(arrays, made[name])


def test_crops_depend_on_seed_epoch_and_sample() -> None:
    images, zero = random_images(1), np.zeros(1, np.int64)
    base = MultiCrop(CropsConfig(**SMALL), seed=0).make(images, zero, zero)["global_crops"]
    others = [
        MultiCrop(CropsConfig(**SMALL), seed=1).make(images, zero, zero),
        MultiCrop(CropsConfig(**SMALL), seed=0).make(images, zero + 1, zero),
        MultiCrop(CropsConfig(**SMALL), seed=0).make(images, zero, zero + 1),
    ]
    assert all(not np.array_equal(base, other["global_crops"]) for other in others)
    assert not np.array_equal(base[:, 0], base[:, 1])


def test_the_global_random_state_is_neither_used_nor_moved() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    images, zero = random_images(2), np.arange(2)
    first = MultiCrop(CropsConfig(**SMALL), seed=0).make(images, zero, zero)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    torch.manual_seed(1)
    again = pickle.loads(pickle.dumps(MultiCrop(CropsConfig(**SMALL), seed=0))).make(images, zero, zero)  # noqa: S301
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_fewer_local_crops_leave_the_others_as_they_are() -> None:
    images, ids = random_images(3), np.arange(3)
    many = MultiCrop(CropsConfig(**{**SMALL, "num_local_crops": 5}), seed=0).make(images, ids, ids)
    few = MultiCrop(CropsConfig(**SMALL), seed=0).make(images, ids, ids)
    assert np.array_equal(many["global_crops"], few["global_crops"])
    assert np.array_equal(many["local_crops"][:, :3], few["local_crops"])


# The last step


@pytest.mark.parametrize("side", [16, 61])
def test_finish_gives_the_same_whether_the_tail_ran_here_or_there(side: int) -> None:
    images, ids = random_images(9), np.arange(9)
    here = MultiCrop(CropsConfig(device="cpu", **{**SMALL, "global_size": side}), seed=0)
    there = MultiCrop(CropsConfig(device="accelerator", **{**SMALL, "global_size": side}), seed=0)
    a, b = here.finish(here.make(images, ids, ids), "cpu"), there.finish(there.make(images, ids, ids), "cpu")
    assert a.num_images == b.num_images == 9
    assert a.local_crops is not None
    assert b.local_crops is not None
    for ours, theirs in ((a.global_crops, b.global_crops), (a.local_crops, b.local_crops)):
        assert (ours - theirs).abs().max() <= 1.01 * LEVEL
        assert (ours != theirs).float().mean() < 1e-4  # ties of the blur


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_finish_gives_the_same_on_an_accelerator() -> None:
    images, ids = random_images(64), np.arange(64)
    there = MultiCrop(CropsConfig(device="accelerator", **SMALL), seed=0)
    arrays = there.make(images, ids, ids)
    a, b = there.finish(arrays, "cpu"), there.finish(arrays, "cuda")
    assert (a.global_crops - b.global_crops.cpu()).abs().max() <= 1.01 * LEVEL


def test_finish_is_crop_major_and_normalised() -> None:
    config = CropsConfig(**SMALL)
    multi_crop = MultiCrop(config, seed=0)
    images, ids = random_images(4), np.arange(4)
    arrays = multi_crop.make(images, ids, ids)
    batch = multi_crop.finish({name: torch.from_numpy(array) for name, array in arrays.items()}, "cpu")
    assert batch.global_crops.shape == (8, 3, 32, 32)
    assert batch.global_crops.dtype == torch.float32
    assert batch.global_crops.is_contiguous()
    assert batch.local_crops is not None
    assert batch.local_crops.shape == (12, 3, 16, 16)
    for row in range(4):
        for crop in range(3):
            pixels = torch.from_numpy(arrays["local_crops"][row, crop])
            expected = tv.normalize(pixels.float() / 255, list(config.mean), list(config.std))
            torch.testing.assert_close(batch.local_crops[crop * 4 + row], expected, rtol=0, atol=2e-6)


def test_finish_without_local_crops_and_inside_autocast() -> None:
    config = CropsConfig(global_size=16, num_local_crops=0, device="accelerator")
    multi_crop = MultiCrop(config, seed=0)
    images, ids = random_images(5), np.arange(5)
    arrays = multi_crop.make(images, ids, ids)
    assert set(arrays) == {"global_crops", "params"}
    plain = multi_crop.finish(arrays, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = multi_crop.finish(arrays, "cpu")
    assert plain.local_crops is None
    assert torch.equal(plain.global_crops, autocast.global_crops)


def test_read_only_images_are_accepted_and_others_refused() -> None:
    image = random_images(1)[0]
    image.flags.writeable = False
    zero = np.zeros(1, np.int64)
    multi_crop = MultiCrop(CropsConfig(**SMALL), seed=0)
    multi_crop.make([image], zero, zero)
    for bad in (image[..., :2], image.astype(np.float32), image[:0], image[:, :, 0]):
        with pytest.raises(ValueError, match="uint8 \\[height, width, 3\\]"):
            multi_crop.make([bad], zero, zero)
