"""Two-level fractional factorial designs: which half, quarter, ... of all combinations, and what it cannot tell apart.

Box, Hunter and Hunter, Statistics for Experimenters, chapter 6. A design of 2^r runs gives each factor a column, which
is a product of some of r basic columns. A set of basic columns is a number of r bits; the column of an interaction is
the exclusive or of those of its factors, and two effects are aliased where these are equal. Imports nothing heavy.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Resolution = Literal["III", "IV", "V"]

MAX_FACTORS = 15
_LENGTHS: dict[Resolution, int] = {"III": 3, "IV": 4, "V": 5}
_NUMERALS = ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII", "XIII", "XIV", "XV")
_MAX_NODES = 50_000
_MAX_CANDIDATES = 3_000

Pair = tuple[int, int]
Effect = tuple[int, ...]
"""Factors by number, ascending; one is a main effect, two an interaction."""


@dataclass(frozen=True)
class Factorial:
    """A two-level design."""

    columns: tuple[int, ...]
    """By factor: which basic columns its own is the product of, as bits."""
    num_basic: int
    """r: the design has 2^r runs."""

    @property
    def num_runs(self) -> int:
        return 2**self.num_basic

    def levels(self, run: int) -> tuple[bool, ...]:
        """By factor, whether it is high in a run. In the standard order: the first basic factor changes fastest."""
        low = self.num_runs - 1 - run  # the basic factors that are low in this run, as bits
        return tuple((low & column).bit_count() % 2 == 0 for column in self.columns)

    @cached_property
    def generators(self) -> dict[int, Effect]:
        """By factor that is not basic: the basic factors whose product it is."""
        basic = {column: factor for factor, column in enumerate(self.columns) if column.bit_count() == 1}
        return {
            factor: tuple(sorted(basic[1 << bit] for bit in range(self.num_basic) if column >> bit & 1))
            for factor, column in enumerate(self.columns)
            if column.bit_count() > 1
        }

    @cached_property
    def words(self) -> tuple[Effect, ...]:
        """The defining relation: products of factors that are constant, shortest first."""
        first = [{factor, *basic} for factor, basic in self.generators.items()]
        found = []
        for count in range(1, len(first) + 1):
            for chosen in itertools.combinations(first, count):
                word: set[int] = set()
                for part in chosen:
                    word ^= part
                found.append(tuple(sorted(word)))
        return tuple(sorted(found, key=lambda word: (len(word), word)))

    @property
    def resolution(self) -> str:
        """Length of the shortest word as a Roman numeral; `full` for all combinations."""
        return _NUMERALS[len(self.words[0])] if self.words else "full"

    def column(self, effect: Effect) -> int:
        result = 0
        for factor in effect:
            result ^= self.columns[factor]
        return result

    @cached_property
    def aliases(self) -> tuple[tuple[Effect, ...], ...]:
        """Main effects and two-factor interactions that cannot be told apart, in groups of two or more."""
        return tuple(group for group in self._groups() if len(group) > 1)

    def _groups(self) -> list[tuple[Effect, ...]]:
        factors = range(len(self.columns))
        groups: dict[int, list[Effect]] = {}
        for effect in (*((f,) for f in factors), *itertools.combinations(factors, 2)):
            groups.setdefault(self.column(effect), []).append(effect)
        return [tuple(group) for group in groups.values()]


def find_design(num_factors: int, resolution: Resolution | None, interactions: Sequence[Pair] = ()) -> Factorial:
    """The smallest design in which main effects and the named interactions are not aliased with one another.

    Of those of equal size, one of the highest resolution, and among these with the fewest short words that was found.
    Where there are too many possibilities to try them all, a smaller design than the one returned may exist.

    Args:
        num_factors: 1 to `MAX_FACTORS`.
        resolution: At least this one; None asks for no more than the interactions need.
        interactions: Pairs of factors by number.
    """
    assert 1 <= num_factors <= MAX_FACTORS
    needed = num_factors + len(set(interactions))
    for num_basic in range(needed.bit_length(), num_factors + 1):
        if 2**num_basic <= needed:
            continue
        for numeral in ("V", "IV", "III"):
            shortest = max(_LENGTHS[numeral], _LENGTHS[resolution] if resolution else 3)
            if _LENGTHS[numeral] < shortest:
                break
            found = _best(num_factors, num_basic, shortest, interactions)
            if found is not None:
                return found
    return Factorial(tuple(1 << factor for factor in range(num_factors)), num_factors)


def _best(num_factors: int, num_basic: int, shortest: int, interactions: Sequence[Pair]) -> Factorial | None:
    found = itertools.islice(_designs(num_factors, num_basic, shortest, interactions), _MAX_CANDIDATES)
    designs = (Factorial(columns, num_basic) for columns in found)
    return min(designs, key=_short_words, default=None)


def _short_words(design: Factorial) -> tuple[int, int, int]:
    """How many words of length 3 and 4 a design has and, where it has none of these, how short its shortest is."""
    columns = design.columns
    mains = set(columns)
    pairs = Counter(a ^ b for a, b in itertools.combinations(columns, 2))
    threes = sum(count for column, count in pairs.items() if column in mains) // 3
    fours = sum(count * (count - 1) // 2 for count in pairs.values()) // 3
    return threes, fours, 0 if threes or fours or not design.words else -len(design.words[0])


def _designs(
    num_factors: int, num_basic: int, shortest: int, interactions: Sequence[Pair]
) -> Iterator[tuple[int, ...]]:
    """Every assignment of columns to factors that keeps apart what must be, up to the names of the basic columns."""
    # In this order a short word comes late, as in the printed tables of resolution IV and V; of III, early.
    by_weight = sorted(
        range(1, 2**num_basic), key=lambda c: (c.bit_count(), [b for b in range(num_basic) if c >> b & 1])
    )
    nodes = itertools.count()
    free = not interactions  # without named ones all factors but the basic are alike: take their columns in order

    def extend(columns: tuple[int, ...], basic: int) -> Iterator[tuple[int, ...]]:
        if next(nodes) > _MAX_NODES:
            return
        if len(columns) == num_factors:
            if basic == num_basic:
                yield columns
            return
        if basic < num_basic:
            yield from attempt(columns, 1 << basic, basic + 1)
            if free:
                return
        after = by_weight.index(columns[-1]) + 1 if free and len(columns) > num_basic else 0
        for column in by_weight[after:]:
            if column < 1 << basic and column.bit_count() > 1:
                yield from attempt(columns, column, basic)

    def attempt(columns: tuple[int, ...], column: int, basic: int) -> Iterator[tuple[int, ...]]:
        if num_factors - len(columns) - 1 >= num_basic - basic and _apart((*columns, column), shortest, interactions):
            yield from extend((*columns, column), basic)

    return extend((), 0)


def _apart(columns: tuple[int, ...], shortest: int, interactions: Sequence[Pair]) -> bool:
    """Whether the newest column makes no word shorter than allowed, and what must be told apart still is."""
    *before, new = columns
    if new in before:
        return False
    sums = {a ^ b for a, b in itertools.combinations(before, 2)}
    if shortest >= 4 and new in sums:
        return False
    if shortest >= 5 and not sums.isdisjoint(new ^ column for column in before):
        return False
    named = [columns[a] ^ columns[b] for a, b in interactions if max(a, b) < len(columns)]
    return len({*columns, *named}) == len(columns) + len(named)
