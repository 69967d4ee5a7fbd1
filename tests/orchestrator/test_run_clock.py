from __future__ import annotations

import time
from pathlib import Path

import pytest

from orchestrator import run_clock
from orchestrator.records import Journal
from orchestrator.run_clock import DEVICE_HOURS, EvaluationBudget, RunClock, hours_spent


class Hand:
    """Clocks that are moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(run_clock.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr("orchestrator.records.time.time", lambda: self.now)


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    return Hand(monkeypatch)


def attempt(run_dir: Path, hand: Hand, steps: list[int], *, devices: int = 2) -> list[float]:
    """An hour before the first step and one for each step. Returns the device hours that it knew of."""
    clock, journal = RunClock(run_dir, devices, hand.now), Journal(run_dir)
    known = []
    for step in steps:
        hand.now += 3600
        known.append(clock.device_hours()[DEVICE_HOURS])
        journal.log(step, {"train/loss": 1.0} | clock.device_hours())
    journal.close()
    return known


def test_hours_go_on_over_restarts_and_count_what_was_computed_twice(tmp_path: Path, hand: Hand) -> None:
    assert attempt(tmp_path, hand, [0, 1, 2, 3]) == [2, 4, 6, 8]
    hand.now += 100 * 3600  # nobody had the devices
    assert attempt(tmp_path, hand, [2, 3, 4]) == [10, 12, 14]
    assert hours_spent(tmp_path, 2) == 14


def test_an_attempt_that_only_repeats_steps_is_known_from_their_times(tmp_path: Path, hand: Hand) -> None:
    attempt(tmp_path, hand, [0, 1, 2, 3])
    attempt(tmp_path, hand, [1, 2, 3])  # lost again before anything new
    # Of its three hours on two devices, the first before any record is not known.
    assert hours_spent(tmp_path, 2) == 8 + 2 * 2
    assert attempt(tmp_path, hand, [2, 3, 4])[-1] == 12 + 3 * 2


def test_hours_are_those_of_all_devices(tmp_path: Path, hand: Hand) -> None:
    assert attempt(tmp_path, hand, [0, 1], devices=8) == [8, 16]
    assert RunClock(None, 8, hand.now).device_hours() == {DEVICE_HOURS: 0}


def fail_after_3_s(clock: RunClock, hand: Hand) -> None:
    with clock.during("checkpoint"):
        hand.now += 3
        _ = 1 / 0


def test_parts_are_summed_over_attempts(tmp_path: Path, hand: Hand) -> None:
    for expected in (1, 2):
        clock = RunClock(tmp_path, 1, hand.now)
        hand.now += 5
        clock.started()

        def slow() -> list[int]:
            return [0, 1, 2]

        with clock.during("evaluation"):
            hand.now += 7
        with pytest.raises(ZeroDivisionError):
            fail_after_3_s(clock, hand)
        for _ in clock.waiting_for(slow()):
            hand.now += 11  # the caller's own time
        journal = Journal(tmp_path)
        journal.log(expected, clock.parts() | clock.device_hours())
        journal.close()
        assert clock.parts() == {
            "time/evaluation_share": pytest.approx(7 / 48),
            "time/start_s": 5 * expected,
            "time/evaluation_s": 7 * expected,
            "time/checkpoint_s": 3 * expected,
            "time/data_wait_s": 0,
            "time/report_s": 0,
        }


def test_waiting_for_batches_is_counted() -> None:
    def slow() -> object:
        for batch in range(3):
            time.sleep(0.02)
            yield batch

    clock = RunClock(None, 1, time.perf_counter())
    assert list(clock.waiting_for(slow())) == [0, 1, 2]  # type: ignore[arg-type]
    assert 0.06 <= clock.parts()["time/data_wait_s"] < 3


@pytest.mark.parametrize(("max_share", "made"), [(None, 20), (0.25, 6), (1.0, 20)])
def test_evaluations_keep_to_their_share(hand: Hand, max_share: float | None, made: int) -> None:
    """20 times 5 s of training, and an evaluation of 5 s where it is let: of 100 s and 33, a quarter is 33."""
    budget = EvaluationBudget(max_share)
    hand.now += 50
    with budget.first():
        hand.now += 5
    count = 0
    for _ in range(20):
        hand.now += 5
        if budget.allows():
            with budget.another():
                hand.now += 5
            count += 1
    assert count == made
    assert budget.num_left_out == 20 - made
