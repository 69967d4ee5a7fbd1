from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.charts import Band, Level, Line, line_chart, thin, ticks


def texts(svg: str, tag: str) -> list[str]:
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter(tag)]


def polylines(svg: str) -> list[list[tuple[float, float]]]:
    found = []
    for element in ET.fromstring(svg).iter("polyline"):
        pairs = [point.split(",") for point in element.attrib["points"].split()]
        found.append([(float(x), float(y)) for x, y in pairs])
    return found


@given(low=st.floats(-1e6, 1e6), size=st.floats(0.01, 1e7), about=st.integers(min_value=3, max_value=8))
def test_ticks_are_round_even_and_inside(low: float, size: float, about: int) -> None:
    high = low + size
    found = ticks(low, high, about)
    assert 1 <= len(found) <= about + 1
    assert all(low - 1e-6 * size <= tick <= high + 1e-6 * size for tick in found)
    gaps = [after - before for before, after in itertools.pairwise(found)]
    assert all(gap == pytest.approx(gaps[0], rel=1e-6) for gap in gaps)


def test_ticks_of_usual_ranges() -> None:
    assert ticks(0, 300) == [0, 100, 200, 300]
    assert ticks(0.0, 1.02) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_points_are_where_their_values_are() -> None:
    svg = line_chart("t", [Line("a", [(0, 0.0), (50, 1.0), (100, 0.5)], 0)], y_range=(0.0, 1.0))
    ((first, middle, last),) = polylines(svg)
    assert middle[0] == pytest.approx((first[0] + last[0]) / 2, abs=0.1)
    assert middle[1] < last[1] < first[1]  # up is less
    assert last[1] == pytest.approx((first[1] + middle[1]) / 2, abs=0.1)


def test_values_that_are_not_finite_leave_gaps() -> None:
    points = [(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.0), (4, math.inf), (5, 3.0)]
    assert [len(line) for line in polylines(line_chart("t", [Line("a", points, 0)]))] == [2, 1, 1]


@pytest.mark.parametrize("points", [[], [(0, math.nan)]])
def test_a_chart_of_nothing_says_so(points: list[tuple[int, float]]) -> None:
    assert "nothing logged" in texts(line_chart("t", [Line("a", points, 0)]), "text")


@pytest.mark.parametrize("points", [[(0, 5.0)], [(0, 0.0)], [(7, -1.0), (9, -1.0)], [(0, 1e-9), (1, 2e9)]])
def test_odd_ranges_stay_inside_the_picture(points: list[tuple[int, float]]) -> None:
    for line in polylines(line_chart("t", [Line("a", points, 0)])):
        assert all(0 <= x <= 560 and 0 <= y <= 300 for x, y in line)


def test_levels_bands_ticks_and_titles_are_drawn() -> None:
    lines = [Line(f"trial {i}", [(0, 0.5), (10, 0.6 + 0.01 * i)], i) for i in range(12)]
    svg = line_chart("Title", lines, unit="share", levels=[Level("random", 0.55)], bands=[Band("bad", 0.98, 1.0)])
    shown = texts(svg, "text")
    assert {"Title", "share", "step", "random 0.55"} <= set(shown)
    titles = texts(svg, "title")
    assert "bad" in titles
    assert "trial 3\nstep 10: 0.63 share" in titles  # what hovering shows
    groups = [element.attrib["class"] for element in ET.fromstring(svg).iter("g")]
    assert groups == [f"line s{i % 10}" for i in reversed(range(12))]
    dashed = [element.attrib.get("stroke-dasharray") for element in ET.fromstring(svg).iter("polyline")]
    assert [dash is not None for dash in dashed] == [i >= 10 for i in reversed(range(12))]


def test_text_is_escaped() -> None:
    bad = '"><script>alert(1)</script>&'
    svg = line_chart(bad, [Line(bad, [(0, 1.0)], 0)], unit=bad, levels=[Level(bad, 1.0)], bands=[Band(bad, 0, 1)])
    assert "<script" not in svg
    assert bad in texts(svg, "text")  # parses, and reads as it was


def test_thinning_keeps_ends_extremes_and_gaps() -> None:
    points = [(step, math.sin(step / 300)) for step in range(10_000)]
    points[4321] = (4321, 9.0)
    points[7000] = (7000, -9.0)
    points[8000] = (8000, math.nan)
    kept = thin(points, 300)
    assert len(kept) <= 300
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert {0, 4321, 7000, 8000, 9999} <= {step for step, _ in kept}
    assert thin(points[:300], 300) == points[:300]
