"""Self-supervised pre-training by self-distillation, in plain PyTorch.

Names are imported when they are first used: ``import dino_core.config`` alone loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino_core import eval as eval
    from dino_core import train as train
    from dino_core.backbone_names import backbone_names as backbone_names
    from dino_core.backbones import build_backbone as build_backbone
    from dino_core.centering import sinkhorn_knopp as sinkhorn_knopp
    from dino_core.config import ConfigError as ConfigError
    from dino_core.config import PretrainConfig as PretrainConfig
    from dino_core.crops import CropBatch as CropBatch
    from dino_core.crops import MultiCrop as MultiCrop
    from dino_core.diagnosis import diagnose as diagnose
    from dino_core.export import export_backbone as export_backbone
    from dino_core.heads import DINOHead as DINOHead
    from dino_core.heads import Predictor as Predictor
    from dino_core.losses import dino_loss as dino_loss
    from dino_core.losses import info_nce_loss as info_nce_loss
    from dino_core.losses import koleo_loss as koleo_loss
    from dino_core.losses import mse_loss as mse_loss
    from dino_core.methods import METHODS as METHODS
    from dino_core.methods import with_method as with_method
    from dino_core.objectives import Objective as Objective
    from dino_core.pretrained import load_official as load_official
    from dino_core.schedules import cosine_schedule as cosine_schedule
    from dino_core.schedules import wsd_schedule as wsd_schedule
    from dino_core.train import NonFiniteLossError as NonFiniteLossError
    from dino_core.train import TrainState as TrainState
    from dino_core.train import train_step as train_step

_MODULES = {
    "backbone_names": "dino_core.backbone_names",
    "build_backbone": "dino_core.backbones",
    "sinkhorn_knopp": "dino_core.centering",
    "ConfigError": "dino_core.config",
    "PretrainConfig": "dino_core.config",
    "CropBatch": "dino_core.crops",
    "MultiCrop": "dino_core.crops",
    "diagnose": "dino_core.diagnosis",
    "export_backbone": "dino_core.export",
    "DINOHead": "dino_core.heads",
    "Predictor": "dino_core.heads",
    "dino_loss": "dino_core.losses",
    "info_nce_loss": "dino_core.losses",
    "koleo_loss": "dino_core.losses",
    "mse_loss": "dino_core.losses",
    "METHODS": "dino_core.methods",
    "with_method": "dino_core.methods",
    "Objective": "dino_core.objectives",
    "load_official": "dino_core.pretrained",
    "cosine_schedule": "dino_core.schedules",
    "wsd_schedule": "dino_core.schedules",
    "NonFiniteLossError": "dino_core.train",
    "TrainState": "dino_core.train",
    "train_step": "dino_core.train",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    if name in ("eval", "train"):  # the package, and the module that can be called as its own main function
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES, "eval", "train"])
