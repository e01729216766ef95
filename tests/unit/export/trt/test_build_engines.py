"""`build_engines` from end to end: building processes with stand-ins of TensorRT, and made-up times."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edgeprune.errors import BuildError, EdgepruneError, EdgepruneWarning, EnvironmentLackError, InputError
from edgeprune.export.trt import BuildOptions, build_engines, builder
from edgeprune.export.trt.job import Built, Job
from edgeprune.runtime.bundle import Bundle, hash_file, load_bundle
from edgeprune.runtime.engines import EngineIndex, EngineInfo
from tests.helpers import fake_trt
from tests.helpers.trt_bundles import write_for_tensorrt, write_two_buckets

FOLDER = {version: f"nvidia-pretend-gpu-trt{version}" for version in fake_trt.VERSIONS}
NEW = fake_trt.VERSIONS[1]


class Watch:
    """A stopwatch that tells made-up times and notes what it was asked."""

    def __init__(self, ms: Callable[[EngineInfo, int], float] = lambda info, number: 1.0) -> None:
        self.ms, self.asked = ms, list[tuple[list[str], str | None]]()

    def __call__(
        self, bundle: Bundle, folder: Path, index: EngineIndex, before: EngineInfo | None
    ) -> dict[tuple[str, int], float]:
        assert all((folder / info.file).is_file() for info in index.engines)
        self.asked.append(([info.source for info in index.engines], None if before is None else before.source))
        return {(info.file, n): self.ms(info, n) for info in index.engines for n in range(len(info.profiles))}


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes this machine, and processes started by it, one with a TensorRT."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = os.environ.get("PYTHONPATH", "")

    def install(version: str = NEW, **faults: Any) -> None:
        fake_trt.install(monkeypatch, version)
        monkeypatch.setenv("PYTHONPATH", path)
        environment = fake_trt.other_process(tmp_path / "site", version, **faults)
        monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])

    return install


@dataclass
class Machine:
    """This process with a TensorRT, in which engines are built too, since that is faster.

    Attributes:
        built: engines that were built, in order.
        refused: engines that cannot be built.
    """

    monkeypatch: pytest.MonkeyPatch
    built: list[str] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)

    def install(self, version: str) -> None:
        fake_trt.install(self.monkeypatch, version)

    def run_job(self, job: Job, what: str, report: Callable[[str, float], None]) -> Built:
        self.built.append(Path(job.engine).stem)
        report(f"building {what}, 0 s", 0.0)
        if self.built[-1] in self.refused:
            Path(job.log).touch()
            raise BuildError("no kernel", code="engine-build", hint="none")
        with Path(job.log).open("w") as log:
            return builder.build(job, log, lambda step, share: report(f"building {what}, {step}", share))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = Machine(monkeypatch)
    made.install(NEW)
    monkeypatch.setattr("edgeprune.export.trt.api.run_job", made.run_job)
    return made


def build(bundle: Bundle, watch: Watch | None = None, **options: Any) -> EngineIndex:
    return build_engines(bundle, BuildOptions(**options), stopwatch=watch or Watch())


@pytest.mark.parametrize("version", fake_trt.VERSIONS)
def test_folder_holds_plans_and_what_they_are(version: str, processes: Callable[..., None], tmp_path: Path) -> None:
    processes(version)
    bundle = write_for_tensorrt(tmp_path / "bundle", (1, 4))
    index = build(bundle)
    folder = bundle.path / "engines" / FOLDER[version]
    files = {f"{name}{end}" for name in ("model", "dense") for end in (".engine", ".engine.json", ".layers.json")}
    assert {entry.name for entry in folder.iterdir()} == {*files, "index.json"}
    assert EngineIndex.model_validate_json((folder / "index.json").read_bytes()) == index
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]
    assert (index.device, index.tensorrt, index.compute_capability) == ("NVIDIA Pretend GPU", version, "8.7")
    model = index.engines[0]
    assert (model.source, [p.batch for p in model.profiles]) == ("model", [1, 2, 4])
    assert model.sha256 == hash_file(folder / "model.engine").sha256
    assert model.source_sha256 == bundle.manifest.files["model.onnx"].sha256
    assert [p.median_ms for p in model.profiles] == [1.0] * 3
    assert model.build_s > 0
    assert fake_trt.read_plan((folder / "model.engine").read_bytes())["pools"] == {"WORKSPACE": 1 << 30}


def test_bundle_stays_as_it_was(machine: Machine, tmp_path: Path) -> None:
    bundle = write_for_tensorrt(tmp_path / "bundle")
    before = (bundle.path / "manifest.json").read_bytes()
    build(bundle)
    assert (bundle.path / "manifest.json").read_bytes() == before
    assert load_bundle(bundle.path) == bundle


def test_sidecar_tells_how_to_time_it_without_us(machine: Machine, tmp_path: Path) -> None:
    bundle = write_for_tensorrt(tmp_path / "bundle", (1, 2))
    build(bundle, workspace=1 << 28)
    sidecar = json.loads((bundle.path / "engines" / FOLDER[NEW] / "model.engine.json").read_bytes())
    assert sidecar["trtexec"] == [
        "trtexec --loadEngine=model.engine --shapes=images:1x3x8x8",
        "trtexec --loadEngine=model.engine --shapes=images:2x3x8x8 --useProfile=1",
    ]
    environment = sidecar["environment"]
    assert (environment["device"], environment["tensorrt"]) == ("NVIDIA Pretend GPU", NEW)
    assert environment["workspace"] == 1 << 28
    assert sidecar["engine"]["file"] == "model.engine"


def test_only_the_faster_form_is_kept(machine: Machine, tmp_path: Path) -> None:
    bundle = write_for_tensorrt(tmp_path / "bundle", plugin=True)
    watch = Watch(lambda info, number: 2.0 if info.plugin else 3.0)
    index = build(bundle, watch)
    assert watch.asked == [(["model", "model_plugin"], None), (["dense"], None)]
    assert [(info.source, info.plugin, info.profiles[0].graph) for info in index.engines] == [
        ("model_plugin", True, "model"),
        ("dense", False, "dense"),
    ]
    (choice,) = index.choices
    assert (choice.what, choice.graph, choice.chosen) == ("selection", "model", "plugin")
    assert choice.median_ms == {"native": pytest.approx(3.0), "plugin": pytest.approx(2.0)}
    folder = bundle.path / "engines" / FOLDER[NEW]
    assert not list(folder.glob("model.*"))
    assert (folder / "model_plugin.layers.json").is_file()


def test_asked_form_is_not_measured_against_another(machine: Machine, tmp_path: Path) -> None:
    index = build(write_for_tensorrt(tmp_path / "bundle", plugin=True), selection="native")
    assert machine.built == ["model", "dense"]
    assert index.choices == []


def test_second_build_is_from_the_cache(machine: Machine, tmp_path: Path) -> None:
    bundle = write_for_tensorrt(tmp_path / "bundle")
    first = build(bundle)
    second = build(bundle)
    assert machine.built == ["model", "dense"]
    assert [info.build_s for info in second.engines] == [0, 0]
    assert [info.model_dump(exclude={"build_s"}) for info in second.engines] == [
        info.model_dump(exclude={"build_s"}) for info in first.engines
    ]
    folder = bundle.path / "engines" / FOLDER[NEW]
    assert hash_file(folder / "model.engine").sha256 == first.engines[0].sha256


@pytest.mark.parametrize(
    "options",
    [{"workspace": 1 << 29}, {"tactics": "builtin"}, {"optimization_level": 5}, {"batches": (2,)}],
    ids=lambda options: next(iter(options)),
)
def test_other_options_are_another_engine(options: dict[str, Any], machine: Machine, tmp_path: Path) -> None:
    bundle = write_for_tensorrt(tmp_path / "bundle", (1, 2))
    build(bundle, graphs=("model",))
    build(bundle, graphs=("model",), **options)
    assert machine.built == ["model", "model"]


def test_other_weights_and_other_tensorrt_are_another_engine(machine: Machine, tmp_path: Path) -> None:
    one = build(write_for_tensorrt(tmp_path / "one"), graphs=("model",))
    same = build(write_for_tensorrt(tmp_path / "two"), graphs=("model",))
    assert one.engines[0].key == same.engines[0].key
    machine.install(fake_trt.VERSIONS[0])
    old = build(load_bundle(tmp_path / "one"), graphs=("model",))
    assert old.engines[0].key != one.engines[0].key
    assert machine.built == ["model", "model"]


def test_no_cache_neither_reads_nor_writes(machine: Machine, tmp_path: Path) -> None:
    bundle = write_for_tensorrt(tmp_path / "bundle")
    build(bundle, cache=False, graphs=("model",))
    assert not (tmp_path / "cache" / "edgeprune").exists()
    build(bundle, graphs=("model",))
    build(bundle, cache=False, graphs=("model",))
    assert machine.built == ["model"] * 3


def test_rebuild_writes_only(machine: Machine, tmp_path: Path) -> None:
    bundle = write_for_tensorrt(tmp_path / "bundle")
    for rebuild in (False, True, False):
        build(bundle, rebuild=rebuild, graphs=("model",))
    assert machine.built == ["model", "model"]


def test_damaged_cache_is_built_again(machine: Machine, tmp_path: Path) -> None:
    bundle = write_for_tensorrt(tmp_path / "bundle")
    (info,) = build(bundle, graphs=("model",)).engines
    (tmp_path / "cache" / "edgeprune" / "engines" / info.key / "engine").write_bytes(b"rubbish")
    build(bundle, graphs=("model",))
    build(bundle, graphs=("model",))
    assert machine.built == ["model", "model"]


def test_timings_are_kept_by_device_and_version(machine: Machine, tmp_path: Path) -> None:
    build(write_for_tensorrt(tmp_path / "bundle"))
    (path,) = (tmp_path / "cache" / "edgeprune" / "timing").glob("*.cache")
    assert path.name == f"nvidia-pretend-gpu-trt{NEW}.cache"
    assert len(json.loads(path.read_bytes())["entries"]) == 2


def test_timings_go_where_they_are_asked_to(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "my.cache"
    build(write_for_tensorrt(tmp_path / "bundle"), timing_cache=path, cache=False)
    assert len(json.loads(path.read_bytes())["entries"]) == 2
    assert not (tmp_path / "cache" / "edgeprune").exists()


def test_warnings_of_the_process_are_told_with_the_engine(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "my.cache"
    path.write_bytes(b"rubbish")
    with pytest.warns(EdgepruneWarning, match="^model: the timing cache"):
        build(write_for_tensorrt(tmp_path / "bundle"), timing_cache=path)


def test_progress_rises_to_the_end(machine: Machine, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    bundle = write_for_tensorrt(tmp_path / "bundle")
    build_engines(bundle, BuildOptions(), lambda step, share: told.append((step, share)), stopwatch=Watch())
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    steps = list(dict.fromkeys(step.partition(",")[0] for step, _ in told))
    assert steps == ["building 1 of 2: model", "building 2 of 2: dense", "measuring model", "measuring dense", "done"]


def fails(
    bundle: Bundle, code: str, kind: type[EdgepruneError], watch: Watch | None = None, **options: Any
) -> EdgepruneError:
    before = sorted(bundle.path.rglob("*"))
    with pytest.raises(kind) as caught:
        build(bundle, watch, **options)
    assert caught.value.code == code
    engines = bundle.path / "engines"
    assert [entry for entry in sorted(bundle.path.rglob("*")) if entry != engines] == [
        e for e in before if e != engines
    ]
    return caught.value


@pytest.mark.parametrize("version", fake_trt.VERSIONS)
def test_parser_error_comes_out_and_leaves_nothing(
    version: str, processes: Callable[..., None], tmp_path: Path
) -> None:
    processes(version, parse="select.gather_tokens", reason="no such thing")
    bundle = write_for_tensorrt(tmp_path / "bundle", plugin=True)
    error = fails(bundle, "parse", BuildError, selection="plugin")
    assert "cannot parse model_plugin.onnx" in error.message
    assert "UNSUPPORTED_NODE: no such thing" in error.message
    assert "[ERROR] no such thing" in error.details["log"]


def test_failure_keeps_earlier_engines(processes: Callable[..., None], tmp_path: Path) -> None:
    processes()
    bundle = write_for_tensorrt(tmp_path / "bundle")
    index = build(bundle)
    processes(build=True)
    fails(bundle, "engine-build", BuildError, rebuild=True)
    stored = bundle.path / "engines" / FOLDER[NEW] / "index.json"
    assert EngineIndex.model_validate_json(stored.read_bytes()) == index


def test_candidate_that_cannot_be_built_is_left_out(machine: Machine, tmp_path: Path) -> None:
    machine.refused = {"model_plugin"}
    bundle = write_for_tensorrt(tmp_path / "bundle", plugin=True)
    watch = Watch()
    with pytest.warns(EdgepruneWarning, match="^'model_plugin' is left out of the choice: no kernel"):
        index = build(bundle, watch)
    assert watch.asked == [(["model"], None), (["dense"], None)]
    assert [info.source for info in index.engines] == ["model", "dense"]
    assert index.choices == []
    assert not list((bundle.path / "engines" / FOLDER[NEW]).glob("model_plugin*"))


def test_way_that_cannot_be_built_is_left_out(machine: Machine, tmp_path: Path) -> None:
    machine.refused = {"rest_2"}
    watch = Watch()
    with pytest.warns(EdgepruneWarning, match="^'rest_2' is left out"):
        index = build(write_two_buckets(tmp_path / "bundle"), watch)
    assert watch.asked == [(["stem"], None), (["rest"], "stem")]
    assert [info.source for info in index.engines] == ["stem", "rest"]


def test_last_candidate_that_cannot_be_built_is_an_error(machine: Machine, tmp_path: Path) -> None:
    machine.refused = {"model", "model_plugin"}
    bundle = write_for_tensorrt(tmp_path / "bundle", plugin=True)
    with pytest.warns(EdgepruneWarning, match="^'model' is left out"):
        fails(bundle, "engine-build", BuildError)
    assert machine.built == ["model", "model_plugin"]


def test_interruption_leaves_nothing(machine: Machine, tmp_path: Path) -> None:
    bundle = write_for_tensorrt(tmp_path / "bundle")

    def interrupt(info: EngineInfo, number: int) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(bundle, Watch(interrupt))
    assert list((bundle.path / "engines").iterdir()) == []


def test_other_target_is_refused_before_anything_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_trt.install(monkeypatch, NEW, count=0)
    fails(write_for_tensorrt(tmp_path / "bundle", target="ort-cpu"), "target", InputError)


def test_missing_gpu_is_told_before_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = fake_trt.install(monkeypatch, NEW, count=0)
    bundle = write_for_tensorrt(tmp_path / "bundle", tensorrt={NEW: ["never"]})
    error = fails(bundle, "gpu-missing", EnvironmentLackError)
    assert f"edgeprune build {bundle.path}" in str(error.hint)
    assert trt.calls == []


def test_version_that_does_not_take_the_graphs_is_refused(machine: Machine, tmp_path: Path) -> None:
    bundle = write_for_tensorrt(tmp_path / "bundle", tensorrt={"8.6": [], "11.1": ["TopK with K of 4000"]})
    error = fails(bundle, "tensorrt-version", EnvironmentLackError)
    assert "TopK with K of 4000" in error.message
    assert machine.built == []


def test_engine_of_the_plugin_tells_how_to_load_it(machine: Machine, tmp_path: Path) -> None:
    from edgeprune.export.trt.api import trtexec_lines
    from edgeprune.export.trt.machine import Machine

    (info, _) = build(write_for_tensorrt(tmp_path / "bundle", plugin=True), selection="plugin").engines
    machine_with = Machine("Orin", "8.7", None, "10.3.0", plugin=tmp_path / "libedgeprune_trt10.so")
    (line,) = trtexec_lines(info, [{}], machine_with)
    assert line == "trtexec --loadEngine=model_plugin.engine --dynamicPlugins=libedgeprune_trt10.so"
    told = info.model_copy(update={"profiles": [info.profiles[0].model_copy(update={"slots": [12, 8]})]})
    (line,) = trtexec_lines(told, [{"tokens": (1, 17, 32)}], machine_with)
    assert "--shapes=tokens:1x17x32,slots:12x8 " in line
