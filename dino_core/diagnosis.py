"""Did this run learn, or how did it collapse? From the curves of its logged metrics to a verdict. No torch here.

`diagnostics.py` makes what is logged, `causes.py` says what may be to blame, docs/diagnosis.md explains all of it. A
collapse is only called one when two signals agree, and from the step from which they did so to the end.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from dino_core.causes import likely_cause
from dino_core.config import PretrainConfig

Verdict = Literal["healthy", "uniform collapse", "one-hot collapse", "dimensional collapse", "diverged", "unknown"]
Curves = Mapping[str, Sequence[tuple[int, float]]]

SUSTAINED_POINTS = 3
"""Logged points at the end over which the signals must agree; a run with fewer has no verdict. Each is the median of
three, so that one odd batch neither makes nor hides a collapse."""
UNIFORM_SHARE = 0.98
"""Teacher entropy from which the targets are uniform, as a share of ln K (DINO, figure 7: without sharpening it rises
to 1). Healthy runs on the digits end between 0.43 and 0.83, those without sharpening above 0.997."""
HIGH_SHARE = 0.5
"""Teacher entropy from which targets that say nothing of their image are nearer to uniform than to one-hot."""
NEAR_UNIFORM_SHARE = 0.02
"""Distance of a loss from that of uniform outputs at which it has learned nothing, as a share of the latter. The same
margin as that of the entropy: the loss is h + KL, so the two agree where student and teacher do."""
NO_INFORMATION_SHARE = 0.01
"""What a target tells of its image, ln(usage) - h, below which all images have one target, as a share of ln K. Healthy
runs on the digits end at 0.17; without batch norm in the head it is 0 long before the entropy reaches ln K."""
ONE_HOT_SHARE = 0.02
"""Teacher entropy below which the targets are one-hot, as a share of ln K (figure 7: it falls to 0)."""
ONE_HOT_USAGE = 2.0
"""Prototypes in use up to which all images share one; the digits without centring end at 1.0, healthy at 98 of 256."""
LOW_LOSS_SHARE = 0.1
"""Loss up to which the student has nothing left to predict, as a share of that of uniform outputs. For cross-entropy it
stands in for the usage in records from before that was logged; there the digits end at 0.03 without centring."""
ALIKE_STD = 0.1
"""Spread of the teacher's outputs below which all images are alike, where 1 is fully spread. On the digits mse without
batch norm ends at 0.002, healthy runs of mse and info_nce between 0.67 and 0.92."""
RANK_SHARE, STD_SHARE = 0.5, 0.25
"""Rank and spread of the features, as shares of those at the first logged step, below which they fell. Features of
random weights have low ones already (digits: 10 of 64, and 0.22), so only the start tells what is little. Healthy runs
on the digits stay above 0.68 and 0.52; the collapses there that the targets do not
cause take the spread to 0.2 or less."""
LOW_RANK = 3.0
"""Rank at which the features hardly fill more than a plane, whatever it was at the start."""
LOW_STD = 0.05
"""Spread at which all features point the same way, whatever it was at the start. Wrecked by a hundredfold learning rate
the digits end at 0.04; healthy at 0.13 or more."""
DIVERGED_SHARE = 0.25
"""Loss above that of uniform outputs, as a share of the latter, from which a run that is still rising has diverged."""
EXPLODED_GRADIENT = 100.0
"""Gradient norm, as a multiple of its median over the first points, that has exploded: two orders of magnitude."""
NUM_EARLY_POINTS = 10
"""Logged points that say what a gradient norm is usual."""


@dataclass(frozen=True)
class Diagnosis:
    """A verdict on a run."""

    verdict: Verdict
    step: int | None = None
    """First logged step from which the verdict held to the end; None for `healthy` and `unknown`."""
    evidence: tuple[str, ...] = ()
    """What the verdict rests upon, a phrase each, with numbers."""
    cause: str = ""
    """The likely cause and what to try; empty for `healthy` and `unknown`."""

    @property
    def is_bad(self) -> bool:
        """Whether the run collapsed or diverged."""
        return self.verdict not in ("healthy", "unknown")


def diagnose(curves: Curves, config: PretrainConfig, *, reason: str = "") -> Diagnosis:
    """The verdict on a run, or on what there is of it so far.

    Args:
        curves: (step, value) pairs by step, of each metric that was logged, under its name (`train/loss`, ...).
            Metrics that are missing, as in older records, count neither for nor against.
        config: of the run: its loss, and what may be the cause.
        reason: why the run failed, where it did; a loss that is not finite ends a run before it is logged.
    """
    found = _not_finite(curves, reason)
    signs: list[str] = []
    for run in _runs(curves, config) if found is None else ():
        if len(run.steps) < SUSTAINED_POINTS:
            return Diagnosis("unknown", evidence=(f"{len(run.steps)} logged steps: needs {SUSTAINED_POINTS}",))
        found = _worst(run)
        if found is not None:
            verdict, step, evidence = found
            found = verdict, step, tuple(run.words + phrase for phrase in evidence)
            break
        needed = "train/teacher_entropy" if config.loss.name == "cross_entropy" else "train/target_std"
        if run.last.value(needed) is None:
            return Diagnosis("unknown", evidence=(f"{needed} was not logged",))
        signs += [run.words + sign for sign in _signs_of_health(run.last)]
    if found is None:
        return Diagnosis("healthy", evidence=tuple(signs))
    verdict, step, evidence = found
    return Diagnosis(verdict, step, evidence, likely_cause(verdict, config))


def _runs(curves: Curves, config: PretrainConfig) -> list[_Run]:
    """The run as its class tokens show it and as its masked patches do: the same signals, each under one name."""
    runs = []
    if config.loss.weight:
        own = {"train/loss": curves["train/class_loss"]} if "train/class_loss" in curves else {}
        runs.append(_Run({**curves, **own}, config))
    if config.ibot.weight:
        prototypes = (
            config.ibot.num_prototypes if config.ibot.head != "shared" else None
        ) or config.head.num_prototypes
        assert prototypes is not None
        names = ("teacher_entropy", "kl", "prototype_usage", "loss_below_uniform")
        own = {f"train/{name}": curves.get(f"train/patch_{name}", ()) for name in names}
        below = curves.get("train/patch_loss_below_uniform", ())
        own["train/loss"] = [(step, math.log(prototypes) - value) for step, value in below]
        shared = {name: curve for name, curve in curves.items() if name != "train/target_std"}
        head = dataclasses.replace(config.head, num_prototypes=prototypes)
        patches = dataclasses.replace(config.ibot, num_prototypes=None, bottleneck_dim=None)
        runs.append(_Run({**shared, **own}, dataclasses.replace(config, head=head, ibot=patches), "patches: "))
    return runs


_Found = tuple[Verdict, int, tuple[str, ...]]


def _not_finite(curves: Curves, reason: str) -> _Found | None:
    losses = curves.get("train/loss", ())
    if bad := next(((step, value) for step, value in losses if not math.isfinite(value)), None):
        return "diverged", bad[0], (f"the loss of step {bad[0]} is {bad[1]}",)
    if said := re.search(r"the loss of step (\d+) is (?:-?inf|nan)", reason):
        return "diverged", int(said[1]), (said[0],)
    if "not finite" in reason:  # weights or features, found by a checkpoint or an evaluation after the last loss
        return "diverged", losses[-1][0] if losses else 0, (reason.splitlines()[0],)
    return None


class _Moment:
    """The metrics around one logged step."""

    def __init__(self, run: _Run, step: int) -> None:
        self.run = run
        self.step = step

    def value(self, name: str) -> float | None:
        """The metric's median over the last three points up to here; None if it was not logged by then."""
        curve = self.run.curves.get(name, ())
        end = bisect.bisect_right(curve, self.step, key=lambda point: point[0])
        values = [value for _, value in curve[max(0, end - 3) : end] if not math.isnan(value)]
        return statistics.median(values) if values else None

    def start(self, name: str) -> float | None:
        """The metric at its first logged step."""
        return next((value for _, value in self.run.curves.get(name, ()) if not math.isnan(value)), None)

    @property
    def entropy_share(self) -> float | None:
        """Teacher entropy as a share of ln K."""
        entropy, prototypes = self.value("train/teacher_entropy"), self.run.config.head.num_prototypes
        return None if entropy is None or prototypes is None else entropy / math.log(prototypes)

    @property
    def uniform_loss(self) -> float | None:
        """The loss of outputs that tell nothing apart."""
        config = self.run.config
        if config.loss.name == "mse":
            return 2.0  # unit vectors at right angles
        if config.loss.name == "cross_entropy":
            return None if config.head.num_prototypes is None else math.log(config.head.num_prototypes)
        loss, below = self.value("train/loss"), self.value("train/loss_below_uniform")
        return None if loss is None or below is None else loss + below


@dataclass(frozen=True)
class _Run:
    curves: Curves
    config: PretrainConfig
    words: str = ""
    """In front of what its signals say."""

    @cached_property
    def steps(self) -> list[int]:
        return [step for step, _ in self.curves.get("train/loss", ())]

    @property
    def last(self) -> _Moment:
        return _Moment(self, self.steps[-1])


_Signal = Callable[[_Moment], str]
"""What is wrong at a moment, in words; "" where nothing is, or where it cannot be told."""


def _worst(run: _Run) -> _Found | None:
    """The first verdict of the table that holds; where several of its rows do, the earliest step and all evidence."""
    for verdict in dict.fromkeys(verdict for verdict, _ in _RULES):
        held = [(steps, signals) for named, signals in _RULES if named == verdict and (steps := _since(signals, run))]
        if held:
            evidence = dict.fromkeys(signal(run.last) for _, signals in held for signal in signals)
            return verdict, min(steps[0] for steps, _ in held), tuple(evidence)
    return None


def _since(signals: tuple[_Signal, ...], run: _Run) -> list[int]:
    """The unbroken series of logged steps up to the last at which all signals hold; empty if it is too short."""
    steps: list[int] = []
    for step in reversed(run.steps):
        moment = _Moment(run, step)
        if not all(signal(moment) for signal in signals):
            break
        steps.append(step)
    return steps[::-1] if len(steps) >= SUSTAINED_POINTS else []


def _entropy_is_uniform(at: _Moment) -> str:
    share = at.entropy_share
    return f"teacher entropy {share:.3f} of ln K" if share is not None and share >= UNIFORM_SHARE else ""


def _entropy_is_zero(at: _Moment) -> str:
    share = at.entropy_share
    return f"teacher entropy {share:.3f} of ln K" if share is not None and share <= ONE_HOT_SHARE else ""


def _entropy_is_high(at: _Moment) -> str:
    share = at.entropy_share
    return f"teacher entropy {share:.3f} of ln K" if share is not None and share >= HIGH_SHARE else ""


def _targets_say_nothing(at: _Moment) -> str:
    """ln(usage) - h is the mutual information of images and prototypes: 0 where all images have one target."""
    usage, entropy, whole = at.value("train/prototype_usage"), at.value("train/teacher_entropy"), at.uniform_loss
    if usage is None or entropy is None or whole is None or math.log(usage) - entropy > NO_INFORMATION_SHARE * whole:
        return ""
    return f"a target tells {max(math.log(usage) - entropy, 0.0):.3f} nats of which image it belongs to"


def _one_prototype_in_use(at: _Moment) -> str:
    usage, loss, whole = at.value("train/prototype_usage"), at.value("train/loss"), at.uniform_loss
    if usage is not None:
        of = at.run.config.head.num_prototypes
        return f"{usage:.1f} of {of} prototypes in use" if usage <= ONE_HOT_USAGE else ""
    if loss is None or whole is None or at.run.config.loss.name != "cross_entropy":
        return ""
    return f"loss {loss:.3f}: nothing left to predict" if loss <= LOW_LOSS_SHARE * whole else ""


def _loss_is_uniform(at: _Moment) -> str:
    loss, whole = at.value("train/loss"), at.uniform_loss
    if loss is None or whole is None or abs(whole - loss) > NEAR_UNIFORM_SHARE * whole:
        return ""
    return f"loss {loss:.3f}, that of outputs without information {whole:.3f}"


def _kl_is_zero(at: _Moment) -> str:
    kl, whole = at.value("train/kl"), at.uniform_loss
    if kl is None or whole is None or kl > NEAR_UNIFORM_SHARE * whole:
        return ""
    return f"KL {kl:.3f}: student and teacher agree"


def _outputs_are_alike(at: _Moment) -> str:
    std = at.value("train/target_std")
    if std is None or at.run.config.loss.name == "cross_entropy" or std > ALIKE_STD:
        return ""
    return f"spread of the teacher's outputs {std:.3g}: all images are alike (1 is fully spread)"


def _loss_is_zero(at: _Moment) -> str:
    loss = at.value("train/loss")
    if at.run.config.loss.name != "mse" or loss is None or loss > LOW_LOSS_SHARE * 2.0:
        return ""
    return f"loss {loss:.3g}: both sides agree"


def _rank_fell(at: _Moment) -> str:
    return _fell(at, "train/feature_rank", "rank of the features", RANK_SHARE)


def _spread_fell(at: _Moment) -> str:
    return _fell(at, "train/feature_std", "spread of the features", STD_SHARE)


def _fell(at: _Moment, name: str, words: str, share: float) -> str:
    value, start = at.value(name), at.start(name)
    if value is None or start is None or value > share * start:
        return ""
    return f"{words} {value:.3g}, {start:.3g} at the start"


def _rank_is_low(at: _Moment) -> str:
    rank = at.value("train/feature_rank")
    return f"the features fill {rank:.1f} directions" if rank is not None and rank <= LOW_RANK else ""


def _spread_is_low(at: _Moment) -> str:
    std = at.value("train/feature_std")
    return "the features of all images point nearly the same way" if std is not None and std <= LOW_STD else ""


def _loss_is_far_above_uniform(at: _Moment) -> str:
    loss, whole = at.value("train/loss"), at.uniform_loss
    if loss is None or whole is None or loss < (1 + DIVERGED_SHARE) * whole:
        return ""
    return f"loss {loss:.3f}, that of outputs without information {whole:.3f}"


def _loss_rose(at: _Moment) -> str:
    loss, start = at.value("train/loss"), at.start("train/loss")
    return (
        f"loss {start:.3f} at the start, {loss:.3f} now"
        if loss is not None and start is not None and loss > start
        else ""
    )


def _gradient_exploded(at: _Moment) -> str:
    early = [value for _, value in at.run.curves.get("train/grad_norm", ()) if not math.isnan(value)][:NUM_EARLY_POINTS]
    norm, usual = at.value("train/grad_norm"), statistics.median(early) if early else math.nan
    if norm is None or not norm >= EXPLODED_GRADIENT * usual:
        return ""
    return f"gradient norm {norm:.3g}, {usual:.3g} at the start"


_RULES: tuple[tuple[Verdict, tuple[_Signal, ...]], ...] = (
    ("diverged", (_loss_is_far_above_uniform, _loss_rose)),
    ("diverged", (_gradient_exploded, _loss_rose)),
    ("uniform collapse", (_entropy_is_uniform, _loss_is_uniform)),
    ("uniform collapse", (_entropy_is_high, _targets_say_nothing, _kl_is_zero)),
    ("uniform collapse", (_outputs_are_alike, _loss_is_zero)),
    ("uniform collapse", (_outputs_are_alike, _loss_is_uniform)),
    ("one-hot collapse", (_entropy_is_zero, _one_prototype_in_use)),
    ("dimensional collapse", (_rank_fell, _spread_fell)),
    ("dimensional collapse", (_rank_fell, _rank_is_low)),
    ("dimensional collapse", (_spread_fell, _spread_is_low)),
)
"""Verdicts with the signals that must all hold, in the order in which they are tried."""


def _signs_of_health(at: _Moment) -> tuple[str, ...]:
    share, usage = at.entropy_share, at.value("train/prototype_usage")
    signs = [f"teacher entropy {share:.2f} of ln K"] if share is not None else []
    signs += [f"{usage:.0f} of {at.run.config.head.num_prototypes} prototypes in use"] if usage is not None else []
    for name, words in (("train/target_std", "spread of the outputs"), ("train/feature_rank", "rank of the features")):
        value = at.value(name)
        signs += [f"{words} {value:.3g}"] if value is not None else []
    return tuple(signs)
