from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from torch import nn

from dino_core import export
from dino_core.checkpoint import MODEL_FILE, CheckpointError, save_checkpoint
from dino_core.config import CropsConfig, EvalConfig, HeadConfig, ModelConfig, PretrainConfig
from dino_core.export import ExportError, check_target, export_backbone
from dino_core.stochastic_depth import StochasticDepth
from dino_core.train import TrainState

SIDE = 32
MODELS = {
    "vit": ModelConfig(
        backbone="vit_tiny_patch16_224", patch_size=8, embed_dim=24, depth=2, num_heads=3, drop_path=0.2
    ),
    "vit of average": ModelConfig(backbone="vit_pwee_patch16_reg1_gap_256", embed_dim=32, depth=1, num_heads=2),
    "resnet": ModelConfig(backbone="test_resnet", drop_path=0.0),
    "convnext": ModelConfig(backbone="test_convnext2", drop_path=0.1),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Case:
    """A checkpoint, and the features that student and teacher had when it was written."""

    def __init__(self, model: ModelConfig, folder: Path, settings: ModelConfig | None = None) -> None:
        self.config = PretrainConfig(
            batch_size=4,
            model=model,
            head=HeadConfig(num_prototypes=8, hidden_dim=8, bottleneck_dim=4),
            crops=CropsConfig(num_local_crops=0, global_size=SIDE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3)),
            eval=EvalConfig(crop_fraction=0.8),
        )
        state = TrainState.create(self.config, 16)
        state.step = 7
        generator = torch.Generator().manual_seed(1)
        for network in (state.student, state.teacher):  # as if they had been trained: all values matter
            for tensor in network.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
        if settings is not None:  # what the checkpoint says instead
            state.config = dataclasses.replace(self.config, model=settings)
        self.path = save_checkpoint(state, folder)
        self.images = torch.randn(3, 3, SIDE, SIDE, generator=generator)
        with torch.no_grad():
            networks = {"student": state.student, "teacher": state.teacher}
            self.features = {name: part.backbone.eval()(self.images) for name, part in networks.items()}
        assert not torch.allclose(self.features["student"], self.features["teacher"], atol=1e-3)

    def check(self, model: nn.Module, network: str = "teacher") -> None:
        assert not any(isinstance(module, StochasticDepth) for module in model.modules())
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(self.images), self.features[network], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {name: Case(model, tmp_path_factory.mktemp("run")) for name, model in MODELS.items()}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_timm_arguments_rebuild_the_model(case: Case, network: Any, tmp_path: Path) -> None:
    written = export_backbone(case.path, "timm", tmp_path / "out", network=network)
    assert written.files == ("model.safetensors", "timm.json")
    arguments = json.loads((tmp_path / "out" / "timm.json").read_text())
    model = timm.create_model(**arguments, checkpoint_path=str(tmp_path / "out" / "model.safetensors"))
    case.check(model, network)
    assert preprocessing(model) == expected_preprocessing()


def preprocessing(model: nn.Module) -> dict[str, Any]:
    found = resolve_model_data_config(model)
    return {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}


def expected_preprocessing() -> dict[str, Any]:
    return {
        "input_size": (3, SIDE, SIDE),
        "interpolation": "bicubic",
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.25, 0.3),
        "crop_pct": 0.8,
        "crop_mode": "center",
    }


def test_the_printed_lines_of_python_work(case: Case, tmp_path: Path) -> None:
    for to in ("timm", "safetensors", "hf"):
        written = export_backbone(case.path, to, tmp_path / to)  # type: ignore[arg-type]
        names: dict[str, Any] = {}
        exec("import timm, safetensors.torch\n" + written.usage, names)
        case.check(names["model"])


def test_hugging_face_folder(case: Case, tmp_path: Path) -> None:
    written = export_backbone(case.path, "hf", tmp_path / "out")
    assert written.files == ("README.md", "config.json", "model.safetensors")
    name = f"local-dir:{tmp_path / 'out'}"
    model = timm.create_model(name, pretrained=True)
    case.check(model)
    assert preprocessing(model) == expected_preprocessing()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_classes"] == 0
    assert config["num_features"] == case.features["teacher"].shape[1]
    assert config["architecture"] == case.config.model.backbone
    finer = timm.create_model(name, pretrained=True, num_classes=5)  # to be tuned
    assert finer(case.images).shape == (3, 5)
    assert torch.equal(next(finer.parameters()), next(model.parameters()))
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    assert "teacher's backbone after 7 steps" in card
    assert '"num_prototypes": 8' in card


@pytest.mark.parametrize(("name", "pooling"), [("vit", "token"), ("vit of average", "avg"), ("resnet", "avg")])
def test_pooling_is_named(name: str, pooling: str, cases: dict[str, Case], tmp_path: Path) -> None:
    export_backbone(cases[name].path, "hf", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["global_pool"] == pooling


def test_safetensors_tell_what_they_are(cases: dict[str, Case], tmp_path: Path) -> None:
    export_backbone(cases["vit"].path, "safetensors", tmp_path / "out", network="student")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        header = file.metadata()
    assert header["model_name"] == "vit_tiny_patch16_224"
    assert (header["network"], header["step"]) == ("student", "7")
    assert json.loads(header["model_args"])["embed_dim"] == 24
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    saved = load_file(cases["vit"].path / MODEL_FILE)
    assert {f"student.backbone.{name}" for name in tensors} == {n for n in saved if n.startswith("student.backbone.")}
    assert all(torch.equal(tensor, saved[f"student.backbone.{name}"]) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_onnx_gives_the_same_features_for_any_batch(name: str, cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases[name]
    assert export_backbone(case.path, "onnx", tmp_path / "out").files == ("model.onnx",)
    path = tmp_path / "out" / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for images, features in ((case.images, case.features["teacher"]), (case.images[:1], case.features["teacher"][:1])):
        (found,) = session.run(["features"], {"images": images.numpy()})
        np.testing.assert_allclose(found, features.numpy(), rtol=1e-4, atol=1e-4)
    header = session.get_modelmeta().custom_metadata_map
    assert json.loads(header["mean"]) == [0.5, 0.4, 0.3]
    assert json.loads(header["std"]) == [0.2, 0.25, 0.3]
    assert json.loads(header["input_size"]) == [3, SIDE, SIDE]
    assert header["network"] == "teacher"


def test_a_folder_with_files_is_left_alone(cases: dict[str, Case], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="is not empty; name a new folder"):
        export_backbone(cases["vit"].path, "timm", tmp_path)
    with pytest.raises(ExportError, match="is no folder"):
        export_backbone(cases["vit"].path, "timm", tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failed_export_leaves_nothing(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "WEIGHTS_FILE", "no/such/folder")
    with pytest.raises(ExportError, match=r"cannot be written: .*No such file"):
        export_backbone(cases["vit"].path, "timm", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoints_are_refused(cases: dict[str, Case], tmp_path: Path) -> None:
    broken = tmp_path / "step_00000007"
    shutil.copytree(cases["vit"].path, broken)
    content = bytearray((broken / MODEL_FILE).read_bytes())
    content[-1] ^= 1
    (broken / MODEL_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        export_backbone(broken, "timm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_backbone_that_the_configuration_does_not_describe(tmp_path: Path) -> None:
    case = Case(MODELS["vit"], tmp_path / "run", settings=dataclasses.replace(MODELS["vit"], depth=3))
    with pytest.raises(ExportError, match=r"not the vit_tiny_patch16_224 of its.*such as blocks\.2\.attn"):
        export_backbone(case.path, "timm", tmp_path / "out")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(export, "_ONNX_PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(ExportError, match="onnx: needs no_such_package; pip install onnx no_such_package"):
        check_target("onnx", tmp_path / "out")
    check_target("hf", tmp_path / "out")
