"""What the command `evaluate` does: check everything, compute features once, run the suites, record what they found."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dino_core.config import ConfigError
from orchestrator.config import RunConfig
from orchestrator.evaluate.record import Evaluation, record_result
from orchestrator.evaluate.settings import Settings, read_settings
from orchestrator.evaluate.suite import Suite, load_suite
from orchestrator.overrides import override


def evaluate(
    suites: Sequence[str],
    target: str,
    changes: Mapping[str, Any] | None = None,
    *,
    local: bool = False,
    tell: Callable[[str], None] = print,
) -> list[Evaluation]:
    """Run suites on a target; blocks until they are done.

    Args:
        suites: Names of `orchestrator.evaluate.suite.SUITES`.
        target: A run, checkpoint, timm model, ...: see `orchestrator.evaluate.targets`.
        changes: Settings by dotted key: `features.*`, `<suite>.*`, `data.*`, `cluster.*`, `tracking.*`. The images are
            those of the target's run unless `data.source` is among them.
        local: In this process without Ray (`cluster.launcher = local`).
        tell: Takes a line for people, as it comes.

    Raises:
        ConfigError: It cannot be done as it is asked for; no features were computed.
        RunFailed: No image can be read, features are not finite, or Ray failed.
    """
    changes = dict(changes or {})
    if local and changes.setdefault("cluster.launcher", "local") != "local":
        raise ConfigError(f"cluster.launcher = {changes['cluster.launcher']}: must be local with --local")
    chosen = [load_suite(name) for name in dict.fromkeys(suites)]
    settings = read_settings(chosen, changes)
    config = override(RunConfig(), settings.changes)

    from orchestrator.evaluate.features import Extractor  # imports torch
    from orchestrator.evaluate.job import Job
    from orchestrator.evaluate.targets import find_target

    found = find_target(target, settings.features, config.cluster.storage)
    config, has_data = _with_run(config, settings, found.record.config if found.record else None)
    extractor = Extractor(found, batch_size=settings.features.batch_size, num_threads=config.cluster.data_cpus)
    job = Job(found, config, settings.features, extractor, has_data=has_data)
    _check(chosen, job, settings)
    evaluations = []
    for suite in chosen:
        began = time.perf_counter()
        options = settings.options[suite.name]
        with record_result(job, suite.name, options) as pending:
            pending.result = suite.run(job, options, pending.folder)
        evaluations.append(pending.evaluation)
        tell(f"{suite.name}: {time.perf_counter() - began:.1f} s; {pending.evaluation.folder}")
    return evaluations


def _with_run(config: RunConfig, settings: Settings, recorded: Mapping[str, Any] | None) -> tuple[RunConfig, bool]:
    """The configuration with the run's images and tracking where nothing else was asked for; whether it has images."""
    changes = dict(settings.changes)
    own_data = "data.source" in changes
    for key, value in (recorded or {}).items():
        if key.startswith("tracking.") or (key.startswith("data.") and not own_data):
            changes.setdefault(key, value)
    return override(config, changes), "data.source" in changes


def _check(suites: Sequence[Suite], job: Any, settings: Settings) -> None:
    """Raise ConfigError with all that the suites find wrong."""
    problems = []
    for suite in suites:
        try:
            suite.check(job, settings.options[suite.name])
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
