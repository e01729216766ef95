from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from edgeprune.bench.html import ReportInput, page, render
from edgeprune.bench.report import report_notes, report_tables
from edgeprune.bench.result import BenchResult
from edgeprune.errors import EnvironmentLackError
from tests.helpers.bench import summary
from tests.helpers.reports import accuracies, full, overlays, report, times, trained

STYLE = Path(page.TEMPLATES / "report.css").read_text()
EVIL = "<script>alert(1)</script>\"'&"


class Reader(HTMLParser):
    """Takes down cells, ids and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.links += [v for k, v in attrs if k in ("href", "src") and v]
        if tag in ("td", "th"):
            self.cells.append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())
        if self._in_cell:
            self.cells[-1] += data.strip()


@pytest.mark.parametrize("result", [trained(), full(trained())], ids=["times", "layers-and-energy"])
def test_tables_hold_what_the_terminal_shows(result: BenchResult) -> None:
    read = Reader(render(report(result)))
    for title, rows in report_tables(result):
        for row in rows:
            if title == "where the time goes":  # a column for each graph there
                assert f"{row['ms']} ({row['share (%)']} %)" in read.cells
            else:
                assert all((cell or "–") in read.cells for cell in (*row, *row.values()))
    for note in report_notes(result):
        assert note in read.texts


def test_every_section_is_there() -> None:
    text = render(report(full(trained())), [overlays()])
    for key in ("table", "speed", "latency", "frontier", "tokens", "layers", "energy", "kept", "machine", "reproduce"):
        assert f'<section id="{key}"' in text
        assert f'<a href="#{key}">' in text


def test_what_was_not_measured_is_said() -> None:
    text = render(ReportInput(results=[trained()]))
    for sentence in ("No accuracy was given.", "No energy was measured", "hold no times of single layers"):
        assert sentence in text
    assert '<section id="kept"' not in text


def test_energy_names_rail_and_method_and_layers_stand_once() -> None:
    text = render(report(full(trained())))
    assert "(rapl, rail package-0, by counter)" in text
    assert "500.00 mJ" in text
    assert text.count("onnxruntime profiler") == 1
    assert text.count("by part of the network</caption>") == 1
    assert "█" not in text


def test_random_weights_are_said_and_draw_no_accuracy() -> None:
    result = summary({"dense": 100.0, "pruned": 50.0})
    text = render(report(result))
    assert "Random weights have no accuracy worth drawing" in text
    assert "Accuracy against latency</title>" not in text
    assert "random weights: these mean nothing" in text


def test_several_results_have_letters_and_mixed_machines_a_warning() -> None:
    one = trained()
    text = render(report(one, replace(one, fingerprint={"cpu_model": "another"})))
    assert "several machines" in text
    assert "A: pruned" in text
    assert "B: pruned" in text


def test_dense_bundle_alone_can_be_reported() -> None:
    text = render(ReportInput(results=[summary({"dense": 100.0})]))
    assert "nothing to compare with the dense graph" in text


def test_ids_are_unique_and_links_lead_somewhere() -> None:
    read = Reader(render(report(full(trained()), full(trained(batch=8))), [overlays(), overlays()]))
    assert [name for name, count in Counter(read.ids).items() if count > 1] == []
    assert {link[1:] for link in read.links if link.startswith("#")} <= set(read.ids)


def test_page_loads_nothing() -> None:
    text = render(report(full(trained())), [overlays()])
    assert all(link.startswith(("#", "data:")) for link in Reader(text).links)
    assert "default-src 'none'" in text
    assert not re.search(r"https?://", text)


def test_everything_from_outside_is_escaped() -> None:
    result = trained()
    bundle = {**result.bundle, "model": EVIL}
    result = replace(
        result,
        bundle=bundle,
        fingerprint={"cpu_model": EVIL, EVIL: EVIL},
        warnings=[EVIL],
        unstable=[EVIL],
        runners=[replace(r, name=f"{r.name}{EVIL}") if r.name == "random" else r for r in result.runners],
    )
    drawn = overlays()
    drawn = replace(
        drawn, title=EVIL, densities=[EVIL, "0.5"], pictures=[replace(p, name=EVIL) for p in drawn.pictures]
    )
    known = accuracies(result, data=EVIL, emulated=EVIL)
    text = render(ReportInput(results=[result], accuracies=[known]), [drawn], title=EVIL)
    assert "<script>alert" not in text
    assert text.count("<script>") == 1
    assert EVIL in Reader(text).texts


def test_large_report_stays_below_two_megabytes() -> None:
    many = [replace(trained(), runners=_many_samples()) for _ in range(40)]
    assert len(render(report(*many)).encode()) < page.MAX_BYTES


def _many_samples() -> list:
    values = times(10.0, 3000)
    return [replace(r, wall_ms=values, cpu_ms=values, n=len(values)) for r in trained().runners]


def test_without_jinja2_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(EnvironmentLackError) as caught:
        render(report(trained()))
    assert caught.value.code == "package-missing"
    assert "edgeprune[report]" in (caught.value.hint or "")


def colours(block: str) -> dict[str, str]:
    return dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block))


LIGHT = colours(re.search(r":root \{(.*?)\}", STYLE, re.DOTALL).group(1))  # type: ignore[union-attr]
DARK = colours(re.search(r':root\[data-theme="dark"\] \{(.*?)\}', STYLE, re.DOTALL).group(1))  # type: ignore[union-attr]
SYSTEM = colours(re.search(r"prefers-color-scheme: dark\) \{(.*?)\}", STYLE, re.DOTALL).group(1))  # type: ignore[union-attr]


def contrast(one: str, other: str) -> float:
    """Return the contrast of WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_wcag() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("ink", "paper", "least"),
    [
        *((ink, paper, 4.5) for ink in ("ink", "muted", "link") for paper in ("page", "card", "code")),
        ("warn-ink", "warn-page", 4.5),
        *((mark, "card", 4.5) for mark in ("pruned", "naive")),  # the headline and its verdict
        *((mark, "card", 3.0) for mark in ("dense", "random", "promise", "warn-line")),
    ],
)
def test_colours_pass_wcag_aa(theme: dict[str, str], ink: str, paper: str, least: float) -> None:
    assert contrast(theme[ink], theme[paper]) >= least


def test_dark_is_the_same_by_system_and_by_button() -> None:
    assert DARK == SYSTEM
    assert DARK.keys() == LIGHT.keys()
