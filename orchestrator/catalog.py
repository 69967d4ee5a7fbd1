"""Recipes and built-in sweeps by name: what the package `sweeps` holds, looked up when it is asked for.

This package does not import `sweeps` (its modules import this one); it finds it by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable
from types import ModuleType

from dino_core.config import ConfigError
from orchestrator.config import RunConfig
from orchestrator.overrides import did_you_mean

PACKAGE = "sweeps"
_RECIPES = "recipes"


def recipes() -> dict[str, Callable[[], RunConfig]]:
    """Every recipe by name, in the order in which `sweeps.recipes.RECIPES` has them."""
    found: dict[str, Callable[[], RunConfig]] = importlib.import_module(f"{PACKAGE}.{_RECIPES}").RECIPES
    return found


def load_recipe(name: str) -> RunConfig:
    """The complete configuration of a recipe. Raises ConfigError naming the nearest recipe."""
    known = recipes()
    if name not in known:
        raise ConfigError(f"unknown recipe {name!r}{did_you_mean(name, known)}; there is {', '.join(known)}")
    return known[name]()


def sweep_names() -> list[str]:
    """Every built-in sweep."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None, f"the package {PACKAGE} is installed with this one"
    modules = pkgutil.iter_modules(spec.submodule_search_locations)
    return sorted(module.name for module in modules if module.name != _RECIPES and not module.name.startswith("_"))


def sweep_module(name: str) -> ModuleType:
    """The module of a built-in sweep, which exposes SWEEP."""
    return importlib.import_module(f"{PACKAGE}.{name}")


def summary(documented: object) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(documented) or "").partition("\n")[0]
