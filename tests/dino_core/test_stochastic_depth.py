from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from timm.layers.drop import DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dino_core.config import ConfigError
from dino_core.config_problems import depth_group_problems
from dino_core.stochastic_depth import (
    CropGroup,
    DepthMasks,
    Kept,
    StochasticDepth,
    adopt_stochastic_depth,
    depth_masks,
    remove_stochastic_depth,
)
from dino_core.sub_batch_depth import SubBatchDepth, drop_sub_batches
from tests.dino_core.points import BASE

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


# ------------------------------------------------------------------------------------------------------- sub-batches


def kept_rows(
    rate: float, *, crops: int = 2, images: int = 12, group_size: int | None = None, seed: int = 1, **place: int
) -> Kept:
    masks = DepthMasks()
    layer = masks.add_layer(rate)
    masks.keep_sub_batches(layer, group_size)
    masks.begin(seed, 2, 0, num_crops=crops, num_images=images, device=CPU, **place)
    return masks.choose(layer)


@pytest.mark.parametrize(
    ("rate", "count"),
    [(0.3, 16), (0.4, 14), (0.5, 12), (0.9, 2), (0.99, 1)],  # of 2 x 12: floor(24 * (1 - rate)), at least 1
)
def test_exactly_so_many_rows_are_kept(rate: float, count: int):
    rows, scale, layout = kept_rows(rate)
    assert layout is None
    assert len(rows) == len(set(rows.tolist())) == count
    assert rows.tolist() == sorted(rows.tolist())
    assert 0 <= rows[0] <= rows[-1] < 24
    torch.testing.assert_close(scale, torch.full((count,), 24 / count))


def test_the_count_is_exact_where_floating_point_is_not():
    assert len(kept_rows(0.9, crops=1, images=10).rows) == 1  # 10 * (1 - 0.9) is 0.9999999999999998


def test_every_row_is_kept_as_often_as_every_other_and_layers_choose_for_themselves():
    masks = DepthMasks()
    layers = [masks.add_layer(0.4) for _ in range(2000)]
    for layer in layers:
        masks.keep_sub_batches(layer, None)
    masks.begin(1, 2, 0, num_crops=2, num_images=5, device=CPU)
    chosen = torch.zeros(2000, 10)
    for layer in layers:
        chosen[layer, masks.choose(layer).rows] = 1
    assert chosen.mean(dim=0).tolist() == pytest.approx([0.6] * 10, abs=0.05)  # 4.6 standard deviations
    pairs = (chosen.T @ chosen / 2000)[~torch.eye(10, dtype=torch.bool)]
    assert pairs.tolist() == pytest.approx([0.6 * 5 / 9] * 90, abs=0.05)


def test_a_part_with_whole_groups_keeps_what_the_whole_batch_keeps():
    whole = kept_rows(0.4, crops=3, images=12, group_size=2).rows
    parts = []
    for first in (0, 4, 8):
        rows = kept_rows(0.4, crops=3, images=4, group_size=2, first_image=first, share=12).rows
        parts.append(rows // 4 * 12 + first + rows % 4)
    assert torch.equal(torch.cat(parts).sort().values, whole)
    of_groups = [int(((whole % 12) // 2 == group).sum()) for group in range(6)]
    assert of_groups == [3] * 6  # floor(3 crops * 2 images * 0.6)
    with pytest.raises(ValueError, match="3 images in a pass: must be a multiple of the 2 of a group"):
        kept_rows(0.4, images=3, group_size=2)


def test_the_same_coordinates_keep_the_same_rows_and_recomputation_does_too():
    assert torch.equal(kept_rows(0.5).rows, kept_rows(0.5).rows)
    assert not torch.equal(kept_rows(0.5).rows, kept_rows(0.5, seed=3).rows)
    masks = DepthMasks()
    layer = masks.add_layer(0.5)
    masks.keep_sub_batches(layer, None)
    masks.begin(1, 2, 0, num_crops=2, num_images=50, device=CPU)
    place = masks.bookmark()
    first, second = masks.choose(layer), masks.choose(layer)
    masks.begin(1, 3, 0, num_crops=2, num_images=50, device=CPU)
    masks.resume(place)
    assert torch.equal(masks.choose(layer).rows, first.rows)
    assert not torch.equal(first.rows, second.rows)


def test_a_packed_pass_draws_for_each_group_what_it_draws_alone():
    groups = [CropGroup(0, 2, 5), CropGroup(1, 3, 2)]
    masks = DepthMasks()
    plain, sub = masks.add_layer(0.3), masks.add_layer(0.5)
    masks.keep_sub_batches(sub, None)
    masks.begin_pass(1, 2, groups, num_images=4, device=CPU)
    factors, kept = masks.take(plain), masks.choose(sub)
    expected, rows, scales, first = [], [], [], 0
    for group in groups:
        masks.begin(1, 2, group.number, num_crops=group.num_crops, num_images=4, device=CPU)
        assert group.num_tokens is not None
        expected.append(masks.take(plain).repeat_interleave(group.num_tokens))
        alone = masks.choose(sub)
        tokens = torch.arange(group.num_crops * 4 * group.num_tokens).unflatten(0, (-1, group.num_tokens))
        rows.append(tokens[alone.rows].flatten() + first)
        scales.append(alone.scale.repeat_interleave(group.num_tokens))
        first += tokens.numel()
    assert torch.equal(factors, torch.cat(expected))
    assert torch.equal(kept.rows, torch.cat(rows))
    assert torch.equal(kept.scale, torch.cat(scales))
    assert kept.layout == ((4, 6), (5, 2))  # half of 8 and 12 crops


def block(rate: float = 0.5) -> tuple[Block, DepthMasks]:
    torch.manual_seed(0)
    module = Block(8, 2, drop_path=rate, init_values=0.5)
    backbone = nn.Sequential(module)
    adopt_stochastic_depth(backbone)
    drop_sub_batches(backbone, None)
    masks = depth_masks(backbone)
    assert masks is not None
    return module.train(), masks


def test_only_the_kept_rows_are_computed_and_change():
    module, masks = block()
    x, seen = torch.randn(6, 3, 8), []
    module.attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    module.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    masks.begin(1, 2, 0, num_crops=2, num_images=3, device=CPU)
    place = masks.bookmark()
    found = module(x)
    masks.resume(place)
    first, second = (masks.choose(layer).rows for layer in (0, 1))
    assert seen == [(3, 3, 8), (3, 3, 8)]
    expected = x.clone()
    expected[first] += 2 * module.ls1(module.attn(module.norm1(expected[first])))
    expected[second] += 2 * module.ls2(module.mlp(module.norm2(expected[second])))
    torch.testing.assert_close(found, expected)
    untouched = sorted(set(range(6)) - {*first.tolist(), *second.tolist()})
    assert torch.equal(found[untouched], x[untouched])


def test_the_expectation_of_a_branch_is_the_whole_branch():
    module, masks = block(0.5)
    module.mlp = nn.Identity()  # one branch: the next would see what this one has made
    module.norm2, module.ls2 = nn.Identity(), Zero()
    x = torch.randn(4, 3, 8)
    total = torch.zeros_like(x)
    with torch.no_grad():
        for step in range(2000):
            masks.begin(1, step, 0, num_crops=1, num_images=4, device=CPU)
            total += module(x)
        expected = module.eval()(x)
    torch.testing.assert_close(total / 2000, expected, atol=0.05, rtol=0)
    assert (expected - x).abs().max() > 0.2, "the branch does something"


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0


def test_at_a_rate_of_a_tenth_all_rows_are_computed():
    module = nn.Sequential(Block(8, 2, drop_path=0.1), Block(8, 2, drop_path=0.2))
    adopt_stochastic_depth(module)
    drop_sub_batches(module, None)
    kinds = [isinstance(layer, SubBatchDepth) for layer in module.modules() if isinstance(layer, StochasticDepth)]
    assert kinds == [False, False, True, True]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda: Residual(0.5), "1 of its branches with stochastic depth are not those of timm's Block"),
        (lambda: nn.Sequential(Residual(0.5), Block(8, 2, drop_path=0.5)), "1 of its branches"),
        (lambda: Block(8, 2, drop_path=0.1), "none of its branches has stochastic depth of more than 0.1"),
    ],
)
def test_a_network_without_such_blocks_is_an_error(module, reason):
    network = nn.Sequential(module())
    adopt_stochastic_depth(network)
    with pytest.raises(NotImplementedError, match=reason):
        drop_sub_batches(network, None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": {"drop_path": 0.1}}, "drop_path_mode = sub_batch: must be mask with drop_path = 0.1"),
        ({"model": {"drop_path_mode": "mask"}}, "drop_path_group_size = 2: must be none with drop_path_mode = mask"),
        ({"model": {"drop_path_group_size": 3}}, "drop_path_group_size = 3: must divide 8, the images of each pass"),
        (
            {"model": {"drop_path_group_size": None}, "accumulate_steps": 2},
            "None: must divide 4, the images of each pass",
        ),
    ],
)
def test_groups_that_a_pass_cannot_hold_are_refused(changes: dict[str, Any], reason: str):
    settings = {"drop_path": 0.3, "drop_path_mode": "sub_batch", "drop_path_group_size": 2} | changes.pop("model", {})
    model = dataclasses.replace(BASE.model, drop_path=0.3)
    with pytest.raises(ConfigError, match=reason):
        dataclasses.replace(BASE, model=dataclasses.replace(model, **settings), **changes)


def test_groups_that_the_workers_would_cut_are_a_problem():
    model = dataclasses.replace(BASE.model, drop_path=0.3, drop_path_mode="sub_batch", drop_path_group_size=4)
    config = dataclasses.replace(BASE, model=model)
    assert depth_group_problems(config, 2) == []
    (problem,) = depth_group_problems(config, 4)
    assert problem.startswith("model.drop_path_group_size = 4: must divide 2, the images of each pass of 4 workers")
