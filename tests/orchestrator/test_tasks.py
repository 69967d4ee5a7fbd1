"""How batches are cut into tasks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data import tasks
from orchestrator.data.plan import IndexPlan, Windows
from orchestrator.data.tasks import Cost, Limits, Share, Sizes, in_executions, plan_rounds

CHEAP = Sizes(Cost(seconds=1e-3, num_bytes=1000), Limits())


def whole(plan: IndexPlan) -> Share:
    return Share.of(plan, 0, 1)


@pytest.mark.parametrize(("start", "stop", "steps"), [(0, 100, 8), (5, 6, 1), (7, 7, 4), (3, 50, 1), (0, 64, 64)])
def test_tasks_cover_the_steps_once_and_grow(
    start: int, stop: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "_TASKS_PER_EXECUTION", 3)
    monkeypatch.setattr(tasks, "_MAX_TASK_STEPS", steps)
    plan = IndexPlan(100, 0, 10)
    executions = list(in_executions(plan_rounds(plan, start, stop, whole(plan), CHEAP)))
    rounds = [this for some in executions for this in some]
    assert [step for this in rounds for step in range(this.start, this.stop)] == list(range(start, stop))
    assert all(len(some) <= 3 for some in executions)
    sizes = [this.stop - this.start for this in rounds]
    assert all(1 <= size <= steps for size in sizes)
    assert not sizes or sizes[0] == 1
    assert all(this.parts == ((this.start, this.stop, 0, 10),) for this in rounds)


def test_fixed_cuts_are_the_same_wherever_a_trial_begins() -> None:
    plan = IndexPlan(100, 0, 10)
    sizes = Sizes(Cost(1 / 8, 1000), Limits())
    rounds = {start: plan_rounds(plan, start, 40, whole(plan), sizes, aligned=True) for start in (0, 3, 16)}
    cuts = [{this.start for this in some} - {start} for start, some in rounds.items()]
    assert cuts[0] == {8, 16, 24, 32} == cuts[1]
    assert cuts[2] == {24, 32}


def test_windows_are_cut_at_the_same_steps_wherever_a_trial_begins() -> None:
    plan = IndexPlan(10_000, 0, 64, Windows(640, np.arange(0, 10_000, 50).tobytes()))
    sizes = Sizes(Cost(0.4, 400 << 20), Limits())  # two steps of a window of ten fill a round
    rounds = [list(plan_rounds(plan, start, 40, whole(plan), sizes)) for start in (0, 3, 20)]
    assert [this.start for this in rounds[0]] == list(range(0, 40, 2))
    assert rounds[1][0].start == 3 and rounds[1][1:] == rounds[0][2:]
    assert rounds[2] == rounds[0][10:]


def test_a_task_is_worth_its_price_and_fits() -> None:
    tiny = 64 * 2 * 3 * 16 * 16
    assert Sizes(Cost(0.1, tiny), Limits()).max_steps == 10
    assert Sizes(Cost(1e-4, tiny), Limits()).max_steps == tasks._MAX_TASK_STEPS
    assert Sizes(Cost(20, tiny), Limits()).max_steps == 1
    assert Sizes(Cost(0.1, 64 * 2 * 3 * 224 * 224), Limits()).max_steps == 3


@settings(max_examples=60, deadline=None)
@given(
    num_samples=st.integers(1, 5000),
    lanes=st.integers(1, 8),
    rows_per_lane=st.integers(1, 9),
    window=st.integers(1, 5000),
    world=st.integers(1, 8),
    cost=st.tuples(st.floats(1e-4, 3), st.integers(1000, 1 << 30)),
    start=st.integers(0, 50),
)
def test_windowed_parts_make_each_row_of_each_step_once(
    num_samples: int,
    lanes: int,
    rows_per_lane: int,
    window: int,
    world: int,
    cost: tuple[float, int],
    start: int,
) -> None:
    batch_size = lanes * rows_per_lane * world
    plan = IndexPlan(num_samples, 0, batch_size, Windows(window, np.zeros(1, dtype=np.int64).tobytes()))
    for rank in range(world):
        share = Share.of(plan, rank, world)
        assert share.rows == batch_size // world
        step = start
        for this in plan_rounds(plan, start, start + 60, share, Sizes(Cost(*cost), Limits())):
            assert this.start == step < this.stop
            assert this.stop == this.start + 1 or (this.stop - this.start) * cost[1] <= tasks._MAX_ROUND_BYTES
            row = 0
            for part in this.parts:
                assert (part.start, part.stop, part.first_row) == (this.start, this.stop, row)
                assert part.rows > 0
                row = part.last_row
            assert row == share.rows
            step = this.stop
        assert step == start + 60


def test_in_the_windowed_order_each_unit_is_read_by_one_task() -> None:
    # 100 units of 100 images; 8 lanes; windows of 10 steps of 8 x 64 images
    units = np.arange(0, 10_000, 100)
    plan = IndexPlan(10_000, 1, 512, Windows(5120, units.tobytes()))
    assert plan.lanes == 8
    reads: list[int] = []
    for rank in range(4):
        share = Share.of(plan, rank, 4)
        assert share.cuts == (0, 64, 128)
        for this in plan_rounds(plan, 0, 18, share, Sizes(Cost(2.0, 1 << 20), Limits())):
            assert [part.rows for part in this.parts] == [64, 64]
            for part in this.parts:
                positions = [plan.positions(step, rank, 4) for step in range(part.start, part.stop)]
                _, ids = plan.locate(np.concatenate([rows[part.first_row : part.last_row] for rows in positions]))
                reads += np.unique(ids // 100).tolist()
    # 9,216 images are 92 units; the ends of windows and lanes cut some of them in two
    assert len(set(reads)) >= 92
    assert len(reads) <= 92 + 3 * 8


def test_a_batch_that_is_too_much_for_a_task_is_cut_into_rows() -> None:
    plan = IndexPlan(5000, 0, 100)
    for cost, tasks_per_batch in ((Cost(3.5, 1000), 4), (Cost(0.1, 640 << 20), 10), (Cost(1e6, 1000), 100)):
        rounds = list(plan_rounds(plan, 3, 6, whole(plan), Sizes(cost, Limits())))
        assert [(this.start, this.stop) for this in rounds] == [(3, 4), (4, 5), (5, 6)]
        for this in rounds:
            assert len(this.parts) == tasks_per_batch
            assert [part.first_row for part in this.parts] == [0, *(part.last_row for part in this.parts[:-1])]
            assert this.parts[-1].last_row == 100


def test_a_small_object_store_makes_small_tasks() -> None:
    assert Limits.of_store(1e12, 2) == Limits()
    small = Limits.of_store(80 << 20, 2)
    assert small == Limits(8 << 20, 20 << 20)
    assert Sizes(Cost(1e-3, 3 << 20), small).max_steps == 2
    assert Sizes(Cost(1e-3, 30 << 20), small).max_steps == 1
    plan = IndexPlan(10_000, 1, 512, Windows(5120, np.zeros(1, dtype=np.int64).tobytes()))
    for this in plan_rounds(plan, 0, 20, whole(plan), Sizes(Cost(0.1, 6 << 20), small)):
        assert this.stop - this.start <= 3
        assert len(this.parts) in (1, 2, 3)
