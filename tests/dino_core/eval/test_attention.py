"""Attention maps against timm's unfused softmax and the authors' script; masks and their fit to objects."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from dino_core.eval.attention import (
    attention_maps,
    enlarge,
    has_attention_maps,
    mass_masks,
    mean_best_jaccard,
    object_jaccards,
)
from dino_core.eval.video import prepare_frame
from tests.dino_core.eval.videos import made_up_video, made_up_vit

SIDE, PATCH = 32, 8
IMAGES = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def vit(**settings: object) -> nn.Module:
    return made_up_vit(SIDE, SIDE, PATCH, **settings)


def by_timm(backbone: nn.Module, images: Tensor) -> Tensor:
    """[n, heads, t, t]: what timm's own attention hands to its dropout, when it does not use the fused kernel."""
    attention = backbone.blocks[-1].attn  # type: ignore[union-attr, index]
    seen: list[Tensor] = []
    attention.fused_attn = False
    handle = attention.attn_drop.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        backbone.eval()(images)
    handle.remove()
    attention.fused_attn = True
    return seen[0]


@pytest.mark.parametrize("settings", [{}, {"reg_tokens": 4}, {"qk_norm": True}, {"global_pool": "avg"}])
def test_attention_is_timms(settings: dict[str, object]) -> None:
    backbone = vit(**settings).train()
    first = attention_maps(backbone, IMAGES)
    assert first is not None
    assert backbone.training
    prefix = 1 + int(settings.get("reg_tokens", 0))  # type: ignore[call-overload]
    expected = by_timm(backbone, IMAGES)[:, :, 0, prefix:].reshape(3, 3, SIDE // PATCH, SIDE // PATCH)
    torch.testing.assert_close(first, expected)
    assert bool((first.sum(dim=(2, 3)) < 1).all())  # the rest is on the class token and the registers


@pytest.mark.parametrize("size", [(16, 40), (40, 16), (8, 8)])
def test_attention_of_other_sizes(size: tuple[int, int]) -> None:
    backbone = vit(dynamic_img_size=True)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    maps = attention_maps(backbone, images)
    assert maps is not None
    grid = (size[0] // PATCH, size[1] // PATCH)
    torch.testing.assert_close(maps, by_timm(backbone, images)[:, :, 0, 1:].unflatten(-1, grid))


def test_attention_of_compiled_backbones() -> None:
    """A hook on a part of compiled code would not be called."""
    plain = attention_maps(vit(), IMAGES)
    compiled = vit()
    compiled.compile(backend="eager")
    compiled.eval()(IMAGES)
    assert plain is not None
    found = attention_maps(compiled, IMAGES)
    assert found is not None
    torch.testing.assert_close(found, plain)


def test_kinds_without_attention_maps() -> None:
    backbones = [timm.create_model("resnet10t", pretrained=False, num_classes=0)]
    backbones += [vit(class_token=False, global_pool="avg"), nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 4))]
    for backbone in backbones:
        assert not has_attention_maps(backbone)
        assert attention_maps(backbone, IMAGES) is None
    assert has_attention_maps(vit())


def test_values_of_the_authors_script() -> None:
    """Masks of `visualize_attention.py` on the same image and weights, and their fit by the rule of issue 54."""
    frames, masks = made_up_video(1)
    maps = attention_maps(made_up_vit(), prepare_frame(frames[0], (64, 128), MEAN, STD)[None])
    assert maps is not None
    np.testing.assert_allclose(maps.sum(dim=(2, 3))[0], [0.9981532, 0.9601395, 0.9969951], atol=1e-5)
    expected = {
        0.6: ([17, 31, 23], [[0.3284950, 0.0, 0.1569482], [0.0, 0.1104088, 0.0391581]], 0.2194519),
        0.8: ([30, 59, 43], [[0.2008407, 0.0, 0.1419463], [0.0523946, 0.0944376, 0.0290293]], 0.1476392),
    }
    for mass, (patches, jaccards, mean) in expected.items():
        kept = mass_masks(maps, mass)[0]
        assert kept.sum(dim=(1, 2)).tolist() == patches
        found = object_jaccards(enlarge(kept, PATCH), masks[0])
        np.testing.assert_allclose(found, jaccards, atol=1e-6)
        assert mean_best_jaccard([found]) == pytest.approx(mean, abs=1e-6)


def test_masks_by_hand() -> None:
    maps = torch.tensor([[[0.1, 0.4], [0.2, 0.3]], [[0.5, 0.0], [0.0, 0.0]]])
    assert mass_masks(maps, 0.65).tolist() == [[[False, True], [False, True]], [[True, False], [False, False]]]
    assert mass_masks(maps, 0.75)[0].tolist() == [[False, True], [True, True]]
    assert mass_masks(maps, 1.0).tolist() == (maps > 0).tolist()
    assert torch.equal(mass_masks(maps / 7, 0.65), mass_masks(maps, 0.65))  # shares of the patches' own sum


def test_equal_attention_leaves_out_the_first_patches() -> None:
    kept = mass_masks(torch.full((1, 2, 4), 0.01), 0.55)  # 3 of 8 patches hold 0.375, 4 would hold 0.5
    assert kept.tolist() == [[[False, False, False, True], [True, True, True, True]]]


def test_no_attention_keeps_nothing() -> None:
    assert not mass_masks(torch.zeros(2, 3, 3), 1.0).any()


def test_void_and_empty_masks() -> None:
    truth = np.array([[1, 1, 0, 0], [255, 255, 4, 0]], dtype=np.uint8)
    heads = torch.tensor([[[1, 1, 0, 0], [1, 1, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]]], dtype=torch.bool)
    assert object_jaccards(heads, truth).tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert object_jaccards(heads, truth, ignore_void=False).tolist() == [[0.5, 0.0], [0.0, 0.0]]
    empty = object_jaccards(heads, np.zeros((2, 4), dtype=np.uint8))
    assert empty.shape == (0, 2)
    other = np.array([[0.2, 0.3]])
    # best heads of two objects 1 and 0; an image without objects does not count
    assert mean_best_jaccard([object_jaccards(heads, truth), empty, other]) == pytest.approx((0.5 + 0.3) / 2)
    with pytest.raises(ValueError, match="an object at least"):
        mean_best_jaccard([empty])


@pytest.mark.parametrize("mass", [0.0, -0.1, 1.5, float("nan")])
def test_refused_masses(mass: float) -> None:
    with pytest.raises(ValueError, match="must be > 0 and <= 1"):
        mass_masks(torch.ones(2, 2), mass)


def test_refused_maps_and_sizes() -> None:
    with pytest.raises(ValueError, match="must be finite"):
        mass_masks(torch.full((2, 2), float("nan")), 0.6)
    with pytest.raises(ValueError, match="must be of the size"):
        object_jaccards(torch.ones(1, 2, 2, dtype=torch.bool), np.ones((2, 3), dtype=np.uint8))
