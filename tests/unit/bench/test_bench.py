from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprune.bench import bench_bundle
from edgeprune.bench import naive as naive_module
from edgeprune.bench.bench import ratio_clock
from edgeprune.bench.images import make_images
from edgeprune.bench.runners import Contest
from edgeprune.errors import EnvironmentLackError, InputError
from edgeprune.models.config import ViTConfig
from edgeprune.runtime.bundle import Bundle, BundleWriter
from edgeprune.runtime.cuda import Device
from edgeprune.runtime.ort_cuda import OrtCudaBackend

CONFIG = ViTConfig("tiny", image_size=(16, 16), patch_size=(8, 8), num_classes=3, embed_dim=8, depth=2, num_heads=2)


def write_graph(path: Path, repeats: int) -> None:
    """A stand-in for a ViT: averages the image, then adds zero `repeats` times."""
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["x0"]),
    ]
    nodes += [helper.make_node("Add", [f"x{i}", f"x{i}"], [f"x{i + 1}"]) for i in range(repeats)]
    nodes.append(helper.make_node("Identity", [f"x{repeats}"], ["logits"]))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "stand-in",
        [value("images", 1, [None, 3, 16, 16])],
        [value("logits", 1, [None, 3])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def make_bundle(out: Path, graphs: tuple[str, ...] = ("model", "dense", "random"), **fields: Any) -> Bundle:
    pruned = "dense" in graphs or "random" in graphs
    tensors = {
        "inputs": [{"name": "images", "dtype": "float32", "shape": [-1, 3, 16, 16]}],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": [-1, 3]}],
    }
    stage = {"index": 0, "block": 1, "where": "pre_block", "tokens_in": 4, "kept": 2, "fused": 0}
    with BundleWriter(out) as writer:
        for i, name in enumerate(graphs):
            write_graph(writer.path / f"{name}.onnx", 3 - i)
        return writer.finish(
            {
                "model": {"name": "tiny", "parameters": 1, "config": CONFIG.to_dict()},
                "weights": {"source": "random", "seed": 0},
                "method": {"name": "evit", "keep_rate": 0.5, "stages": [stage] if pruned else []},
                "target": "ort-cpu",
                "precision": "fp32",
                "opset": 17,
                "batch": (1, 4),
                "lowering": "emitted",
                "selection": "native",
                "dead_rows": True,
                "macs": {"dense": 40, "pruned": 30, "dense_executed": 40, "pruned_executed": 25},
                "graphs": {name: {"file": f"{name}.onnx", **tensors} for name in graphs},
                "preprocessing": {
                    "image_size": (16, 16),
                    "mean": (0.5, 0.5, 0.5),
                    "std": (0.5, 0.5, 0.5),
                    "crop_pct": 1.0,
                    "interpolation": "bicubic",
                },
                **fields,
            }
        )


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    pytest.importorskip("onnxruntime")
    return make_bundle(tmp_path / "bundle")


def test_bench_measures_the_graphs_of_a_bundle(bundle: Bundle) -> None:
    result = bench_bundle(bundle.path, rounds=12)
    assert [runner.name for runner in result.runners] == ["dense", "pruned", "random"]
    assert result.blocks == 6
    assert all(len(runner.wall_ms) == runner.n == 12 * result.calls_per_visit for runner in result.runners)
    assert result.speedup is not None
    assert result.speedup.low is not None
    assert result.bundle["method"]["keep_rate"] == 0.5


def test_bench_names_no_path(bundle: Bundle) -> None:
    assert str(bundle.path.parent) not in str(bench_bundle(bundle, rounds=2).to_dict())


def test_bench_measures_only_what_is_asked(bundle: Bundle) -> None:
    result = bench_bundle(bundle, rounds=2, against=("dense",))
    assert [runner.name for runner in result.runners] == ["dense", "pruned"]
    assert result.selection_overhead is None


def test_bench_of_a_dense_bundle_measures_its_only_graph(tmp_path: Path) -> None:
    result = bench_bundle(make_bundle(tmp_path / "dense", ("model",)), rounds=2)
    assert [runner.name for runner in result.runners] == ["dense"]
    assert result.warnings == []


def test_bench_warns_when_a_baseline_is_absent(tmp_path: Path) -> None:
    result = bench_bundle(make_bundle(tmp_path / "b", ("model", "dense")), rounds=2)
    assert result.warnings == ["the bundle holds no random graph; it was not measured"]


def test_bench_runs_one_batch_of_noise_unless_the_image_decides(bundle: Bundle) -> None:
    result = bench_bundle(bundle, rounds=2, batch=2, images=7)
    assert (result.data, result.images, result.runs_per_sample) == ("noise", 2, 1)
    assert (result.adaptive, result.densities, result.switch_us, result.callers) == (None, [], None, None)


def test_bench_tells_the_memory_of_every_session(bundle: Bundle) -> None:
    assert [m.session for m in bench_bundle(bundle, rounds=2).memory] == ["dense", "pruned", "random"]


def test_bench_lets_several_call_one_session(bundle: Bundle) -> None:
    callers = bench_bundle(bundle, rounds=2, images=3, callers=2).callers
    assert callers is not None
    assert (callers.one.callers, callers.many.callers) == (1, 2)
    assert callers.compared == 4 * 2 * callers.runs  # of the warm-up and of one block


def test_bench_refuses_a_single_caller(bundle: Bundle) -> None:
    with pytest.raises(InputError) as error:
        bench_bundle(bundle, callers=1)
    assert error.value.code == "bench-callers"


def test_bench_marks_quick_runs(bundle: Bundle) -> None:
    result = bench_bundle(bundle, quick=True, rounds=2)
    assert result.quick is True


def test_bench_reports_progress(bundle: Bundle) -> None:
    steps: list[tuple[str, float]] = []
    bench_bundle(bundle, rounds=2, progress=lambda step, share: steps.append((step, share)))
    assert steps[-1] == ("measure", 1.0)


def test_bench_runs_the_batch(bundle: Bundle) -> None:
    assert bench_bundle(bundle, batch=4, rounds=2).batch == 4


@pytest.mark.parametrize(
    ("batch", "against", "code"), [(5, ("dense",), "bench-batch"), (1, ("tome",), "bench-against")]
)
def test_bench_refuses_what_does_not_fit(bundle: Bundle, batch: int, against: tuple[str, ...], code: str) -> None:
    with pytest.raises(InputError) as error:
        bench_bundle(bundle, batch=batch, against=against)
    assert error.value.code == code
    assert error.value.expected


def test_bench_sessions_never_spin(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeprune.runtime import session

    asked = []

    class Spy(session.Session):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            asked.append((kwargs["threads"], kwargs["spinning"]))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(session, "Session", Spy)
    images = make_images(None, bundle.manifest.preprocessing, count=1, batch=1, seed=0)
    Contest(images, threads=2).add_bundle(bundle)
    assert asked == [(2, False)] * 3


def test_bench_measures_the_naive_export(bundle: Bundle) -> None:
    pytest.importorskip("torch")
    result = bench_bundle(bundle, rounds=2, batch=2, against=("dense", "naive"))
    assert [runner.name for runner in result.runners] == ["dense", "pruned", "naive"]
    assert result.naive_over_pruned is not None
    assert "random weights" in result.runners[-1].label


def test_bench_refuses_naive_when_the_architecture_is_unknown(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", model={"name": "traced", "parameters": 1, "config": None})
    with pytest.raises(InputError) as error:
        bench_bundle(bundle, rounds=2, against=("naive",))
    assert error.value.code == "bench-naive"


def test_bench_names_the_extra_when_torch_is_absent(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(EnvironmentLackError) as error:
        bench_bundle(bundle, rounds=2, against=("naive",))
    assert error.value.code == "package-missing"


def test_naive_export_computes_the_dense_model(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from edgeprune.models.vit import VisionTransformer
    from edgeprune.runtime.ort import OrtBackend

    torch.manual_seed(3)
    model = VisionTransformer(CONFIG).eval()
    images = torch.randn(2, 3, 16, 16)
    path = naive_module.export_naive_dense(CONFIG, tmp_path, batch=2, seed=3)
    logits = OrtBackend(path, threads=1, spinning=False).run({"images": images.numpy()})["logits"]
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(images).numpy(), rtol=1e-4, atol=1e-5)


def test_naive_export_leaves_the_random_state_alone(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    naive_module.export_naive_dense(CONFIG, tmp_path, batch=1, seed=3)
    assert torch.rand(1) == expected


def test_ratio_clock_is_wall_time_when_threads_are_many() -> None:
    assert ratio_clock(2) == ratio_clock(0) == "wall"


def test_ratio_clock_is_wall_time_on_a_device() -> None:
    assert ratio_clock(1, on_device=True) == "wall"


def test_a_bundle_for_a_device_is_measured_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    here = partial(OrtCudaBackend, provider="CPUExecutionProvider", device="cpu")
    monkeypatch.setattr("edgeprune.runtime.opener.OrtCudaBackend", here)
    monkeypatch.setattr("edgeprune.bench.fingerprint.find_device", lambda: Device(0, "Orin", (8, 7), 1 << 33, "12.6"))
    bundle = make_bundle(tmp_path / "bundle", target="ort-cuda-fp16", precision="fp16")
    result = bench_bundle(bundle, rounds=4)
    assert result.clock == "wall"
    assert result.fingerprint["gpu"] == {
        **{"name": "Orin", "compute_capability": "8.7", "memory_mib": 8192, "driver": "12.6"}
    }
    assert [runner.name for runner in result.runners] == ["dense", "pruned", "random"]
    assert "gpu" not in bench_bundle(make_bundle(tmp_path / "plain"), rounds=4).fingerprint


def test_the_naive_baseline_is_not_measured_against_a_device(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="runs on the processor") as caught:
        bench_bundle(make_bundle(tmp_path / "bundle", target="trt-fp16"), against=("naive",))
    assert caught.value.code == "bench-naive"


def test_an_engine_needs_no_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle(tmp_path / "bundle", target="trt-fp16")
    opened: list[str] = []

    class Stub:
        def __init__(self, bundle: Bundle, *, graph: str, **options: Any) -> None:
            opened.append(graph)

    def missing() -> None:
        raise AssertionError("onnxruntime was imported")

    monkeypatch.setattr("edgeprune.runtime.session.Session", Stub)
    monkeypatch.setattr("edgeprune.bench.runners.import_onnxruntime", missing)
    Contest(make_images(None, bundle.manifest.preprocessing, count=1, batch=1, seed=0), 1).add_bundle(bundle)
    assert opened == ["dense", "model", "random"]
