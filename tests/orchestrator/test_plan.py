"""The order of samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.plan import IndexPlan, Windows, num_lanes, permutation, windowed_permutation


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


# The windowed order


def units_of(num_samples: int, size: int) -> bytes:
    return np.arange(0, num_samples, size, dtype=np.int64).tobytes()


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**32 - 1), st.integers(1, 64), st.integers(1, 4000), st.integers(1, 300))
def test_windowed_epochs_visit_every_sample_once(
    num_samples: int, seed: int, batch_size: int, window: int, unit: int
) -> None:
    plan = IndexPlan(num_samples, seed, batch_size, Windows(window, units_of(num_samples, unit)))
    epochs, ids = plan.locate(np.arange(3 * num_samples))
    for epoch in range(3):
        assert np.array_equal(np.sort(ids[epochs == epoch]), np.arange(num_samples))


def test_the_windowed_order_depends_on_seed_and_epoch_and_is_the_same_everywhere() -> None:
    orders = [
        tuple(windowed_permutation(500, seed, epoch, 16, 64, units_of(500, 10)).tolist())
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    ]
    assert len(set(orders)) == 6
    # Recorded once: a change would silently alter every run and break every resume.
    recorded = windowed_permutation(12, 0, 1, 4, 6, units_of(12, 3)).tolist()
    assert recorded == [0, 11, 10, 9, 2, 1, 8, 7, 5, 6, 3, 4]


@pytest.mark.parametrize(("batch_size", "steps", "lanes"), [(1024, 8, 16), (1000, 8, 10), (96, 85, 16)])
def test_a_window_opens_few_units_at_a_time_each_in_one_lane(batch_size: int, steps: int, lanes: int) -> None:
    num_samples, unit, window = 100_000, 50, 8192
    plan = IndexPlan(num_samples, 0, batch_size, Windows(window, units_of(num_samples, unit)))
    assert (plan.window_steps, plan.lanes) == (steps, lanes)
    size = steps * batch_size
    for first in range(0, 3 * num_samples, size):  # on across epochs
        epochs, ids = plan.locate(np.arange(first, first + size))
        opened = len(np.unique(np.stack([epochs, ids // unit]), axis=1).T)
        assert opened <= size // unit + 2 + 2 * lanes * len(np.unique(epochs))  # the ends of lanes cut units
    assert IndexPlan(10, 0, 2).window_steps is None


def test_class_sorted_data_is_mixed_across_a_batch() -> None:
    # 100 classes of 1,000 images one after the other: a batch in stored order would hold one class.
    num_samples = 100_000
    plan = IndexPlan(num_samples, 0, 1024, Windows(16_384, units_of(num_samples, 80)))
    full = IndexPlan(num_samples, 0, 1024)
    for order, least in ((plan, 88), (full, 99)):
        classes = [len(np.unique(order.locate(order.positions(step))[1] // 1000)) for step in range(90)]
        assert np.mean(classes) > least
    # Within a lane's window any order is as likely as another: neighbours in storage are not neighbours in the batch.
    _, ids = plan.locate(np.arange(num_samples))
    assert np.mean(np.abs(np.diff(ids)) == 1) < 0.01


def test_units_follow_each_other_in_random_order() -> None:
    orders = [windowed_permutation(1000, 0, epoch, 1, 1, units_of(1000, 100)) for epoch in range(300)]
    firsts = np.array([order[0] for order in orders])  # one lane, windows of one image: units as they are stored
    assert set(firsts % 100) == {0}
    assert np.bincount(firsts // 100, minlength=10).min() > 10
    assert all(np.array_equal(order.reshape(10, 100) % 100, np.tile(np.arange(100), (10, 1))) for order in orders[:20])


@pytest.mark.parametrize(
    ("batch_size", "window", "lanes"),
    [(1024, 8192, 16), (1024, 1 << 20, 64), (96, 1 << 20, 48), (97, 1 << 20, 1), (64, 100, 1)],
)
def test_lanes(batch_size: int, window: int, lanes: int) -> None:
    assert num_lanes(batch_size, window) == lanes
