"""What trials of one seed have in common: the order of the images, their crops, the initial weights.

All of these are functions of the seed and of few settings, so that trials which differ in others are pairs: the
difference of two of them is of the settings, not of chance. Where a varied key changes one of the three, pairs have the
rest in common. `tests/orchestrator/test_pairing.py` checks each entry against what runs really begin with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from orchestrator.overrides import flatten
from orchestrator.runs import Trial

Part = Literal["order", "crops", "weights"]
PARTS: tuple[Part, ...] = ("order", "crops", "weights")

_IMAGES = "other images"
_SEED = "drawn anew"
_BACKBONE = "drawn anew, except vectors that begin as zeros or ones"
_HEAD = "the backbone's and the head's up to the layer that differs"

_CHANGES: tuple[tuple[str, dict[Part, str]], ...] = (
    ("data.test_split", {}),
    ("data.label_column", {}),
    ("data.download", {}),
    ("data.max_bad_fraction", {}),
    ("data.shuffle", {"order": "another order of the same images"}),
    ("data.", {"order": _IMAGES, "crops": _IMAGES}),
    ("pretrain.seed", {"order": _SEED, "crops": _SEED, "weights": _SEED}),
    ("pretrain.batch_size", {"order": "the same images in batches of another size"}),
    ("pretrain.crops.mean", {}),
    ("pretrain.crops.std", {}),
    ("pretrain.crops.device", {}),
    ("pretrain.crops.num_local_crops", {"crops": "the global ones, and as many local ones as both have"}),
    (
        "pretrain.crops.global_size",
        {"crops": "the same places in the images, another size", "weights": _BACKBONE + ", of position embeddings"},
    ),
    ("pretrain.crops.local_size", {"crops": "the same places in the images, another size"}),
    ("pretrain.crops.", {"crops": "other crops by the same random numbers"}),
    ("pretrain.model.backbone", {"weights": _BACKBONE}),
    ("pretrain.model.patch_size", {"weights": _BACKBONE}),
    ("pretrain.model.embed_dim", {"weights": _BACKBONE}),
    ("pretrain.model.depth", {"weights": _BACKBONE}),
    ("pretrain.model.num_register_tokens", {"weights": _BACKBONE}),
    ("pretrain.model.pooling", {"weights": "all that are drawn"}),
    ("pretrain.head.batch_norm", {"weights": "all that are drawn"}),
    ("pretrain.head.num_prototypes", {"weights": "all but the prototypes'"}),
    ("pretrain.head.num_layers", {"weights": _HEAD}),
    ("pretrain.head.hidden_dim", {"weights": _HEAD}),
    ("pretrain.head.bottleneck_dim", {"weights": _HEAD}),
    ("pretrain.model.layer_scale", {"weights": "all that are drawn"}),
    ("pretrain.model.swiglu", {"weights": _BACKBONE}),
    ("pretrain.ibot.weight", {"weights": "all but the patches' own head, if there is one"}),
    ("pretrain.ibot.head", {"weights": "all but the patches' head"}),
    ("pretrain.ibot.num_prototypes", {"weights": "all but the patches' prototypes"}),
    ("pretrain.ibot.bottleneck_dim", {"weights": "all but the patches' head from there on"}),
    ("pretrain.predictor.", {"weights": "all but the predictor's"}),
)
"""What changes with a key, by the first entry that the key begins with: what pairs still have of it."""


def changed_parts(key: str) -> dict[Part, str]:
    """What trials that differ in a key do not have in common, each with what is left of it."""
    return next((parts for start, parts in _CHANGES if key.startswith(start)), {})


def varied_keys(trials: Sequence[Trial]) -> list[str]:
    """The keys in which trials of a sweep differ, the seed aside."""
    flat = [flatten(trial.config) for trial in trials]
    keys = dict.fromkeys(key for trial in trials for key in trial.changes)
    return [key for key in keys if any(values[key] != flat[0][key] for values in flat)]


def pairing(keys: Iterable[str]) -> dict[Part, dict[str, str]]:
    """For each part, the keys by which it differs between trials of one seed; no key where it is the same in all."""
    parts: dict[Part, dict[str, str]] = {part: {} for part in PARTS}
    for key in keys:
        for part, left in changed_parts(key).items():
            parts[part][key] = left
    return parts


def describe_pairing(keys: Iterable[str]) -> str:
    """The same in a line."""
    parts = pairing(keys)
    whole = [part for part in PARTS if not parts[part]]
    text = f"trials of one seed share {' and '.join([', '.join(whole[:-1]), whole[-1]] if whole[1:] else whole)}"
    if not whole:
        text = "trials of one seed share nothing as a whole"
    rest = [f"{part} partly ({key}: {left})" for part in PARTS for key, left in parts[part].items()]
    return "; ".join([text, *rest])
