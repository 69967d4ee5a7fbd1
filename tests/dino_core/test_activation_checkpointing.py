from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from dino_core.activation_checkpointing import checkpoint_activations
from dino_core.batch_norm import use_global_batch_norm
from dino_core.stochastic_depth import adopt_stochastic_depth, depth_masks

VIT = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 32, "dynamic_img_size": True}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "ViT": ("vit_tiny_patch16_224", VIT, "blocks.2"),
    "ConvNeXt": ("test_convnext", {}, "stages.2.blocks.1"),
    "batch norm": ("resnet10t", {}, "layer4.0"),
    "fused batch norm": ("test_efficientnet", {}, "blocks.1.0"),
}
"""Model, arguments, and one of the blocks that timm recomputes."""


class Twice(nn.Module):
    """Each block asks its one stochastic depth for two masks."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.drop = nn.Linear(3, 3), timm.layers.DropPath(0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.drop(self.linear(x).sin())
            return x + self.drop(self.linear(x).cos())

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Block()
        self.checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.checkpointing = enable

    def forward(self, images: Tensor) -> Tensor:
        x = images.mean((2, 3))
        for _ in range(3):
            x = timm.models.checkpoint(self.block, x) if self.checkpointing else self.block(x)
        return x


def train(backbone: nn.Module) -> dict[str, Tensor]:
    """Features, gradients and buffers after two groups of crops, as a step has them."""
    masks = depth_masks(backbone)
    assert masks is not None
    features = []
    for group, (num_crops, size) in enumerate([(2, 64), (3, 32)]):
        images = torch.randn(num_crops * 4, 3, size, size, generator=torch.Generator().manual_seed(group))
        masks.begin(1, 2, group, num_crops=num_crops, num_images=4, device=torch.device("cpu"))
        features.append(backbone(images))
    together = torch.cat(features)
    together.square().sum().backward()
    grads = {f"{name}.grad": p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    return copy.deepcopy({"features": together.detach(), **backbone.state_dict(), **grads})


def check_the_same(plain: nn.Module, block: str) -> None:
    adopt_stochastic_depth(plain.train())
    checkpointed = copy.deepcopy(plain)
    checkpoint_activations(checkpointed)
    use_global_batch_norm(checkpointed)  # as with several workers: what is replaced loses its hooks
    copied = copy.deepcopy(checkpointed)
    calls = []
    checkpointed.get_submodule(block).register_forward_pre_hook(lambda *_: calls.append(1))
    first, second = train(plain), train(plain)  # gradients add up, running statistics move on
    assert calls == []
    for network in (checkpointed, copied):
        for expected in (first, second):
            found = train(network)
            assert found.keys() == expected.keys()
            different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
            assert different == []
    once = 3 if block == "block" else 1
    assert len(calls) == 2 * 2 * once * 2  # steps, groups, calls, each recomputed


@pytest.mark.parametrize("case", CASES)
def test_it_changes_no_number(case):
    name, arguments, block = CASES[case]
    torch.manual_seed(0)
    check_the_same(timm.create_model(name, num_classes=0, drop_path_rate=0.5, **arguments), block)


def test_masks_of_a_layer_that_is_used_often_stay_in_order():
    torch.manual_seed(0)
    check_the_same(Twice(), "block")


def test_running_statistics_move_once_in_norms_that_were_replaced_after_a_first_pass():
    torch.manual_seed(0)
    backbone = timm.create_model("resnet10t", num_classes=0).train()
    checkpoint_activations(backbone)
    backbone(torch.randn(4, 3, 32, 32))
    use_global_batch_norm(backbone)
    copy.deepcopy(backbone)(torch.randn(4, 3, 32, 32)).sum().backward()
    backbone(torch.randn(4, 3, 32, 32)).sum().backward()
    assert backbone.bn1.num_batches_tracked == backbone.layer4[0].bn1.num_batches_tracked == 2


def test_without_stochastic_depth_running_statistics_move_once():
    torch.manual_seed(0)
    backbone = timm.create_model("resnet10t", num_classes=0).train()
    checkpoint_activations(backbone)
    for count in (1, 2):
        backbone(torch.randn(4, 3, 32, 32)).sum().backward()
        assert backbone.bn1.num_batches_tracked == backbone.layer4[0].bn1.num_batches_tracked == count
    with torch.no_grad():
        backbone(torch.randn(4, 3, 32, 32))
    assert backbone.layer4[0].bn1.num_batches_tracked == 3


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda: nn.Linear(3, 3), "Linear has no set_grad_checkpointing"),
        (lambda: timm.create_model("convit_tiny"), "not supported"),
    ],
)
def test_a_model_that_cannot_is_an_error(module, reason):
    with pytest.raises(NotImplementedError, match=reason):
        checkpoint_activations(module())
