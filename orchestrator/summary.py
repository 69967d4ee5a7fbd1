"""What is left at the end of a run or sweep: the report, and the closing words on the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from orchestrator.compare import KNN_METRIC, Comparison, compare
from orchestrator.data.sources import DIGITS
from orchestrator.metric_choice import choice_for_trials
from orchestrator.records import BAD_SAMPLES_FILE, REPORT_FILE, read_lines
from orchestrator.report import SMOKE_TEST, write_report
from orchestrator.tables import render, rich_tables
from orchestrator.tracking import Target
from orchestrator.trials import common_definition, load_from_disk

RAW_PIXELS = "eval/raw_pixel_knn_top1"


def baselines(comparison: Comparison) -> dict[str, float]:
    """k-NN of what was not learned, in per cent: the same backbone with random weights, and the pixels themselves.

    Nothing where trials are compared by something else.
    """
    found: dict[str, float] = {}
    if comparison.metric != KNN_METRIC:
        return found
    if comparison.random_weights is not None:
        found["same backbone, random weights"] = comparison.random_weights
    pixels = [value for row in comparison.rows if (value := row.trial.at(RAW_PIXELS, 0)) is not None]
    if pixels:
        found["raw pixels"] = pixels[0]
    return found


@dataclass(frozen=True)
class Summary:
    """What a folder of records comes to."""

    folder: Path
    comparison: Comparison
    baselines: dict[str, float]
    notes: tuple[str, ...]
    open_command: str

    @classmethod
    def of(cls, folder: Path, target: Target) -> Summary:
        """Read a sweep's or a run's folder."""
        trials = load_from_disk(folder)
        definition = common_definition(trials)
        choice = choice_for_trials(trials, definition)
        base = (definition or {}).get("base")
        comparison = compare(trials, choice.metric, choice.mode, base=base, why=choice.why)
        notes = [SMOKE_TEST] if any(trial.params.get("data.source") == DIGITS for trial in trials) else []
        for path in sorted(folder.rglob(BAD_SAMPLES_FILE)):
            count = sum(1 for _ in read_lines(path))
            notes.append(f"Unreadable images were skipped: {count}, listed in {path}.")
        return cls(folder, comparison, baselines(comparison), tuple(notes), target.open_command())

    def write_report(self) -> Path:
        """Write the self-contained HTML report into the folder."""
        return write_report(
            self.folder / REPORT_FILE,
            self.comparison,
            title=self.folder.name,
            baselines=self.baselines,
            notes=self.notes,
            commands={"Open MLflow": self.open_command},
        )

    def print(self) -> None:
        """The ranked trials beside the baselines, and where to look next."""
        console = Console(highlight=False, soft_wrap=True)
        if console.is_terminal:
            console.print(*rich_tables(self.comparison))
        else:
            console.print(render(self.comparison, "table"), markup=False)
        for name, value in self.baselines.items():
            console.print(f"k-NN {value:5.1f} %  {name}", markup=False)
        for trial in (row.trial for row in self.comparison.rows if row.trial.diagnosis.is_bad):
            found = trial.diagnosis
            console.print(f"{trial.name}: {found.verdict} from step {found.step}: {found.cause}", markup=False)
        for note in self.notes:
            console.print(note, markup=False)
        console.print(f"report:  {self.folder / REPORT_FILE}\nMLflow:  {self.open_command}", markup=False)
