from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from dino_core import checkpoint
from dino_core.checkpoint import latest_checkpoint, save_checkpoint
from dino_core.config import CropsConfig, HeadConfig, ModelConfig, PretrainConfig
from dino_core.train import TrainState
from orchestrator import cli
from orchestrator import export as command
from orchestrator.records import CHECKPOINTS_DIR, SWEEP_FILE, RunRecord, write_json

ROOT = Path(__file__).resolve().parents[2]
RUN = "tiny-20260101-120000-ab12"
HEAVY = ("torch", "timm", "ray", "mlflow", "onnx")


def make_run(folder: Path, name: str) -> None:
    RunRecord(run_id=name, experiment="e", recipe="r", seed=0, config={}).write(folder)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/: one run with checkpoints of steps 3 and 5, one without, and a sweep."""
    storage = tmp_path_factory.mktemp("here") / "runs"
    config = PretrainConfig(
        batch_size=4,
        model=ModelConfig(backbone="vit_tiny_patch16_224", patch_size=8, embed_dim=12, depth=1, num_heads=2),
        head=HeadConfig(num_prototypes=8, hidden_dim=8, bottleneck_dim=4),
        crops=CropsConfig(num_local_crops=0, global_size=16),
    )
    state = TrainState.create(config, 16)
    make_run(storage / RUN, RUN)
    for step in (3, 5):
        state.step = step
        torch.nn.init.constant_(next(state.teacher.backbone.parameters()), float(step))
        save_checkpoint(state, storage / RUN / CHECKPOINTS_DIR)
    make_run(storage / "empty", "empty")
    write_json(storage / "swept" / SWEEP_FILE, {})
    make_run(storage / "swept" / "trials" / "trial_0", "trial_0")
    return storage


@pytest.fixture
def storage(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as runs/ in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(template, tmp_path / "runs")
    return tmp_path / "runs"


def first_value(out: str) -> float:
    arguments = json.loads(Path(out, "timm.json").read_text())
    model = timm.create_model(**arguments, checkpoint_path=f"{out}/model.safetensors")
    return next(model.parameters()).flatten()[0].item()


@pytest.mark.parametrize(
    ("name", "step"),
    [
        (RUN, 5),
        (f"runs/{RUN}", 5),
        (f"runs/{RUN}/checkpoints/step_00000003", 3),
        ("copied", 3),
    ],
)
def test_a_run_or_checkpoint_is_found(storage: Path, name: str, step: int, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(storage / RUN / CHECKPOINTS_DIR / "step_00000003", "copied")
    assert cli.main(["export", name, "--to", "timm", "new/out"]) == 0
    assert first_value("new/out") == step
    printed = capsys.readouterr().out
    assert "model.safetensors, timm.json" in printed
    assert "timm.create_model('vit_tiny_patch16_224', pretrained=False, num_classes=0, " in printed
    assert "embed_dim=12" in printed


def test_a_damaged_checkpoint_is_passed_over(storage: Path) -> None:
    (storage / RUN / CHECKPOINTS_DIR / "step_00000005" / checkpoint.MODEL_FILE).write_bytes(b"")
    assert cli.main(["export", RUN, "--to", "timm", "out"]) == 0
    assert first_value("out") == 3


def test_the_student_can_be_chosen(storage: Path) -> None:
    assert cli.main(["export", RUN, "--to", "timm", "out", "--network", "student"]) == 0
    assert abs(first_value("out")) < 1  # only the teacher's was set to the step


BAD_INPUT = [
    (["tiny-ab13", "--to", "timm", "out"], f"error: no run 'tiny-ab13' in ./runs; did you mean {RUN}?"),
    (["nowhere", "--to", "timm", "out"], "error: no run 'nowhere' in ./runs"),
    (["empty", "--to", "timm", "out"], "error: empty: has no checkpoint yet"),
    (["swept", "--to", "timm", "out"], "is a sweep; name one of its trials, such as runs/swept/trials/trial_0"),
    (["swept/trials/trial_0", "--to", "timm", "out"], "error: swept/trials/trial_0: has no checkpoint yet"),
    ([RUN, "--to", "timm", "runs"], "error: runs: is not empty; name a new folder"),
    ([RUN, "out"], "Missing option '--to'"),
    ([RUN, "--to", "tmm", "out"], "Invalid value for '--to': 'tmm' is not one of 'timm', 'safetensors', 'hf', 'onnx'"),
    ([RUN, "--to", "timm"], "Missing argument 'DIR'"),
    ([RUN, "--to", "timm", "out", "--network", "both"], "Invalid value for '--network'"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT, ids=[message for _, message in BAD_INPUT])
def test_bad_input_is_one_message(
    storage: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["runs"]


def test_help_and_bad_input_import_nothing_heavy(storage: Path) -> None:
    code = f"""
import contextlib, io, sys
from orchestrator.cli import main
with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
    assert main(["export", "--help"]) == 0
    for arguments in {[arguments for arguments, _ in BAD_INPUT]}:
        assert main(["export", *arguments]) == 2
print([name for name in {HEAVY} if name in sys.modules])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


def test_checkpoints_that_cannot_be_used(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = storage / RUN / CHECKPOINTS_DIR
    for path in folder.iterdir():
        (path / checkpoint.MODEL_FILE).write_bytes(b"")
    assert cli.main(["export", RUN, "--to", "timm", "out"]) == 2
    assert f"error: {RUN}: no checkpoint in {folder} is whole" in capsys.readouterr().err
    assert cli.main(["export", str(folder / "step_00000005"), "--to", "timm", "out"]) == 2
    assert "model.safetensors: damaged, 0 bytes long" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    assert cli.main(["export", RUN, "--to", "timm", "file/out"]) == 2
    assert "error: file/out: cannot be written: " in capsys.readouterr().err


def test_the_name_of_the_manifest_is_that_of_checkpoints(storage: Path) -> None:
    assert command._MANIFEST_FILE == checkpoint.MANIFEST_FILE
    newest = latest_checkpoint(storage / RUN / CHECKPOINTS_DIR)
    assert newest is not None
    assert newest.match(command._CHECKPOINTS)
