"""The report in a real browser, from the file system and without a network: is everything drawn, and does it work?"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from docs.screenshots import WIDTH_PX, chromium, wait_for_drawing
from orchestrator.compare import KNN_METRIC, compare
from orchestrator.report import write_report
from orchestrator.report.style import DARK, LINES
from orchestrator.trials import Curve, Pictures, TrialSummary

LN_K = math.log(256)
HOSTILE = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1"><b>%{x}'


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with ExitStack() as stack:
        try:
            started = stack.enter_context(chromium(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"))
        except LookupError as missing:
            pytest.skip(str(missing))
        started.set_script_timeout(60)
        yield started


def png() -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.new("RGB", (40, 30), "#2563eb").save(content, "PNG")
    return content.getvalue()


def trial(i: int, **changes: Any) -> TrialSummary:
    centering, lr = ("center", "none", "sinkhorn_knopp")[i % 3], 10.0 ** -(1 + i % 4)
    params = {
        "pretrain.seed": "0",
        "pretrain.head.num_prototypes": "256",
        "pretrain.teacher.centering": centering,
        "pretrain.optim.lr": str(lr),
        "derived/steps_per_epoch": "40.0",
    }
    falling = centering == "none"
    curves: dict[str, Curve] = {
        "train/loss": [(step, LN_K * (0.0 if falling and step > 50 else 0.7)) for step in range(0, 201, 10)],
        "train/teacher_entropy": [(step, LN_K * (0.0 if falling and step > 50 else 0.6)) for step in range(0, 201, 10)],
        "train/images_per_s": [(step, 700.0 + i) for step in range(0, 201, 10)],
        "cost/device_hours": [(step, step * 0.001 * (1 + i)) for step in range(0, 201, 10)],
        KNN_METRIC: [(0, 40.0), (100, 50.0 + i), (200, math.nan if i == 5 else 60.0 + i)],
        "eval/rankme": [(0, 10.0), (100, 12.0), (200, 20.0 + i % 4)],
    }
    summary = TrialSummary(f"id{i}", f"trial-{i}", "finished", params, 0, curves)
    return replace(summary, **changes)


def open_page(browser: Any, folder: Path, trials: list[TrialSummary], title: str = "Title") -> Path:
    """Write a report, open it, and wait until the last chart is drawn."""
    path = write_report(folder / "report.html", compare(trials), title=title, baselines={"random weights": 40.0})
    browser.get_log("browser")  # what earlier pages said
    browser.get(path.as_uri())
    wait_for_drawing(browser)
    return path


def complaints(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def drawn(browser: Any) -> dict[str, int]:
    """The number of lines, bars and heat maps that have a size on the screen, by chart."""
    return browser.execute_script(
        """
        const marks = ".scatterlayer .js-line, .scatterlayer .point, .barlayer .point path, .heatmaplayer image";
        const count = (plot) => [...plot.querySelectorAll(marks)].filter((mark) => {
          const box = mark.getBoundingClientRect();
          return mark.closest(".barlayer") ? box.width * box.height > 0 : box.width + box.height > 0;
        }).length;
        return Object.fromEntries([...document.querySelectorAll(".plot")].map((plot) => [plot.id, count(plot)]));
        """
    )


def overflow_px(browser: Any) -> int:
    page = "document.documentElement"
    return int(browser.execute_script(f"return {page}.scrollWidth - {page}.clientWidth"))


@pytest.fixture(scope="module")
def page(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A report with everything in it, opened."""
    trials = [trial(i, load_pictures=lambda: Pictures(200, {"attention": png()})) for i in range(12)]
    trials[2] = replace(trials[2], name=HOSTILE, experiment=HOSTILE)
    trials[4] = TrialSummary("id4", "lost", "failed", {}, None, {}, f"out of memory {HOSTILE}")
    open_page(browser, tmp_path_factory.mktemp("page"), trials, HOSTILE)
    assert complaints(browser) == []
    return browser


def test_every_chart_is_drawn(page: Any) -> None:
    found = drawn(page)
    assert set(found) >= {
        "collapse-timeline",
        "curve-eval-knn-top1",
        "curve-eval-rankme",
        "curve-train-loss",
        "curve-train-teacher-entropy",
        "curve-train-images-per-s",
        "parallel-coordinates",
        "regret-rankme",
        "cost-hours",
        "cost-speed",
    }
    assert {chart: count for chart, count in found.items() if count < 4} == {}
    assert found["cost-speed"] == 11
    assert found["regret-rankme"] == 10  # neither the lost one nor that whose k-NN is no number
    pictures = "return [...document.images].map((image) => image.naturalWidth)"
    assert page.execute_script(pictures) == [40] * 11


def test_the_page_fits_its_window_and_asks_for_nothing(page: Any) -> None:
    assert page.execute_script("return innerWidth") == WIDTH_PX
    assert overflow_px(page) == 0
    asked = "return performance.getEntriesByType('resource').map((entry) => entry.name.slice(0, 5))"
    assert set(page.execute_script(asked)) <= {"data:", "blob:"}


def test_text_of_runs_is_shown_and_not_run(page: Any) -> None:
    assert page.execute_script("return window.hacked") is None
    assert page.title == HOSTILE
    names = page.execute_script("return [...document.querySelectorAll('td.name button')].map((x) => x.textContent)")
    assert HOSTILE in names


def test_curves_are_drawn_over_epochs_and_device_hours(page: Any) -> None:
    state = """
        const plot = document.getElementById("curve-eval-knn-top1");
        const best = plot.data.at(-1);
        return [plot.layout.xaxis.title.text, best.x, plot.querySelector(".xtitle").textContent];
    """
    expected = {"epoch": [0, 2.5, 5], "hours": [0, 1.2, 2.4], "step": [0, 100, 200]}
    words = {"epoch": "epoch", "hours": "device-hours", "step": "step"}
    for axis, places in expected.items():
        page.execute_script(f"document.querySelector('[data-axis={axis}]').click()")
        wait_for_drawing(page, axis)
        title, x, shown = page.execute_script(state)
        assert (title, shown) == (words[axis], words[axis])
        assert x == pytest.approx(places)
    assert complaints(page) == []


def test_a_click_on_the_legend_hides_a_trial_everywhere(page: Any) -> None:
    click = "document.querySelector('[data-trial=\"0\"]').click()"
    hidden = """
        return [...document.querySelectorAll(".plot")].filter((plot) =>
          plot.data.some((trace) => trace.meta === 0 && trace.visible === false)).length
    """
    page.execute_script(click)
    wait_for_drawing(page, "step")
    assert page.execute_script(hidden) == 6  # five curves and the parallel coordinates
    page.execute_script(click)
    wait_for_drawing(page, "step")
    assert page.execute_script(hidden) == 0


def test_a_box_over_the_parallel_coordinates_picks_trials(page: Any) -> None:
    opacities = "return document.getElementById('parallel-coordinates').data.map((trace) => trace.opacity)"
    usual = page.execute_script(opacities)
    plot = "document.getElementById('parallel-coordinates')"
    page.execute_script(f"{plot}.emit('plotly_selected', {{points: [{{curveNumber: 3}}]}})")
    assert [opacity > 0.1 for opacity in page.execute_script(opacities)] == [i == 3 for i in range(len(usual))]
    page.execute_script(f"{plot}.emit('plotly_deselect')")
    assert page.execute_script(opacities) == usual


def test_a_name_opens_to_what_is_behind_its_numbers(page: Any) -> None:
    shown = "return document.getElementById('more-0').getBoundingClientRect().height"
    assert page.execute_script(shown) == 0
    page.execute_script("document.querySelector('[aria-controls=more-0]').click()")
    assert page.execute_script(shown) > 50
    assert "id11" in page.execute_script("return document.getElementById('more-0').textContent")
    assert overflow_px(page) == 0
    page.execute_script("document.querySelector('[aria-controls=more-0]').click()")


def test_the_page_follows_the_system_into_the_dark(page: Any) -> None:
    colours = """
        const line = document.querySelector("#curve-eval-knn-top1 .trace:last-child .js-line");
        return [getComputedStyle(document.body).backgroundColor, getComputedStyle(line).stroke];
    """

    def rgb(colour: str) -> str:
        return "rgb({}, {}, {})".format(*bytes.fromhex(colour.removeprefix("#")))

    assert page.execute_script(colours) == [rgb("#f7f8fa"), rgb(LINES[0])]
    media = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    page.execute_async_script("setTimeout(arguments[0], 100)")
    wait_for_drawing(page, "step")
    assert page.execute_script(colours) == [rgb("#10141b"), rgb(DARK[LINES[0]])]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert complaints(page) == []


@pytest.mark.parametrize("num_trials", [0, 1, 200])
def test_any_number_of_trials_is_readable(browser: Any, tmp_path: Path, num_trials: int) -> None:
    lost = TrialSummary("lost", "lost", "failed", {}, None, {}, "out of memory")
    path = open_page(browser, tmp_path, [*(trial(i) for i in range(num_trials)), lost])
    assert complaints(browser) == []
    assert overflow_px(browser) == 0
    found = drawn(browser)
    if num_trials == 0:
        assert browser.execute_script("return document.querySelectorAll('.plot .annotation').length") == len(found) == 4
    else:
        assert {chart: count for chart, count in found.items() if count == 0} == {}
    assert os.path.getsize(path) < 8e6
