"""Where the images of a WebDataset shard lie and which labels they have, kept on disk so that it is found only once."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dino_core.config import ConfigError
from orchestrator.config import DataConfig
from orchestrator.data.readers.folder import IMAGE_SUFFIXES
from orchestrator.data.readers.tar_headers import TarError, Window, walk
from orchestrator.data.storage import Folder, LocalFolder

_VERSION = 1
_LOCAL_BUFFER = 4 << 10  # a header and a small body; what lies between is skipped
_REMOTE_BUFFER = 8 << 20  # one request; skipping would cost one for each image


class Shard(NamedTuple):
    """A tar file as it was when the source was opened: a file replaced since then is another one."""

    folder: Folder
    name: str
    size: int
    modified_ns: int


class Choice(NamedTuple):
    """Which members are taken."""

    extension: str | None
    """Of the images; None: any that is an image's."""
    label_field: str
    """Of the .json."""


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The images of a shard, in the order in which they lie."""

    offsets: NDArray[np.int64]
    """[num_images] first byte of each."""
    sizes: NDArray[np.int64]
    """[num_images] bytes of each."""
    names: NDArray[np.uint8]
    """The names of the members, one behind the other."""
    ends: NDArray[np.int64]
    """[num_images] where in `names` each ends."""
    codes: NDArray[np.int64]
    """[num_images] place in `labels`; -1: none."""
    labels: NDArray[np.uint8]
    """The different labels as text, UTF-8, a zero byte after each."""
    others: NDArray[np.uint8]
    """Extensions of the other members, most frequent first, for messages, as `labels`."""

    def members(self) -> list[str]:
        """The names of the images."""
        names, ends = self.names.tobytes(), self.ends.tolist()
        return [os.fsdecode(names[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def label_names(self) -> list[str]:
        """The different labels."""
        return _unpack(self.labels)

    def other_extensions(self) -> list[str]:
        """Extensions of the members that are no images."""
        return _unpack(self.others)


def index_shard(shard: Shard, choice: Choice) -> ShardIndex:
    """The index of a shard, from the disk of this machine if it has been made before.

    Raises:
        ConfigError: The shard is damaged, cut short or not a tar, or a sample is ambiguous.
        OSError: It cannot be read.
    """
    path = _cache_folder() / f"{_key(shard, choice)}.index"
    cached = _load(path)
    if cached is not None:
        return cached
    index = _build(shard, choice)
    with contextlib.suppress(OSError):  # no room, or not ours: it is made again next time
        _save(path, index)
    return index


def split_name(name: str) -> tuple[str, str]:
    """The key of a member (its folder and what comes before the first dot of its name) and the rest, in lower case."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return f"{folder}{slash}{key}", extension.lower()


class _Sample:
    """What has been seen of a sample so far."""

    __slots__ = ("extension", "label", "member", "name")

    def __init__(self) -> None:
        self.name, self.extension = b"", ""
        self.member: tuple[int, int] | None = None
        self.label: str | None = None


def _build(shard: Shard, choice: Choice) -> ShardIndex:
    samples: dict[str, _Sample] = {}
    others: Counter[str] = Counter()
    is_local = isinstance(shard.folder, LocalFolder)
    with shard.folder.open(shard.name) as file:
        window = Window(file, _LOCAL_BUFFER if is_local else _REMOTE_BUFFER)
        try:
            for member in walk(window):
                name = os.fsdecode(member.name)
                key, extension = split_name(name)
                if not extension or key.endswith("/") or not key:
                    continue  # hidden files, and those without a dot, belong to no sample
                sample = samples.get(key)
                if sample is None:
                    sample = samples[key] = _Sample()
                if extension == choice.extension or (choice.extension is None and f".{extension}" in IMAGE_SUFFIXES):
                    if sample.member is not None:
                        raise ConfigError(_ambiguous(shard, key, sample.extension, extension))
                    sample.name, sample.extension = member.name, extension
                    sample.member = member.offset, member.size
                    continue
                others[extension] += 1
                if extension in ("cls", "json"):
                    _read_label(shard, choice, sample, name, extension, window.read(member.offset, member.size))
        except TarError as error:
            whole = sum(sample.member is not None for sample in samples.values())
            where = f"{shard.folder.address}/{shard.name}"
            raise ConfigError(f"data.source: {where}: {error} ({whole} whole images before)") from error
    taken = sorted((s for s in samples.values() if s.member is not None), key=lambda s: s.member or (0, 0))
    return _pack_index(taken, [extension for extension, _ in others.most_common(10)])


def _ambiguous(shard: Shard, key: str, first: str, second: str) -> str:
    what = f"data.source: sample {key} of {shard.folder.address}/{shard.name}"
    if first == second:
        return f"{what} has two members .{first}; pack the shard anew, each name once"
    return f"{what} has images .{first} and .{second}; set data.image_column to one of these extensions"


def _read_label(shard: Shard, choice: Choice, sample: _Sample, name: str, extension: str, data: bytes) -> None:
    """Take the label that a .cls or .json member holds; of both, that of the .cls."""
    if extension == "cls":
        if choice.label_field == DataConfig.label_column:
            sample.label = data.decode("utf-8", "replace").strip() or None
        return
    try:
        fields_of_json = json.loads(data)
    except (ValueError, RecursionError):  # a caption's trouble; the image is none the worse
        return
    label = fields_of_json.get(choice.label_field) if isinstance(fields_of_json, dict) else None
    if label is None or (sample.label is not None and choice.label_field == DataConfig.label_column):
        return
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise ConfigError(
            f"data.label_column = {choice.label_field}: must hold whole numbers or text, "
            f"not {type(label).__name__} as in {name} of {shard.name}"
        )
    sample.label = str(label) or None


def _pack_index(samples: Sequence[_Sample], others: Sequence[str]) -> ShardIndex:
    members = np.array([sample.member for sample in samples], dtype=np.int64).reshape(-1, 2)
    labels = sorted({sample.label for sample in samples if sample.label is not None})
    place: dict[str | None, int] = {label: number for number, label in enumerate(labels)} | {None: -1}
    return ShardIndex(
        offsets=members[:, 0].copy(),
        sizes=members[:, 1].copy(),
        names=np.frombuffer(b"".join(sample.name for sample in samples), dtype=np.uint8),
        ends=np.cumsum([len(sample.name) for sample in samples], dtype=np.int64),
        codes=np.array([place[sample.label] for sample in samples], dtype=np.int64),
        labels=_pack(labels),
        others=_pack(others),
    )


def _pack(texts: Sequence[str]) -> NDArray[np.uint8]:
    joined = "".join(text.replace("\0", "") + "\0" for text in texts)
    return np.frombuffer(joined.encode("utf-8", "surrogatepass"), dtype=np.uint8)


def _unpack(data: NDArray[np.uint8]) -> list[str]:
    return data.tobytes().decode("utf-8", "surrogatepass").split("\0")[:-1]


# The cache


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "dino-orchestrator" / "webdataset"


def _key(shard: Shard, choice: Choice) -> str:
    facts = [_VERSION, shard.folder.address, shard.name, shard.size, shard.modified_ns, *choice]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _load(path: Path) -> ShardIndex | None:
    """The index at `path`; None if there is none, or one that is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if data[:32] != hashlib.sha256(data[32:]).digest():
        return None
    content = io.BytesIO(data[32:])
    return ShardIndex(**{field.name: np.load(content, allow_pickle=False) for field in fields(ShardIndex)})


def _save(path: Path, index: ShardIndex) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    for field in fields(index):
        np.save(content, getattr(index, field.name), allow_pickle=False)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(hashlib.sha256(content.getvalue()).digest() + content.getvalue())
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
