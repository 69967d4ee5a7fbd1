"""Changes of a configuration under its dotted keys: `override` is the inverse of `flatten`.

A key such as `pretrain.optim.lr` is the same on the command line, in a file, in a sweep's space, in MLflow and in an
error message. Every function here raises `ConfigError` with one line per problem, each opening with the dotted key,
and reports all problems at once. Nothing heavier than pydantic is imported, and that only when a value is checked.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dino_core.config import ConfigError, allowed_range, in_range
from orchestrator.config import RunConfig

ALTERNATIVES = ("pretrain.steps", "pretrain.epochs")
"""Two names of one choice: setting one of them clears the other."""

_NONE = frozenset({"none", "null"})
_SHOWN = 80
_TOO_LARGE = 2**63
C = TypeVar("C")


@dataclass(frozen=True)
class Key:
    """What a dotted key accepts."""

    kind: Any
    """The type of its values, such as `float | None`."""
    item: dataclasses.Field[Any]

    @property
    def is_needed(self) -> bool:
        """Whether there is no default."""
        return self.item.default is dataclasses.MISSING and self.item.default_factory is dataclasses.MISSING

    @property
    def allowed(self) -> str:
        """What a value must be, in words, such as `a number > 0`."""
        limits = allowed_range(self.item)
        words, *rest = _describe(self.kind)
        each = ", each " if words.endswith(("]", "commas", "them")) else " "
        return words + (each + limits if limits else "") + "".join(f", or {word}" for word in rest)


@functools.cache
def config_keys(root: type = RunConfig, prefix: str = "") -> dict[str, Key]:
    """Every dotted key below a configuration class, in the order of its fields."""
    hints = get_type_hints(root)
    keys: dict[str, Key] = {}
    for item in dataclasses.fields(root):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            keys |= config_keys(kind, f"{prefix}{item.name}.")  # type: ignore[arg-type]
        else:
            keys[prefix + item.name] = Key(kind, item)
    return keys


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every value of a configuration under its dotted key, in the order of the fields."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{item.name}.")
        elif isinstance(value, tuple) and (not value or dataclasses.is_dataclass(value[0])) and _listed(item):
            flat[prefix + item.name] = [_of_element(element) for element in value]
        else:
            flat[prefix + item.name] = value
    return flat


def _listed(item: dataclasses.Field[Any]) -> bool:
    """Whether a field is a list of groups of settings, `tuple[StageConfig, ...]`; its type is text here."""
    return item.metadata.get("listed", False)


def _of_element(element: Any) -> dict[str, Any]:
    """What one group of a list sets, as JSON can hold it."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in flatten(element).items()}
    return {key: value for key, value in plain.items() if value is not None}


def override(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """A copy of `config` with the values under some dotted keys replaced.

    A value may be typed or text: "1e-4", "none" for None, "[0.4, 1.0]" or "0.4,1.0" for a pair. Setting one of
    `pretrain.steps` and `pretrain.epochs` clears the other.

    Raises ConfigError: unknown keys, values of the wrong type or out of range, values that do not go together.
    """
    typed, problems = check_values(config_keys(), changes)
    lost = set(changes) - set(typed)
    result = _rebuild(config, merge_changes(flatten(config), typed) if typed else {}, "", problems, lost)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return result


def merge_changes(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Changes made one after the other, as one: later values win, a later length of the run clears an earlier one."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for one, other in (ALTERNATIVES, ALTERNATIVES[::-1]):
            if not _is_none(layer.get(one)) and other not in layer and other in merged:
                merged[other] = None
        merged |= layer
    return merged


def check_values(keys: Mapping[str, Key], changes: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The changes with typed values, as far as each is right by itself, and a line for each that is not."""
    typed, problems = {}, []
    for key, value in changes.items():
        if key not in keys:
            problems.append(unknown_key(key, keys))
            continue
        if _listed(keys[key].item):
            elements, lines = _check_list(key, keys[key], value)
            problems += lines
            if not lines:
                typed[key] = [_of_element(element) for element in elements]
            continue
        try:
            result = _coerce(keys[key].kind, value)
        except ValueError:
            problems.append(f"{key} = {show(value)}: must be {keys[key].allowed}{_nearest_choice(keys[key], value)}")
            continue
        if in_range(keys[key].item, result):
            typed[key] = result
        else:
            problems.append(f"{key} = {show(value)}: must be {keys[key].allowed}")
    return typed, problems


def _check_list(name: str, key: Key, value: Any) -> tuple[tuple[Any, ...], list[str]]:
    """A list of groups of settings, from groups, mappings with nested or dotted keys, or text in YAML."""
    from orchestrator.config_file import dotted, parse_yaml  # imports yaml, which few values need

    kind = get_args(key.kind)[0]
    wrong = f"{name} = {show(value)}: must be {key.allowed}"
    try:
        value = parse_yaml(value) if isinstance(value, str) and not _is_none(value) else value
    except ConfigError:
        return (), [wrong]
    value = [] if _is_none(value) else value
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, (Mapping, kind)) for item in value):
        return (), [wrong]
    elements, problems = [], []
    for place, item in enumerate(value):
        where = f"{name}[{place}]."
        try:
            given = _of_element(item) if isinstance(item, kind) else dotted(item)
        except ConfigError as error:
            problems.append(where + str(error))
            continue
        keys = config_keys(kind, where)
        typed, lines = check_values(keys, {where + inner: element for inner, element in given.items()})
        missing = [key for key, known in keys.items() if known.is_needed and key not in typed]
        lines += [f"{key}: is missing, must be {keys[key].allowed}" for key in missing if not lines]
        problems += lines
        if not lines:
            elements.append(_build(kind, typed, where))
    return tuple(elements), problems


def _build(kind: Any, values: Mapping[str, Any], prefix: str) -> Any:
    """A configuration class from the values below a prefix, each of which was checked."""
    hints, arguments = get_type_hints(kind), {}
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[item.name]):
            arguments[item.name] = _build(hints[item.name], values, f"{prefix}{item.name}.")
        elif prefix + item.name in values:
            arguments[item.name] = values[prefix + item.name]
    return kind(**arguments)


def takes_numbers(key: Key) -> bool:
    """Whether the values of a key are single numbers."""
    return bool({int, float} & set(_members(key.kind)))


def takes_fractions(key: Key) -> bool:
    """Whether they need not be whole numbers."""
    return float in _members(key.kind)


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The line for a key that does not exist: the nearest ones, or what there is in its group."""
    known = list(known)
    if any(name.startswith(f"{key}.") for name in known):
        return f"{key}: is a group of settings, set one of {_inside(key, known)}"
    near = did_you_mean(key, known)
    group = key.rpartition(".")[0]
    while group and not any(name.startswith(f"{group}.") for name in known):
        group = group.rpartition(".")[0]
    return f"{key}: unknown key{near or f'; there is {_inside(group, known)}'}"


def _inside(group: str, known: Iterable[str]) -> str:
    """The keys directly in a group (all of them: the empty group), and `name.*` for each group in it."""
    start = f"{group}." if group else ""
    parts = [(start, name.removeprefix(start).partition(".")) for name in known if name.startswith(start)]
    return ", ".join(dict.fromkeys(start + first + (".*" if dot else "") for start, (first, dot, _) in parts))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean x or y?` with the nearest names, or nothing. Of dotted names the last part counts most."""
    group, _, last = word.casefold().rpartition(".")
    scores = {}
    for name in known:
        its_group, _, its_last = name.casefold().rpartition(".")
        alike = 0.65 if len(last) > 2 and its_last.startswith(last) else 0.0
        alike = max(alike, _likeness(last, its_last))
        whole = _likeness(word.casefold().replace(".", "_"), name.casefold().replace(".", "_"))
        if alike >= 0.6 or whole >= 0.9:
            scores[name] = max(alike + 0.5 * _likeness(group, its_group), 2.0 * (whole == 1), 1.5 * whole)
    near = sorted((name for name in scores if scores[name] > max(scores.values()) - 0.25), key=lambda n: -scores[n])[:3]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def show(value: Any) -> str:
    """A value for a message: text as it was typed where that is readable, cut short where it is long."""
    text = value if isinstance(value, str) and value.isprintable() and value.strip() else repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def parse_assignments(items: Sequence[str]) -> dict[str, str]:
    """`key=value` arguments as changes for `override`. Raises ConfigError: no `=`, a key given twice."""
    changes: dict[str, str] = {}
    problems = []
    for item in items:
        key, equals, value = item.partition("=")
        key = key.strip()
        if not equals or not key:
            problems.append(f"{show(item)}: settings are given as key=value")
        elif key in changes:
            problems.append(f"{key}: given twice, as {show(changes[key])} and {show(value)}")
        else:
            changes[key] = value
    if problems:
        raise ConfigError("\n".join(problems))
    return changes


def complete_keys(start: str, keys: Mapping[str, Key] | None = None) -> list[tuple[str, str]]:
    """Dotted keys that begin with `start`, each with what it accepts: the data of the shell completion."""
    known = config_keys() if keys is None else keys
    return [(key, known[key].allowed) for key in known if key.startswith(start)]


def _rebuild(part: C, values: Mapping[str, Any], prefix: str, problems: list[str], lost: set[str]) -> C:
    """`part` with its changed fields, built from the leaves up so that every part's own checks run.

    A part that cannot be built stays as it was and its changes are added to `lost`; what its parents then say about
    those keys is left out, since it would be about values that nobody asked for.
    """
    changed = {}
    for item in dataclasses.fields(part):  # type: ignore[arg-type]
        key, old = prefix + item.name, getattr(part, item.name)
        new: Any
        if dataclasses.is_dataclass(old):
            new = _rebuild(old, values, f"{key}.", problems, lost)
        elif _listed(item) and key in values:
            elements, _ = _check_list(key, config_keys()[key], values[key])
            new = old if elements == old else elements
        else:
            new = values.get(key, old)
        if new is not old:
            changed[item.name] = new
    if not changed:
        return part
    try:
        return dataclasses.replace(part, **changed)  # type: ignore[type-var]
    except ConfigError as error:
        names = {key.rpartition(".")[2] for key in lost}
        problems += [line for line in str(error).splitlines() if not names & set(re.findall(r"\w+", line))]
        lost |= {key for key in values if key.startswith(prefix)}
        return part


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip().casefold() in _NONE)


def _members(kind: Any) -> tuple[Any, ...]:
    """The types that a union allows, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _describe(kind: Any) -> list[str]:
    """What a type allows, in words; the last word is `none` where None is allowed."""
    words = []
    for member in _members(kind):
        if get_origin(member) is Literal:
            words.append("one of " + ", ".join(map(str, get_args(member))))
        elif get_origin(member) is tuple:
            kinds = get_args(member)
            if dataclasses.is_dataclass(kinds[0]):
                words.append(f"a list with the settings of each stage, such as {_EXAMPLE}")
                continue
            if kinds[-1] is ...:
                words.append(_several(kinds[0]))
                continue
            count = len(kinds)
            words.append(f"{count} numbers such as [{', '.join(f'{0.1 * (i + 1):.1f}' for i in range(count))}]")
        elif member is not type(None):
            words.append(_WORDS[member])
    return words + ["none"] * (type(None) in _members(kind))


def _several(kind: Any) -> str:
    """What values of a tuple of any length are, in words."""
    if get_origin(kind) is Literal:
        return f"one or more of {', '.join(map(str, get_args(kind)))}, with commas"
    return {int: "whole numbers", float: "numbers"}.get(kind, "names") + " with commas between them"


_EXAMPLE = "[{steps: 10000, crops.global_size: 448}]"
_WORDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@functools.cache
def _adapter(kind: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter  # half the start-up time of the command line, so only when needed

    return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))


def _coerce(kind: Any, value: Any) -> Any:
    """`value` as the type `kind`. Raises ValueError."""
    members = _members(kind)
    if type(None) in members and _is_none(value):
        return None
    if isinstance(value, bool) and bool not in members:
        raise ValueError("a truth value is not a number")
    if isinstance(value, str) and get_origin(members[0]) is tuple:
        value = value.strip()
        if value[:1] + value[-1:] in ("[]", "()"):
            value = value[1:-1]
        value = [element.strip() for element in value.split(",")]
    if isinstance(value, (list, tuple)) and any(isinstance(element, bool) for element in value):
        raise ValueError("a truth value is not a number")
    result = _adapter(kind).validate_python(value)  # pydantic's ValidationError is a ValueError
    if isinstance(result, int) and abs(result) >= _TOO_LARGE:
        raise ValueError("larger than anything that can be counted")
    return result


def _nearest_choice(key: Key, value: Any) -> str:
    choices = [str(c) for member in _members(key.kind) if get_origin(member) is Literal for c in get_args(member)]
    return did_you_mean(value, choices) if isinstance(value, str) else ""
