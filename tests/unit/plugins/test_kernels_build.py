"""The kernel library as it is built: warnings, registers, shared memory, symbols, refusals. No device takes part."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks._kernels import (
    NAMES,
    SOURCES,
    GatherTokensParams,
    KernelError,
    Kernels,
    ScatterTokensParams,
    TopkGatherParams,
    build_library,
    compile_sources,
    find_nvcc,
)
from tests.helpers.device_kernels import missing_device

ARCHITECTURE = "sm_87"
SHARED_MEMORY = 48 * 1024  # what a kernel may use without asking the driver
ADDRESS = 1 << 20  # never read: every call below is refused
TOPK = {"batch": 2, "tokens": 196, "kept": 98, "prefix": 1, "row_bytes": 768}
TOPK |= {"score_type": 0, "order": 0, "mode": 0, "threshold": 0.0}
GATHER = {"batch": 2, "tokens": 196, "kept": 98, "prefix": 1, "row_bytes": 768}
SCATTER = {"batch": 2, "tokens": 196, "kept": 98, "row_bytes": 768}


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_nvcc() is None:
        pytest.skip("no nvcc on the path or in CUDA_HOME")
    return build_library(tmp_path_factory.mktemp("kernels"), ARCHITECTURE)


@pytest.fixture(scope="session")
def kernels(library: Path) -> Kernels:
    return Kernels(library)


@pytest.fixture(scope="session")
def resources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Return spilled bytes, registers and bytes of shared memory by mangled kernel name."""
    if find_nvcc() is None:
        pytest.skip("no nvcc on the path or in CUDA_HOME")
    image = tmp_path_factory.mktemp("resources") / "kernels.fatbin"
    report = ""
    for name in ("gather_tokens.cu", "scatter_tokens.cu", "topk_gather.cu"):
        report += compile_sources(["-fatbin", "-Xptxas", "-v", "-o", str(image)], ARCHITECTURE, (name,))
    found = {}
    for part in report.split("Compiling entry function '")[1:]:
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        assert spills and used, part
        found[part.split("'")[0]] = {
            "spilled": sum(int(value) for value in spills.groups()),
            "registers": int(used[1]),
            "shared": int(shared[1]) if shared else 0,
        }
    return found


def test_kernels_do_not_spill_and_need_no_opt_in(resources: dict[str, dict[str, int]]) -> None:
    assert len(resources) == 16  # three kernels for five widths, and topk_select
    for name, used in resources.items():
        assert used["spilled"] == 0, name
        assert used["shared"] <= SHARED_MEMORY, name
        assert used["registers"] * (1024 if "topk_select" in name else 256) <= 65536, name


@pytest.mark.slow
def test_every_architecture_compiles(tmp_path: Path) -> None:
    if find_nvcc() is None:
        pytest.skip("no nvcc on the path or in CUDA_HOME")
    assert build_library(tmp_path, "all").stat().st_size > 0


def test_only_the_c_interface_is_exported(library: Path) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm on the path")
    command = [nm, "-D", "--defined-only", str(library)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert sorted(line.split()[-1] for line in symbols.splitlines()) == [
        *("edgeprune_gather_tokens", "edgeprune_kernels_error", "edgeprune_kernels_version"),
        *("edgeprune_scatter_tokens", "edgeprune_topk_gather"),
    ]


def test_the_header_is_plain_c_and_as_ctypes_has_it(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler on the path")
    structures = {"topk_gather": TopkGatherParams, "gather_tokens": GatherTokensParams}
    structures |= {"scatter_tokens": ScatterTokensParams}
    functions = "".join(
        f"unsigned long size_{name}(void) {{ return sizeof(edgeprune_{name}_params); }}\n" for name in structures
    )
    source, sizes = tmp_path / "sizes.c", tmp_path / "sizes.so"
    source.write_text(f'#include "edgeprune_kernels.h"\n{functions}')
    flags = ["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", "-Wno-missing-prototypes", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, f"-I{SOURCES}", str(source), "-o", str(sizes)], check=True)
    loaded = ctypes.CDLL(str(sizes))
    for name, structure in structures.items():
        assert getattr(loaded, f"size_{name}")() == ctypes.sizeof(structure)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"batch": 0}, "batch is 0, not within 1..1024"),
        ({"batch": 1025}, "batch is 1025, not within 1..1024"),
        ({"tokens": 4097}, "tokens is 4097, not within 1..4096"),
        ({"kept": 197}, "kept is 197, not within 1..196"),
        ({"kept": 0}, "kept is 0, not within 1..196"),
        ({"prefix": -1}, "prefix is -1, not within 0..4096"),
        ({"row_bytes": 0}, "row_bytes is 0, not within 1..65536"),
        ({"row_bytes": 1 << 40}, "row_bytes is 1099511627776, not within 1..65536"),
        ({"score_type": 3}, "score_type is 3, not within 0..2"),
        ({"order": 2}, "order is 2, not within 0..1"),
        ({"mode": -1}, "mode is -1, not within 0..2"),
    ],
)
def test_sizes_out_of_range_are_refused(kernels: Kernels, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(KernelError, match=re.escape(f"edgeprune_topk_gather returned 1: {reason}")):
        kernels.topk_gather(TopkGatherParams(**{**TOPK, **change}), *[ADDRESS] * 5)
    for sizes, structure, call, pointers in (
        (GATHER, GatherTokensParams, kernels.gather_tokens, 3),
        (SCATTER, ScatterTokensParams, kernels.scatter_tokens, 4),
    ):
        if change.keys() <= sizes.keys() and "kept" not in change:
            with pytest.raises(KernelError, match=re.escape(f"returned 1: {reason}")):
                call(structure(**{**sizes, **change}), *[ADDRESS] * pointers)


@pytest.mark.parametrize("which", range(5))
def test_null_pointers_are_refused(kernels: Kernels, which: int) -> None:
    name = ("scores", "tokens", "kept", "indices", "count")[which]
    pointers = [0 if i == which else ADDRESS for i in range(5)]
    with pytest.raises(KernelError, match=f"{name} is null"):
        kernels.topk_gather(TopkGatherParams(**TOPK), *pointers)


def test_unaligned_scores_are_refused(kernels: Kernels) -> None:
    with pytest.raises(KernelError, match="scores is not aligned to 4 bytes"):
        kernels.topk_gather(TopkGatherParams(**TOPK), ADDRESS + 2, *[ADDRESS] * 4)


def test_a_machine_without_a_device_gets_a_reason(kernels: Kernels) -> None:
    if missing_device() is None:
        pytest.skip("this machine has a device")
    for tokens in (196, 576):
        with pytest.raises(KernelError, match=r"edgeprune_topk_gather returned 2: .*(driver|device)"):
            kernels.topk_gather(TopkGatherParams(**{**TOPK, "tokens": tokens}), *[ADDRESS] * 5)


def test_the_sources_compiled_here_are_those_of_cmake() -> None:
    listed = set(re.findall(r"\w+\.(?:cu|cpp)\b", (SOURCES / "CMakeLists.txt").read_text()))
    assert listed == set(NAMES) == {path.name for path in SOURCES.iterdir() if path.suffix in {".cu", ".cpp"}}
