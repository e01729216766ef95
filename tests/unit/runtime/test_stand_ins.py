"""The stand-ins for TensorRT and CUDA are as strict as the real ones, or the tests that use them prove nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.helpers.bundles import WEIGHTS, tiny_model
from tests.helpers.fake_cuda import LAYOUTS, FakeStream
from tests.helpers.fake_trt import VERSIONS, FakeTensorRT, install, make_plan, other_process, read_plan

CAPTURE = "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL"


@pytest.fixture(params=VERSIONS)
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    made = install(monkeypatch, request.param)
    made.device.initialised = True
    return made


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    onnx.save(tiny_model((1, 4)), str(tmp_path / "tiny.onnx"))
    return tmp_path / "tiny.onnx"


def build(fake: FakeTensorRT, graph: Path, *, batches: tuple[int, ...] = (1, 4)) -> Any:
    trt: Any = fake.module
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    explicit = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
    network = builder.create_network(0 if explicit is None else 1 << int(explicit))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(graph.read_bytes(), str(graph))
    config = builder.create_builder_config()
    for batch in batches:
        profile = builder.create_optimization_profile()
        profile.set_shape("images", *[(batch, 3, 8, 8)] * 3)
        config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config)


def test_names_are_those_of_the_version(fake: FakeTensorRT) -> None:
    trt: Any = fake.module
    old = fake.version.startswith("8")
    assert hasattr(trt.BuilderFlag, "FP16") is old
    assert hasattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH") is old
    assert hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") is not old
    assert hasattr(trt.ICudaEngine, "create_execution_context_without_device_memory") is old
    assert hasattr(trt, "ExecutionContextAllocationStrategy") is not old
    assert hasattr(trt, "IProgressMonitor") is not old
    assert hasattr(trt.ILayer, "precision") is old
    config = trt.Builder(trt.Logger()).create_builder_config()
    assert hasattr(config, "progress_monitor") is not old
    with pytest.raises(AttributeError):
        config.max_work_space = 1
    with pytest.raises(NotImplementedError, match="lacks"):
        trt.Refitter(None, None)


@pytest.mark.parametrize("touch", ["Builder", "Runtime"])
def test_touching_it_before_asking_for_a_device_is_fatal(fake: FakeTensorRT, touch: str) -> None:
    fake.device.initialised = False
    with pytest.raises(AssertionError, match="no device"):
        getattr(fake.module, touch)(fake.module.Logger())


def test_a_built_engine_computes_what_the_graph_does(fake: FakeTensorRT, graph: Path) -> None:
    import pycuda.driver as cuda

    trt: Any = fake.module
    plan = build(fake, graph)
    assert len(read_plan(plan)["profiles"]) == 2
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(plan)
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    assert names == ["images", "logits", "kept_indices_0", "kept_counts"]
    assert engine.get_tensor_dtype("kept_counts") == trt.int32
    cuda.init()
    context = cuda.Device(0).retain_primary_context()
    context.push()
    stream = cuda.Stream(1)
    run = engine.create_execution_context()
    assert run.set_optimization_profile_async(1, stream.handle)
    assert not run.set_input_shape("images", (2, 3, 8, 8)), "outside of min = opt = max"
    assert not run.execute_async_v3(stream.handle), "no shape, no addresses"
    assert run.set_input_shape("images", (4, 3, 8, 8)) and run.infer_shapes() == []
    images = cuda.pagelocked_empty((4, 3, 8, 8), np.float32)
    images[:] = np.random.default_rng(0).normal(size=images.shape)
    device: dict[str, Any] = {"images": cuda.mem_alloc(images.nbytes)}
    for name in names[1:]:
        device[name] = cuda.mem_alloc(int(np.prod(tuple(run.get_tensor_shape(name)))) * 4)
    cuda.memcpy_htod_async(device["images"], images, stream)
    for name, held in device.items():
        run.set_tensor_address(name, int(held))
    assert run.execute_async_v3(stream.handle)
    logits = cuda.pagelocked_empty((4, 4), np.float32)
    cuda.memcpy_dtoh_async(logits, device["logits"], stream)
    stream.synchronize()
    np.testing.assert_allclose(logits, images.mean((2, 3)) @ WEIGHTS, rtol=1e-4, atol=1e-6)
    assert fake.device.complaints == []
    assert run.execute_async_v3(0) and "default stream" in fake.device.complaints[0]
    cuda.Context.pop()
    assert fake.device.left_pushed() == 0


def test_a_context_without_memory_does_not_run(fake: FakeTensorRT, graph: Path) -> None:
    trt: Any = fake.module
    plan = make_plan(fake.version, graph, [({"images": [1, 3, 8, 8]}, {})])
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(plan)
    if hasattr(trt, "ExecutionContextAllocationStrategy"):
        run = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    else:
        run = engine.create_execution_context_without_device_memory()
    held = fake.device.allocate(1 << 16, "device").start
    fake.device.streams[5] = FakeStream()
    assert run.set_input_shape("images", (1, 3, 8, 8))
    for name in ("images", "logits", "kept_indices_0", "kept_counts"):
        run.set_tensor_address(name, held)
    assert not run.execute_async_v3(5)
    assert "no device memory" in fake.log[-1][1]
    run.device_memory = held
    assert run.execute_async_v3(5)


def test_profiles_of_8_6_belong_to_one_context_each(monkeypatch: pytest.MonkeyPatch, graph: Path) -> None:
    fake = install(monkeypatch, "8.6.0")
    fake.device.initialised = True
    trt: Any = fake.module
    shapes = [({"images": [n, 3, 8, 8]}, {}) for n in (1, 2)]
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(make_plan("8.6.0", graph, shapes))
    first, second = engine.create_execution_context(), engine.create_execution_context()
    assert (first.active_optimization_profile, second.active_optimization_profile) == (0, -1)
    assert not second.set_optimization_profile_async(0, 7)
    assert second.set_optimization_profile_async(1, 7)


def test_engines_of_another_version_are_refused(fake: FakeTensorRT, graph: Path) -> None:
    trt: Any = fake.module
    runtime = trt.Runtime(trt.Logger())
    other = next(version for version in VERSIONS if version != fake.version)
    assert runtime.deserialize_cuda_engine(make_plan(other, graph)) is None
    assert runtime.deserialize_cuda_engine(b"something else") is None
    assert runtime.deserialize_cuda_engine(make_plan(fake.version, graph, plugins=["TopKGather"])) is not None
    fake.registry.held.clear()
    assert runtime.deserialize_cuda_engine(make_plan(fake.version, graph, plugins=["TopKGather"])) is None


def test_parser_and_builder_say_why(fake: FakeTensorRT, graph: Path) -> None:
    trt: Any = fake.module
    logger = trt.Logger()
    explicit = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
    network = trt.Builder(logger).create_network(0 if explicit is None else 1 << int(explicit))
    fake.faults.parse = ""  # the nodes of this graph have no names, so the first
    parser = trt.OnnxParser(network, logger)
    assert not parser.parse(graph.read_bytes(), str(graph))
    assert (parser.num_errors, parser.get_error(0).node(), parser.get_error(0).desc()) == (1, 0, "a planted fault")
    fake.faults.parse = None
    assert build(fake, graph) is not None
    assert build(fake, graph, batches=()) is None
    assert "no optimization profile" in fake.log[-1][1]
    fake.faults.build = True
    assert build(fake, graph) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_capture_records_and_launch_replays(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    import importlib

    fake = install(monkeypatch, layout=layout)
    cuda = importlib.import_module("pycuda.driver")
    driver: Any = importlib.import_module(layout)
    cuda.init()
    cuda.Device(0).retain_primary_context().push()
    stream = cuda.Stream(1)
    host, device = cuda.pagelocked_empty(4, np.uint8), cuda.mem_alloc(4)
    mode = driver.CUstreamCaptureMode[CAPTURE]
    assert driver.cuStreamBeginCapture(driver.CUstream(stream.handle), mode) == (0,)
    cuda.memcpy_htod_async(device, host, stream)
    error, graph = driver.cuStreamEndCapture(driver.CUstream(stream.handle))
    instantiate = getattr(driver, "cuGraphInstantiateWithFlags", None) or driver.cuGraphInstantiate
    error, executable = instantiate(graph, 0)
    assert error == driver.CUresult.CUDA_SUCCESS
    seen = fake.device.view(int(device), 4)
    host[:] = 7
    assert seen.tolist() != [7] * 4, "nothing runs while it is captured"
    assert driver.cuGraphLaunch(executable, driver.CUstream(stream.handle)) == (0,)
    assert seen.tolist() == [7] * 4
    driver.cuStreamBeginCapture(driver.CUstream(stream.handle), mode)
    with pytest.raises(cuda.LogicError):
        cuda.mem_alloc(4)
    assert driver.cuStreamEndCapture(driver.CUstream(stream.handle))[0] != 0
    cuda.Context.pop()


def test_a_lazy_stream_runs_when_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, lazy=True)
    import pycuda.driver as cuda

    with pytest.raises(cuda.LogicError, match="NOT_INITIALIZED"):
        cuda.Device(0)
    cuda.init()
    context = cuda.Device(0).retain_primary_context()
    with pytest.raises(cuda.LogicError, match="INVALID_CONTEXT"):
        cuda.Stream(1)
    context.push()
    stream, event = cuda.Stream(1), cuda.Event(cuda.event_flags.DISABLE_TIMING)
    host, device = cuda.pagelocked_empty(4, np.uint8), cuda.mem_alloc(4)
    host[:] = 1
    cuda.memcpy_htod_async(device, host, stream)
    event.record(stream)
    host[:] = 2  # too early
    assert not event.query() and event.query()
    assert fake.device.view(int(device), 4).tolist() == [2] * 4
    with pytest.raises(cuda.MemoryError):
        cuda.mem_alloc(1 << 40)
    with pytest.raises(cuda.LogicError, match="ILLEGAL_ADDRESS"):
        cuda.memcpy_dtod_async(int(device) + 2, int(device), 4, stream)
    cuda.memcpy_htod_async(device, np.zeros(4, np.uint8), stream)
    assert "pageable" in fake.device.complaints[-1]
    cuda.Context.pop()


def test_another_process_has_them_from_its_start(tmp_path: Path) -> None:
    code = """
import ctypes
count = ctypes.c_int()
driver = ctypes.CDLL("libcuda.so.1")
print(driver.cuInit(0), driver.cuDeviceGetCount(ctypes.byref(count)), count.value)
import tensorrt, pycuda.driver
from cuda.bindings import driver
print(tensorrt.__version__, hasattr(tensorrt.BuilderFlag, "FP16"), tensorrt.Builder(tensorrt.Logger()) is not None)
"""
    environment = other_process(tmp_path / "site", "11.4.0")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout.split("\n")[:2], done.returncode) == (["0 0 1", "11.4.0 False True"], 0), done.stderr
