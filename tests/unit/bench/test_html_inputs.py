from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgeprune.bench.html import read_inputs
from edgeprune.bench.html.inputs import plain_fields, same_bundle, without_path
from edgeprune.errors import InputError
from tests.helpers.bundles import write_tiny
from tests.helpers.reports import plain, trained

EVALUATED = {
    "schema": "edgeprune-cli/1",
    "command": "evaluate",
    "status": "ok",
    "results": {
        "bundle": "some/where/bundle",
        "data": "imagefolder:some/where/val",
        "emulated": None,
        "graphs": {
            "keep rate 1": {"top1": 0.9, "top5": None, "images": 100},
            "keep rate 0.7": {"top1": 0.8, "top5": None, "images": 100},
        },
    },
}


def write(path: Path, document: Any) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    return write(tmp_path / "bench.json", trained().to_dict())


def refused(*paths: Path, code: str = "report-input", images: tuple[Path, ...] = ()) -> InputError:
    with pytest.raises(InputError) as caught:
        read_inputs(paths, images)
    assert caught.value.code == code
    return caught.value


def test_files_are_told_apart_by_what_they_are(bench: Path, tmp_path: Path) -> None:
    evaluated = write(tmp_path / "a.json", EVALUATED)
    bundle = write_tiny(tmp_path / "bundle")
    image = write(tmp_path / "photo.PNG", "")
    found = read_inputs([image, bundle.path, evaluated, bench])
    assert [r.bundle["model"] for r in found.results] == ["deit"]
    assert (found.accuracies[0].name, found.accuracies[0].data) == ("bundle", "imagefolder:val")
    assert [b.path for b in found.bundles] == [bundle.path]
    assert found.images == [image]


def test_accuracies_are_found_by_the_name_of_the_runner(bench: Path, tmp_path: Path) -> None:
    (found,) = read_inputs([bench, write(tmp_path / "a.json", EVALUATED)]).accuracies
    tops = [None if a is None else a.top1 for a in map(found.of_runner, ("dense", "pruned at 0.7", "pruned", "random"))]
    assert tops == [0.9, 0.8, None, None]


def test_output_of_bench_with_json_will_do(tmp_path: Path) -> None:
    envelope = {"schema": "edgeprune-cli/1", "command": "bench", "status": "ok", "results": trained().to_dict()}
    assert read_inputs([write(tmp_path / "x.json", envelope)]).results[0].batch == 1


def test_sweep_gives_all_of_its_results(tmp_path: Path) -> None:
    case = {"bundle": "b", "keep_rates": [0.7], "batch": 1, "result": trained().to_dict()}
    sweep = {
        "schema": "edgeprune-bench-sweep/1",
        "created": "2026-01-01T00:00:00+00:00",
        "keep_rates": [0.7],
        "batches": [1],
        "cases": [case, case],
    }
    assert len(read_inputs([write(tmp_path / "sweep.json", sweep)]).results) == 2


def broken(**results: Any) -> dict[str, Any]:
    return {**EVALUATED, "results": {**EVALUATED["results"], **results}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "it is no JSON"),
        ("[" * 100_000, "cannot be reported"),
        ("[]", "schema"),
        ({"schema": "another/1"}, "another/1"),
        ({"schema": "edgeprune-bench/1"}, "Field required"),
        ({"schema": "edgeprune-cli/1", "command": "doctor", "status": "ok"}, "the output of `edgeprune doctor`"),
        ({**EVALUATED, "results": None, "status": "error"}, "status error"),
        (broken(graphs={}), "accuracies"),
        (broken(graphs={"model": {"top1": 7, "top5": None, "images": 1}}), "accuracies"),
        (broken(graphs={"model": {"top1": 0.5}}), "KeyError"),
        (broken(graphs=3), "AttributeError"),
    ],
)
def test_file_that_is_no_result_is_refused(bench: Path, tmp_path: Path, content: Any, why: str) -> None:
    error = refused(bench, write(tmp_path / "other.json", content))
    assert why in error.message
    assert "other.json" in error.message


def test_binary_file_is_refused(bench: Path, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    refused(bench, tmp_path / "x.json")


def test_what_does_not_exist_is_refused(bench: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused(bench, tmp_path / "nothing.json").message
    assert "does not exist" in refused(bench, images=(tmp_path / "nothing.png",)).message


def test_directory_that_is_no_bundle_is_refused(bench: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "manifest.json" in refused(bench, tmp_path / "empty").message


def test_report_needs_a_result(tmp_path: Path) -> None:
    error = refused(write(tmp_path / "a.json", EVALUATED), code="report-empty")
    assert "edgeprune bench" in (error.hint or "")


def test_images_need_a_bundle(bench: Path, tmp_path: Path) -> None:
    refused(bench, images=(write(tmp_path / "photo.png", ""),), code="report-images")


def test_identity_of_a_bundle_is_that_of_its_results(tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "bundle")
    fields = plain_fields(bundle)
    assert same_bundle(fields, {**fields, "new_field": 1})
    assert not same_bundle(fields, {**fields, "target": "another"})
    assert plain(fields) == fields


@pytest.mark.parametrize(("data", "told"), [("digits", "digits"), ("imagefolder:/home/me/val", "imagefolder:val")])
def test_report_tells_no_paths(data: str, told: str) -> None:
    assert without_path(data) == told
