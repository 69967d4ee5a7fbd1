from __future__ import annotations

import csv
import html
import io
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator import records, tables, tracking
from orchestrator.compare import KNN_METRIC, Comparison, compare, differing_keys
from orchestrator.config import TrackingConfig
from orchestrator.tables import render, rich_tables
from orchestrator.trials import CompareError, Curve, TrialSummary, load_from_disk, load_from_mlflow

BASE = {
    "pretrain.head.num_prototypes": 1024,
    "pretrain.teacher.temp": 0.04,
    "pretrain.crops.global_scale": [0.4, 1.0],
    "pretrain.model.embed_dim": None,
    "cluster.storage": "./runs",
    "tracking.uri": None,
}
LN_K = math.log(1024)


def trial(name: str = "t", knn: Curve | None = None, seed: int = 0, **params: object) -> TrialSummary:
    curves: dict[str, Curve] = {
        "train/loss": [(0, 6.9), (5, 5.5), (10, 5.0)],
        "train/teacher_entropy": [(0, LN_K), (5, 0.5 * LN_K), (10, 0.5 * LN_K)],
        "train/images_per_s": [(0, 1.0), (10, 100.0), (20, 102.0)],
    }
    if knn is not None:
        curves[KNN_METRIC] = knn
    texts = {key: str(value) for key, value in (BASE | params | {"pretrain.seed": seed}).items()}
    return TrialSummary(run_id=f"id-{name}", name=name, status="finished", params=texts, seed=seed, curves=curves)


def temps(values: Mapping[str, float | None], **more: object) -> Comparison:
    """One trial per teacher temperature, with its last k-NN."""
    return compare(
        [
            trial(name, [(0, 60.0)] + ([(10, value)] if value is not None else []), **{"pretrain.teacher.temp": i})
            for i, (name, value) in enumerate(values.items())
        ]
    )


# ----------------------------------------------------------------------------------------------------------- ranking


def test_best_first_by_the_last_value_and_missing_ones_last() -> None:
    comparison = compare(
        [
            trial("nan", [(0, 60.0), (10, math.nan)]),
            trial("peaked", [(0, 60.0), (10, 99.0), (20, 70.0)]),
            trial("none"),
            trial("best", [(0, 61.0), (20, 80.0)]),
            trial("inf", [(10, math.inf)]),
        ]
    )
    assert [(row.rank, row.trial.name) for row in comparison.rows] == [
        (1, "best"),
        (2, "peaked"),
        (None, "nan"),
        (None, "none"),
        (None, "inf"),
    ]
    best = comparison.rows[0]
    assert (best.value, best.step, best.random_weights, best.gain) == (80.0, 20, 61.0, 19.0)
    assert comparison.rows[3].gain is None


def test_mode_min_turns_the_order_round() -> None:
    trials = [trial("a", [(0, 2.0)]), trial("b", [(0, 1.0)]), trial("c")]
    assert [row.trial.name for row in compare(trials, mode="min").rows] == ["b", "a", "c"]
    assert [row.trial.name for row in compare(trials, mode="max").rows] == ["a", "b", "c"]


def test_only_keys_that_differ_and_matter_are_shown() -> None:
    trials = [
        trial("a", **{"pretrain.teacher.temp": 0.04, "cluster.storage": "x", "tracking.uri": "u", "derived/lr": 1}),
        trial("b", seed=1, **{"pretrain.teacher.temp": 0.07, "derived/lr": 2, "cluster.num_workers": 2}),
    ]
    assert differing_keys(trials) == ("cluster.num_workers", "pretrain.teacher.temp")
    comparison = compare(trials)
    assert comparison.rows[0].params == {"cluster.num_workers": "", "pretrain.teacher.temp": "0.04"}
    assert compare(trials[:1]).keys == ()


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(CompareError, match="no trials"):
        compare([])


# ------------------------------------------------------------------------------------------------------------- seeds


def test_seeds_of_a_configuration_are_averaged() -> None:
    values = {(0.04, 0): 70.0, (0.04, 1): 74.0, (0.07, 0): 75.0, (0.07, 1): 71.0, (0.07, 2): 82.0}
    trials = [
        trial(f"{temp}-{seed}", [(10, value)], seed, **{"pretrain.teacher.temp": temp})
        for (temp, seed), value in values.items()
    ]
    comparison = compare(trials)
    assert comparison.has_seeds
    assert comparison.keys == ("pretrain.teacher.temp",)  # never the seed
    first, second = comparison.groups
    assert (first.rank, first.params, first.values) == (1, {"pretrain.teacher.temp": "0.07"}, {0: 75, 1: 71, 2: 82})
    assert first.mean == pytest.approx(76.0)
    assert first.sd == pytest.approx(math.sqrt(((75 - 76) ** 2 + (71 - 76) ** 2 + (82 - 76) ** 2) / 2))
    assert (second.rank, second.mean, second.sd) == (2, 72.0, pytest.approx(math.sqrt(8)))
    text = render(comparison, "table")
    assert "Configurations" in text
    assert "76.00  5.57" in text
    assert "seed" in text.splitlines()[text.splitlines().index("Trials") + 1]


def test_failed_seeds_and_repeated_ones_do_not_count_twice() -> None:
    trials = [trial("a", [(10, 70.0)]), trial("again", [(10, 72.0)]), trial("b", [(10, 75.0)], 1), trial("c", None, 2)]
    (group,) = compare(trials).groups
    assert group.values == {0: 71.0, 1: 75.0}
    assert (group.mean, len(group.rows)) == (73.0, 4)
    (lost,) = compare([trial("c")]).groups
    assert (lost.rank, lost.mean, lost.sd) == (None, None, None)


def test_one_seed_each_needs_no_second_table() -> None:
    comparison = temps({"a": 70.0, "b": 71.0})
    assert not comparison.has_seeds
    assert "Configurations" not in render(comparison, "markdown")


# ------------------------------------------------------------------------------------------------- rows and the paper

SETTING = "ImageNet-1k, ViT-S/16, 300 epochs"


def row_trials(seeds: int = 1) -> list[TrialSummary]:
    """Two rows that differ in two keys, and one without a number of the paper, under two learning rates."""
    numbers = {
        "copy": {KNN_METRIC: 0.1, "eval/linear_top1": 0.1},
        "dino": {KNN_METRIC: 72.8, "cost/hours": 72.6},
        "own": {},
    }
    return [
        trial(
            f"{row}-{rate}-s{seed}",
            [(0, 60.0), (10, 70.0 + i + seed)],
            seed,
            row=row,
            **{"pretrain.teacher.update": row, "pretrain.teacher.momentum": i, "pretrain.optim.lr": rate},
            **{f"paper/{metric}": value for metric, value in numbers[row].items()},
            **({"paper/setting": SETTING} if numbers[row] else {}),
        )
        for i, row in enumerate(numbers)
        for rate in (0.1, 0.2)
        for seed in range(seeds)
    ]


def test_a_row_stands_for_the_keys_that_follow_from_it() -> None:
    comparison = compare(row_trials())
    assert comparison.keys == ("row", "pretrain.optim.lr")
    assert comparison.rows[0].params == {"row": "own", "pretrain.optim.lr": "0.1"}
    with_a_plain_run = compare([*row_trials(), trial("plain", [(10, 1.0)])])
    assert "pretrain.teacher.update" in with_a_plain_run.keys


def test_the_papers_number_stands_beside_ours_and_says_what_it_is() -> None:
    comparison = compare(row_trials())
    assert comparison.paper_metrics == (KNN_METRIC, "cost/hours", "eval/linear_top1")
    assert comparison.paper_note == f"The paper's numbers are at its own scale: {SETTING}."
    (table,) = tables.tables(comparison)
    at = table.headers.index("k-NN %")
    assert table.headers[1:3] == ("trial", "pretrain.optim.lr")
    assert table.headers[at : at + 4] == ("k-NN %", "paper", "paper, hours", "paper, linear %")
    assert {row[1]: row[at : at + 4] for row in table.rows if "-0.1-" in row[1]} == {
        "copy-0.1-s0": ("70.00", "0.1", "-", "0.1"),
        "dino-0.1-s0": ("71.00", "72.8", "72.6", "-"),
        "own-0.1-s0": ("72.00", "-", "-", "-"),
    }
    for form in ("table", "markdown", "html"):
        assert html.unescape(render(comparison, form)).count(comparison.paper_note) == 1  # type: ignore[arg-type]
    rows = list(csv.DictReader(io.StringIO(render(comparison, "csv"))))
    assert {row["trial"]: row[f"paper/{KNN_METRIC}"] for row in rows}["dino-0.2-s0"] == "72.8"
    assert rows[0]["row"] == "own"


def test_configurations_over_seeds_keep_the_papers_number() -> None:
    configurations, _ = tables.tables(compare(row_trials(seeds=2)))
    assert configurations.headers[:3] == ("#", "row", "pretrain.optim.lr")
    at = configurations.headers.index("paper")
    assert [(row[1], row[3], row[at]) for row in configurations.rows[::2]] == [
        ("own", "72.50", "-"),
        ("dino", "71.50", "72.8"),
        ("copy", "70.50", "0.1"),
    ]


def test_without_numbers_of_a_paper_there_is_no_column_of_them() -> None:
    comparison = temps({"a": 70.0, "b": 71.0})
    assert (comparison.paper_metrics, comparison.paper_note) == ((), "")
    for form in ("table", "markdown", "csv", "html"):
        assert "paper" not in render(comparison, form)  # type: ignore[arg-type]


def test_in_a_narrow_terminal_the_papers_other_numbers_go_first() -> None:
    comparison = compare(row_trials())
    console = Console(file=io.StringIO(), width=95)
    for table in rich_tables(comparison, 95):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "72.8" in text
    assert "72.6" not in text
    assert re.search(r"left out for want of width: paper, hours, paper, linear %", text)
    assert SETTING in text


# ------------------------------------------------------------------------------------------------------------ health


@pytest.mark.parametrize(
    ("share", "loss", "health"),
    [
        (0.5, 5.0, "healthy"),
        (0.979, LN_K, "healthy"),
        (0.981, LN_K, "uniform collapse"),
        (0.981, 5.0, "healthy"),  # the student has not followed: one signal alone
        (0.021, 0.5, "healthy"),
        (0.019, 0.5, "one-hot collapse"),
        (0.019, 5.0, "healthy"),
        (0.5, math.nan, "diverged"),
        (math.nan, 5.0, "unknown"),
    ],
)
def test_health_of_a_record_without_the_newer_metrics(share: float, loss: float, health: str) -> None:
    summary = trial()
    summary.curves["train/teacher_entropy"] = [(step, share * LN_K) for step in (10, 20, 30)]
    summary.curves["train/loss"] = [(step, loss) for step in (10, 20, 30)]
    assert summary.health == health
    assert (summary.diagnosis.step == 10) == summary.diagnosis.is_bad


def test_the_cause_comes_from_the_configuration() -> None:
    summary = trial(**{"pretrain.teacher.centering": "none", "pretrain.steps": 30, "pretrain.epochs": None})
    steps = (10, 20, 30)
    summary.curves["train/teacher_entropy"] = [(step, 0.0) for step in steps]
    summary.curves["train/loss"] = [(step, 0.1) for step in steps]
    assert summary.health == "one-hot collapse"
    assert "pretrain.teacher.centering = none" in summary.diagnosis.cause


def test_a_run_that_ended_before_it_logged_its_loss_diverged() -> None:
    reason = "NonFiniteLossError: the loss of step 12 is nan"
    summary = TrialSummary("id", "n", "failed", curves={"train/loss": [(0, 5.0)]}, reason=reason)
    assert (summary.health, summary.diagnosis.step) == ("diverged", 12)


def test_a_loss_without_prototypes_has_health_but_no_entropy() -> None:
    summary = trial(**{"pretrain.head.num_prototypes": None, "pretrain.loss.name": "mse"})
    steps = (10, 20, 30)
    del summary.curves["train/teacher_entropy"]
    summary.curves["train/loss"] = [(step, 1.0) for step in steps]
    summary.curves["train/target_std"] = [(step, 0.9) for step in steps]
    assert (summary.health, summary.entropy_share, summary.entropy_shares) == ("healthy", None, [])
    for form in ("table", "markdown", "csv", "html"):
        assert "healthy" in render(compare([summary]), form)


def test_a_configuration_of_another_version_has_no_health() -> None:
    summary = trial(**{"pretrain.loss.name": "of tomorrow", "pretrain.new.key": 1})
    assert summary.health == "unknown"
    assert "pretrain.loss.name = of tomorrow" in summary.diagnosis.evidence[0]


def test_a_trial_that_logged_nothing_has_no_health() -> None:
    summary = TrialSummary("id", "n", "not started")
    assert (summary.health, summary.entropy_share, summary.images_per_s, summary.last_step) == (
        "unknown",
        None,
        None,
        None,
    )
    assert compare([summary]).random_weights is None


def test_last_best_at_and_speed() -> None:
    summary = trial(knn=[(0, 60.0), (10, math.nan), (20, 80.0), (30, 75.0)])
    assert (summary.last(KNN_METRIC), summary.best(KNN_METRIC), summary.best(KNN_METRIC, "min")) == (75.0, 80.0, 60.0)
    assert (summary.at(KNN_METRIC, 0), summary.at(KNN_METRIC, 5), summary.at("none", 0)) == (60.0, None, None)
    assert summary.images_per_s == 100.0  # the median, not the slow first step
    assert summary.last_step == 30


# --------------------------------------------------------------------------------------------------------- renderers


def test_plain_table_lines_up() -> None:
    lines = render(temps({"short": 70.0, "a much longer name": 71.25, "lost": None}), "table").splitlines()
    assert lines[0] == "Trials"
    assert lines[1].split()[:4] == ["#", "trial", "pretrain.teacher.temp", "k-NN"]
    assert lines[3].startswith("1  a much longer name")
    assert "+11.25" in lines[3]
    assert "71.25" in lines[3]
    assert "0.500" in lines[3]
    column = lines[1].index("k-NN %") + len("k-NN %")
    assert [line[:column].split()[-1] for line in lines[3:]] == ["71.25", "70.00", "60.00"]


def test_markdown_cells_cannot_break_the_table() -> None:
    text = render(compare([trial("a|b\nc", [(0, 1.0)])]), "markdown")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 3
    assert r"a\|b c" in rows[2]
    assert len({row.replace(r"\|", "").count("|") for row in rows}) == 1


def test_csv_holds_full_precision() -> None:
    text = render(temps({'a, "quoted"': 70.123456789, "b": None}), "csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert rows[0]["trial"] == 'a, "quoted"'
    assert float(rows[0][KNN_METRIC]) == 70.123456789
    assert float(rows[0][f"{KNN_METRIC} of random weights"]) == 60.0
    assert rows[0]["pretrain.teacher.temp"] == "0"
    assert rows[1]["rank"] == "2"
    assert rows[1]["run_id"] == "id-b"


def test_html_escapes() -> None:
    text = render(compare([trial("<script>alert(1)</script>", [(0, 1.0)])]), "html")
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_rich_tables_show_names_as_they_are() -> None:
    console = Console(file=io.StringIO(), width=200)
    for table in rich_tables(temps({"[red]name[/red]": 70.0, "b": 71.0})):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]name[/red]" in text
    assert "+11.00" in text


@pytest.mark.parametrize("width", [80, 95, 120, 200])
def test_what_does_not_fit_the_terminal_is_left_out_and_named(width: int) -> None:
    comparison = temps({"quickstart-000": 71.23, "quickstart-001": 70.0})
    console = Console(file=io.StringIO(), width=width)
    for table in rich_tables(comparison, width):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for needed in ("quickstart-000", "71.23", "+11.23", "healthy", "teacher."):
        assert needed in text  # on one line, not cut
    for column, cell in (("step", " 20 "), ("images/s", " 100 "), ("status", "finished"), ("loss", "5.000")):
        named = re.search(rf"left out for want of width:[^\n]*{column}", text) is not None
        assert named != (cell in text)
    assert ("left out" in text) == (width < 100)


@pytest.mark.parametrize("form", ["table", "markdown", "csv", "html"])
def test_every_format_takes_a_trial_without_anything(form: tables.Format) -> None:
    assert "planned" in render(compare([TrialSummary("id", "planned", "not started")]), form)


# ----------------------------------------------------------------------------------------------------------- loading


def write_run(run_dir: Path, run_id: str, seed: int = 0, row: str | None = None, **changes: object) -> None:
    config = BASE | changes | {"pretrain.seed": seed}
    record = records.RunRecord(
        run_id=run_id,
        experiment="e",
        recipe="quickstart",
        seed=seed,
        config=config,
        derived={"lr": 0.001},
        row=row,
        method="swav" if row else None,
        paper={KNN_METRIC: 64.7, "eval/linear_top1": 71.8} if row else {},
        paper_setting=SETTING,
    )
    record.write(run_dir)
    journal = records.Journal(run_dir)
    for step in range(0, 30, 10):
        values = {"train/loss": 7.0 - 0.1 * step, "train/teacher_entropy": LN_K / 2, "train/images_per_s": 50.0 + step}
        journal.log(step, values | {KNN_METRIC: 60.0 + step + seed})
    journal.log(30, {"train/grad_norm": math.inf if seed else math.nan})
    journal.close()


def write_sweep(folder: Path) -> None:
    events: dict[str, records.Event] = {"t0": "finished", "t1": "stopped", "t2": "failed", "t3": "interrupted"}
    trials = [{"trial_id": name} for name in [*events, "t4"]]
    head = {"sweep": "temps", "recipe": "quickstart", "space": {"pretrain.teacher.temp": [0.04, 0.07]}, "seeds": 2}
    records.write_json(folder / records.SWEEP_FILE, head | {"trials": trials, "metric": KNN_METRIC})
    ledger = records.Ledger(folder)
    ledger.record(folder.name, "started")
    for i, (name, event) in enumerate(events.items()):
        write_run(
            folder / records.TRIALS_DIR / name,
            name,
            i % 2,
            row="swav" if i == 0 else None,
            **{"pretrain.teacher.temp": [0.04, 0.07][i // 2]},
        )
        ledger.record(name, "started")
        ledger.record(name, event, {"failed": "out of memory"}.get(event, ""))
    write_run(folder / records.TRIALS_DIR / "t4", "t4", seed=9)
    ledger.record("t4", "started")
    ledger.record(folder.name, "finished")
    ledger.close()


def test_a_sweep_is_read_from_disk(tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep")
    trials = load_from_disk(tmp_path / "sweep")
    assert [(t.name, t.status, t.seed) for t in trials] == [
        ("t0", "finished", 0),
        ("t1", "stopped", 1),
        ("t2", "failed", 0),
        ("t3", "interrupted", 1),
        ("t4", "running", 9),
    ]
    assert trials[1].curves[KNN_METRIC] == [(0, 61.0), (10, 71.0), (20, 81.0)]
    assert trials[0].params["pretrain.crops.global_scale"] == "[0.4, 1.0]"
    assert trials[0].params["derived/lr"] == "0.001"
    assert trials[2].reason == "out of memory"
    assert (trials[0].row, trials[0].params["method"], trials[0].paper_setting) == ("swav", "swav", SETTING)
    assert trials[0].paper == {KNN_METRIC: 64.7, "eval/linear_top1": 71.8}
    assert (trials[1].row, trials[1].paper, trials[1].paper_setting) == (None, {}, "")
    assert compare(trials).rows[0].trial.name == "t4"


def test_runs_are_read_from_disk_alone_and_together(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"run{seed}", f"id{seed}", seed)
    ledger = records.Ledger(tmp_path / "run0")
    ledger.record("id0", "finished")
    ledger.close()
    assert [t.status for t in load_from_disk(tmp_path / "run0")] == ["finished"]
    assert [(t.name, t.status) for t in load_from_disk(tmp_path)] == [("run0", "finished"), ("run1", "not started")]


def test_a_folder_without_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(CompareError, match=f"{tmp_path}: holds no record"):
        load_from_disk(tmp_path)
    with pytest.raises(CompareError, match="nowhere: no such folder"):
        load_from_disk(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A SQLite store to which a sweep and a lone run were delivered, and their folder."""
    root = tmp_path_factory.mktemp("store")
    write_sweep(root / "sweep")
    write_run(root / "lone", "lone", seed=5)
    ledger = records.Ledger(root / "lone")
    ledger.record("lone", "finished")
    ledger.close()
    target = tracking.Target.of(TrackingConfig(uri=f"sqlite:///{root / 'mlflow.db'}"))
    client = tracking.connect(target)
    for name in ("sweep", "lone"):
        tracking.deliver(client, root / name, "temperature", target)
    tracking.ensure_experiment(client, "empty", target)
    return target.uri, root


def test_mlflow_alone_gives_the_comparison_that_the_disk_gives(store: tuple[str, Path]) -> None:
    uri, root = store
    tracked = load_from_mlflow("temperature", uri)
    on_disk = load_from_disk(root / "sweep") + load_from_disk(root / "lone")
    assert [t.name for t in tracked] == [t.name for t in on_disk]  # parent run left out
    for ours, theirs in zip(tracked, on_disk, strict=True):
        assert (ours.status, ours.reason, ours.seed) == (theirs.status, theirs.reason, theirs.seed)
        assert ours.params == theirs.params
        assert (ours.row, ours.paper, ours.paper_setting) == (theirs.row, theirs.paper, theirs.paper_setting)
        assert repr(ours.curves) == repr({name: theirs.curves[name] for name in ours.curves})  # nan == nan in text
        assert ours.curves.keys() == theirs.curves.keys()
    for form in ("table", "markdown", "html"):
        assert render(compare(tracked), form) == render(compare(on_disk), form)


def test_an_unknown_experiment_names_the_nearest(store: tuple[str, Path]) -> None:
    with pytest.raises(CompareError, match="no experiment 'temprature'; there is 'temperature'"):
        load_from_mlflow("temprature", store[0])
    with pytest.raises(CompareError, match="'empty' has no runs"):
        load_from_mlflow("empty", store[0])


def test_a_store_that_is_not_there_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(CompareError, match=r"no MLflow store at sqlite:.*none\.db yet"):
        load_from_mlflow("e", f"sqlite:///{tmp_path / 'none.db'}")
    assert list(tmp_path.iterdir()) == []


def test_comparing_from_mlflow_needs_neither_ray_nor_torch(store: tuple[str, Path]) -> None:
    code = (
        "import sys; from orchestrator import compare, tables, trials\n"
        "assert 'mlflow' not in sys.modules and 'rich' not in sys.modules\n"
        "print(tables.render(compare.compare(trials.load_from_mlflow('temperature', sys.argv[1])), 'table'))\n"
        "assert not {'ray', 'torch'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, store[0]], capture_output=True, text=True, check=True)
    assert "stopped" in done.stdout
