"""What the command `evaluate` does: check everything, compute features once, run the suites, record what they found."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_core.config import ConfigError
from orchestrator.config import RunConfig
from orchestrator.evaluate.names import resolve
from orchestrator.evaluate.record import Evaluation, deliver_results, open_home, record_result
from orchestrator.evaluate.settings import Settings, read_settings
from orchestrator.evaluate.suite import Suite, load_suite
from orchestrator.overrides import override
from orchestrator.runs import check_name, with_absolute_paths

if TYPE_CHECKING:
    from orchestrator.evaluate.job import Job


def evaluate(
    suites: Sequence[str],
    target: str,
    changes: Mapping[str, Any] | None = None,
    *,
    label: str | None = None,
    local: bool = False,
    tell: Callable[[str], None] = print,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[Evaluation]:
    """Run suites on a target; blocks until they are done.

    Args:
        suites: Names of `orchestrator.evaluate.suite.SUITES`.
        target: A run, checkpoint, timm model, ...: see `orchestrator.evaluate.names`.
        changes: Settings by dotted key: `features.*`, `<suite>.*`, `data.*`, `cluster.*`, `tracking.*`. The images are
            those of the target's run unless `data.source` is among them.
        label: What keeps the metrics apart from others of the same run: `evaluate/<label>/<suite>/...`.
        local: In this process without Ray (`cluster.launcher = local`).
        tell: Takes a line for people, as it comes.
        progress: Told how many images of how many have features, and what they are (`train`, `test`, ...).

    Raises:
        ConfigError: It cannot be done as it is asked for; no features were computed.
        RunFailed: No image can be read, features are not finite, or Ray failed.
    """
    changes = dict(changes or {})
    if label is not None:
        check_name(label)
    if local and changes.setdefault("cluster.launcher", "local") != "local":
        raise ConfigError(f"cluster.launcher = {changes['cluster.launcher']}: must be local with --local")
    chosen = [load_suite(name) for name in dict.fromkeys(suites)]
    settings = read_settings(chosen, changes)
    config = override(RunConfig(), settings.changes)
    resolve(target, config.cluster.storage)

    from orchestrator.evaluate.compute import choose_compute  # imports torch
    from orchestrator.evaluate.feature_cache import CACHE_DIR, FeatureCache
    from orchestrator.evaluate.features import Extractor
    from orchestrator.evaluate.job import Data, Job
    from orchestrator.evaluate.targets import find_target

    found = find_target(target, settings.features, config.cluster.storage)
    config, has_data = _with_run(config, settings, found.record.config if found.record else None)
    compute = choose_compute(config)
    storage, limit = Path(config.cluster.storage).resolve(), round(settings.features.cache_gb * 1e9)
    cache = FeatureCache(storage / CACHE_DIR, limit) if limit else None
    extractor = Extractor(found, compute, batch_size=settings.features.batch_size, cache=cache, progress=progress)
    data = Data(config, found, is_given=has_data)
    jobs = {suite.name: Job(found, data, settings.features, extractor) for suite in chosen}
    _check(chosen, jobs, settings)
    open_home(found, config)
    evaluations = []
    try:
        for suite in chosen:
            began = time.perf_counter()
            job, options = jobs[suite.name], settings.options[suite.name]
            with record_result(job, suite.name, options, label) as pending:
                pending.result = suite.run(job, options, pending.folder)
            evaluations.append(pending.evaluation)
            tell(f"{suite.name}: {time.perf_counter() - began:.1f} s; {pending.evaluation.folder}")
    finally:
        compute.close()
    problem = deliver_results(found, config)
    if problem is not None:
        tell(problem)
    return evaluations


def _with_run(config: RunConfig, settings: Settings, recorded: Mapping[str, Any] | None) -> tuple[RunConfig, bool]:
    """The configuration with the run's images and tracking where nothing else was asked for; whether it has images."""
    changes = dict(settings.changes)
    own_data = "data.source" in changes
    for key, value in (recorded or {}).items():
        if key.startswith("tracking.") or (key.startswith("data.") and not own_data):
            changes.setdefault(key, value)
    return with_absolute_paths(override(config, changes)), "data.source" in changes


def _check(suites: Sequence[Suite], jobs: Mapping[str, Job], settings: Settings) -> None:
    """Raise ConfigError with all that the suites find wrong."""
    problems = []
    for suite in suites:
        try:
            suite.check(jobs[suite.name], settings.options[suite.name])
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
