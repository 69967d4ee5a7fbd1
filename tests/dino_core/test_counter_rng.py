"""Random numbers that are a function of their coordinates."""

from __future__ import annotations

import math

import numpy as np

from dino_core.counter_rng import absorb, root, uniforms


def test_the_first_number_is_that_of_splitmix64() -> None:
    assert int(root(0)[0]) == 0xE220A8397B1DCDAF
    # The draws of one key are the generator's own sequence from that state.
    state, mask = int(root(5)[0]), 2**64 - 1
    expected = []
    for _ in range(4):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        expected.append(z ^ (z >> 31))
    assert absorb(root(5), np.arange(4)).tolist() == expected


def test_uniforms_are_uniform_and_distinct() -> None:
    numbers = uniforms(3, np.arange(20) % 4, np.arange(20) // 4 * 1000, 10, 33)
    assert numbers.shape == (20, 10, 33)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert len(np.unique(numbers)) == numbers.size
    many = uniforms(0, np.zeros(2000), np.arange(2000), 4, 25).ravel()
    error = 1 / math.sqrt(12 * many.size)
    assert abs(many.mean() - 0.5) < 4.5 * error
    counts = np.histogram(many, bins=100, range=(0, 1))[0]
    chi_square = ((counts - many.size / 100) ** 2 / (many.size / 100)).sum()
    assert chi_square < 99 + 5 * math.sqrt(2 * 99)


def test_neighbouring_coordinates_are_uncorrelated() -> None:
    base = uniforms(0, np.zeros(3000), np.arange(3000), 5, 8)
    pairs = {
        "ids": (base[:-1], base[1:]),
        "crops": (base[:, :-1], base[:, 1:]),
        "draws": (base[..., :-1], base[..., 1:]),
        "epochs": (base, uniforms(0, np.ones(3000), np.arange(3000), 5, 8)),
        "seeds": (base, uniforms(1, np.zeros(3000), np.arange(3000), 5, 8)),
        "id and epoch exchanged": (base[1:], uniforms(0, np.arange(1, 3000), np.zeros(2999), 5, 8)),
    }
    for name, (a, b) in pairs.items():
        correlation = np.corrcoef(a.ravel(), b.ravel())[0, 1]
        assert abs(correlation) < 4.5 / math.sqrt(a.size), name


def test_a_longer_request_begins_like_a_shorter_one() -> None:
    few, many = uniforms(7, [2], [9], 3, 5), uniforms(7, [0, 2], [1, 9], 6, 9)
    assert np.array_equal(few[0], many[1, :3, :5])
