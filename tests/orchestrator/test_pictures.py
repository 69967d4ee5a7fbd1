"""Pictures on disk: when they are drawn, of which images, how large they are, and what a failure leaves."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino_core.train import TrainState
from orchestrator.config import RunConfig
from orchestrator.data.loaders import make_loader
from orchestrator.data.sources import open_source
from orchestrator.overrides import override
from orchestrator.pictures import MAX_BYTES, Pictures, encode_png, write_pictures
from sweeps.recipes import quickstart

TINY = {"pretrain.steps": 100, "pretrain.model.embed_dim": 16, "pretrain.model.num_heads": 2}


class Run:
    """A run that has got as far as one asks."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        keys = {f"pretrain.{name.replace('__', '.')}": value for name, value in changes.items()}
        self.config: RunConfig = override(quickstart(), {**TINY, **keys})
        source = open_source(self.config.data)
        self.state = TrainState.create(self.config.pretrain, len(source.train), "cpu")
        self.pictures = Pictures(self.config, source, make_loader(self.config, source), folder)

    def due(self) -> list[int]:
        steps = []
        for step in range(0, 101, 10):
            self.state.step = step
            steps += [step] if self.pictures.is_due(self.state) else []
        return steps

    def draw(self, step: int) -> dict[str, np.ndarray]:
        self.state.step = step
        self.pictures.draw(self.state, self.state.teacher_backbone())
        folder = self.pictures._step_folder(self.state)
        images = {path.name: Image.open(io.BytesIO(path.read_bytes())) for path in folder.glob("*.png")}
        return {name: np.asarray(image.convert("RGB")) for name, image in images.items()}


def test_when_pictures_are_due(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.due() == [100]
    run.draw(100)
    assert run.due() == []  # a resumed run leaves what is there
    assert Run(tmp_path / "b", eval__pictures_every_steps=50).due() == [0, 50, 100]
    assert Run(tmp_path / "c", eval__num_pictures=0).due() == []


def test_a_run_draws_crops_attention_and_features(tmp_path: Path) -> None:
    drawn = Run(tmp_path).draw(100)
    assert {name: picture.shape for name, picture in drawn.items()} == {
        "crops.png": (390, 96 + 2 * 98 + 2 * 50, 3),  # image, two global and two local crops
        "attention.png": (390, 96 + 3 * 98, 3),  # image, mean, two heads
        "features.png": (390, 96 + 98, 3),
    }
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["step_00000100"]


def test_the_images_are_the_same_in_all_runs_of_a_source(tmp_path: Path) -> None:
    first = Run(tmp_path / "a").draw(100)
    other = Run(tmp_path / "b", seed=3, teacher__temp=0.07, eval__num_gallery=50, model__depth=1).draw(100)
    assert (first["crops.png"][:, :96] == other["crops.png"][:, :96]).all()
    assert (first["attention.png"][:, :96] == other["attention.png"][:, :96]).all()
    assert (first["features.png"] != other["features.png"]).any()
    assert (first["crops.png"] != other["crops.png"]).any()  # another seed has other crops
    same_seed = Run(tmp_path / "c", teacher__temp=0.07).draw(100)
    assert (first["crops.png"] == same_seed["crops.png"]).all()


def test_a_convnet_has_no_attention(tmp_path: Path) -> None:
    changes = dict.fromkeys(("patch_size", "embed_dim", "depth", "num_heads"))
    run = Run(tmp_path, model__backbone="resnet10t", crops__global_size=32, crops__local_size=32, **{
        f"model__{name}": value for name, value in changes.items()
    })  # fmt: skip
    assert set(run.draw(100)) == {"crops.png", "features.png"}


def test_a_full_disk_is_told_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    run = Run(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", full)
    with caplog.at_level(logging.WARNING):
        assert run.draw(100) == {}
    (record,) = caplog.records
    assert record.getMessage().startswith("no pictures of step 100")
    assert record.exc_info is not None
    assert "No space left on device" in str(record.exc_info[1])
    assert list((tmp_path / "pictures").iterdir()) == []
    monkeypatch.undo()
    assert len(run.draw(100)) == 3


@pytest.mark.parametrize("side", [40, 700])
def test_a_png_is_small_and_as_it_was_where_it_can_be(side: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    write_pictures(tmp_path / "step_1", {"noise": noise})
    data = (tmp_path / "step_1" / "noise.png").read_bytes()
    assert len(data) <= MAX_BYTES
    image = Image.open(io.BytesIO(data))
    if side == 40:
        assert (np.asarray(image) == noise).all()
    else:
        assert image.width == image.height < side
    assert len(encode_png(noise, 3000)) <= 3000
