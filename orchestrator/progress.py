"""What a user sees while runs go on: one live table on a terminal, plain lines where the output is not one.

Everything shown is read from the records on disk, so it is the same for every launcher.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from orchestrator.records import METRICS_FILE, RunRecord, read_lines, read_states

PLAIN_EVERY_S = 10.0
"""Seconds between two plain lines of a run that is under way."""

_SHOWN = {
    "train/loss": "loss",
    "eval/knn_top1": "k-NN %",
    "train/teacher_entropy": "entropy",
    "train/images_per_s": "images/s",
}


@dataclass
class RunProgress:
    """The newest values of one run, read from its journal as it grows."""

    run_id: str
    folder: Path
    label: str
    total_steps: int
    batch_size: int
    num_prototypes: int | None
    state: str = "waiting"
    step: int = 0
    values: dict[str, float] = field(default_factory=dict)
    last_record: float | None = None
    """Unix time of the newest record that this process has seen."""
    _offset: int = 0

    @classmethod
    def of(cls, folder: Path, label: str) -> RunProgress:
        record = RunRecord.read(folder)
        return cls(
            run_id=record.run_id,
            folder=folder,
            label=label,
            total_steps=record.last_step,
            batch_size=record.config["pretrain.batch_size"],
            num_prototypes=record.config["pretrain.head.num_prototypes"],
        )

    def refresh(self) -> bool:
        """Read what is new; True if there was something."""
        start = self._offset
        for offset, record in read_lines(self.folder / METRICS_FILE, start):
            self._offset = offset
            self.step = max(self.step, record["step"])
            self.values.update(record["metrics"])
            self.last_record = record["time"]
        return self._offset > start

    @property
    def seconds_left(self) -> float | None:
        rate = self.values.get("train/images_per_s")
        return (self.total_steps - self.step) * self.batch_size / rate if rate else None

    def cells(self) -> list[str]:
        """Texts for step, loss, k-NN, entropy, images/s and time left."""
        values = self.values
        entropy = values.get("train/teacher_entropy")
        share = ""
        if entropy is not None and self.num_prototypes is not None:
            share = f"{entropy:.2f} ({100 * entropy / math.log(self.num_prototypes):.0f} %)"
        left = self.seconds_left if self.state == "running" else None
        return [
            f"{self.step}/{self.total_steps}",
            f"{values['train/loss']:.3f}" if "train/loss" in values else "",
            f"{values['eval/knn_top1']:.1f}" if "eval/knn_top1" in values else "",
            share,
            f"{values['train/images_per_s']:.0f}" if "train/images_per_s" in values else "",
            "" if left is None else f"{int(left // 60)}:{int(left % 60):02d}",
        ]


class Progress:
    """The display of all runs in one ledger. Use as a context manager and call `update` about once a second.

    Args:
        folder: Where the ledger is.
        runs: The runs to show, in order.
        output: Where to write; a live table if it is a terminal.
    """

    def __init__(self, folder: Path, runs: list[RunProgress], output: TextIO | None = None) -> None:
        self.folder = folder
        self.runs = runs
        self._console = Console(file=output or sys.stdout, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._said: dict[str, tuple[str, float]] = {}
        self._begin = time.monotonic()

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live = Live(self._table(), console=self._console, auto_refresh=False)
            self._live.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.update()
        if self._live is not None:
            self._live.__exit__(None, None, None)

    def say(self, text: str) -> None:
        """One line above the table, or among the plain lines."""
        self._console.print(text if self._live is not None else f"[{self._clock()}] {text}", markup=False)

    def update(self) -> None:
        """Read what is new and show it."""
        states = read_states(self.folder)
        for run in self.runs:
            run.refresh()
            if run.run_id in states:
                event = states[run.run_id].event
                run.state = "running" if event == "started" else event
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        else:
            for run in self.runs:
                self._say_plainly(run)

    def _say_plainly(self, run: RunProgress) -> None:
        state, moment = self._said.get(run.run_id, ("waiting", 0.0))
        due = run.state == "running" and run.last_record and time.monotonic() - moment >= PLAIN_EVERY_S
        if run.state == state and not due:
            return
        self._said[run.run_id] = (run.state, time.monotonic())
        step, *cells, left = run.cells()
        named = [f"{name} {cell}" for name, cell in zip(_SHOWN.values(), cells, strict=True) if cell]
        parts = [f"{run.label}: {run.state}", f"step {step}", *named, *([f"{left} left"] if left else [])]
        self._console.print(f"[{self._clock()}] " + ", ".join(parts), markup=False)

    def _clock(self) -> str:
        elapsed = time.monotonic() - self._begin
        return f"{int(elapsed // 60):02d}:{int(elapsed % 60):02d}"

    def _table(self) -> Table:
        done = sum(run.state in ("finished", "stopped", "failed") for run in self.runs)
        title = f"{self.folder.name}: {done} of {len(self.runs)} runs done, {self._clock()}"
        table = Table(title=title, title_justify="left", title_style="bold")
        for name in ("run", "status", "step", "loss", "k-NN %", "entropy (of ln K)", "images/s", "left"):
            table.add_column(name, justify="left" if name in ("run", "status") else "right", no_wrap=True)
        colours = {
            "running": "cyan",
            "finished": "green",
            "stopped": "yellow",
            "failed": "red",
            "interrupted": "yellow",
        }
        for run in self.runs:
            colour = colours.get(run.state, "dim")
            table.add_row(run.label, f"[{colour}]{run.state}[/]", *run.cells())
        return table
