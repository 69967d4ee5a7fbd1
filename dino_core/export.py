"""A trained backbone for use elsewhere: timm, plain safetensors, a Hugging Face folder, ONNX.

::

    timm         model.safetensors, timm.json     timm.create_model(**arguments, checkpoint_path=...)
    safetensors  model.safetensors                tensors by timm's names; the arguments are in its header
    hf           model.safetensors, config.json, README.md     timm.create_model("local-dir:...", pretrained=True)
    onnx         model.onnx                       images [batch, 3, side, side] -> features [batch, D]

The model is built anew by timm, so nothing of the training is left in it. Importing this module loads no torch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from dino_core.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

Format = Literal["timm", "safetensors", "hf", "onnx"]
FORMATS: tuple[str, ...] = get_args(Format)
Network = Literal["teacher", "student"]
NETWORKS: tuple[str, ...] = get_args(Network)

WEIGHTS_FILE = "model.safetensors"
ARGUMENTS_FILE = "timm.json"
ONNX_FILE = "model.onnx"
_ONNX_PACKAGES = ("onnx", "onnxscript")


class ExportError(ValueError):
    """A backbone that cannot be exported. The message names what stands in the way."""


@dataclass(frozen=True)
class Export:
    """What was written."""

    checkpoint: Path
    folder: Path
    files: tuple[str, ...]
    usage: str
    """Lines of Python that load it as `model`."""


@dataclass(frozen=True)
class Backbone:
    """A backbone out of a checkpoint, and what a user of it must know."""

    name: str
    arguments: dict[str, Any]
    """For `timm.create_model`, besides the name."""
    preprocessing: dict[str, Any]
    """In the words of timm's `pretrained_cfg`."""
    model: nn.Module
    num_features: int
    origin: dict[str, str]
    """Network and step."""
    config: dict[str, Any]
    """The run's `PretrainConfig`."""

    def creation(self) -> dict[str, Any]:
        """All that `timm.create_model` needs, besides the path of the weights."""
        own = {"model_name": self.name, "pretrained": False, "num_classes": 0, **self.arguments}
        return own | {"pretrained_cfg_overlay": self.preprocessing}

    def texts(self) -> dict[str, str]:
        """All that is known, as the text that headers hold."""
        known = {"model_args": self.arguments, "preprocessing": self.preprocessing, "pretrain": self.config}
        return {"model_name": self.name} | self.origin | {name: json.dumps(value) for name, value in known.items()}


def check_target(to: Format, folder: Path) -> None:
    """Raises:
    ExportError: `folder` is not empty, or packages are missing.
    """
    missing = [name for name in _ONNX_PACKAGES if to == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"{to}: needs {' and '.join(missing)}; pip install {' '.join(_ONNX_PACKAGES)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder}: {'is not empty' if folder.is_dir() else 'is no folder'}; name a new folder")


def export_backbone(checkpoint: Path, to: Format, folder: Path, *, network: Network = "teacher") -> Export:
    """Write a backbone of a checkpoint into `folder`, which may not exist yet.

    The features are those of the network in evaluation mode, pooled: [n, D].

    Args:
        checkpoint: a folder written by `save_checkpoint`.
        to: the format; see the head of this module.

    Raises:
        ExportError: `folder` is not empty, packages are missing, or the checkpoint's configuration does not describe
            its backbone.
        CheckpointError: the checkpoint is incomplete or damaged.
        OSError: it cannot be written.

    Whatever is raised, no file is left behind.
    """
    check_target(to, folder)
    backbone = load_backbone(checkpoint, network)
    if backbone.config["model"].get("swiglu") and to != "onnx":
        raise ExportError(
            f"{checkpoint}: timm has no argument by which others could build {backbone.name} with "
            "pretrain.model.swiglu = true; only onnx can hold it"
        )
    folder = folder.resolve()
    temporary = folder.with_name(f".partial-{folder.name}-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        usage = _WRITERS[to](backbone, temporary, folder)
        names = sorted(path.name for path in temporary.iterdir())
        folder.mkdir(exist_ok=True)
        for name in names:
            (temporary / name).rename(folder / name)
    finally:
        shutil.rmtree(temporary)
    return Export(checkpoint, folder, tuple(names), usage)


# ---------------------------------------------------------------------------------------------------------- loading


def load_backbone(checkpoint: Path, network: Network = "teacher") -> Backbone:
    """The backbone of a checkpoint as timm builds it, in evaluation mode.

    Raises:
        ExportError: The checkpoint's configuration does not describe its backbone.
        CheckpointError: The checkpoint is incomplete or damaged.
    """
    import timm
    from safetensors import safe_open

    from dino_core.backbones import backbone_arguments, num_features, swiglu_arguments
    from dino_core.checkpoint import MODEL_FILE, STATE_FILE, verify_checkpoint

    verify_checkpoint(checkpoint)
    state = json.loads((checkpoint / STATE_FILE).read_text())
    config = state["config"]
    crops = config["crops"]
    try:
        settings = ModelConfig(**config["model"])
    except TypeError as error:
        raise ExportError(f"{checkpoint}: its pretrain.model.* is of another release: {error}") from error
    side = crops["global_size"]
    arguments = backbone_arguments(settings, side)
    own = swiglu_arguments(settings, arguments) if settings.swiglu else {}
    preprocessing = {
        "input_size": [3, side, side],
        "interpolation": "bicubic",
        "crop_pct": config["eval"]["crop_fraction"],
        "crop_mode": "center",
        "mean": crops["mean"],
        "std": crops["std"],
        "num_classes": 0,
    }
    if arguments.get("dynamic_img_size") or arguments.get("strict_img_size") is False:
        preprocessing["fixed_input_size"] = False
    model = timm.create_model(
        settings.backbone, pretrained=False, num_classes=0, pretrained_cfg_overlay=preprocessing, **arguments, **own
    )
    prefix = f"{network}.backbone."
    with safe_open(checkpoint / MODEL_FILE, "pt") as file:
        tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    tensors.pop("mask_token", None)  # a student's, for training alone
    _fill(model, tensors, checkpoint, settings.backbone)
    origin = {"network": network, "step": str(state["step"])}
    return Backbone(settings.backbone, arguments, preprocessing, model.eval(), num_features(model), origin, config)


def _fill(model: nn.Module, tensors: dict[str, Tensor], checkpoint: Path, name: str) -> None:
    expected = model.state_dict()
    wrong = sorted(
        key
        for key in expected.keys() | tensors.keys()
        if key not in expected or key not in tensors or expected[key].shape != tensors[key].shape
    )
    if wrong:
        raise ExportError(
            f"{checkpoint}: the backbone is not the {name} of its configuration, as of a run that was given a backbone "
            f"of its own; {len(wrong)} tensors are missing, others, or of another shape, such as {wrong[0]}"
        )
    model.load_state_dict(tensors)


# ---------------------------------------------------------------------------------------------------------- writing


def _write_weights(backbone: Backbone, temporary: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in backbone.model.state_dict().items()}
    try:
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"} | backbone.texts())
    except SafetensorError as error:  # a full disk is one, too
        raise ExportError(f"{temporary.parent}: cannot be written: {error}") from error


def _write_safetensors(backbone: Backbone, temporary: Path, folder: Path) -> str:
    _write_weights(backbone, temporary)
    return "\n".join(
        [
            _create(backbone),
            f"model.load_state_dict(safetensors.torch.load_file({str(folder / WEIGHTS_FILE)!r}))",
        ]
    )


def _write_timm(backbone: Backbone, temporary: Path, folder: Path) -> str:
    _write_weights(backbone, temporary)
    _write_json(temporary / ARGUMENTS_FILE, backbone.creation())
    return _create(backbone, checkpoint_path=str(folder / WEIGHTS_FILE))


def _create(backbone: Backbone, **more: Any) -> str:
    given = backbone.creation() | more
    name = given.pop("model_name")
    return f"model = timm.create_model({name!r}, {', '.join(f'{key}={value!r}' for key, value in given.items())})"


def _write_hf(backbone: Backbone, temporary: Path, folder: Path) -> str:
    """The layout of timm's own `save_for_hf`, without what timm knows of its weights of the same architecture."""
    _write_weights(backbone, temporary)
    model = backbone.model
    known: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    layers = {name: known[name] for name in ("first_conv", "classifier", "fixed_input_size") if name in known}
    content = {
        "architecture": backbone.name,
        "num_classes": 0,
        "num_features": backbone.num_features,
        "model_args": backbone.arguments,
        "pretrained_cfg": layers | backbone.preprocessing | {"custom_load": False},
    }
    pooling = _pooling(model)
    _write_json(temporary / "config.json", content | ({"global_pool": pooling} if pooling is not None else {}))
    (temporary / "README.md").write_text(_model_card(backbone), encoding="utf-8")
    return f"model = timm.create_model({f'local-dir:{folder}'!r}, pretrained=True)"


def _pooling(model: nn.Module) -> str | None:
    """How timm pools; None where it has no word for it."""
    from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d

    own = getattr(model, "global_pool", None)
    if isinstance(own, str):
        return own
    kinds = [str(layer.pool_type) for layer in model.modules() if isinstance(layer, SelectAdaptivePool2d)]
    return kinds[0] if kinds else None


def _model_card(backbone: Backbone) -> str:
    side = backbone.preprocessing["input_size"][-1]
    mean, std = backbone.preprocessing["mean"], backbone.preprocessing["std"]
    return f"""\
---
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- image-feature-extraction
- self-supervised
- timm
---

# {backbone.name}

The {backbone.origin["network"]}'s backbone after {backbone.origin["step"]} steps of self-supervised pre-training:
images in, {backbone.num_features} features out, no classifier.

```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:OWNER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model(transform(image).unsqueeze(0))
```

Images are {side} x {side} pixels, RGB, scaled to 0..1, then normalised by mean {mean} and
standard deviation {std}.

The run's configuration:

```json
{json.dumps(backbone.config, indent=1)}
```
"""


def _write_onnx(backbone: Backbone, temporary: Path, folder: Path) -> str:
    import onnx
    import torch

    size = backbone.preprocessing["input_size"]
    try:
        program = torch.onnx.export(
            backbone.model,
            (torch.zeros(2, *size),),  # a batch of one would be taken for a constant
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ExportError(f"onnx: torch cannot express {backbone.name} in it: {reason}") from error
    assert program is not None
    preprocessing = {name: json.dumps(value) for name, value in backbone.preprocessing.items()}
    program.model.metadata_props.update(backbone.texts() | preprocessing)
    program.save(temporary / ONNX_FILE)
    onnx.checker.check_model(temporary / ONNX_FILE, full_check=True)
    return f"model = onnxruntime.InferenceSession({str(folder / ONNX_FILE)!r})"


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


_WRITERS = {"timm": _write_timm, "safetensors": _write_safetensors, "hf": _write_hf, "onnx": _write_onnx}
