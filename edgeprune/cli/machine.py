"""The checks of `edgeprune doctor`: one function each, every finding with what to do about it."""

from __future__ import annotations

import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from edgeprune.errors import EnvironmentLackError

# package, import name, least version, extra that brings it, needed for; the first group is required.
REQUIRED = (
    ("click", "click", "8.1", None, "the command line"),
    ("numpy", "numpy", "1.26", None, "everything"),
    ("pillow", "PIL", "10", None, "reading images"),
    ("pydantic", "pydantic", "2.6", None, "reading bundles"),
    ("rich", "rich", "13", None, "the command line"),
    ("onnxruntime", "onnxruntime", "1.20", "ort", "running and measuring bundles"),
)
OPTIONAL = (
    ("torch", "torch", "2.6", "export", "export, verify and finetune"),
    ("onnx", "onnx", "1.16", "export", "export"),
    ("onnx-graphsurgeon", "onnx_graphsurgeon", "0.5.2", "export", "export"),
    ("onnxscript", "onnxscript", "0.5", "export", "exporting modules of other packages"),
    ("safetensors", "safetensors", "0.4.3", "export", "safetensors checkpoints"),
    ("scikit-learn", "sklearn", "1.3", "train", "the digits task and the demo"),
    ("accelerate", "accelerate", "1.0", "train", "finetune"),
    ("kornia", "kornia", "0.8", "train", "augmentation of images"),
    ("huggingface_hub", "huggingface_hub", "0.23", "hub", "hf-hub: checkpoints"),
)
ON_DEVICE = (
    ("pycuda", "pycuda", "2024.1", "trt", "running TensorRT engines"),
    ("cuda-python", "cuda", "12.2", "trt", "CUDA graphs of TensorRT engines"),
)
OTHER_NAMES = {"onnxruntime": ("onnxruntime-gpu",), "cuda-python": ("cuda-bindings",)}  # distributions that serve too
PROVIDER = "CUDAExecutionProvider"
LEAST_PYTHON = (3, 10)
LOW_DISK_BYTES = 2 << 30  # a ViT-L bundle with room to overwrite it
NO_DISK_BYTES = 100 << 20
MEMINFO = Path("/proc/meminfo")
LOW_MEMORY_BYTES = 7 << 30  # with swap; a rule of thumb: TensorRT's builder may be killed on less
FAST_FLAGS = {"avx2", "avx512f", "asimd"}


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        level: "ok", "note" (good to know), "warn" (a part will not work or be slow) or "fail" (required).
        fix: what to do about it.
    """

    check: str
    level: str
    found: str
    fix: str | None = None


def check_python() -> Iterator[Finding]:
    """Yield the interpreter's version."""
    least = ".".join(map(str, LEAST_PYTHON))
    good = sys.version_info[:2] >= LEAST_PYTHON
    yield Finding(
        "python",
        "ok" if good else "fail",
        platform.python_version(),
        None if good else f"install Python {least} or newer",
    )


def check_packages() -> Iterator[Finding]:
    """Yield one finding per package; a missing one of an extra is a warning."""
    for group, level in ((REQUIRED, "fail"), (OPTIONAL, "warn")):
        for name, module, least, extra, purpose in group:
            fix = f"pip install 'edgeprune[{extra}]'" if extra else f"pip install '{name}>={least}'"
            version = find_version(name)
            if version is None:
                spared = name == "onnxruntime" and _is_there("tensorrt")  # which runs bundles by itself
                yield Finding(name, "warn" if spared else level, f"not installed; needed for {purpose}", fix)
                continue
            if as_numbers(version) < as_numbers(least):
                yield Finding(name, level, f"{version}, older than {least}", f"pip install --upgrade '{name}>={least}'")
                continue
            error = _import_error(module) if name == "onnxruntime" else None
            yield (
                Finding(name, level, f"{version} does not load: {error}", fix)
                if error
                else Finding(name, "ok", version)
            )


def check_cpu() -> Iterator[Finding]:
    """Yield processor, instruction sets and frequency governor."""
    from edgeprune.bench.fingerprint import take_fingerprint

    machine = take_fingerprint()
    yield Finding("processor", "ok", f"{machine.cpu_model}, {machine.usable_cores} of {machine.logical_cores} cores")
    flags = machine.cpu_flags
    slow = None if FAST_FLAGS & set(flags) or not flags else "expect slow inference; use a newer processor"
    yield Finding("instruction sets", "warn" if slow else "ok", " ".join(flags) or "unknown", slow)
    if machine.governor is not None:
        wavering = machine.governor not in ("performance", "schedutil")
        fix = "for benchmarks: cpupower frequency-set -g performance" if wavering else None
        yield Finding("frequency governor", "note" if wavering else "ok", machine.governor, fix)


def check_disk() -> Iterator[Finding]:
    """Yield free space where bundles go and where temporary files go."""
    for name, path in (("disk here", Path.cwd()), ("disk for temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(path).free
        level = "fail" if free < NO_DISK_BYTES else "warn" if free < LOW_DISK_BYTES else "ok"
        fix = None if level == "ok" else "free some space; large models need up to 2 GiB"
        yield Finding(name, level, f"{free / 2**30:.1f} GiB free", fix)


def check_temporary_directory() -> Iterator[Finding]:
    """Yield whether temporary files can be written."""
    try:
        with tempfile.NamedTemporaryFile(prefix="edgeprune-") as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        yield Finding("temporary directory", "fail", f"not writable: {error}", "set TMPDIR to a writable directory")
    else:
        yield Finding("temporary directory", "ok", tempfile.gettempdir())


def check_gpu() -> Iterator[Finding]:
    """Yield the GPU as its driver describes it; only the targets of a GPU need one."""
    from edgeprune.runtime.cuda import find_device

    try:
        device = find_device()
    except EnvironmentLackError as error:
        there = Path("/dev/nvidia0").exists() or Path("/etc/nv_tegra_release").exists()
        found = f"{error.message}; the CPU targets do not need one"
        yield Finding("gpu", "warn" if there else "note", found, f"for the targets of a GPU: {error.hint}")
        return
    major, minor = device.compute_capability
    memory = f"{device.total_bytes / 2**30:.1f} GiB"
    driver = f"driver for CUDA {device.driver or 'of unknown version'}"
    yield Finding("gpu", "ok", f"{device.name}, compute capability {major}.{minor}, {memory}, {driver}")


def check_cuda_packages() -> Iterator[Finding]:
    """Yield what the targets of a GPU need beside it; a missing one is a note."""
    for name, _, least, extra, purpose in ON_DEVICE:
        version = find_version(name)
        fix = f"pip install 'edgeprune[{extra}]'"
        if version is None:
            yield Finding(name, "note", f"not installed; needed for {purpose}", fix)
        elif as_numbers(version) < as_numbers(least):
            yield Finding(name, "warn", f"{version}, older than {least}", f"pip install --upgrade '{name}>={least}'")
        else:
            yield Finding(name, "ok", version)
    if _import_error("onnxruntime") is not None:
        return
    providers = import_module("onnxruntime").get_available_providers()
    if PROVIDER in providers:
        yield Finding("onnxruntime on a GPU", "ok", PROVIDER)
        return
    fix = "pip uninstall onnxruntime, then pip install 'edgeprune[cuda]'; on a Jetson NVIDIA's own wheel"
    yield Finding("onnxruntime on a GPU", "note", f"no {PROVIDER}; needed for the target ort-cuda-fp16", fix)


def check_tensorrt() -> Iterator[Finding]:
    """Yield TensorRT's version and the plugin library for it; no library is opened."""
    from edgeprune.plugins.contract import build_command, library_for
    from edgeprune.plugins.loader import import_tensorrt
    from edgeprune.plugins.locate import chosen, find_candidates

    version = find_version("tensorrt")
    if version is None and not _is_there("tensorrt"):
        fix = "pip install tensorrt; on a Jetson it comes with JetPack: apt install python3-libnvinfer"
        yield Finding("tensorrt", "note", "not installed: the CPU targets do not need it", fix)
        return
    try:
        version = version or str(getattr(import_tensorrt(), "__version__", ""))
        library = library_for(version)
    except EnvironmentLackError as error:
        yield Finding("tensorrt", "warn", error.message, error.hint)
        return
    yield Finding("tensorrt", "ok", version)
    found = chosen(find_candidates(library))
    if found is None:
        yield Finding("tensorrt plugin", "note", f"no {library.file}", build_command())
    else:
        yield Finding("tensorrt plugin", "ok", str(found.path))


def check_jetson() -> Iterator[Finding]:
    """Yield what a Jetson is set to; nothing on other machines."""
    from edgeprune.runtime.jetson import read_jetson

    jetson = read_jetson()
    if jetson is None:
        return
    comes = f", JetPack {jetson.jetpack} with TensorRT {jetson.tensorrt}" if jetson.jetpack else ""
    yield Finding("jetson linux", "ok", f"{jetson.linux}{comes}")
    if jetson.mode is None:
        mount = "sudo nvpmodel -q; in a container mount /etc/nvpmodel.conf and /var/lib/nvpmodel"
        yield Finding("power mode", "note", "unknown: /var/lib/nvpmodel/status does not say", mount)
    else:
        fastest, found = jetson.fastest, f"{jetson.mode.number} {jetson.mode.name}"
        if fastest is None or fastest == jetson.mode:
            yield Finding("power mode", "ok", found)
        else:
            faster = f"for full speed: sudo nvpmodel -m {fastest.number} ({fastest.name})"
            yield Finding("power mode", "note", found, faster)
    if jetson.held is True:
        yield Finding("clocks", "ok", "held at one frequency")
    elif jetson.held is False:
        yield Finding("clocks", "note", "follow the load", "for benchmarks: sudo jetson_clocks")


def check_memory() -> Iterator[Finding]:
    """Yield memory and swap; building engines needs more than running them."""
    sizes = {name: int(kib) << 10 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", _read(MEMINFO), re.MULTILINE)}
    if "MemTotal" not in sizes:
        return
    memory, swap = sizes["MemTotal"], sizes.get("SwapTotal", 0)
    words = f"{memory / 2**30:.1f} GiB, {swap / 2**30:.1f} GiB of swap"
    small = memory + swap < LOW_MEMORY_BYTES
    fix = "to build engines or export large models, add a swap file on a fast disk: fallocate, mkswap, swapon"
    yield Finding("memory", "warn" if small else "ok", words, fix if small else None)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_packages,
    check_cpu,
    check_disk,
    check_temporary_directory,
    check_memory,
    check_jetson,
    check_gpu,
    check_cuda_packages,
    check_tensorrt,
)


def find_version(package: str) -> str | None:
    """Return the version of an installed distribution, or of another that brings the same package."""
    for name in (package, *OTHER_NAMES.get(package, ())):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def as_numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: "2.13.0+cpu" gives (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _is_there(module: str) -> bool:
    """Tell whether a module can be found, without importing it."""
    return module in sys.modules or find_spec(module) is not None


def _import_error(module: str) -> str | None:
    try:
        import_module(module)
    except Exception as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None
