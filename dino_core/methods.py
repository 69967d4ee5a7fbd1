"""Named methods as points of the component space: what each changes of a configuration, by dotted key.

They say what a method is made of (loss, teacher, centring, predictor, batch norm, prototypes) with the temperatures and
momenta of its paper. Backbone, widths, crops and optimiser stay as they are, so that methods can be compared under one
recipe, as tables 7, 13 and 14 of DINO (arXiv 2104.14294) do. No torch here.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from dino_core.config import ConfigError, PretrainConfig

_PROTOTYPES = {
    "pretrain.loss.name": "cross_entropy",
    "pretrain.loss.queue_size": None,
    "pretrain.predictor.num_layers": 0,
    "pretrain.teacher.sharpening": "softmax",
    "pretrain.teacher.stop_gradient": True,
}
_EMBEDDINGS = {
    "pretrain.loss.queue_size": None,
    "pretrain.head.num_prototypes": None,
    "pretrain.head.bottleneck_norm": False,  # the loss normalises; a predictor sees the embedding as it is
    "pretrain.head.batch_norm": True,
    "pretrain.head.activation": "relu",
    "pretrain.predictor.num_layers": 0,
    "pretrain.teacher.sharpening": "softmax",
    "pretrain.teacher.stop_gradient": True,
    "pretrain.teacher.centering": "none",
    "pretrain.crops.num_local_crops": 0,
}

METHODS: Mapping[str, Mapping[str, Any]] = {
    # arXiv 2104.14294, algorithm 1
    "dino": {
        **_PROTOTYPES,
        "pretrain.teacher.update": "ema",
        "pretrain.teacher.centering": "center",
    },
    # arXiv 2111.07832, section 3, with the masks and temperatures of its authors' best ViT-S/16
    "ibot": {
        **_PROTOTYPES,
        "pretrain.teacher.centering": "center",
        "pretrain.ibot.centering": None,
        "pretrain.ibot.center_over": "all",
        "pretrain.teacher.update": "ema",
        "pretrain.ibot.weight": 1.0,
        "pretrain.ibot.head": "shared",
        "pretrain.ibot.warmup_temp": 0.04,
        "pretrain.ibot.temp": 0.07,
        "pretrain.mask.sampler": "ibot",
        "pretrain.mask.shape": "block",
        "pretrain.mask.prob": 0.5,
        "pretrain.mask.ratio": (0.1, 0.5),
    },
    # arXiv 2304.07193, section 4, as its large models are trained
    "dinov2": {
        **_PROTOTYPES,
        "pretrain.teacher.update": "ema",
        "pretrain.teacher.centering": "sinkhorn_knopp",
        "pretrain.teacher.sinkhorn_iters": 3,
        "pretrain.head.norm_last_layer": False,
        "pretrain.ibot.weight": 1.0,
        "pretrain.ibot.head": "untied",
        "pretrain.mask.sampler": "dinov2",
        "pretrain.mask.shape": "block",
        "pretrain.mask.prob": 0.5,
        "pretrain.mask.ratio": (0.1, 0.5),
        "pretrain.loss.koleo_weight": 0.1,
        "pretrain.loss.koleo_crops": "both",
    },
    # arXiv 2006.07733, section 3
    "byol": {
        **_EMBEDDINGS,
        "pretrain.loss.name": "mse",
        "pretrain.teacher.update": "ema",
        "pretrain.teacher.momentum": 0.996,
        "pretrain.teacher.final_momentum": 1.0,
        "pretrain.predictor.num_layers": 2,
        "pretrain.predictor.batch_norm": True,
    },
    # arXiv 2011.10566, section 3: batch norm on the output too; the predictor's width stays that of the recipe
    "simsiam": {
        **_EMBEDDINGS,
        "pretrain.loss.name": "mse",
        "pretrain.teacher.update": "student_copy",
        "pretrain.head.output_batch_norm": True,
        "pretrain.predictor.num_layers": 2,
        "pretrain.predictor.batch_norm": True,
    },
    # arXiv 2002.05709, algorithm 1
    "simclr": {
        **_EMBEDDINGS,
        "pretrain.loss.name": "info_nce",
        "pretrain.teacher.update": "student_copy",
        "pretrain.teacher.stop_gradient": False,
        "pretrain.student.temp": 0.1,
    },
    # arXiv 2003.04297; batch norm in the head as in DINO's comparison, over all workers in place of shuffling
    "moco_v2": {
        **_EMBEDDINGS,
        "pretrain.loss.name": "info_nce",
        "pretrain.loss.queue_size": 65536,
        "pretrain.teacher.update": "ema",
        "pretrain.teacher.momentum": 0.999,
        "pretrain.teacher.final_momentum": 0.999,
        "pretrain.student.temp": 0.2,
    },
    # arXiv 2006.09882, section 3
    "swav": {
        **_PROTOTYPES,
        "pretrain.teacher.update": "student_copy",
        "pretrain.teacher.centering": "sinkhorn_knopp",
        "pretrain.teacher.sinkhorn_iters": 3,
        "pretrain.teacher.warmup_temp": 0.05,
        "pretrain.teacher.temp": 0.05,
        "pretrain.student.temp": 0.1,
        "pretrain.head.batch_norm": True,
        "pretrain.head.norm_last_layer": True,
    },
}
"""Changes of a configuration of DINO, by dotted key."""


def changes_of(name: str, base: PretrainConfig) -> Mapping[str, Any]:
    """What the named method changes of `base`, by dotted key.

    Raises:
        ConfigError: there is no such method, or `base` is no configuration of DINO.
    """
    check_method(name)
    others = {
        f"pretrain.loss.name = {base.loss.name}": base.loss.name != "cross_entropy",
        f"pretrain.ibot.weight = {base.ibot.weight:g}": base.ibot.weight,
        f"pretrain.loss.koleo_weight = {base.loss.koleo_weight:g}": base.loss.koleo_weight,
    }
    if found := [setting for setting, is_other in others.items() if is_other]:
        raise ConfigError(
            f"method {name}: is a change of DINO, and cannot be applied to a configuration with {found[0]}"
        )
    return METHODS[name]


def check_method(name: str) -> None:
    """Raises:
    ConfigError: there is no such method; names the nearest.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"unknown method {name!r}{hint}; must be one of {', '.join(METHODS)}")


def with_method(config: PretrainConfig, name: str) -> PretrainConfig:
    """A configuration of DINO, `config`, at the point of the named method.

    Raises:
        ConfigError: there is no such method, or it does not go with the rest of `config`.
    """
    parts: dict[str, dict[str, Any]] = {}
    for key, value in changes_of(name, config).items():
        _, part, field = key.split(".")
        parts.setdefault(part, {})[field] = value
    changed = {part: dataclasses.replace(getattr(config, part), **values) for part, values in parts.items()}
    return dataclasses.replace(config, **changed)
