"""Sweeps as they are asked for: built-in ones by name, files that hold one, `--vary`. Imports neither ray nor torch."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dino_core.config import ConfigError
from orchestrator.catalog import load_recipe, recipes, sweep_module, sweep_names
from orchestrator.config_file import dotted, load_file
from orchestrator.overrides import config_keys, did_you_mean, show, takes_numbers, unknown_key
from orchestrator.space import SPELLING, parse_range
from orchestrator.sweep import CONTENTS, UNNAMED, WHOLE, Row, Sweep, setting_keys, with_settings


def load_sweep(name: str) -> Sweep:
    """A built-in sweep, a FILE.py that defines SWEEP, a FILE.yaml or FILE.json, or a recipe, which varies nothing yet.

    A file of settings holds `base` (a recipe), `space` (by key, lists of values or ranges such as `{low: 1, high: 2}`),
    `conditions`, `interactions` and `objectives` as in `Sweep`, `rows` (by name, each with any of `method`, `changes`
    and `paper`), settings of the sweep (`seeds: 3`) and changes for all trials (`pretrain.steps: 100`). A sweep comes
    before a recipe of the same name.

    Raises ConfigError naming what is wrong, and for an unknown name the nearest.
    """
    if name in sweep_names():
        return _named(_exposed(sweep_module(name), name), name)
    if name in recipes():
        return Sweep(base=name, name=name)
    path = Path(name)
    if path.suffix == ".py":
        return _named(_load_python(path), path.stem)
    if path.suffix in (".yaml", ".yml", ".json"):
        return _named(_load_settings(path), path.stem)
    known = [*sweep_names(), *recipes()]
    raise ConfigError(
        f"unknown sweep {name!r}{did_you_mean(name, known)}; there is {', '.join(sweep_names())}, "
        f"each of the recipes {', '.join(recipes())}, and any FILE.py or FILE.yaml"
    )


def _named(sweep: Sweep, name: str) -> Sweep:
    return dataclasses.replace(sweep, name=name) if sweep.name == UNNAMED else sweep


def _exposed(module: Any, where: str) -> Sweep:
    sweep = vars(module).get("SWEEP")
    if not isinstance(sweep, Sweep):
        raise ConfigError(f"{where}: must define SWEEP = Sweep(...) (orchestrator.sweep.Sweep)")
    return sweep


def _load_python(path: Path) -> Sweep:
    spec = importlib.util.spec_from_file_location(f"sweep_file_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"{path}, line {error.lineno}: {error.msg}") from None
    except ConfigError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename in (str(path), os.fspath(path.absolute())):
            raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        raise ConfigError(f"{path}, line {lines[-1] if lines else '?'}: {type(error).__name__}: {error}") from error
    return _exposed(module, str(path))


def _load_settings(path: Path) -> Sweep:
    flat = load_file(path, whole=("rows", *WHOLE))
    base = flat.pop("base", None)
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base = {show(base)}: must be the name of a recipe: {', '.join(recipes())}")
    load_recipe(base)
    if "space" in flat:
        raise ConfigError(f"{path}: space = {show(flat['space'])}: must hold a list of values under each key")
    space = _space({key.removeprefix("space."): flat.pop(key) for key in list(flat) if key.startswith("space.")})
    rows, problems = _rows(flat.pop("rows", {}))
    parts = {f"sweep.{name}": flat.pop(name) for name in WHOLE if name in flat}
    own = {f"sweep.{key}" if f"sweep.{key}" in setting_keys() else key: value for key, value in flat.items()}
    known = [*config_keys(), *setting_keys()]
    problems += [unknown_key(key, [*known, *CONTENTS]) for key in own if key not in known]
    if problems:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    return with_settings(Sweep(base=base, rows=rows, space=space), own | parts)


def _space(flat: dict[str, Any]) -> dict[str, Any]:
    """The space with its ranges, whose parts (`pretrain.optim.lr.low`) stand by themselves in a flat file."""
    space: dict[str, Any] = {}
    for name, value in flat.items():
        key, _, part = name.rpartition(".")
        if key in config_keys():
            space.setdefault(key, {})
            if isinstance(space[key], dict):
                space[key][part] = value
        else:
            space[name] = value
    return space


def _rows(given: Any) -> tuple[dict[str, Row], list[str]]:
    """The rows of a file of settings, and what is wrong with their form."""
    if not isinstance(given, dict):
        return {}, [f"rows = {show(given)}: must hold rows by name"]
    rows, problems = {}, []
    parts = [item.name for item in dataclasses.fields(Row)]
    for name, values in given.items():
        values = {} if values is None else values
        if not isinstance(values, dict):
            problems.append(f"rows.{name} = {show(values)}: must hold any of {', '.join(parts)}")
            continue
        problems += [f"rows.{name}.{unknown_key(key, parts)}" for key in values if key not in parts]
        if not isinstance(values.get("method"), str | None):
            problems.append(f"rows.{name}.method = {show(values['method'])}: must be the name of a method")
        problems += [
            f"rows.{name}.{part} = {show(values[part])}: must hold values by {what}"
            for part, what in (("changes", "dotted key"), ("paper", "metric"))
            if not isinstance(values.get(part, {}), dict)
        ]
        if not problems:
            try:
                changes = dotted(values.get("changes", {}))
            except ConfigError as error:
                problems.append(f"rows.{name}.changes: {error}")
                continue
            rows[name] = Row(method=values.get("method"), changes=changes, paper=values.get("paper", {}))
    return rows, problems


def parse_vary(items: Sequence[str]) -> dict[str, list[str] | dict[str, Any]]:
    """`key=v1,v2` or `key=low..high` arguments as a space.

    Commas inside brackets do not separate: `key=[0.4,1],[0.14,1]`. Ranges are written `low..high`, `low..high:log` or
    `low..high:step=N` and are those of keys that take numbers; `..` in a text, such as a path, is left alone.

    Raises ConfigError: no `=`, an empty value, brackets that do not match, a key given twice, a range that is not one
    or stands beside other values.
    """
    space: dict[str, list[str] | dict[str, Any]] = {}
    problems = []
    for item in items:
        key, equals, text = (part.strip() for part in item.partition("="))
        values = _split(text)
        if not equals or not key:
            problems.append(f"--vary {show(item)}: must be key=value,value,... or key=low..high")
        elif values is None:
            problems.append(f"--vary {show(item)}: the brackets do not match")
        elif not all(values):
            problems.append(f"--vary {show(item)}: has an empty value; must be key=value,value,...")
        elif key in space:
            problems.append(f"--vary {key}: given twice; put all its values into one --vary")
        elif ".." in text and key in config_keys() and takes_numbers(config_keys()[key]):
            found = parse_range(text)
            if found is None:
                problems.append(f"--vary {show(item)}: must be one range, {SPELLING}, or values with commas between")
            else:
                space[key] = found
        else:
            space[key] = values
    if problems:
        raise ConfigError("\n".join(problems))
    return space


def _split(text: str) -> list[str] | None:
    """The parts between top-level commas; None if brackets do not match."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "[(") - (char in "])")
        if depth < 0:
            return None
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return None if depth else [part.strip() for part in parts]
