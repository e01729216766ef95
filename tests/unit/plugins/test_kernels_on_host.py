"""The whole kernel library on the host: its C interface, grids and kernels, on a CUDA of fibers."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from benchmarks._kernels import NAMES, SOURCES, Kernels
from tests.helpers.device_kernels import Runner
from tests.helpers.kernels import ROW_BYTES, random_case

FAKE_CUDA = SOURCES.parent / "tests" / "cuda_on_host"


class HostMemory:
    """The part of `benchmarks._cuda.Device` that the runner needs, in the memory of this process."""

    @contextmanager
    def memory(self, size: int) -> Iterator[int]:
        block = np.empty(size + 255, np.uint8)  # CUDA aligns to 256 bytes
        yield block.ctypes.data + -block.ctypes.data % 256

    def upload(self, address: int, array: np.ndarray) -> None:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, address: int, array: np.ndarray) -> None:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def fill(self, address: int, byte: int, size: int) -> None:
        ctypes.memset(address, byte, size)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on the path")
    path = tmp_path_factory.mktemp("kernels") / "kernels_on_host.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    command = [compiler, *flags, "-DEDGEPRUNE_KERNELS_EXPORT", f"-I{FAKE_CUDA}", "-x", "c++"]
    command += [*(str(SOURCES / name) for name in NAMES), "-o", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return path


@pytest.fixture
def runner(library: Path) -> Runner:
    return Runner(HostMemory(), Kernels(library), 0)


@pytest.mark.parametrize("multiprocessors", [1, 8, 132])
def test_the_small_kernel_with_any_number_of_blocks(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, multiprocessors: int
) -> None:
    monkeypatch.setenv("CUDA_ON_HOST_MULTIPROCESSORS", str(multiprocessors))
    for seed in range(40):
        runner.hold(random_case(seed, (1, 40, 196, 256)), offset=seed % 17)


def test_the_large_kernels(runner: Runner) -> None:
    for seed in range(20):
        runner.hold(random_case(seed, (257, 576, 1100)), offset=seed % 17)


@pytest.mark.parametrize("row_bytes", [*ROW_BYTES, 8192])
def test_gathering_and_scattering(runner: Runner, row_bytes: int) -> None:
    rng = np.random.default_rng(row_bytes)
    for offset in (0, 1, 2, 4, 8):
        runner.hold_rows(rng, 70, 40, row_bytes, offset, awkward=offset < 2)
