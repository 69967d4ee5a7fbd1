"""Unreadable images: each is listed once, and too many end the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orchestrator.config import DataConfig
from orchestrator.data.bad_samples import BadSampleLog
from orchestrator.data.sources import Split, open_source
from orchestrator.data.stream import TooManyBadSamples
from orchestrator.records import BAD_SAMPLES_FILE, read_lines


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """Forty images, none of which can be read."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(40):
        (images / f"{number:02}.jpg").write_bytes(b"" if number % 2 else b"no image")
    return open_source(DataConfig(source=str(images))).train


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
