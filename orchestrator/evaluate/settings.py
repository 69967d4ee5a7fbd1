"""The settings of `evaluate`: `features.*`, those of each suite, and `data.*`, `cluster.*`, `tracking.*` of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dino_core.config import CheckedConfig, ConfigError, number
from orchestrator.evaluate.suite import SUITES, Suite, load_suite
from orchestrator.overrides import Key, check_values, config_keys

_OF_A_RUN = ("data.", "cluster.", "tracking.")


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(CheckedConfig):
    """How the features are made, the same for all suites of a command."""

    path: ClassVar[str] = "features"

    network: Literal["teacher", "student"] = "teacher"
    """Whose backbone, of a run or checkpoint."""
    image_size: int | None = number(None, ge=1)
    """Pixels per side of the centre crop; None: as the backbone was trained, and 32 for raw pixels."""
    crop_fraction: float | None = number(None, gt=0, le=1)
    """Share of the resized image's side that the centre crop keeps; None: as the backbone was trained, else 0.875."""
    num_train: int | None = number(None, ge=1)
    """Training images used, a fixed random choice of which a smaller one is a part; None: all."""
    num_test: int | None = number(None, ge=1)
    """Test images used, chosen likewise; None: all."""
    batch_size: int = number(64, ge=1)
    """Images per forward pass."""
    seed: int = number(0, ge=0, le=2**32 - 1)
    """Of the weights of `random:NAME`."""
    cache_gb: float = number(10.0, ge=0)
    """Features kept in `.features` of `cluster.storage` for later commands, up to this size; 0: none."""


@dataclass(frozen=True)
class Settings:
    """What the command line says beside suites and target."""

    features: FeaturesConfig
    options: Mapping[str, CheckedConfig]
    """Of each suite, by its name."""
    changes: Mapping[str, Any]
    """Of `data.*`, `cluster.*` and `tracking.*`."""


def setting_keys(suites: Sequence[Suite]) -> dict[str, Key]:
    """Every key that can be given with these suites."""
    keys = {key: kind for key, kind in config_keys().items() if key.startswith(_OF_A_RUN)}
    for part in _parts(suites):
        keys |= config_keys(part, f"{part.path}.")
    return keys


def read_settings(suites: Sequence[Suite], changes: Mapping[str, Any]) -> Settings:
    """The settings that were given, checked.

    Raises:
        ConfigError: An unknown key (naming the nearest), one of a suite that is not asked for, or a value out of range.
    """
    asked = {suite.name for suite in suites}
    problems = []
    for key in changes:
        group = key.partition(".")[0]
        if group in SUITES and group not in asked and key in setting_keys([load_suite(group)]):
            problems.append(f"{key}: is of the suite {group}, which is not asked for")
        elif key in config_keys() and not key.startswith(_OF_A_RUN):
            problems.append(f"{key}: is of the training, which is over; there is features.* and {_groups(asked)}")
    rest = {key: value for key, value in changes.items() if not any(line.startswith(f"{key}:") for line in problems)}
    typed, wrong = check_values(setting_keys(suites), rest)
    problems += wrong
    parts: dict[str, CheckedConfig] = {}
    for part in _parts(suites):
        prefix = f"{part.path}."
        given = {key.removeprefix(prefix): value for key, value in typed.items() if key.startswith(prefix)}
        try:
            parts[part.path] = part(**given)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    features = parts.pop(FeaturesConfig.path)
    assert isinstance(features, FeaturesConfig)
    return Settings(features, parts, {key: value for key, value in typed.items() if key.startswith(_OF_A_RUN)})


def _parts(suites: Sequence[Suite]) -> list[Any]:
    """The classes of all settings that are not a run's."""
    return [FeaturesConfig, *(suite.options for suite in suites)]


def _groups(names: set[str]) -> str:
    return ", ".join(f"{name}.*" for name in sorted(names))
