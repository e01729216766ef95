"""CUDA behind its seam, on the stand-in: contexts, memory, graphs, and what is said when something is missing."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgeprune.errors import EdgepruneError
from edgeprune.runtime.cuda import CaptureFailed, Cuda, find_device
from tests.helpers.fake_cuda import LAYOUTS, FakeDevice, install_cuda


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    made = FakeDevice(lazy=True)
    install_cuda(made, monkeypatch)
    return made


def refused(call: Callable[[], Any]) -> EdgepruneError:
    with pytest.raises(EdgepruneError) as caught:
        call()
    assert caught.value.exit_code == 3 and caught.value.hint
    return caught.value


def test_the_device_is_found_without_a_package(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    found = find_device()
    assert (found.index, found.name, found.compute_capability) == (0, device.name, (8, 7))
    assert (found.total_bytes, found.driver) == (1 << 30, "12.6")
    assert device.initialised


@pytest.mark.parametrize(("count", "index", "words"), [(None, 0, "no CUDA driver"), (0, 0, "100"), (1, 1, "no GPU 1")])
def test_without_a_device(device: FakeDevice, count: int | None, index: int, words: str) -> None:
    device.count = count
    error = refused(lambda: find_device(index))
    assert error.code == "gpu-missing" and words in error.message


def test_without_pycuda(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    error = refused(Cuda)
    assert error.code == "package-missing" and error.details == {"package": "pycuda", "extra": "trt"}


def test_the_context_is_current_inside_the_block_alone(device: FakeDevice) -> None:
    cuda, other = Cuda(), Cuda()
    assert cuda._context is other._context, "the primary context is retained once"
    depths = []

    def work() -> None:
        with cuda:
            with cuda:
                depths.append(len(device.contexts()))
            depths.append(len(device.contexts()))
        depths.append(len(device.contexts()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    work()
    assert depths == [2, 1, 0] * 2 and device.left_pushed() == 0


def test_copies_go_there_and_back(device: FakeDevice) -> None:
    with Cuda() as cuda:
        stream, done = cuda.stream(), cuda.event()
        there, back = cuda.pinned(8), cuda.pinned(8)
        first, second = cuda.device_buffer(8), cuda.device_buffer(8)
        there[:] = np.arange(8)
        cuda.to_device(first.address, there, stream)
        cuda.clear(second.address, 8, stream)
        cuda.on_device(second.address + 4, first.address, 4, stream)
        cuda.to_host(back, second.address, stream)
        cuda.record(done, stream)
        cuda.wait(done)
        assert back.tolist() == [0, 0, 0, 0, 0, 1, 2, 3]
        mapped = cuda.mapped(4)
        cuda.on_device(mapped.address, first.address + 2, 4, stream)
        cuda.record(done, stream)
        cuda.wait(done)
        assert mapped.array.tolist() == [2, 3, 4, 5]
    assert device.complaints == [] and device.left_pushed() == 0


def test_memory_is_given_back_in_whatever_thread(device: FakeDevice) -> None:
    cuda = Cuda()
    with cuda:
        held: list[Any] = [cuda.device_buffer(100), cuda.pinned(100), cuda.mapped(100)]
        part = held[1][10:20]
    assert len(device.memory) == 3
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert [memory.kind for memory in device.memory.values()] == ["pinned"], "a part of it is still there"
    del part
    assert device.memory == {} and device.left_pushed() == 0


def test_memory_that_is_not_there(device: FakeDevice) -> None:
    cuda = Cuda()

    def take() -> None:
        with cuda:
            cuda.device_buffer(2 << 30)

    error = refused(take)
    assert error.code == "gpu-out-of-memory" and error.details == {"bytes": 2 << 30, "free": 1 << 30}


def test_what_cuda_raises_is_explained(device: FakeDevice) -> None:
    cuda = Cuda()

    def copy() -> None:
        with cuda:
            cuda.on_device(64, 128, 4, cuda.stream())

    error = refused(copy)
    assert error.code == "gpu-failed" and "CUDA_ERROR_ILLEGAL_ADDRESS" in error.message
    with pytest.raises(ZeroDivisionError), cuda:
        raise ZeroDivisionError
    assert device.left_pushed() == 0


def test_a_slow_event_is_slept_on(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.runtime.cuda._SPIN_S", -1.0)
    with Cuda() as cuda:
        stream, done, there, target = cuda.stream(), cuda.event(), cuda.pinned(1), cuda.device_buffer(1)
        cuda.to_device(target.address, there, stream)
        cuda.record(done, stream)
        cuda.wait(done)
    assert [name for name, _ in device.events] == ["event-synchronize"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_graph_runs_when_it_is_launched(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    device = FakeDevice()
    install_cuda(device, monkeypatch, layout=layout)
    with Cuda() as cuda:
        stream, there, target = cuda.stream(), cuda.pinned(4), cuda.device_buffer(4)
        graph = cuda.capture(stream, lambda: cuda.to_device(target.address, there, stream))
        seen = device.view(target.address, 4)
        for value in (1, 2):
            there[:] = value
            assert seen.tolist() != [value] * 4
            graph.launch(stream)
            assert seen.tolist() == [value] * 4
        assert device.graphs == {}, "only the executable form is kept"
        with pytest.raises(CaptureFailed, match="INVALIDATED"):
            cuda.capture(stream, lambda: cuda.record(cuda.event(), stream))
        with pytest.raises(ZeroDivisionError):
            cuda.capture(stream, lambda: 1 // 0)
        assert not device.capturing(stream.handle) and gc.isenabled()
    assert device.complaints == []


def test_no_graphs_without_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    install_cuda(FakeDevice(), monkeypatch, layout=None)
    with Cuda() as cuda, pytest.raises(CaptureFailed, match=r"cuda-python.*edgeprune\[trt\]"):
        cuda.capture(cuda.stream(), lambda: None)
