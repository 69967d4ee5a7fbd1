"""Writes what Tune decides about the trials into the sweep's ledger."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune

from orchestrator.records import Ledger, RunRecord
from orchestrator.stoppers import read_stop, stop_of
from orchestrator.worker import read_failure

if TYPE_CHECKING:
    from ray.tune.experiment import Trial


class LedgerCallback(tune.Callback):
    """Runs in the driver, in Tune's loop.

    Args:
        ledger: Of the sweep.
        records: Run folder (as in the trials' parameters) to the run's record.
        scheduler: Who ends trials before their last step, unless they ended themselves.
    """

    def __init__(self, ledger: Ledger, records: Mapping[str, RunRecord], scheduler: str) -> None:
        self._ledger = ledger
        self._records = records
        self._scheduler = scheduler

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune keeps a copy of its callbacks for `Tuner.restore`, which is never used here."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._ledger.record(self._record(trial).run_id, "started")

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        record = self._record(trial)
        run_dir = Path(trial.config["run_dir"])
        failure, stop = read_failure(run_dir), read_stop(run_dir)
        step = int((trial.last_result or {}).get("step", 0))
        if failure is not None:
            self._ledger.record(record.run_id, "failed", failure)
        elif stop is not None or step < record.last_step:
            if stop is None:
                stop = stop_of(run_dir, self._scheduler, step)
                stop.write(run_dir)
            self._ledger.record(record.run_id, "stopped", stop.reason, stop.numbers)
        else:
            self._ledger.record(record.run_id, "finished")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        failure = read_failure(Path(trial.config["run_dir"]))
        if failure is None:
            error = trial.get_error()
            failure = "unknown error" if error is None else str(error).strip().splitlines()[-1]
        self._ledger.record(self._record(trial).run_id, "failed", failure)

    def _record(self, trial: Trial) -> RunRecord:
        return self._records[trial.config["run_dir"]]
