from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_core import checkpoint
from dino_core.checkpoint import (
    MANIFEST_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from dino_core.config import CropsConfig, HeadConfig, ModelConfig, OptimConfig, PretrainConfig, TeacherConfig
from dino_core.crops import CropBatch
from dino_core.train import TrainState, train_step

NUM_SAMPLES = 20
STEPS = 9  # of 8 images: warm-up ends in step 3, the prototypes thaw at step 5, epochs end in mid-batch
FILES = (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE, MANIFEST_FILE)

CONFIG = PretrainConfig(
    seed=5,
    steps=STEPS,
    epochs=None,
    batch_size=8,
    model=ModelConfig(backbone="vit_tiny_patch16_224", patch_size=8, embed_dim=16, depth=2, num_heads=2),
    head=HeadConfig(num_prototypes=32, hidden_dim=24, bottleneck_dim=8, norm_last_layer=False),
    teacher=TeacherConfig(warmup_temp=0.04, temp=0.07, warmup_temp_epochs=1, momentum=0.9),
    crops=CropsConfig(num_local_crops=2, global_size=16, local_size=8),
    optim=OptimConfig(lr=0.01, lr_reference_batch_size=None, warmup_epochs=1, freeze_last_layer_epochs=2),
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def change(part: str | None = None, **values: Any) -> PretrainConfig:
    if part is None:
        return dataclasses.replace(CONFIG, **values)
    return dataclasses.replace(CONFIG, **{part: dataclasses.replace(getattr(CONFIG, part), **values)})


def fresh(config: PretrainConfig = CONFIG) -> TrainState:
    return TrainState.create(config, NUM_SAMPLES)


def batch(step: int, rank: int = 0, world_size: int = 1) -> CropBatch:
    generator = torch.Generator().manual_seed(step)
    share = CONFIG.batch_size // world_size
    rows = slice(rank * share, (rank + 1) * share)
    large = torch.randn(2, CONFIG.batch_size, 3, 16, 16, generator=generator)[:, rows].flatten(0, 1)
    small = torch.randn(2, CONFIG.batch_size, 3, 8, 8, generator=generator)[:, rows].flatten(0, 1)
    return CropBatch(large, small, share)


def run(state: TrainState, until: int = STEPS, rank: int = 0, world_size: int = 1) -> TrainState:
    while state.step < until:
        train_step(state, batch(state.step, rank, world_size))
    return state


def tensors(state: TrainState) -> dict[str, Tensor]:
    found = {f"{i}.{k}": v for i, d in state.optimizer.state_dict()["state"].items() for k, v in d.items()}
    for part, module in (("student", state.student), ("teacher", state.teacher), ("objective", state.objective)):
        found |= {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()}
    return found


def digest(state: TrainState) -> str:
    """SHA-256 over the names and bytes of all tensors."""
    sums = hashlib.sha256(str(state.step).encode())
    for name, tensor in sorted(tensors(state).items()):
        sums.update(name.encode() + tensor.detach().numpy().tobytes())
    return sums.hexdigest()


class Forge:
    """A process that runs functions of this module in children of its own, so that torch is imported only once."""

    CODE = """if True:
        import json, os, sys, traceback
        sys.path.insert(0, sys.argv[1])
        import test_checkpoint
        test_checkpoint.torch.set_num_threads(1)
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            child = os.fork()
            if child == 0:
                try:
                    getattr(test_checkpoint, name)(*arguments)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            print(child, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    """

    def __init__(self) -> None:
        here = Path(__file__).parent
        command = [sys.executable, "-c", self.CODE, str(here)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=here.parents[1]
        )

    def _number(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def start(self, function: Callable[..., None], *arguments: Any) -> int:
        """Returns the child's process id."""
        assert self.process.stdin is not None
        print(json.dumps([function.__name__, *arguments]), file=self.process.stdin, flush=True)
        return self._number()

    def wait(self) -> int:
        """Returns the exit status of the child that was started last."""
        return self._number()


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    forge = Forge()
    yield forge
    with forge.process:  # closes the pipes and waits: the end of its input ends it
        pass


@pytest.fixture(scope="module")
def unbroken() -> str:
    torch.set_num_threads(1)
    return digest(run(fresh()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of step 4; copy it before spoiling it."""
    torch.set_num_threads(1)
    return save_checkpoint(run(fresh(), 4), tmp_path_factory.mktemp("saved"), extra={"a": [1, None, "ü"]})


def reseal(path: Path) -> None:
    """Make the manifest of a changed checkpoint true."""
    (path / MANIFEST_FILE).unlink()
    (path / MANIFEST_FILE).write_bytes(checkpoint._manifest(path))


# ----------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("stop", [0, 1, 3, 5, 6, STEPS])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(tmp_path: Path, unbroken: str, stop: int) -> None:
    path = save_checkpoint(run(fresh(), stop), tmp_path)
    assert path.name == f"step_{stop:08d}"
    state = fresh(change(seed=77)) if stop else fresh()  # nothing of the checkpoint is there already
    state.config = CONFIG
    load_checkpoint(state, path)
    assert state.step == stop
    assert digest(run(state)) == unbroken


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_other_optimisers_resume_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    config = change("optim", name=optimizer)
    path = save_checkpoint(run(fresh(config), 6), tmp_path)
    state = fresh(config)
    load_checkpoint(state, path)
    assert digest(run(state)) == digest(run(fresh(config)))


def test_loading_into_a_state_that_has_trained_leaves_nothing_of_it(tmp_path: Path, unbroken: str) -> None:
    path = save_checkpoint(fresh(), tmp_path)
    state = run(fresh(), 7)
    load_checkpoint(state, path)
    assert state.step == 0
    assert digest(run(state)) == unbroken


@pytest.mark.parametrize("dropped", ["student", "teacher", "objective", "optimizer", "step"])
def test_each_stored_part_is_needed(saved: Path, unbroken: str, dropped: str) -> None:
    state, pristine = fresh(), fresh()
    load_checkpoint(state, saved)
    if dropped == "step":
        state.step = 3
    elif dropped == "optimizer":
        state.optimizer.load_state_dict(pristine.optimizer.state_dict())
    else:
        getattr(state, dropped).load_state_dict(getattr(pristine, dropped).state_dict())
    assert digest(run(state)) != unbroken


def test_the_global_rngs_are_restored(tmp_path: Path) -> None:
    def draw() -> tuple[list[float], float, float, float]:
        # gauss and standard_normal keep a second value for the next call, which is part of the state
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), float(np.random.standard_normal())

    torch.manual_seed(1), random.seed(2), np.random.seed(3)
    draw()
    path = save_checkpoint(fresh(), tmp_path)
    expected = draw()
    torch.manual_seed(7), random.seed(8), np.random.seed(9)
    assert draw() != expected
    load_checkpoint(fresh(), path)
    assert draw() == expected


def test_saving_changes_nothing(tmp_path: Path) -> None:
    state = run(fresh(), 2)
    before, rng = digest(state), torch.get_rng_state()
    save_checkpoint(state, tmp_path)
    assert digest(state) == before
    assert torch.equal(torch.get_rng_state(), rng)


def test_extra_comes_back_and_the_position_is_written(saved: Path) -> None:
    assert load_checkpoint(fresh(), saved) == {"a": [1, None, "ü"]}
    state = json.loads((saved / STATE_FILE).read_text())
    assert state["data_position"] == 4 * CONFIG.batch_size
    assert state["config"]["teacher"]["momentum"] == 0.9
    assert {"torch", "numpy", "timm", "python", "world_size", "num_threads"} <= state["circumstances"].keys()


def test_extra_that_is_no_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="JSON"):
        save_checkpoint(fresh(), tmp_path, extra={"a": object()})
    assert list(tmp_path.iterdir()) == []


def _two_ranks(folder: str) -> None:
    child = os.fork()
    rank = 0 if child else 1
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)
    state = run(fresh(), 5, rank, 2)
    path = save_checkpoint(state, Path(folder) / "checkpoints")
    expected_draw = torch.rand(2).tolist()
    whole = digest(run(state, rank=rank, world_size=2))
    state = fresh()
    load_checkpoint(state, path)
    assert torch.rand(2).tolist() == expected_draw
    assert digest(run(state, rank=rank, world_size=2)) == whole
    if rank == 0:  # a failure of rank 0 reaches every rank instead of leaving it waiting
        state.objective.center[0] = torch.nan
    with pytest.raises(CheckpointError, match=r"objective\.center"):
        save_checkpoint(state, Path(folder) / "checkpoints")
    Path(folder, f"rank_{rank}").write_text(whole)
    torch.distributed.destroy_process_group()
    if child:
        assert os.waitpid(child, 0)[1] == 0


def test_two_ranks_resume_bit_for_bit(forge: Forge, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    forge.start(_two_ranks, str(tmp_path))
    assert forge.wait() == 0
    assert (tmp_path / "rank_0").read_text() == (tmp_path / "rank_1").read_text()
    path = latest_checkpoint(tmp_path / "checkpoints")
    assert path is not None
    state = fresh()
    load_checkpoint(state, path)  # on one rank: allowed, and said
    assert "world_size was 2, is 1" in caplog.text
    assert state.step == 5


# ------------------------------------------------------------------------------------------------------- does it fit?


@pytest.mark.parametrize(
    ("part", "values", "named"),
    [
        ("model", {"embed_dim": 32}, "pretrain.model.embed_dim was 16, is 32"),
        ("head", {"num_prototypes": 64}, "pretrain.head.num_prototypes was 32, is 64"),
        ("head", {"norm_last_layer": True}, "pretrain.head.norm_last_layer was False, is True"),
        ("head", {"batch_norm": True}, "pretrain.head.batch_norm was False, is True"),
        ("optim", {"name": "sgd"}, "pretrain.optim.name was adamw, is sgd"),
        ("crops", {"global_size": 24}, "pretrain.crops.global_size was 16, is 24"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(saved: Path, part: str, values: Any, named: str) -> None:
    state = fresh(change(part, **values))
    before = digest(state)
    with pytest.raises(CheckpointError, match="does not fit") as error:
        load_checkpoint(state, saved)
    assert named in str(error.value)
    assert digest(state) == before  # not half loaded


def test_the_mismatching_tensors_are_named(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"objective.center is \[32\] there and \[64\] here"):
        load_checkpoint(fresh(change("head", num_prototypes=64)), saved)


def test_other_settings_are_allowed_and_said(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_checkpoint(fresh(change("optim", lr=0.02)), saved)
    assert "pretrain.optim.lr was 0.01, is 0.02" in caplog.text


def test_the_groups_of_the_optimiser_are_those_of_the_configuration_here(tmp_path: Path) -> None:
    slow, slower = change("optim", layer_decay=0.5), change("optim", layer_decay=0.25)
    path = save_checkpoint(fresh(slow), tmp_path)
    state = fresh(slower)
    load_checkpoint(state, path)
    scales = {group["lr_scale"] for group in state.optimizer.param_groups}
    assert scales == {0.25**above for above in range(4)}
    with pytest.raises(CheckpointError, match=r"pretrain.optim.layer_decay was 0.5, is 1.0"):
        load_checkpoint(fresh(), path)


def test_another_thread_count_is_allowed_and_said(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.set_num_threads(2)
    load_checkpoint(fresh(), saved)
    assert "num_threads was 1, is 2" in caplog.text
    assert "not promised" in caplog.text


def test_the_same_circumstances_give_no_warning(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_checkpoint(fresh(), saved)
    assert caplog.records == []


# ------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_found(saved: Path, tmp_path: Path, name: str) -> None:
    path = Path(shutil.copytree(saved, tmp_path / saved.name))
    whole = (path / name).read_bytes()
    places = {0, len(whole) - 1, *random.Random(name).sample(range(len(whole)), 60)}
    if name == MANIFEST_FILE:  # small, and the one file without a sum elsewhere
        places = set(range(len(whole)))
    for place in places:
        spoiled = bytearray(whole)
        spoiled[place] ^= 1 << (place % 8)
        (path / name).write_bytes(spoiled)
        with pytest.raises(CheckpointError, match=name):
            verify_checkpoint(path)
    (path / name).write_bytes(whole)
    verify_checkpoint(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999, None])
def test_truncated_and_missing_files_are_found(saved: Path, tmp_path: Path, name: str, share: float | None) -> None:
    path = Path(shutil.copytree(saved, tmp_path / saved.name))
    whole = (path / name).read_bytes()
    (path / name).unlink() if share is None else (path / name).write_bytes(whole[: int(share * len(whole))])
    state = fresh()
    before = digest(state)
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(state, path)
    with pytest.raises(CheckpointError, match=name):
        verify_checkpoint(path, sums=False)
    assert digest(state) == before


def test_a_checkpoint_of_a_newer_format_is_refused(saved: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved, tmp_path / saved.name))
    content = json.loads((path / MANIFEST_FILE).read_text())
    content.pop("sha256")
    (path / MANIFEST_FILE).write_bytes(checkpoint._seal(content | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="format version 99"):
        load_checkpoint(fresh(), path)


def test_pickle_is_nowhere(saved: Path) -> None:
    source = Path(checkpoint.__file__).read_text()
    assert "pickle" not in source
    assert "torch.save" not in source
    assert "torch.load" not in source
    assert "all_gather_object" not in source  # it pickles, too
    assert sorted(path.name for path in saved.iterdir()) == sorted(FILES)
    for name in (MODEL_FILE, OPTIMIZER_FILE):  # safetensors: length of a JSON header, the header, raw numbers
        content = (saved / name).read_bytes()
        json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


# ------------------------------------------------------------------------------------------------------------- saving


def test_latest_falls_back_over_bad_ones_with_a_warning(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    assert latest_checkpoint(tmp_path) is None
    for step in (4, 10, 12):
        shutil.copytree(saved, tmp_path / f"step_{step:08d}")
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000012"
    assert caplog.records == []
    (tmp_path / "step_00000012" / MANIFEST_FILE).unlink()
    with (tmp_path / "step_00000010" / MODEL_FILE).open("r+b") as file:
        file.seek(2000)
        file.write(b"\x55\xaa\x55\xaa")
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000004"
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "step_00000012/MANIFEST.json" in caplog.text
    assert f"step_00000010/{MODEL_FILE}" in caplog.text


def test_steps_beyond_eight_digits_are_newer(saved: Path, tmp_path: Path) -> None:
    for name in ("step_99999999", "step_100000000"):
        shutil.copytree(saved, tmp_path / name)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_100000000"


def test_prune_keeps_the_newest_whole_ones(saved: Path, tmp_path: Path) -> None:
    for step in range(5):
        shutil.copytree(saved, tmp_path / f"step_{step:08d}")
    (tmp_path / "step_00000004" / MANIFEST_FILE).unlink()
    (tmp_path / "notes").mkdir()
    prune_checkpoints(tmp_path, 2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["notes", "step_00000002", "step_00000003", "step_00000004"]  # the broken one is not counted
    with pytest.raises(ValueError, match="keep = 0"):
        prune_checkpoints(tmp_path, 0)


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    state = run(fresh(), 1)
    save_checkpoint(state, tmp_path, extra={"n": 1})
    path = save_checkpoint(state, tmp_path, extra={"n": 2})
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert load_checkpoint(fresh(), path) == {"n": 2}


def test_a_crash_between_the_two_renames_of_a_replacement_leaves_the_old_one(saved: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(saved, tmp_path / f"{saved.name}.old"))
    assert latest_checkpoint(tmp_path) == old
    state = fresh()
    load_checkpoint(state, old)
    save_checkpoint(state, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [saved.name]


@pytest.mark.parametrize("where", ["student", "teacher", "objective", "optimizer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_never_saved(tmp_path: Path, where: str, value: float) -> None:
    state = run(fresh(), 1)
    if where == "optimizer":
        next(iter(state.optimizer.state.values()))["exp_avg"].view(-1)[3] = value
    else:
        next(t for n, t in tensors(state).items() if n.startswith(where)).detach().view(-1)[3] = value
    with pytest.raises(CheckpointError, match="not finite"):
        save_checkpoint(state, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = fresh()
    path = save_checkpoint(state, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 1234, 1234))
    with pytest.raises(CheckpointError, match=r"step_00000001: .* (\d+) bytes are needed and 1234 are free") as error:
        save_checkpoint(run(state, 1), tmp_path)
    needed = int(str(error.value).split(" bytes")[0].split()[-1])
    used = sum(file.stat().st_size for file in path.iterdir())
    assert used <= needed <= 3 * used + 2**20
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def _failing_write(folder: str) -> None:
    state = run(fresh(), 1)
    save_checkpoint(state, Path(folder))
    # From here the kernel refuses longer files, so that safetensors fails in the middle of one.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    with pytest.raises(CheckpointError, match=r"cannot write .*step_00000002"):
        save_checkpoint(run(state, 2), Path(folder))


def test_a_failing_write_leaves_what_was_there(forge: Forge, tmp_path: Path) -> None:
    forge.start(_failing_write, str(tmp_path))
    assert forge.wait() == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000001"]
    verify_checkpoint(tmp_path / "step_00000001")


def _save_for_ever(folder: str, step: int) -> None:
    state = fresh()
    state.step = step
    while True:
        save_checkpoint(state, Path(folder))
        save_checkpoint(state, Path(folder))  # replaces
        prune_checkpoints(Path(folder), 1)
        state.step += 1


def test_a_kill_at_any_moment_leaves_no_unreadable_checkpoint(
    forge: Forge, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(0)
    interrupted, newest = 0, None
    for step in range(0, 15000, 1000):
        child = forge.start(_save_for_ever, str(tmp_path), step)
        deadline = time.monotonic() + 20
        while not list(tmp_path.glob(f"*step_{step:08d}*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.15 * rng.random())
        os.kill(child, signal.SIGKILL)
        assert forge.wait() == -signal.SIGKILL
        names = [path.name for path in tmp_path.iterdir()]
        interrupted += any(name.startswith(checkpoint._TEMPORARY) for name in names)
        for name in names:
            if not name.startswith(checkpoint._TEMPORARY):
                verify_checkpoint(tmp_path / name)
        previous, newest = newest, latest_checkpoint(tmp_path)
        assert newest or previous is None  # nothing that was complete is lost
        prune_checkpoints(tmp_path, 1)
    assert interrupted >= 3  # the kills did hit saves
    assert caplog.records == []
    state = fresh()
    assert newest is not None
    load_checkpoint(state, newest)
    save_checkpoint(state, tmp_path)
    assert not list(tmp_path.glob(f"{checkpoint._TEMPORARY}*"))  # the next save cleans up
