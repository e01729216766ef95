"""`edgeprune doctor BUNDLE`, and what doctor says of a Jetson and of memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeprune.cli import machine
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.jetson import Jetson, PowerMode
from tests.cli.conftest import Cli
from tests.helpers.bundles import write_tiny
from tests.helpers.engines import EngineSpec, own_engines, write_engines
from tests.helpers.fake_trt import FakeTensorRT, install
from tests.helpers.trt_bundles import write_for_tensorrt

REASONS = {"8.6": ["no LayerNormalization"], "10.3": [], "11.1": ["too new"]}


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Bundle, FakeTensorRT]:
    monkeypatch.setattr("edgeprune.cli.doctor.CHECKS", ())
    fake = install(monkeypatch, "11.4.0")
    bundle = write_for_tensorrt(tmp_path / "bundle", tensorrt=REASONS | {"11.1": []})
    write_engines(bundle, fake, own_engines(bundle, [1]))
    return bundle, fake


def found(cli: Cli, bundle: Bundle) -> tuple[int, dict[str, dict[str, Any]]]:
    outcome = cli("doctor", bundle.path, "--json")
    return outcome.code, {one["check"]: one for one in outcome.json["results"]}


def change_index(bundle: Bundle, change: Callable[[dict[str, Any]], Any]) -> None:
    path = next(bundle.path.glob("engines/*/index.json"))
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def the_engines(checks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    (only,) = (one for name, one in checks.items() if name.startswith("engines "))
    return only


def test_engines_that_fit_are_fine(cli: Cli, built: tuple[Bundle, FakeTensorRT]) -> None:
    code, checks = found(cli, built[0])
    assert code == 0
    assert the_engines(checks)["level"] == "ok" and "2 engines fit" in the_engines(checks)["found"]
    assert checks["graphs in TensorRT 8.6"]["found"] == "refuses them: no LayerNormalization"
    assert checks["graphs in TensorRT 8.6"]["level"] == "note"
    assert "is what is installed" in checks["graphs in TensorRT 11.1"]["found"]
    assert "runs here" not in checks


def test_a_tensorrt_that_refuses_the_graphs_fails(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.cli.doctor.CHECKS", ())
    install(monkeypatch, "11.4.0")
    code, checks = found(cli, write_for_tensorrt(tmp_path / "bundle", tensorrt=REASONS))
    assert code == 3
    assert checks["graphs in TensorRT 11.1"]["level"] == "fail"


def test_engines_of_another_device_are_named(cli: Cli, built: tuple[Bundle, FakeTensorRT]) -> None:
    bundle, fake = built
    change_index(bundle, lambda index: index.update(device="Orin", compute_capability="8.7"))
    code, checks = found(cli, bundle)
    assert code == 3
    assert f"built for Orin (8.7) with TensorRT 11.4.0; this is {fake.device.name}" in the_engines(checks)["found"]
    assert checks["runs here"]["fix"] == f"edgeprune build {bundle.path}"


def test_engines_of_another_tensorrt_are_named(cli: Cli, built: tuple[Bundle, FakeTensorRT]) -> None:
    bundle, _ = built
    change_index(bundle, lambda index: index.update(tensorrt="10.3.0"))
    assert the_engines(found(cli, bundle)[1])["found"].endswith("with TensorRT 10.3.0; here is 11.4.0")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("source", "of another graph"),
        ("missing", "is missing"),
        ("size", "bytes instead of"),
        ("index", "not understood"),
    ],
)
def test_stale_engines_are_told(cli: Cli, built: tuple[Bundle, FakeTensorRT], fault: str, words: str) -> None:
    bundle, _ = built
    engine = next(bundle.path.glob("engines/*/model.engine"))
    if fault == "source":
        change_index(bundle, lambda index: [one.update(source_sha256="0" * 64) for one in index["engines"]])
    elif fault == "missing":
        engine.unlink()
    elif fault == "size":
        engine.write_bytes(b"x")
    else:
        engine.with_name("index.json").write_text("{}")
    code, checks = found(cli, bundle)
    assert (code, the_engines(checks)["level"]) == (3, "warn")
    assert words in the_engines(checks)["found"] and "edgeprune build" in the_engines(checks)["fix"]


def test_engines_without_their_plugin_fail(
    cli: Cli, built: tuple[Bundle, FakeTensorRT], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle, fake = built
    monkeypatch.setenv("EDGEPRUNE_PLUGIN_PATH", str(tmp_path / "nowhere"))
    write_engines(bundle, fake, [EngineSpec("model", (("model", 1, None),), plugins=("GatherTokens",))])
    change_index(bundle, lambda index: index["engines"][0].update(plugin=True))
    code, checks = found(cli, bundle)
    assert (code, checks["plugin of the engines"]["level"]) == (3, "fail")


def test_without_a_gpu_the_next_step_is_on_the_device(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeprune.cli.doctor.CHECKS", ())
    monkeypatch.setattr("edgeprune.cli.bundle_checks._device", lambda: None)
    monkeypatch.setattr("edgeprune.cli.bundle_checks._tensorrt", lambda: None)
    code, checks = found(cli, write_for_tensorrt(tmp_path / "bundle", tensorrt=REASONS))
    assert (code, checks["runs here"]["found"]) == (0, "no GPU and TensorRT here")
    assert "edgeprune build" in checks["runs here"]["fix"]


def test_a_bundle_for_the_processor_runs(cli: Cli, tmp_path: Path) -> None:
    code, checks = found(cli, write_tiny(tmp_path / "bundle"))
    assert (code, checks["runs here"]["level"]) == (0, "ok")
    assert checks["bundle"]["found"] == "tiny, evit, for ort-cpu; 4 files unchanged"


def test_a_changed_bundle_is_refused(cli: Cli, tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "bundle")
    (bundle.path / "model.onnx").write_bytes(b"x")
    outcome = cli("doctor", bundle.path, "--json")
    assert (outcome.code, outcome.json["error"]["code"]) == (2, "bundle-tampered")


def jetson(monkeypatch: pytest.MonkeyPatch, mode: PowerMode | None, held: bool | None) -> list[machine.Finding]:
    modes = (PowerMode(0, "MAXN"), PowerMode(1, "15W"))
    made = Jetson("36.4.3", "6.2", "10.3", mode, modes, held)
    monkeypatch.setattr("edgeprune.runtime.jetson.read_jetson", lambda: made)
    return list(machine.check_jetson())


def test_a_slow_power_mode_is_a_note_with_the_fast_one(monkeypatch: pytest.MonkeyPatch) -> None:
    release, mode, clocks = jetson(monkeypatch, PowerMode(1, "15W"), False)
    assert release.found == "36.4.3, JetPack 6.2 with TensorRT 10.3"
    assert (mode.level, mode.found, mode.fix) == ("note", "1 15W", "for full speed: sudo nvpmodel -m 0 (MAXN)")
    assert (clocks.level, clocks.fix) == ("note", "for benchmarks: sudo jetson_clocks")


def test_a_jetson_at_full_speed_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {one.level for one in jetson(monkeypatch, PowerMode(0, "MAXN"), True)} == {"ok"}


def test_a_container_that_hides_the_mode_says_what_to_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    _, mode = jetson(monkeypatch, None, None)
    assert "/var/lib/nvpmodel" in str(mode.fix)


@pytest.mark.parametrize(("memory", "swap", "level"), [(4, 0, "warn"), (4, 4, "ok"), (16, 0, "ok")])
def test_memory_and_swap_count_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, memory: int, swap: int, level: str
) -> None:
    file = tmp_path / "meminfo"
    file.write_text(f"MemTotal:  {memory << 20} kB\nMemFree:  1 kB\nSwapTotal:  {swap << 20} kB\n")
    monkeypatch.setattr(machine, "MEMINFO", file)
    (only,) = machine.check_memory()
    assert (only.level, only.found) == (level, f"{memory}.0 GiB, {swap}.0 GiB of swap")
    assert (only.fix is None) == (level == "ok")
