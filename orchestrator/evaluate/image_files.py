"""Images of a layout of its own, such as a benchmark's folder, for `Job.features`. Imports torch when it is called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dino_core.config import ConfigError
from orchestrator.data.loaders import Decoder
from orchestrator.data.readers.folder import IMAGE_SUFFIXES, Files
from orchestrator.data.sources import open_source
from orchestrator.data.split import DIGEST_LENGTH, Source, build_source
from orchestrator.data.storage import Place, find
from orchestrator.overrides import did_you_mean

if TYPE_CHECKING:
    from orchestrator.evaluate.features import Images
    from orchestrator.evaluate.job import Job

_LISTED = 3


def find_layout(key: str, address: str | None, marks: Sequence[str], what: str) -> Place:
    """The folder that `address` names.

    Args:
        key: Of the setting, for messages.
        marks: Files or folders that it must hold.
        what: Those, for people.

    Raises:
        ConfigError: No address, nothing there, a file, or a folder without the marks; names the sub-folder that has
            them.
    """
    if not address:
        raise ConfigError(f"{key}: must be given: a folder with {what}")
    place = find(key, address)
    if place.is_file:
        raise ConfigError(f"{key} = {address}: is a file; must be a folder with {what}; unpack an archive first")
    missing = _missing(place.files, marks)
    if missing:
        inner = sorted({name.split("/", 1)[0] for name in place.files if "/" in name})
        right = [name for name in inner if not _missing(_below(place.files, name), marks)]
        near = f"; did you mean {address.rstrip('/')}/{right[0]}?" if right else did_you_mean(missing[0], inner)
        raise ConfigError(f"{key} = {address}: has no {' and no '.join(missing)}; must be a folder with {what}{near}")
    return place


def check_names(key: str, address: str, wanted: Iterable[tuple[str, str]], there: Mapping[str, object]) -> None:
    """Raise ConfigError if a file is not there, naming the first few and the nearest.

    Args:
        wanted: Each file, and who names it.
    """
    missing = [(name, by) for name, by in wanted if name not in there]
    if missing:
        lines = [f"{name} ({by}){did_you_mean(name, _neighbours(name, there))}" for name, by in missing[:_LISTED]]
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        raise ConfigError(f"{key} = {address}: no such images: {', '.join(lines)}{more}")


def is_image(name: str) -> bool:
    """Whether a file is one by its suffix."""
    return f".{name.rpartition('.')[2].casefold()}" in IMAGE_SUFFIXES


def images_of_files(job: Job, place: Place, names: Sequence[str], what: str) -> Images:
    """Images of some files of a folder, in this order; `what` they are, for messages."""
    from orchestrator.evaluate.features import Images

    files = Files(place.folder, names)
    digest = files.fingerprint().hex()[:DIGEST_LENGTH]
    split = build_source("files", place.address, [(files, None), None], lambda: digest).train
    return Images(split, np.arange(len(names)), digest, Decoder(job.config.data.max_pixels), what)


def open_other_source(job: Job, key: str, source: str) -> Source:
    """Images that a suite takes beside its own, named as by `data.source`.

    Raises:
        ConfigError: It cannot be opened; names `key`.
    """
    data = job.config.data
    defaults = type(data)()
    same: dict[str, Any] = {"max_pixels": data.max_pixels, "download": data.download}
    try:
        return open_source(replace(defaults, source=source, **same))
    except ConfigError as error:
        raise ConfigError(str(error).replace("data.source", key)) from error


def images_of_source(job: Job, source: Source, limit: int, what: str) -> Images:
    """Its training images, of many a fixed choice of `limit`; `what` they are, for messages."""
    from orchestrator.evaluate.features import Images
    from orchestrator.evaluation import fixed_choice

    ids = fixed_choice(len(source.train), limit)
    return Images(source.train, ids, f"{source.digest()} train", Decoder(job.config.data.max_pixels), what)


def _missing(files: Iterable[str], marks: Sequence[str]) -> list[str]:
    names = set(files)
    folders = {name.split("/", 1)[0] for name in names if "/" in name}
    return [mark for mark in marks if (mark[:-1] not in folders if mark.endswith("/") else mark not in names)]


def _below(files: Iterable[str], folder: str) -> list[str]:
    return [name.removeprefix(f"{folder}/") for name in files if name.startswith(f"{folder}/")]


def _neighbours(name: str, there: Iterable[str]) -> list[str]:
    """Files of the same folder, or all."""
    folder = name.rpartition("/")[0]
    return [other for other in there if other.rpartition("/")[0] == folder] or list(there)
