"""Where the pixels of a sample come from: the source itself, or this machine's cache of decoded images."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import struct
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import features

from dino_core.config import ConfigError
from orchestrator.config import RunConfig
from orchestrator.data import images, jpeg
from orchestrator.data.decoded_cache import close_caches, open_cache
from orchestrator.data.images import load_image
from orchestrator.data.split import Source, Split
from orchestrator.overrides import show

Part = Literal["train", "test"]

_FORMAT = 1
"""Of what a cache holds; another one is another cache."""

_DECODER_MODULES = (images, jpeg)
"""All our code that pixels depend on: a change of it makes another cache."""

_SAME_PIXELS = ("source", "shuffle", "shuffle_window", "max_bad_fraction", "label_column", "download")
"""Settings of the data that say nothing about the pixels of a sample; the source has a digest."""


class Loader(Protocol):
    """Reads decoded images. Cheap to pickle."""

    def load(self, split: Split, index: int) -> NDArray[np.uint8]:
        """One image of a split, uint8 [height, width, 3]. Raises BadImage as `load_image` does."""


@dataclass(frozen=True)
class Decoder:
    """Reads and decodes each time."""

    max_pixels: int

    def load(self, split: Split, index: int) -> NDArray[np.uint8]:
        return load_image(split, index, self.max_pixels)


@dataclass(frozen=True)
class CachedDecoder:
    """Reads and decodes what this machine does not have yet. Bad images are not kept.

    A source is known by its names and sizes, so an image replaced by one of the same size is not seen. If all were, it
    is: each process compares the first images that it finds with what it decodes.
    """

    max_pixels: int
    folder: Path
    """Of the cache, whose name says what the pixels depend on."""
    limit_bytes: int
    part: Part
    """The split that is loaded; its samples are numbered by themselves."""
    num_samples: int
    """Of that split."""

    def load(self, split: Split, index: int) -> NDArray[np.uint8]:
        if len(split) != self.num_samples:
            raise ValueError(f"a loader of {self.part} with {self.num_samples} images was given {len(split)}")
        key = struct.pack(">?Q", self.part == "test", index)
        cache = open_cache(self.folder, self.limit_bytes)
        return cache.load(key, lambda: load_image(split, index, self.max_pixels))


def make_loader(config: RunConfig, source: Source, part: Part = "train", digest: str | None = None) -> Loader:
    """What loads the images of one split of a source in this run.

    Args:
        digest: The source's, if it is known already.

    Raises:
        ConfigError: `cluster.decoded_cache_dir` cannot hold a cache on this machine. On another, images are decoded.
    """
    cluster = config.cluster
    decoder = Decoder(config.data.max_pixels)
    split = source.train if part == "train" else source.test
    if not cluster.decoded_cache_gb or split is None or not _is_encoded(split):
        return decoder
    root = _cache_root(cluster.decoded_cache_dir)
    folder = root / f"decoded-{_cache_name(config, source, digest)}"
    limit = round(cluster.decoded_cache_gb * 1e9)
    problem = open_cache(folder, limit).problem
    if problem is not None:
        close_caches(folder)  # for another run it may be in order
        raise ConfigError(
            f"cluster.decoded_cache_dir = {show(cluster.decoded_cache_dir)}: decoded images cannot be kept in {root}: "
            f"{problem}; must be a folder of your own on a local disk; cluster.decoded_cache_gb=0 keeps none"
        )
    return CachedDecoder(decoder.max_pixels, folder, limit, part, len(split))


def _is_encoded(split: Split) -> bool:
    """Whether there is anything to decode."""
    try:
        return isinstance(split.read(0), bytes)
    except OSError:
        return True


def _cache_root(folder: str | None) -> Path:
    if folder is not None:
        return Path(folder).expanduser().absolute()
    return Path(tempfile.gettempdir()).absolute() / f"dino-orchestrator-{os.geteuid()}"


def _cache_name(config: RunConfig, source: Source, digest: str | None) -> str:
    data = {name: value for name, value in asdict(config.data).items() if name not in _SAME_PIXELS}
    what = [_FORMAT, source.kind, source.location, digest or source.digest(), data, _decoder()]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _decoder() -> list[str | None]:
    """What the pixels depend on beside the bytes: our code and the versions of the libraries."""
    import simplejpeg

    code = hashlib.sha256()
    for module in _DECODER_MODULES:
        assert module.__file__ is not None
        code.update(Path(module.__file__).read_bytes())
    libraries = [features.version(name) for name in ("libjpeg_turbo", "jpg", "jpg_2000", "webp", "avif")]
    return [code.hexdigest(), PIL.__version__, simplejpeg.__version__, *libraries]
