"""The checks of `edgeprune doctor BUNDLE`: whether this machine runs a bundle, and what each of its engines is for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from edgeprune.cli.machine import Finding, as_numbers, find_version
from edgeprune.errors import EnvironmentLackError
from edgeprune.plugins.contract import build_command as plugin_command
from edgeprune.plugins.contract import library_for
from edgeprune.plugins.loader import import_tensorrt
from edgeprune.plugins.locate import chosen, find_candidates
from edgeprune.quantization.scheme import DOT_PRODUCT_BITS
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.cuda import Device, find_device
from edgeprune.runtime.engines import (
    EngineIndex,
    EngineInfo,
    build_command,
    check_source,
    engine_folders,
    folder_name,
    read_index,
)
from edgeprune.runtime.kernels import float_layers, integer_layers, read_profile
from edgeprune.runtime.manifest import QuantizationInfo
from edgeprune.runtime.opener import ENGINE_TARGETS
from edgeprune.runtime.ort import OrtBackend
from edgeprune.runtime.ort_cuda import PROVIDER
from edgeprune.runtime.session import Session


def check_bundle(bundle: Bundle) -> Iterator[Finding]:
    """Yield what a bundle is and whether it runs here; of one for TensorRT each version and engine.

    The bundle was loaded, so its files are as its manifest lists them.
    """
    m = bundle.manifest
    yield Finding("bundle", "ok", f"{m.model.name}, {m.method.name}, for {m.target}; {len(m.files)} files unchanged")
    if m.target not in ENGINE_TARGETS:
        here = _runs_in_onnxruntime(m.target)
        yield here
        if here.level == "ok" and m.quantization is not None:
            yield from _integers(bundle, m.quantization)
        return
    device, version = _device(), _tensorrt()
    yield from _versions(bundle, version)
    yield from _engines(bundle, device, version)


def _runs_in_onnxruntime(target: str) -> Finding:
    try:
        providers = import_module("onnxruntime").get_available_providers()
    except ImportError:
        return Finding("runs here", "fail", "onnxruntime is not installed", "pip install 'edgeprune[ort]'")
    wanted = PROVIDER if target == "ort-cuda-fp16" else "CPUExecutionProvider"
    if wanted in providers:
        return Finding("runs here", "ok", f"onnxruntime with {wanted}")
    fix = "pip uninstall onnxruntime, then pip install 'edgeprune[cuda]'; on a Jetson NVIDIA's own wheel"
    return Finding("runs here", "fail", f"onnxruntime has no {wanted}", fix)


def _integers(bundle: Bundle, info: QuantizationInfo) -> Iterator[Finding]:
    """Yield whether the quantized layers of a bundle run on integers here, and without overflow."""
    with TemporaryDirectory(prefix="edgeprune-profile-") as folder:
        opened = partial(OrtBackend, profile=Path(folder) / "profile")
        session = Session(bundle, threads=1, spinning=False, check_hashes=False, open_graph=opened)
        session.warmup()
        nodes = [node for path in session.end_profiling().values() for node in read_profile(path)]
    found, seen = sorted(set(float_layers(nodes, info.kept_float))), len(integer_layers(nodes))
    fix = "use a bundle for ort-cpu, and report the version of onnxruntime"
    if found:
        yield Finding("integer kernels", "fail", f"{len(found)} quantized layers run on floats: {found[0]}", fix)
    elif seen < info.layers:
        yield Finding("integer kernels", "fail", f"only {seen} of {info.layers} quantized layers were seen to run", fix)
    else:
        yield Finding("integer kernels", "ok", f"all {info.layers} quantized layers run on integers")
    if info.weight_bits == DOT_PRODUCT_BITS and find_spec("onnx") is not None:
        from edgeprune.export.saturation import saturates

        if saturates():
            fix = "export without --weight-bits, for weights of 7 bits"
            yield Finding("8-bit weights", "fail", "sums overflow on this processor: results are wrong", fix)
        else:
            yield Finding("8-bit weights", "ok", "this processor adds their products exactly")


def _device() -> Device | None:
    try:
        return find_device()
    except EnvironmentLackError:
        return None


def _tensorrt() -> str | None:
    """Return the version of TensorRT's Python package, None without."""
    version = find_version("tensorrt")
    if version is not None:
        return version
    try:
        return str(import_tensorrt().__version__)
    except EnvironmentLackError:
        return None


def _versions(bundle: Bundle, version: str | None) -> Iterator[Finding]:
    """Yield for each version of TensorRT what stops it from taking the graphs; the one that is here counts."""
    why_not = bundle.manifest.tensorrt or {}
    here = None
    if version is not None:
        known = [name for name in why_not if as_numbers(name) <= as_numbers(version)]
        here = max(known, key=as_numbers, default=None)
    for name, reasons in why_not.items():
        check, mine = f"graphs in TensorRT {name}", name == here
        if not reasons:
            yield Finding(check, "ok", "takes them" + (", and is what is installed" if mine else ""))
        else:
            fix = "export for this TensorRT, or install another" if mine else None
            yield Finding(check, "fail" if mine else "note", f"refuses them: {'; '.join(reasons)}", fix)


def _engines(bundle: Bundle, device: Device | None, version: str | None) -> Iterator[Finding]:
    """Yield for each folder of engines whether it fits here, and for each engine in it what is wrong."""
    fits = False
    for folder in engine_folders(bundle):
        name = f"engines {folder.name}"
        try:
            index = read_index(bundle, folder)
        except EnvironmentLackError as error:
            yield Finding(name, "warn", error.message, error.hint)
            continue
        other = _why_other(index, device, version)
        stale = [why for info in index.engines if (why := _why_stale(bundle, folder, info)) is not None]
        if stale:
            yield Finding(name, "warn", "; ".join(stale), f"on that device: {build_command(bundle)}")
        elif other is not None:
            yield Finding(name, "note", other)
        else:
            fits = True
            yield Finding(name, "ok", f"{len(index.engines)} engines fit this device and TensorRT")
            yield from _plugin(index)
    if fits:
        return
    if device is None or version is None:
        lacks = " and ".join(what for what, there in (("GPU", device), ("TensorRT", version)) if there is None)
        yield Finding(
            "runs here", "note", f"no {lacks} here", f"copy it to its device, and there: {build_command(bundle)}"
        )
    else:
        wanted = folder_name(device.name, version)
        yield Finding("runs here", "fail", f"no engines for {wanted}", build_command(bundle))


def _why_other(index: EngineIndex, device: Device | None, version: str | None) -> str | None:
    """Return why engines are not for this machine, None when they are."""
    built = f"built for {index.device} ({index.compute_capability}) with TensorRT {index.tensorrt}"
    if device is None or version is None:
        return built
    capability = ".".join(map(str, device.compute_capability))
    if (index.device, index.compute_capability) != (device.name, capability):
        return f"{built}; this is {device.name} ({capability})"
    return None if index.tensorrt == version else f"{built}; here is {version}"


def _why_stale(bundle: Bundle, folder: Path, info: EngineInfo) -> str | None:
    """Return why an engine is not of this bundle, or not whole, None when it is."""
    try:
        check_source(bundle, info)
    except EnvironmentLackError as error:
        return error.message
    file = folder / info.file
    if not file.is_file():
        return f"{info.file} is missing"
    size = file.stat().st_size
    return None if size == info.bytes else f"{info.file} has {size} bytes instead of {info.bytes}"


def _plugin(index: EngineIndex) -> Iterator[Finding]:
    if any(info.plugin for info in index.engines):
        library = library_for(index.tensorrt)
        if chosen(find_candidates(library)) is None:
            yield Finding("plugin of the engines", "fail", f"no {library.file}", plugin_command())
