"""Configurations beside a reference: which it is, what is said of it, in tables, papers and notebooks."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence

import pytest
from rich.console import Console

from orchestrator.compare import KNN_METRIC, SEED_KEY, Comparison, compare
from orchestrator.statistics import Difference, paired_differences
from orchestrator.tables import configuration_table, latex_escape, render, rich_tables, trial_table, verdict
from orchestrator.trials import CompareError, TrialSummary

TEMP = "pretrain.teacher.temp"
# Differences from the first: large and steady, within the noise, large and down.
VALUES = {
    "0.04": (70.0, 72.0, 71.0, 69.0),
    "0.05": (75.2, 77.0, 75.9, 74.1),
    "0.06": (70.4, 71.7, 71.4, 68.9),
    "0.07": (65.1, 66.8, 66.0, 64.2),
}


def trials(values: Mapping[str, Sequence[float]] = VALUES, **names: str) -> list[TrialSummary]:
    return [
        TrialSummary(
            run_id=f"id-{temp}-{seed}",
            name=f"{names.get(f't{i}', f'temp_{temp}')}-s{seed}",
            status="finished",
            params={TEMP: temp, "pretrain.batch_size": "64", SEED_KEY: str(seed)},
            seed=seed,
            curves={KNN_METRIC: [(0, 60.0), (10, value)]},
            experiment="temperature",
            git_commit="abc123",
            data_digest="sha256:77",
        )
        for i, (temp, line) in enumerate(values.items())
        for seed, value in enumerate(line)
    ]


def cells(comparison: Comparison) -> dict[str, dict[str, str]]:
    table = configuration_table(comparison)
    return {row[1]: dict(zip(table.headers, row, strict=True)) for row in table.rows}


# ----------------------------------------------------------------------------------------------------------- reference


def test_the_reference_is_the_sweeps_base_if_it_is_there() -> None:
    named = compare(trials(t2="base"))
    assert named.reference is not None
    assert (named.reference.params[TEMP], named.reference_why) == ("0.06", "the sweep's base")
    rows = trials()
    for trial in rows:
        trial.params["row"] = "base" if trial.params[TEMP] == "0.07" else f"row{trial.params[TEMP]}"
    by_row = compare(rows)
    assert by_row.reference is not None
    assert by_row.reference.params == {"row": "base"}
    equal = compare(trials(), base={TEMP: 0.04, "pretrain.batch_size": 64, "cluster.storage": "elsewhere"})
    assert equal.reference is not None
    assert (equal.reference.params[TEMP], "values of the sweep's base" in equal.reference_why) == ("0.04", True)


def test_without_a_base_everything_is_compared_with_the_winner_and_says_so() -> None:
    comparison = compare(trials(), base={TEMP: 0.9})
    assert comparison.reference is comparison.groups[0]
    assert comparison.reference.params[TEMP] == "0.05"
    assert "the winner, chosen after the fact" in comparison.reference_note
    assert "all pairs together" in comparison.reference_note
    planned = compare(trials(), reference="temp_0.05")
    for chosen, asked in zip(comparison.groups[1:], planned.groups[1:], strict=True):
        assert chosen.difference is not None and asked.difference is not None
        assert chosen.difference.low is not None and asked.difference.low is not None
        assert chosen.difference.low < asked.difference.low  # wider, as the winner was chosen


@pytest.mark.parametrize("name", ["temp_0.06", "temp_0.06-s2"])
def test_a_reference_can_be_asked_for(name: str) -> None:
    comparison = compare(trials(t0="base"), reference=name)
    assert comparison.reference is not None
    assert (comparison.reference.name, comparison.reference_why) == ("temp_0.06", "as asked")
    assert compare(trials(t0="base"), reference="best").reference_why == "the winner, chosen after the fact"


def test_an_unknown_reference_names_the_nearest() -> None:
    with pytest.raises(CompareError, match=r"--reference temp_0\.66: no such configuration; did you mean .*temp_0\.06"):
        compare(trials(), reference="temp_0.66")
    rows = trials(t0="same", t1="same")
    with pytest.raises(CompareError, match="--reference same: stands for several configurations"):
        compare(rows, reference="same")


def test_differences_are_those_of_the_statistics() -> None:
    comparison = compare(trials(t0="base"))
    expected = paired_differences({temp: dict(enumerate(line)) for temp, line in VALUES.items()}, "0.04")
    for group in comparison.groups:
        found, wanted = group.difference, expected.get(group.params[TEMP])
        if wanted is None:
            assert found is None
        else:
            assert found is not None
            assert (found.mean, found.verdict, found.num_seeds) == (wanted.mean, wanted.verdict, 4)
            # The order of the configurations is another, and with it the bootstrap's draws.
            assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=0.05)


def test_one_configuration_has_no_reference() -> None:
    comparison = compare(trials({"0.04": VALUES["0.04"]}))
    assert (comparison.reference, comparison.reference_note) == (None, "")
    assert "verdict" not in configuration_table(comparison).headers


# ----------------------------------------------------------------------------------------------------------- renderers


def test_the_configurations_have_difference_interval_and_verdict() -> None:
    found = cells(compare(trials(t0="base"), why="the images have labels"))
    assert {temp: line["verdict"].split(":")[0] for temp, line in found.items()} == {
        "0.05": "better",
        "0.06": "not resolved",
        "0.04": "reference",
        "0.07": "worse",
    }
    assert found["0.05"]["vs base"] == "+5.05"
    assert found["0.04"]["vs base"] == found["0.04"]["95 % CI"] == "-"
    low, high = (float(text) for text in found["0.07"]["95 % CI"].split(" to "))
    assert low < -4.975 < high < 0
    text = render(compare(trials(t0="base"), why="the images have labels"), "markdown")
    assert "Ranked by eval/knn_top1: the images have labels." in text
    assert "Differences are from base (the sweep's base), over the seeds that both have (4 each)" in text


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (Difference(1.0, 0.5, 1.5, 3, 0.01, "better", None), "better"),
        (Difference(-1.0, -1.5, -0.5, 3, 0.01, "worse", None), "worse"),
        (Difference(0.1, -0.5, 0.7, 3, 0.9, "not resolved", 42), "not resolved: 42 seeds would"),
        (Difference(0.1, -0.5, 0.7, 3, 0.9, "not resolved", 4200), "not resolved: over 1000 seeds would"),
        (Difference(0.0, -0.5, 0.5, 3, 1.0, "not resolved", None), "not resolved: no difference"),
        (
            Difference(0.1, None, None, 1, None, "not resolved", None, "one shared seed"),
            "not resolved: one shared seed",
        ),
    ],
)
def test_a_verdict_in_words(difference: Difference, words: str) -> None:
    assert verdict(difference) == words


def test_the_best_is_bold_in_latex_only_where_it_is_resolved() -> None:
    text = render(compare(trials(t0="base")), "latex")
    lines = text.splitlines()
    assert lines[:4] == [r"\begin{table}", r"\centering", r"\begin{tabular}{lrrr}", r"\toprule"]
    assert lines[4] == r"teacher.temp & k-NN \% & vs base & 95 \% CI \\"
    assert lines[6].startswith(r"0.05 & \textbf{75.55 $\pm$ 1.22} & $+5.05$ & $[")
    assert r"$^\dagger$ &" in lines[7]  # 0.06
    assert lines[8] == r"0.04 & 70.50 $\pm$ 1.29 & -- & -- \\"
    assert text.count(r"\textbf") == 1
    assert r"$^\dagger$: not resolved from base" in text
    close = render(compare(trials({"0.04": (70.0, 72.0, 71.0), "0.05": (70.5, 71.9, 71.2)}, t0="base")), "latex")
    assert r"\textbf" not in close
    single = render(compare(trials({"0.04": (70.0,), "0.05": (79.0,)})), "latex")
    assert r"\textbf" not in single
    assert "One seed each" in single
    assert r"\pm" not in single.split(r"\bottomrule")[0]


def test_the_reference_is_bold_where_all_others_are_worse() -> None:
    values = {temp: VALUES[temp] for temp in ("0.04", "0.05", "0.07")}
    assert render(compare(trials(values, t1="base")), "latex").count(r"\textbf") == 1
    assert render(compare(trials({**values, "0.06": (75.1, 77.2, 75.8, 74.3)}, t1="base")), "latex").count("bf{") == 0


def test_latex_prints_text_as_it_is() -> None:
    assert latex_escape("a_b & 5 % {x} \\ ~ ^ # $") == (
        r"a\_b \& 5 \% \{x\} \textbackslash{} \textasciitilde{} \textasciicircum{} \# \$"
    )


def test_every_value_in_the_csv_says_where_it_comes_from() -> None:
    rows = list(csv.DictReader(io.StringIO(render(compare(trials()), "csv"))))
    assert len(rows) == 16
    for row in rows:
        assert (row["experiment"], row["git_commit"], row["data_digest"]) == ("temperature", "abc123", "sha256:77")
        temp, seed = row["run_id"].split("-")[1:]
        assert float(row[KNN_METRIC]) == VALUES[temp][int(seed)]


def test_a_narrow_terminal_keeps_the_verdict() -> None:
    console = Console(file=io.StringIO(), width=80)
    for table in rich_tables(compare(trials(t0="base"), why="it has [bold]labels[/bold]"), 80):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "better" in text and "worse" in text
    assert "left out for want of width: runs, seeds" in text
    assert "[bold]labels[/bold]" in text


# -------------------------------------------------------------------------------------------------------------- frames


def test_a_frame_has_a_row_per_trial() -> None:
    comparison = compare(trials(t0="base"))
    frame = comparison.frame()
    assert len(frame) == 16
    assert frame[TEMP].dtype == float
    means = frame.groupby(TEMP)[KNN_METRIC].mean()
    assert means[0.05] == pytest.approx(75.55)
    assert set(frame.loc[frame[TEMP] == 0.04, "configuration"]) == {"base"}
    assert list(frame["rank"]) == list(range(1, 17))
    assert {"run_id", "git_commit", "data_digest", "experiment", "health", "status", SEED_KEY} <= set(frame.columns)


def test_a_frame_of_configurations_has_their_differences() -> None:
    frame = compare(trials(t0="base")).configurations_frame().set_index(TEMP)
    assert list(frame["num_seeds"]) == [4, 4, 4, 4]
    assert frame.loc[0.05, "verdict"] == "better"
    assert frame.loc[0.05, "difference_low"] > 0
    assert math.isnan(frame.loc[0.04, "difference_mean"])
    assert (frame["reference"] == "base").all()
    empty = compare([TrialSummary("id", "planned", "not started")])
    assert len(empty.frame()) == len(empty.configurations_frame()) == 1


def test_seeds_that_differ_in_number_are_told() -> None:
    rows = [trial for trial in trials(t0="base") if trial.name != "temp_0.07-s3"]
    comparison = compare(rows)
    assert "(3 to 4 each)" in comparison.reference_note
    assert [len(group.values) for group in comparison.groups] == [4, 4, 4, 3]
    assert len(trial_table(comparison).rows) == 15
