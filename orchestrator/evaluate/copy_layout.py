"""The layout of the suite `copy_detection`.

::

    database/*.jpg      images that may have been copied, and others
    queries/*.jpg       changed copies, and others
    groundtruth.csv     a row for each query and original: query, positive, attack

Paths are relative to the folder. A query of several originals has several rows; one that is no copy has a row with an
empty `positive`.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

from dino_core.config import ConfigError
from orchestrator.data.storage import Place
from orchestrator.evaluate.image_files import check_names, find_layout, is_image
from orchestrator.overrides import did_you_mean

TRUTH_FILE = "groundtruth.csv"
COLUMNS = ("query", "positive", "attack")
_DATABASE = "database/"
_WHAT = f"{_DATABASE}, queries/ and {TRUTH_FILE}"
_NAME = re.compile(r"[\w][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class CopyLayout:
    """What lies in the folder."""

    place: Place
    database: tuple[str, ...]
    """Files, sorted."""
    queries: tuple[str, ...]
    """Files, in the order of the table."""
    positives: tuple[tuple[int, ...], ...]
    """Of each query, numbers in `database`."""
    attacks: tuple[str, ...]
    """Of each query."""
    num_unused: int
    """Images beside the database that the table does not name."""


def read_copy_layout(key: str, address: str | None) -> CopyLayout:
    """The layout at `address`, a path or URL.

    Raises:
        ConfigError: It is another layout, the table is not as above, or names images that are not there.
    """
    place = find_layout(key, address, (_DATABASE, TRUTH_FILE), _WHAT)
    assert address is not None
    database = tuple(name for name in place.files if name.startswith(_DATABASE) and is_image(name))
    if not database:
        raise ConfigError(f"{key} = {address}: no images in {_DATABASE}")
    rows = list(_rows(key, address, place))
    if not rows:
        raise ConfigError(f"{key} = {address}: {TRUTH_FILE}: has no rows")
    check_names(key, address, ((query, f"query of line {line}") for line, query, _, _ in rows), place.files)
    number = {name: index for index, name in enumerate(database)}
    positives: dict[str, list[int]] = {}
    attacks: dict[str, str] = {}
    check_names(key, address, ((name, f"positive of line {line}") for line, _, name, _ in rows if name), number)
    for line, query, positive, attack in rows:
        if attacks.setdefault(query, attack) != attack:
            raise ConfigError(
                f"{key} = {address}: {TRUTH_FILE}, line {line}: {query} has the attack {attack}, and "
                f"{attacks[query]} above; must be one"
            )
        known = positives.setdefault(query, [])
        if positive and number[positive] not in known:
            known.append(number[positive])
    if not any(positives.values()):
        raise ConfigError(f"{key} = {address}: {TRUTH_FILE}: no query has a positive")
    named = positives.keys() | number.keys()
    unused = sum(is_image(name) and name not in named for name in place.files)
    return CopyLayout(
        place, database, tuple(positives), tuple(map(tuple, positives.values())), tuple(attacks.values()), unused
    )


def _rows(key: str, address: str, place: Place) -> Iterator[tuple[int, str, str, str]]:
    """Line, query, positive and attack of each row."""

    def wrong(line: int, problem: str) -> ConfigError:
        return ConfigError(f"{key} = {address}: {TRUTH_FILE}, line {line}: {problem}")

    try:
        text = place.folder.read(TRUTH_FILE).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise wrong(1, f"cannot be read: {error}") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = reader.fieldnames or []
        for column in COLUMNS:
            if column not in header:
                near = did_you_mean(column, header)
                raise wrong(1, f"has no column {column}; must have {', '.join(COLUMNS)}{near}")
        for row in reader:
            query, positive, attack = ((row[column] or "").strip() for column in COLUMNS)
            if not query:
                raise wrong(reader.line_num, "has no query")
            if not _NAME.fullmatch(attack):
                raise wrong(reader.line_num, f"attack = {attack!r}: must be of letters, digits, _, - and .")
            yield reader.line_num, query, positive, attack
    except csv.Error as error:
        raise wrong(reader.line_num, str(error)) from error
