from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgeprune.bench import parse_sweep, read_results, sweep_bundles, sweep_notes, sweep_table
from edgeprune.bench.energy import EnergyResult
from edgeprune.bench.result import SCHEMA, SWEEP_SCHEMA, BenchResult, Extras
from edgeprune.errors import InputError
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.manifest import Manifest
from tests.helpers.bench import MANIFEST, summary

STAGE = MANIFEST["method"]["stages"][0]


def bundle(name: str, *rates: float) -> Bundle:
    """A bundle in memory, of one keep rate or of several."""
    densities = [
        {"keep_rate": r, "graph": "model", "stages": [STAGE] if r < 1 else [], "macs": MANIFEST["macs"]} for r in rates
    ]
    method = {**MANIFEST["method"], "keep_rate": rates[0]}
    several = densities if len(rates) > 1 else []
    manifest = Manifest.model_validate({**MANIFEST, "method": method, "densities": several})
    return Bundle(Path("out") / name, manifest)


class Bench:
    """Stands for benching one bundle; notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, list[float]]] = []

    def __call__(self, made: Bundle, *, batch: int, progress: Any, **options: Any) -> BenchResult:
        self.asked.append((made.path.name, batch, [d.keep_rate for d in made.manifest.densities]))
        return summary({"dense": 100.0, "pruned": 50.0}, batch=batch)


@pytest.mark.parametrize(
    ("text", "rates"), [("keep-rate=1.0,0.5,0.7", [1.0, 0.7, 0.5]), ("keep-rate=0.7", [0.7]), ("keep-rate=1,1", [1.0])]
)
def test_sweeps_by_their_text(text: str, rates: list[float]) -> None:
    assert parse_sweep(text) == rates


@pytest.mark.parametrize(
    "text", ["0.7", "batch=1", "keep-rate", "keep-rate=", "keep-rate=a", "keep-rate=0", "keep-rate=2"]
)
def test_what_is_no_sweep_is_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_sweep(text)
    assert (caught.value.code, caught.value.exit_code) == ("bench-sweep", 2)


def test_every_bundle_is_benched_at_every_batch() -> None:
    bench = Bench()
    sweep = sweep_bundles([bundle("a", 0.7), bundle("b", 0.5)], batches=(1, 8), bench=bench)
    assert bench.asked == [("a", 1, []), ("a", 8, []), ("b", 1, []), ("b", 8, [])]
    assert [(case.bundle, case.batch, case.keep_rates) for case in sweep.cases][1:3] == [
        ("a", 8, [0.7]),
        ("b", 1, [0.5]),
    ]
    assert (sweep.schema, sweep.batches) == (SWEEP_SCHEMA, [1, 8])


def test_only_the_keep_rates_asked_for_are_run() -> None:
    bench = Bench()
    bundles = [bundle("all", 1.0, 0.7, 0.5, 0.3), bundle("other", 0.6)]
    sweep = sweep_bundles(bundles, keep_rates=[1.0, 0.7, 0.3], bench=bench)
    assert bench.asked == [("all", 1, [1.0, 0.7, 0.3])]
    assert sweep.cases[0].keep_rates == [0.7, 0.3]


@pytest.mark.parametrize("rates", [[0.4], [1.0]])
def test_a_keep_rate_that_no_bundle_has_is_refused(rates: list[float]) -> None:
    with pytest.raises(InputError) as caught:
        sweep_bundles([bundle("a", 0.7)], keep_rates=rates, bench=Bench())
    assert caught.value.code == "bench-sweep"
    assert "0.7" in str(caught.value.expected)


def test_table_has_a_row_per_case_and_graph() -> None:
    sweep = sweep_bundles([bundle("a", 0.7), bundle("b", 0.5)], batches=(1, 8), bench=Bench())
    rows = sweep_table(sweep)
    assert [(row["bundle"], row["batch"], row["graph"]) for row in rows[:4]] == [
        ("a", "1", "dense"),
        ("a", "1", "pruned at 0.7"),
        ("a", "8", "dense"),
        ("a", "8", "pruned at 0.7"),
    ]
    assert "mJ/image" not in rows[0]
    assert any("random weights" in note for note in sweep_notes(sweep))


def test_table_has_the_energy_where_it_is_known() -> None:
    energy = EnergyResult(0.25, 0.2, 10.0, 2.0, "counter", "rapl", "package-0", 2.0, 80, 4)

    def bench(made: Bundle, **options: Any) -> BenchResult:
        return summary({"dense": 100.0, "pruned": 50.0}, extras=Extras(energy={"pruned": energy}))

    rows = sweep_table(sweep_bundles([bundle("a", 0.7)], bench=bench))
    assert [row["mJ/image"] for row in rows] == ["-", "250.00"]


def test_results_are_read_again_as_they_were_written(tmp_path: Path) -> None:
    sweep = sweep_bundles([bundle("a", 0.7)], batches=(1, 8), bench=Bench())
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(sweep.to_dict()))
    assert read_results(path) == [case.result for case in sweep.cases]
    path.write_text(json.dumps(sweep.cases[0].result.to_dict()))
    assert read_results(path) == [sweep.cases[0].result]


def test_a_result_of_an_older_version_is_read() -> None:
    from edgeprune.bench.result import results_of

    document = json.loads(json.dumps(summary({"dense": 100.0, "pruned": 50.0}).to_dict()))
    for name in ("scenario", "warmup", "telemetry", "layers"):
        del document[name]
    for runner in document["runners"]:
        for name in ("gpu_ms", "enqueue_ms", "median_gpu_ms", "median_enqueue_ms", "at_s", "energy"):
            del runner[name]
    (result,) = results_of(document)
    assert (result.scenario, result.layers, result.runners[0].energy) == (None, [], None)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "edgeprune-bench/9"}', f'{{"schema": "{SCHEMA}"}}'])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_results(path)
    assert caught.value.code == "result-unreadable"


def test_a_result_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_results(tmp_path / "none.json")
    assert caught.value.code == "result-unreadable"
