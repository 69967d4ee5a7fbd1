"""Features on disk, so that the next suite or command need not take them again.

::

    <storage>/.features/<key>/00001024.safetensors     of the images from place 1,024 on, with a checksum
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)

CACHE_DIR = ".features"
_ROWS = "rows"

Part = tuple[Tensor, dict[int, str]]
"""Features of the readable images of a share; the places of the others in it, and why."""


class FeatureCache:
    """A folder of features of at most `limit_bytes`. Nothing that goes wrong here is an error: then there are none.

    Several processes can use it at once, for a file is there whole or not at all.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit_bytes = folder, limit_bytes

    def has(self, key: str, start: int) -> bool:
        return self._path(key, start).exists()

    def read(self, key: str, start: int) -> Part | None:
        """None if it is not there, or damaged."""
        path = self._path(key, start)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                rows: Tensor = file.get_tensor(_ROWS)
                known = json.loads(file.metadata()[_ROWS])
            if _checksum(rows) != known["checksum"]:
                raise ValueError("its content has changed")
            os.utime(path.parent)  # when it was last of use
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            logger.warning("features that were kept in %s are taken again: %s", path, error)
            return None
        return rows, {int(place): reason for place, reason in known["bad"].items()}

    def make_room(self, key: str, num_bytes: int) -> bool:
        """Whether features of this size may be written under `key`; those that were not used for longest go for it."""
        if num_bytes > self._limit_bytes:
            return False
        try:
            others = sorted(
                ((path.stat().st_mtime, path) for path in self._folder.glob("*/") if path.name != key), reverse=True
            )
            left = self._limit_bytes - num_bytes
            for _, path in others:
                left -= sum(file.stat().st_size for file in path.iterdir())
                if left < 0:
                    shutil.rmtree(path, ignore_errors=True)
        except OSError as error:
            logger.warning("features are not kept in %s: %s", self._folder, error)
            return False
        return True

    def write(self, key: str, start: int, part: Part) -> None:
        rows, bad = part
        path = self._path(key, start)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        known = {"checksum": _checksum(rows), "bad": bad}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({_ROWS: rows.contiguous()}, temporary, metadata={_ROWS: json.dumps(known)})
            temporary.replace(path)
        except (OSError, SafetensorError) as error:  # a full disk is one, too
            temporary.unlink(missing_ok=True)
            logger.warning("features are not kept in %s: %s", self._folder, error)

    def _path(self, key: str, start: int) -> Path:
        return self._folder / key / f"{start:08d}.safetensors"


def _checksum(rows: Tensor) -> str:
    content: NDArray[np.uint8] = rows.contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content.data).hexdigest()
