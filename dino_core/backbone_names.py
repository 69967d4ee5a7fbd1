"""Which backbones there are: timm's model names, read from its sources, since importing timm takes seconds."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import re
from pathlib import Path

from dino_core.config import ConfigError

_ENTRY_POINT = re.compile(r"^@register_model\b.*\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)


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
