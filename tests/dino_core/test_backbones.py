from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from dino_core.backbones import backbone_names, build_backbone, check_backbone_name, check_crop_sizes, num_features
from dino_core.config import ConfigError, CropsConfig, ModelConfig
from dino_core.stochastic_depth import StochasticDepth

TINY = {"backbone": "vit_tiny_patch16_224", "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}


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


@pytest.mark.parametrize(
    "name",
    ["resnet18", "convnext_atto", "deit_tiny_patch16_224", "mobilenetv3_small_050", "vit_pwee_patch16_reg1_gap_256"],
)
def test_timm_models_give_features_with_stochastic_depth(name):
    backbone = build_backbone(ModelConfig(backbone=name), 64, drop_path=0.2).eval()
    for size in (64, 32):
        assert backbone(torch.randn(2, 3, size, size)).shape == (2, num_features(backbone))
    rates = [module.drop_prob for module in backbone.modules() if isinstance(module, StochasticDepth)]
    assert max(rates) <= 0.2 + 1e-6
    assert rates == sorted(rates)
    assert sum(rates) > 0


def test_without_drop_path_there_is_no_stochastic_depth():
    assert not any(isinstance(m, StochasticDepth) for m in build_backbone(ModelConfig(**TINY), 32).modules())


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
    with pytest.raises(ConfigError, match=r"pretrain.model.drop_path = 0.1: must be 0, vgg11"):
        build_backbone(ModelConfig(backbone="vgg11"), 32, drop_path=0.1)


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


def test_a_model_of_one_size_takes_no_other():
    config = ModelConfig(backbone="coat_tiny")
    backbone = build_backbone(config, 64)
    with pytest.raises(
        ConfigError, match=r"pretrain.crops.local_size = 32: .*takes: .*32.*set pretrain.crops.local_siz"
    ):
        check_crop_sizes(backbone, config, CropsConfig(global_size=64, local_size=32))
    check_crop_sizes(backbone, config, CropsConfig(global_size=64, num_local_crops=0))
