"""The report in a real Chromium: it renders, it can be used, and it can be read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeprune.bench.html import render
from tests.helpers.browser import NAMES, Page, find_chromium, open_browser
from tests.helpers.reports import full, overlays, report, trained

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason=f"no Chromium: none of {', '.join(NAMES)} on the path, nor $CHROMIUM"),
]
DESKTOP, PHONE = (1200, 900), (360, 780)

# Every text that is shown with its contrast to what lies behind it, (text, ratio, least ratio); SVG text has `fill`.
CONTRAST = """(() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim();
    const e = walker.currentNode.parentElement;
    if (!text || ["SCRIPT", "title", "desc"].includes(e.tagName)) continue;
    if (!e.getClientRects().length) continue;
    const style = getComputedStyle(e);
    const ink = parse(e instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    found.push([text, (a + 0.05) / (b + 0.05), large ? 3 : 4.5]);
  }
  return found;
})()"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    one = full(trained())
    other = replace(full(trained(batch=8)), fingerprint={"cpu_model": "another with a long name of its own"})
    path.write_text(render(report(one, other), [overlays()]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert CHROMIUM is not None
    with open_browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser: Page, file: Path, tmp_path: Path) -> Iterator[Page]:
    """Open the report as a desktop with light colours that remembers nothing; complaints fail the test."""
    browser.resize(*DESKTOP)
    browser.prefer("light")
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(file)
    browser.run("localStorage.clear()")
    browser.open(file)
    yield browser
    assert browser.complaints == []
    assert {url for url in browser.requests if not url.startswith("data:")} == {file.resolve().as_uri()}


def test_page_renders_without_complaints_or_network(page: Page) -> None:
    assert page.run("document.querySelector('h1').textContent") == "2 benches"
    heights = page.run("[...document.querySelectorAll('.wide svg')].map((s) => s.getBoundingClientRect().height)")
    assert len(heights) >= 7
    assert all(height > 50 for height in heights)
    assert page.run("document.querySelector('[data-picture] image').getBoundingClientRect().width") > 50


@pytest.mark.parametrize("size", [PHONE, (320, 640), (768, 1024), DESKTOP])
def test_nothing_scrolls_sideways(page: Page, size: tuple[int, int]) -> None:
    page.resize(*size, phone=size[0] < 700)
    assert page.run("document.documentElement.scrollWidth") <= size[0]
    beyond = """[...document.querySelectorAll('main svg, main td, main th, main p, main li, main input')]
      .filter((e) => e.getClientRects().length && e.getBoundingClientRect().right > innerWidth + 1)
      .filter((e) => !e.closest('.table, pre, thead')).map((e) => e.outerHTML.slice(0, 80))"""
    assert page.run(beyond) == []


def test_phone_gets_its_own_drawings_and_legible_text(page: Page) -> None:
    page.resize(*PHONE, phone=True)
    shown = page.run("[...document.querySelectorAll('.wide, .narrow')].map((e) => e.getClientRects().length > 0)")
    assert shown == [False, True] * (len(shown) // 2)
    scale = page.run("""[...document.querySelectorAll('.narrow svg')]
      .map((s) => s.getBoundingClientRect().width / s.viewBox.baseVal.width)""")
    assert min(scale) > 0.85
    assert page.run("getComputedStyle(document.body).fontSize") == "16px"


def test_texts_of_drawings_stay_inside(page: Page) -> None:
    code = """[...document.querySelectorAll('svg.plot text')].filter((t) => t.getClientRects().length).filter((t) => {
      const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect();
      return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
    }).map((t) => t.textContent)"""
    assert page.run(code) == []
    page.resize(*PHONE, phone=True)
    assert page.run(code) == []


def ground(page: Page) -> str:
    return page.run("getComputedStyle(document.body).backgroundColor")


def test_colours_follow_the_system_and_the_button(page: Page) -> None:
    light = ground(page)
    page.prefer("dark")
    dark = ground(page)
    assert light != dark
    seen = []
    for _ in range(3):
        page.run("document.getElementById('theme').click()")
        seen.append((page.run("document.getElementById('theme').dataset.now"), ground(page)))
    assert seen == [("light", light), ("dark", dark), ("auto", dark)]


def test_chosen_colours_are_remembered(page: Page, file: Path) -> None:
    light = ground(page)
    page.run("document.getElementById('theme').click(), document.getElementById('theme').click()")
    page.open(file)
    assert page.run("document.getElementById('theme').dataset.now") == "dark"
    assert ground(page) != light


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_every_text_passes_wcag_aa(page: Page, scheme: str, size: tuple[int, int]) -> None:
    page.prefer(scheme)
    page.resize(*size, phone=size == PHONE)
    found = page.run(CONTRAST)
    assert len(found) > 200
    assert [text for text in found if text[1] < text[2]] == []


def state(page: Page) -> dict[str, Any]:
    """Return what the overlay shows: the densities and stages drawn, and the words beside them."""
    return page.run("""(() => {
      const figure = document.querySelector('[data-picture]');
      const on = (e) => e.getAttribute('display') !== 'none';
      return {
        drawn: [...figure.querySelectorAll('g')].filter(on).flatMap((g) =>
          [...g.querySelectorAll('path')].filter(on).map((p) => `${g.dataset.density}/${p.dataset.stage}`)),
        stage: document.querySelector('[data-stage-told]').textContent,
        density: document.querySelector('[data-density-told]').textContent,
        told: figure.querySelector('[data-told]').textContent,
        left: figure.querySelector('[data-left]').textContent,
        spoken: document.querySelector('[data-stage-slider]').getAttribute('aria-valuetext'),
      };
    })()""")


def slide(page: Page, which: str, value: int) -> None:
    page.run(f"""(() => {{
      const slider = document.querySelector('[data-{which}-slider]');
      slider.value = {value};
      slider.dispatchEvent(new Event('input', {{ bubbles: true }}));
    }})()""")


def test_overlay_starts_with_every_stage_of_the_first_density(page: Page) -> None:
    assert state(page) == {
        "drawn": ["0/1", "0/2"],
        "stage": "2 of 2: in front of block 6",
        "density": "0.7",
        "told": "says 7 (90.0 %) ✓ right",
        "left": "2 of 4 patches (50 %)",
        "spoken": "2 of 2: in front of block 6",
    }


def test_sliders_move_over_stages_and_densities(page: Page) -> None:
    slide(page, "stage", 1)
    assert (state(page)["drawn"], state(page)["left"]) == (["0/1"], "3 of 4 patches (75 %)")
    slide(page, "density", 1)
    now = state(page)
    assert (now["drawn"], now["density"], now["told"]) == (["1/1"], "0.5", "says 8 (60.0 %) ✗ wrong")
    slide(page, "stage", 0)
    assert (state(page)["drawn"], state(page)["left"]) == ([], "4 of 4 patches (100 %)")


def test_slider_moves_by_the_keyboard(page: Page) -> None:
    page.run("document.querySelector('[data-stage-slider]').focus()")
    for kind in ("rawKeyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key="ArrowLeft", code="ArrowLeft", windowsVirtualKeyCode=37)
    assert state(page)["stage"].startswith("1 of 2")


def test_play_runs_through_the_stages_and_stops(page: Page) -> None:
    page.run("document.querySelector('[data-play]').click()")
    assert state(page)["stage"] == "before any stage"
    assert page.run("document.querySelector('[data-play]').getAttribute('aria-pressed')") == "true"
    page.run("new Promise((done) => setTimeout(done, 1000))")
    assert state(page)["stage"].startswith("1 of 2")
    page.run("document.querySelector('[data-play]').click()")
    assert page.run("document.querySelector('[data-play]').getAttribute('aria-pressed')") == "false"


def test_every_control_and_drawing_has_a_name(page: Page) -> None:
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    wanted = {"button", "slider", "image", "link", "table", "region", "img"}
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node.get("ignored") and node.get("role", {}).get("value") in wanted
    ]
    assert {role for role, _ in named} >= {"button", "slider", "image", "link", "table", "region"}
    assert [role for role, name in named if not name.strip()] == []


def test_without_scripts_the_controls_are_not_there(page: Page) -> None:
    shown = "[...document.querySelectorAll('#theme, .controls, .gallery')].map((e) => e.getClientRects().length > 0)"
    assert page.run(shown) == [True, True, True]
    page.run("document.documentElement.classList.remove('scripted')")  # which a script sets
    assert page.run(shown) == [False, False, True]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_screenshots_are_taken(page: Page, scheme: str, size: tuple[int, int], tmp_path: Path) -> None:
    """Write what there is to look at; $EDGEPRUNE_SCREENSHOTS keeps it."""
    folder = Path(os.environ.get("EDGEPRUNE_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    page.prefer(scheme)
    page.resize(*size, phone=size == PHONE)
    path = folder / f"report_{scheme}_{size[0]}.png"
    page.screenshot(path)
    assert path.stat().st_size > 50_000
