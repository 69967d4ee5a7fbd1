"""Verdicts on real curves: every tenth step of 75 to 150 of the quickstart recipe on the digits, changed as each says.

`mse_*` and `nce_*` are the same recipe with squared distance and in-batch InfoNCE of the normalised outputs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dino_core.causes import likely_cause
from dino_core.config import (
    HeadConfig,
    IBOTConfig,
    LossConfig,
    OptimConfig,
    PredictorConfig,
    PretrainConfig,
    StudentConfig,
    TeacherConfig,
)
from dino_core.diagnosis import SUSTAINED_POINTS, Verdict, diagnose
from dino_core.train import NonFiniteLossError

RUNS: dict[str, Any] = json.loads(Path(__file__).with_name("diagnosis_curves.json").read_text())
Curves = dict[str, list[tuple[int, float]]]

DIGITS = PretrainConfig(
    head=HeadConfig(num_prototypes=256, hidden_dim=256, bottleneck_dim=64, batch_norm=True),
    teacher=TeacherConfig(temp=0.04, warmup_temp=0.04, momentum=0.99, final_momentum=0.996),
    student=StudentConfig(temp=0.2),
    optim=OptimConfig(lr=1e-3, lr_reference_batch_size=None, warmup_epochs=0.0),
)
LN_K = math.log(256)


def change(config: PretrainConfig, **changes: Any) -> PretrainConfig:
    """`config` with values replaced by keys such as `teacher__temp`."""
    for key, value in changes.items():
        part, _, field = key.partition("__")
        new = dataclasses.replace(getattr(config, part), **{field: value}) if field else value
        config = dataclasses.replace(config, **{part: new})
    return config


def curves_of(run: str) -> Curves:
    steps, metrics = RUNS[run]["steps"], RUNS[run]["metrics"]
    return {name: list(zip(steps, values, strict=True)) for name, values in metrics.items()}


def constant(steps: int = 5, **values: float) -> Curves:
    return {f"train/{name}": [(10 * i, value) for i in range(steps)] for name, value in values.items()}


CONFIGS = {
    "healthy": DIGITS,
    "no_centring": change(DIGITS, teacher__centering="none"),
    "no_sharpening": change(DIGITS, teacher__temp=1.0, teacher__warmup_temp=1.0),
    "equal_temps": change(DIGITS, teacher__temp=0.2, teacher__warmup_temp=0.2),
    "no_batch_norm": change(DIGITS, head__batch_norm=False),
    "lr_100": change(DIGITS, optim__lr=0.1),
    "above_uniform": change(DIGITS, optim__lr=0.03, student__temp=0.02, teacher__temp=0.01, teacher__warmup_temp=0.01),
    "mse_collapsed": change(DIGITS, loss__name="mse", teacher__centering="none", head__batch_norm=False),
    "mse_centred": change(DIGITS, loss__name="mse"),
    "nce_healthy": change(
        DIGITS, teacher=TeacherConfig(centering="none", momentum=0.99), loss=LossConfig(name="info_nce")
    ),
}


@pytest.mark.parametrize(
    ("run", "verdict", "step", "cause"),
    [
        ("healthy", "healthy", None, ""),
        ("no_centring", "one-hot collapse", 50, "no centring (pretrain.teacher.centering = none)"),
        ("no_sharpening", "uniform collapse", 20, "no sharpening (pretrain.teacher.temp = 1 is not below"),
        ("equal_temps", "uniform collapse", 30, "no sharpening (pretrain.teacher.temp = 0.2 is not below"),
        ("no_batch_norm", "uniform collapse", 30, "the head has no batch norm"),
        ("lr_100", "dimensional collapse", 40, "a learning rate too high for AdamW (pretrain.optim.lr = 0.1,"),
        ("above_uniform", "dimensional collapse", 40, "a learning rate too high for AdamW (pretrain.optim.lr = 0.03,"),
        ("mse_collapsed", "uniform collapse", 20, "nothing keeps both sides from agreeing on a constant"),
        ("mse_centred", "healthy", None, ""),
        ("nce_healthy", "healthy", None, ""),
    ],
)
def test_real_runs(run: str, verdict: Verdict, step: int | None, cause: str) -> None:
    found = diagnose(curves_of(run), CONFIGS[run])
    assert (found.verdict, found.step) == (verdict, step)
    assert found.cause.startswith(cause) and bool(found.cause) == bool(cause)
    assert len(found.evidence) >= 2
    assert found.is_bad == (verdict != "healthy")


def test_evidence_has_the_numbers_of_the_end() -> None:
    assert diagnose(curves_of("no_centring"), CONFIGS["no_centring"]).evidence == (
        "teacher entropy 0.000 of ln K",
        "1.0 of 256 prototypes in use",
    )
    assert "rank of the features 8.37" in " ".join(diagnose(curves_of("healthy"), DIGITS).evidence)


@pytest.mark.parametrize(
    ("run", "verdict"),
    [
        ("no_centring", "one-hot collapse"),
        ("no_sharpening", "uniform collapse"),
        ("no_batch_norm", "uniform collapse"),
        ("healthy", "healthy"),
    ],
)
def test_records_from_before_the_newer_metrics(run: str, verdict: Verdict) -> None:
    logged = ("train/loss", "train/teacher_entropy", "train/kl", "train/grad_norm", "train/feature_std")
    curves = {name: curve for name, curve in curves_of(run).items() if name in logged}
    assert diagnose(curves, CONFIGS[run]).verdict == verdict


def test_a_run_that_recovers_is_healthy() -> None:
    lost, well = curves_of("no_sharpening"), curves_of("healthy")
    curves = {name: lost[name] + [(200 + step, value) for step, value in well[name]] for name in well}
    assert diagnose(curves, DIGITS).verdict == "healthy"
    back = {name: well[name] + [(200 + step, value) for step, value in lost[name]] for name in well}
    found = diagnose(back, DIGITS)
    assert found.verdict == "uniform collapse"
    assert found.step is not None and found.step >= 200


def test_one_odd_point_neither_makes_nor_hides_a_collapse() -> None:
    curves = curves_of("no_centring")
    curves["train/prototype_usage"][-2] = (curves["train/prototype_usage"][-2][0], 200.0)
    assert diagnose(curves, CONFIGS["no_centring"]).verdict == "one-hot collapse"
    curves = curves_of("healthy")
    for name, value in (("prototype_usage", 1.0), ("teacher_entropy", 0.0)):
        step = curves[f"train/{name}"][-1][0]
        curves[f"train/{name}"][-1] = (step, value)
    assert diagnose(curves, DIGITS).verdict == "healthy"


def test_one_signal_alone_is_no_collapse() -> None:
    hard = constant(loss=3.0, teacher_entropy=0.0, kl=3.0, prototype_usage=180.0, feature_std=0.3, feature_rank=9.0)
    assert diagnose(hard, change(DIGITS, teacher__sharpening="argmax")).verdict == "healthy"
    soft = constant(loss=3.0, teacher_entropy=0.99 * LN_K, kl=1.0, prototype_usage=256.0)
    assert diagnose(soft, DIGITS).verdict == "healthy"
    narrow = constant(loss=3.0, teacher_entropy=2.0, prototype_usage=50.0, feature_std=0.02, feature_rank=1.5)
    assert diagnose(narrow, DIGITS).verdict == "healthy"  # so they were at the start


def test_features_that_lose_their_directions() -> None:
    curves = constant(8, loss=3.0, teacher_entropy=2.0, prototype_usage=50.0)
    curves["train/feature_rank"] = [(10 * i, 60.0 if i < 2 else 2.5) for i in range(8)]
    found = diagnose(curves, DIGITS)
    assert (found.verdict, found.step) == ("dimensional collapse", 30)  # 20 is the median of two high points and a low
    assert found.evidence == ("rank of the features 2.5, 60 at the start", "the features fill 2.5 directions")


def test_info_nce_that_tells_no_image_apart() -> None:
    curves = constant(loss=math.log(64), loss_below_uniform=0.0, target_std=0.01)
    assert diagnose(curves, CONFIGS["nce_healthy"]).verdict == "uniform collapse"
    assert diagnose(curves | constant(target_std=0.9), CONFIGS["nce_healthy"]).verdict == "healthy"


def test_divergence() -> None:
    rising = [(10 * i, 5.0 + 0.5 * i) for i in range(9)]
    curves = constant(9, teacher_entropy=2.0, prototype_usage=50.0) | {"train/loss": rising}
    found = diagnose(curves, DIGITS)
    assert (found.verdict, found.step) == ("diverged", 50)  # 1.25 ln K = 6.93 lies between steps 30 and 40
    falling = curves | {"train/loss": [(step, 20.0 - loss) for step, loss in rising]}
    assert diagnose(falling, DIGITS).verdict == "healthy"
    exploded = [(10 * i, 1.0 if i < 30 else 300.0) for i in range(40)]
    curves = constant(40, teacher_entropy=2.0, prototype_usage=50.0) | {"train/grad_norm": exploded}
    slightly = [(10 * i, 4.0 + 0.01 * i) for i in range(40)]
    assert diagnose(curves | {"train/loss": slightly}, DIGITS).step == 310
    assert diagnose(curves | constant(40, loss=4.0), DIGITS).verdict == "healthy"


def test_a_loss_that_is_not_finite_needs_no_second_signal() -> None:
    assert diagnose({"train/loss": [(0, 5.0), (10, math.nan)]}, DIGITS).step == 10
    found = diagnose(
        {"train/loss": [(0, 5.0)]}, DIGITS, reason=f"NonFiniteLossError: {NonFiniteLossError(7, math.inf)}"
    )
    assert (found.verdict, found.step, found.evidence) == ("diverged", 7, ("the loss of step 7 is inf",))
    assert found.cause.startswith("no warm-up of the learning rate (pretrain.optim.warmup_epochs = 0")
    found = diagnose({}, DIGITS, reason="the features of training images at step 1 are not finite")
    assert (found.verdict, found.step) == ("diverged", 0)
    assert diagnose({}, DIGITS, reason="OSError: no space left").verdict == "unknown"


def test_too_little_to_say() -> None:
    few = {name: curve[: SUSTAINED_POINTS - 1] for name, curve in curves_of("no_centring").items()}
    assert diagnose(few, CONFIGS["no_centring"]).verdict == "unknown"
    assert diagnose({}, DIGITS).verdict == "unknown"
    found = diagnose(constant(loss=3.0), DIGITS)
    assert (found.verdict, found.evidence) == ("unknown", ("train/teacher_entropy was not logged",))


@pytest.mark.parametrize(
    ("verdict", "changes", "words"),
    [
        ("uniform collapse", {"teacher__temp": 0.08, "student__temp": 0.1}, "pretrain.teacher.temp = 0.08"),
        ("uniform collapse", {"teacher__sharpening": "none"}, "pretrain.teacher.sharpening = none"),
        ("uniform collapse", {"teacher__center_momentum": 0.999}, "pretrain.teacher.center_momentum = 0.999"),
        ("uniform collapse", {"teacher__update": "student_copy"}, "pretrain.teacher.update = student_copy"),
        ("uniform collapse", {"head__bottleneck_norm": False}, "pretrain.head.bottleneck_norm = false"),
        ("uniform collapse", {"teacher__momentum": 0.5}, "pretrain.teacher.momentum = 0.5"),
        ("one-hot collapse", {"teacher__center_momentum": 0.999}, "pretrain.teacher.center_momentum = 0.999"),
        ("one-hot collapse", {}, "pretrain.teacher.temp = 0.04"),
        ("dimensional collapse", {"optim__warmup_epochs": 10.0}, "pretrain.crops.num_local_crops = 8"),
        ("diverged", {"precision": "fp16"}, "pretrain.precision = fp16"),
        ("diverged", {"optim__clip_grad": None}, "pretrain.optim.clip_grad = none"),
        ("diverged", {"optim__warmup_epochs": 1.0}, "pretrain.optim.lr (now 0.001)"),
    ],
)
def test_causes_name_the_key_and_its_value(verdict: Verdict, changes: dict[str, Any], words: str) -> None:
    cause = likely_cause(verdict, change(DIGITS, **changes))
    assert words in cause
    assert "try" in cause


def test_the_papers_own_methods_are_told_apart() -> None:
    balanced = change(DIGITS, teacher__update="student_copy", teacher__centering="sinkhorn_knopp")
    assert "student_copy" not in likely_cause("one-hot collapse", balanced)
    mse = change(DIGITS, loss__name="mse", teacher__centering="none")
    assert "pretrain.predictor.num_layers = 0" in likely_cause("uniform collapse", mse)
    byol = change(mse, predictor=PredictorConfig(num_layers=2, batch_norm=False), head__batch_norm=False)
    assert likely_cause("uniform collapse", byol).startswith("mean squared error without batch norm")
    assert likely_cause("healthy", DIGITS) == ""


def test_patches_are_judged_as_class_tokens_are() -> None:
    both = change(DIGITS, ibot=IBOTConfig(weight=1.0, head="untied", num_prototypes=64))
    well = {"teacher_entropy": 0.6 * LN_K, "kl": 0.5, "prototype_usage": 120.0, "class_loss": 0.6 * LN_K + 0.5}
    patches = {"patch_teacher_entropy": 2.0, "patch_kl": 0.5, "patch_prototype_usage": 40.0}
    below = {"patch_loss_below_uniform": math.log(64) - 2.5}
    # the sum of both losses is above ln K without anything being wrong
    fine = diagnose(constant(loss=9.0, **well, **patches, **below), both)
    assert fine.verdict == "healthy"
    assert "patches: 40 of 64 prototypes in use" in fine.evidence
    collapsed = {"patch_teacher_entropy": 0.999 * math.log(64), "patch_kl": 0.0, "patch_prototype_usage": 64.0}
    found = diagnose(constant(loss=9.0, **well, **collapsed, patch_loss_below_uniform=0.001), both)
    assert (found.verdict, found.step) == ("uniform collapse", 0)
    assert found.evidence[0] == "patches: teacher entropy 0.999 of ln K"
    alone = change(both, crops__num_local_crops=0, ibot=IBOTConfig(weight=1.0), loss__weight=0.0)
    one_hot = {"patch_teacher_entropy": 0.01, "patch_kl": 0.0, "patch_prototype_usage": 1.0}
    assert diagnose(constant(loss=0.01, **one_hot, patch_loss_below_uniform=LN_K), alone).verdict == "one-hot collapse"
    assert diagnose(constant(loss=3.0), alone).verdict == "unknown"


def test_needs_no_torch() -> None:
    code = "import sys, dino_core.diagnosis; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])
