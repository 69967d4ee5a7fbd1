"""What all parts of a configuration share: fields with ranges, and errors that name the dotted key. No torch here."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import field
from typing import Any, ClassVar


class ConfigError(ValueError):
    """A configuration that cannot run. The message holds one line per problem, each opening with the dotted key."""


def number(default: Any, *, gt: float | None = None, ge: float | None = None, le: float | None = None) -> Any:
    """A field whose value (or each element of a tuple value) must lie in the given range; None is left alone."""
    limits = {name: limit for name, limit in (("gt", gt), ("ge", ge), ("le", le)) if limit is not None}
    return field(default=default, metadata=limits)


_SYMBOLS = {"gt": ">", "ge": ">=", "le": "<="}


def allowed_range(item: dataclasses.Field[Any]) -> str:
    """The range of a field in words, such as `> 0 and <= 1`; empty where it has none."""
    return " and ".join(f"{_SYMBOLS[name]} {limit}" for name, limit in item.metadata.items() if name in _SYMBOLS)


def in_range(item: dataclasses.Field[Any], value: Any) -> bool:
    """Whether a value (each element of a tuple; None always) lies in the field's range."""
    limits = {name: limit for name, limit in item.metadata.items() if name in _SYMBOLS}
    values = value if isinstance(value, tuple) else (value,)
    return not limits or all(_in_range(v, limits) for v in values if v is not None)


def _in_range(value: float, limits: dict[str, float]) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return not (
        ("gt" in limits and value <= limits["gt"])
        or ("ge" in limits and value < limits["ge"])
        or ("le" in limits and value > limits["le"])
    )


class CheckedConfig:
    """Range checks shared by all parts: each field against the limits in its metadata, then `_problems`."""

    path: ClassVar[str] = ""
    """The dotted prefix of this part's keys, for error messages."""

    def __post_init__(self) -> None:
        problems = []
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if not in_range(item, value):
                problems.append(f"{self.path}.{item.name} = {value}: must be {allowed_range(item)}")
        problems += [f"{self.path}.{problem}" for problem in self._problems()] if not problems else []
        if problems:
            raise ConfigError("\n".join(problems))

    def _problems(self) -> list[str]:
        """What is wrong between fields, each line opening with a field's name. Called when every field is in range."""
        return []
