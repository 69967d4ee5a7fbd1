from __future__ import annotations

from typing import Any

import pytest

from dino_core.config import ConfigError
from orchestrator.cost import measure
from orchestrator.overrides import override
from orchestrator.preflight import check_model
from sweeps.recipes import quickstart


@pytest.mark.parametrize(
    "changes",
    [
        {"pretrain.crops.local_size": 9},
        {"pretrain.crops.global_size": 18, "pretrain.crops.local_size": 8},
        {"pretrain.model.backbone": "vit_tiny_patch16_224", "pretrain.model.patch_size": None},
        {"pretrain.model.backbone": "resnet18", "pretrain.model.drop_path": 0},
        {"pretrain.model.backbone": "vit_tinny_patch16_224"},
    ],
)
def test_what_is_refused_without_torch_is_what_building_refuses(changes: dict[str, Any]) -> None:
    config = override(quickstart(), changes)
    with pytest.raises(ConfigError) as built:
        measure(config)
    with pytest.raises(ConfigError) as checked:
        check_model(config)
    refused = [{line.split(":")[0] for line in str(error.value).splitlines()} for error in (built, checked)]
    assert refused[0] <= refused[1]  # the check goes on after the first problem
