"""Run a sweep: every trial a Ray Tune trial, the record on disk, the comparison at the end.

The sweep's own ledger, not Tune's state, says what is done; resuming starts a new Tune run of what is left, each trial
from its newest checkpoint.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dino_core.config import ConfigError
from orchestrator.config import RunConfig
from orchestrator.data.shelf import num_streams, shelf_for_trials
from orchestrator.launch import trial_resources, tune_trial
from orchestrator.metric_choice import KNN, choice_for_sweep
from orchestrator.overrides import flatten, override
from orchestrator.preflight import open_sources
from orchestrator.progress import RunProgress
from orchestrator.ray_cluster import (
    connect,
    describe_resources,
    disconnect,
    plan_concurrency,
    resolve_launcher,
)
from orchestrator.records import (
    FINAL_EVENTS,
    SWEEP_FILE,
    TRIALS_DIR,
    Ledger,
    RunRecord,
    read_json,
    read_states,
    write_json,
)
from orchestrator.registry import upload_when_asked
from orchestrator.runs import (
    check_same_images,
    find_folder,
    git_commit,
    length_in_words,
    new_name,
    prepare_run,
    resume_command,
    resumed_record,
)
from orchestrator.schedulers import last_first_rung, make_scheduler, scheduler_notes
from orchestrator.summary import Summary
from orchestrator.supervisor import supervise
from orchestrator.sweep import Sweep, expand
from orchestrator.tracking import Target
from orchestrator.worker import FAILURE_FILE


@dataclass(frozen=True)
class SweepResult:
    """How a sweep ended."""

    folder: Path
    failed: dict[str, str] = field(default_factory=dict)
    """Trial to reason."""

    @property
    def ok(self) -> bool:
        return not self.failed


@dataclass(frozen=True)
class _Plan:
    """A sweep on disk, ready to run."""

    folder: Path
    definition: dict[str, Any]
    records: dict[str, RunRecord]
    """By trial, in order."""

    def failed(self) -> dict[str, str]:
        """Trial to reason."""
        states = read_states(self.folder)
        ended = {trial_id: states.get(record.run_id) for trial_id, record in self.records.items()}
        return {trial_id: state.reason for trial_id, state in ended.items() if state and state.event == "failed"}

    @property
    def config(self) -> RunConfig:
        """That of the first trial; all trials share `cluster` and `tracking`."""
        return override(RunConfig(), next(iter(self.records.values())).config)

    def run_dir(self, trial_id: str) -> Path:
        return self.folder / TRIALS_DIR / trial_id

    def open_trials(self) -> list[str]:
        """Trials that still have to run."""
        states = read_states(self.folder)
        return [
            trial_id
            for trial_id, record in self.records.items()
            if record.run_id not in states or states[record.run_id].event not in FINAL_EVENTS
        ]


def run_sweep(sweep: Sweep) -> SweepResult:
    """Check, write down and run a new sweep.

    Raises:
        ConfigError: A trial cannot run; nothing was started.
        RunFailed: The sweep as a whole could not go on (Ray did not start, a trial hung).
        KeyboardInterrupt: Stopped by the user or the cluster; the records allow resuming.
    """
    return _run(_write_plan(sweep))


def resume_sweep(name: str, changes: Mapping[str, Any] | None = None, storage: str = "./runs") -> SweepResult:
    """Run what is left of an earlier sweep.

    Args:
        name: The sweep's name in `storage`, or the path of its folder.
        changes: New values of `cluster.*` and `tracking.*` keys.

    Raises:
        As `run_sweep`.
    """
    folder = find_folder(name, storage, "sweep")
    definition = read_json(folder / SWEEP_FILE)
    records = {}
    for trial in definition["trials"]:
        run_dir = folder / TRIALS_DIR / trial["trial_id"]
        records[trial["trial_id"]] = resumed_record(RunRecord.read(run_dir), changes or {})
    configs = {trial_id: override(RunConfig(), record.config) for trial_id, record in records.items()}
    digests = {data: source.digest() for data, source in open_sources(configs.values()).items()}
    for trial_id, record in records.items():
        check_same_images(record, digests[configs[trial_id].data])
    plan = _Plan(folder, definition, records)
    for trial_id, record in records.items():
        record.write(plan.run_dir(trial_id))
    return _run(plan)


def _write_plan(sweep: Sweep) -> _Plan:
    trials = expand(sweep)
    sources = open_sources(trial.config for trial in trials)
    choice = choice_for_sweep(
        sweep.metric,
        sweep.mode,
        (trial.config for trial in trials),
        has_labels=all(source.has_test_labels for source in sources.values()),
    )
    if choice.metric == KNN and sweep.scheduler != "none":
        for source in sources.values():
            if not source.has_test_labels:
                raise ConfigError(
                    f"sweep.metric = {choice.metric}: needs labels and a test split to stop trials by, but "
                    f"{source.describe()}"
                )
    base = trials[0].config
    name = new_name(sweep.name)
    folder = Path(base.cluster.storage).resolve() / name
    experiment = base.tracking.experiment or sweep.name
    digests = {data: source.digest() for data, source in sources.items()}
    commit = git_commit()
    records = {}
    for trial in trials:
        records[trial.trial_id] = prepare_run(
            trial.config,
            sources[trial.config.data],
            run_id=f"{name}.{trial.trial_id}",
            recipe=sweep.recipe,
            experiment=experiment,
            data_digest=digests[trial.config.data],
            commit=commit,
            trial=trial,
            sweep=name,
            paper_setting=sweep.paper_setting,
            stop_collapsed=sweep.stop_collapsed,
        )
    if sweep.grace_steps is not None and sweep.scheduler != "none":
        shortest = min(int(record.derived["total_steps"]) for record in records.values())
        judged = last_first_rung(sweep.scheduler, sweep.grace_steps, sweep.reduction_factor, sweep.brackets)
        if judged >= shortest:
            what = "no trial" if sweep.brackets == 1 else f"no trial of bracket {sweep.brackets}, judged at {judged},"
            raise ConfigError(
                f"sweep.grace_steps = {sweep.grace_steps}: {what} could be stopped; must be less than the "
                f"{shortest} steps of a trial"
            )
    for note in scheduler_notes(sweep.scheduler, (trial.config for trial in trials)):
        print(note, flush=True)
    definition = {
        "sweep": sweep.name,
        "recipe": sweep.recipe,
        "experiment": experiment,
        "method": sweep.method,
        "rows": {row: dataclasses.asdict(found) for row, found in sweep.rows.items()},
        "paper_setting": sweep.paper_setting,
        "space": {key: list(values) for key, values in sweep.space.items()},
        "seeds": sweep.seeds,
        "metric": choice.metric,
        "mode": choice.mode,
        "metric_why": choice.why,
        "scheduler": sweep.scheduler,
        "grace_steps": sweep.grace_steps,
        "reduction_factor": sweep.reduction_factor,
        "brackets": sweep.brackets,
        "stop_collapsed": sweep.stop_collapsed,
        "trials": [{"trial_id": t.trial_id, "changes": dict(t.changes), "seed": t.seed} for t in trials],
        "base": flatten(base),
    }
    plan = _Plan(folder, definition, records)
    for trial_id, record in records.items():
        record.write(plan.run_dir(trial_id))
    write_json(folder / SWEEP_FILE, definition)
    return plan


def _run(plan: _Plan) -> SweepResult:
    config = plan.config
    open_trials = plan.open_trials()
    target = Target.of(config.tracking)
    name = plan.folder.name
    lengths = "; ".join(dict.fromkeys(map(length_in_words, plan.records.values())))
    print(
        f"sweep {name}: {len(plan.records)} trials, {len(open_trials)} to run, each of {lengths}; "
        f"records in {plan.folder}",
        flush=True,
    )
    runs = [RunProgress.of(plan.run_dir(trial_id), trial_id) for trial_id in plan.records]
    ledger = Ledger(plan.folder)
    ledger.record(name, "started")

    def launch() -> None:
        if open_trials:
            _tune(plan, open_trials, ledger)
        Summary.of(plan.folder, target).write_report()
        failed = plan.failed()
        ledger.record(name, "failed" if failed else "finished", ", ".join(failed))

    try:
        supervise(
            launch,
            ledger=ledger,
            folder=plan.folder,
            runs=runs,
            experiment=plan.definition["experiment"],
            target=target,
            start_timeout_s=config.cluster.start_timeout_s,
            describe_cluster=describe_resources,
        )
    except KeyboardInterrupt:
        print(f"\ninterrupted; resume with: {resume_command('sweep', plan.folder)}", flush=True)
        raise
    finally:
        ledger.close()  # before Ray goes: what its end does to the trials must not be written down as theirs
        disconnect()
    upload_when_asked(plan.folder, config, target)
    Summary.of(plan.folder, target).print()
    return SweepResult(plan.folder, plan.failed())


def _tune(plan: _Plan, open_trials: list[str], ledger: Ledger) -> None:
    """Run the trials as one Ray Tune experiment; returns when all ended, well or not."""
    config = plan.config
    launcher = resolve_launcher(config.cluster, in_sweep=True)
    # Ray Train's cleaner of placement groups asks the dashboard which controllers live.
    capacity = connect(config, dashboard=launcher == "train")
    from ray import tune

    from orchestrator.tune_callback import LedgerCallback

    configs = (override(RunConfig(), plan.records[trial_id].config) for trial_id in open_trials)
    streams = num_streams(configs) if config.cluster.share_crops else None
    concurrency = plan_concurrency(config, capacity, len(open_trials), streams)
    for trial_id in open_trials:
        (plan.run_dir(trial_id) / FAILURE_FILE).unlink(missing_ok=True)
    trials = {str(plan.run_dir(trial_id)): plan.records[trial_id] for trial_id in open_trials}
    tuner = tune.Tuner(
        tune.with_resources(tune_trial, trial_resources(config, launcher)),
        param_space={"run_dir": tune.grid_search(list(trials)), "launcher": launcher},
        tune_config=tune.TuneConfig(
            scheduler=make_scheduler(plan.definition, max(int(r.derived["total_steps"]) for r in trials.values())),
            max_concurrent_trials=concurrency,
            # A warm actor has torch imported already. A trial that only waits for a TorchTrainer cannot be reset.
            reuse_actors=launcher == "trial",
        ),
        run_config=tune.RunConfig(
            name=f"attempt-{time.time_ns()}",
            storage_path=str(plan.folder / "tune"),
            failure_config=tune.FailureConfig(max_failures=config.cluster.max_failures),
            callbacks=[LedgerCallback(ledger, trials, plan.definition["scheduler"])],
            verbose=0,
        ),
    )
    with shelf_for_trials(config) as shared_crops:
        tuner.fit()
        if shared_crops is not None:
            print(shared_crops.report(), flush=True)
