"""`dino data` as it is typed: bad input, what is printed, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.shell_completion import ShellComplete
from PIL import Image

from orchestrator import cli
from orchestrator.config import DataConfig
from orchestrator.data.sources import open_source

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "torchvision", "timm", "ray", "mlflow", "pandas", "sklearn")

I, C = ["data", "inspect"], ["data", "convert"]  # noqa: E741
BAD_INPUT = [
    (["data", "inspct"], "No such command 'inspct'. Did you mean 'inspect'?"),
    (I, "Missing argument 'SOURCE'"),
    ([*I, ""], "error: data.source: is empty; must be digits, torchvision:NAME, or a path or URL"),
    ([*I, "/dev/null"], "error: data.source = /dev/null: is neither a file nor a folder"),
    ([*I, "torchvision:CIFAR10", "data.root=EMPTY"], "EMPTY is empty; it must hold CIFAR10, or data.download=true"),
    ([*I, "torchvision:LFWPeople"], "/data cannot be listed: No such file or directory; it must hold LFWPeople, which"),
    ([*I, "nowhere"], "error: data.source = nowhere: no such file or folder"),
    ([*I, "EMPTY"], "error: data.source = EMPTY: "),
    ([*I, "digits", "data.max_pixel=1"], "error: data.max_pixel: unknown key; did you mean data.max_pixels?"),
    ([*I, "digits", "data.max_pixels=0"], "error: data.max_pixels = 0: must be a whole number >= 1"),
    ([*I, "digits", f"data.max_pixels={10**30}"], "must be a whole number >= 1 and <= 178956970"),
    ([*I, "digits", "data.source=digits"], "error: data.source: given twice, as digits and digits"),
    ([*I, "digits", "pretrain.optim.lr=1"], "error: pretrain.optim.lr: unknown key"),
    ([*I, "digits", "pretrain.crops.global_siz=1"], "did you mean pretrain.crops.global_size or"),
    ([*I, "digits", "--limit", "0"], "Invalid value for '--limit'"),
    ([*I, "digits", "--threads", "0"], "Invalid value for '--threads'"),
    ([*I, "digits", "data.train_split=trian"], "did you mean train?"),
    ([*C, "digits"], "Missing argument 'DEST'"),
    ([*C, "nowhere", "out"], "error: data.source = nowhere: no such file or folder"),
    ([*C, "digits", "FULL"], "error: DEST = FULL: is there already and not empty"),
    ([*C, "digits", "out", "pretrain.crops.global_size=1"], "error: pretrain.crops.global_size: unknown key"),
    ([*C, "digits", "out", "--shard-mb", "0"], "Invalid value for '--shard-mb'"),
    ([*C, "digits", "out", "--shard-mb", "nan"], "Invalid value for '--shard-mb'"),
    ([*C, "digits", "out", "--row-group-mb", "nan"], "Invalid value for '--row-group-mb'"),
    ([*C, "digits", "out", "--row-group-mb", "inf"], "Invalid value for '--row-group-mb'"),
    ([*C, "digits", "out", "--row-group-mb", "0.0001"], "Invalid value for '--row-group-mb'"),
    ([*C, "digits", "out", "--shuffle", "9" * 23], "Invalid value for '--shuffle'"),
    ([*C, "digits", "nosuch://x/y"], "error: DEST = nosuch://x/y: cannot be written: no such scheme"),
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs in a folder of its own, with the folders EMPTY and FULL."""
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT, ids=[" ".join(a) for a, _ in BAD_INPUT])
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(arguments) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""
    assert len(output.err.splitlines()) <= 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["EMPTY", "FULL"]


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
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=250, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "start", "expected"),
    [
        (["data"], "", ["convert", "inspect"]),
        (["data", "inspect"], "pho", ["pho"]),
        (["data", "inspect", "photos"], "data.tr", ["data.train_split="]),
        (["data", "inspect", "photos"], "pretrain.crops.num", ["pretrain.crops.num_local_crops="]),
        (["data", "convert", "photos", "out"], "data.max", ["data.max_bad_fraction=", "data.max_pixels="]),
        (["data", "convert", "photos", "out"], "pretrain", []),
    ],
)  # fmt: skip
def test_completion(words: list[str], start: str, expected: list[str]) -> None:
    completion = ShellComplete(cli.cli, {}, "dino", "_DINO_COMPLETE")
    assert [item.value for item in completion.get_completions(words, start)] == expected


def make_photos(folder: Path, count: int, side: int) -> Path:
    """As many links to one picture."""
    folder.mkdir()
    Image.fromarray(np.arange(side * side * 3, dtype=np.uint8).reshape(side, side, 3)).save(folder / "0.png")
    for number in range(1, count):
        os.link(folder / "0.png", folder / f"{number}.png")
    return folder


def test_inspect_then_convert_then_inspect(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    make_photos(tmp_path / "photos", 6, 50)
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"no image")
    small = ["pretrain.crops.global_size=16", "pretrain.crops.num_local_crops=0"]
    assert cli.main(["data", "inspect", "photos", *small]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"folder {tmp_path / 'photos'}\ndigest ")
    assert "bad.jpg: not an image" in text
    assert "copies of another  5\n" in text
    assert cli.main(["data", "convert", "photos", "my out"]) == 1
    assert "data.max_bad_fraction" in capsys.readouterr().err
    assert cli.main(["data", "convert", "photos", "my out", "data.max_bad_fraction=0.5", "--shorter-side", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'my out'}: 6 train images in 1 file, ")
    assert lines[1:3] == [
        "left out: 1 unusable, listed in left_out.jsonl",
        "shrunk to a shorter side of 20: 6 images, which are no longer those of the source; 0 are unchanged",
    ]
    assert lines[-1] == f"python -m orchestrator pretrain RECIPE 'data.source={tmp_path / 'my out'}'"
    assert len(open_source(DataConfig(source="my out")).train) == 6
    assert cli.main(["data", "inspect", "my out", "--json", "--threads", "1", "--limit", "3", *small]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["limit"], found["splits"]["train"]["images"]) == ("parquet", 3, 6)
    assert found["splits"]["train"]["width"]["largest"] == 20


@pytest.mark.parametrize("arguments", [["inspect", "photos"], ["convert", "photos", "out"]], ids=["inspect", "convert"])
def test_ctrl_c_ends_at_once_with_130(arguments: list[str], tmp_path: Path) -> None:
    make_photos(tmp_path / "photos", 3000, 3000)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "data", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    ) as process:
        deadline = time.monotonic() + 120
        threads = Path(f"/proc/{process.pid}/task")
        while len(list(threads.iterdir())) == 1 and time.monotonic() < deadline:  # none decodes yet
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=250)
        finally:
            process.kill()
    assert process.returncode == 130
    assert err.strip() == "interrupted"
    assert ("INTERRUPTED after" in out) == (arguments[0] == "inspect")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["EMPTY", "FULL", "photos"]
