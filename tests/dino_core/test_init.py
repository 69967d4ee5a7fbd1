from __future__ import annotations

import subprocess
import sys

import pytest

import dino_core
import dino_core.eval


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, dino_core, dino_core.config, dino_core.eval, dino_core.schedules, dino_core.backbone_names\n"
    code += "dino_core.backbone_names.check_backbone_name('resnet50')\n"
    code += "print(sorted({'torch', 'timm', 'numpy', 'torchvision', 'ray', 'mlflow', 'pydantic'} & set(sys.modules)))"
    assert python(code) == "[]"


@pytest.mark.parametrize("module", [dino_core, dino_core.eval])
def test_every_name_is_there(module):
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_fixed_names():
    assert callable(dino_core.train)
    assert callable(dino_core.eval.knn_accuracy)
    for name in ("dino_loss", "koleo_loss", "sinkhorn_knopp", "cosine_schedule", "DINOHead", "MultiCrop", "train_step"):
        assert callable(getattr(dino_core, name))
    assert callable(dino_core.TrainState.create)
