"""k-NN while training: the images it sees, in which order, by which threads, and those that cannot be read."""

from __future__ import annotations

import io
import logging
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dino_core.eval.features import eval_transform
from dino_core.train import TrainState
from orchestrator import evaluation
from orchestrator.config import RunConfig
from orchestrator.data.decoded_cache import close_caches
from orchestrator.data.images import decode
from orchestrator.data.split import Source, Split
from orchestrator.evaluation import _Images, make_evaluate
from orchestrator.overrides import override
from sweeps.recipes import quickstart

NUM_TRAIN, NUM_TEST = 45, 15
SIDE = 16
PROBED = 5  # images that are made once more to see what they cost
CONFIG = override(
    quickstart(),
    {
        "pretrain.steps": 2,
        "pretrain.model.embed_dim": 32,
        "pretrain.model.depth": 1,
        "pretrain.model.num_heads": 2,
        "pretrain.crops.global_size": SIDE,
        "pretrain.eval.batch_size": 8,
        "pretrain.eval.knn_k": 3,
        "cluster.data_cpus": 2,
    },
)


def picture(number: int) -> bytes:
    """Of a colour that says its class, number % 3."""
    pixels = np.random.default_rng(number).integers(0, 120, (20 + number % 3, 24, 3), dtype=np.uint8)
    pixels[..., number % 3] += 130
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class Pictures:
    """A `Reader` that tells what is read."""

    def __init__(self, images: list[bytes], on_read: Callable[[int], None] | None = None) -> None:
        self._images, self._on_read = images, on_read

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        if self._on_read is not None:
            self._on_read(index)
        return self._images[index]

    def name(self, index: int) -> str:
        return f"picture {index}"

    def units(self) -> None:
        return None


def source_of(
    *, bad_train: tuple[int, ...] = (), bad_test: tuple[int, ...] = (), on_read: Callable[[int], None] | None = None
) -> Source:
    """Training images, of which `on_read` is told, and test images."""
    train = [b"" if number in bad_train else picture(number) for number in range(NUM_TRAIN)]
    test = [b"" if number in bad_test else picture(1000 + number) for number in range(NUM_TEST)]
    return Source(
        kind="folder",
        location="/somewhere",
        train=Split(Pictures(train, on_read), np.arange(NUM_TRAIN) % 3),
        test=Split(Pictures(test), (1000 + np.arange(NUM_TEST)) % 3),
        classes=("red", "green", "blue"),
        compute_digest=lambda: "a" * 32,
    )


def gallery(config: RunConfig, source: Source) -> _Images:
    return _Images(config, source, "train", None, None)


def expected(numbers: range) -> Tensor:
    crops = CONFIG.pretrain.crops
    fraction = CONFIG.pretrain.eval.crop_fraction
    images = [eval_transform(decode(picture(n), 10**6), SIDE, fraction, crops.mean, crops.std) for n in numbers]
    return torch.stack(images)


def evaluate(config: RunConfig, source: Source) -> dict[str, float]:
    function = make_evaluate(config, source)
    assert function is not None
    return function(TrainState.create(config.pretrain, NUM_TRAIN, "cpu"))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert condition()


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("data_cpus", [1, 7])
def test_batches_are_the_images_in_order_whatever_the_threads(
    kept: bool, data_cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kept:
        monkeypatch.setattr(evaluation, "_CACHE_BYTES", 0)
    monkeypatch.setattr(evaluation, "_IMAGES_PER_TASK", 3)
    monkeypatch.setattr(evaluation, "_WORTH_THREADS_S", 0.0)
    reads: list[int] = []
    config = override(CONFIG, {"cluster.data_cpus": data_cpus})
    images = gallery(config, source_of(on_read=reads.append))
    for _ in range(2):
        batches = [batch.clone() for batch in images.batches()]
        assert [len(batch) for batch in batches] == [8, 8, 8, 8, 8, 5]
        assert torch.equal(torch.cat(batches), expected(range(NUM_TRAIN)))
    assert sorted(reads[PROBED:]) == sorted(list(range(NUM_TRAIN)) * (1 if kept else 2))


def test_what_was_left_in_the_middle_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_IMAGES_PER_TASK", 2)
    images = gallery(CONFIG, source_of())
    batches = images.batches()
    next(batches)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert torch.equal(torch.cat(list(images.batches())), expected(range(NUM_TRAIN)))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("evaluation")]


def test_images_are_made_by_all_threads_and_one_batch_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_IMAGES_PER_TASK", 1)
    monkeypatch.setattr(evaluation, "_WORTH_THREADS_S", 0.0)
    config = override(CONFIG, {"cluster.cpus_per_worker": 2, "cluster.data_cpus": 2, "pretrain.eval.batch_size": 8})
    reads: list[int] = []
    together = threading.Barrier(4)

    def on_read(index: int) -> None:
        if 8 <= index < 12:
            together.wait(200)  # passes only if four threads are here at once
        reads.append(index)

    batches = gallery(config, source_of(on_read=on_read)).batches()
    next(batches)
    wait_for(lambda: set(reads) == set(range(16)))
    time.sleep(0.05)
    assert max(reads) < 16
    next(batches)
    wait_for(lambda: set(reads) == set(range(24)))
    batches.close()  # type: ignore[attr-defined]


def test_tiny_images_are_made_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_WORTH_THREADS_S", 10.0)
    monkeypatch.setattr(evaluation, "_IMAGES_PER_TASK", 1)
    threads: set[str] = set()
    images = gallery(CONFIG, source_of(on_read=lambda _: threads.add(threading.current_thread().name)))
    assert torch.equal(torch.cat(list(images.batches())), expected(range(NUM_TRAIN)))
    assert threads == {"MainThread", "evaluation_0"}


def test_images_that_cannot_be_read_are_left_out_told_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    source = source_of(bad_train=(3, 44), bad_test=(0,))
    function = make_evaluate(CONFIG, source)
    assert function is not None
    state = TrainState.create(CONFIG.pretrain, NUM_TRAIN, "cpu")
    with caplog.at_level(logging.WARNING, logger="orchestrator"):
        first, second = function(state), function(state)
    assert first == second
    assert first["eval/unreadable_images"] == 3
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"evaluation leaves out picture {number}: empty file" for number in (3, 44, 0)]
    # As if they were not there.
    assert source.test is not None and source.test.labels is not None and source.train.labels is not None
    rest = {}
    for part, split, bad in (("train", source.train, [3, 44]), ("test", source.test, [0])):
        ids = [number for number in range(len(split)) if number not in bad]
        encoded = [data for number in ids if isinstance(data := split.read(number), bytes)]
        assert split.labels is not None
        rest[part] = Split(Pictures(encoded), split.labels[ids])
    without = evaluate(CONFIG, replace(source, train=rest["train"], test=rest["test"]))
    assert without == {name: value for name, value in first.items() if name != "eval/unreadable_images"}


def test_nothing_is_counted_where_all_can_be_read() -> None:
    assert evaluate(CONFIG, source_of()).keys() == {"eval/knn_top1", "eval/raw_pixel_knn_top1"}


def test_what_is_not_the_fault_of_an_image_ends_the_evaluation() -> None:
    def on_read(index: int) -> None:
        if index == 20:
            raise MemoryError("no memory")

    with pytest.raises(MemoryError, match="no memory"):
        evaluate(CONFIG, source_of(on_read=on_read))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("evaluation")]


def test_decoded_images_are_kept_on_disk_for_other_evaluations(tmp_path: Path) -> None:
    config = override(CONFIG, {"cluster.decoded_cache_gb": 0.1, "cluster.decoded_cache_dir": str(tmp_path / "cache")})
    reads: list[int] = []
    source = source_of(bad_test=(0,), on_read=reads.append)
    plain = evaluate(CONFIG, source)
    results = []
    for _ in range(2):
        reads.clear()
        results.append(evaluate(config, source))
        close_caches()
    assert results == [plain, plain]
    assert len(reads) < 12  # a look at the first, and the eight that every process decodes all the same


def one_rank(index: int, folder: str) -> None:
    warnings.simplefilter("error")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2)
    torch.set_num_threads(1)
    config = override(CONFIG, {"cluster.num_workers": 2})
    # 45 images are 23 for each of two: the first, which is unreadable, is also what fills up the second's share
    metrics = evaluate(config, source_of(bad_train=(0, 40), bad_test=(14,)))
    torch.save(metrics, f"{folder}/{index}.pt")
    dist.destroy_process_group()


def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(  # type: ignore[attr-defined]
        one_rank, args=(str(tmp_path),), nprocs=2, start_method="forkserver"
    )
    results = [torch.load(tmp_path / f"{index}.pt", weights_only=True) for index in range(2)]
    assert results[0] == results[1] == evaluate(CONFIG, source_of(bad_train=(0, 40), bad_test=(14,)))
    assert results[0]["eval/unreadable_images"] == 3
