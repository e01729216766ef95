from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

from edgeprune.bench import read_results
from tests.cli.conftest import Cli
from tests.unit.bench.test_bench import make_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle").path


@pytest.mark.parametrize(
    ("scenario", "headline"),
    [("single-stream", "p90"), ("multi-stream:4", "p99"), ("fixed-fps:200", "p90"), ("sustained:1s", "p90")],
)
def test_bench_tells_the_scenario(cli: Cli, bundle: Path, tmp_path: Path, scenario: str, headline: str) -> None:
    out = tmp_path / "result.json"
    done = cli("bench", bundle, "--quick", "--rounds", 2, "--scenario", scenario, "--layers", "-o", out)
    assert done.code == 0
    assert f"scenario {scenario}, headline {headline}" in done.err
    assert "where the time goes" in done.out
    (result,) = read_results(out)
    assert result.scenario is not None
    assert result.scenario.text == scenario
    assert result.warmup is not None
    assert result.telemetry is not None


def test_bench_sweeps_batches_into_one_file(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    done = cli("bench", bundle, "--quick", "--rounds", 2, "--batch", "1,4", "--sweep", "keep-rate=1,0.5", "-o", out)
    assert done.code == 0
    assert [result.batch for result in read_results(out)] == [1, 4]
    assert "pruned at 0.5" in done.out


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--scenario", "offline"), "bench-scenario"),
        (("--scenario", "multi-stream:3", "--batch", "2"), "bench-scenario"),
        (("--scenario", "sustained:2s", "--duration", "1"), "bench-scenario"),
        (("--sweep", "keep-rate=0.9"), "bench-sweep"),
        (("--sweep", "batch=1"), "bench-sweep"),
        (("--batch", "0"), "usage"),
        (("--batch", "1,9"), "bench-batch"),
    ],
)
def test_bad_options_end_with_2(cli: Cli, bundle: Path, options: tuple[str, ...], code: str) -> None:
    done = cli("bench", bundle, "--quick", "--rounds", 2, "--json", *options)
    assert done.code == 2
    assert done.json["error"]["code"] == code
