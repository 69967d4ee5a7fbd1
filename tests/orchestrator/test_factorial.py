"""Fractional factorial designs against the printed tables (Box, Hunter and Hunter, chapter 6) and by their algebra."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.factorial import Effect, Factorial, find_design

LETTERS = "ABCDEFGHIJKLMNO"


def spell(effect: Effect) -> str:
    return "".join(LETTERS[factor] for factor in effect)


def made(design: Factorial) -> dict[str, str]:
    return {LETTERS[factor]: spell(basic) for factor, basic in design.generators.items()}


def matrix(design: Factorial) -> np.ndarray:
    """-1 and 1 [runs, factors]"""
    return np.array([[1 if high else -1 for high in design.levels(run)] for run in range(design.num_runs)])


def aliased(design: Factorial) -> set[frozenset[str]]:
    return {frozenset(map(spell, group)) for group in design.aliases}


def test_the_half_fraction_of_four_factors() -> None:
    design = find_design(4, "IV")
    assert (design.num_runs, design.resolution, made(design)) == (8, "IV", {"D": "ABC"})
    signs = ["".join("+" if high else "-" for high in design.levels(run)) for run in range(8)]
    assert signs == ["----", "+--+", "-+-+", "++--", "--++", "+-+-", "-++-", "++++"]
    assert [spell(word) for word in design.words] == ["ABCD"]
    assert aliased(design) == {frozenset(pair) for pair in (("AB", "CD"), ("AC", "BD"), ("AD", "BC"))}


def test_the_quarter_fraction_of_five_factors() -> None:
    design = find_design(5, "III")
    assert (design.num_runs, design.resolution, made(design)) == (8, "III", {"D": "AB", "E": "AC"})
    assert {spell(word) for word in design.words} == {"ABD", "ACE", "BCDE"}
    assert aliased(design) == {
        frozenset(group)
        for group in (("A", "BD", "CE"), ("B", "AD"), ("C", "AE"), ("D", "AB"), ("E", "AC"), ("BC", "DE"), ("BE", "CD"))
    }


# Table 6.22 of Box, Hunter and Hunter (2nd edition): the resolution that each number of runs allows.
@pytest.mark.parametrize(
    ("factors", "resolution", "runs"),
    [
        (3, "III", 4), (4, "IV", 8), (5, "III", 8), (6, "III", 8), (7, "III", 8), (5, "V", 16), (6, "IV", 16),
        (7, "IV", 16), (8, "IV", 16), (9, "III", 16), (10, "III", 16), (11, "III", 16), (9, "IV", 32), (10, "IV", 32),
        (11, "IV", 32), (6, "V", 32), (7, "V", 64), (8, "V", 64), (9, "V", 128), (10, "V", 128), (11, "V", 128),
        (15, "III", 16),
    ],
)  # fmt: skip
def test_sizes_are_those_of_the_table(factors: int, resolution: str, runs: int) -> None:
    design = find_design(factors, resolution)  # type: ignore[arg-type]
    assert design.num_runs == runs
    assert len(design.words[0]) >= {"III": 3, "IV": 4, "V": 5}[resolution]


@pytest.mark.parametrize(
    ("factors", "resolution", "lengths"),
    [
        # of minimum aberration (Fries and Hunter 1980): the fewest short words
        (6, "IV", [4, 4, 4]),
        (6, "V", [6]),
        (7, "IV", [4] * 7),
        (5, "V", [5]),
    ],
)
def test_words_are_as_long_as_they_can_be(factors: int, resolution: str, lengths: list[int]) -> None:
    assert [len(word) for word in find_design(factors, resolution).words] == lengths  # type: ignore[arg-type]


def test_named_interactions_decide_the_size() -> None:
    # four factors: 8 runs tell AB from the main effects by D = ABC
    assert find_design(4, None, [(0, 1)]).num_runs == 8
    # a 2^(5-2) holds five main effects and two interactions of one factor (7 columns), but not AB and CD
    shared = find_design(5, None, [(0, 1), (0, 2)])
    assert (shared.num_runs, shared.resolution) == (8, "III")
    apart = find_design(5, None, [(0, 1), (2, 3)])
    assert apart.num_runs == 16
    # all ten interactions of five factors need resolution V
    every = find_design(5, None, list(itertools.combinations(range(5), 2)))
    assert (every.num_runs, made(every)) == (16, {"E": "ABCD"})
    # six interactions and four main effects are more than a half fraction's 7 columns
    assert find_design(4, None, list(itertools.combinations(range(4), 2))).resolution == "full"


def test_no_smaller_design_keeps_two_disjoint_interactions_of_five_factors_apart() -> None:
    needed = [(0,), (1,), (2,), (3,), (4,), (0, 1), (2, 3)]
    for columns in itertools.permutations(range(1, 8), 5):
        design = Factorial(columns, 3)
        assert len({design.column(effect) for effect in needed}) < len(needed)


@given(st.data())
def test_every_design_is_balanced_and_keeps_its_promises(data: st.DataObject) -> None:
    factors = data.draw(st.integers(2, 8))
    pairs = list(itertools.combinations(range(factors), 2))
    interactions = data.draw(st.lists(st.sampled_from(pairs), max_size=4, unique=True))
    resolution = data.draw(st.sampled_from(["III", "IV", "V", None] if interactions else ["III", "IV", "V"]))
    design = find_design(factors, resolution, interactions)
    levels = matrix(design)
    assert len(np.unique(levels, axis=0)) == len(levels) == design.num_runs
    named = [levels[:, a] * levels[:, b] for a, b in interactions]
    effects = np.stack([*levels.T, *named])
    # Columns of effects are orthogonal to each other and to the mean: each is estimated free of the others.
    assert np.array_equal(effects @ effects.T, design.num_runs * np.eye(len(effects)))
    assert not effects.sum(axis=1).any()
    if design.words and resolution:
        assert len(design.words[0]) >= {"III": 3, "IV": 4, "V": 5}[resolution]
    for word in design.words:
        assert len(set(levels[:, list(word)].prod(axis=1))) == 1, "a word is constant"
    for first, *others in design.aliases:
        for other in others:
            product = levels[:, list(first)].prod(axis=1) * levels[:, list(other)].prod(axis=1)
            assert len(set(product)) == 1, "aliased effects are equal but for their sign"
