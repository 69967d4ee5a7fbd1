"""From the name of a target to a frozen backbone, and how its images are made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dino_core.backbone_names import sizing
from dino_core.backbones import build_backbone
from dino_core.config import ConfigError, CropsConfig, EvalConfig, ModelConfig
from dino_core.eval.features import evaluating
from dino_core.export import Backbone, ExportError, load_backbone
from orchestrator.evaluate.names import OF_TIMM, PIXELS, Named, resolve
from orchestrator.evaluate.settings import FeaturesConfig
from orchestrator.export import newest_whole
from orchestrator.overrides import did_you_mean
from orchestrator.records import RUN_FILE, RunRecord

_PIXELS_SIZE = 32
_REFUSALS = (AssertionError, RuntimeError, ValueError)


class Preprocessing(NamedTuple):
    """How images are made for a backbone."""

    size: int
    """Pixels per side."""
    crop_fraction: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Target:
    """A frozen backbone."""

    name: str
    """As it was asked for."""
    kind: Literal["run", "checkpoint", "released", "timm", "random", "pixels"]
    architecture: str
    """timm's name, or `pixels`."""
    backbone: nn.Module
    """In evaluation mode, without gradients; images to features [B, num_features]."""
    image: Preprocessing
    num_features: int
    digest: str
    """Of architecture and weights."""
    crops: CropsConfig = field(default_factory=CropsConfig)
    """The augmentation of its training where that is known, else the default one; of `image.size`."""
    run_dir: Path | None = None
    """The run that it belongs to."""
    step: int = 0
    """Of the training."""
    network: str | None = None
    """teacher | student, of a run or checkpoint."""

    @property
    def record(self) -> RunRecord | None:
        return RunRecord.read(self.run_dir) if self.run_dir is not None else None

    def describe(self) -> dict[str, Any]:
        """What tells it from other targets, for JSON."""
        known = {"name": self.name, "kind": self.kind, "architecture": self.architecture, "step": self.step}
        known |= {"network": self.network, "image_size": self.image.size, "crop_fraction": self.image.crop_fraction}
        return known | {"num_features": self.num_features, "digest": self.digest}


class Pixels(nn.Module):
    """No network: an image's values are its features."""

    num_features = 3

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def forward_features(self, images: Tensor) -> Tensor:
        return images


def find_target(name: str, settings: FeaturesConfig, storage: str) -> Target:
    """The target of that name.

    Args:
        storage: `cluster.storage`, where names of runs are looked for.

    Raises:
        ConfigError: There is none (naming the nearest), its weights cannot be had or are of another architecture, or it
            does not take images of `features.image_size`.
    """
    named = resolve(name, storage)
    if named.is_random:
        return _random(named, settings)
    match named.kind:
        case "pixels":
            image = _preprocessing({"input_size": [3, _PIXELS_SIZE]})
            return _finished(name, "pixels", PIXELS, Pixels(), image, settings)
        case "checkpoint":
            return _of_checkpoint(named, settings)
        case "released":
            return _released(name, settings)
        case "timm":
            return _pretrained(name, settings)


def _of_checkpoint(named: Named, settings: FeaturesConfig) -> Target:
    name = named.name
    checkpoint = newest_whole(name, named.checkpoints)
    loaded = _load(checkpoint, settings)
    run_dir = checkpoint.parent.parent
    known = dict[str, Any](crops=_crops(loaded), step=int(loaded.origin["step"]), network=settings.network)
    if (run_dir / RUN_FILE).exists():
        known["run_dir"] = run_dir
    kind: Literal["run", "checkpoint"] = "run" if "run_dir" in known else "checkpoint"
    return _finished(name, kind, loaded.name, loaded.model, _preprocessing(loaded.preprocessing), settings, **known)


def _load(checkpoint: Path, settings: FeaturesConfig) -> Backbone:
    from dino_core.checkpoint import CheckpointError

    try:
        return load_backbone(checkpoint, settings.network)
    except (ExportError, CheckpointError) as error:
        raise ConfigError(str(error)) from error


def _crops(loaded: Backbone) -> CropsConfig:
    """The augmentation of a checkpoint's run; lists of JSON are tuples here."""
    stored = loaded.config["crops"].items()
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in stored}
    return CropsConfig(**values)


def _released(name: str, settings: FeaturesConfig) -> Target:
    from dino_core.pretrained import WeightsError, load_official, read_official

    try:
        found = read_official(name, network=settings.network)
        model = load_official(name, network=settings.network, image_size=settings.image_size)
    except (FileNotFoundError, ValueError) as error:
        text = str(error)
        raise ConfigError(
            text if isinstance(error, (WeightsError, FileNotFoundError)) else f"features.{text}"
        ) from error
    return _finished(name, "released", found.name, model, _preprocessing({"input_size": [3, 224]}), settings)


def _random(named: Named, settings: FeaturesConfig) -> Target:
    """An architecture with random weights: of a run as the training would have drawn them from that seed."""
    known: dict[str, Any] = {}
    if named.kind == "checkpoint":
        loaded = _load(newest_whole(named.inner, named.checkpoints), settings)
        model = ModelConfig(**loaded.config["model"])
        image = _preprocessing(loaded.preprocessing)
        known["crops"] = _crops(loaded)
    else:
        model, image = ModelConfig(backbone=named.inner), _preprocessing(_known_by_timm(named.inner))
    size = settings.image_size or image.size
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        backbone = build_backbone(replace(model, drop_path=0.0, activation_checkpointing=False), size)
    return _finished(named.name, "random", model.backbone, backbone, image, settings, **known)


def _pretrained(name: str, settings: FeaturesConfig) -> Target:
    """A timm model with the weights that timm knows."""
    import timm

    arguments: dict[str, Any] = {}
    if not name.startswith(OF_TIMM):
        entry, _, tag = name.partition(".")
        tags = timm.list_pretrained(f"{entry}.*") if timm.is_model_pretrained(entry) else []
        if not tags:
            raise ConfigError(f"{name}: timm has no pretrained weights of it; there is random:{entry}")
        if tag and name not in tags:
            raise ConfigError(f"{name}: timm has no such weights; there is {', '.join(tags)}{did_you_mean(name, tags)}")
        kind = sizing(entry)
        arguments = dict(kind.any_size)
        if kind.image_size and settings.image_size is not None:
            arguments["img_size"] = settings.image_size
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0, **arguments)
    except Exception as error:  # the hub's client raises what its HTTP library does, and timm what is in the file
        raise ConfigError(f"{name}: timm cannot load its weights: {_first_line(error)}") from error
    known: Any = model.pretrained_cfg
    return _finished(name, "timm", str(known.get("architecture", name)), model, _preprocessing(known), settings)


def _known_by_timm(name: str) -> Mapping[str, Any]:
    import timm

    known = timm.models.get_pretrained_cfg(name)
    return known.to_dict() if known is not None else {}


def _preprocessing(known: Mapping[str, Any]) -> Preprocessing:
    """Of what timm knows of a model, or of a checkpoint; ImageNet's by default."""
    crops = CropsConfig()
    red, green, blue = known.get("mean") or crops.mean
    stds: Sequence[float] = known.get("std") or crops.std
    size = int((known.get("input_size") or (3, 224))[-1])
    fraction = float(known.get("crop_pct") or EvalConfig().crop_fraction)
    return Preprocessing(size, fraction, (red, green, blue), (stds[0], stds[1], stds[2]))


def _finished(
    name: str,
    kind: Literal["run", "checkpoint", "released", "timm", "random", "pixels"],
    architecture: str,
    backbone: nn.Module,
    image: Preprocessing,
    settings: FeaturesConfig,
    **known: Any,
) -> Target:
    """The target, once the backbone has taken an image of the size that is asked for."""
    size = settings.image_size or image.size
    image = image._replace(size=size, crop_fraction=settings.crop_fraction or image.crop_fraction)
    backbone = backbone.eval().requires_grad_(False)
    try:
        with torch.no_grad(), evaluating(backbone):
            features = backbone(torch.zeros(1, 3, size, size))
    except _REFUSALS as error:
        raise ConfigError(
            f"features.image_size = {size}: {architecture} does not take it: {_first_line(error)}"
        ) from error
    if not isinstance(features, Tensor) or features.dim() != 2:
        raise ConfigError(f"{name}: must turn images into features [B, D], not {getattr(features, 'shape', features)}")
    known["crops"] = replace(known.get("crops") or CropsConfig(mean=image.mean, std=image.std), global_size=size)
    return Target(
        name, kind, architecture, backbone, image, features.shape[1], _digest(architecture, backbone), **known
    )


def _digest(architecture: str, backbone: nn.Module) -> str:
    """32 characters: the same for the same architecture, as far as it is seen, and weights."""
    found = hashlib.sha256(f"{architecture}\n{backbone}".encode())
    for name, tensor in backbone.state_dict().items():
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:32]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
