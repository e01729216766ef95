"""The kernel library through ctypes: building it for one architecture, its C structures, its calls."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "plugins" / "kernels"
NAMES = ("arguments.cpp", "gather_tokens.cu", "scatter_tokens.cu", "topk_gather.cu")
VERSION = 1
Pointer = int


class KernelError(RuntimeError):
    """A call of the library failed, or the library cannot be had."""


def _structure(name: str, integers: str, others: tuple[tuple[str, type], ...] = ()) -> type[ctypes.Structure]:
    fields = [*((field, ctypes.c_int64) for field in integers.split()), *others]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


TopkGatherParams = _structure(
    "TopkGatherParams",
    "batch tokens kept prefix row_bytes",
    (("score_type", ctypes.c_int), ("order", ctypes.c_int), ("mode", ctypes.c_int), ("threshold", ctypes.c_float)),
)
GatherTokensParams = _structure("GatherTokensParams", "batch tokens kept prefix row_bytes")
ScatterTokensParams = _structure("ScatterTokensParams", "batch tokens kept row_bytes")


def find_nvcc() -> str | None:
    """Return the CUDA compiler: on the path, or where the toolkit installs itself."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


def build_library(directory: Path, architecture: str) -> Path:
    """Return libedgeprune_kernels.so, built from this checkout for one architecture such as sm_87.

    Raises:
        KernelError: there is no nvcc, or it fails.
    """
    library = directory / "libedgeprune_kernels.so"
    compile_sources(
        ["-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL", "-o", str(library)], architecture
    )
    return library


def compile_sources(options: list[str], architecture: str, names: Sequence[str] = NAMES) -> str:
    """Compile sources of the library with all warnings as errors and return what the compiler says.

    Raises:
        KernelError: there is no nvcc, or it fails.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise KernelError("nvcc is not on the path and not in CUDA_HOME: install the CUDA toolkit")
    command = [nvcc, "-O3", "-std=c++17", f"-arch={architecture}", "-DEDGEPRUNE_KERNELS_EXPORT"]
    command += ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror,-fPIC,-fvisibility=hidden"]
    command += [*options, *(str(SOURCES / name) for name in names)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise KernelError(f"nvcc failed:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


class Kernels:
    """The calls of a built library. Pointers are device addresses; the work is enqueued on the stream.

    Each raises `KernelError` with the library's reason.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.edgeprune_kernels_error.restype = ctypes.c_char_p
        if self._library.edgeprune_kernels_version() != VERSION:
            raise KernelError(f"{path.name} is not version {VERSION}")

    def topk_gather(self, params: ctypes.Structure, *pointers: Pointer, stream: Pointer = 0) -> None:
        """Scores, tokens, kept, indices, count."""
        self._call("edgeprune_topk_gather", params, pointers, stream)

    def gather_tokens(self, params: ctypes.Structure, *pointers: Pointer, stream: Pointer = 0) -> None:
        """Tokens, indices, kept."""
        self._call("edgeprune_gather_tokens", params, pointers, stream)

    def scatter_tokens(self, params: ctypes.Structure, *pointers: Pointer, stream: Pointer = 0) -> None:
        """Base, tokens, indices, out."""
        self._call("edgeprune_scatter_tokens", params, pointers, stream)

    def _call(self, name: str, params: ctypes.Structure, pointers: tuple[Pointer, ...], stream: Pointer) -> None:
        arguments = [ctypes.c_void_p(pointer) for pointer in (*pointers, stream)]
        code = getattr(self._library, name)(ctypes.byref(params), *arguments)
        if code:
            raise KernelError(f"{name} returned {code}: {self._library.edgeprune_kernels_error().decode()}")
