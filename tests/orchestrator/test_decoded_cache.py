"""Loaders and the cache of decoded images, with several processes, damage, and no room."""

from __future__ import annotations

import io
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import lmdb
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dino_core.config import ConfigError
from orchestrator.config import ClusterConfig, DataConfig, RunConfig
from orchestrator.data import decoded_cache, loaders
from orchestrator.data.decoded_cache import close_caches, open_cache
from orchestrator.data.images import BadImage, decode
from orchestrator.data.loaders import CachedDecoder, Decoder, Loader, make_loader
from orchestrator.data.sources import open_source
from orchestrator.data.split import Source, Split

NUM = 24
CHECKED = 8  # of a process's first hits are decoded all the same


def picture(number: int, side: int = 40) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (side, side + number % 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class Pictures:
    """A `Reader` that counts."""

    def __init__(self, images: list[bytes]) -> None:
        self.images = images
        self.reads: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        self.reads[index] += 1
        return self.images[index]

    def name(self, index: int) -> str:
        return f"picture {index}"

    def units(self) -> None:
        return None


def source_of(train: list[bytes], test: list[bytes] | None = None, digest: str = "a" * 32) -> Source:
    tests = None if test is None else Split(Pictures(test), None)
    return Source("folder", "/somewhere", Split(Pictures(train), None), tests, (), lambda: digest)


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    return [picture(number) for number in range(NUM)]


@pytest.fixture
def config(tmp_path: Path) -> Iterator[RunConfig]:
    yield RunConfig(cluster=ClusterConfig(decoded_cache_gb=0.1, decoded_cache_dir=str(tmp_path / "cache")))
    close_caches()


def load_all(loader: Loader, split: Split) -> list[NDArray[np.uint8]]:
    return [loader.load(split, index) for index in range(len(split))]


def right(images: list[NDArray[np.uint8]], encoded: list[bytes]) -> bool:
    return all(np.array_equal(image, decode(data, 10**9)) for image, data in zip(images, encoded, strict=True))


def new_reads(split: Split, load: Callable[[], object]) -> int:
    """How many images `load` reads from the source."""
    assert isinstance(split.reader, Pictures)
    before = split.reader.reads.total()
    load()
    return split.reader.reads.total() - before


def cached(config: RunConfig, source: Source) -> CachedDecoder:
    loader = make_loader(config, source)
    assert isinstance(loader, CachedDecoder)
    return loader


def data_file(loader: CachedDecoder) -> Path:
    return loader.folder / "data.mdb"


def filled(config: RunConfig, source: Source) -> CachedDecoder:
    """A loader whose cache holds the training images; it is closed."""
    loader = cached(config, source)
    load_all(loader, source.train)
    close_caches()
    return loader


# What is loaded


def test_the_pixels_are_those_of_the_decoder_before_and_after_they_are_kept(
    config: RunConfig, pictures: list[bytes]
) -> None:
    source = source_of(pictures)
    loader = cached(config, source)
    assert new_reads(source.train, lambda: load_all(loader, source.train)) == NUM
    close_caches()
    images = load_all(loader, source.train)
    assert right(images, pictures)
    assert all(image.flags.writeable and image.flags.owndata for image in images)
    assert new_reads(source.train, lambda: load_all(loader, source.train)) == 0


def test_the_first_images_of_a_process_are_decoded_all_the_same(config: RunConfig, pictures: list[bytes]) -> None:
    source = source_of(pictures)
    loader = filled(config, source)
    assert new_reads(source.train, lambda: load_all(loader, source.train)) == CHECKED


def test_without_a_size_nothing_is_kept(config: RunConfig, pictures: list[bytes], tmp_path: Path) -> None:
    source = source_of(pictures)
    loader = make_loader(replace(config, cluster=replace(config.cluster, decoded_cache_gb=0.0)), source)
    assert loader == Decoder(config.data.max_pixels)
    assert right(load_all(loader, source.train), pictures)
    assert not (tmp_path / "cache").exists()


def test_images_that_need_no_decoding_are_not_kept(config: RunConfig) -> None:
    source = open_source(config.data)
    assert source.kind == "digits"
    assert isinstance(make_loader(config, source), Decoder)


def test_a_bad_image_is_refused_each_time(config: RunConfig, pictures: list[bytes]) -> None:
    source = source_of([pictures[0], b"", pictures[2]])
    loader = cached(config, source)
    for _ in range(2):
        with pytest.raises(BadImage, match="empty file"):
            loader.load(source.train, 1)
    assert np.array_equal(loader.load(source.train, 2), decode(pictures[2], 10**6))


def test_the_splits_of_a_source_are_kept_apart(config: RunConfig, pictures: list[bytes]) -> None:
    source = source_of(pictures[:12], pictures[12:])
    assert source.test is not None
    train, test = make_loader(config, source, "train"), make_loader(config, source, "test")
    for _ in range(2):
        assert right(load_all(train, source.train), pictures[:12])
        assert right(load_all(test, source.test), pictures[12:])
        close_caches()
    with pytest.raises(ValueError, match="a loader of train with 12 images was given 1"):
        train.load(Split(Pictures(pictures[:1]), None), 0)


@pytest.mark.parametrize("change", ["digest", "max_pixels", "image_column", "decoder"])
def test_whatever_the_pixels_depend_on_makes_another_cache(
    config: RunConfig, pictures: list[bytes], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cached(config, source_of(pictures))
    digest, data = "a" * 32, config.data
    if change == "digest":
        digest = "b" * 32
    elif change == "decoder":
        monkeypatch.setattr(loaders, "_decoder", lambda: ["another"])
    elif change == "max_pixels":
        data = replace(data, max_pixels=5000)
    else:
        data = replace(data, image_column="other")
    assert cached(replace(config, data=data), source_of(pictures, digest=digest)).folder != first.folder


def test_what_changes_no_pixel_shares_the_cache(config: RunConfig, pictures: list[bytes]) -> None:
    first = cached(config, source_of(pictures))
    data = replace(config.data, shuffle="windowed", max_bad_fraction=0.5)
    assert cached(replace(config, data=data), source_of(pictures)) == first


def test_a_loader_pickles_small(config: RunConfig, pictures: list[bytes]) -> None:
    source = source_of(pictures)
    loader = filled(config, source)
    pickled = pickle.dumps(loader)
    assert len(pickled) < 600
    assert pickle.loads(pickled) == loader  # noqa: S301
    assert right(load_all(pickle.loads(pickled), source.train), pictures)  # noqa: S301


def test_replaced_images_of_the_same_size_are_noticed(
    config: RunConfig, pictures: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    source = source_of(pictures)
    filled(config, source)
    others = source_of(pictures[::-1])  # the digest is the same, as it is of names and sizes
    loader = cached(config, others)
    for _ in range(3):
        assert right(load_all(loader, others.train), pictures[::-1])
        close_caches()
    assert caplog.text.count("holds an image that is another one by now: it is begun anew") == 1
    close_caches()
    assert new_reads(others.train, lambda: load_all(loader, others.train)) == CHECKED


# Threads and processes

SCRIPT = """
import sys
from orchestrator.config import ClusterConfig, DataConfig, RunConfig
from orchestrator.data.loaders import make_loader
from orchestrator.data.sources import open_source
images, cache, gb, rounds, limit = sys.argv[1:]
if limit != "0":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
config = RunConfig(
    data=DataConfig(source=images), cluster=ClusterConfig(decoded_cache_gb=float(gb), decoded_cache_dir=cache)
)
source = open_source(config.data)
loader = make_loader(config, source)
print("ready", flush=True)
for _ in range(int(rounds)):
    for index in range(len(source.train)):
        loader.load(source.train, index)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 images of 48 kB each when they are decoded."""
    root = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for number in range(150):
        pixels[0, 0] = number
        Image.fromarray(pixels).resize((128, 128), Image.Resampling.NEAREST).save(root / f"{number:03}.png")
    return root


def start(images: Path, config: RunConfig, *, rounds: int, gb: float = 0.1, limit: int = 0) -> subprocess.Popen[str]:
    """A process that loads all images some times, with files of up to `limit` bytes (0: of any size)."""
    assert config.cluster.decoded_cache_dir is not None
    arguments = [os.fspath(images), config.cluster.decoded_cache_dir, str(gb), str(rounds), str(limit)]
    root = Path(loaders.__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str]) -> str:
    """What it wrote to stderr, when it has ended well."""
    _, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors
    return errors


def of_folder(config: RunConfig, folder: Path) -> tuple[RunConfig, Source]:
    config = replace(config, data=DataConfig(source=str(folder)))
    return config, open_source(config.data)


def check_cache(config: RunConfig, folder: Path) -> int:
    """Load all images and compare them; how many of them were kept."""
    config, source = of_folder(config, folder)
    loader = cached(config, source)
    close_caches()
    with lmdb.open(os.fspath(loader.folder), map_size=1 << 30) as env:
        kept = int(env.stat()["entries"])
    encoded = [source.train.read(index) for index in range(len(source.train))]
    assert right(load_all(loader, source.train), [data for data in encoded if isinstance(data, bytes)])
    close_caches()
    return kept


def test_threads_load_the_same(config: RunConfig, pictures: list[bytes]) -> None:
    source = source_of(pictures)
    loader = cached(config, source)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for images in pool.map(lambda _: load_all(loader, source.train), range(8)):
                assert right(images, pictures)
    assert open_cache(loader.folder, loader.limit_bytes).problem is None


def test_processes_fill_one_cache_together_and_leave_all_of_it_when_they_end(config: RunConfig, folder: Path) -> None:
    for process in [start(folder, config, rounds=2) for _ in range(2)]:
        assert ended(process) == ""
    assert check_cache(config, folder) == 150


def test_a_process_that_is_killed_while_it_writes_does_no_harm(
    config: RunConfig, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = data_file(cached(*of_folder(config, folder)))
    close_caches()
    for _ in range(2):
        size = data.stat().st_size
        process = start(folder, config, rounds=10**6)
        deadline = time.monotonic() + 200
        while data.stat().st_size <= size and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=250)
        assert data.stat().st_size > size
    assert check_cache(config, folder) < 150
    assert ended(start(folder, config, rounds=1)) == ""
    assert check_cache(config, folder) == 150
    assert not caplog.records


def test_a_child_by_fork_decodes(config: RunConfig, pictures: list[bytes]) -> None:
    source = source_of(pictures)
    loader = filled(config, source)
    assert right(load_all(loader, source.train), pictures)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if right(load_all(loader, source.train), pictures) else 1
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert new_reads(source.train, lambda: load_all(loader, source.train)) == 0


def test_a_limit_that_another_process_has_raised_is_no_failure(config: RunConfig, folder: Path) -> None:
    small = replace(config, cluster=replace(config.cluster, decoded_cache_gb=0.001))
    small, source = of_folder(small, folder)
    loader = cached(small, source)
    loader.load(source.train, 0)
    ended(start(folder, config, rounds=1))
    images = load_all(loader, source.train)
    close_caches()
    assert all(np.array_equal(a, b) for a, b in zip(images, load_all(loader, source.train), strict=True))
    assert check_cache(small, folder) == 150  # what is there is used, whatever the limit is now


# Damage


def damage(loader: CachedDecoder, how: str) -> None:
    path = data_file(loader)
    content = path.read_bytes()
    if how == "pixel":
        place = content.index(decode(picture(3), 10**6).tobytes())
        content = content[: place + 100] + bytes([content[place + 100] ^ 1]) + content[place + 101 :]
    elif how == "cut":
        content = content[: len(content) // 2]
    elif how == "zeros":  # the pages that lead to the images
        content = content[:8192] + b"\0" * (len(content) - 8192)
    else:
        content = b"not a database" * 1000
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["pixel", "cut", "zeros", "garbage"])
def test_a_damaged_cache_is_made_anew(
    config: RunConfig, pictures: list[bytes], how: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = source_of(pictures)
    loader = filled(config, source)
    damage(loader, how)
    assert right(load_all(loader, source.train), pictures)
    assert caplog.text.count("is damaged") == 1
    assert "it is begun anew" in caplog.text
    assert right(load_all(loader, source.train), pictures)
    assert open_cache(loader.folder, loader.limit_bytes).problem is None
    close_caches()
    load_all(loader, source.train)
    close_caches()
    assert new_reads(source.train, lambda: load_all(loader, source.train)) == CHECKED
    assert not list(loader.folder.parent.glob("*.removed"))


def test_a_cache_that_is_damaged_again_and_again_is_given_up(
    config: RunConfig, pictures: list[bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(decoded_cache, "_BATCH_SECONDS", 0.01)
    source = source_of(pictures)
    loader = filled(config, source)
    monkeypatch.setattr(decoded_cache, "_unpack", lambda key, record: None)
    deadline = time.monotonic() + 200
    while "no longer used" not in caplog.text and time.monotonic() < deadline:
        assert right(load_all(loader, source.train), pictures)
    assert caplog.text.count("differs from its checksum") == 2
    assert new_reads(source.train, lambda: load_all(loader, source.train)) == NUM


def test_the_folder_may_be_deleted_while_it_is_used(config: RunConfig, pictures: list[bytes]) -> None:
    source = source_of(pictures)
    loader = filled(config, source)
    load_all(loader, source.train)
    for path in loader.folder.iterdir():
        path.unlink()
    loader.folder.rmdir()
    assert right(load_all(loader, source.train), pictures)
    close_caches()
    assert right(load_all(loader, source.train), pictures)
    assert data_file(loader).exists()


# No room


def test_a_full_cache_keeps_what_it_has(
    config: RunConfig, pictures: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(config, cluster=replace(config.cluster, decoded_cache_gb=0.0002))
    source = source_of(pictures)
    loader = filled(config, source)
    assert data_file(loader).stat().st_size <= 200_000
    (text,) = [record.getMessage() for record in caplog.records]
    kept = int(text.rsplit(" is full with ", 1)[1].removesuffix(" images"))
    assert 10 < kept < NUM
    assert right(load_all(loader, source.train), pictures)
    assert new_reads(source.train, lambda: load_all(loader, source.train)) == NUM - kept
    close_caches()
    assert data_file(loader).stat().st_size <= 200_000
    assert len(caplog.records) == 1  # it was told when it became full


def test_a_disk_that_takes_no_more_ends_the_writing_only(config: RunConfig, folder: Path) -> None:
    errors = ended(start(folder, config, rounds=2, limit=2_000_000))
    assert errors.count("takes no more images") == 1
    assert check_cache(config, folder) < 150


def test_a_share_of_the_disk_is_left_free(
    config: RunConfig, pictures: list[bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(decoded_cache, "_FREE_SHARE", 1.0)
    source = source_of(pictures)
    loader = filled(config, source)
    assert "takes no more images: less than 100% of its disk is free" in caplog.text
    assert new_reads(source.train, lambda: load_all(loader, source.train)) == NUM


def test_a_disk_that_is_slow_keeps_nobody_waiting(
    config: RunConfig, pictures: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoded_cache, "_QUEUE_BYTES", 20_000)  # four images
    monkeypatch.setattr(decoded_cache, "_BATCH_SECONDS", 0.01)
    source = source_of(pictures)
    loader = cached(config, source)
    env = open_cache(loader.folder, loader.limit_bytes)._env
    assert env is not None
    with env.begin(write=True):  # the writer waits for this one
        for _ in range(3):
            assert right(load_all(loader, source.train), pictures)
    close_caches()
    assert NUM - 4 <= new_reads(source.train, lambda: load_all(loader, source.train)) < NUM + CHECKED


def test_without_a_free_place_for_readers_images_are_decoded(
    config: RunConfig, pictures: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoded_cache, "_MAX_READERS", 1)
    source = source_of(pictures)
    loader = filled(config, source)
    env = open_cache(loader.folder, loader.limit_bytes)._env
    assert env is not None
    with env.begin():
        assert new_reads(source.train, lambda: load_all(loader, source.train)) == NUM
    load_all(loader, source.train)
    assert new_reads(source.train, lambda: load_all(loader, source.train)) == 0


# The folder


def test_a_folder_that_cannot_be_used_is_refused_with_the_setting(
    config: RunConfig, pictures: list[bytes], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    others = tmp_path / "others"
    others.mkdir()
    if os.geteuid() == 0:
        os.chown(others, 12345, 12345)
    else:
        others = Path("/")
    for path, why in {
        tmp_path / "file": "File exists",
        tmp_path / "file" / "below": "Not a directory",
        tmp_path / "link": "is a link, not a folder",
        Path("/proc/cache"): "No such file or directory",
        others: "belongs to user",
    }.items():
        this = replace(config, cluster=replace(config.cluster, decoded_cache_dir=str(path)))
        with pytest.raises(ConfigError, match=rf"cluster\.decoded_cache_dir = /.*: .* cannot be kept in {path}.*{why}"):
            make_loader(this, source_of(pictures))


def test_a_folder_that_cannot_be_used_on_another_machine_only_costs_time(
    config: RunConfig, pictures: list[bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = source_of(pictures)
    loader = replace(cached(config, source), folder=Path("/proc/cache/decoded-1"))
    assert right(load_all(loader, source.train), pictures)
    assert caplog.text.count("is no longer used") == 1
    close_caches()


def test_the_default_folder_is_private_and_below_that_of_temporary_files(
    config: RunConfig, pictures: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    loader = cached(replace(config, cluster=ClusterConfig(decoded_cache_gb=0.1)), source_of(pictures))
    folder = tmp_path / f"dino-orchestrator-{os.geteuid()}"
    assert loader.folder.parent == folder
    assert [path.stat().st_mode & 0o777 for path in (folder, loader.folder, data_file(loader))] == [0o700, 0o700, 0o600]


def test_the_log_says_nothing_when_all_is_well(
    config: RunConfig, pictures: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="orchestrator")
    source = source_of(pictures)
    load_all(filled(config, source), source.train)
    assert not [record for record in caplog.records if record.name.startswith("orchestrator")]
