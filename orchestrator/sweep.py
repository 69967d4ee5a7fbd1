"""What a sweep is: a grid of changes of one configuration, times seeds. Imports neither ray nor torch.

`SWEEP = Sweep(base="quickstart", space={"pretrain.teacher.temp": [0.04, 0.07]})` in a Python file is a complete sweep.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import itertools
import math
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from dino_core.config import CheckedConfig, ConfigError, number
from orchestrator.catalog import load_recipe, recipes, sweep_module, sweep_names
from orchestrator.config import RunConfig
from orchestrator.config_file import load_file
from orchestrator.overrides import (
    ALTERNATIVES,
    Key,
    check_values,
    config_keys,
    did_you_mean,
    merge_changes,
    override,
    show,
    unknown_key,
)
from orchestrator.preflight import model_problems
from orchestrator.runs import check_name

METRICS = (
    "eval/knn_top1",
    *(f"train/{name}" for name in ("loss", "teacher_entropy", "kl", "grad_norm", "feature_std", "images_per_s")),
    *(f"train/{name}" for name in ("lr", "weight_decay", "teacher_momentum", "teacher_temp", "epoch")),
    "train/data_wait_share",
)
"""What a run logs, and so what trials can be compared by."""

MAX_TRIALS = 10_000
SEED = "pretrain.seed"
UNNAMED = "sweep"

_SHARED = ("cluster.", "tracking.")
"""What all trials of a sweep have in common. It changes no number, so there would be nothing to compare."""
_MAX_LABEL = 80


@dataclass(frozen=True, kw_only=True)
class Sweep(CheckedConfig):
    """Every combination of the values in `space`, each with `seeds` seeds."""

    path: ClassVar[str] = "sweep"

    base: RunConfig | str
    """What all trials start from: a configuration, or a recipe's name."""
    space: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """The values that each varied dotted key takes."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Changes of `base` for all trials, by dotted key. They are checked together with those of each trial."""
    name: str = UNNAMED
    """Name of the sweep and, where `tracking.experiment` is none, of its MLflow experiment."""
    seeds: int = number(1, ge=1)
    """Trials of each combination: with the seeds of `base`, that + 1, and so on; the same for all combinations."""
    metric: str = "eval/knn_top1"
    """What trials are compared by."""
    mode: Literal["max", "min"] = "max"
    """Whether a larger or a smaller metric is better."""
    scheduler: Literal["none", "asha"] = "none"
    """`none` runs every trial to its end; `asha` stops those that fall behind early (arXiv 1810.05934)."""
    grace_steps: int | None = number(None, ge=1)
    """asha: steps that every trial gets before it can be stopped."""
    reduction_factor: int = number(4, ge=2)
    """asha: one trial in this many goes on, at grace_steps, at grace_steps x reduction_factor, and so on."""

    @property
    def recipe(self) -> str:
        """Name of the recipe it starts from; `custom` for a configuration of its own."""
        return self.base if isinstance(self.base, str) else "custom"

    def _problems(self) -> list[str]:
        problems = []
        try:
            check_name(self.name)
        except ConfigError as error:
            problems.append(str(error))
        if self.metric not in METRICS:
            hint = did_you_mean(self.metric, METRICS)
            problems.append(f"metric = {self.metric}: no run logs it{hint}; must be one of {', '.join(METRICS)}")
        if self.scheduler == "asha" and self.grace_steps is None:
            problems.append(
                "grace_steps = None: must be a whole number >= 1 when sweep.scheduler = asha, "
                "the steps that every trial gets before it can be stopped"
            )
        return problems


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    trial_id: str
    """The same for the same values and seed; letters, digits, '.', '_' and '-' only."""
    changes: dict[str, Any]
    """The varied keys and their values, without the seed."""
    seed: int
    config: RunConfig


def setting_keys() -> dict[str, Key]:
    """The sweep's own settings by dotted key (`sweep.seeds`, ...)."""
    contents = ("sweep.base", "sweep.space", "sweep.changes")
    return {key: found for key, found in config_keys(Sweep, "sweep.").items() if key not in contents}


def expand(sweep: Sweep) -> list[Trial]:
    """All trials: every combination with the first seed, then with the second, and so on.

    Raises ConfigError with all problems of all trials: unknown keys, wrong values, settings that do not go together,
    more than `MAX_TRIALS` trials.
    """
    base = load_recipe(sweep.base) if isinstance(sweep.base, str) else sweep.base
    shared, problems = check_values(config_keys(), sweep.changes)
    space, more = _check_space(sweep)
    problems += more
    count = math.prod(len(values) for values in space.values()) * sweep.seeds
    if not problems and count > MAX_TRIALS:
        problems.append(f"sweep.space: makes {count} trials; must be at most {MAX_TRIALS}")
    if problems:
        raise ConfigError("\n".join(problems))
    names = short_names(list(space))
    wrong: dict[str, list[str]] = {}
    trials = []
    for offset, values in itertools.product(range(sweep.seeds), itertools.product(*space.values())):
        changes = dict(zip(space, values, strict=True))
        label = _label(names, changes)
        try:
            config = override(base, merge_changes(shared, changes))
            config = override(config, {SEED: config.pretrain.seed + offset})
            _check_trial(sweep, config)
        except ConfigError as error:
            for line in str(error).splitlines():
                wrong.setdefault(line, []).append(label)
            continue
        seed = config.pretrain.seed
        trials.append(Trial("-".join(filter(None, [label, f"s{seed}"])), changes, seed, config))
    if wrong:
        raise ConfigError("\n".join(line + _in_trials(labels, count) for line, labels in wrong.items()))
    return trials


def _check_trial(sweep: Sweep, config: RunConfig) -> None:
    problems = model_problems(config)
    if config.cluster.launcher == "local":
        problems.append("cluster.launcher = local: is without Ray, which runs a sweep's trials; use trial or train")
    if sweep.scheduler == "asha" and sweep.metric.startswith("eval/") and config.pretrain.eval.every_steps is None:
        problems.append(
            f"pretrain.eval.every_steps = None: must be a whole number >= 1 when sweep.scheduler = asha, which "
            f"judges trials by {sweep.metric} while they run"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def load_sweep(name: str) -> Sweep:
    """A built-in sweep, a FILE.py that defines SWEEP, a FILE.yaml or FILE.json, or a recipe, which varies nothing yet.

    A file of settings holds `base` (a recipe), `space` (lists of values by key), settings of the sweep (`seeds: 3`) and
    changes for all trials (`pretrain.steps: 100`). A sweep comes before a recipe of the same name.

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


def with_settings(sweep: Sweep, assignments: Mapping[str, Any]) -> Sweep:
    """The sweep after changes by dotted key: `sweep.*` its own settings, all others for all its trials.

    Raises ConfigError; keys of the trials are only checked by `expand`.
    """
    settings = {key: value for key, value in assignments.items() if key.split(".")[0] == "sweep"}
    typed, problems = check_values(setting_keys(), settings)
    if problems:
        raise ConfigError("\n".join(problems))
    own = {key.removeprefix("sweep."): value for key, value in typed.items()}
    rest = {key: value for key, value in assignments.items() if key not in settings}
    return dataclasses.replace(sweep, changes=merge_changes(sweep.changes, rest), **own)


def with_vary(sweep: Sweep, vary: Mapping[str, Sequence[Any]]) -> Sweep:
    """The sweep with more varied keys; those that it varies or sets already take the new values."""
    given = {rival for key in vary for rival in (ALTERNATIVES if key in ALTERNATIVES else (key,))}
    space = {key: values for key, values in sweep.space.items() if key not in given or key in vary}
    changes = {key: value for key, value in sweep.changes.items() if key not in given}
    return dataclasses.replace(sweep, space={**space, **vary}, changes=changes)


def parse_vary(items: Sequence[str]) -> dict[str, list[str]]:
    """`key=v1,v2` arguments as a space. Commas inside brackets do not separate: `key=[0.4,1],[0.14,1]`.

    Raises ConfigError: no `=`, an empty value, brackets that do not match, a key given twice.
    """
    space: dict[str, list[str]] = {}
    problems = []
    for item in items:
        key, equals, text = (part.strip() for part in item.partition("="))
        values = _split(text)
        if not equals or not key:
            problems.append(f"--vary {show(item)}: must be key=value,value,...")
        elif values is None:
            problems.append(f"--vary {show(item)}: the brackets do not match")
        elif not all(values):
            problems.append(f"--vary {show(item)}: has an empty value; must be key=value,value,...")
        elif key in space:
            problems.append(f"--vary {key}: given twice; put all its values into one --vary")
        else:
            space[key] = values
    if problems:
        raise ConfigError("\n".join(problems))
    return space


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The shortest end of each dotted key that no other has: `temp`, or `teacher.temp` beside `student.temp`."""
    names = {}
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        others = [other for other in keys if other != key]
        names[key] = next((e for e in ends if not any(f".{other}".endswith(f".{e}") for other in others)), key)
    return names


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


def _check_space(sweep: Sweep) -> tuple[dict[str, list[Any]], list[str]]:
    """The varied values with their types, and what is wrong with them."""
    known = config_keys()
    space: dict[str, list[Any]] = {}
    problems = []
    for key, values in sweep.space.items():
        if key not in known:
            problems.append(unknown_key(key, known))
        elif isinstance(values, str) or not isinstance(values, Sequence) or not values:
            problems.append(f"{key} = {show(values)}: must be a list of values to vary, such as [1, 2]")
        elif key.startswith(_SHARED):
            problems.append(f"{key}: is the same for all trials of a sweep and cannot vary")
        elif key == SEED and sweep.seeds > 1:
            problems.append(f"{key}: cannot vary while sweep.seeds = {sweep.seeds}; use one of the two")
        else:
            space[key] = []
            for value in values:
                typed, lines = check_values(known, {key: value})
                problems += lines
                if key in typed and typed[key] in space[key]:
                    problems.append(f"{key} = {show(value)}: given twice among the values to vary")
                space[key] += typed.values()
    for key in sweep.changes:
        rivals = ALTERNATIVES if key in ALTERNATIVES else (key,)
        for varied in (rival for rival in rivals if rival in sweep.space):
            problems.append(
                f"{key} = {show(sweep.changes[key])}: the sweep varies {varied}; choose its values by --vary"
            )
    return space, problems


def _label(names: Mapping[str, str], changes: Mapping[str, Any]) -> str:
    """The varied values as a part of a file name. What it cannot spell is told apart by four digits of a hash."""
    exact = "-".join(f"{names[key]}_{_text(value)}" for key, value in changes.items())
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", exact)
    if label == exact and len(label) <= _MAX_LABEL:
        return label
    return f"{label[: _MAX_LABEL - 9].rstrip('-')}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "_".join(map(str, value))
    return "none" if value is None else str(value)


def _in_trials(labels: Sequence[str], count: int) -> str:
    """Which trials a problem is about; nothing where it is all of them."""
    if len(labels) == count:
        return ""
    labels = list(dict.fromkeys(labels))
    return f" ({', '.join(labels[:3])}{f' and {len(labels) - 3} more' if len(labels) > 3 else ''})"


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
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except SyntaxError as error:
        raise ConfigError(f"{path}, line {error.lineno}: {error.msg}") from None
    except ConfigError:
        raise
    except (ImportError, NameError, TypeError, AttributeError, ValueError, LookupError) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        raise ConfigError(f"{path}, line {lines[-1] if lines else '?'}: {type(error).__name__}: {error}") from error
    return _exposed(module, str(path))


def _load_settings(path: Path) -> Sweep:
    flat = load_file(path)
    base = flat.pop("base", None)
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base = {show(base)}: must be the name of a recipe: {', '.join(recipes())}")
    load_recipe(base)
    if "space" in flat:
        raise ConfigError(f"{path}: space = {show(flat['space'])}: must hold a list of values under each key")
    space = {key.removeprefix("space."): flat.pop(key) for key in list(flat) if key.startswith("space.")}
    own = {f"sweep.{key}" if f"sweep.{key}" in setting_keys() else key: value for key, value in flat.items()}
    known = [*config_keys(), *setting_keys()]
    problems = [unknown_key(key, [*known, "base", "space"]) for key in own if key not in known]
    if problems:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    return with_settings(Sweep(base=base, space=space), own)
