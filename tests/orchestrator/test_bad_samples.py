"""Unreadable images: each is listed once, and too many end the run."""

from __future__ import annotations

import errno
import logging
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from orchestrator.config import DataConfig
from orchestrator.data.bad_samples import BadSampleLog
from orchestrator.data.images import StorageError
from orchestrator.data.sources import Split, open_source
from orchestrator.data.stream import TooManyBadSamples
from orchestrator.records import BAD_SAMPLES_FILE, read_lines


def make_split(images: Path) -> Split:
    """Forty images, none of which can be read."""
    images.mkdir()
    for number in range(40):
        (images / f"{number:02}.jpg").write_bytes(b"" if number % 2 else b"no image")
    return open_source(DataConfig(source=str(images))).train


@pytest.fixture
def split(tmp_path: Path) -> Split:
    return make_split(tmp_path / "images")


def note(log: BadSampleLog, *samples: int) -> int:
    log.note({"bad_id": torch.tensor([-1, *samples])})
    return log.check()


def test_each_is_counted_and_written_once(tmp_path: Path, split: Split) -> None:
    config = DataConfig(max_bad_fraction=0.1)
    log = BadSampleLog(tmp_path, split, config)
    assert note(log) == 0
    assert not (tmp_path / BAD_SAMPLES_FILE).exists()
    assert note(log, 7, 3, 7) == 2
    assert note(log, 3) == 2
    assert note(BadSampleLog(tmp_path, split, config), 7, 4) == 3  # a resumed run goes on counting
    records = [record for _, record in read_lines(tmp_path / BAD_SAMPLES_FILE)]
    assert records == [
        {"sample": 3, "name": "03.jpg", "reason": "empty file"},
        {"sample": 7, "name": "07.jpg", "reason": "empty file"},
        {"sample": 4, "name": "04.jpg", "reason": "not an image in a format that is read"},
    ]


def test_too_many_end_the_run(tmp_path: Path, split: Split) -> None:
    log = BadSampleLog(tmp_path, split, DataConfig(max_bad_fraction=0.1))
    assert note(log, 0, 1, 2, 3) == 4
    with pytest.raises(TooManyBadSamples, match=r"5 of 40 .* the 4 that data.max_bad_fraction = 0.1 allows. .* 00.jpg"):
        note(log, 4)


def test_each_is_logged_when_it_is_first_known(tmp_path: Path, split: Split, caplog: pytest.LogCaptureFixture) -> None:
    config = DataConfig(max_bad_fraction=0.1)
    log = BadSampleLog(tmp_path, split, config)
    note(log, 7, 4)
    note(log, 7)
    note(BadSampleLog(tmp_path, split, config), 4, 7)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "sample 4, 04.jpg, is unreadable and replaced by another: not an image in a format that is read",
        "sample 7, 07.jpg, is unreadable and replaced by another: empty file",
    ]


def test_a_line_that_a_crash_cut_short_is_written_again(tmp_path: Path, split: Split) -> None:
    config = DataConfig(max_bad_fraction=0.1)
    assert note(BadSampleLog(tmp_path, split, config), 3, 5) == 2
    path = tmp_path / BAD_SAMPLES_FILE
    path.write_bytes(path.read_bytes()[:-9])
    log = BadSampleLog(tmp_path, split, config)
    assert note(log) == 1
    assert note(log, 5) == 2
    assert [record["sample"] for _, record in read_lines(path)] == [3, 5]


class Failing:
    """A reader whose storage is gone."""

    def __len__(self) -> int:
        return 40

    def read(self, index: int) -> bytes | np.ndarray:
        raise OSError(errno.ESTALE, "Stale file handle")

    def name(self, index: int) -> str:
        return f"image {index}"


def test_a_fault_of_the_storage_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    log = BadSampleLog(tmp_path, Split(Failing(), None), DataConfig(max_bad_fraction=0))
    with pytest.raises(StorageError, match="image 3 could not be read, 3 times: Stale file handle"):
        log.note({"bad_id": torch.tensor([3])})
    assert log.check() == 0


class Hundred(Failing):
    """A hundred empty images."""

    def __len__(self) -> int:
        return 100

    def read(self, index: int) -> bytes | np.ndarray:
        return b""


def test_the_allowed_share_is_not_rounded_down_by_floating_point(tmp_path: Path) -> None:
    config = DataConfig(max_bad_fraction=0.29)
    log = BadSampleLog(tmp_path, Split(Hundred(), None), config)
    assert note(log, *range(29)) == 29
    with pytest.raises(TooManyBadSamples, match="30 of 100 images are unreadable, more than the 29"):
        note(log, 29)


def one_rank(index: int, folder: str) -> None:
    """What each of two ranks finds: some of it the same, in the same step or later."""
    warnings.simplefilter("error")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2)
    split = open_source(DataConfig(source=f"{folder}/images")).train
    config = DataConfig(max_bad_fraction=0.1)
    log = BadSampleLog(Path(folder, "run"), split, config)
    counts = [note(log, *((1, 2), (2, 3))[index]), note(log, *((3,), (1,))[index])]
    dist.barrier()
    restarted = BadSampleLog(Path(folder, "run"), split, config)
    counts.append(note(restarted, *((3,), (4,))[index]))
    try:
        note(restarted, *((), (5,))[index])
    except TooManyBadSamples as error:
        Path(folder, f"{index}.txt").write_text(f"{counts} {error}")
    dist.destroy_process_group()


def test_all_ranks_count_each_once_and_stop_together(tmp_path: Path) -> None:
    make_split(tmp_path / "images")
    mp.start_processes(one_rank, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    said = [(tmp_path / f"{index}.txt").read_text() for index in range(2)]
    assert said[0] == said[1]
    assert said[0].startswith("[3, 3, 4] 5 of 40 images are unreadable")
    listed = [record["sample"] for _, record in read_lines(tmp_path / "run" / BAD_SAMPLES_FILE)]
    assert listed == [1, 2, 3, 4, 5]
