from __future__ import annotations

from xml.etree import ElementTree

import pytest

from edgeprune.bench.html import charts, svg
from edgeprune.bench.html.charts import Bar, Point, SpeedRow
from edgeprune.bench.stats import Ratio
from tests.helpers.reports import full, trained


def test_tag_escapes_what_it_holds() -> None:
    made = svg.tag("text", text='<a & "b">', x=1.5, class_='"><script>')
    parsed = ElementTree.fromstring(made)
    assert parsed.text == '<a & "b">'
    assert parsed.attrib == {"x": "1.5", "class": '"><script>'}


def test_tag_turns_underscores_into_hyphens_and_leaves_out_none() -> None:
    assert svg.tag("g", aria_label="x", data_n=2, fill=None) == '<g aria-label="x" data-n="2"/>'


@pytest.mark.parametrize(("rough", "step"), [(0.9, 1), (1, 1), (1.1, 2), (3, 5), (7, 10), (0.03, 0.05), (240, 500)])
def test_nice_step_is_one_two_or_five(rough: float, step: float) -> None:
    assert svg.nice_step(rough) == pytest.approx(step)


def test_ticks_are_round_and_inside() -> None:
    scale = svg.Scale(0.94, 3.2, 0, 100)
    assert scale.ticks(4) == [1, 2, 3]
    assert [svg.tick_text(t, 0.5) for t in (0.5, 1.0)] == ["0.5", "1.0"]
    assert svg.tick_text(20.0, 10.0) == "20"


def test_scale_maps_ends_to_ends() -> None:
    scale = svg.Scale(10, 20, 50, 250)
    assert (scale(10), scale(15), scale(20)) == (50, 150, 250)


@pytest.mark.parametrize("values", [[3.0], [3.0, 3.0], [0.0]])
def test_fit_of_one_value_has_a_range(values: list[float]) -> None:
    scale = svg.fit(values, 0, 10)
    assert scale.low < values[0] < scale.high


def test_fit_from_zero_keeps_zero_at_the_start() -> None:
    assert svg.fit([5.0, 9.0], 0, 10, zero=True)(0.0) == 0


def test_free_place_stays_when_nothing_is_in_the_way() -> None:
    assert svg.free_place([(0, 10, 50.0)], 20, 40, 50.0, 0, 100) == 50.0


def test_free_place_moves_off_what_is_taken() -> None:
    at = svg.free_place([(0, 30, 50.0)], 20, 40, 50.0, 0, 100)
    assert abs(at - 50.0) >= svg.FONT


def test_every_kind_has_its_own_shape() -> None:
    shapes = {svg.marker(kind, 0, 0).replace(kind, "") for kind in ("dense", "pruned", "random", "naive")}
    assert len(shapes) == 4


def parsed(drawing: str) -> ElementTree.Element:
    """Return the drawing, which must be well-formed, named and described."""
    element = ElementTree.fromstring(drawing)
    title, description = element[0], element[1]
    assert (title.tag, description.tag) == ("title", "desc")
    assert element.attrib["role"] == "img"
    assert element.attrib["aria-labelledby"].split() == [title.attrib["id"], description.attrib["id"]]
    return element


def texts(element: ElementTree.Element) -> list[str]:
    return [t.text or "" for t in element.iter("text")]


def test_distributions_show_the_numbers_of_the_result() -> None:
    runners = trained().runners
    drawn = parsed(charts.distributions(runners, key="k", width=700))
    for runner in runners:
        assert f"median {runner.median_wall_ms:.3f} ms · n {runner.n}" in texts(drawn)
        assert f"{runner.name}: median {runner.median_wall_ms:.3f} ms" in (drawn[1].text or "")


def test_distributions_count_what_lies_beyond_the_axis() -> None:
    drawn = parsed(charts.distributions(trained().runners[:1], key="k", width=700))
    assert any(text == "1 above ▸" for text in texts(drawn))


def test_distributions_draw_no_more_dots_than_asked_for() -> None:
    drawn = charts.distributions(trained().runners[:1], key="k", width=700, dots=20)
    dots = next(p for p in parsed(drawn).iter("path") if p.attrib["class"].startswith("dots"))
    assert dots.attrib["d"].count("M") == 20


@pytest.mark.parametrize("count", [1, 2, 9])
def test_distributions_of_equal_or_few_samples_can_be_drawn(count: int) -> None:
    from tests.helpers.bench import summary

    runners = summary({"dense": [5.0] * 2 * count}, rounds=2 * count).runners
    assert "nan" not in charts.distributions(runners, key="k", width=330)


def test_speedups_show_interval_and_promise() -> None:
    row = SpeedRow("pruned", "pruned", Ratio(1.5, 1.4, 1.6, 0.95, 10), 1.8, 1.7)
    drawn = parsed(charts.speedups([row], key="k", width=700))
    assert drawn[1].text == "pruned: measured 1.500 [1.400, 1.600], MACs ratio 1.80, ideal 1.70"
    assert [t.text for t in drawn.iter("title")][1:] == ["MACs ratio 1.80", "ideal 1.70", "1.500 [1.400, 1.600]"]


def test_speedup_without_an_interval_has_no_whisker() -> None:
    row = SpeedRow("pruned", "pruned", Ratio(1.5, None, None, 0.95, 2), None, None)
    assert "whisker" not in charts.speedups([row], key="k", width=700)


def points(*places: tuple[float, float]) -> list[Point]:
    return [Point(f"p{i}", "pruned", x, y) for i, (x, y) in enumerate(places)]


@pytest.mark.parametrize(
    ("places", "best"),
    [
        ([(1, 90), (2, 95)], [True, True]),
        ([(1, 95), (2, 90)], [True, False]),
        ([(1, 95), (2, 95)], [True, False]),
        ([(1, 90), (1, 95)], [False, True]),
        ([(1, 90), (1, 90)], [True, True]),
    ],
)
def test_frontier_is_what_nothing_beats(places: list[tuple[float, float]], best: list[bool]) -> None:
    assert charts.on_frontier(points(*places)) == best


def test_frontier_hollows_what_is_beaten() -> None:
    drawn = parsed(charts.frontier(points((1, 95), (2, 90)), key="k", width=700))
    assert [c.attrib["class"].split()[0] for c in drawn.iter("circle")] == ["fill", "line"]
    assert drawn[1].text == "p0: 95.00 % at 1.000 ms, on the frontier; p1: 90.00 % at 2.000 ms"


@pytest.mark.parametrize("width", [330.0, 900.0])
def test_labels_of_points_stay_inside(width: float) -> None:
    drawn = parsed(charts.tokens(points((64, 1.0), (63, 1.01), (20, 0.5)), key="k", width=width))
    for text in drawn.iter("text"):
        if (text.text or "").startswith("p"):
            assert 0 <= float(text.attrib["x"]) <= width


def test_bars_are_as_long_as_their_values() -> None:
    rows = [Bar("", "dense", "dense", 4.0, "4 J"), Bar("", "pruned", "pruned", 1.0, "1 J")]
    drawn = parsed(charts.bars(rows, key="k", width=700, title="Energy", unit="J"))
    long, short = (float(r.attrib["width"]) for r in drawn.iter("rect"))
    assert long == pytest.approx(4 * short, rel=0.01)


def test_part_bars_have_a_bar_for_every_graph() -> None:
    rows = charts.part_bars(full(trained()).layers)
    assert [(r.group, r.name) for r in rows] == [
        ("attention", "dense"),
        ("attention", "pruned"),
        ("mlp", "dense"),
        ("mlp", "pruned"),
    ]
    assert rows[0].text == "30.000 ms (60.0 %)"
