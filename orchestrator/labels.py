"""What the trials of a sweep are called, in folders and in messages."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

_MAX_LABEL = 80


def label(row: str, names: Mapping[str, str], varied: Mapping[str, Any]) -> str:
    """Row and varied values as a part of a file name. What it cannot spell is told apart by eight digits of a hash."""
    exact = "-".join(filter(None, [row, *(f"{names[key]}_{_text(value)}" for key, value in varied.items())]))
    found = re.sub(r"[^A-Za-z0-9._-]+", "-", exact)
    if found == exact and len(found) <= _MAX_LABEL:
        return found
    return f"{found[: _MAX_LABEL - 9].rstrip('-')}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "_".join(map(str, value))
    return "none" if value is None else str(value)


def in_trials(labels: Sequence[str], count: int) -> str:
    """Which trials a problem is about; nothing where it is all of them."""
    if len(labels) == count:
        return ""
    return f" ({few(list(dict.fromkeys(labels)))})"


def few(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
