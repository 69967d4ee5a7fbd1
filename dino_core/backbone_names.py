"""Which backbones there are, and how timm's modules name their sizes, without importing timm, which takes seconds."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dino_core.config import ConfigError, ModelConfig

_ENTRY_POINT = re.compile(r"^@register_model\b.*\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)

_SETTINGS = ("patch_size", "embed_dim", "depth", "num_heads", "num_register_tokens", "pooling", "layer_scale")
_TOWER = {"embed_dim": "embed_dim", "depth": "depth", "num_heads": "num_heads"}
_VIT = {"patch_size": "patch_size", **_TOWER, "pooling": "global_pool"}


@dataclass(frozen=True)
class Sizing:
    """How the models of one timm module are told their sizes, and what else they have to be told."""

    settings: Mapping[str, str] = field(default_factory=dict)
    """timm's argument for each setting of `ModelConfig` that the models know."""
    image_size: bool = False
    """Whether they are made for an image size, given as ``img_size``."""
    swiglu: bool = False
    """Whether they can be built with SwiGLU."""
    any_size: Mapping[str, bool] = field(default_factory=dict)
    """What makes them take other sizes beside that one; empty where nothing does, or nothing has to."""
    no_dropout: Mapping[str, float] = field(default_factory=dict)
    """What switches off dropout that is not a layer of its own."""

    @property
    def multiples_of_patch(self) -> bool:
        """Whether they take every multiple of the patch size, and nothing else."""
        return "dynamic_img_size" in self.any_size


_DYNAMIC = {"dynamic_img_size": True}
_SCALE = {"layer_scale": "init_values"}
_VISION_TRANSFORMER = Sizing({**_VIT, **_SCALE, "num_register_tokens": "reg_tokens"}, True, True, _DYNAMIC)
_ONE_SIZE = Sizing(image_size=True)
_SWIN = Sizing(image_size=True, any_size={"strict_img_size": False})

_SIZINGS = {
    "vision_transformer": _VISION_TRANSFORMER,
    "deit": _VISION_TRANSFORMER,
    # their patches are of a convnet's features
    "vision_transformer_hybrid": Sizing(
        {**_TOWER, **_SCALE, "num_register_tokens": "reg_tokens", "pooling": "global_pool"}, True, any_size=_DYNAMIC
    ),
    "vitamin": Sizing(image_size=True, any_size=_DYNAMIC),
    "eva": Sizing({**_VIT, **_SCALE, "num_register_tokens": "num_reg_tokens"}, True, any_size=_DYNAMIC),
    "vision_transformer_sam": Sizing({"patch_size": "patch_size", **_TOWER}, True),
    "xcit": Sizing(_VIT, True),
    # position embeddings or relative positions of one grid
    "beit": Sizing({**_VIT, **_SCALE}, True),
    "cait": Sizing({**_VIT, **_SCALE}, True),
    "vision_transformer_relpos": Sizing({**_VIT, **_SCALE}, True),
    **dict.fromkeys(("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr"), _SWIN),
    **dict.fromkeys(
        ("byoanet", "coat", "convit", "efficientformer_v2", "efficientvit_msra", "gcvit", "hiera", "levit"), _ONE_SIZE
    ),
    **dict.fromkeys(("ghostnet", "repghost", "rexnet", "senet", "vgg"), Sizing(no_dropout={"drop_rate": 0.0})),
    **dict.fromkeys(("maxxvit", "mlp_mixer", "mvitv2", "nest", "pit", "tnt", "twins", "visformer", "volo"), _ONE_SIZE),
}


def sizing(backbone: str) -> Sizing:
    """How a backbone of `backbone_names` is told its sizes. Most convnets need not be."""
    return _SIZINGS.get(backbone_modules()[backbone], Sizing())


def setting_problems(config: ModelConfig) -> list[str]:
    """A line for each setting that a backbone of this kind does not have."""
    kind = sizing(config.backbone)
    known = kind.settings
    why = "does not have it" if known else "is not a ViT"
    problems = [
        f"pretrain.model.{name} = {getattr(config, name)}: must be none, {config.backbone} {why}"
        for name in _SETTINGS
        if getattr(config, name) is not None and name not in known
    ]
    if config.swiglu and not kind.swiglu:
        problems.append(f"pretrain.model.swiglu = True: must be false, {config.backbone} {why}")
    return problems


@functools.cache
def backbone_modules() -> dict[str, str]:
    """Each backbone's name and the timm module (``vision_transformer``, ``resnet``, ...) that makes it."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("timm is not installed", name="timm")
    folder = Path(spec.origin).parent / "models"
    return {
        name: path.stem
        for path in sorted(folder.glob("*.py"))
        for name in _ENTRY_POINT.findall(path.read_text(encoding="utf-8"))
    }


def backbone_names() -> list[str]:
    """All backbones, sorted."""
    return sorted(backbone_modules())


def check_backbone_name(name: str) -> None:
    """Raises:
    ConfigError: timm has no model of this name; the message gives the nearest ones.
    """
    if name in backbone_modules():
        return
    near = difflib.get_close_matches(name, backbone_names(), n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ConfigError(f"pretrain.model.backbone = {name}: timm has no model of this name{hint}")
