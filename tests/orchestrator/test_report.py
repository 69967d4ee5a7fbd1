from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from orchestrator.compare import KNN_METRIC, Comparison, compare
from orchestrator.report import SMOKE_TEST, render_report, write_report
from orchestrator.report.pictures import MAX_BYTES
from orchestrator.trials import Curve, Pictures, TrialSummary

LN_K = math.log(64)


class Page(HTMLParser):
    """What a browser would see of a page: elements with attributes, and text."""

    VOID = frozenset({"meta", "wbr", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.scripts: list[tuple[str | None, str]] = []
        """Type and content."""
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
        if self.open and self.open[-1] == "script":
            self.scripts.append((self.elements[-1][1].get("type"), data))
        elif not self.open or self.open[-1] != "style":
            self.text += data

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.elements)

    @property
    def charts(self) -> dict[str, Any]:
        """What the page's script draws, by the id of its place."""
        (text,) = [content for kind, content in self.scripts if kind == "application/json"]
        return {chart["id"]: chart for chart in json.loads(text)["charts"]}

    def lines(self, chart: str) -> int:
        return len(self.charts[chart]["data"])

    def words(self, chart: str) -> list[str]:
        """The annotations of a chart."""
        return [found["text"] for found in self.charts[chart]["layout"].get("annotations", [])]


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
    curves = ["curve-eval-knn-top1", "curve-train-loss", "curve-train-teacher-entropy", "curve-train-images-per-s"]
    assert list(page.charts) == ["collapse-timeline", *curves, "parallel-coordinates", "cost-speed"]
    assert [page.lines(chart) for chart in curves] == [3, 3, 3, 3]
    assert page.words("curve-eval-knn-top1") == ["random weights 60", "raw pixels 98.25"]
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
    assert "curve-train-feature-rank" not in Page(render_report(compare([trial(0)]), title="t")).charts
    page = Page(render_report(compare(trials), title="t"))
    assert page.lines("curve-train-feature-rank") == 1
    assert "Rank of the features" in page.text


def test_a_trial_without_prototypes_has_no_entropy_to_draw() -> None:
    other = trial(0, **{"pretrain.head.num_prototypes": "None", "pretrain.loss.name": "info_nce"})
    del other.curves["train/teacher_entropy"]
    page = Page(render_report(compare([other, trial(1)]), title="t"))
    assert (page.lines("curve-train-teacher-entropy"), page.lines("curve-train-loss")) == (1, 2)
    assert len(page.charts["collapse-timeline"]["data"][0]["z"]) == 1


def test_the_page_asks_for_nothing_and_runs_only_its_own_scripts(comparison: Comparison) -> None:
    text = render_report(comparison, title="t", baselines={"b": 1.0}, commands={"c": "see http://127.0.0.1:5000"})
    page = Page(text)
    assert {"link", "img", "iframe", "object", "embed", "base", "form"}.isdisjoint({tag for tag, _ in page.elements})
    for tag, attributes in page.elements:
        assert not {name for name in attributes if name.startswith("on") or name in ("src", "xlink:href")}
        assert tag == "a" or "href" not in attributes
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv"))
    assert policy is not None
    scripts = [content for kind, content in page.scripts if kind is None]
    allowed = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(allowed) == 2
    assert policy.split("; ") == [
        "default-src 'none'",
        f"script-src 'sha256-{allowed[0]}' 'sha256-{allowed[1]}'",
        "style-src 'unsafe-inline'",
        "img-src data: blob:",
    ]


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        '" onload="alert(1)',
        "' onmouseover='alert(1)",
        "</title></svg></style><img src=x onerror=alert(1)>",
        "&lt;b&gt;",
        "<b>%{x}</b></script><!--<script>",
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
    assert found.text.count(hostile) >= 12  # title twice, note, baseline, commands, name, parameters, reason, legend
    assert len(found.scripts) == 3
    drawn = json.dumps(found.charts)
    assert "<" not in re.sub(r"<br>|<b>[^<]*</b>|<extra></extra>", "", drawn)  # marks of our own alone
    assert html.escape(hostile, quote=False) in found.charts["curve-train-loss"]["data"][0]["text"]


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
    page = Page(render_report(compare([lost]), title="t"))
    curves = [chart for chart in page.charts if chart.startswith("curve-")]
    assert [page.words(chart) for chart in curves] == [["nothing logged"]] * 4
    assert "-" in page.text  # no value to show


def test_trials_that_share_a_verdict_and_a_cause_are_told_together() -> None:
    text = Page(render_report(compare([trial(i, health=0.999) for i in range(1, 6)]), title="t")).text
    assert text.count("Likely cause") == 1
    assert "uniform collapse: 5 trials" in text
    assert all(f"trial-{i}: uniform collapse from step 20" in text for i in range(1, 6))


def test_a_trial_stopped_early_is_told_apart_from_one_that_failed() -> None:
    stopped = replace(trial(1), status="stopped", reason="behind the median at step 40")
    text = Page(render_report(compare([trial(0), stopped]), title="t")).text
    assert "What went wrong" not in text
    assert text.index("Cost") < text.index("Stopped early") < text.index("behind the median")


def test_a_number_leads_to_its_run_configuration_commit_and_data() -> None:
    known = replace(
        trial(1),
        experiment="temperature",
        git_commit="0a1b" * 10,
        data_digest="sha256:77",
        uri="http://mlflow.example:5000/#/experiments/3/runs/id1",
    )
    page = Page(render_report(compare([known, trial(0)]), title="t"))
    for fact in (
        "runid1",
        "measured atstep 50",
        "configurationpretrain.teacher.temp = 0.01",
        "commit" + "0a1b" * 10,
        "datasha256:77",
        "experimenttemperature",
        "commitnot recorded",
    ):
        assert fact in page.text, fact
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert [link for link in links if not str(link).startswith("#")] == [known.uri]
    (title,) = [str(a["title"]) for tag, a in page.elements if tag == "tr" and "id1" in str(a.get("title"))]
    assert "0a1b" in title
    buttons = [a["aria-controls"] for tag, a in page.elements if tag == "button" and "aria-controls" in a]
    assert buttons == [a["id"] for _, a in page.elements if a.get("class") == "more"] == ["more-0", "more-1"]


def test_what_is_no_web_page_is_no_link() -> None:
    page = Page(render_report(compare([replace(trial(0), uri="javascript:alert(1)")]), title="t"))
    assert "javascript:alert(1)" in page.text
    assert [str(a["href"])[0] for tag, a in page.elements if tag == "a"] == ["#"] * page.count("a")


def picture(size: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + bytes(size)


def test_pictures_stand_side_by_side_best_first() -> None:
    trials = [
        replace(trial(i), load_pictures=lambda i=i: Pictures(100 * i, {"attention": picture(i), "heads": picture(9)}))
        for i in range(3)
    ]
    page = Page(render_report(compare(trials), title="t"))
    shown = [a for tag, a in page.elements if tag == "img"]
    assert [a["alt"] for a in shown[:3]] == ["1. trial-2, step 200", "2. trial-1, step 100", "3. trial-0, step 0"]
    assert base64.b64decode(str(shown[0]["src"]).removeprefix("data:image/png;base64,")) == picture(2)
    assert page.text.index("Attention maps") < page.text.index("heads")
    assert len(shown) == 6
    assert "Pictures" not in Page(render_report(compare([trial(0)]), title="t")).text


def test_pictures_that_do_not_fit_are_left_out_and_counted() -> None:
    large = picture(MAX_BYTES // 2 - 8)
    trials = [replace(trial(i), load_pictures=lambda: Pictures(1, {"crops": large})) for i in range(3)]
    page = Page(render_report(compare(trials), title="t"))
    assert page.count("img") == 2
    assert "1 pictures are left out: a page holds 8 MB of them." in page.text


def test_many_trials_keep_ten_colours_and_one_legend() -> None:
    page = Page(render_report(compare([trial(0, name=f"trial-{i}", seed=i) for i in range(40)]), title="t"))
    assert "30 more trials, by name under the pointer" in page.text
    assert sum("data-trial" in a for _, a in page.elements) == 10
    lines = page.charts["curve-train-loss"]["data"]
    assert len(lines) == 40
    assert {line["line"]["color"] for line in lines[:30]} == {"#a8b2c0"}  # the best are drawn last, on top
    assert len({line["line"]["color"] for line in lines[30:]}) == 10


def test_a_report_is_replaced_whole(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(AttributeError):
        write_report(path, comparison, title=None)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    write_report(path, comparison, title="new")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
