"""Ends runs that have collapsed, and books the device-hours that a run that was stopped early did not take.

The verdict is that of `dino_core.diagnosis`, made again at every logged step from what was logged so far. Imports
neither ray nor torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dino_core.config import PretrainConfig
from dino_core.diagnosis import Diagnosis, Verdict, diagnose
from dino_core.schedules import Schedules
from orchestrator.config import RunConfig
from orchestrator.overrides import override
from orchestrator.records import RunRecord, read_curves, read_json, write_json

NUM_REPORTS = 2
"""Logged steps in a row at which the same verdict must be made. One verdict already rests upon the last three points,
each the median of three (`dino_core.diagnosis.SUSTAINED_POINTS`)."""

STOPPED_FILE = "stopped.json"
"""Who ended a run early, when, and what that saved. Attempts that find it return at once."""

_SPEED, _USED = "train/images_per_s", "cost/device_hours"


def first_judged_step(config: PretrainConfig, schedules: Schedules) -> int:
    """The step at which learning has begun in earnest: the rate has warmed up and the prototypes move.

    Before it the outputs of a large network can be nearly the same for all images, which is no collapse.
    """
    warmup_steps = round(config.optim.warmup_epochs * schedules.steps_per_epoch)
    return max(warmup_steps, schedules.freeze_last_layer_steps)


class CollapseStopper:
    """Watches the metrics of one run as they are logged.

    Args:
        config: Of the run.
        first_step: Steps before this one are looked at but not judged.
        curves: What earlier attempts logged. Steps up to its last are not counted again when they are repeated.
    """

    def __init__(
        self,
        config: PretrainConfig,
        first_step: int = 0,
        curves: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    ) -> None:
        self._config = config
        self._first_step = first_step
        self._curves = {name: list(points) for name, points in (curves or {}).items()}
        self._last_step = max((step for step, _ in self._curves.get("train/loss", ())), default=-1)
        self._verdict: Verdict | None = None
        self._times = 0

    def observe(self, step: int, metrics: Mapping[str, float]) -> Diagnosis | None:
        """The diagnosis, if the run should end here: the same collapse at `NUM_REPORTS` logged steps in a row."""
        if "train/loss" not in metrics or step <= self._last_step:
            return None
        self._last_step = step
        for name, value in metrics.items():
            self._curves.setdefault(name, []).append((step, value))
        if step < self._first_step:
            return None
        found = diagnose(self._curves, self._config)
        self._times = self._times + 1 if found.verdict == self._verdict else 1
        self._verdict = found.verdict
        return found if found.is_bad and self._times >= NUM_REPORTS else None


class Collapsed(Exception):
    """Leaves the training loop of a run that has collapsed."""

    def __init__(self, step: int, diagnosis: Diagnosis) -> None:
        super().__init__(step, diagnosis)
        self.step = step
        self.diagnosis = diagnosis


@dataclass(frozen=True, kw_only=True)
class Stop:
    """How a run was ended early. A device is a GPU or, on a machine without, a CPU core of a training process."""

    by: str
    """`collapse`, or the sweep's scheduler: `asha`, `median`, ..."""
    step: int
    """Last one logged."""
    total_steps: int
    device_hours: float
    """Taken up to there."""
    device_hours_saved: float
    """Estimate of the rest: steps left x median seconds per step x devices. Evaluations do not count."""
    verdict: str = ""
    """Of a collapse: which."""
    since_step: int | None = None
    evidence: tuple[str, ...] = ()
    cause: str = ""

    @property
    def reason(self) -> str:
        """In words, for the ledger."""
        where = f"at step {self.step} of {self.total_steps}"
        hours = f"{self.device_hours:.3g} device-hours taken, about {self.device_hours_saved:.3g} saved"
        if self.by != "collapse":
            return f"by the scheduler ({self.by}) {where}; {hours}"
        evidence = "; ".join(self.evidence)
        return f"{self.verdict} since step {self.since_step}, ended {where}: {evidence}; {hours}"

    @property
    def numbers(self) -> dict[str, float]:
        """As metrics."""
        return {"cost/device_hours_saved": self.device_hours_saved}

    def write(self, run_dir: Path) -> None:
        write_json(run_dir / STOPPED_FILE, asdict(self))


def read_stop(run_dir: Path) -> Stop | None:
    """How the run was ended early, or None if it was not.

    Raises:
        ConfigError: The file is damaged.
    """
    path = run_dir / STOPPED_FILE
    if not path.exists():
        return None
    saved = read_json(path)
    return Stop(**saved | {"evidence": tuple(saved["evidence"])})


def stop_of(run_dir: Path, by: str, step: int, diagnosis: Diagnosis | None = None) -> Stop:
    """What ending a run at `step` comes to, from its record and journal."""
    record = RunRecord.read(run_dir)
    config = override(RunConfig(), record.config)
    total_steps = record.last_step
    curves = read_curves(run_dir)
    hours_per_step = _seconds_per_step(config, curves) * config.cluster.num_devices / 3600
    used = curves.get(_USED)
    found = diagnosis or Diagnosis("unknown")
    return Stop(
        by=by,
        step=step,
        total_steps=total_steps,
        device_hours=used[-1][1] if used else step * hours_per_step,
        device_hours_saved=max(total_steps - step, 0) * hours_per_step,
        verdict=found.verdict if found.is_bad else "",
        since_step=found.step,
        evidence=found.evidence if found.is_bad else (),
        cause=found.cause,
    )


def _seconds_per_step(config: RunConfig, curves: Mapping[str, Sequence[tuple[int, float]]]) -> float:
    """Median over the logged steps, the first of which holds the start; 0 where none was logged."""
    speeds = [value for _, value in curves.get(_SPEED, ()) if value > 0]
    speeds = speeds[1:] or speeds
    return config.pretrain.batch_size / statistics.median(speeds) if speeds else 0.0
