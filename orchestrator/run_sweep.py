"""Run a sweep: every trial a Ray Tune trial, the record on disk, the comparison at the end.

The sweep's own ledger, not Tune's state, says what is done; resuming starts a new Tune run of what is left, each trial
from its newest checkpoint.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_core.config import ConfigError
from orchestrator.config import DataConfig, RunConfig
from orchestrator.data.shelf import num_streams, shelf_for_trials
from orchestrator.definition import design_definition, sweep_of
from orchestrator.launch import trial_resources, tune_trial
from orchestrator.metric_choice import KNN, Mode, choice_for_sweep
from orchestrator.overrides import override
from orchestrator.population import Population, generations_of
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
    Trial,
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
from orchestrator.search import Search, first_suggestions
from orchestrator.summary import Summary
from orchestrator.supervisor import supervise
from orchestrator.sweep import CheckedSweep, Sweep, check, expand
from orchestrator.tracking import Target
from orchestrator.worker import FAILURE_FILE

if TYPE_CHECKING:
    from orchestrator.data.split import Source


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
    search: Search | Population | None = None
    """What adds trials as results come."""

    def ask(self) -> list[str]:
        """Write down the search's next trials; their ids, none where it is over."""
        return self.add(self.search.ask()) if self.search is not None else []

    def add(self, trials: Iterable[tuple[Trial, RunRecord]]) -> list[str]:
        """Write down more trials, each record before the list that names it; their ids."""
        added = {trial.trial_id: (trial, record) for trial, record in trials}
        for trial_id, (_, record) in added.items():
            record.write(self.run_dir(trial_id))
        self.definition["trials"] = [*self.definition["trials"], *(_entry(trial) for trial, _ in added.values())]
        write_json(self.folder / SWEEP_FILE, self.definition)
        self.records.update({trial_id: record for trial_id, (_, record) in added.items()})
        return list(added)

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
        """Trials that still have to run. What became of a population's older generations is settled."""
        states = read_states(self.folder)
        newest = max((record.segment.generation for record in self.records.values() if record.segment), default=0)
        return [
            trial_id
            for trial_id, record in self.records.items()
            if (record.run_id not in states or states[record.run_id].event not in FINAL_EVENTS)
            and (record.segment is None or record.segment.generation == newest)
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
    plan = _Plan(folder, definition, records, _resumed_search(folder, definition, records))
    for trial_id, record in records.items():
        record.write(plan.run_dir(trial_id))
    if plan.search is not None:
        plan.add(plan.search.lost(records))
    return _run(plan)


def _resumed_search(
    folder: Path, definition: dict[str, Any], records: Mapping[str, RunRecord]
) -> Search | Population | None:
    if definition.get("design") != "optuna" and definition["scheduler"] != "pbt":
        return None
    first = next(iter(records.values()))
    checked = check(sweep_of(definition, first.config))
    recorder = _Recorder(
        folder.name,
        first.recipe,
        first.experiment,
        first.paper_setting,
        definition["method"],
        git_commit(),
        first.stop_collapsed,
    )
    if definition["scheduler"] == "pbt":
        (row,) = checked.rows
        checked.trial(row, first.changes, 0)  # the cluster may be another than it was
        return Population(checked, folder, definition["metric"], definition["mode"], recorder.record)
    return Search(checked, folder, definition["objectives"], recorder.record)


@dataclass
class _Recorder:
    """Makes the records of a sweep's trials."""

    sweep: str
    """Name of its folder."""
    recipe: str
    experiment: str
    paper_setting: str
    method: str | None
    commit: str | None
    stop_collapsed: bool
    sources: dict[DataConfig, Source] = field(default_factory=dict)
    digests: dict[DataConfig, str] = field(default_factory=dict)

    def record(self, trial: Trial) -> RunRecord:
        """Raises ConfigError if the trial cannot run."""
        data = trial.config.data
        self.sources |= open_sources([trial.config], self.sources)
        if data not in self.digests:
            self.digests[data] = self.sources[data].digest()
        return prepare_run(
            trial.config,
            self.sources[data],
            run_id=f"{self.sweep}.{trial.trial_id}",
            recipe=self.recipe,
            experiment=self.experiment,
            data_digest=self.digests[data],
            commit=self.commit,
            trial=dataclasses.replace(trial, method=trial.method or self.method),
            sweep=self.sweep,
            paper_setting=self.paper_setting,
            stop_collapsed=self.stop_collapsed,
        )


def _entry(trial: Trial) -> dict[str, Any]:
    """A trial in the list of `sweep.json`."""
    return {"trial_id": trial.trial_id, "changes": dict(trial.changes), "seed": trial.seed}


def _write_plan(sweep: Sweep) -> _Plan:
    checked = check(sweep)
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
    recorder = _Recorder(
        name, sweep.recipe, experiment, sweep.paper_setting, None, git_commit(), sweep.stop_collapsed, sources
    )
    records = {trial.trial_id: recorder.record(trial) for trial in trials}
    if sweep.grace_steps is not None and sweep.scheduler != "none":
        shortest = min(int(record.derived["total_steps"]) for record in records.values())
        judged = last_first_rung(sweep.scheduler, sweep.grace_steps, sweep.reduction_factor, sweep.brackets)
        if judged >= shortest:
            what = "no trial" if sweep.brackets == 1 else f"no trial of bracket {sweep.brackets}, judged at {judged},"
            raise ConfigError(
                f"sweep.grace_steps = {sweep.grace_steps}: {what} could be stopped; must be less than the "
                f"{shortest} steps of a trial"
            )
    num_segments = None
    if sweep.scheduler == "pbt":
        num_segments = len(trials) * generations_of(sweep, int(records[trials[0].trial_id].derived["total_steps"]))
    for note in scheduler_notes(sweep.scheduler, (trial.config for trial in trials)):
        print(note, flush=True)
    definition = {
        "sweep": sweep.name,
        "recipe": sweep.recipe,
        "experiment": experiment,
        "method": sweep.method,
        "rows": {row: dataclasses.asdict(found) for row, found in sweep.rows.items()},
        "paper_setting": sweep.paper_setting,
        "seeds": sweep.seeds,
        "metric": choice.metric,
        "mode": choice.mode,
        "metric_why": choice.why,
        "scheduler": sweep.scheduler,
        "grace_steps": sweep.grace_steps,
        "reduction_factor": sweep.reduction_factor,
        "brackets": sweep.brackets,
        "stop_collapsed": sweep.stop_collapsed,
        "num_segments": num_segments,
        **design_definition(checked, trials, choice),
        "trials": [_entry(trial) for trial in trials],
    }
    plan = _Plan(folder, definition, records, _new_search(checked, folder, definition, records, recorder))
    for trial_id, record in records.items():
        record.write(plan.run_dir(trial_id))
    write_json(folder / SWEEP_FILE, definition)
    return plan


def _new_search(
    checked: CheckedSweep,
    folder: Path,
    definition: Mapping[str, Any],
    records: Mapping[str, RunRecord],
    recorder: _Recorder,
) -> Search | Population | None:
    if checked.sweep.scheduler == "pbt":
        population = Population(checked, folder, definition["metric"], definition["mode"], recorder.record)
        population.begin(records)
        return population
    if checked.sweep.design != "optuna":
        return None
    objectives: dict[str, Mode] = definition["objectives"]
    search = Search(checked, folder, objectives, recorder.record)
    search.begin(first_suggestions(checked, list(objectives.values())))
    return search


def _run(plan: _Plan) -> SweepResult:
    config = plan.config
    open_trials = plan.open_trials()
    more = plan.search.left() if plan.search is not None else 0
    target = Target.of(config.tracking)
    name = plan.folder.name
    lengths = "; ".join(dict.fromkeys(map(length_in_words, plan.records.values())))
    print(
        f"sweep {name}: {len(plan.records)} trials, {len(open_trials)} to run, each of {lengths}; "
        f"{f'{more} more {plan.search.unit}; ' if more and plan.search is not None else ''}"
        f"records in {plan.folder}",
        flush=True,
    )
    runs = [RunProgress.of(plan.run_dir(trial_id), trial_id) for trial_id in plan.records]
    ledger = Ledger(plan.folder)
    ledger.record(name, "started")

    def launch() -> None:
        if open_trials or more:
            _tune(plan, open_trials, ledger, runs)
        with ThreadPoolExecutor(1, thread_name_prefix="report") as other:
            report = other.submit(lambda: Summary.of(plan.folder, target).write_report())
            disconnect()  # which mostly waits
            report.result()
        if plan.search is not None:
            print(plan.search.describe(), flush=True)
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


def _tune(plan: _Plan, open_trials: list[str], ledger: Ledger, runs: list[RunProgress]) -> None:
    """Run the trials as one Ray Tune experiment; returns when all ended, well or not.

    Those that a search adds are added to `runs`.
    """
    config = plan.config
    launcher = resolve_launcher(config.cluster, in_sweep=True)
    # Ray Train's cleaner of placement groups asks the dashboard which controllers live.
    capacity = connect(config, dashboard=launcher == "train", meanwhile="orchestrator.tune_callback")
    from ray import tune

    from orchestrator.tune_callback import LedgerCallback

    num_trials = len(open_trials) + (plan.search.left() * plan.definition["seeds"] if plan.search is not None else 0)
    configs = (override(RunConfig(), plan.records[trial_id].config) for trial_id in open_trials)
    streams = num_streams(configs) if config.cluster.share_crops else None
    concurrency = plan_concurrency(config, capacity, num_trials, streams)
    for trial_id in open_trials:
        (plan.run_dir(trial_id) / FAILURE_FILE).unlink(missing_ok=True)
    trials = {str(plan.run_dir(trial_id)): plan.records[trial_id] for trial_id in open_trials}

    def more() -> list[str]:
        added = {str(plan.run_dir(trial_id)): trial_id for trial_id in plan.ask()}
        trials.update({run_dir: plan.records[trial_id] for run_dir, trial_id in added.items()})
        runs.extend(RunProgress.of(plan.run_dir(trial_id), trial_id) for trial_id in added.values())
        return list(added)

    search: dict[str, Any] = {}
    space: dict[str, Any] = {"run_dir": tune.grid_search(list(trials)), "launcher": launcher}
    if plan.search is not None:
        from orchestrator.tune_search import RecordedSearch

        together = isinstance(plan.search, Population)
        algorithm = RecordedSearch(list(trials), more, launcher, together=together)
        space, search = {}, {"search_alg": algorithm, "num_samples": num_trials}
    tuner = tune.Tuner(
        tune.with_resources(tune_trial, trial_resources(config, launcher)),
        param_space=space,
        tune_config=tune.TuneConfig(
            **search,
            scheduler=make_scheduler(
                plan.definition, max(int(r.derived["total_steps"]) for r in plan.records.values())
            ),
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
