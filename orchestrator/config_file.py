"""YAML and JSON files of settings, under nested or dotted keys, as changes for `orchestrator.overrides.override`.

YAML is read by the rules of its version 1.2: `1e-4` is a number, `no` is text. A file that says one thing twice, refers
to itself or unfolds into more than 10,000 values is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from dino_core.config import ConfigError

MAX_BYTES = 1_000_000
MAX_VALUES = 10_000


def load_file(path: str | Path, *, whole: Collection[str] = ()) -> dict[str, Any]:
    """The settings of a YAML or JSON file by dotted key. Raises ConfigError with file and, where it can, line.

    What stands under the names in `whole` is no setting and is left as it is.
    """
    path = Path(path)
    readers: dict[str, Callable[[str], Any]] = {".yaml": _read_yaml, ".yml": _read_yaml, ".json": _read_json}
    if path.suffix not in readers:
        raise ConfigError(f"{path}: a file of settings must end in {', '.join(readers)}")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{path}: is larger than {MAX_BYTES} bytes, so it cannot be a file of settings")
        settings = readers[path.suffix](content.decode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_explain(error)}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except _GivenTwice as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValueError as error:  # a scalar that its explicit tag does not fit, a number of 5000 digits
        raise ConfigError(f"{path}: {error}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: must hold settings such as `pretrain.seed: 1`, not {type(settings).__name__}")
    try:
        flat = dotted({name: value for name, value in settings.items() if name not in whole})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return flat | {name: settings[name] for name in whole if name in settings}


def dotted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted key. Raises ConfigError where one is given twice."""
    flat: dict[str, Any] = {}
    try:
        _flatten(settings, "", flat)
    except _GivenTwice as error:
        raise ConfigError(str(error)) from None
    return flat


def parse_yaml(text: str) -> Any:
    """A value that is written in YAML, such as a list. Raises ConfigError."""
    try:
        return _read_yaml(text)
    except (yaml.YAMLError, RecursionError, ValueError, _GivenTwice) as error:
        raise ConfigError(f"cannot be read: {' '.join(str(error).split())}") from None


class _GivenTwice(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(f"{key}: given twice")


def _flatten(settings: Mapping[str, Any], prefix: str, flat: dict[str, Any]) -> None:
    for name, value in settings.items():
        if isinstance(value, dict):
            _flatten(value, f"{prefix}{name}.", flat)
        elif prefix + name in flat:
            raise _GivenTwice(prefix + name)
        else:
            flat[prefix + name] = value


def _read_json(text: str) -> Any:
    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise _GivenTwice(key)
            result[key] = value
        return result

    return json.loads(text, object_pairs_hook=mapping)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _explain(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f": {' '.join(str(error).split())}"
    mark = error.problem_mark
    return f", line {mark.line + 1}, column {mark.column + 1}: {error.problem or error.context}"


def _refused(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2, text keys that are unique, and a limit on what aliases unfold to."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        node = super().compose_node(parent, index)
        if node is None:
            return None
        if isinstance(event, yaml.AliasEvent):
            if node not in self._sizes:
                raise _refused(f"*{event.anchor} refers to itself", node)
            return node
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        self._sizes[node] = 1 + sum(self._sizes[child] for child in children)
        if self._sizes[node] > MAX_VALUES:
            raise _refused(f"unfolds into more than {MAX_VALUES} values", node)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                raise _refused("keys must be text", key)
            if key.value in seen:
                raise _refused(f"{key.value}: given twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value)


_Loader.yaml_implicit_resolvers = {}
_DIGITS = [*"-+.0123456789"]

for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?[0-9]+", _DIGITS),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", _DIGITS),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
