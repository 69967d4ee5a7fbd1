from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from dino_core.backbones import build_backbone
from dino_core.config import ModelConfig
from dino_core.eval import eval_transform, extract_features

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / 5 + c) + np.cos(columns / 7 - c) for c in range(3)]
    return ((np.stack(waves, axis=-1) + 2) / 4 * 255).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(60, 80), (81, 47), (40, 40), (20, 31)])
@pytest.mark.parametrize(("size", "fraction"), [(28, 0.875), (32, 1.0)])
def test_transform_is_that_of_torchvision_on_pillow_images(height, width, size, fraction):
    image = picture(height, width)
    expected = v2.Compose(
        [
            v2.Resize(round(size / fraction), interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(size),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )(Image.fromarray(image))
    found = eval_transform(image, size, fraction, MEAN, STD)
    assert found.shape == (3, size, size)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1.5 / 255 / min(STD)  # one level


def test_transform_rejects_what_is_not_a_picture():
    for image in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"must be \[H, W, 3\] of uint8"):
            eval_transform(image, 4, 1.0, MEAN, STD)
    with pytest.raises(ValueError, match="crop_fraction = 0"):
        eval_transform(picture(8, 8), 4, 0.0, MEAN, STD)


def test_features_are_of_the_eval_mode_and_modes_are_restored():
    backbone = build_backbone(ModelConfig(backbone="resnet10t", drop_path=0.0), 32).train()
    backbone.layer1.eval()
    modes = [module.training for module in backbone.modules()]
    statistics = backbone.state_dict()
    statistics = {name: value.clone() for name, value in statistics.items()}
    images = torch.randn(5, 3, 32, 32)
    features = extract_features(backbone, images.split(2))
    assert [module.training for module in backbone.modules()] == modes
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, statistics[name]), name
    assert features.shape == (5, 512)
    assert not features.requires_grad
    torch.testing.assert_close(features, backbone.eval()(images).detach(), rtol=1e-4, atol=1e-5)


def test_modes_are_restored_after_an_error():
    backbone = nn.Linear(3, 2).train()
    with pytest.raises(ValueError, match="at least one batch"):
        extract_features(backbone, [])
    with pytest.raises(RuntimeError):
        extract_features(backbone, [torch.zeros(1, 4)])
    assert backbone.training
