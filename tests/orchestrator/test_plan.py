"""The order of samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.plan import IndexPlan, permutation


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**32 - 1), st.integers(1, 50))
def test_every_epoch_visits_every_sample_once(num_samples: int, seed: int, batch_size: int) -> None:
    plan = IndexPlan(num_samples, seed, batch_size)
    steps = -(-3 * num_samples // batch_size)
    positions = np.concatenate([plan.positions(step) for step in range(steps)])
    assert positions.tolist() == list(range(steps * batch_size))
    epochs, ids = plan.locate(positions)
    assert np.array_equal(epochs, positions // num_samples)
    for epoch in range(3):
        assert sorted(ids[epochs == epoch].tolist()) == list(range(num_samples))


def test_the_order_depends_on_seed_and_epoch() -> None:
    orders = [permutation(500, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(map(tuple, orders))) == 6
    assert list(range(500)) not in orders


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    # Recorded once: a change would silently alter every run and break every resume.
    assert permutation(10, 0, 0).tolist() == [8, 0, 1, 5, 3, 2, 7, 9, 6, 4]


def test_places_are_uniform() -> None:
    places = np.array([np.argsort(permutation(20, 0, epoch)) for epoch in range(4000)])  # [epoch, sample] -> place
    counts = np.apply_along_axis(np.bincount, 0, places, minlength=20)
    assert np.abs(counts - 200).max() < 5.5 * np.sqrt(200 * 0.95)
    neighbours = np.corrcoef(places[:-1].ravel(), places[1:].ravel())[0, 1]
    assert abs(neighbours) < 5 / np.sqrt(places.size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_the_global_batch_in_order(world_size: int) -> None:
    plan = IndexPlan(100, 0, 12)
    for step in (0, 7, 1000):
        whole = plan.positions(step)
        parts = [plan.positions(step, rank, world_size) for rank in range(world_size)]
        assert [len(part) for part in parts] == [12 // world_size] * world_size
        assert np.array_equal(np.concatenate(parts), whole)


def test_a_share_that_does_not_exist_is_refused() -> None:
    plan = IndexPlan(100, 0, 12)
    for rank, world_size in ((0, 5), (2, 2), (-1, 2)):
        with pytest.raises(ValueError, match="equal share"):
            plan.positions(0, rank, world_size)
    with pytest.raises(ValueError, match=">= 1"):
        IndexPlan(0, 0, 1)


def test_locate_is_vectorised_over_epochs_and_order() -> None:
    plan = IndexPlan(7, 5, 4)
    positions = np.array([20, 3, 0, 13, 7, 3])
    epochs, ids = plan.locate(positions)
    assert epochs.tolist() == [2, 0, 0, 1, 1, 0]
    for epoch, place, sample in zip(epochs, positions % 7, ids, strict=True):
        assert permutation(7, 5, int(epoch))[place] == sample
