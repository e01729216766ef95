"""The binding of the CUDA backend, run for real on the CPU provider, and its refusals."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgeprune.errors import EnvironmentLackError, InputError
from edgeprune.runtime import ort_cuda
from edgeprune.runtime.manifest import AdaptiveInfo
from edgeprune.runtime.opener import Opener
from edgeprune.runtime.ort import OrtBackend, import_onnxruntime
from edgeprune.runtime.ort_cuda import MAX_PLANS, DeviceRows, OrtCudaBackend
from edgeprune.runtime.router import Router
from edgeprune.runtime.session import Session
from tests.helpers.bundles import tiny_model, write_tiny
from tests.helpers.routed import save, value, write_rest, write_stem

CPU = "CPUExecutionProvider"


def backend(path: Path) -> OrtCudaBackend:
    return OrtCudaBackend(path, provider=CPU, device="cpu")


def images(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 3, 8, 8)).astype(np.float32)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    onnx.save(tiny_model((1, 8)), tmp_path / "tiny.onnx")
    return tmp_path / "tiny.onnx"


def test_results_are_those_of_the_cpu_backend(tiny: Path) -> None:
    ours, plain = backend(tiny), OrtBackend(tiny, threads=1)
    assert (ours.inputs, ours.outputs) == (plain.inputs, plain.outputs)
    for batch in (1, 3, 1, 8):
        feeds = {"images": images(batch, batch)}
        got, wanted = ours.run(feeds), plain.run(feeds)
        assert list(got) == list(wanted)
        for name, array in wanted.items():
            assert isinstance(got[name], np.ndarray)
            np.testing.assert_array_equal(got[name], array)


def test_a_result_does_not_change_when_the_backend_runs_again(tiny: Path) -> None:
    ours = backend(tiny)
    first = ours.run({"images": images(2)})["logits"]
    before = first.copy()
    ours.run({"images": images(2, 1)})
    np.testing.assert_array_equal(first, before)


def test_an_array_that_is_not_contiguous_is_taken_as_it_is(tiny: Path) -> None:
    turned = images(2).transpose(0, 1, 3, 2)
    wanted = OrtBackend(tiny).run({"images": np.ascontiguousarray(turned)})
    np.testing.assert_array_equal(backend(tiny).run({"images": turned})["logits"], wanted["logits"])


def test_buffers_of_known_shapes_are_made_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = backend(tiny)
    made: list[list[int]] = []
    allocate = ours._allocate
    monkeypatch.setattr(ours, "_allocate", lambda shape, dtype: made.append(list(shape)) or allocate(shape, dtype))
    for seed in range(3):
        ours.run({"images": images(2, seed)})
    assert made == [[2, 3, 8, 8], [2, 4], [2, 2], [2, 1]]


def test_more_shapes_than_are_planned_run_all_the_same(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_cuda, "MAX_PLANS", 2)
    ours, plain = backend(tiny), OrtBackend(tiny)
    for batch in (1, 2, 3, 4):
        feeds = {"images": images(batch)}
        np.testing.assert_array_equal(ours.run(feeds)["logits"], plain.run(feeds)["logits"])
    assert sum(map(len, ours._plans.values())) == 2 < MAX_PLANS


def test_kept_outputs_stay_where_they_are_and_feed_the_next_graph(tmp_path: Path) -> None:
    first, second = backend(write_stem(tmp_path / "stem.onnx", 2)), backend(write_rest(tmp_path / "rest.onnx", 2, 3.0))
    x = images(2)
    handed = first.run({"images": x}, keep={"tokens"})
    assert isinstance(handed["tokens"], DeviceRows)
    assert isinstance(handed["token_count"], np.ndarray)
    assert (handed["tokens"].shape, len(handed["tokens"])) == ((2, 192), 2)
    out = second.run(handed)
    np.testing.assert_allclose(out["logits"], x.reshape(2, -1).astype(np.float16).astype(np.float32) * 3, rtol=1e-3)


def test_rows_hold_while_anybody_has_them_and_their_buffer_is_used_again_afterwards(tmp_path: Path) -> None:
    first = backend(write_stem(tmp_path / "stem.onnx", 2))
    tokens = first.run({"images": images(2)}, keep={"tokens"})["tokens"]
    part, before, address = tokens[1:], tokens.numpy(), tokens.address
    del tokens
    assert first.run({"images": images(2, 1)}, keep={"tokens"})["tokens"].address != address
    np.testing.assert_array_equal(part.numpy(), before[1:])
    del part
    assert first.run({"images": images(2, 1)}, keep={"tokens"})["tokens"].address == address


def test_rows_are_sliced_and_joined_without_leaving_the_device(tmp_path: Path) -> None:
    first = backend(write_stem(tmp_path / "stem.onnx", 4))
    tokens = first.run({"images": images(4)}, keep={"tokens"})["tokens"]
    whole = tokens.numpy()
    np.testing.assert_array_equal(tokens[1:3].numpy(), whole[1:3])
    np.testing.assert_array_equal(tokens[1:4][1:2].numpy(), whole[2:3])
    assert tokens[1:3].address == tokens.address + 192 * 2
    joined = first.join([tokens[i : i + 1] for i in (1, 2, 3)])
    assert isinstance(joined, DeviceRows)
    np.testing.assert_array_equal(joined.numpy(), whole[1:4])
    apart = first.join([tokens[i : i + 1] for i in (0, 2)])
    np.testing.assert_array_equal(apart, whole[[0, 2]])
    np.testing.assert_array_equal(first.join([whole[:1], whole[2:3]]), whole[[0, 2]])


@pytest.mark.parametrize(("stem_batch", "rest_batch"), [(1, 1), ("batch", 1), ("batch", "batch"), (4, 2)])
def test_routed_results_are_those_of_the_cpu_backend(
    tmp_path: Path, stem_batch: int | str, rest_batch: int | str
) -> None:
    write_stem(tmp_path / "stem.onnx", stem_batch)
    for i, scale in enumerate((2.0, 5.0)):
        write_rest(tmp_path / f"rest{i}.onnx", rest_batch, scale)
    buckets = [(95,), (192,)]  # about half of the images have fewer than 96 values above zero

    def router(make: Any) -> Router:
        return Router(make(tmp_path / "stem.onnx"), [make(tmp_path / f"rest{i}.onnx") for i in (0, 1)], buckets)

    ours, plain = router(backend), router(OrtBackend)
    for seed in range(3):
        x = images(5, seed)
        got, wanted = ours.run(x), plain.run(x)
        assert set(got["bucket"]) == {0, 1}
        for name, array in wanted.items():
            np.testing.assert_array_equal(got[name], array)


def test_shapes_that_do_not_follow_from_the_batch_are_bound_anew(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["axis"], value_ints=[1]),
        helper.make_node("Constant", [], ["zero"], value_ints=[0]),
        helper.make_node("Slice", ["images", "zero", "slots", "axis"], ["logits"]),
    ]
    inputs = [value("images", TensorProto.FLOAT, [1, 3, 8, 8]), value("slots", TensorProto.INT64, [1])]
    path = save(tmp_path / "told.onnx", nodes, inputs, [value("logits", TensorProto.FLOAT, [1, "k", 8, 8])])
    ours, x = backend(path), images(1)
    for k in (1, 3, 2):
        out = ours.run({"images": x, "slots": np.array([k])}, keep={"logits"})["logits"]
        np.testing.assert_array_equal(out.numpy(), x[:, :k])
    assert ours._plans == {}


def test_several_threads_get_their_own_results(tiny: Path) -> None:
    ours, plain = backend(tiny), OrtBackend(tiny)
    inputs = [images(2, seed) for seed in range(40)]
    results: dict[int, np.ndarray] = {}

    def work(part: range) -> None:
        for i in part:
            results[i] = ours.run({"images": inputs[i]})["logits"]

    threads = [threading.Thread(target=work, args=(range(start, 40, 4),)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(inputs):
        np.testing.assert_array_equal(results[i], plain.run({"images": x})["logits"])


def test_an_onnxruntime_without_the_provider_is_refused(tiny: Path) -> None:
    if "CUDAExecutionProvider" in import_onnxruntime().get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    with pytest.raises(EnvironmentLackError, match="has no CUDAExecutionProvider, only") as caught:
        OrtCudaBackend(tiny)
    assert (caught.value.code, caught.value.exit_code) == ("provider-missing", 3)
    assert "edgeprune[cuda]" in str(caught.value.hint)


def test_a_session_of_the_target_takes_the_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_tiny(tmp_path / "bundle", target="ort-cuda-fp16")
    pretend(monkeypatch, [], running="CUDAExecutionProvider")
    x, plain = images(1), OrtBackend(bundle.graph_path("model"))
    np.testing.assert_array_equal(Session(bundle, threads=3).run(x).logits, plain.run({"images": x})["logits"])


@pytest.mark.parametrize(("form", "recorded"), [("slots", True), ("computed", False)])
def test_a_graph_whose_shapes_follow_the_image_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, recorded: bool
) -> None:
    pretend(monkeypatch, [], running="CUDAExecutionProvider")
    bundle = write_tiny(tmp_path / "bundle", target="ort-cuda-fp16")
    manifest = bundle.manifest.model_copy(update={"adaptive": AdaptiveInfo.model_validate({"form": form})})
    opener = Opener(replace(bundle, manifest=manifest), {})
    assert opener.backend("model").graphs is recorded
    assert opener.backend("dense").graphs


def test_a_session_of_the_target_is_refused_without_the_provider(tmp_path: Path) -> None:
    if "CUDAExecutionProvider" in import_onnxruntime().get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    with pytest.raises(EnvironmentLackError) as caught:
        Session(write_tiny(tmp_path / "bundle", target="ort-cuda-fp16"))
    assert caught.value.code == "provider-missing"


def test_a_missing_device_is_refused_before_a_session_is_made(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise EnvironmentLackError("no device", code="gpu-missing")

    monkeypatch.setattr(ort_cuda, "find_device", none)
    real = import_onnxruntime()
    fake = SimpleNamespace(get_available_providers=lambda: ["CUDAExecutionProvider", CPU], OrtValue=real.OrtValue)
    monkeypatch.setattr(ort_cuda, "import_onnxruntime", lambda: fake)
    with pytest.raises(EnvironmentLackError) as caught:
        OrtCudaBackend(tiny)
    assert caught.value.code == "gpu-missing"


def pretend(monkeypatch: pytest.MonkeyPatch, sessions: list[tuple[Any, ...]], *, running: str, refuse: int = 0) -> None:
    """Let onnxruntime claim to have CUDA, and run on the CPU; the first `refuse` sessions are refused."""
    real = import_onnxruntime()

    class Session(real.InferenceSession):
        def __init__(self, path: str, options: Any, providers: list[tuple[str, dict[str, str]]]) -> None:
            sessions.append(tuple(providers))
            if len(sessions) <= refuse:
                raise RuntimeError("not all nodes are on the provider")
            super().__init__(path, options, providers=[CPU])

        def get_providers(self) -> list[str]:
            return [running]

    names = ("SessionOptions", "RunOptions")
    fake = SimpleNamespace(InferenceSession=Session, **{name: getattr(real, name) for name in names})
    fake.get_available_providers = lambda: ["CUDAExecutionProvider", CPU]
    fake.OrtValue = SimpleNamespace(
        ortvalue_from_shape_and_type=lambda shape, dtype, device, number: real.OrtValue.ortvalue_from_shape_and_type(
            shape, dtype, "cpu", 0
        )
    )
    for module in ("edgeprune.runtime.ort", "edgeprune.runtime.ort_cuda"):
        monkeypatch.setattr(f"{module}.import_onnxruntime", lambda: fake)
    monkeypatch.setattr(ort_cuda, "find_device", lambda: None)


def test_a_silent_fall_back_to_the_cpu_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, [], running=CPU)
    with pytest.raises(EnvironmentLackError, match="could not load CUDAExecutionProvider") as caught:
        OrtCudaBackend(tiny)
    assert caught.value.code == "provider-missing"


def test_cuda_graphs_are_asked_for_and_each_plan_has_its_own(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions: list[tuple[Any, ...]] = []
    pretend(monkeypatch, sessions, running="CUDAExecutionProvider")
    ours = OrtCudaBackend(tiny)
    assert ours.graphs
    assert sessions == [(("CUDAExecutionProvider", {"device_id": "0", "enable_cuda_graph": "1"}),)]
    for batch in (1, 2, 1):
        ours.run({"images": images(batch)})
    numbers = [plan.options.get_run_config_entry("gpu_graph_id") for plans in ours._plans.values() for plan in plans]
    assert numbers == ["1", "2"]


def test_a_graph_that_cannot_be_recorded_runs_without(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions: list[tuple[Any, ...]] = []
    pretend(monkeypatch, sessions, running="CUDAExecutionProvider", refuse=1)
    ours = OrtCudaBackend(tiny)
    assert not ours.graphs
    assert sessions[1] == (("CUDAExecutionProvider", {}),)
    feeds = {"images": images(2)}
    np.testing.assert_array_equal(ours.run(feeds)["logits"], OrtCudaBackend(tiny).run(feeds)["logits"])


def test_a_recording_that_fails_is_given_up(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions: list[tuple[Any, ...]] = []
    pretend(monkeypatch, sessions, running="CUDAExecutionProvider")
    ours = OrtCudaBackend(tiny)
    run = ours._run

    def fail_once(feeds: Any, keep: Any) -> Any:
        if ours.graphs:
            raise RuntimeError("operation not permitted when stream is capturing")
        return run(feeds, keep)

    monkeypatch.setattr(ours, "_run", fail_once)
    assert ours.run({"images": images(1)})["logits"].shape == (1, 4)
    assert (ours.graphs, len(sessions)) == (False, 2)


def test_a_failing_run_names_the_graph(tiny: Path) -> None:
    with pytest.raises(InputError, match=r"cannot run .*tiny\.onnx") as caught:
        backend(tiny).run({"images": images(1)[:, :2]})
    assert caught.value.code == "graph-invalid"
