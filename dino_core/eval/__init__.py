"""Evaluations of frozen features. Names are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino_core.eval.alignment import alignment as alignment
    from dino_core.eval.alignment import uniformity as uniformity
    from dino_core.eval.attention import attention_maps as attention_maps
    from dino_core.eval.attention import mass_masks as mass_masks
    from dino_core.eval.attention import mean_best_jaccard as mean_best_jaccard
    from dino_core.eval.attention import object_jaccards as object_jaccards
    from dino_core.eval.copy_detection import copy_descriptor as copy_descriptor
    from dino_core.eval.copy_detection import copy_detection_scores as copy_detection_scores
    from dino_core.eval.copy_detection import learn_whitening as learn_whitening
    from dino_core.eval.features import eval_transform as eval_transform
    from dino_core.eval.features import extract_features as extract_features
    from dino_core.eval.knn import knn_accuracy as knn_accuracy
    from dino_core.eval.layers import LayerOutput as LayerOutput
    from dino_core.eval.layers import intermediate_layers as intermediate_layers
    from dino_core.eval.masks import boundary_f as boundary_f
    from dino_core.eval.masks import jaccard as jaccard
    from dino_core.eval.masks import video_scores as video_scores
    from dino_core.eval.rank import alpha_req as alpha_req
    from dino_core.eval.rank import effective_rank as effective_rank
    from dino_core.eval.rank import lidar as lidar
    from dino_core.eval.rank import rankme as rankme
    from dino_core.eval.retrieval import average_precision as average_precision
    from dino_core.eval.retrieval import label_scores as label_scores
    from dino_core.eval.retrieval import micro_average_precision as micro_average_precision
    from dino_core.eval.retrieval import multi_scale_features as multi_scale_features
    from dino_core.eval.retrieval import retrieval_scores as retrieval_scores
    from dino_core.eval.retrieval import revisited_scores as revisited_scores
    from dino_core.eval.video import propagate_labels as propagate_labels

_MODULES = {
    "alignment": "dino_core.eval.alignment",
    "uniformity": "dino_core.eval.alignment",
    "attention_maps": "dino_core.eval.attention",
    "mass_masks": "dino_core.eval.attention",
    "mean_best_jaccard": "dino_core.eval.attention",
    "object_jaccards": "dino_core.eval.attention",
    "copy_descriptor": "dino_core.eval.copy_detection",
    "copy_detection_scores": "dino_core.eval.copy_detection",
    "learn_whitening": "dino_core.eval.copy_detection",
    "eval_transform": "dino_core.eval.features",
    "extract_features": "dino_core.eval.features",
    "knn_accuracy": "dino_core.eval.knn",
    "intermediate_layers": "dino_core.eval.layers",
    "LayerOutput": "dino_core.eval.layers",
    "boundary_f": "dino_core.eval.masks",
    "jaccard": "dino_core.eval.masks",
    "video_scores": "dino_core.eval.masks",
    "alpha_req": "dino_core.eval.rank",
    "effective_rank": "dino_core.eval.rank",
    "lidar": "dino_core.eval.rank",
    "rankme": "dino_core.eval.rank",
    "average_precision": "dino_core.eval.retrieval",
    "label_scores": "dino_core.eval.retrieval",
    "micro_average_precision": "dino_core.eval.retrieval",
    "multi_scale_features": "dino_core.eval.retrieval",
    "retrieval_scores": "dino_core.eval.retrieval",
    "revisited_scores": "dino_core.eval.retrieval",
    "propagate_labels": "dino_core.eval.video",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
