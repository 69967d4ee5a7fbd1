"""One suite on one target, without a record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.evaluate.compute import choose_compute
from orchestrator.evaluate.features import Extractor
from orchestrator.evaluate.job import Data, Job
from orchestrator.evaluate.settings import read_settings
from orchestrator.evaluate.suite import SuiteResult, load_suite
from orchestrator.evaluate.targets import find_target
from orchestrator.overrides import override


def run_suite(name: str, target: str, folder: Path, changes: Mapping[str, Any]) -> SuiteResult:
    """Check and run it, with settings by dotted key."""
    suite = load_suite(name)
    settings = read_settings([suite], {"cluster.launcher": "local", **changes})
    config = override(RunConfig(), settings.changes)
    found = find_target(target, settings.features, str(folder))
    extractor = Extractor(found, choose_compute(config), batch_size=settings.features.batch_size)
    job = Job(found, Data(config, found, is_given="data.source" in changes), settings.features, extractor)
    suite.check(job, settings.options[name])
    return suite.run(job, settings.options[name], folder)
