from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from dino_core.eval.layers import intermediate_layers, patch_size


def vit(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}
    arguments = {"img_size": 32, "dynamic_img_size": True, **sizes, **more}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)


def images(height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", [True, False])
def test_blocks_are_those_of_a_forward_pass_done_by_hand(norm: bool) -> None:
    model: Any = vit(reg_tokens=3)
    model.train()
    outputs = intermediate_layers(model, images(), 2, norm)
    assert model.training
    model.eval()
    with torch.no_grad():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(images())))
        for index, block in enumerate(model.blocks):
            tokens = block(tokens)
            if index < 2:
                continue
            expected = model.norm(tokens) if norm else tokens
            output = outputs[index - 2]
            assert output.class_token is not None
            torch.testing.assert_close(output.class_token, expected[:, 0])
            torch.testing.assert_close(output.patches, expected[:, 4:].reshape(3, 4, 4, 24))
    if norm:
        assert outputs[-1].class_token is not None
        torch.testing.assert_close(outputs[-1].class_token, model(images()))


def test_images_need_not_be_square_nor_of_the_size_of_the_training() -> None:
    (output,) = intermediate_layers(vit(), images(40, 64))
    assert output.patches.shape == (3, 5, 8, 24)
    # Rows before columns: a patch that is changed is the one that answers most.
    changed = images(40, 64)
    changed[:, :, 8:16, 48:56] += 5
    (other,) = intermediate_layers(vit(depth=1), changed)
    (same,) = intermediate_layers(vit(depth=1), images(40, 64))
    difference = (other.patches - same.patches).norm(dim=-1)[0]
    assert divmod(int(difference.argmax()), 8) == (1, 6)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: timm.create_model("resnet18", num_classes=0), (3, 2, 2, 512)),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, img_size=64, window_size=2), None),
    ],
)
def test_a_backbone_that_is_no_vit_gives_its_last_map(model: Any, shape: tuple[int, ...] | None) -> None:
    backbone = model()
    (output,) = intermediate_layers(backbone, images(64, 64))
    assert output.class_token is None
    assert output.patches.shape == (shape or (3, 2, 2, backbone.num_features))
    pooled = backbone.eval()(images(64, 64))
    torch.testing.assert_close(output.patches.mean(dim=(1, 2)), pooled)


def test_patches_without_a_class_token() -> None:
    model = vit(class_token=False, global_pool="avg")
    (output,) = intermediate_layers(model, images())
    assert output.class_token is None
    assert output.patches.shape == (3, 4, 4, 24)


@pytest.mark.parametrize(
    ("model", "given", "n", "message"),
    [
        (vit, images(), 5, r"n = 5: must be >= 1 and <= 4, the blocks of this VisionTransformer"),
        (vit, images(), 0, r"n = 0: must be >= 1"),
        (vit, images(36, 32), 1, r"images of 36 x 32 pixels: VisionTransformer: .*36.* divisible by patch size"),
        (vit, images()[0], 1, r"images \[3, 32, 32\]: must be \[B, 3, H, W\]"),
        (lambda: vit(dynamic_img_size=False), images(40, 40), 1, "images of 40 x 40 pixels"),
        (lambda: timm.create_model("resnet18", num_classes=0), images(), 2, "n = 2: must be >= 1 and <= 1"),
        (lambda: nn.Sequential(nn.Flatten()), images(), 1, "Sequential: gives no map of patches"),
    ],
)
def test_what_cannot_be_given_is_said(model: Any, given: Tensor, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        intermediate_layers(model(), given, n)


def test_patch_size() -> None:
    assert patch_size(vit()) == 8
    assert patch_size(timm.create_model("resnet18", num_classes=0)) == 1
