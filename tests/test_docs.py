"""docs/configuration.md against the code. `python -m tests.test_docs` writes the page again."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from dino_core.config import CheckedConfig, StageConfig
from orchestrator.config import RunConfig
from orchestrator.dry_run import show_value
from orchestrator.evaluate.settings import FeaturesConfig
from orchestrator.evaluate.suite import SUITES, load_suite
from orchestrator.overrides import Key, config_keys
from orchestrator.sweep import Sweep, setting_keys

STAGE = "pretrain.stages[]."
PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

Every setting, under the one name that it has on the command line, in a file, in the `space` of a sweep, in MLflow and
in error messages. Recipes change the defaults; `--dry-run` prints the values that a run would have.

- `pretrain.*` and `data.*` say what is computed. `cluster.*` and `tracking.*` never change a number beyond rounding; a
  resumed run may change them, and of the others `pretrain.parallel_strategy`; a sweep cannot vary them.
- No value (None below) is written `none` or `null`, a truth value `true` or `false`, a pair `[0.4, 1.0]` or `0.4,1.0`.
- Batch sizes are global. A duration ends in its unit: `_steps` are optimiser steps, `_epochs` passes over the training
  images (fractions allowed), `_s` seconds.
- `features.*` and the groups behind it are settings of [evaluate](evaluation.md#after-the-training) and of no run.
- The last columns give the name of the same choice in the authors' code: the flag of DINO, the key of DINOv2.

This page is made from the code; `python -m tests.test_docs` writes it again.
"""

_ELSEWHERE = re.compile(r"\s*\(([^()|]+) \| ([^()|]+)\)(?=\.?$)")


def field_docs(part: type) -> dict[str, str]:
    """The string below each field of a class and of those that it extends, on one line."""
    docs = {}
    for kind in filter(dataclasses.is_dataclass, reversed(part.__mro__)):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                docs[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return docs


def parts(root: type, prefix: str) -> list[tuple[str, type]]:
    """Every configuration class from `root` down, outermost first, with the prefix of its keys."""
    hints = get_type_hints(root)
    inner = [(name, kind) for name, kind in hints.items() if dataclasses.is_dataclass(kind)]
    below = [found for name, kind in inner for found in parts(kind, f"{prefix}{name}.")]  # type: ignore[arg-type]
    return [(prefix, root), *below]


def section(prefix: str, part: type, keys: dict[str, Key]) -> str:
    """The table of the keys that stand directly in one class; nothing if there are none."""
    docs = field_docs(part)
    fields = [(prefix + item.name, item) for item in dataclasses.fields(part) if prefix + item.name in keys]
    if not fields:
        return ""
    meanings = {key: _ELSEWHERE.sub("", docs[item.name]) for key, item in fields}
    elsewhere = {key: found.groups() for key, item in fields if (found := _ELSEWHERE.search(docs[item.name]))}
    header = ["key", "default", "allowed", "meaning", *(["DINO", "DINOv2"] if elsewhere else [])]
    rows = []
    for key, item in fields:
        row = [f"`{key}`", _default(item, keys[key]), keys[key].allowed, meanings[key]]
        rows.append([*row, *(map(_code, elsewhere.get(key, ("-", "-"))) if elsewhere else ())])
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    summary = " ".join((inspect.getdoc(part) or "").split("\n\n")[0].split())
    return f"## {prefix.rstrip('.')}\n\n{summary}\n\n{table}\n"


def _default(item: dataclasses.Field[Any], key: Key) -> str:
    if key.is_needed:
        return "must be given"
    return "`[]`" if item.default == () else f"`{show_value(item.default)}`"


def _code(name: str) -> str:
    return name if name == "-" else f"`{name}`"


def parts_of_evaluate() -> list[tuple[str, type]]:
    """The classes of the settings that the command `evaluate` has for itself, with the prefixes of their keys."""
    options = [load_suite(name).options for name in SUITES]
    return [(f"{part.path}.", part) for part in (FeaturesConfig, *options)]  # type: ignore[attr-defined]


def page() -> str:
    sections = [section(prefix, part, config_keys()) for prefix, part in parts(RunConfig, "")]
    sections += [section(prefix, part, config_keys(StageConfig, STAGE)) for prefix, part in parts(StageConfig, STAGE)]
    sections.append(section("sweep.", Sweep, setting_keys()))
    sections += [section(prefix, part, config_keys(part, prefix)) for prefix, part in parts_of_evaluate()]
    return "\n".join([INTRODUCTION, *filter(None, sections)])


def all_parts() -> list[type]:
    configs = [*parts(RunConfig, ""), *parts(StageConfig, STAGE)]
    return [part for _, part in [*configs, ("sweep.", Sweep), *parts_of_evaluate()]]


@pytest.mark.parametrize("part", all_parts(), ids=lambda part: part.__name__)
def test_every_setting_is_documented(part: type[CheckedConfig]) -> None:
    plain: list[dataclasses.Field[Any]] = [
        item for item in dataclasses.fields(part) if not dataclasses.is_dataclass(get_type_hints(part)[item.name])
    ]
    assert [item.name for item in plain if item.name not in field_docs(part)] == []


def test_configuration_page_says_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "out of date; run: python -m tests.test_docs"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
