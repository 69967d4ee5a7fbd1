from __future__ import annotations

import pytest
import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from dino_core.stochastic_depth import (
    DepthMasks,
    StochasticDepth,
    adopt_stochastic_depth,
    depth_masks,
    remove_stochastic_depth,
)

CPU = torch.device("cpu")


def factors(
    seed: int = 1, step: int = 2, group: int = 0, *, crops: int = 2, images: int = 500, rate: float = 0.3
) -> Tensor:
    masks = DepthMasks()
    layers = [masks.add_layer(rate), masks.add_layer(rate)]
    masks.begin(seed, step, group, num_crops=crops, num_images=images, device=CPU)
    return torch.stack([masks.take(layer) for layer in (*layers, *layers)])  # [layers and calls, crops * images]


def test_the_same_coordinates_give_the_same_masks():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert torch.equal(factors(), factors())
    assert torch.equal(torch.get_rng_state(), before)


def test_every_coordinate_counts():
    rows = [*factors().unflatten(1, (2, 500)).flatten(0, 1)]  # layer, call, crop
    rows += [factors(seed=2)[0, :500], factors(step=3)[0, :500], factors(group=1)[0, :500]]
    for i, row in enumerate(rows):
        for other in rows[:i]:
            agreement = (row == other).float().mean().item()
            assert agreement == pytest.approx(0.7**2 + 0.3**2, abs=0.1)  # as of independent draws


def test_an_image_keeps_its_mask_in_a_larger_batch():
    small, large = factors(images=3).unflatten(1, (2, 3)), factors(images=8).unflatten(1, (2, 8))
    assert torch.equal(small, large[:, :, :3])


def test_a_part_of_the_share_has_the_masks_of_its_rows():
    masks = DepthMasks()
    layer = masks.add_layer(0.5)

    def take(num_images: int, **place: int) -> Tensor:
        masks.begin(1, 2, 0, num_crops=3, num_images=num_images, device=CPU, **place)
        return masks.take(layer).unflatten(0, (3, num_images))  # [crops, images]

    whole = take(12)
    parts = [take(4, first_image=first, share=12) for first in (0, 4, 8)]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert not torch.equal(parts[0], parts[1])
    assert torch.equal(take(12, share=12), whole)


def test_the_place_in_an_earlier_pass_can_be_taken_up_again():
    masks = DepthMasks()
    layers = [masks.add_layer(0.5), masks.add_layer(0.5)]
    masks.begin(1, 2, 0, num_crops=2, num_images=50, device=CPU)
    masks.take(layers[0])
    place = masks.bookmark()
    expected = [masks.take(layer) for layer in (layers[0], layers[1], layers[0])]
    masks.begin(1, 2, 1, num_crops=1, num_images=50, device=CPU)
    masks.take(layers[0])
    for _ in range(2):
        masks.resume(place)
        assert all(
            torch.equal(masks.take(layer), factors)
            for layer, factors in zip((layers[0], layers[1], layers[0]), expected, strict=True)
        )


def test_the_share_dropped_is_the_rate_and_the_mean_is_kept():
    drawn = factors(images=20_000)
    assert (drawn == 0).float().mean(dim=1).tolist() == pytest.approx([0.3] * 4, abs=0.01)
    assert drawn.max().item() == pytest.approx(1 / 0.7)
    assert drawn.mean().item() == pytest.approx(1, abs=0.01)


class Residual(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.drop = DropPath(rate)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.ones_like(x))


def test_layers_of_a_model_are_replaced_and_removed():
    model = nn.Sequential(Residual(0.0), Residual(0.5), Residual(0.9))
    adopt_stochastic_depth(model)
    masks = depth_masks(model)
    assert masks is not None
    layers = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    assert [layer.drop_prob for layer in layers] == [0.0, 0.5, 0.9]
    masks.begin(0, 0, 0, num_crops=2, num_images=4, device=CPU)
    expected = 1.0
    for layer in range(3):
        expected = expected + masks.take(layer)
    masks.begin(0, 0, 0, num_crops=2, num_images=4, device=CPU)
    torch.testing.assert_close(model(torch.ones(8, 1, 1))[:, 0, 0], expected)
    assert torch.equal(model.eval()(torch.ones(8, 1, 1)), torch.full((8, 1, 1), 4.0))
    remove_stochastic_depth(model)
    assert depth_masks(model.train()) is None
    assert torch.equal(model(torch.ones(8, 1, 1)), torch.full((8, 1, 1), 4.0))


def test_a_pass_without_its_step_is_an_error():
    masks = DepthMasks()
    layer = StochasticDepth(masks, 0.5)
    with pytest.raises(RuntimeError, match=r"before DepthMasks.begin"):
        layer(torch.ones(4, 1))
    masks.begin(0, 0, 0, num_crops=1, num_images=3, device=CPU)
    with pytest.raises(RuntimeError, match="4 rows, but masks were drawn for 3"):
        layer(torch.ones(4, 1))
