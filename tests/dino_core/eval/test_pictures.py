"""Pictures: colours against scikit-learn, tiles, which backbones have features."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from sklearn.decomposition import PCA
from torch import nn

from dino_core.config import CropsConfig
from dino_core.crops import MultiCrop
from dino_core.eval.pictures import (
    TILE,
    as_pixels,
    attention_picture,
    crops_picture,
    features_picture,
    masks_picture,
    patch_features,
    principal_colours,
)

SIDE, PATCH = 32, 8
IMAGES = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
WHITE = np.array([255, 255, 255], dtype=np.uint8)


def vit(name: str = "vit_tiny_patch16_224", **settings: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
        return timm.create_model(name, pretrained=False, **{**sizes, **settings})


@pytest.mark.parametrize(
    ("name", "size", "side", "width"),
    [("resnet10t", 64, 2, 512), ("convnext_atto", 64, 2, 320), ("swin_tiny_patch4_window7_224", 224, 7, 768)],
)
def test_convnets_and_swin_have_features(name: str, size: int, side: int, width: int) -> None:
    backbone = timm.create_model(name, pretrained=False, num_classes=0)
    images = torch.randn(1, 3, size, size)
    features = patch_features(backbone, images)
    assert features is not None
    assert features.shape == (1, side, side, width)
    with torch.no_grad():
        pooled = backbone.eval()(images)
    if name == "swin_tiny_patch4_window7_224":  # which axis is D, told by the mean that it pools
        torch.testing.assert_close(features.mean(dim=(1, 2)), pooled)


def test_features_of_other_kinds_are_left_out() -> None:
    assert patch_features(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 4)), IMAGES) is None


@pytest.mark.parametrize("registers", [0, 4])
def test_patch_features_are_the_tokens_in_rows_and_columns(registers: int) -> None:
    backbone = vit(reg_tokens=registers).eval()
    features = patch_features(backbone, IMAGES)
    assert features is not None
    assert features.shape == (3, SIDE // PATCH, SIDE // PATCH, 24)
    with torch.no_grad():
        tokens = backbone.forward_features(IMAGES)  # type: ignore[operator]
    torch.testing.assert_close(features[:, 1, 2], tokens[:, 1 + registers + 1 * (SIDE // PATCH) + 2])


def test_colours_are_scikit_learns_components() -> None:
    features = torch.randn(2, 5, 5, 12, generator=torch.Generator().manual_seed(1)) * torch.linspace(4, 0.5, 12)
    colours = principal_colours(features)
    assert (colours.shape, colours.dtype) == ((2, 5, 5, 3), np.uint8)
    found = PCA(3).fit_transform(features.flatten(0, 2).double().numpy())
    for index in range(3):
        low, high = np.quantile(found[:, index], [0.02, 0.98])
        expected = np.clip((found[:, index] - low) / (high - low), 0, 1) * 255
        ours = colours.reshape(-1, 3)[:, index].astype(float)
        assert min(abs(ours - expected).max(), abs(ours - (255 - expected)).max()) <= 1


def test_colours_without_components_are_grey() -> None:
    assert (principal_colours(torch.full((2, 3, 3, 8), 0.7)) == 128).all()
    line = torch.arange(9.0).view(1, 3, 3, 1) * torch.ones(8)
    colours = principal_colours(line)
    assert len(np.unique(colours[..., 0])) == 9
    assert (colours[..., 1:] == 128).all()


def test_pictures_are_rows_of_tiles() -> None:
    images = [np.full((SIDE, SIDE, 3), level, dtype=np.uint8) for level in (10, 200)]
    maps = torch.zeros(2, 3, 4, 4)
    maps[0, 1, 0, 3] = 0.5  # the second head of the first image looks at the top right patch
    picture = attention_picture(images, maps)
    assert picture.shape == (2 * TILE + 2, 5 * TILE + 4 * 2, 3)
    assert (picture[:TILE, :TILE] == 10).all()
    assert (picture[TILE + 2 :, :TILE] == 200).all()
    assert (picture[TILE : TILE + 2] == WHITE).all()
    head = picture[:TILE, 3 * (TILE + 2) : 3 * (TILE + 2) + TILE]
    quarter = TILE // 4
    brightest = round(0.6 * 253 + 0.4 * 10), round(0.6 * 231 + 0.4 * 10), round(0.6 * 37 + 0.4 * 10)
    darkest = round(0.6 * 68 + 0.4 * 10), round(0.6 * 1 + 0.4 * 10), round(0.6 * 84 + 0.4 * 10)
    assert abs(head[:quarter, -quarter:].astype(int) - brightest).max() <= 1
    assert abs(head[quarter:].astype(int) - darkest).max() <= 1


def test_tall_images_stay_tall() -> None:
    """Attention of a patch of 3 x 2 lies where it does in the image."""
    image = np.full((48, 32, 3), 100, dtype=np.uint8)
    maps = torch.zeros(1, 1, 3, 2)
    maps[0, 0, 2, 0] = 1
    picture = attention_picture([image], maps)
    width = TILE * 2 // 3
    assert picture.shape == (TILE, 3 * width + 4, 3)
    bright = (picture[:, width + 2 : 2 * width + 2].astype(int) - picture[0, width + 2]).any(axis=2)
    assert bright[TILE * 2 // 3 :, : width // 2].all()
    assert bright.sum() == TILE // 3 * width // 2
    assert features_picture([image], torch.randn(1, 3, 2, 5)).shape == (TILE, 2 * width + 2, 3)


def test_masks_are_what_stays_bright() -> None:
    image = np.full((64, 128, 3), 200, dtype=np.uint8)
    truth = np.zeros((64, 128), dtype=np.uint8)
    truth[:32, :64] = 7
    masks = torch.zeros(2, 4, 8, dtype=torch.bool)
    masks[1, 0, 7] = True
    picture = masks_picture(image, truth, torch.rand(1, 4, 8), [masks, ~masks])
    assert picture.shape == (3 * 96 + 2 * 2, 3 * 192 + 2 * 2, 3)
    row = picture[98 : 98 + 96]
    for tile, share in ((row[:, :192], 1 / 4), (row[:, 194:386], 0), (row[:, 388:], 1 / 32)):
        assert (tile == 200).all(axis=2).mean() == share
        assert set(np.unique(tile)) <= {50, 200}
    assert (picture[196:, 388:] == 200).all(axis=2).mean() == 31 / 32


def test_crops_are_those_of_multi_crop() -> None:
    config = CropsConfig(num_local_crops=3, global_size=2 * TILE, local_size=TILE)
    multi_crop = MultiCrop(config, seed=5)
    images = [np.random.default_rng(n).integers(0, 256, (150, 100 + 20 * n, 3), dtype=np.uint8) for n in range(2)]
    made = multi_crop.make(images, np.zeros(2, dtype=np.int64), np.array([7, 9]))
    picture = crops_picture(images, multi_crop.finish(made, "cpu"), config.mean, config.std)
    half = TILE // 2
    assert picture.shape == (2 * TILE + 2, 3 * (TILE + 2) + 3 * (half + 2) - 2, 3)
    # a global crop made half as large by torch, from the levels that went in
    pixels = torch.from_numpy(made["global_crops"][1, 1])[None].contiguous(memory_format=torch.channels_last)
    expected = torch.nn.functional.interpolate(pixels, size=(TILE, TILE), mode="bicubic", antialias=True)[0]
    found = picture[TILE + 2 :, 2 * (TILE + 2) : 2 * (TILE + 2) + TILE]
    assert abs(found.astype(int) - expected.permute(1, 2, 0).numpy()).max() <= 1
    # local crops are half as large, in the middle of their cells
    local = picture[TILE // 4 : TILE // 4 + half, 3 * (TILE + 2) : 3 * (TILE + 2) + half]
    assert local.astype(float).std() > 10
    assert (picture[: TILE // 4, 3 * (TILE + 2) :] == WHITE).all()


def test_normalising_is_undone() -> None:
    levels = torch.arange(256, dtype=torch.float32).repeat(3).view(1, 3, 16, 16) / 255
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalised = (levels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    (image,) = as_pixels(normalised, mean, std)
    assert (image.reshape(-1, 3) == np.arange(256)[:, None]).all()


def test_features_picture_has_an_image_and_its_colours() -> None:
    images = [np.full((SIDE, SIDE, 3), 90, dtype=np.uint8)]
    features = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(2))
    picture = features_picture(images, features)
    assert picture.shape == (TILE, 2 * TILE + 2, 3)
    side = TILE // 4
    patches = picture[:, TILE + 2 :].reshape(4, side, 4, side, 3)
    assert (patches == patches[:, :1, :, :1]).all()  # each patch of one colour
    assert (patches[:, 0, :, 0] == principal_colours(features)[0]).all()
    assert math.prod(np.unique(patches[:, 0, :, 0].reshape(-1, 3), axis=0).shape) > 3
