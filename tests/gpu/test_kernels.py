"""The CUDA kernels on a device, byte for byte against the torch reference."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks._cuda import Device
from benchmarks._kernels import Kernels, build_library, find_nvcc
from tests.helpers.device_kernels import Runner, missing_device
from tests.helpers.kernels import EDGE_SIZES, MODES, ORDERS, SCORE_TYPES, SCORES, Case, random_case, random_tokens

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
SMALL_SIZES = tuple(n for n in EDGE_SIZES if n <= 256)


@pytest.fixture(scope="module")
def device() -> Device:
    reason = missing_device()
    if reason is not None:
        pytest.skip(reason)
    return Device()


@pytest.fixture(scope="module")
def library(device: Device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_nvcc() is None:
        pytest.skip("no nvcc on the path or in CUDA_HOME")
    return build_library(tmp_path_factory.mktemp("kernels"), device.architecture)


@pytest.fixture(scope="module")
def runner(device: Device, library: Path) -> Iterator[Runner]:
    with device.stream() as stream:
        yield Runner(device, Kernels(library), stream)


@pytest.mark.parametrize("block", range(10))
def test_random_cases_of_the_small_kernel(runner: Runner, block: int) -> None:
    for seed in range(200 * block, 200 * (block + 1)):
        runner.hold(random_case(seed, SMALL_SIZES), offset=seed % 17)


@pytest.mark.parametrize("block", range(10))
def test_random_cases_of_both_paths(runner: Runner, block: int) -> None:
    for seed in range(10_000 + 100 * block, 10_000 + 100 * (block + 1)):
        runner.hold(random_case(seed), offset=seed % 17)


@pytest.mark.parametrize("family", SCORES)
@pytest.mark.parametrize("n", EDGE_SIZES)
def test_every_kind_of_scores_at_every_edge(runner: Runner, family: str, n: int) -> None:
    rng = np.random.default_rng(n)
    scores = torch.from_numpy(SCORES[family](rng, n).astype(np.float32)[None])
    for dtype in SCORE_TYPES:
        for order in ORDERS:
            for mode in MODES:
                for k in {1, (n + 1) // 2, n}:
                    runner.hold(Case(family, scores.to(dtype), random_tokens(rng, 1, n + 1, 8), k, order, mode, 0.5))


@pytest.mark.parametrize("n", [196, 300])
def test_the_largest_batch(runner: Runner, n: int) -> None:
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.integers(0, 50, (1024, n)).astype(np.float32))
    runner.hold(Case("few values", scores, random_tokens(rng, 1024, n + 1, 48), n // 2, 1))


@pytest.mark.parametrize("row_bytes", [1, 2, 4, 6, 8, 16, 48, 768, 4096, 65536])
def test_gathering_and_scattering_copy_bytes(runner: Runner, row_bytes: int) -> None:
    rng = np.random.default_rng(row_bytes)
    for n, k in ((1, 1), (33, 32), (196, 98), (300, 300)):
        for offset in (0, 1, 2, 4, 8):
            runner.hold_rows(rng, n, k, row_bytes, offset, awkward=offset in (0, 1))


def test_the_default_stream_serves(device: Device, library: Path) -> None:
    runner = Runner(device, Kernels(library), 0)
    for seed in range(50):
        runner.hold(random_case(seed))


@pytest.mark.parametrize(("n", "launches"), [(1, 1), (196, 1), (256, 1), (257, 2), (4096, 2)])
def test_small_selections_are_one_launch(runner: Runner, n: int, launches: int) -> None:
    case = normal_case(0, n)
    with runner.buffers(case) as pointers:

        def enqueue() -> None:
            runner.kernels.topk_gather(case.params(), *pointers, stream=runner.stream)

        with runner.device.graph(runner.stream, enqueue) as graph:
            assert graph.nodes == launches


@pytest.mark.parametrize("n", [196, 576, 4096])
def test_a_captured_graph_computes_anew_at_every_replay(runner: Runner, n: int) -> None:
    first = normal_case(0, n)
    with runner.buffers(first) as pointers:

        def enqueue() -> None:
            runner.kernels.topk_gather(first.params(), *pointers, stream=runner.stream)

        with runner.device.graph(runner.stream, enqueue) as graph:
            for seed in range(20):
                case = normal_case(seed, n)
                runner.device.upload(pointers[0], case.score_bytes())
                runner.device.upload(pointers[1], case.tokens)
                graph.launch()
                runner.check(case, pointers)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_the_sanitizer_finds_nothing(library: Path, tool: str) -> None:
    beside_nvcc = str(Path(find_nvcc() or "").parent)
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=beside_nvcc)
    if sanitizer is None:
        pytest.skip("no compute-sanitizer on the path or beside nvcc")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "tests.helpers.device_kernels"]
    result = subprocess.run([*command, str(library)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def normal_case(seed: int, n: int) -> Case:
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.standard_normal((3, n)).astype(np.float32))
    return Case("normal", scores, random_tokens(rng, 3, n + 1, 64), (n + 1) // 2, 0, 1, 0.5)
