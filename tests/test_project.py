"""The repository itself: what its files may not name, and that its pages tell the truth about commands and links."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dino_core", "orchestrator", "sweeps")
# Written in pieces: this file is searched too.
REGISTRIES = [
    re.escape(".".join(parts))
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("download", "pytorch", "org"),
        ("anaconda", "org"),
        ("registry", "npmjs"),
    )
]
MACHINE_PATHS = rf"(?<![\w.~$}}*-])/(?:{'work'}|{'root'}|home/(?!ubuntu/|ray/)\w+|Users/\w+)/"
UNSAFE_READS = (
    r"weights_only\s*=\s*False",
    r"(?:^|\s)(?:import|from)\s+(?:\w*pickle|dill|joblib|shelve|marshal)\b",
    r"pickle\.loads?\(",
    r"torch\.load\((?!.*weights_only=True)",
    r"allow_pickle\s*=\s*True",
)


def project_files() -> list[Path]:
    """Every file that is tracked or about to be."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def find(patterns: list[str] | tuple[str, ...] | str, files: list[Path]) -> list[str]:
    """`file:line: text` of every line that matches one of the patterns; binary files are left out."""
    wanted = re.compile("|".join([patterns] if isinstance(patterns, str) else patterns))
    found = []
    for path in files:
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}:{n}: {line}" for n, line in enumerate(lines, 1) if wanted.search(line)]
    return found


def pages() -> list[Path]:
    return [path for path in project_files() if path.suffix == ".md"]


def test_no_package_registry_is_named() -> None:
    assert not find(REGISTRIES, project_files())


def test_requirements_are_versions_only() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pin = re.compile(r"[a-z0-9][a-z0-9._-]*==[\w.]+( ; .+)?")
    assert [line for line in lines if not pin.fullmatch(line) or "://" in line] == []


def test_no_path_of_a_machine_is_named() -> None:
    patterns = [MACHINE_PATHS]
    if ROOT.parent != Path(ROOT.anchor):
        patterns.append(re.escape(f"{ROOT}/"))
    assert not find(patterns, project_files())


def test_nothing_read_is_executed() -> None:
    code = [path for path in project_files() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in PACKAGES]
    assert code
    assert not find(UNSAFE_READS, code)


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_page_exists(name: str) -> None:
    assert (ROOT / name).stat().st_size > 0


def test_relative_links_lead_somewhere() -> None:
    broken = []
    for page in pages():
        for target in re.findall(r"\]\(([^)\s]+)\)", _without_code(page.read_text())):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            if not path.exists() or (anchor and path.suffix == ".md" and anchor not in _anchors(path)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


def test_make_targets_in_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        (page.name, name) for page in pages() for line in _code(page) for name in re.findall(r"\bmake ([a-z-]+)", line)
    }
    assert named
    assert not {f"{page}: make {name}" for page, name in named if name not in targets}


def test_commands_in_pages_exist() -> None:
    """Command, options, recipe or sweep, and keys; nothing is run."""
    from orchestrator.catalog import recipes, sweep_names
    from orchestrator.cli import cli
    from orchestrator.evaluate.settings import setting_keys as keys_of_evaluate
    from orchestrator.evaluate.suite import SUITES, load_suite
    from orchestrator.overrides import config_keys
    from orchestrator.sweep import setting_keys

    names = {"pretrain": set(recipes()), "sweep": {*recipes(), *sweep_names()}}
    keys = {*config_keys(), *setting_keys(), *keys_of_evaluate([load_suite(name) for name in SUITES])}
    for page, words in _commands():
        where = f"{page.relative_to(ROOT)}: {' '.join(words)}"
        command, *arguments = words or ["--help"]
        if command == "--help":
            continue
        assert command in cli.commands, where
        if "--help" in arguments:
            continue
        try:
            given = cli.commands[command].make_context(command, arguments).params
        except click.UsageError as error:
            pytest.fail(f"{where}: {error.format_message()}")
        first = given.get({"pretrain": "recipe", "sweep": "sweep"}.get(command, ""))
        several = [item for value in given.values() if isinstance(value, tuple) for item in value]
        settings = [item for item in (first, *several) if item and "=" in item]
        assert [item for item in settings if item.partition("=")[0] not in keys] == [], where
        assert first is None or first in {*names[command], *settings} or Path(first).suffix, where


def test_setup_says_what_is_wrong_with_the_interpreter(tmp_path: Path) -> None:
    for python, complaint in {"no-such-python": "no such program", "false": "older than the python 3.11"}.items():
        environment = {**os.environ, "PYTHON": python, "VENV": str(tmp_path / "venv")}
        ended = subprocess.run(
            ["sh", ".ci/setup"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 1
        assert f"PYTHON={python}" in ended.stderr
        assert complaint in ended.stderr
        assert not (tmp_path / "venv").exists()


def _commands() -> Iterator[tuple[Path, list[str]]]:
    """The arguments of each `python -m orchestrator ...` and `dino ...` in a page; synopses are left out."""
    for page in [*pages(), ROOT / "cluster.yaml"]:
        for line in _code(page):
            words = _split(line)
            for n, word in enumerate(words):
                if word == "orchestrator" and n and words[n - 1] == "-m":
                    break
                if word == "dino" and n == 0:
                    break
            else:
                continue
            arguments = words[n + 1 :]
            if not any(re.search(r"[\[\]<>|]|\.\.\.|^[A-Z_]+$", word) for word in arguments):
                yield page, arguments


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line.removeprefix("$ "), comments=True)
    except ValueError:  # not a shell line
        return []


def _code(page: Path) -> list[str]:
    """The lines of a page's code blocks, continued lines joined, and its code in the text; of YAML, the comments."""
    text = page.read_text()
    if page.suffix == ".yaml":
        text = "\n```\n" + "\n".join(re.findall(r"^# ?(.*)", text, flags=re.MULTILINE)) + "\n```\n"
    blocks = re.findall(r"^ *```.*?\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))


def _without_code(text: str) -> str:
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ +(.+?) *$", _without_code(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
