"""The device's selection code on the host: the same functions, compiled by the host compiler, against the reference."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.pruning.ops import MODE_MASS, MODE_TOP_K, topk_gather
from tests.helpers.kernels import (
    EDGE_SIZES,
    MODES,
    ORDERS,
    SCORE_TYPES,
    SCORES,
    Case,
    gather_params,
    gathered,
    poisoned,
    random_case,
    random_indices,
    random_threshold,
    random_tokens,
    scatter_params,
    scattered,
)
from tests.helpers.scores import awkward_scores

SOURCE = Path(__file__).parents[3] / "plugins" / "tests" / "selection_host.cpp"
FAKE_CUDA = SOURCE.parent / "cuda_on_host"
QUICK = (0, 1)  # loops over the threads of a step, forwards and backwards
FIBERS = (2, 3)  # the device's own block with a fiber per thread, forwards and backwards
SMALL_SIZES = tuple(n for n in EDGE_SIZES if n <= 256)
Check = Callable[[Case], None]


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on the path")
    library = tmp_path_factory.mktemp("selection") / "selection.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{FAKE_CUDA}"]
    command = [compiler, *flags, str(SOURCE), "-o", str(library)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(library))


def address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def widest(row_bytes: int) -> int:
    return next(width for width in (16, 8, 4, 2, 1) if row_bytes % width == 0)


def hold(
    host: ctypes.CDLL,
    case: Case,
    *,
    small: bool,
    threads: int = 512,
    share: int = 5,
    ways: tuple[int, ...] = QUICK,
) -> None:
    """Run a case with the threads in both orders and hold every output against the reference."""
    scores = case.score_bytes()
    for how in ways:
        outputs = case.outputs()
        pointers = [address(array) for array in (scores, case.tokens, *outputs)]
        vector = widest(case.tokens.shape[2])
        host.host_topk_gather(ctypes.byref(case.params()), *pointers, int(small), threads, how, share, vector)
        case.check(*outputs)


@pytest.fixture
def small(host: ctypes.CDLL) -> Check:
    return lambda case: hold(host, case, small=True)


@pytest.fixture
def large(host: ctypes.CDLL) -> Check:
    return lambda case: hold(host, case, small=False, threads=512 if case.scores.shape[1] <= 1024 else 1024)


# ------------------------------------------------------------------------------------------------ keys


def keys_of(host: ctypes.CDLL, scores: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return keys, scores read as float32 and scores restored from their keys."""
    n = scores.numel()
    keys, values, restored = np.empty(n, np.uint32), np.empty(n, np.float32), np.empty(n, np.float32)
    raw = scores.view(torch.uint8).numpy()
    host.host_keys(address(raw), SCORE_TYPES[scores.dtype], n, address(keys), address(values), address(restored))
    return keys, values, restored


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_score_is_read_as_torch_reads_it(host: ctypes.CDLL, dtype: torch.dtype) -> None:
    scores = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16)).view(dtype)
    keys, values, restored = keys_of(host, scores)
    wanted = scores.float().numpy()
    np.testing.assert_array_equal(values, wanted)
    np.testing.assert_array_equal(restored, wanted)
    order = np.argsort(keys, kind="stable")
    missing = int(np.isnan(wanted).sum())
    assert (keys[order[:missing]] == 0).all() and (keys[order[missing:]] > 0).all()
    assert (np.diff(wanted[order[missing:]]) >= 0).all()


@given(st.floats(width=32), st.floats(width=32))
def test_keys_compare_as_scores_do(host: ctypes.CDLL, a: float, b: float) -> None:
    (first, second), _, restored = keys_of(host, torch.tensor([a, b]))
    np.testing.assert_array_equal(restored, np.array([a, b], np.float32))
    if not np.isnan([a, b]).any():
        assert (first > second, first == second) == (a > b, a == b)


# ------------------------------------------------------------------------------------------------ selection


@given(st.data(), st.integers(1, 40), st.sampled_from(ORDERS), st.sampled_from(MODES))
def test_any_scores(host: ctypes.CDLL, data: st.DataObject, n: int, order: int, mode: int) -> None:
    scores = torch.tensor([data.draw(awkward_scores(n))], dtype=data.draw(st.sampled_from(list(SCORE_TYPES))))
    k = data.draw(st.integers(1, n))
    threshold = data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(width=32))
    tokens = random_tokens(np.random.default_rng(n), 1, n + 1, 4)
    case = Case("drawn", scores, tokens, k, order, mode, threshold)
    hold(host, case, small=True)
    hold(host, case, small=False, threads=256)


@pytest.mark.parametrize("family", SCORES)
@pytest.mark.parametrize("n", EDGE_SIZES)
def test_every_kind_of_scores_at_every_edge(small: Check, large: Check, family: str, n: int) -> None:
    rng = np.random.default_rng(n)
    dtypes = list(SCORE_TYPES)
    for i, (order, mode, k) in enumerate((o, m, k) for o in ORDERS for m in MODES for k in {1, (n + 1) // 2, n}):
        values = SCORES[family](rng, n).astype(np.float32)
        scores = torch.from_numpy(values[None]).to(dtypes[i % 3])
        tokens = random_tokens(rng, 1, n + 1, 2)
        case = Case(family, scores, tokens, k, order, mode, random_threshold(rng, mode, scores))
        large(case)
        if n <= 256:
            small(case)


@pytest.mark.parametrize("block", range(8))
def test_random_cases_of_the_small_kernel(small: Check, block: int) -> None:
    for seed in range(150 * block, 150 * (block + 1)):
        small(random_case(seed, SMALL_SIZES))


@pytest.mark.parametrize("block", range(8))
def test_random_cases_of_the_large_kernel(large: Check, block: int) -> None:
    for seed in range(10_000 + 50 * block, 10_000 + 50 * (block + 1)):
        large(random_case(seed))


@pytest.mark.parametrize("threads", [256, 512, 1024])
@pytest.mark.parametrize("share", [1, 7, 10_000])
def test_neither_block_size_nor_share_changes_a_result(host: ctypes.CDLL, threads: int, share: int) -> None:
    for seed in range(12):
        case = random_case(seed, SMALL_SIZES)
        hold(host, case, small=False, threads=threads, share=share)
        hold(host, case, small=True, share=share)


@pytest.mark.parametrize("block", range(4))
def test_the_block_of_the_device_synchronizes_as_it_must(host: ctypes.CDLL, block: int) -> None:
    """Fibers run from barrier to barrier: without one too many, without one wrong values."""
    for seed in range(6 * block, 6 * (block + 1)):
        hold(host, random_case(seed, SMALL_SIZES), small=True, share=50, ways=FIBERS)
        case = random_case(seed, (256, 700, 1300))
        hold(host, case, small=False, threads=512 if case.scores.shape[1] <= 1024 else 1024, share=500, ways=FIBERS)


@pytest.mark.parametrize("mode", [MODE_TOP_K, MODE_MASS])
def test_the_longest_sort_synchronizes_as_it_must(host: ctypes.CDLL, mode: int) -> None:
    """More pairs than threads, and steps that only wait for their warp."""
    rng = np.random.default_rng(mode)
    scores = torch.from_numpy(SCORES["softmax"](rng, 4096).astype(np.float32)[None])
    case = Case("softmax", scores, random_tokens(rng, 1, 4096, 1), 4000, 0, mode, 0.9)
    hold(host, case, small=False, threads=1024, share=5000, ways=FIBERS)


def test_the_mass_is_reached_at_the_last_needed_token(small: Check, large: Check) -> None:
    """Sums of quarters are exact in any order, so the edge itself is tested."""
    scores = torch.tensor([[0.25, 0.5, 0.125, 0.125]])
    for threshold in (0.5, 0.75, np.nextafter(np.float32(0.75), 1), 0.875, 0.999, 1.0):
        case = Case("quarters", scores, random_tokens(np.random.default_rng(0), 1, 4, 1), 2, 0, 2, float(threshold))
        small(case)
        large(case)


def test_sums_of_mass_are_compared_in_float32(small: Check, large: Check) -> None:
    """The first two sum to 0.75 - 2^-26, which is 0.75 in float32: the third is not needed."""
    scores = torch.tensor([[0.5, 0.25 - 2.0**-26, 0.25 - 2.0**-25]])
    case = Case("rounded", scores, random_tokens(np.random.default_rng(0), 1, 3, 1), 2, 0, 2, 0.75)
    assert topk_gather(scores, torch.from_numpy(case.tokens), 2, 0, 0, 2, 0.75)[2].tolist() == [2]
    small(case)
    large(case)


# ------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("row_bytes", [1, 2, 3, 4, 8, 16, 48, 384, 768, 4096, 65536])
@pytest.mark.parametrize("awkward", [False, True])
def test_gathering_and_scattering_copy_bytes(host: ctypes.CDLL, row_bytes: int, awkward: bool) -> None:
    rng = np.random.default_rng(row_bytes)
    for n, k, prefix in ((1, 1, 0), (5, 3, 1), (64, 64, 2), (70, 40, 5)):
        tokens = random_tokens(rng, 2, prefix + n, row_bytes)
        indices = random_indices(rng, 2, n, k, awkward=awkward)
        kept = poisoned((2, prefix + k, row_bytes), np.uint8)
        pointers = [address(array) for array in (tokens, indices, kept)]
        sizes = ctypes.byref(gather_params(tokens, indices, prefix))
        host.host_gather_tokens(sizes, *pointers, int(awkward), 7, widest(row_bytes))
        np.testing.assert_array_equal(kept, gathered(tokens, indices, prefix))

        base, out = random_tokens(rng, 2, n, row_bytes), poisoned((2, n, row_bytes), np.uint8)
        rows = np.ascontiguousarray(kept[:, prefix:])
        pointers = [address(array) for array in (base, rows, indices, out)]
        host.host_scatter_tokens(
            ctypes.byref(scatter_params(base, indices)), *pointers, int(awkward), widest(row_bytes)
        )
        np.testing.assert_array_equal(out, scattered(base, rows, indices))


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("how", [*QUICK, *FIBERS])
def test_every_vector_width_copies_the_same(host: ctypes.CDLL, width: int, how: int) -> None:
    rng = np.random.default_rng(0)
    tokens, indices = random_tokens(rng, 2, 30, 48), random_indices(rng, 2, 29, 20)
    kept = poisoned((2, 21, 48), np.uint8)
    pointers = [address(array) for array in (tokens, indices, kept)]
    host.host_gather_tokens(ctypes.byref(gather_params(tokens, indices, 1)), *pointers, how, 3, width)
    np.testing.assert_array_equal(kept, gathered(tokens, indices, 1))

    base, out = random_tokens(rng, 2, 29, 48), poisoned((2, 29, 48), np.uint8)
    repeated = random_indices(rng, 2, 29, 20, awkward=True)
    pointers = [address(array) for array in (base, tokens, repeated, out)]
    host.host_scatter_tokens(ctypes.byref(scatter_params(base, repeated)), *pointers, how, width)
    np.testing.assert_array_equal(out, scattered(base, tokens.reshape(-1, 48)[:40].reshape(2, 20, 48), repeated))
