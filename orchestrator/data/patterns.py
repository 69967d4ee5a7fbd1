"""File names by pattern: `*`, `?`, `[...]`, and the braces `{000..146}` and `{a,b}`."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import math
import re
from collections.abc import Collection

_MAX_EXPANSIONS = 100_000
_MAX_COMPARED = 10_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_CHOICE = re.compile(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}")
_WILD = re.compile(r"[*?\[]")


def is_pattern(name: str) -> bool:
    """Whether a file name stands for several."""
    return _WILD.search(name) is not None or _CHOICE.search(name) is not None


def expand_braces(pattern: str) -> list[str]:
    """The patterns without braces that one with braces stands for, in order.

    `{000..146}` counts, at the width of its first number if that begins with 0; `{a,b}` is either. Braces of any other
    kind are themselves.

    Raises:
        ValueError: More than 100,000 of them.
    """
    parts: list[list[str]] = []
    end = 0
    for found in _BRACES.finditer(pattern):
        alternatives = _alternatives(found[1])
        if alternatives:
            parts += [[pattern[end : found.start()]], alternatives]
            end = found.end()
    parts.append([pattern[end:]])
    number = math.prod(map(len, parts))
    if number > _MAX_EXPANSIONS:
        raise ValueError(f"{pattern} stands for {number:,} names; at most {_MAX_EXPANSIONS:,} can be given by braces")
    return ["".join(choice) for choice in itertools.product(*parts)]


def _alternatives(inside: str) -> list[str]:
    counted = _RANGE.fullmatch(inside)
    if counted is None:
        return inside.split(",") if "," in inside else []
    first, last = int(counted[1]), int(counted[2])
    if abs(last - first) >= _MAX_EXPANSIONS:
        raise ValueError(f"{{{inside}}} stands for more than {_MAX_EXPANSIONS:,} names")
    width = len(counted[1]) if counted[1].startswith("0") else 0
    numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
    return [str(number).zfill(width) for number in numbers]


def select(pattern: str, names: Collection[str]) -> list[str]:
    """Those of the `names` that `pattern` stands for, in the order of `names`.

    Raises:
        ValueError: One of the alternatives that the braces spell out matches none: a shard that is missing. Says how
            many files there are and which is nearest.
    """
    known, chosen = set(names), set[str]()
    for alternative in expand_braces(pattern):
        if _WILD.search(alternative):
            found = set(filter(re.compile(fnmatch.translate(alternative)).match, names))
        else:
            found = {alternative} & known
        if not found:
            raise ValueError(_nothing(alternative, names))
        chosen |= found
    return [name for name in names if name in chosen]


def _nothing(pattern: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(pattern, itertools.islice(names, _MAX_COMPARED), n=1, cutoff=0.4)
    hint = f"; the nearest is {near[0]}" if near else ""
    return f"no file is called {pattern}; there are {len(names)} files{hint}"
