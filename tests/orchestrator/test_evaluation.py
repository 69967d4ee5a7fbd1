"""k-NN while training: the images it sees, in which order, by which threads, and those that cannot be read."""

from __future__ import annotations

import io
import logging
import math
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

from dino_core.config import ConfigError
from dino_core.crops import MultiCrop
from dino_core.eval import alpha_req, lidar, rankme
from dino_core.eval.features import eval_transform
from dino_core.train import TrainState
from orchestrator import evaluation
from orchestrator.config import RunConfig
from orchestrator.data.decoded_cache import close_caches
from orchestrator.data.images import decode
from orchestrator.data.split import Source, Split
from orchestrator.errors import RunFailed
from orchestrator.evaluation import _Images, make_evaluate
from orchestrator.overrides import override
from sweeps.recipes import quickstart

NUM_TRAIN, NUM_TEST = 45, 15
LABEL_FREE = {"eval/rankme", "eval/lidar", "eval/alpha_req"}
LIDAR = {"pretrain.eval.num_lidar_images": 10}
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
    return _Images(config, source, "train", np.arange(NUM_TRAIN), None)


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
    config = override(CONFIG, {"pretrain.eval.num_lidar_images": 0})  # views go by the image's number
    function = make_evaluate(config, source)
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
    without = evaluate(config, replace(source, train=rest["train"], test=rest["test"]))
    assert without == {name: value for name, value in first.items() if name != "eval/unreadable_images"}


def test_nothing_is_counted_where_all_can_be_read() -> None:
    assert evaluate(CONFIG, source_of()).keys() == {"eval/knn_top1", "eval/raw_pixel_knn_top1", *LABEL_FREE}


# --- scores that need no label ----------------------------------------------------------------------------------------


def without_labels(source: Source) -> Source:
    return replace(source, train=Split(source.train.reader, None), test=None, classes=())


def test_label_free_scores_are_those_of_the_features() -> None:
    """Of images and views made here one by one."""
    config = override(CONFIG, {"pretrain.eval.num_lidar_images": 10, "pretrain.eval.num_lidar_views": 4})
    metrics = evaluate(config, without_labels(source_of()))
    assert metrics.keys() == LABEL_FREE
    backbone = TrainState.create(config.pretrain, NUM_TRAIN, "cpu").teacher.backbone.eval()
    chosen = sorted(np.random.default_rng(0).permutation(NUM_TRAIN)[:10].tolist())
    crops = config.pretrain.crops
    views = []
    for number in chosen:
        image = decode(picture(number), 10**6)
        for epoch in range(2):
            made = MultiCrop(crops, seed=0).make([image], np.array([epoch]), np.array([number]))["global_crops"][0]
            pixels = torch.from_numpy(made).float() / 255
            views.append((pixels - torch.tensor(crops.mean).view(3, 1, 1)) / torch.tensor(crops.std).view(3, 1, 1))
    with torch.no_grad():
        rows = backbone(expected(range(NUM_TRAIN)))
        found = backbone(torch.cat(views)).view(10, 4, -1)
    assert metrics["eval/rankme"] == pytest.approx(rankme(rows), rel=1e-5)
    assert metrics["eval/alpha_req"] == pytest.approx(alpha_req(rows), rel=1e-3)
    assert metrics["eval/lidar"] == pytest.approx(lidar(found), rel=1e-3)
    assert 1 < metrics["eval/lidar"] <= 9
    assert found.std(dim=1).max() > 1e-3  # the views do differ


def test_scores_depend_neither_on_seed_nor_on_labels_nor_on_the_gallery() -> None:
    """The weights are the same here: what must not move are the images and their views."""
    state = TrainState.create(CONFIG.pretrain, NUM_TRAIN, "cpu")

    def scores(changes: dict[str, object], source: Source) -> dict[str, float]:
        function = make_evaluate(override(CONFIG, {"pretrain.eval.num_label_free": 20, **LIDAR, **changes}), source)
        assert function is not None
        return {name: value for name, value in function(state).items() if name in LABEL_FREE}

    first = scores({}, without_labels(source_of()))
    assert first.keys() == LABEL_FREE
    for changes in ({"pretrain.seed": 5}, {"pretrain.eval.num_gallery": 7}, {"pretrain.eval.num_gallery": 30}):
        assert scores(changes, source_of()) == pytest.approx(first, rel=1e-4)
    assert scores({"pretrain.eval.num_label_free": 21}, source_of())["eval/rankme"] != pytest.approx(
        first["eval/rankme"], rel=1e-4
    )


def test_scores_change_nothing_of_k_nn() -> None:
    few = {"pretrain.eval.num_gallery": 12}
    off = evaluate(override(CONFIG, {**few, "pretrain.eval.num_label_free": 0}), source_of())
    assert off.keys() == {"eval/knn_top1", "eval/raw_pixel_knn_top1"}
    assert off.items() <= evaluate(override(CONFIG, few), source_of()).items()


def test_an_image_of_both_choices_is_read_once_and_views_once_more() -> None:
    reads: list[int] = []
    function = make_evaluate(override(CONFIG, LIDAR), source_of(on_read=reads.append))
    assert function is not None
    state = TrainState.create(CONFIG.pretrain, NUM_TRAIN, "cpu")
    function(state)
    assert len(reads) == NUM_TRAIN + 10 + 2 * PROBED
    function(state)
    assert len(reads) == NUM_TRAIN + 10 + 2 * PROBED


def test_the_next_trial_in_a_process_finds_the_images_made() -> None:
    reads: list[int] = []
    found = {}
    for name, change in {
        "first": {},
        "trial": {"pretrain.seed": 7, "pretrain.teacher.temp": 0.07, "pretrain.head.num_prototypes": 8},
        "crops": {"pretrain.crops.global_scale": (0.5, 1.0)},
    }.items():
        config = override(CONFIG, {**LIDAR, **change})
        function = make_evaluate(config, source_of(on_read=reads.append), "a" * 32)
        assert function is not None
        state = TrainState.create(config.pretrain, NUM_TRAIN, "cpu")
        found[name] = (function(state), len(reads))
        alone = make_evaluate(config, source_of())
        assert alone is not None and alone(state) == found[name][0]
    once = NUM_TRAIN + 10 + 2 * PROBED
    assert [num_reads for _, num_reads in found.values()] == [once, once, 2 * once]
    assert found["first"][0] != found["trial"][0] != found["crops"][0]
    assert len(evaluation._kept) == 1, "what no trial needs any more is forgotten"


def test_parts_can_be_left_out() -> None:
    off = override(CONFIG, {"pretrain.eval.num_label_free": 0})
    assert make_evaluate(off, without_labels(source_of())) is None
    no_lidar = override(CONFIG, {"pretrain.eval.num_lidar_images": 0})
    assert evaluate(no_lidar, without_labels(source_of())).keys() == {"eval/rankme", "eval/alpha_req"}


def test_one_image_has_no_spectrum() -> None:
    one = {"pretrain.eval.num_label_free": 1, "pretrain.eval.num_lidar_images": 1}
    assert evaluate(override(CONFIG, one), without_labels(source_of())) == {"eval/rankme": 1.0, "eval/lidar": 1.0}


def test_unreadable_images_without_labels() -> None:
    source = without_labels(source_of(bad_train=(3, 44)))
    metrics = evaluate(CONFIG, source)
    assert metrics["eval/unreadable_images"] == 2
    assert metrics.keys() - {"eval/unreadable_images"} == LABEL_FREE
    with pytest.raises(RunFailed, match="no training image for evaluations can be read"):
        evaluate(CONFIG, without_labels(source_of(bad_train=tuple(range(NUM_TRAIN)))))


def test_features_that_are_not_finite_end_the_run() -> None:
    function = make_evaluate(CONFIG, without_labels(source_of()))
    assert function is not None
    state = TrainState.create(CONFIG.pretrain, NUM_TRAIN, "cpu")
    state.teacher.backbone.norm.bias.data[0] = math.nan  # type: ignore[union-attr, index]
    with pytest.raises(RunFailed, match="the features of training images at step 0 are not finite"):
        function(state)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"num_label_free": 100}, "num_lidar_images = 128: must be at most pretrain.eval.num_label_free = 100"),
        ({"num_lidar_views": 3}, "num_lidar_views = 3: must be even"),
        ({"pictures_every_steps": 75}, "pictures_every_steps = 75: must be a multiple of pretrain.eval.every_steps"),
        ({"every_steps": None, "pictures_every_steps": 75}, "pictures_every_steps = 75: must be a multiple"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(CONFIG, {f"pretrain.eval.{name}": value for name, value in changes.items()})
    assert str(caught.value).startswith(f"pretrain.eval.{line}")


# --- failures and workers ---------------------------------------------------------------------------------------------


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
    alone = evaluate(CONFIG, source_of(bad_train=(0, 40), bad_test=(14,)))
    assert results[0] == results[1] == pytest.approx(alone, rel=1e-4)
    assert alone.keys() >= LABEL_FREE
    assert results[0]["eval/unreadable_images"] == 3
