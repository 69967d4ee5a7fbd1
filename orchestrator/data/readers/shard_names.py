"""Numbered sets of files: `train-00000-of-00012.parquet` is one of twelve."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from itertools import islice

from dino_core.config import ConfigError
from orchestrator.config import DataConfig
from orchestrator.data.patterns import is_pattern
from orchestrator.data.storage import is_url

_NUMBERED = re.compile(r"(?P<before>(?:.*/)?[^/]*?)(?P<number>\d{1,9})-of-(?P<total>\d{1,9})(?P<after>[^/]*)")
_OPTIONS = re.compile(r"\?[A-Za-z_][\w.-]*=.*")
_NAMED = 5


def check_complete(config: DataConfig, names: Collection[str]) -> None:
    """Whether of each numbered set all files are among `names`, unless `data.source` chooses them: by a pattern, or as
    one file.

    Numbers count from 0, or from 1 where the last is the total.

    Raises:
        ConfigError: Files are missing; names them.
    """
    last = os.path.basename(_OPTIONS.sub("", config.source) if is_url(config.source) else config.source)
    if is_pattern(last) or list(names) == [last]:
        return
    found: dict[tuple[str, str], dict[int, re.Match[str]]] = {}
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if match is not None:
            found.setdefault((match["before"], match["total"]), {})[int(match["number"])] = match
    missing: list[str] = []
    count = 0
    for (before, total), shards in found.items():
        first = 1 if int(total) in shards and 0 not in shards else 0
        expected = range(first, first + int(total))
        absent = (number for number in expected if number not in shards)
        count += len(expected) - sum(number in expected for number in shards)
        example = next(iter(shards.values()))
        width, after = len(example["number"]), os.path.splitext(example["after"])
        # What stands between the total and the suffix (a hash) is each file's own.
        ending = ("-*" if after[0] else "") + after[1] if after[1] else example["after"]
        missing += [f"{before}{number:0{width}}-of-{total}{ending}" for number in islice(absent, _NAMED)]
    if count:
        more = f" and {count - _NAMED} more" if count > _NAMED else ""
        suffix = os.path.splitext(next(iter(names)))[1]
        raise ConfigError(
            f"data.source = {config.source}: {', '.join(missing[:_NAMED])}{more} missing from numbered files; to use "
            f"what is there, name it by a pattern such as *{suffix}"
        )
