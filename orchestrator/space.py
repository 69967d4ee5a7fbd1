"""What a sweep varies: for each key a list of values or a range to draw from, and where it varies at all.

`Uniform`, `LogUniform` and `IntUniform` are the ranges; in a file of settings they are written
`{low: 1e-4, high: 1e-2, log: true}` and on the command line `--vary key=1e-4..1e-2:log`. Imports nothing heavy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.overrides import (
    Key,
    check_values,
    config_keys,
    did_you_mean,
    show,
    takes_fractions,
    takes_numbers,
    unknown_key,
)

_PARTS = ("low", "high", "log", "step")
_NUMBER = r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"\s*({_NUMBER})\.\.(?!\.)({_NUMBER})\s*(?::(.*))?", re.DOTALL)
SPELLING = "low..high, low..high:log or, of whole numbers, low..high:step=N"


@dataclass(frozen=True)
class Uniform:
    """Numbers from `low` to `high`, all equally likely; rounded to a thousandth of the range, for short names."""

    low: float
    high: float

    def at(self, share: float) -> float:
        """The number with this share (0 to 1) of the range below it."""
        return self.rounded(self.low + share * (self.high - self.low))

    def rounded(self, value: float) -> float:
        """A number of the range as it is tried."""
        decimals = 3 - math.floor(math.log10(self.high - self.low))
        return min(self.high, max(self.low, round(value, decimals)))

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}"


@dataclass(frozen=True)
class LogUniform:
    """Numbers from `low` > 0 to `high` whose logarithms are all equally likely; rounded to four digits."""

    low: float
    high: float

    def at(self, share: float) -> float:
        """The number with this share (0 to 1) of the range below it, on a logarithmic scale."""
        return self.rounded(math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low))))

    def rounded(self, value: float) -> float:
        """A number of the range as it is tried."""
        return min(self.high, max(self.low, float(f"{value:.4g}")))

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}:log"


@dataclass(frozen=True)
class IntUniform:
    """Whole numbers from `low` to `high`, both included: every `step`-th, or by their logarithms."""

    low: int
    high: int
    log: bool = False
    step: int = 1

    @property
    def size(self) -> int:
        """How many there are."""
        return (self.high - self.low) // self.step + 1

    def at(self, share: float) -> int:
        """The number with this share (0 to 1) of the range below it."""
        if self.log:  # each number has the stretch from half below to half above it
            low, high = math.log(self.low - 0.5), math.log(self.high + 0.5)
            return min(self.high, max(self.low, round(math.exp(low + share * (high - low)))))
        return self.low + self.step * min(self.size - 1, int(share * self.size))

    def __str__(self) -> str:
        return f"{self.low}..{self.high}" + (":log" if self.log else f":step={self.step}" if self.step > 1 else "")


Range = Uniform | LogUniform | IntUniform
Values = list[Any] | Range
"""What a key takes: choices, or a range."""


@dataclass(frozen=True)
class Space:
    """The varied keys after their check: typed, in the order given."""

    values: Mapping[str, Values] = field(default_factory=dict)
    conditions: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    """By varied key: the keys that decide whether it varies, each with the values for which it does."""
    order: tuple[str, ...] = ()
    """The varied keys, each behind those that decide about it."""

    def active(self, key: str, picked: Mapping[str, Any], fixed: Mapping[str, Any]) -> bool:
        """Whether `key` varies where these values are picked; `fixed` holds those of the keys that do not vary."""
        for decider, allowed in self.conditions.get(key, {}).items():
            known = picked if decider in self.values else fixed
            if decider not in known or known[decider] not in allowed:
                return False
        return True

    def pick(self, choose: Callable[[str, Values], Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
        """One configuration: `choose(key, values)` for each key that varies there, deciding keys first."""
        picked: dict[str, Any] = {}
        for key in self.order:
            if self.active(key, picked, fixed):
                picked[key] = choose(key, self.values[key])
        return self._sorted(picked)

    def grid(self, fixed: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Every combination of the listed values once; the last key changes fastest."""

        def below(picked: dict[str, Any], rest: tuple[str, ...]) -> Iterator[dict[str, Any]]:
            if not rest:
                yield self._sorted(picked)
                return
            key, *later = rest
            values = self.values[key]
            assert isinstance(values, list)
            if self.active(key, picked, fixed):
                for value in values:
                    yield from below({**picked, key: value}, tuple(later))
            else:
                yield from below(picked, tuple(later))

        return below({}, self.order)

    def _sorted(self, picked: Mapping[str, Any]) -> dict[str, Any]:
        return {key: picked[key] for key in self.values if key in picked}


def to_json(values: Any) -> Any:
    """Values as they stand in a sweep's definition on disk, and in a file of settings."""
    if isinstance(values, IntUniform):
        scale = {"log": True} if values.log else {}
        return {"low": values.low, "high": values.high, **scale, **({"step": values.step} if values.step > 1 else {})}
    if isinstance(values, Uniform | LogUniform):
        return {"low": values.low, "high": values.high} | ({"log": True} if isinstance(values, LogUniform) else {})
    return dict(values) if isinstance(values, Mapping) else list(values)


def in_words(values: Values) -> str:
    """Values for a message or table."""
    return ", ".join(map(show, values)) if isinstance(values, list) else str(values)


def parse_range(text: str) -> dict[str, Any] | None:
    """`low..high`, `low..high:log` or `low..high:step=N` as a mapping; None if the text is none of these."""
    found = _RANGE.fullmatch(text)
    if not found:
        return None
    low, high, option = found.groups()
    parts: dict[str, Any] = {"low": low, "high": high}
    if option is not None:
        name, equals, value = (part.strip() for part in option.partition("="))
        if name == "log" and not equals:
            parts["log"] = True
        elif name == "step" and value:
            parts["step"] = value
        else:
            return None
    return parts


def check_space(
    given: Mapping[str, Any], conditions: Mapping[str, Mapping[str, Any]], fixed_keys: Mapping[str, str]
) -> tuple[Space, list[str]]:
    """The space with its types, and a line for each thing that is wrong with it.

    Args:
        given: By dotted key: a list of values, a range, or a mapping that says a range.
        conditions: By dotted key: as `Space.conditions`.
        fixed_keys: Beginnings of the keys that cannot vary, each with the reason.
    """
    known = config_keys()
    values: dict[str, Values] = {}
    problems: list[str] = []
    for key, choice in given.items():
        reason = next((why for start, why in fixed_keys.items() if key.startswith(start)), None)
        if key not in known:
            problems.append(unknown_key(key, known))
        elif isinstance(choice, Range | Mapping):
            checked, lines = _check_range(key, known[key], choice)
            problems += lines or ([f"{key}: {reason}"] if reason else [])
            if checked is not None:
                values[key] = checked
        elif isinstance(choice, str) or not isinstance(choice, Sequence) or not choice:
            problems.append(f"{key} = {show(choice)}: must be a list of values to vary, such as [1, 2]")
        elif reason:
            problems.append(f"{key}: {reason}")
        else:
            values[key], lines = _check_list(known, key, choice)
            problems += lines
    typed, lines = _check_conditions(values, given, conditions)
    order, more = _order(values, typed)
    return Space(values, typed, order), problems + lines + more


def _check_list(known: Mapping[str, Key], key: str, choices: Sequence[Any]) -> tuple[list[Any], list[str]]:
    found: list[Any] = []
    problems = []
    for choice in choices:
        typed, lines = check_values(known, {key: choice})
        problems += lines
        if key in typed and typed[key] in found:
            problems.append(f"{key} = {show(choice)}: given twice among the values to vary")
        found += typed.values()
    return found, problems


def _check_range(key: str, spec: Key, given: Range | Mapping[str, Any]) -> tuple[Range | None, list[str]]:
    """The range with its types: its ends are values of the key, and a key of whole numbers has a range of them."""
    parts = to_json(given)
    shown = str(given) if isinstance(given, Range) else show(given)
    whole = not takes_fractions(spec)
    if not takes_numbers(spec):
        return None, [f"{key} = {shown}: must be a list of values, it is not a number that could be drawn from a range"]
    problems = [f"{key}.{unknown_key(part, _PARTS)}" for part in parts if part not in _PARTS]
    problems += [f"{key} = {shown}: has no {part}; a range is low and high" for part in _PARTS[:2] if part not in parts]
    if not isinstance(parts.get("log", False), bool):
        problems.append(f"{key}.log = {show(parts['log'])}: must be true or false")
    if problems:
        return None, problems
    ends = {}
    for part in ("low", "high"):
        typed, lines = check_values({key: spec}, {key: parts[part]})
        problems += lines
        if key in typed:
            ends[part] = typed[key]
            if typed[key] is None:
                problems.append(f"{key} = {shown}: the {part} end must be a number")
    if isinstance(given, Uniform | LogUniform) and whole:
        problems.append(f"{key} = {shown}: must be a range of whole numbers, IntUniform(low, high)")
    if problems:
        return None, problems
    low, high, log = ends["low"], ends["high"], parts.get("log", False)
    step, problems = _check_step(key, parts.get("step", 1), low, high, log, whole or isinstance(given, IntUniform))
    if not low < high:
        problems.append(f"{key} = {shown}: the low end must be less than the high one")
    elif log and low <= 0:
        problems.append(f"{key} = {shown}: must begin above 0 on a logarithmic scale")
    if problems:
        return None, problems
    if whole or isinstance(given, IntUniform):
        return IntUniform(int(low), int(high), log, step), []
    return (LogUniform if log else Uniform)(float(low), float(high)), []


def _check_step(key: str, step: Any, low: float, high: float, log: bool, whole: bool) -> tuple[int, list[str]]:
    try:
        number = int(step)
    except (TypeError, ValueError):
        number = 0
    if isinstance(step, bool) or number < 1 or number != float(step):
        return 1, [f"{key}.step = {show(step)}: must be a whole number >= 1"]
    if number > 1 and not whole:
        return 1, [f"{key}.step = {number}: is for whole numbers only"]
    if number > 1 and log:
        return 1, [f"{key}.step = {number}: does not go with log"]
    if whole and (high - low) % number:
        return 1, [f"{key}.step = {number}: must divide the distance from {low:g} to {high:g}"]
    return number, []


def _check_conditions(
    values: Mapping[str, Values], given: Mapping[str, Any], conditions: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, dict[str, list[Any]]], list[str]]:
    known = config_keys()
    typed: dict[str, dict[str, list[Any]]] = {}
    problems = []
    for key, deciders in conditions.items():
        where = f"sweep.conditions.{key}"
        if key not in given:
            problems.append(f"{where}: does not vary{did_you_mean(key, given)}")
            continue
        if not isinstance(deciders, Mapping) or not deciders:
            problems.append(f"{where} = {show(deciders)}: must hold lists of values by the key that decides")
            continue
        typed[key] = {}
        for decider, allowed in deciders.items():
            if decider not in known:
                problems.append(f"{where}: {unknown_key(decider, known)}")
                continue
            choices = [allowed] if isinstance(allowed, str) or not isinstance(allowed, Sequence) else allowed
            typed[key][decider], lines = _check_list(known, decider, choices)
            lines = [line.replace("among the values to vary", "among the values of a condition") for line in lines]
            if not lines and decider in values:
                lines = [
                    f"{decider} = {show(choice)}: is none of its values, {in_words(values[decider])}"
                    for choice in typed[key][decider]
                    if not _can_be(values[decider], choice)
                ]
            problems += [f"{where}: {line}" for line in lines]
    return typed, problems


def _can_be(values: Values, choice: Any) -> bool:
    if isinstance(values, list):
        return choice in values
    if isinstance(values, IntUniform):
        return values.low <= choice <= values.high and (choice - values.low) % values.step == 0
    return False  # a number out of a continuous range is never hit


def _order(
    values: Mapping[str, Values], conditions: Mapping[str, Mapping[str, Any]]
) -> tuple[tuple[str, ...], list[str]]:
    """The keys in the order given, but for those that others decide about."""
    order: list[str] = []
    left = list(values)
    while left:
        ready = next((k for k in left if not any(d in left for d in conditions.get(k, {}))), None)
        if ready is None:
            return tuple(values), [f"sweep.conditions: {', '.join(left)} decide about one another in a circle"]
        order.append(ready)
        left.remove(ready)
    return tuple(order), []
