"""`cluster.yaml` is what Ray's cluster launcher accepts, in both its variants, and fits this project."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "cluster.yaml").read_text()


def block(name: str) -> str:
    """The lines between the rule that opens the block `name` and the one that ends it."""
    found = re.search(
        rf"^# --- {name}\b.*\n((?:.*\n)*?)# --- end of {name} -+\n", TEXT, flags=re.MULTILINE | re.IGNORECASE
    )
    assert found, f"cluster.yaml has no block {name}"
    return found[1]


def aws_text() -> str:
    """The file after the edit that its comments describe."""
    lines = block("AWS").splitlines()
    assert all(line.startswith("# ") for line in lines)
    return TEXT.replace(block("on premise"), "".join(f"{line[2:]}\n" for line in lines))


VARIANTS = {"on premise": TEXT, "aws": aws_text()}


@pytest.fixture(params=VARIANTS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return yaml.safe_load(VARIANTS[request.param])


def test_schema(config: dict[str, Any]) -> None:
    ray = importlib.util.find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    schema = Path(ray.origin).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(config, json.loads(schema.read_text()))


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(config)
    validate_config(prepared)
    workers = [kind for name, kind in prepared["available_node_types"].items() if name != prepared["head_node_type"]]
    on_premise = config["provider"]["type"] == "local"  # one node type for all
    assert (
        sum(kind["max_workers"] for kind in workers or prepared["available_node_types"].values())
        == config["max_workers"]
    )
    assert on_premise == (not workers)


def test_ray_rejects_a_misspelt_key(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config["head_node_typo"] = "head"
    with pytest.raises(jsonschema.ValidationError, match="head_node_typo"):
        validate_config(prepare_config(config))


def test_max_workers_is_the_number_of_machines() -> None:
    config = yaml.safe_load(TEXT)
    assert config["max_workers"] == len(config["provider"]["worker_ips"])


def test_head_does_not_train(config: dict[str, Any]) -> None:
    (start,) = (command for command in config["head_start_ray_commands"] if "ray start" in command)
    assert {"--head", "--num-cpus=0", "--num-gpus=0", "--autoscaling-config=~/ray_bootstrap_config.yaml"} <= set(
        start.split()
    )
    for name, kind in config.get("available_node_types", {}).items():
        assert (kind["resources"].get("CPU") == 0) == (name == config["head_node_type"])


def test_every_node_starts_with_one_auth_mode_and_the_projects_packages(config: dict[str, Any]) -> None:
    (venv,) = {re.sub(r".* -m venv ", "", command) for command in config["setup_commands"] if " -m venv " in command}
    (requirements,) = (remote for remote, local in config["file_mounts"].items() if local == "requirements.txt")
    assert any(f"-r {requirements}" in command and venv in command for command in config["setup_commands"])
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = (command for command in config[key] if "ray start" in command)
        exported = dict(word.split("=", 1) for word in start.partition("export ")[2].partition(";")[0].split())
        assert exported["RAY_AUTH_MODE"] == "token"
        assert exported["PATH"] == f"{venv}/bin:$PATH"
    assert "~/.ray/auth_token" in config["file_mounts"]


def test_mounted_files_exist(config: dict[str, Any]) -> None:
    ours = [local for local in config["file_mounts"].values() if not local.startswith("~")]
    assert ours
    assert all((ROOT / local).exists() for local in ours)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_commands_are_shell(config: dict[str, Any]) -> None:
    for key in ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        for command in config.get(key, []):
            subprocess.run(["bash", "-n", "-c", command], check=True)
