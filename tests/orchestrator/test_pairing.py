"""What the trials of a sweep have in common, by what they really begin with."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from dino_core.crops import MultiCrop
from dino_core.train import TrainState
from orchestrator.catalog import load_recipe
from orchestrator.data.loaders import make_loader
from orchestrator.data.plan import index_plan
from orchestrator.data.sources import open_source
from orchestrator.overrides import config_keys, override
from orchestrator.pairing import PARTS, changed_parts, describe_pairing, pairing, varied_keys
from orchestrator.sweep import Sweep, expand

OTHER: dict[str, Any] = {
    "pretrain.seed": 1,
    "pretrain.batch_size": 32,
    "pretrain.epochs": 2,
    "pretrain.model.depth": 3,
    "pretrain.model.embed_dim": 32,
    "pretrain.model.num_heads": 8,
    "pretrain.model.patch_size": 8,
    "pretrain.model.num_register_tokens": 2,
    "pretrain.model.drop_path": 0.2,
    "pretrain.head.num_prototypes": 128,
    "pretrain.head.num_layers": 2,
    "pretrain.head.hidden_dim": 128,
    "pretrain.head.bottleneck_dim": 32,
    "pretrain.head.batch_norm": False,
    "pretrain.head.norm_last_layer": False,
    "pretrain.head.activation": "relu",
    "pretrain.predictor.num_layers": 2,
    "pretrain.model.layer_scale": 0.1,
    "pretrain.model.swiglu": True,
    "pretrain.ibot.weight": 1.0,
    "pretrain.loss.koleo_weight": 0.1,
    "pretrain.mask.ratio": (0.2, 0.3),
    "pretrain.loss.name": "mse",
    "pretrain.teacher.temp": 0.07,
    "pretrain.teacher.momentum": 0.9,
    "pretrain.teacher.update": "student_copy",
    "pretrain.teacher.centering": "softmax",
    "pretrain.student.temp": 0.3,
    "pretrain.crops.num_local_crops": 4,
    "pretrain.crops.global_size": 32,
    "pretrain.crops.local_size": 12,
    "pretrain.crops.global_scale": (0.3, 1.0),
    "pretrain.crops.brightness": 0.5,
    "pretrain.crops.std": (0.5, 0.5, 0.5),
    "pretrain.optim.lr": 1e-4,
    "pretrain.optim.name": "sgd",
    "data.train_split": "test",
}
"""Another value for each key of interest."""


NUM_IMAGES = 3
Weights = dict[str, torch.Tensor]


@cache
def begin(key: str | None) -> tuple[np.ndarray, dict[str, np.ndarray], Weights]:
    """The images of the first step, the crops of the first images by number, and the weights, with one key changed."""
    config = load_recipe("quickstart")
    if key is not None:
        swapped = {"data.test_split": "train"} if key == "data.train_split" else {}  # it must be another one
        config = override(config, {key: OTHER[key]} | swapped)
    source = open_source(config.data)
    plan = index_plan(config, source.train)
    _, order = plan.locate(plan.positions(0))
    loader = make_loader(config, source, "train", source.digest())
    images = [loader.load(source.train, sample) for sample in range(NUM_IMAGES)]
    numbers = np.arange(NUM_IMAGES)
    crops = MultiCrop(config.pretrain.crops, config.pretrain.seed).make(images, np.zeros_like(numbers), numbers)
    state = TrainState.create(config.pretrain, len(source.train), "cpu")
    return order, crops, {name: weight.detach() for name, weight in state.student.named_parameters()}


def alike(one: Weights, other: Weights) -> set[str]:
    return {name for name in one.keys() & other.keys() if torch.equal(one[name], other[name])}


@pytest.mark.parametrize("key", OTHER)
def test_trials_of_one_seed_share_exactly_what_is_said(key: str) -> None:
    (order, crops, weights), (its_order, its_crops, its_weights) = begin(None), begin(key)
    changed = {
        "order": not np.array_equal(order, its_order),
        "crops": any(not np.array_equal(crops[name], its_crops.get(name)) for name in crops),
        "weights": not weights.keys() == its_weights.keys() == alike(weights, its_weights),
    }
    assert set(changed_parts(key)) == {part for part in PARTS if changed[part]}


def test_what_is_left_of_a_changed_part() -> None:
    order, crops, weights = begin(None)
    assert np.array_equal(begin("pretrain.batch_size")[0], order[:32]), "the same images in batches of another size"
    more = begin("pretrain.crops.num_local_crops")[1]
    assert np.array_equal(more["global_crops"], crops["global_crops"])
    assert np.array_equal(more["local_crops"][:, :2], crops["local_crops"])
    prototypes = {name for name in weights if "last_layer" in name}
    assert alike(weights, begin("pretrain.head.num_prototypes")[2]) == weights.keys() - prototypes
    backbone = {name for name in weights if name.startswith("backbone.")}
    for key in ("pretrain.head.hidden_dim", "pretrain.head.bottleneck_dim", "pretrain.head.num_layers"):
        assert alike(weights, begin(key)[2]) >= backbone
    assert alike(weights, begin("pretrain.predictor.num_layers")[2]) == weights.keys()
    drawn = {name for name, weight in weights.items() if len(weight.unique()) > 1}
    assert drawn, "weights that are not all zeros or ones"
    for key in ("pretrain.seed", "pretrain.model.depth", "pretrain.model.embed_dim"):
        assert not {name for name in alike(weights, begin(key)[2]) & drawn if name.startswith("backbone.blocks.")}


def test_every_key_that_data_or_crops_have_is_said_to_change_them_unless_listed() -> None:
    same = {"data.test_split", "data.label_column", "data.download", "data.max_bad_fraction"}
    same |= {"pretrain.crops.mean", "pretrain.crops.std", "pretrain.crops.device"}
    found = {key for key in config_keys() if key.startswith(("data.", "pretrain.crops.")) and not changed_parts(key)}
    assert found == same


def test_pairing_of_a_sweep() -> None:
    space = {"pretrain.teacher.temp": [0.04, 0.07], "pretrain.crops.num_local_crops": [2, 4]}
    trials = expand(Sweep(base="quickstart", space=space))
    keys = varied_keys(trials)
    assert keys == list(space)
    assert pairing(keys) == {
        "order": {},
        "crops": {"pretrain.crops.num_local_crops": "the global ones, and as many local ones as both have"},
        "weights": {},
    }
    assert describe_pairing(keys) == (
        "trials of one seed share order and weights; crops partly "
        "(pretrain.crops.num_local_crops: the global ones, and as many local ones as both have)"
    )
    assert describe_pairing(["pretrain.teacher.temp"]) == "trials of one seed share order, crops and weights"
    assert describe_pairing(["pretrain.seed"]).startswith("trials of one seed share nothing as a whole; order partly")
