"""How the weights of a population's member came to be: its segments, each from the checkpoint of the one before.

A segment (`records.Segment`) is one generation of one member and a trial of its own, with one configuration. What ranks
is each member's newest segment, with the curves of all that its weights have been through. Imports neither ray nor
torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.records import RunRecord, read_curves

if TYPE_CHECKING:
    from orchestrator.trials import TrialSummary

Curves = Mapping[str, Sequence[tuple[int, float]]]

_SUMS = ("cost/device_hours", "time/")
"""Metrics that count up from 0 in each segment."""


def lineage_curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """The metrics of a run and, of a segment, of all those before it that its weights went through."""
    record = RunRecord.read(run_dir)
    if record.segment is None or record.segment.parent is None:
        return read_curves(run_dir)
    before = lineage_curves(run_dir.parent / record.segment.parent)
    return continued(before, read_curves(run_dir), record.segment.start_step)


def continued(before: Curves, own: Curves, start_step: int) -> dict[str, list[tuple[int, float]]]:
    """The curves of a segment behind those of its parent, of which later steps do not count.

    Where both have the step in between, such as an evaluation after the parent's last step and before the own first
    one, the own value stands. Device-hours and times add up.
    """
    found = {}
    for name in dict.fromkeys([*before, *own]):
        earlier = [(step, value) for step, value in before.get(name, ()) if step <= start_step]
        spent = earlier[-1][1] if earlier and name.startswith(_SUMS) else 0.0
        points = dict(earlier) | {step: spent + value for step, value in own.get(name, ())}
        found[name] = sorted(points.items())
    return found


def newest_segments(trials: Iterable[TrialSummary]) -> list[TrialSummary]:
    """Of every member of a population its newest segment, with its lineage and the curves of all of it.

    Other trials stay as they are, and so does a segment whose parent is not among them.
    """
    trials = list(trials)
    by_name = {(trial.sweep, trial.name): trial for trial in trials if trial.segment is not None}
    newest: dict[tuple[str, int], TrialSummary] = {}
    for trial in by_name.values():
        assert trial.segment is not None
        there = newest.setdefault((trial.sweep, trial.segment.member), trial)
        if there.segment is not None and there.segment.generation < trial.segment.generation:
            newest[trial.sweep, trial.segment.member] = trial
    shown = {id(trial) for trial in newest.values()}
    return [_with_lineage(trial, by_name) for trial in trials if trial.segment is None or id(trial) in shown]


def _with_lineage(trial: TrialSummary, by_name: Mapping[tuple[str, str], TrialSummary]) -> TrialSummary:
    segments = [trial]
    while (first := segments[0].segment) is not None and first.parent is not None:
        parent = by_name.get((trial.sweep, first.parent))
        if parent is None:
            return trial
        segments.insert(0, parent)
    if len(segments) == 1:
        return trial
    curves: Curves = {}
    for each in segments:
        assert each.segment is not None
        curves = continued(curves, each.curves, each.segment.start_step)
    return replace(trial, curves={name: list(points) for name, points in curves.items()}, lineage=tuple(segments[:-1]))


def in_words(trial: TrialSummary) -> str:
    """Which members trained the weights of a trial, with the steps: `m02 0-100, m00 100-200`; empty for others."""
    parts: list[tuple[int, int, int]] = []
    for each in (*trial.lineage, trial):
        if each.segment is None:
            return ""
        member, start, stop = each.segment.member, each.segment.start_step, each.segment.stop_step
        if parts and parts[-1][0] == member:
            start = parts.pop()[1]
        parts.append((member, start, stop))
    return ", ".join(f"{member_name(member)} {start}-{stop}" for member, start, stop in parts)


def member_name(member: int) -> str:
    """What a member of a population is called."""
    return f"m{member:02d}"
