"""Population-based training (Jaderberg et al., arXiv 1711.09846): good weights are copied, settings change on the way.

Training is cut into generations. A generation of a member is a trial of its own, a segment: one configuration, from the
checkpoint of a parent at one step to the next boundary. When all segments of a generation have ended, the last members
(truncation selection) go on from one of the first and explore: their settings are those of the parent, perturbed or
drawn anew. All others go on as they are. Each decision is a function of the design's seed, generation, member and the
results, and on disk before anything acts upon it, so that a resumed sweep goes on as it would have. Imports no ray.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dino_core.config import ConfigError
from orchestrator.designs import Point, draw
from orchestrator.lineage import member_name
from orchestrator.metric_choice import Mode
from orchestrator.overrides import check_values, config_keys
from orchestrator.records import (
    CHECKPOINTS_DIR,
    TRIALS_DIR,
    AppendOnly,
    RunRecord,
    Segment,
    read_curves,
    read_lines,
    read_states,
)
from orchestrator.runs import Trial
from orchestrator.space import LogUniform, Space, Uniform, Values

if TYPE_CHECKING:
    import numpy as np

    from orchestrator.sweep import CheckedSweep, Sweep

POPULATION_FILE = "population.jsonl"
"""Every generation of a sweep's population, in order; appended before its trials are written."""

DESIGNS = ("grid", "random", "qmc")
"""Designs that can make the first generation."""

GENERATIONS_KEPT = 2
"""Whose checkpoints are not deleted: the newest generation's, and those that it goes on from."""

FACTORS = (0.8, 1.2)
"""Of a perturbed number (arXiv 1711.09846, section 4)."""
_SHARE = 0.1
"""Of a range without logarithms, by which its numbers move up or down."""
_MAX_DRAWS = 100
"""Perturbations of one configuration that may make no sense, before it stays as it is."""

_CAN_CHANGE = frozenset(
    (
        *(f"pretrain.optim.{name}" for name in ("lr", "min_lr", "weight_decay", "final_weight_decay", "clip_grad")),
        *(f"pretrain.teacher.{name}" for name in ("temp", "warmup_temp", "momentum", "final_momentum")),
        *("pretrain.teacher.center_momentum", "pretrain.teacher.sinkhorn_iters", "pretrain.student.temp"),
        *("pretrain.model.drop_path", "pretrain.crops.global_scale", "pretrain.crops.local_scale"),
        *(f"pretrain.crops.{name}" for name in ("flip_prob", "jitter_prob", "grayscale_prob", "solarize_prob")),
        *(f"pretrain.crops.{name}" for name in ("brightness", "contrast", "saturation", "hue")),
        *(f"pretrain.crops.{name}" for name in ("blur_prob", "blur_sigma")),
    )
)
"""Settings that every step reads anew: no weight, moment or place in the data hangs on them."""

_REASONS = {
    "pretrain.seed": "fixes weights and order of the images, which go over to another member with its checkpoint",
    "pretrain.batch_size": "decides which images a step has, so that no member could go on from another's step",
    "pretrain.steps": "is the length of the run, by which all members follow their schedules",
    "pretrain.epochs": "is the length of the run, by which all members follow their schedules",
    "pretrain.crops.global_size": "decides the shape of position embeddings, which another's checkpoint must fit",
    "pretrain.crops.local_size": "changes what a step costs, so that equal steps would be no equal budget",
    "pretrain.crops.num_local_crops": "changes what a step costs, so that equal steps would be no equal budget",
    "pretrain.model.": "decides the weights that there are, and another member's checkpoint must fit",
    "pretrain.head.": "decides the weights that there are, and another member's checkpoint must fit",
    "pretrain.predictor.": "decides the weights that there are, and another member's checkpoint must fit",
    "data.": "decides what the images are, and a member goes on where another stopped in them",
    "": "is no value that each step reads anew; within a run it stays as it is",
}


# ------------------------------------------------------------------------------------------------------- what is right


def population_problems(sweep: Sweep) -> list[str]:
    """What is wrong with the settings of a sweep by `scheduler = pbt`, each line opening with the setting."""
    problems = []
    if sweep.generation_steps is None:
        problems.append(
            "generation_steps = None: must be a whole number >= 1 when sweep.scheduler = pbt, the steps after which "
            "members are compared"
        )
    if sweep.design not in DESIGNS:
        problems.append(
            f"design = {sweep.design}: must be one of {', '.join(DESIGNS)} with sweep.scheduler = pbt; it makes the "
            "first generation, each configuration a member"
        )
    if sweep.rows:
        problems.append("scheduler = pbt: must be another one for a sweep with rows; a population is of one kind")
    if sweep.conditions:
        problems.append("conditions: must be none with sweep.scheduler = pbt, whose members all vary the same keys")
    if sweep.seeds > 1:
        problems.append(
            f"seeds = {sweep.seeds}: must be 1 with sweep.scheduler = pbt; run the sweep again with another "
            "pretrain.seed for another population"
        )
    return problems


def space_problems(space: Space) -> list[str]:
    """A line for each key that cannot change within a run, with the reason."""
    return [
        f"{key}: cannot vary with sweep.scheduler = pbt, it "
        + next(why for start, why in _REASONS.items() if key.startswith(start))
        for key in space.values
        if key not in _CAN_CHANGE
    ]


def launcher_problems(launcher: str | None, num_workers: int) -> list[str]:
    """Why the trials' launcher cannot run segments."""
    if launcher in (None, "trial") and num_workers == 1:
        return []
    return [
        f"cluster.launcher = {launcher or 'train'}: must be trial with sweep.scheduler = pbt, and cluster.num_workers "
        f"= {num_workers} must be 1; each segment would start a TorchTrainer of its own, which has not been tried"
    ]


def generations_of(sweep: Sweep, total_steps: int) -> int:
    """The generations of a run of that many steps; the last may be shorter. Raises ConfigError if it has no second."""
    assert sweep.generation_steps is not None
    if sweep.generation_steps >= total_steps:
        raise ConfigError(
            f"sweep.generation_steps = {sweep.generation_steps}: no member would ever be replaced; must be less than "
            f"the {total_steps} steps of a run"
        )
    return math.ceil(total_steps / sweep.generation_steps)


def describe_population(sweep: Sweep, members: int) -> str:
    """In a line."""
    out = num_replaced(members, sweep.exploit_quantile)
    return (
        f"pbt: {members} members; after every {sweep.generation_steps} steps the last {out} of them go on from one of "
        f"the first {out}, with settings perturbed or, with probability {sweep.resample_prob:g}, drawn anew"
    )


# ----------------------------------------------------------------------------------------------------------- decisions


@dataclass(frozen=True)
class Member:
    """A member of the population in one generation."""

    trial: str
    point: Point
    """Values of the keys that vary."""
    parent: str | None = None
    """Trial of the generation before that it goes on from; None in the first."""


def num_replaced(members: int, quantile: float) -> int:
    """How many members of a generation go on from another one, none of which failed."""
    return min(math.ceil(quantile * members), members // 2)


def explore(space: Space, point: Point, rng: np.random.Generator, resample_prob: float) -> Point:
    """A configuration near another one: each value perturbed or, with some probability, drawn anew."""
    found = {}
    for key, values in space.values.items():
        anew, up, share = rng.random() < resample_prob, rng.random() < 0.5, rng.random()
        found[key] = draw(values, share) if anew else _beside(values, point[key], up=up)
    return found


def _beside(values: Values, value: Any, *, up: bool) -> Any:
    """The next value of a list, or a number times one of `FACTORS`, within its range.

    A number of a range without logarithms moves by a tenth of the range: x 1.2 means nothing to a momentum of 0.99.
    """
    if isinstance(values, list):
        place = values.index(value)
        other = place + (1 if up else -1)
        return values[other if 0 <= other < len(values) else max(0, min(2 * place - other, len(values) - 1))]
    factor = FACTORS[up]
    if isinstance(values, LogUniform):
        return values.rounded(value * factor)
    way = 1 if up else -1
    if isinstance(values, Uniform):
        return values.rounded(value + way * _SHARE * (values.high - values.low))
    apart = abs(value * factor - value) if values.log else _SHARE * (values.high - values.low)
    moved = value + way * max(values.step, round(apart / values.step) * values.step)
    return max(values.low, min(moved, values.high))


def next_generation(
    checked: CheckedSweep, generation: int, members: Sequence[Member], scores: Sequence[float | None], mode: Mode
) -> list[tuple[Point, str]]:
    """What each member goes on with, and from whose checkpoint: its own trial's, or that of one that is replacing it.

    Args:
        generation: The new one, from 1.
        members: Of the generation before.
        scores: Of each, the metric at its end; None of one that failed or was stopped, which never goes on.

    Raises:
        ValueError: None of them has a score.
    """
    import numpy as np

    sweep, sign = checked.sweep, -1.0 if mode == "max" else 1.0
    scored = [(sign * score, place) for place, score in enumerate(scores) if score is not None]
    if not scored:
        raise ValueError(f"no member has ended generation {generation - 1} with a score")
    ranked = [place for _, place in sorted(scored)]
    count = num_replaced(len(members), sweep.exploit_quantile)
    failed = [place for place in range(len(members)) if scores[place] is None]
    replaced = {*failed, *ranked[max(1, len(ranked) - max(0, count - len(failed))) :]}
    first = [place for place in ranked[: max(1, count)] if place not in replaced]
    found = []
    for place, member in enumerate(members):
        if place not in replaced:
            found.append((member.point, member.trial))
            continue
        rng = np.random.default_rng([sweep.design_seed, generation, place])
        parent = members[first[int(rng.integers(len(first)))]]
        found.append((_explored(checked, parent.point, rng), parent.trial))
    return found


def _explored(checked: CheckedSweep, point: Point, rng: np.random.Generator) -> Point:
    """The first perturbation of which the settings go together."""
    (row,) = checked.rows
    for _ in range(_MAX_DRAWS):
        found = explore(checked.space, point, rng, checked.sweep.resample_prob)
        try:
            checked.trial(row, found, 0)
        except ConfigError:
            continue
        return found
    return point


# --------------------------------------------------------------------------------------------------------- on the disk


def as_member(trial: Trial, segment: Segment) -> Trial:
    """A trial as a segment of a population; its name says which."""
    name = f"{member_name(segment.member)}-g{segment.generation:02d}-s{trial.seed}"
    return replace(trial, trial_id=name, segment=segment)


def first_generation(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """The configurations of the design as members. Raises ConfigError if they are too few."""
    assert sweep.generation_steps is not None
    if len(trials) < 2:
        raise ConfigError(
            f"sweep.space: makes a population of {len(trials)}; must make 2 members or more with sweep.scheduler = pbt"
        )
    stop = sweep.generation_steps
    return [
        as_member(trial, Segment(member=member, generation=0, start_step=0, stop_step=stop))
        for member, trial in enumerate(trials)
    ]


@dataclass
class Population:
    """The population of a sweep in its folder: the records there are its state."""

    checked: CheckedSweep
    folder: Path
    metric: str
    mode: Mode
    prepare: Callable[[Trial], RunRecord]
    """The record of a new trial. Raises ConfigError if it cannot run."""
    unit: ClassVar[str] = "that go on from these"
    """What `left` counts."""

    def begin(self, records: Mapping[str, RunRecord]) -> None:
        """Write down the first generation."""
        self._append([Member(trial_id, record.changes) for trial_id, record in records.items()], {})

    def ask(self) -> list[tuple[Trial, RunRecord]]:
        """The trials of the next generation with their records, noted but not yet written; none at the end.

        To be called when every trial of the newest generation has ended. What is noted is tried: `lost` finds it where
        the driver died before it had written the records. Checkpoints that nobody can go on from any more are deleted:
        those of all generations but the new one's parents.
        """
        generations = self._generations()
        members, generation = generations[-1], len(generations)
        if generation >= generations_of(self.checked.sweep, self._total_steps):
            return []
        scores = self._scores(members)
        if all(score is None for score in scores):
            return []
        decided = next_generation(self.checked, generation, members, scores, self.mode)
        names = [
            self._trial(member, generation, point, parent).trial_id for member, (point, parent) in enumerate(decided)
        ]
        following = [Member(name, point, parent) for name, (point, parent) in zip(names, decided, strict=True)]
        self._append(following, {member.trial: score for member, score in zip(members, scores, strict=True)})
        for old in itertools.chain(*generations[: 1 - GENERATIONS_KEPT]):
            shutil.rmtree(self.folder / TRIALS_DIR / old.trial / CHECKPOINTS_DIR, ignore_errors=True)
        return self._with_records(following, generation)

    def lost(self, known: Collection[str]) -> list[tuple[Trial, RunRecord]]:
        """Trials that were noted and are not among the `known` ids, with their records."""
        return [
            (trial, record)
            for generation, members in enumerate(self._generations())
            if not all(member.trial in known for member in members)
            for trial, record in self._with_records(members, generation)
            if trial.trial_id not in known
        ]

    def left(self) -> int:
        """How many segments are still to be decided upon."""
        generations = self._generations()
        return len(generations[-1]) * (generations_of(self.checked.sweep, self._total_steps) - len(generations))

    def describe(self) -> str:
        """What was done, in a line."""
        generations, count = self._generations(), generations_of(self.checked.sweep, self._total_steps)
        taken = sum(
            member.parent != before.trial
            for older, newer in itertools.pairwise(generations)
            for before, member in zip(older, newer, strict=True)
        )
        text = f"population: {len(generations)} of {count} generations, {taken} times a member replaced"
        failed = len(generations) < count and not any(score is not None for score in self._scores(generations[-1]))
        return text + (f"; no member has ended the last one with a value of {self.metric}" if failed else "")

    @cached_property
    def _total_steps(self) -> int:
        """Of a run; the same for all members, of which none can vary what it depends on."""
        first = self._generations()[0][0]
        return int(RunRecord.read(self.folder / TRIALS_DIR / first.trial).derived["total_steps"])

    def _trial(self, member: int, generation: int, point: Point, parent: str | None) -> Trial:
        (row,) = self.checked.rows
        length = self.checked.sweep.generation_steps
        assert length is not None
        start, stop = generation * length, min((generation + 1) * length, self._total_steps)
        segment = Segment(member=member, generation=generation, start_step=start, stop_step=stop, parent=parent)
        return as_member(self.checked.trial(row, point, 0), segment)

    def _with_records(self, members: Sequence[Member], generation: int) -> list[tuple[Trial, RunRecord]]:
        trials = [self._trial(place, generation, each.point, each.parent) for place, each in enumerate(members)]
        return [(trial, self.prepare(trial)) for trial in trials]

    def _scores(self, members: Sequence[Member]) -> list[float | None]:
        """Of each member, the metric's last value, if it finished with a finite one."""
        states = read_states(self.folder)
        scores: list[float | None] = []
        for member in members:
            state = states.get(f"{self.folder.name}.{member.trial}")
            curve = read_curves(self.folder / TRIALS_DIR / member.trial).get(self.metric)
            counts = state is not None and state.event == "finished" and curve and math.isfinite(curve[-1][1])
            scores.append(curve[-1][1] if curve and counts else None)
        return scores

    def _generations(self) -> list[list[Member]]:
        return [[_read(each) for each in line["members"]] for _, line in read_lines(self.folder / POPULATION_FILE)]

    def _append(self, members: Sequence[Member], scores: Mapping[str, float | None]) -> None:
        file = AppendOnly(self.folder / POPULATION_FILE)
        file.append({"scores": dict(scores), "members": [asdict(member) for member in members]}, durable=True)
        file.close()


def _read(line: Mapping[str, Any]) -> Member:
    typed, problems = check_values(config_keys(), line["point"])
    if problems:
        raise ConfigError("\n".join(f"{POPULATION_FILE}: {problem}" for problem in problems))
    return Member(line["trial"], typed, line["parent"])
