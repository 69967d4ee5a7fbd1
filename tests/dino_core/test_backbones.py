from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from dino_core.backbones import (
    adopt_backbone,
    backbone_names,
    build_backbone,
    check_backbone_name,
    check_crop_sizes,
    compile_backbone,
    num_features,
)
from dino_core.config import ConfigError, CropsConfig, ModelConfig
from dino_core.stochastic_depth import StochasticDepth, depth_masks

TINY = {"backbone": "vit_tiny_patch16_224", "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
PATCH = SMALL | {"patch_size": 8}

TWO_SIZES: dict[str, dict[str, Any]] = {
    "ViT": PATCH | {"backbone": "vit_tiny_patch16_224"},
    "ViT, registers": PATCH | {"backbone": "vit_tiny_patch16_224", "num_register_tokens": 4},
    "ViT, average": PATCH | {"backbone": "vit_tiny_patch16_224", "pooling": "avg"},
    "ViT without class token": {"backbone": "vit_pwee_patch16_reg1_gap_256"},
    "ViT on a convnet": SMALL | {"backbone": "vit_tiny_r_s16_p8_224", "num_register_tokens": 2},
    "DeiT III": PATCH | {"backbone": "deit3_small_patch16_224", "num_register_tokens": 2, "pooling": "avg"},
    "DeiT, distilled": PATCH | {"backbone": "deit_tiny_distilled_patch16_224"},
    "EVA-02": PATCH | {"backbone": "eva02_tiny_patch14_224", "num_register_tokens": 2, "pooling": "token"},
    "ViT of DINOv3": PATCH | {"backbone": "vit_small_patch16_dinov3"},
    "XCiT": PATCH | {"backbone": "xcit_nano_12_p16_224"},
    "SAM": PATCH | {"backbone": "samvit_base_patch16_224"},
    "Swin": {"backbone": "swin_tiny_patch4_window7_224"},
    "Swin 2": {"backbone": "swinv2_tiny_window8_256"},
    "ConvNeXt": {"backbone": "test_convnext"},
    "ResNet": {"backbone": "resnet10t"},
    "ResNet without normaliser": {"backbone": "test_nfnet"},
    "EfficientNet": {"backbone": "test_efficientnet"},
    "RegNet": {"backbone": "regnetx_002"},
    "MobileNet 3": {"backbone": "mobilenetv3_small_050"},
    "PoolFormer": {"backbone": "poolformerv2_s12"},
    "FastViT": {"backbone": "fastvit_t8"},
    "MambaOut": {"backbone": "test_mambaout"},
}
ONE_SIZE: dict[str, dict[str, Any]] = {
    "BEiT": PATCH | {"backbone": "beit_base_patch16_224", "pooling": "token"},
    "CaiT": PATCH | {"backbone": "cait_xxs24_224"},
    "ViT with relative positions": PATCH | {"backbone": "vit_relpos_small_patch16_224"},
    "CoAtNet": {"backbone": "test_coatnet"},
    "LeViT": {"backbone": "levit_128s"},
    "gMLP": {"backbone": "gmlp_ti16_224"},
}


def train_pass(backbone: nn.Module, size: int) -> Tensor:
    masks = depth_masks(backbone)
    assert masks is not None
    masks.begin(0, 0, 0, num_crops=1, num_images=4, device=torch.device("cpu"))
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(size))
    with torch.no_grad():
        return backbone.train()(images)


@pytest.mark.parametrize("settings", TWO_SIZES.values(), ids=TWO_SIZES)
def test_crops_of_two_sizes_become_features(settings):
    config = ModelConfig(**settings)
    backbone = build_backbone(config, 64, drop_path=0.2)
    rates = [module.drop_prob for module in backbone.modules() if isinstance(module, StochasticDepth)]
    assert 0.05 < max(rates) <= 0.2 + 1e-6
    assert not any(isinstance(module, DropPath) for module in backbone.modules())
    check_crop_sizes(backbone, config, CropsConfig(global_size=64, local_size=32))
    before = torch.get_rng_state()
    for size in (64, 32):
        features = train_pass(backbone, size)
        assert features.shape == (4, num_features(backbone))
        assert torch.isfinite(features).all()
        assert features.std(dim=0).max() > 1e-6  # they tell images apart
        assert torch.equal(train_pass(backbone, size), features)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("settings", ONE_SIZE.values(), ids=ONE_SIZE)
def test_a_model_of_one_size_takes_that_of_the_global_crops_and_no_other(settings):
    config = ModelConfig(**settings)
    backbone = build_backbone(config, 64)
    with pytest.raises(ConfigError, match=r"pretrain.crops.local_size = 32: .*takes: .*set pretrain.crops.local_size"):
        check_crop_sizes(backbone, config, CropsConfig(global_size=64, local_size=32))
    check_crop_sizes(backbone, config, CropsConfig(global_size=64, num_local_crops=0))
    assert backbone.eval()(torch.randn(2, 3, 64, 64)).shape == (2, num_features(backbone))


def test_names_are_those_that_timm_lists():
    assert set(timm.list_models()) == set(backbone_names())
    assert backbone_names() == sorted(backbone_names())


@pytest.mark.parametrize(
    ("name", "near"),
    [("vit_smal_patch16_224", "vit_small_patch16_224"), ("resnet5", "resnet5"), ("ResNet50", "resnet")],
)
def test_an_unknown_name_is_an_error_with_the_nearest(name, near):
    with pytest.raises(ConfigError, match=rf"pretrain.model.backbone = {name}: .*did you mean .*{near}"):
        check_backbone_name(name)
    with pytest.raises(ConfigError, match=r"pretrain.model.backbone"):
        build_backbone(ModelConfig(backbone=name), 32)


def test_nothing_near_gives_no_hint():
    with pytest.raises(ConfigError, match=r"of this name$"):
        check_backbone_name("?")


def test_vit_takes_the_sizes_and_crops_of_any_multiple_of_the_patch():
    backbone = build_backbone(ModelConfig(**TINY), 32)
    assert num_features(backbone) == 16
    assert backbone.pos_embed.shape == (1, 1 + 64, 16)
    assert len(backbone.blocks) == 3
    for size in (32, 20, 8):
        assert backbone(torch.randn(2, 3, size, size)).shape == (2, 16)
    assert backbone.cls_token.abs().max() > 1e-3  # timm's own would be 1e-6


@pytest.mark.parametrize("settings", [TINY, {"backbone": "efficientformerv2_s0"}])
def test_without_drop_path_there_is_no_stochastic_depth(settings):
    backbone = build_backbone(ModelConfig(**settings), 32)
    assert not any(isinstance(module, StochasticDepth | DropPath) for module in backbone.modules())


def test_registers_and_pooling_are_those_asked_for():
    torch.manual_seed(0)
    plain = build_backbone(ModelConfig(**TINY), 32).eval()
    averaged = build_backbone(ModelConfig(**TINY, pooling="avg", num_register_tokens=3), 32).eval()
    assert averaged.reg_token.shape == (1, 3, 16)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain(images), plain.forward_features(images)[:, 0])
    patches = averaged.forward_features(images)[:, 1 + 3 :]
    assert patches.shape == (2, 64, 16)
    torch.testing.assert_close(averaged(images), averaged.fc_norm(patches.mean(dim=1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"backbone": "vit_medium_patch16_rope_reg1_gap_256", "pooling": "token"} | PATCH,
            "(vit_medium.*timm cannot build it with .*global_pool = token|pooling = token: must be avg or none)",
        ),
        (
            {"backbone": "vit_pwee_patch16_reg1_gap_256", "pooling": "token"},
            "vit_pwee_patch16_reg1_gap_256: timm cannot build it with global_pool = token",
        ),
        (
            {"backbone": "deit_tiny_distilled_patch16_224"} | PATCH | {"num_register_tokens": 2},
            "num_register_tokens = 2: must be none, deit_tiny_distilled_patch16_224 has no place",
        ),
        (
            {"backbone": "beit_base_patch16_224"} | PATCH | {"num_register_tokens": 2},
            "num_register_tokens = 2: must be none, beit_base_patch16_224 does not have it",
        ),
        ({"backbone": "resnet10t", "pooling": "avg"}, "pooling = avg: must be none, resnet10t is not a ViT"),
    ],
)
def test_settings_that_a_model_does_not_have_are_errors(settings, message):
    with pytest.raises(ConfigError, match=rf"pretrain.model.(backbone = )?{message}"):
        build_backbone(ModelConfig(**settings), 64)


def test_one_block_never_drops():
    backbone = build_backbone(ModelConfig(**TINY | {"depth": 1}), 32, drop_path=0.1)
    assert not any(isinstance(m, StochasticDepth) for m in backbone.modules())


def test_sizes_for_another_kind_of_model_are_errors():
    with pytest.raises(ConfigError) as error:
        build_backbone(ModelConfig(backbone="resnet18", patch_size=8, depth=4), 32)
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "pretrain.model.patch_size = 8",
        "pretrain.model.depth = 4",
    ]


def test_stochastic_depth_that_a_model_does_not_have_is_an_error():
    with pytest.raises(ConfigError, match=r"pretrain.model.drop_path = 0.1: must be 0, ghostnet_050"):
        build_backbone(ModelConfig(backbone="ghostnet_050"), 32, drop_path=0.1)


@pytest.mark.parametrize(
    ("crops", "message"),
    [
        ({"global_size": 32, "local_size": 10}, "local_size = 10: must be a multiple of the patch size 4"),
        ({"global_size": 30, "local_size": 8}, "global_size = 30: must be a multiple of the patch size 4"),
    ],
)
def test_crops_that_the_patch_does_not_divide_are_errors(crops, message):
    config = CropsConfig(**crops)
    with pytest.raises(ConfigError, match=f"pretrain.crops.{message}"):
        check_crop_sizes(build_backbone(ModelConfig(**TINY), config.global_size), ModelConfig(**TINY), config)
    if config.global_size == 32:
        no_local = CropsConfig(**crops, num_local_crops=0)
        check_crop_sizes(build_backbone(ModelConfig(**TINY), 32), ModelConfig(**TINY), no_local)


def test_the_patch_of_the_model_itself_counts_too():
    with pytest.raises(ConfigError, match=r"pretrain.crops.global_size = 40: must be a multiple of the patch size 16"):
        build_backbone(ModelConfig(backbone="vit_tiny_patch16_224", embed_dim=16, num_heads=2, depth=1), 40)


@pytest.mark.parametrize("name", ["ghostnet_050", "test_vit_relpos"])
def test_dropout_from_the_global_rng_is_off(name):
    backbone = build_backbone(ModelConfig(backbone=name), 64).train()
    before = torch.get_rng_state()
    backbone(torch.zeros(2, 3, 64, 64))
    assert torch.equal(torch.get_rng_state(), before)


def test_stochastic_depth_that_drops_parts_of_images_is_an_error():
    config = ModelConfig(backbone="mobilevit_xxs", drop_path=0.1)
    crops = CropsConfig(global_size=64, local_size=32)
    with pytest.raises(ConfigError, match=r"pretrain.model.drop_path = 0.1: must be 0, .* drops parts of images"):
        check_crop_sizes(build_backbone(config, 64, drop_path=0.1), config, crops)
    check_crop_sizes(build_backbone(config, 64), config, crops)


def test_sizes_are_checked_without_memory_too():
    config = ModelConfig(**TINY)
    with torch.device("meta"):
        check_crop_sizes(build_backbone(config, 32), config, CropsConfig(global_size=32, local_size=8))


def test_activation_checkpointing_that_a_model_does_not_have_is_an_error():
    with pytest.raises(ConfigError, match=r"pretrain.model.activation_checkpointing = True: must be false, convit_tin"):
        build_backbone(ModelConfig(backbone="convit_tiny", activation_checkpointing=True), 32)


class Own(nn.Module):
    """A network of one's own, with stochastic depth and a part that stays in evaluation mode."""

    def __init__(self, output: Any = None) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 5, 4, stride=4), nn.BatchNorm2d(5), DropPath(0.5)
        self.norm.eval()
        self.output = output

    def forward(self, images: Tensor) -> Any:
        torch.rand(1)
        features = self.drop(self.norm(self.conv(images))).mean((2, 3))
        return features if self.output is None else self.output(features)


def test_a_module_of_ones_own_is_adopted():
    module = Own()
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    assert adopt_backbone(module, 16) == 5
    assert torch.equal(torch.get_rng_state(), state)
    assert (module.training, module.conv.training, module.norm.training) == (True, True, False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert isinstance(module.drop, StochasticDepth) and module.drop.drop_prob == 0.5
    assert adopt_backbone(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), 16) == 3  # no parameters


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (lambda x: x[..., None], r"not into float32 \[2, 5, 1\]"),
        (lambda x: x[:1], r"not into float32 \[1, 5\]"),
        (lambda x: x[:, :0], r"not into float32 \[2, 0\]"),
        (lambda x: x.argmax(dim=1, keepdim=True), r"not into int64 \[2, 1\]"),
        (lambda x: {"features": x}, "not into a dict"),
        (lambda x: x / 0, "which must be finite"),
    ],
)
def test_a_module_that_gives_no_features_is_an_error(output, reason):
    with pytest.raises(ConfigError, match=rf"pretrain.model.backbone = Own: must turn .*{reason}"):
        adopt_backbone(Own(output), 16)


def test_compiled_it_computes_the_same_under_the_same_names():
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # another test of this process may have compiled too
    backbone = build_backbone(ModelConfig(**TINY | {"depth": 1}), 16).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected, names = backbone(images), list(backbone.state_dict())
        compiled = compile_backbone(backbone)
        torch.testing.assert_close(compiled(images), expected, rtol=0, atol=1e-5)
    assert list(compiled.state_dict()) == names
    assert torch._dynamo.utils.counters["frames"] == {"total": 1, "ok": 1}
