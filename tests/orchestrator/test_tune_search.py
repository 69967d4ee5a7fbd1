"""What Tune asks of the searcher, by Tune's own wrappers; no cluster is needed."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from ray.tune.search import ConcurrencyLimiter, Searcher
from ray.tune.search.search_generator import SearchGenerator

from orchestrator.tune_search import RecordedSearch


def test_waiting_trials_come_first_and_more_are_asked_for_when_there_is_room() -> None:
    asked: list[int] = []

    def more() -> list[str]:
        asked.append(len(asked))
        return {0: ["c", "d"], 1: ["e"]}.get(asked[-1], [])

    search = ConcurrencyLimiter(RecordedSearch(["a", "b"], more, "trial"), max_concurrent=2)
    assert [search.suggest("1"), search.suggest("2")] == [
        {"run_dir": "a", "launcher": "trial"},
        {"run_dir": "b", "launcher": "trial"},
    ]
    assert search.suggest("3") is None
    assert asked == [], "nothing is suggested before there is a result"
    search.on_trial_complete("1", {"step": 3})
    assert search.suggest("3") == {"run_dir": "c", "launcher": "trial"}
    search.on_trial_complete("2", error=True)
    assert search.suggest("4") == {"run_dir": "d", "launcher": "trial"}
    assert asked == [0], "all seeds of a configuration are handed out before the next"
    for trial in ("3", "4"):
        search.on_trial_complete(trial)
    assert search.suggest("5") == {"run_dir": "e", "launcher": "trial"}
    assert search.suggest("6") == Searcher.FINISHED


def test_where_the_next_follow_from_all_before_tune_waits_for_these() -> None:
    more = iter([["c", "d"], []])
    search = ConcurrencyLimiter(RecordedSearch(["a", "b"], lambda: next(more), "trial", together=True), 2)
    for trial in ("1", "2"):
        assert isinstance(search.suggest(trial), dict)
    search.on_trial_complete("1", {"step": 3})
    assert search.suggest("3") is None, "room for one more, but the other is still running"
    search.on_trial_complete("2", error=True)
    assert search.suggest("3") == {"run_dir": "c", "launcher": "trial"}
    assert search.suggest("4") == {"run_dir": "d", "launcher": "trial"}
    search.on_trial_complete("4")
    assert search.suggest("5") is None
    search.on_trial_complete("3")
    assert search.suggest("5") == Searcher.FINISHED


def test_tune_keeps_nothing_of_it(tmp_path: Path) -> None:
    def more() -> list[str]:
        raise AssertionError("only asked for suggestions")

    search = RecordedSearch(["a"], more, "trial")
    with pytest.raises(AttributeError):
        pickle.loads(pickle.dumps(search)).suggest("1")  # noqa: S301 - made a moment ago
    SearchGenerator(ConcurrencyLimiter(search, max_concurrent=1)).save_to_dir(str(tmp_path), "now")
    assert [path.name for path in tmp_path.iterdir()] == ["search_gen_state-now.json"]
