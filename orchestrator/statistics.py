"""Which differences between configurations are larger than the noise of their seeds.

**Pairing.** Trials that share a seed share initial weights, order of images and crops, so part of their noise is the
same. With x_ij the metric of configuration i under seed j and 0 the reference, everything here starts from
d_ij = x_ij - x_0j over the seeds that both have.

**Few seeds are the normal case.** A percentile bootstrap of three differences has ten distinct resamples, its 95 %
interval covers far less, and a t interval of two degrees of freedom finds nothing. So noise is estimated from all
configurations together, and each interval is

    mean(d_i) +- c sqrt(max(pooled, own_i) / n_i)

where `own_i` is the sample variance of d_i, and `pooled` twice the residual mean square of the additive model
"configuration + seed" (a randomised block design), which has about (configurations - 1)(seeds - 1) degrees of freedom.
The larger of the two guards against a configuration that varies more than the others, at little cost.

**c** covers all comparisons at once: it is the quantile of max_i |t_i| (Dunnett 1955; Westfall and Young 1993) of this
very statistic where nothing differs, by a parametric bootstrap (Krishnamoorthy, Lu and Mathew 2007): normal noise with
the residual variance of each configuration (Grubbs 1948) is drawn and taken through the same arithmetic. The variances
are uncertain themselves, so c is at least what equal variances give. With one comparison it is the paired t-test.
p-values are those of the same distribution: p <= 1 - level exactly where the interval leaves out zero.

`benchmarks/verdicts.py` shows by simulation what level, coverage and power this has; docs/statistics.md has its tables.

Imports neither numpy nor scipy before something is computed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

K = TypeVar("K", bound=Hashable)
Verdict = Literal["better", "worse", "not resolved"]

POWER = 0.8
"""Of the number of seeds that would resolve a difference."""
NUM_DRAWS = 9999
_MAX_WORK = 30_000_000
"""Draws x pairs x seeds of the comparison of all pairs, which gets fewer draws, but 999, where there are many."""
_SEED = 20
_CHUNK = 2_000_000
"""Numbers drawn at a time, which bounds the memory."""
_ROUNDING = 1e-9
"""Noise below this share of the values is that of their arithmetic."""


@dataclass(frozen=True)
class Difference:
    """A configuration minus the reference, over the seeds that both have."""

    mean: float | None
    """None without a shared seed."""
    low: float | None
    """Of the simultaneous interval; None where there is no estimate of noise."""
    high: float | None
    num_seeds: int
    p_value: float | None
    """Corrected for the number of comparisons."""
    verdict: Verdict
    seeds_needed: int | None
    """Seeds that would resolve a difference as large as this one with power 0.8; None where it is resolved, is zero, or
    its noise is not known."""
    reason: str = ""
    """Why nothing could be estimated; empty where it was."""


def paired_differences(
    values: Mapping[K, Mapping[int, float]],
    reference: K,
    mode: Literal["max", "min"] = "max",
    *,
    level: float = 0.95,
    chosen: bool = False,
    num_draws: int = NUM_DRAWS,
) -> dict[K, Difference]:
    """Each configuration against `reference`, with intervals that hold together with probability `level`.

    Args:
        values: finite values of the metric by configuration and seed.
        mode: whether a larger or a smaller value is better.
        chosen: `reference` was chosen for its values, such as the best. The intervals then cover the differences of all
            pairs (Tukey's way), and so whichever reference the values make one choose.
        num_draws: of the bootstrap, whose generator has a fixed seed: equal values give equal results.

    Raises:
        KeyError: `reference` is not among the configurations.
    """
    import numpy as np

    shared = {key: sorted(values[reference].keys() & own.keys()) for key, own in values.items()}
    others = [key for key in values if key != reference]
    found = {key: _unresolved(values[key], values[reference], shared[key]) for key in others}
    compared = [reference, *(key for key in others if len(shared[key]) > 1)]
    if len(compared) < 2:
        return found
    seeds = sorted({seed for key in compared[1:] for seed in shared[key]})
    cells = [[values[key].get(seed, math.nan) for seed in seeds] for key in compared]
    table = np.array(cells, dtype=np.float64)  # [configurations, seeds]
    known = np.isfinite(table)
    table = np.where(known, table, 0.0)
    design = _Design(known, chosen)
    num_pairs = len(compared) * (len(compared) - 1) // 2 if chosen else len(compared) - 1
    if chosen:
        num_draws = min(num_draws, max(999, _MAX_WORK // (num_pairs * len(seeds))))
    means, own = (array[0] for array in design.differences(table[None], 0))
    pooled = design.pooled(table[None])[0]
    variances = np.maximum(own, pooled)
    if variances.max() <= (_ROUNDING * np.abs(table).max()) ** 2:
        why = "the difference is the same for every seed, which leaves no estimate of the noise"
        return found | {key: _without_noise(found[key], why) for key in compared[1:]}
    maxima = [design.maxima(None, num_draws)]
    if len(compared) > 2:  # with two configurations the statistic does not depend on their variances
        maxima.append(design.maxima(tuple(design.deviations(table)), num_draws))
    for i, key in enumerate(compared[1:]):
        sd, n, mean = math.sqrt(variances[i]), len(shared[key]), float(means[i])
        t = abs(mean) / (sd / math.sqrt(n)) if sd else (math.inf if mean else 0.0)
        critical, p_value = _critical(maxima, t, level, n if len(compared) == 2 else None)
        half = critical * sd / math.sqrt(n)
        low, high = mean - half, mean + half
        verdict: Verdict = "not resolved"
        if low > 0 or high < 0:
            verdict = "better" if (mean > 0) == (mode == "max") else "worse"
        needed = None
        if verdict == "not resolved" and mean:
            needed = max(n + 1, seeds_to_resolve(mean, sd, num_pairs, len(compared), level=level))
        found[key] = Difference(mean, low, high, n, p_value, verdict, needed)
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): the family's error stays below any level they are held to."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def seeds_to_resolve(
    difference: float, sd: float, num_comparisons: int, num_configurations: int, *, level: float = 0.95
) -> int:
    """The smallest number of seeds n with n >= ((t_a(n) + t_p(n)) sd / difference)^2.

    t_a is the two-sided quantile of Student's t for `num_comparisons` (Bonferroni), t_p that of the power 0.8, both
    with (num_configurations - 1)(n - 1) degrees of freedom; `sd` is that of the paired differences of one seed.
    """
    from scipy.stats import norm, t

    tail = 1 - (1 - level) / (2 * num_comparisons)
    share = (sd / difference) ** 2
    n = max(2, math.ceil((norm.ppf(tail) + norm.ppf(POWER)) ** 2 * share))
    while True:
        freedom = (num_configurations - 1) * (n - 1)
        if n >= (t.ppf(tail, freedom) + t.ppf(POWER, freedom)) ** 2 * share:
            return n
        n += 1


@dataclass(frozen=True)
class Pairing:
    """What sharing the seeds is worth."""

    variance_ratio: float
    """Variance of a difference of two independent runs over that of a paired one; 2 halves the seeds needed."""
    num_configurations: int
    num_seeds: int

    @property
    def correlation(self) -> float:
        """Between configurations, of the values over seeds: variance_ratio = 1 / (1 - correlation)."""
        return 1 - 1 / self.variance_ratio if self.variance_ratio else -math.inf


def pairing(values: Mapping[K, Mapping[int, float]]) -> Pairing | None:
    """The variance that pairing saves, over all pairs of configurations and the seeds that all of them have.

    None if there are not two of each, or nothing varies.
    """
    import numpy as np

    seeds = sorted(set.intersection(*(set(own) for own in values.values()))) if values else []
    if len(values) < 2 or len(seeds) < 2:
        return None
    table = np.array([[own[seed] for seed in seeds] for own in values.values()], dtype=np.float64)
    alone = table.var(axis=1, ddof=1).mean()
    paired = float(_Design(np.ones(table.shape, dtype=bool), False).pooled(table[None])[0]) / 2
    return Pairing(float(alone) / paired, *table.shape) if paired > 0 else None


def _unresolved(own: Mapping[int, float], reference: Mapping[int, float], shared: list[int]) -> Difference:
    mean = math.fsum(own[seed] - reference[seed] for seed in shared) / len(shared) if shared else None
    why = "one shared seed gives no interval" if shared else "shares no seed with the reference"
    return Difference(mean, None, None, len(shared), None, "not resolved", None, why)


def _without_noise(found: Difference, why: str) -> Difference:
    why = why if found.mean else "equal for every seed"
    return Difference(found.mean, None, None, found.num_seeds, None, "not resolved", None, why)


def _critical(maxima: list[Array], t: float, level: float, num_seeds: int | None) -> tuple[float, float]:
    """The quantile of the largest |t| and the p-value of one; exact for a single comparison of `num_seeds`."""
    import numpy as np
    from scipy.stats import t as student

    if num_seeds is not None:
        return float(student.ppf((1 + level) / 2, num_seeds - 1)), float(2 * student.sf(t, num_seeds - 1))
    num_draws = len(maxima[0])
    # The order statistic for which an interval and its p-value agree.
    place = min(num_draws - 1, math.floor(level * (num_draws + 1)) - 1)
    critical = max(float(draws[place]) for draws in maxima)
    above = max(num_draws - int(np.searchsorted(draws, t, side="left")) for draws in maxima)
    return critical, (1 + above) / (1 + num_draws)


class _Design:
    """Which configuration has which seed; row 0 is the reference."""

    def __init__(self, known: NDArray[np.bool_], all_pairs: bool) -> None:
        import numpy as np

        self.known = known  # [configurations, seeds]
        self.all_pairs = all_pairs
        self.counts = known.sum(axis=1)
        # A basis of what seeds add to a table whose rows have mean zero; with that of the rows it spans the model.
        columns = self._centred(known[None] * np.eye(known.shape[1])[:, None, :])
        flat = columns.reshape(len(columns), -1).T
        self.basis, triangle = np.linalg.qr(flat[:, 1:])  # [configurations * seeds, seeds - 1]
        assert np.abs(np.diag(triangle)).min() > 1e-9, "all seeds are connected by the reference"
        self.freedom = int(self.counts.sum()) - len(known) - (known.shape[1] - 1)

    def _centred(self, tables: Array) -> Array:
        means = tables.sum(axis=-1, keepdims=True) / self.counts[:, None]
        centred: Array = (tables - means) * self.known
        return centred

    def pooled(self, tables: Array) -> Array:
        """The variance of a paired difference if it is the same for all, [draws]: twice the residual mean square.

        `tables` is [draws, configurations, seeds] with zero where there is no trial, here and below.
        """
        import numpy as np

        centred = self._centred(tables).reshape(len(tables), -1)
        residuals = centred - (centred @ self.basis) @ self.basis.T
        pooled: Array = 2 * np.einsum("ij,ij->i", residuals, residuals) / self.freedom
        return pooled

    def differences(self, tables: Array, reference: int) -> tuple[Array, Array]:
        """Mean and variance of the rows behind `reference` minus that row, each [draws, others]."""
        import numpy as np

        both = self.known[reference + 1 :] & self.known[reference]
        counts = both.sum(axis=1)
        pairs = (tables[:, reference + 1 :] - tables[:, reference : reference + 1]) * both
        with np.errstate(divide="ignore", invalid="ignore"):  # rows that share one seed, or none
            means = pairs.sum(axis=-1) / counts
            residuals = (pairs - means[..., None]) * both
            own = np.einsum("ijk,ijk->ij", residuals, residuals) / (counts - 1)
        return means, own

    def deviations(self, table: Array) -> Array:
        """The residual standard deviation of each configuration (Grubbs 1948), zero where its estimate is negative.

        Exact for complete tables; elsewhere each configuration's share is corrected by its leverage.
        """
        import numpy as np

        size = len(self.known)
        centred = self._centred(table[None]).reshape(-1)
        residuals = (centred - self.basis @ (self.basis.T @ centred)).reshape(self.known.shape)
        leverage = (self.basis**2).sum(axis=1).reshape(self.known.shape)
        left = ((1 - 1 / self.counts[:, None] - leverage) * self.known).sum(axis=1)
        shares = (residuals**2).sum(axis=1) / np.maximum(left, 1e-12)
        mean = (residuals**2).sum() / self.freedom
        deviations: Array = np.sqrt(np.maximum(((size - 1) * shares - mean) / (size - 2), 0.0))
        return deviations

    def maxima(self, deviations: tuple[float, ...] | None, num_draws: int) -> Array:
        """Sorted draws of the largest |t| of all comparisons where nothing differs; None is equal deviations."""
        if deviations is None:
            return _equal_maxima(self.known.shape, self.known.tobytes(), self.all_pairs, num_draws)
        return self._draw(deviations, num_draws)

    def _draw(self, deviations: tuple[float, ...] | None, num_draws: int) -> Array:
        import numpy as np

        scale = np.ones(len(self.known)) if deviations is None else np.array(deviations)
        references = range(len(self.known) - 1) if self.all_pairs else range(1)
        draws = []
        for noise in self._noise(num_draws):
            tables = noise * scale[:, None] * self.known
            pooled = self.pooled(tables)[:, None]
            largest = np.zeros(len(tables))
            for reference in references:
                both = (self.known[reference + 1 :] & self.known[reference]).sum(axis=1)
                means, own = self.differences(tables, reference)
                with np.errstate(divide="ignore", invalid="ignore"):
                    t = np.abs(means) / np.sqrt(np.maximum(own, pooled) / both)
                largest = np.maximum(largest, np.where(both > 1, t, 0.0).max(axis=1))
            draws.append(largest)
        return np.sort(np.concatenate(draws))

    def _noise(self, num_draws: int) -> Iterator[Array]:
        import numpy as np

        generator = np.random.default_rng(_SEED)
        step = max(1, _CHUNK // self.known.size)
        for start in range(0, num_draws, step):
            yield generator.standard_normal((min(step, num_draws - start), *self.known.shape))


@functools.lru_cache(maxsize=64)
def _equal_maxima(shape: tuple[int, int], known: bytes, all_pairs: bool, num_draws: int) -> Array:
    import numpy as np

    return _Design(np.frombuffer(known, dtype=bool).reshape(shape), all_pairs)._draw(None, num_draws)
