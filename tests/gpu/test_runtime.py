"""The run time on a device: CUDA behind its seam, alone and beside PyTorch, and sessions on engines. Not run yet."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import pytest

from edgeprune import Session
from edgeprune.export import ExportRequest, export_model
from edgeprune.export.trt import BuildOptions, build_engines
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.cuda import Cuda, find_device
from edgeprune.runtime.engine_backend import DeviceRows
from edgeprune.runtime.router import COUNT, IMAGES
from edgeprune.runtime.trt import Engines
from tests.helpers.device_kernels import missing_device

pytestmark = pytest.mark.gpu
BATCH = 4


@pytest.fixture(autouse=True)
def device() -> None:
    reason = missing_device()
    if reason is None and find_spec("pycuda") is None:
        reason = "no pycuda"
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    with Cuda() as made:
        yield made


def test_pycuda_sees_the_device_that_was_found(cuda: Cuda) -> None:
    import pycuda.driver

    found, theirs = find_device(), pycuda.driver.Device(0)
    assert (found.name, found.compute_capability) == (theirs.name(), theirs.compute_capability())
    assert found.total_bytes == theirs.total_memory()


def test_copies_and_mapped_memory(cuda: Cuda) -> None:
    stream, done = cuda.stream(), cuda.event()
    there, back, mapped = cuda.pinned(1024), cuda.pinned(1024), cuda.mapped(1024)
    first, second = cuda.device_buffer(1024), cuda.device_buffer(1024)
    there[:] = np.arange(1024) % 251
    cuda.to_device(first.address, there, stream)
    cuda.clear(second.address, 1024, stream)
    cuda.on_device(second.address + 512, first.address, 512, stream)
    cuda.to_host(back, second.address, stream)
    cuda.on_device(mapped.address, first.address, 1024, stream)
    cuda.record(done, stream)
    cuda.wait(done)
    assert back[:512].any() == np.False_
    np.testing.assert_array_equal(back[512:], there[:512])
    np.testing.assert_array_equal(mapped.array, there)


@pytest.mark.skipif(find_spec("cuda") is None, reason="no cuda-python")
def test_a_graph_is_replayed_while_torch_works_in_another_thread(cuda: Cuda) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    stop = threading.Event()
    sums: list[float] = []

    def work() -> None:
        while not stop.is_set():
            sums.append(float(torch.ones(1 << 20, device="cuda").sum()))
            torch.cuda.empty_cache()  # allocates and frees, which a capture of the whole process would not stand

    thread = threading.Thread(target=work)
    thread.start()
    stream, done = cuda.stream(), cuda.event()
    there, back, middle = cuda.pinned(64), cuda.pinned(64), cuda.device_buffer(64)

    def copy() -> None:
        cuda.to_device(middle.address, there, stream)
        cuda.to_host(back, middle.address, stream)

    try:
        for value in range(200):
            graph = cuda.capture(stream, copy)
            there[:] = value
            graph.launch(stream)
            cuda.record(done, stream)
            cuda.wait(done)
            assert (back == value).all()
    finally:
        stop.set()
        thread.join()
    assert sums and set(sums) == {float(1 << 20)}


# ------------------------------------------------------------------------------------------------ engines


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    if missing_device() is not None or find_spec("tensorrt") is None:
        pytest.skip(missing_device() or "no tensorrt")
    request = ExportRequest(
        model="vit_digits",
        model_options={"depth": 4},
        method="sait",
        method_options={"mass": "0.8"},
        stages="1,2",
        buckets="36,39",
        target="trt-fp16",
        batch=(1, BATCH),
        random_weights=True,
        token_outputs=True,
        verify=False,
    )
    made = export_model(request, tmp_path_factory.mktemp("bundle") / "bundle")
    build_engines(made, BuildOptions(batches=(1, BATCH), selection="native", cache=False))
    return made


def images_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 64, 64), np.float32)


@pytest.mark.tensorrt
def test_rows_on_the_device_give_what_arrays_give(bundle: Bundle) -> None:
    engines = Engines(bundle)
    stem, rest = engines.backend("stem"), engines.backend("rest_64")
    handed = {tensor.name for tensor in rest.inputs} - {COUNT}
    arrays = stem.run({IMAGES: images_of(BATCH)})
    expected = rest.run({name: arrays[name] for name in (*handed, COUNT)})["logits"]
    kept = stem.run({IMAGES: images_of(BATCH)}, keep=handed)
    assert all(isinstance(kept[name], DeviceRows) for name in handed)
    for _ in range(3):  # run, captured, replayed
        out = rest.run({name: kept[name] for name in (*handed, COUNT)})
        np.testing.assert_array_equal(out["logits"], expected)
    apart = {name: rest.join([kept[name][2:3], kept[name][:2]]) for name in (*handed, COUNT)}
    np.testing.assert_allclose(rest.run(apart)["logits"], expected[[2, 0, 1]], atol=0.02)


@pytest.mark.tensorrt
def test_every_image_is_that_of_itself_alone_in_every_thread(bundle: Bundle) -> None:
    session = Session(bundle)
    session.warmup()
    alone = np.concatenate([session.run(images_of(8)[i : i + 1]).logits for i in range(8)])
    wrong: list[int] = []

    def work(start: int) -> None:
        for _ in range(50):
            found = session.run(images_of(8)[start : start + BATCH]).logits
            if np.abs(found - alone[start : start + BATCH]).max() > 0.05:
                wrong.append(start)

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 2, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.tensorrt
def test_graphs_are_captured(bundle: Bundle) -> None:
    engines = Engines(bundle)  # a warning that they are not would be an error here
    assert all(profile.graphs for profile in engines.backend("stem")._profiles)
