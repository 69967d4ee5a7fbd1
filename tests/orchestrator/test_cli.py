from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.shell_completion import ShellComplete

from orchestrator import cli, records
from orchestrator.catalog import recipes, sweep_names
from orchestrator.errors import RunFailed
from orchestrator.overrides import flatten, override
from orchestrator.records import RunRecord
from sweeps.recipes import quickstart

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "torchvision", "timm", "ray", "mlflow", "pandas", "sklearn")

Q, SQ = ["pretrain", "quickstart"], ["sweep", "quickstart"]
BAD_INPUT = [
    (["pretran"], "No such command 'pretran'. Did you mean 'pretrain'?"),
    (["pretrain"], "Missing argument 'RECIPE'"),
    (["pretrain", "pretrain.seed=1"], "Missing argument 'RECIPE'"),
    ([*Q, "--dry"], "No such option '--dry'. Did you mean '--dry-run'?"),
    ([*Q, "--pretrain.seed=3"], "Settings have no dashes: pretrain.seed=VALUE"),
    ([*Q, "pretrain.seed"], "error: pretrain.seed: settings are given as key=value"),
    ([*Q, "pretrain.sed=1"], "error: pretrain.sed: unknown key; did you mean pretrain.seed?"),
    ([*Q, "pretrain.seed=1", "pretrain.seed=2"], "error: pretrain.seed: given twice, as 1 and 2"),
    ([*Q, "pretrain.teacher.temp=warm"], "error: pretrain.teacher.temp = warm: must be a number > 0"),
    ([*Q, "pretrain.teacher.temp=0"], "error: pretrain.teacher.temp = 0: must be a number > 0"),
    ([*Q, "pretrain.teacher.momentum=1.5"], "error: pretrain.teacher.momentum = 1.5: must be a number >= 0 and <= 1"),
    ([*Q, "pretrain.crops.num_local_crops=-1"], "error: pretrain.crops.num_local_crops = -1: must be a whole number"),
    ([*Q, "cluster.num_workers=3"], "error: pretrain.batch_size = 64: must be a multiple of cluster.num_workers = 3"),
    ([*Q, "pretrain.model.backbone=resnet5"], "timm has no model of this name; did you mean resnet50"),
    (
        [*Q, "pretrain.crops.local_size=9"],
        "error: pretrain.crops.local_size = 9: must be a multiple of the patch size 4",
    ),
    ([*Q, "data.source=nowhere"], "error: data.source = nowhere: no such file or folder"),
    ([*Q, "data.source=nowhere", "--dry-run"], "error: data.source = nowhere: no such file or folder"),
    ([*Q, "data.source=EMPTY"], "error: data.source = EMPTY: "),
    ([*Q, "data.source=EMPTY", "--dry-run"], "error: data.source = EMPTY: "),
    ([*Q, "cluster.num_workers=64"], "error: cluster.num_workers = 64"),
    ([*SQ, "data.source=nowhere"], "error: data.source = nowhere: no such file or folder"),
    ([*SQ, "cluster.num_workers=64"], "error: cluster.num_workers = 64"),
    ([*SQ, "data.source=EMPTY"], "error: data.source = EMPTY: "),
    ([*Q, "cluster.num_workers=64", "--dry-run"], "error: cluster.num_workers = 64"),
    ([*Q, "cluster.launcher=trial"], "error: cluster.launcher = trial: is for the trials of a sweep"),
    ([*Q, "--config", "nowhere.yaml"], "error: nowhere.yaml: cannot be read: No such file or directory"),
    ([*Q, "--local", "cluster.launcher=train"], "error: cluster.launcher = train: must be local with --local"),
    ([*Q, "sweep.seeds=3"], "error: sweep.seeds: unknown key"),
    (["evaluate", "knn"], "Missing argument 'TARGET'"),
    (["evaluate", "knnn", "pixels"], "error: no suite 'knnn'; did you mean knn?"),
    (["evaluate", "knn", "pixels", "knn.kk=3"], "error: knn.kk: unknown key; did you mean knn.k?"),
    (["evaluate", "knn", "pixels", "knn.k=0"], "error: knn.k = 0: must be whole numbers"),
    (["evaluate", "knn", "pixel"], "error: no run in ./runs, checkpoint, or timm model 'pixel'; did you mean pixels?"),
    (["pretrain", "quikstart"], "error: unknown recipe 'quikstart'; did you mean quickstart?"),
    (["pretrain", "--resume", "nowhere"], "error: no run 'nowhere' in"),
    (["pretrain", "--resume", "nowhere", "--dry-run"], "cannot be combined with --dry-run"),
    ([*Q, "--calibrate"], "--calibrate measures for --dry-run, and cannot be given without it"),
    ([*SQ, "--calibrate"], "--calibrate measures for --dry-run, and cannot be given without it"),
    ([*Q, "--method", "byoll"], "error: unknown method 'byoll'; did you mean byol?"),
    (
        ["pretrain", "cifar10_simclr", "--method", "swav"],
        "error: method swav: is a change of DINO, and cannot be applied",
    ),
    (["sweep", "components", "--base", "cifar10_simclr"], "error: method byol: is a change of DINO"),
    (
        [*Q, "--method", "byol", "pretrain.teacher.centering=sinkhorn_knopp"],
        "error: pretrain.teacher.centering = sinkh",
    ),
    ([*SQ, "--method", "byoll", "--dry-run"], "error: unknown method 'byoll'; did you mean byol?"),
    (["sweep", "components", "--method", "byol"], "error: sweep.method = byol: must be none for a sweep with rows"),
    (["sweep", "crops", "--vary", "pretrain.crops.num_local_crops=1,2"], "cannot vary, it is set by rows local_0"),
    (["sweep", "crops", "pretrain.crops.num_local_crops=1"], "every row of the sweep sets its own"),
    (["sweep", "temprature"], "error: unknown sweep 'temprature'; did you mean temperature or temperature_warmup?"),
    (["sweep", "nowhere.yaml"], "error: nowhere.yaml: cannot be read: No such file or directory"),
    (["sweep", "nowhere.py"], "error: nowhere.py: cannot be read: No such file or directory"),
    (["sweep", "cifar10_tiny"], "error: cifar10_tiny: varies nothing; give --vary"),
    ([*SQ, "--base", "dino_vit"], "error: unknown recipe 'dino_vit'; did you mean dino_vits16 or "),
    ([*SQ, "--seeds", "0"], "Invalid value for '--seeds'"),
    ([*SQ, "--seeds", "2", "sweep.seeds=3"], "error: sweep.seeds: given twice"),
    (
        [*SQ, "sweep.scheduler=ash"],
        "error: sweep.scheduler = ash: must be one of none, asha, median, hyperband, pbt; did you mean asha?",
    ),
    ([*SQ, "pretrain.teacher.temp=0.1"], "the sweep varies pretrain.teacher.temp; choose its values by --vary"),
    ([*SQ, "--vary", "pretrain.optim.lr=1e-3,0"], "error: pretrain.optim.lr = 0: must be a number > 0"),
    ([*SQ, "--vary", "pretrain.optim.lr"], "error: --vary pretrain.optim.lr: must be key=value,value,..."),
    ([*SQ, "data.source=nowhere", "--dry-run"], "error: data.source = nowhere: no such file or folder"),
    (["sweep", "--resume", "nowhere"], "error: no sweep 'nowhere' in"),
    (["sweep", "--resume", "nowhere", "--seeds", "2"], "cannot be combined with --seeds"),
    (["compare", "nowhere", "tracking.uri=sqlite:///nowhere.db"], "error: nowhere: no such folder of a run or sweep"),
    (["compare", "nowhere", "--format", "pdf"], "Invalid value for '--format'"),
    (["compare", "cluster.storage=runs"], "Missing argument 'EXPERIMENT'"),
    (["compare"], "Missing argument 'EXPERIMENT"),
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs in a folder of its own, with an empty folder EMPTY."""
    (tmp_path / "EMPTY").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT, ids=[" ".join(a) for a, _ in BAD_INPUT])
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(arguments) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""
    assert len(output.err.splitlines()) <= 6  # click adds how to use the command
    assert [path.name for path in tmp_path.iterdir()] == ["EMPTY"]  # nothing was started or written


def test_all_problems_are_in_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*Q, "pretrain.teacher.temp=0", "pretrain.lr=1"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: pretrain.teacher.temp = 0: must be a number > 0",
        "       pretrain.lr: unknown key; did you mean pretrain.optim.lr?",
    ]


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    start = ["-m", "orchestrator"] if code is None else ["-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *start, *arguments], capture_output=True, text=True, timeout=250, env=environment, check=False
    )


def test_help_and_bad_input_answer_at_once() -> None:
    run("--help")  # once to fill the caches of a fresh checkout
    seconds = []
    for arguments, code in ((["--help"], 0), ([*SQ, "pretrain.teacher.temp=0"], 2)):
        begin = time.monotonic()
        done = run(*arguments)
        seconds.append(time.monotonic() - begin)
        assert done.returncode == code
        assert "Traceback" not in done.stderr
    # Without torch, ray and mlflow it is 0.2 to 0.6 s on an idle machine, with one of them several; see the next test.
    assert min(seconds) < 1.5
    assert max(seconds) < 10


def test_no_bad_input_imports_anything_heavy() -> None:
    code = f"""
import contextlib, io, sys
from orchestrator.cli import main
sys.argv = ["dino"]
for arguments in {[arguments for arguments, _ in BAD_INPUT]}:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        main(arguments)
        main([*arguments, "--help"])
    heavy = [name for name in {HEAVY} if name in sys.modules]
    assert not heavy, (arguments, heavy)
for arguments in (["--help"], ["recipes"], ["sweeps"]):
    assert main(arguments) == 0
assert not [name for name in {HEAVY} if name in sys.modules]
"""
    done = run(code=code)
    assert done.returncode == 0, done.stderr


def test_help_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in ("pretrain", "sweep", "compare", "recipes", "sweeps", "_DINO_COMPLETE", "130"):
        assert word in text
    assert "..." not in text.split("Commands:")[1].split("Settings")[0]  # no summary is cut short


def test_recipes_and_sweeps_are_listed_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    assert cli.main(["sweeps"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        *recipes(),
        *sweep_names(),
    ]


# --- what reaches the run ---------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, dict[str, Any]]]:
    """What the command line would start; the modules that start it are replaced."""
    made: list[tuple[str, Any, dict[str, Any]]] = []

    def noted(name: str) -> Any:
        def call(first: Any, *rest: Any, **named: Any) -> Any:
            made.append((name, first, named | ({"changes": rest[0]} if rest else {})))
            return SimpleNamespace(failed={}, ok=True, folder=Path("unused"))

        return call

    runs = {"orchestrator.pretrain": ("pretrain", "resume"), "orchestrator.run_sweep": ("run_sweep", "resume_sweep")}
    for module, names in runs.items():
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: noted(name) for name in names}))
    return made


def test_file_then_command_line_then_run(calls: list[Any], tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("pretrain: {epochs: 3, seed: 4}\npretrain.optim.lr: 1e-4\n")
    assert cli.main([*Q, "--config", "my.yaml", "pretrain.steps=7", "--local", "pretrain.seed=5"]) == 0
    ((name, config, named),) = calls
    assert (name, named) == ("pretrain", {"recipe": "quickstart", "method": None})
    assert (config.pretrain.steps, config.pretrain.epochs) == (7, None)
    assert (config.pretrain.seed, config.pretrain.optim.lr, config.cluster.launcher) == (5, 1e-4, "local")


def test_a_sweep_is_made_of_all_that_is_given(calls: list[Any]) -> None:
    options = ["--vary", "pretrain.optim.lr=1e-3,1e-4", "--seeds", "3", "--base", "cifar10_tiny"]
    assert cli.main(["sweep", "temperature", "pretrain.steps=5", *options, "sweep.metric=eval/lidar"]) == 0
    assert cli.main(["sweep", "momentum", *options]) == 0
    ((name, sweep, _), (_, grid, _)) = calls
    assert (name, sweep.name, sweep.recipe, sweep.seeds) == ("run_sweep", "temperature", "cifar10_tiny", 3)
    assert sweep.metric == "eval/lidar"
    assert sweep.changes == {"pretrain.teacher.warmup_temp_epochs": 0, "pretrain.steps": "5"}
    assert (len(sweep.rows), list(sweep.space)) == (6, ["pretrain.optim.lr"])
    assert list(grid.space) == ["pretrain.teacher.momentum", "pretrain.optim.lr"]


def test_a_method_comes_before_the_settings(calls: list[Any]) -> None:
    assert cli.main([*Q, "--method", "byol", "pretrain.teacher.momentum=0.9"]) == 0
    assert cli.main(["sweep", "momentum", "--method", "swav"]) == 0
    ((_, config, named), (_, sweep, _)) = calls
    assert named == {"recipe": "quickstart", "method": "byol"}
    assert (config.pretrain.loss.name, config.pretrain.head.num_prototypes) == ("mse", None)
    assert config.pretrain.teacher.momentum == 0.9
    assert sweep.method == "swav"


def test_a_recipe_with_vary_is_a_sweep(calls: list[Any]) -> None:
    assert cli.main(["sweep", "cifar10_tiny", "--vary", "pretrain.crops.global_scale=[0.4,1],[0.2,1]"]) == 0
    assert calls[0][1].space == {"pretrain.crops.global_scale": ["[0.4,1]", "[0.2,1]"]}


def test_resuming_needs_no_name_and_refuses_another(
    calls: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_record = RunRecord(run_id="r1", experiment="e", recipe="quickstart", seed=0, config=flatten(quickstart()))
    run_record.write(tmp_path / "elsewhere" / "r1")
    storage = "cluster.storage=elsewhere"
    assert cli.main(["pretrain", "--resume", "r1", storage, "cluster.data_cpus=3"]) == 0
    assert cli.main([*Q, "--resume", "r1", storage, "--local"]) == 0
    shared = {"cluster.storage": "elsewhere"}
    assert calls == [
        ("resume", "r1", {"storage": "elsewhere", "changes": shared | {"cluster.data_cpus": 3}}),
        ("resume", "r1", {"storage": "elsewhere", "changes": shared | {"cluster.launcher": "local"}}),
    ]
    assert cli.main(["pretrain", "cifar10_tiny", "--resume", "r1", storage]) == 2
    assert "is a run of the recipe 'quickstart', not of 'cifar10_tiny'" in capsys.readouterr().err

    records.write_json(tmp_path / "runs" / "s1" / records.SWEEP_FILE, {"sweep": "quickstart"})
    calls.clear()
    assert cli.main(["sweep", "--resume", "s1"]) == 0
    assert cli.main([*SQ, "--resume", "s1"]) == 0
    assert calls == [("resume_sweep", "s1", {"storage": "./runs", "changes": {}})] * 2
    assert cli.main(["sweep", "crops", "--resume", "s1"]) == 2


# --- comparison -------------------------------------------------------------------------------------------------------


@pytest.fixture
def compared(tmp_path: Path) -> Path:
    """A finished sweep of two trials in the storage folder."""
    folder = tmp_path / "runs" / "s1"
    records.write_json(folder / records.SWEEP_FILE, {"sweep": "quickstart"})
    ledger = records.Ledger(folder)
    for temp, accuracy in ((0.04, 90.0), (0.07, 95.0)):
        config = flatten(override(quickstart(), {"pretrain.teacher.temp": temp}))
        run_dir = folder / records.TRIALS_DIR / f"temp_{temp}-s0"
        RunRecord(run_id=f"s1.{temp}", experiment="e", recipe="quickstart", seed=0, config=config).write(run_dir)
        journal = records.Journal(run_dir)
        journal.log(0, {"eval/knn_top1": 60.0, "train/loss": 6.9})
        journal.log(10, {"eval/knn_top1": accuracy, "train/loss": 3.0})
        journal.close()
        ledger.record(f"s1.{temp}", "finished")
    ledger.close()
    return folder


@pytest.mark.parametrize(
    ("form", "start"), [("table", "Trials"), ("markdown", "**Trials"), ("csv", "rank,"), ("html", "<!doctype html>")]
)
def test_compare_ranks_the_trials_of_a_sweep(
    compared: Path, form: str, start: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", "s1", "--format", form]) == 0
    text = capsys.readouterr().out
    assert text.lower().startswith(start.lower())
    assert text.index("temp_0.07-s0") < text.index("temp_0.04-s0")
    assert cli.main(["compare", str(compared), "--format", form, "--output", "out", "--mode", "min"]) == 0
    assert capsys.readouterr().out == ""
    text = Path("out").read_text()
    assert text.index("temp_0.04-s0") < text.index("temp_0.07-s0")
    assert cli.main(["compare", "s1", "--output", "no/such/folder"]) == 2


def test_compare_takes_several_names_of_several_kinds(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trials = [str(compared / "trials" / name) for name in ("temp_0.04-s0", "temp_0.07-s0")]
    assert cli.main(["compare", *trials, "--format", "csv"]) == 0
    apart = capsys.readouterr().out
    storage = f"cluster.storage={compared.parent}"
    assert cli.main(["compare", "s1", trials[0], storage, "--format", "csv"]) == 0
    assert capsys.readouterr().out == apart
    assert apart.count("temp_0.0") == 2


def test_compare_refuses_a_metric_and_a_reference_that_are_not_there(
    compared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", "s1", "--metric", "eval/knn"]) == 2
    assert "error: --metric eval/knn: no trial logged it; there is eval/knn_top1" in capsys.readouterr().err
    assert cli.main(["compare", "s1", "--reference", "temp_0.4"]) == 2
    assert "error: --reference temp_0.4: no such configuration; did you mean" in capsys.readouterr().err
    assert cli.main(["compare", "s1", "--reference", "temp_0.04", "--metric", "train/loss"]) == 0


# --- how it ends ------------------------------------------------------------------------------------------------------


def test_a_failed_run_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RunFailed("r1: the loss is not finite at step 3")

    monkeypatch.setitem(sys.modules, "orchestrator.pretrain", SimpleNamespace(pretrain=fail))
    assert cli.main(Q) == 1
    assert capsys.readouterr().err == "error: r1: the loss is not finite at step 3\n"


def test_failed_trials_are_exit_code_1_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = SimpleNamespace(failed={"temp_0.04-s0": "out of memory"}, ok=False, folder=Path("unused"))
    monkeypatch.setitem(sys.modules, "orchestrator.run_sweep", SimpleNamespace(run_sweep=lambda sweep: result))
    assert cli.main(SQ) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: 1 trial failed",
        "       temp_0.04-s0: out of memory",
    ]


def test_an_interrupted_run_is_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "orchestrator.pretrain", SimpleNamespace(pretrain=interrupt))
    assert cli.main(Q) == 130


# --- dry run ----------------------------------------------------------------------------------------------------------


def test_dry_run_prints_the_whole_config_and_what_it_needs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main([*Q, "pretrain.steps=11", "cluster.num_workers=2", "--dry-run"]) == 0
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    for key in flatten(quickstart()):
        assert [line for line in lines if line[:1] == [key]], key
    assert ["pretrain.steps", "11"] in lines
    assert "2 workers: 2 CPUs and no GPU" in text
    assert "704, each as 2 global and 2 local crops" in text
    assert re.search(r"each image +0\.0378 GFLOP: teacher 0\.007636, student 0\.01014, backward 0\.02003\n", text)
    assert re.search(r"core-hours +not known before they are measured: --calibrate", text)
    assert "Will not fit" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["EMPTY"]


def test_dry_run_of_a_sweep_prints_its_trials(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--seeds", "2", "--vary", "pretrain.crops.num_local_crops=0,2", "pretrain.steps=10"]
    assert cli.main([*SQ, *arguments, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "trials            16 = 8 combinations x 2 seeds" in text
    assert "steps             10 per trial, 160 in all" in text
    assert "images            10,240 in all" in text
    assert "temp_0.04-momentum_0.99-num_local_crops_0-s1" in text
    assert re.search(r"temp_0.04-momentum_0.99-num_local_crops_2-s0 +8 +10 +640 +0.0378 ", text), "8 trials cost that"
    assert re.search(r"arithmetic +[\d.]+ GFLOP: 10,240 images of training, 73,888 of evaluations\n", text)
    assert re.search(r"pretrain\.teacher\.temp +varies: 0\.04, 0\.07\n", text)


def test_dry_run_of_a_sweep_of_rows_says_what_each_sets(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sweep", "crops", "--seeds", "2", "pretrain.steps=10", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "local_2   pretrain.crops.num_local_crops=2; paper: eval/linear_top1 74.5, cost/hours 51, cost/gpu_" in text
    assert "local_2-s1" in text
    assert "each as 2 global and 0 to 10 local crops" in text
    assert "trials            8 = 4 combinations x 2 seeds" in text
    assert "the paper's       ImageNet-1k, ViT-S/16, 300 epochs on 16 GPUs" in text
    assert re.search(r"pretrain\.crops\.num_local_crops +varies: 0, 2, 6, 10\n", text)


def test_a_dry_run_can_measure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["pretrain.batch_size=8", "sweep.scheduler=asha", "sweep.grace_steps=125", "sweep.reduction_factor=2"]
    assert cli.main([*SQ, *arguments, "--dry-run", "--calibrate"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("measuring a few steps of temp_0.04-momentum_0.99-s0 ...\n")
    (row,) = [line.split() for line in text.splitlines() if line.split()[:2] == ["temp_0.04-momentum_0.99-s0", "4"]]
    assert float(row[-2]) > 0 and row[-1] == "measured"
    assert re.search(r"core-hours +at most [\d.e-]+, measured here on 1 kind of run\n", text)
    assert re.search(r"wall time +at most .* with 2 trials at once\n", text)
    # all take 125 of 500 steps, a half 125 more, a quarter the other 250
    assert "about 50 % of that, as trials are stopped early" in text
    assert [path.name for path in tmp_path.iterdir()] == ["EMPTY"], "nothing is written"


def test_a_thousand_trials_are_told_in_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    rates = ",".join(str(rate) for rate in range(1, 251))
    assert cli.main([*SQ, "--vary", f"pretrain.optim.lr={rates}", "pretrain.steps=10", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  ... and 900 more" in lines
    assert len(lines) < 300
    assert max(map(len, lines)) < 200


# --- completion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "start", "expected"),
    [
        (["pretrain"], "dino_", ["dino_vits16", "dino_resnet50"]),
        (["pretrain", "quickstart"], "pretrain.stu", ["pretrain.student.temp="]),
        (["sweep"], "cr", ["crop_scale", "crop_sizes", "crops"]),
        (["sweep"], "cifar10_t", ["cifar10_tiny"]),
        (["pretrain", "quickstart", "--method"], "s", ["simsiam", "simclr", "swav"]),
        (["sweep"], "my-", ["my-"]),
        (["sweep", "quickstart"], "sweep.se", ["sweep.seeds="]),
        (["sweep", "quickstart", "--base"], "q", ["quickstart"]),
        (["sweep", "quickstart", "--vary"], "pretrain.optim.wa", ["pretrain.optim.warmup_epochs="]),
        ([], "sw", ["sweep", "sweeps"]),
    ],
)  # fmt: skip
def test_completion(words: list[str], start: str, expected: list[str]) -> None:
    completion = ShellComplete(cli.cli, {}, "dino", "_DINO_COMPLETE")
    assert [item.value for item in completion.get_completions(words, start)] == expected


def test_completion_by_the_shell_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['dino']; from orchestrator.cli import main; sys.exit(main())"
    words = {"_DINO_COMPLETE": "bash_complete", "COMP_WORDS": "dino pretrain quick", "COMP_CWORD": "2"}
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | words
    check = f"import sys, atexit; atexit.register(lambda: print([n for n in {HEAVY} if n in sys.modules]))\n"
    done = subprocess.run(
        [sys.executable, "-c", check + code],
        capture_output=True, text=True, timeout=250, check=False, env=environment,
    )  # fmt: skip
    assert done.stdout.split() == ["plain,quickstart", "[]"]
