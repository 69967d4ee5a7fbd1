"""The layout of revisited Oxford and Paris, for the suite `retrieval`.

::

    gnd_roxford5k.pkl   or gnd_*.json of the same content
    jpg/<name>.jpg      of `imlist` and `qimlist`

The ground truth is a dict of `imlist` and `qimlist`, names of gallery images and queries, and `gnd`, a dict for each
query: `easy`, `hard` and `junk` are numbers of gallery images from 0, and `bbx` is the box of the object in the query
[left, top, right, bottom], in pixels.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dino_core.config import ConfigError
from dino_core.eval.retrieval import RevisitedQuery
from orchestrator.data.storage import Place
from orchestrator.evaluate.image_files import check_names, find_layout
from orchestrator.evaluate.plain_pickle import NotPlain, read_plain_pickle

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, pixels."""

_IMAGES = "jpg/"
_PATTERNS = ("gnd_*.json", "gnd_*.pkl")
_WHAT = f"{_IMAGES} and one of {' or '.join(_PATTERNS)}"
_KINDS = ("easy", "hard", "junk")


@dataclass(frozen=True)
class RevisitedLayout:
    """What lies in the folder."""

    place: Place
    gallery: tuple[str, ...]
    """Files, in the order that the ground truth counts."""
    queries: tuple[str, ...]
    truth: tuple[RevisitedQuery, ...]
    """Of each query."""
    boxes: tuple[Box, ...] | None
    """Of each query; None if any has none."""


def read_revisited_layout(key: str, address: str | None) -> RevisitedLayout:
    """The layout at `address`, a path or URL.

    Raises:
        ConfigError: It is another layout, the ground truth is not as above, or names images that are not there.
    """
    place = find_layout(key, address, (_IMAGES,), _WHAT)
    assert address is not None
    loose = [name for name in place.files if "/" not in name]
    found = [name for pattern in _PATTERNS for name in fnmatch.filter(loose, pattern)]
    stems = {name.rpartition(".")[0] for name in found}
    if len(stems) != 1:
        which = f"has {', '.join(found)}" if found else "has no ground truth"
        raise ConfigError(f"{key} = {address}: {which}; must be a folder with {_WHAT}")
    where = f"{key} = {address}: {found[0]}"  # JSON, where there are both
    content = _read(where, place, found[0])
    lists = {name: _names(where, content, name) for name in ("imlist", "qimlist")}
    queries = content.get("gnd")
    if not isinstance(queries, list) or len(queries) != len(lists["qimlist"]):
        raise ConfigError(f"{where}: gnd must be a list of {len(lists['qimlist'])} dicts, one for each of qimlist")
    num = len(lists["imlist"])
    truth = tuple(
        RevisitedQuery(**{kind: _numbers(f"{where}: gnd {index}", query, kind, num) for kind in _KINDS})
        for index, query in enumerate(queries)
    )
    boxes = [_box(f"{where}: gnd {index}", query) for index, query in enumerate(queries)]
    files = {name: tuple(f"{_IMAGES}{image}.jpg" for image in images) for name, images in lists.items()}
    check_names(key, address, ((file, name) for name, images in files.items() for file in images), place.files)
    whole = tuple(box for box in boxes if box is not None)
    return RevisitedLayout(place, files["imlist"], files["qimlist"], truth, whole if len(whole) == len(boxes) else None)


def _read(where: str, place: Place, name: str) -> dict[str, Any]:
    try:
        data = place.folder.read(name)
        content = json.loads(data) if name.endswith(".json") else read_plain_pickle(data)
    except NotPlain as error:
        raise ConfigError(
            f"{where}: {error}; it is not unpickled, which could run any code: where you trust it, write it as JSON "
            "under the same name with .json (docs/evaluation.md says how)"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: must hold a dict of imlist, qimlist and gnd")
    return content


def _names(where: str, content: dict[str, Any], name: str) -> list[str]:
    names = content.get(name)
    if not isinstance(names, list) or not names or not all(isinstance(image, str) for image in names):
        raise ConfigError(f"{where}: {name} must be a list of names, at least one")
    return names


def _numbers(where: str, query: Any, kind: str, num: int) -> Sequence[int]:
    numbers = query.get(kind) if isinstance(query, dict) else None
    if not isinstance(numbers, list | tuple) or not all(type(number) is int for number in numbers):
        raise ConfigError(f"{where}: {kind} must be a list of numbers of images")
    for number in numbers:
        if not 0 <= number < num:
            raise ConfigError(f"{where}: {kind} holds {number}; must be >= 0 and < {num}, the images of imlist")
    return tuple(numbers)


def _box(where: str, query: dict[str, Any]) -> Box | None:
    box = query.get("bbx")
    if box is None:
        return None
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(isinstance(side, int | float) for side in box):
        raise ConfigError(f"{where}: bbx must be left, top, right and bottom")
    left, top, right, bottom = (float(side) for side in box)
    if not (left < right and top < bottom):
        raise ConfigError(f"{where}: bbx = {list(box)}: must have left < right and top < bottom")
    return left, top, right, bottom
