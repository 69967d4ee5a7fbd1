"""The search without Ray: Optuna's sampler on closed forms, and a sweep's folder as its only memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dino_core.config import ConfigError
from orchestrator import search
from orchestrator.catalog import load_recipe
from orchestrator.designs import Point
from orchestrator.metric_choice import Mode
from orchestrator.overrides import flatten
from orchestrator.records import SWEEP_FILE, TRIALS_DIR, Journal, Ledger, RunRecord, read_json
from orchestrator.run_sweep import _Plan, _resumed_search, _write_plan
from orchestrator.search import MAX_REFUSED, SEARCH_FILE, Asked, first_suggestions, is_exhausted, propose
from orchestrator.space import IntUniform, LogUniform, Uniform
from orchestrator.sweep import CheckedSweep, Sweep, check, expand

LR, MOMENTUM = "pretrain.optim.lr", "pretrain.teacher.momentum"
LAYERS, WIDTH = "pretrain.head.num_layers", "pretrain.head.hidden_dim"
KNN, HOURS = "eval/knn_top1", "cost/device_hours"

SPACE: dict[str, Any] = {
    LR: LogUniform(1e-5, 1e-1),
    MOMENTUM: Uniform(0.9, 0.999),
    LAYERS: [1, 2, 3],
    WIDTH: IntUniform(32, 256, log=True),
}


def searched(**more: Any) -> Sweep:
    settings = {"design": "optuna", "num_trials": 40, "num_startup_trials": 5, "conditions": {WIDTH: {LAYERS: [2, 3]}}}
    return Sweep(**({"base": "quickstart", "space": SPACE} | settings | more))


def hill(point: Point) -> float:
    """Largest, 1, at lr 1e-3, momentum 0.95 and two layers."""
    return float(-((math.log10(point[LR]) + 3) ** 2) - 100 * (point[MOMENTUM] - 0.95) ** 2 + (point[LAYERS] == 2))


def run(
    checked: CheckedSweep, score: Callable[[Point], tuple[float, ...]], count: int, history: list[Asked] | None = None,
    modes: tuple[Mode, ...] = ("max",),
) -> list[Asked]:  # fmt: skip
    """A search whose trials end at once."""
    history = list(history or [])
    while len(history) < count:
        asked, _ = propose(checked, modes, history)
        history.append(asked if asked.refused else replace(asked, outcome="finished", values=score(asked.point)))
    return history


# --- suggestions ------------------------------------------------------------------------------------------------------


def test_the_search_finds_the_top_of_a_hill_and_not_by_chance() -> None:
    for seed in range(2):
        checked = check(searched(design_seed=seed))
        scores = [hill(asked.point) for asked in run(checked, lambda point: (hill(point),), 40) if not asked.refused]
        assert sum(scores[-10:]) / 10 > sum(scores[:5]) / 5 + 0.5
        random = check(searched(design="random", design_seed=seed)).points("")
        assert sum(scores[-10:]) / 10 > sum(map(hill, random)) / len(random) + 0.5


def test_suggestions_follow_from_seed_and_history_alone() -> None:
    checked = check(searched())
    whole = run(checked, lambda point: (hill(point),), 12)
    assert run(checked, lambda point: (hill(point),), 12, whole[:7]) == whole
    upside_down = run(checked, lambda point: (-hill(point),), 12, whole[:7])
    assert upside_down[7:] != whole[7:], "results guide the search"
    assert upside_down[:5] == whole[:5]
    other = check(searched(design_seed=1))
    assert not {str(asked.point) for asked in run(other, lambda point: (hill(point),), 12)} & {
        str(asked.point) for asked in whole
    }


def test_suggestions_lie_in_the_space_and_keys_are_asked_for_only_where_they_vary() -> None:
    history = run(check(searched()), lambda point: (hill(point),), 25)
    for asked in history:
        assert 1e-5 <= asked.point[LR] <= 1e-1
        assert 0.9 <= asked.point[MOMENTUM] <= 0.999
        assert (WIDTH in asked.point) == (asked.point[LAYERS] > 1)
        assert 32 <= asked.point.get(WIDTH, 32) <= 256
    tried = [str(asked.point) for asked in history if not asked.refused]
    assert len(set(tried)) == len(tried)


def test_two_objectives_find_both_ends_of_the_trade_off() -> None:
    sweep = searched(space={LR: LogUniform(1e-5, 1e-1)}, conditions={}, objectives={KNN: "max", HOURS: "min"})

    def trade(point: Point) -> tuple[float, float]:
        return min(0.0, math.log10(point[LR]) + 2), max(0.0, math.log10(point[LR]) + 4)  # best of both: 1e-4 to 1e-2

    history = run(check(sweep), trade, 40, modes=("max", "min"))
    late = [asked.point[LR] for asked in history[20:] if not asked.refused]
    assert sum(1e-4 <= rate <= 1e-2 for rate in late) >= 0.7 * len(late)  # half of the draws by chance


def test_failed_trials_are_no_bad_scores_and_stopped_ones_rank_behind_the_finished() -> None:
    from optuna.trial import TrialState

    from orchestrator.search import _frozen

    checked = check(searched())
    point = run(checked, lambda point: (hill(point),), 1)[0].point
    failed = _frozen(checked.space, Asked(point, outcome="failed"), 1)
    assert (failed.state, failed.values) == (TrialState.FAIL, None)
    assert _frozen(checked.space, Asked(point, refused="no"), 1).state == TrialState.FAIL
    assert _frozen(checked.space, Asked(point), 1).state == TrialState.RUNNING
    stopped = _frozen(checked.space, Asked(point, outcome="stopped", values=(3.0,)), 1)
    assert (stopped.state, stopped.intermediate_values) == (TrialState.PRUNED, {0: 3.0})
    both = _frozen(checked.space, Asked(point, outcome="stopped", values=(3.0, 4.0)), 2)
    assert (both.state, both.values) == (TrialState.COMPLETE, [3.0, 4.0])


def test_a_mixed_history_is_taken() -> None:
    checked = check(searched())
    history = run(checked, lambda point: (hill(point),), 12)
    kinds: list[dict[str, Any]] = [{}, {"outcome": "stopped"}, {"outcome": "failed", "values": ()}, {"outcome": "open"}]
    mixed = [replace(asked, **kinds[number % 4]) for number, asked in enumerate(history)]
    assert propose(checked, ["max"], mixed)[0].point not in [asked.point for asked in history]


def test_what_comes_first_is_known_before_anything_runs() -> None:
    checked = check(searched(seeds=2))
    first = first_suggestions(checked, ["max"])
    assert [asked.point for asked in first] == [a.point for a in run(checked, lambda point: (hill(point),), 5)]
    assert [t.trial_id for t in expand(searched(seeds=2))] == [asked.trials[seed] for seed in (0, 1) for asked in first]


def test_suggestions_that_make_no_sense_are_refused_and_do_not_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    # 5 and 7 are no multiples of the quickstart's patches of 4 pixels
    space = {"pretrain.crops.local_size": [5, 7, 8], LR: LogUniform(1e-4, 1e-2)}
    checked = check(searched(space=space, conditions={}))
    history = run(checked, lambda point: (point[LR],), 20)
    refused = [asked for asked in history if asked.refused]
    assert 0 < len(refused) < 20
    assert all("must be a multiple of the patch size 4" in asked.refused for asked in refused)
    assert {asked.point["pretrain.crops.local_size"] for asked in history if not asked.refused} == {8}
    monkeypatch.setattr(search, "MAX_REFUSED", 5)
    with pytest.raises(ConfigError, match=r"sweep\.space: no suggestion out of 5 could be tried"):
        expand(searched(space=space | {"pretrain.crops.local_size": [5, 7]}, conditions={}))


def test_a_space_that_is_used_up_ends_the_search() -> None:
    checked = check(searched(space={LAYERS: [1, 2]}, conditions={}))
    history = run(checked, lambda point: (float(point[LAYERS]),), 15)
    tried = [asked.point for asked in history if not asked.refused]
    assert sorted(point[LAYERS] for point in tried) == [1, 2]
    assert {asked.refused for asked in history} == {"", "was suggested before"}
    refused = Asked(tried[0], refused="was suggested before")
    assert is_exhausted([*history, *[refused] * MAX_REFUSED])
    assert not is_exhausted([*[refused] * MAX_REFUSED, Asked(tried[0])])


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path: Path) -> _Plan:
    sweep = searched(
        seeds=2, num_trials=4, num_startup_trials=1, metric="train/loss", mode="min",
        changes={"cluster.storage": str(tmp_path), "pretrain.steps": 4, "data.test_split": "test"},
    )  # fmt: skip
    return _write_plan(sweep)


def as_read(record: RunRecord) -> RunRecord:
    """A record as JSON gives it back, without tuples."""
    return RunRecord(**json.loads(json.dumps(asdict(record))))


def end(plan: _Plan, trial_id: str, event: Any, *losses: float) -> None:
    """What worker and driver leave of a trial."""
    journal = Journal(plan.run_dir(trial_id))
    for step, loss in enumerate(losses):
        journal.log(step, {"train/loss": loss})
    journal.close()
    ledger = Ledger(plan.folder)
    ledger.record(f"{plan.folder.name}.{trial_id}", event)
    ledger.close()


def test_outcomes_are_read_from_ledger_and_journals(plan: _Plan) -> None:
    assert plan.search is not None
    (first,) = plan.search.history()
    assert first.outcome == "open"
    one, two = first.trials
    end(plan, one, "finished", 5.0, 3.0)
    assert plan.search.history()[0].outcome == "open", "a seed is still running"
    end(plan, two, "finished", 5.0, 2.0)
    assert (plan.search.history()[0].outcome, plan.search.history()[0].values) == ("finished", (2.5,))

    for events, losses, outcome in (
        (("finished", "stopped"), (1.0, 4.0), ("stopped", (2.5,))),
        (("finished", "failed"), (1.0, 4.0), ("failed", ())),
        (("finished", "finished"), (1.0, math.nan), ("failed", ())),
        (("finished", "interrupted"), (1.0, 4.0), ("open", ())),
    ):
        trials = plan.ask() if events[1] != "interrupted" else []
        trials = trials or list(plan.search.history()[-1].trials)
        assert len(trials) == 2
        for trial_id, event, loss in zip(trials, events, losses, strict=True):
            end(plan, trial_id, event, loss)
        found = plan.search.history()[-1]
        if events[1] != "interrupted":
            assert (found.outcome, found.values) == outcome
    assert plan.ask() == [], "four configurations were asked for"
    assert plan.search.left() == 0


def test_new_trials_are_on_disk_before_they_are_handed_out(plan: _Plan) -> None:
    before = read_json(plan.folder / SWEEP_FILE)
    added = plan.ask()
    after = read_json(plan.folder / SWEEP_FILE)
    assert [trial["trial_id"] for trial in after["trials"]] == [*(t["trial_id"] for t in before["trials"]), *added]
    assert {**after, "trials": None} == {**before, "trials": None}
    for trial_id, seed in zip(added, (0, 1), strict=True):
        record = RunRecord.read(plan.run_dir(trial_id))
        assert record.seed == seed
        assert record.changes == after["trials"][-2]["changes"]
        assert as_read(plan.records[trial_id]) == record
    assert (before["design"], before["objectives"]) == ("optuna", {"train/loss": "min"})
    assert before["space"][LR] == {"low": 1e-5, "high": 1e-1, "log": True}
    assert before["base"]["pretrain.optim.lr"] == flatten(load_recipe("quickstart"))["pretrain.optim.lr"]


def resumed(plan: _Plan) -> _Plan:
    """The plan as another process reads it from the folder."""
    definition = read_json(plan.folder / SWEEP_FILE)
    ids = [trial["trial_id"] for trial in definition["trials"]]
    records = {trial_id: RunRecord.read(plan.run_dir(trial_id)) for trial_id in ids}
    found = _resumed_search(plan.folder, definition, records)
    assert found is not None
    again = _Plan(plan.folder, definition, records, found)
    again.add(found.lost(records))
    return again


def test_a_resumed_search_goes_on_as_it_would_have(plan: _Plan) -> None:
    assert plan.search is not None
    for trial_id in plan.search.history()[0].trials:
        end(plan, trial_id, "finished", 1.0)
    other = resumed(plan)
    assert other.search is not None
    assert other.search.history() == plan.search.history()
    after_it = propose(plan.search.checked, ["min"], plan.search.history())
    (asked, trials) = propose(other.search.checked, ["min"], other.search.history())
    assert asked == after_it[0]
    assert [trial.config for trial in trials] == [trial.config for trial in after_it[1]]


def test_a_driver_that_dies_between_two_writes_loses_nothing(plan: _Plan) -> None:
    assert plan.search is not None
    noted = plan.search.ask()  # noted in the search's file; neither records nor list are written
    assert not (plan.folder / TRIALS_DIR / noted[0][0].trial_id).exists()
    again = resumed(plan)
    assert list(again.records)[-2:] == [trial.trial_id for trial, _ in noted]
    written = RunRecord.read(again.run_dir(noted[0][0].trial_id))
    assert replace(written, created_at=0) == replace(as_read(noted[0][1]), created_at=0)
    assert set(again.open_trials()) == set(again.records)
    assert len((plan.folder / SEARCH_FILE).read_text().splitlines()) == 2
    # and a record that was written, but not the list
    (third, record), _ = again.search.ask()  # type: ignore[union-attr]
    record.write(again.run_dir(third.trial_id))
    assert third.trial_id in resumed(again).records
    assert json.loads((plan.folder / SWEEP_FILE).read_text())["trials"][-2]["trial_id"] == third.trial_id


def test_a_later_suggestion_that_cannot_run_is_counted(plan: _Plan) -> None:
    assert plan.search is not None
    tries: list[str] = []
    prepare = plan.search.prepare

    def refuse_the_first(trial: Any) -> RunRecord:
        tries.append(trial.trial_id)
        if len(tries) == 1:
            raise ConfigError("pretrain.epochs = 0.1: is less than one step")
        return prepare(trial)

    plan.search.prepare = refuse_the_first
    assert len(plan.ask()) == 2
    assert [bool(asked.refused) for asked in plan.search.history()] == [False, True, False]
    assert plan.search.describe() == (
        "search: 2 configurations, 1 suggestions refused, the last: pretrain.epochs = 0.1: is less than one step"
    )
    assert plan.search.left() == 2
