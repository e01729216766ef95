from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from edgeprune.bench.html.overlays import MOST_IMAGES
from edgeprune.runtime.bundle import Bundle
from tests.cli.conftest import Cli
from tests.helpers.reports import trained


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(trained().to_dict()))
    return path


def test_report_writes_one_file(cli: Cli, bench: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.html"
    result = cli("report", bench, "-o", out, "--json")
    assert result.code == 0, result.err
    assert result.json["results"] == {
        "report": str(out),
        "bytes": out.stat().st_size,
        "results": 1,
        "evaluations": 0,
        "overlays": [],
    }
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]
    assert out.read_text().startswith("<!doctype html>")


def test_report_draws_what_a_bundle_keeps(
    cli: Cli, bench: Path, digits_bundle: Bundle, image: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report.html"
    result = cli("report", bench, digits_bundle.path, "--images", image, image, "-o", out, "--json")
    assert result.code == 0, result.err
    assert result.json["results"]["overlays"] == [2]
    text = out.read_text()
    assert text.count("<figure data-picture") == 2
    assert "Random weights: what is kept means nothing" in text
    assert str(tmp_path) not in text


def test_report_draws_on_images_of_a_data_set(cli: Cli, bench: Path, digits_bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    result = cli("report", bench, digits_bundle.path, "--data", "digits", "--count", 3, "-o", out, "--json")
    assert result.code == 0, result.err
    assert result.json["results"]["overlays"] == [3]
    assert "right" in out.read_text()


def test_report_takes_accuracies_of_evaluate(cli: Cli, digits_bundle: Bundle, tmp_path: Path) -> None:
    bench, evaluated, out = (tmp_path / name for name in ("bench.json", "evaluate.json", "report.html"))
    assert cli("bench", digits_bundle.path, "--rounds", 2, "-o", bench).code == 0
    evaluated.write_text(cli("evaluate", digits_bundle.path, "--data", "digits", "--limit", 20, "--json").out)
    result = cli("report", bench, evaluated, "-o", out, "--json")
    assert result.code == 0, result.err
    text = out.read_text()
    assert "not matched" not in text
    assert text.count('data-heading="n (images)">20</td>') == 2


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], "usage"),
        (["nothing.json"], "report-input"),
        (["{bench}", "--data", "digits"], "report-images"),
        (["{bench}", "-o", "{folder}"], "output-exists"),
        (["{bench}", "-o", "{bench}/report.html"], "output-not-writable"),
    ],
)
def test_report_refuses_and_writes_nothing(
    cli: Cli, bench: Path, tmp_path: Path, arguments: list[str], code: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    filled = [a.format(bench=bench, folder=tmp_path) for a in arguments]
    output = [] if "-o" in filled else ["-o", tmp_path / "report.html"]
    result = cli("report", *filled, *output, "--json")
    assert (result.code, result.json["error"]["code"]) == (2, code)
    assert sorted(tmp_path.rglob("*")) == before


def test_report_refuses_a_bundle_that_does_not_tell_what_it_keeps(
    cli: Cli, bench: Path, image: Path, tmp_path: Path
) -> None:
    from tests.helpers.bundles import write_tiny

    bundle = write_tiny(tmp_path / "bundle", kept=False)
    result = cli("report", bench, bundle.path, image, "-o", tmp_path / "report.html", "--json")
    assert (result.code, result.json["error"]["code"]) == (2, "token-outputs")
    assert not (tmp_path / "report.html").exists()


def test_report_refuses_more_images_than_a_page_holds(
    cli: Cli, bench: Path, digits_bundle: Bundle, tmp_path: Path
) -> None:
    images = [tmp_path / f"{i}.png" for i in range(MOST_IMAGES + 1)]
    for path in images:
        Image.new("RGB", (64, 64)).save(path)
    result = cli("report", bench, digits_bundle.path, *images, "-o", tmp_path / "report.html", "--json")
    assert (result.code, result.json["error"]["code"]) == (2, "report-images")


def test_failed_write_leaves_an_earlier_report(
    cli: Cli, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report.html"
    out.write_text("earlier")

    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    result = cli("report", bench, "-o", out, "--json")
    assert (result.code, result.json["error"]["code"]) == (2, "output-not-writable")
    assert out.read_text() == "earlier"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bench.json", "report.html"]
