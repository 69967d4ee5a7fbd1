from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from orchestrator.compare import KNN_METRIC, Comparison, compare
from orchestrator.report import SMOKE_TEST, render_report, write_report
from orchestrator.trials import Curve, TrialSummary

LN_K = math.log(64)


class Page(HTMLParser):
    """What a browser would see of a page: elements with attributes, and text."""

    VOID = frozenset({"meta", "wbr", "rect", "line", "circle", "polyline"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, "elements overlap"

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.elements)


def trial(i: int, *, name: str | None = None, health: float = 0.5, seed: int = 0, **changes: str) -> TrialSummary:
    params = {
        "data.source": "digits",
        "pretrain.batch_size": "64",
        "pretrain.head.num_prototypes": "64",
        "pretrain.seed": str(seed),
        "pretrain.teacher.temp": f"0.0{i}",
    }
    curves: dict[str, Curve] = {
        "train/loss": [(step, LN_K - 0.01 * step * (1 - health)) for step in range(0, 50, 10)],
        "train/teacher_entropy": [(0, 0.7 * LN_K), *((step, health * LN_K) for step in range(10, 50, 10))],
        "train/images_per_s": [(0, 50.0), (40, 200.0)],
        KNN_METRIC: [(0, 60.0), (50, 70.0 + i)],
    }
    return TrialSummary(f"id{i}", name or f"trial-{i}", "finished", params | changes, seed, curves)


@pytest.fixture
def comparison() -> Comparison:
    return compare([trial(0), trial(1), trial(2, health=0.999)])


def test_the_report_tells_everything(comparison: Comparison, tmp_path: Path) -> None:
    path = write_report(
        tmp_path / "new" / "report.html",
        comparison,
        title="Sweep of temperatures",
        baselines={"random weights": 60.0, "raw pixels": 98.25},
        notes=["A note."],
        commands={"Open MLflow": "mlflow server --backend-store-uri sqlite:///m.db"},
    )
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    for expected in (
        "Sweep of temperatures",
        "72.00",
        "+12.00",
        "trial-2: teacher.temp 0.02",
        "trial-2: uniform collapse from step 20",
        "teacher entropy 0.999 of ln K; loss 4.159, that of outputs without information 4.159.",
        "Likely cause: the head has no batch norm",
        "98.25",
        "A note.",
        SMOKE_TEST,
        "mlflow server --backend-store-uri sqlite:///m.db",
        "The 4 that all trials share",
        "pretrain.batch_size",
    ):
        assert expected in page.text, expected
    assert page.count("svg") == 4
    assert page.count("polyline") == 4 * 3
    assert page.count("details") == 1


def test_only_collapsed_trials_are_explained(comparison: Comparison) -> None:
    text = Page(render_report(comparison, title="t")).text
    assert text.count("Likely cause") == 1
    healthy = Page(render_report(compare([trial(0), trial(1)]), title="t")).text
    assert "Likely cause" not in healthy
    assert "collapsed or diverged0" in healthy


def test_rank_has_a_chart_where_it_was_logged() -> None:
    trials = [trial(0), trial(1)]
    trials[1].curves["train/feature_rank"] = [(0, 10.0), (40, 8.5)]
    page = Page(render_report(compare(trials), title="t"))
    assert page.count("svg") == 5
    assert "Rank of the features" in page.text


def test_a_trial_without_prototypes_has_no_entropy_to_draw() -> None:
    other = trial(0, **{"pretrain.head.num_prototypes": "None", "pretrain.loss.name": "info_nce"})
    del other.curves["train/teacher_entropy"]
    page = Page(render_report(compare([other, trial(1)]), title="t"))
    assert page.count("polyline") == 3 + 4


def test_the_page_asks_for_nothing_and_runs_nothing(comparison: Comparison) -> None:
    text = render_report(comparison, title="t", baselines={"b": 1.0}, commands={"c": "see http://127.0.0.1:5000"})
    page = Page(text)
    assert {"script", "link", "img", "iframe", "object", "embed", "base", "form"}.isdisjoint(
        {tag for tag, _ in page.elements}
    )
    for _, attributes in page.elements:
        assert not {name for name in attributes if name.startswith("on") or name in ("src", "href", "xlink:href")}
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        '" onload="alert(1)',
        "' onmouseover='alert(1)",
        "</title></svg></style><img src=x onerror=alert(1)>",
        "&lt;b&gt;",
    ],
)
def test_hostile_text_stays_text(hostile: str) -> None:
    trials = [
        trial(0, name=hostile, **{"pretrain.model.backbone": hostile, hostile: "1"}),
        TrialSummary("id", "b", "failed", {"pretrain.model.backbone": "x"}, 0, {}, hostile),
    ]

    def page(text: str) -> Page:
        for item in trials:
            item.params["shared"] = text
        return Page(
            render_report(compare(trials), title=text, baselines={text: 50.0}, notes=[text], commands={text: text})
        )

    found, harmless = page(hostile), page("harmless")
    for _, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "src"]
    assert [tag for tag, _ in found.elements] == [tag for tag, _ in harmless.elements]  # no element came of it
    assert found.open == []
    assert found.text.count(hostile) >= 12  # title twice, note, baseline, commands, name, parameters, reason, charts


def test_only_digits_are_called_a_smoke_test() -> None:
    photos = {"data.source": "photos.parquet"}
    assert SMOKE_TEST not in render_report(compare([trial(0, **photos)]), title="t")
    both = render_report(compare([trial(0, **photos), trial(1)]), title="t", notes=[SMOKE_TEST])
    assert both.count(SMOKE_TEST) == 1


def test_seeds_get_a_table_of_configurations() -> None:
    pairs = compare([trial(i, seed=seed, name=f"{i}-{seed}") for i in range(2) for seed in range(2)])
    text = Page(render_report(pairs, title="t")).text
    assert "Configurations" in text
    assert "Configurations" not in Page(render_report(compare([trial(0), trial(1)]), title="t")).text


def test_the_papers_numbers_stand_in_the_ranking_under_a_line_that_says_what_they_are() -> None:
    paper = {f"paper/{KNN_METRIC}": "72.8", "paper/eval/linear_top1": "76.1", "paper/setting": "ImageNet, 300 epochs"}
    text = Page(render_report(compare([trial(0, row="a", **paper), trial(1, row="b")]), title="t")).text
    assert "The paper's numbers are at its own scale: ImageNet, 300 epochs." in text
    for expected in ("72.8", "paper, linear %", "76.1"):
        assert text.count(expected) == 1, expected
    assert "paper/" not in text  # not among the parameters
    assert "paper's" not in Page(render_report(compare([trial(0), trial(1)]), title="t")).text


def test_failed_and_empty_trials_are_reported() -> None:
    lost = TrialSummary("id", "lost", "failed", {}, None, {}, "out of memory\nat step 3")
    for trials in ([lost], [trial(0), lost]):
        page = Page(render_report(compare(trials), title="t"))
        assert "What went wrong" in page.text
        assert "out of memory\nat step 3" in page.text
        assert page.open == []
    assert Page(render_report(compare([lost]), title="t")).text.count("nothing logged") == 4


def test_a_report_is_replaced_whole(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(AttributeError):
        write_report(path, comparison, title=None)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    write_report(path, comparison, title="new")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
