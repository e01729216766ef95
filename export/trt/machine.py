"""What this machine builds for: its GPU, its TensorRT, its plugin library, asked in the order that is safe."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgeprune.errors import EnvironmentLackError, InputError
from edgeprune.export.trt.plan import Role
from edgeprune.plugins.loader import import_tensorrt, load_plugins
from edgeprune.runtime.bundle import hash_file
from edgeprune.runtime.cuda import find_device
from edgeprune.runtime.manifest import Manifest

PREFIX = "trt-"
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
LEAST_CAPABILITY = {"fp8": (8, 9)}  # Ada; products of fp8 have no kernels on older devices


@dataclass(frozen=True)
class Machine:
    """What engines depend on here.

    Attributes:
        device: name of the GPU.
        compute_capability: "8.7".
        driver: version of the GPU's driver, None when it does not say.
        tensorrt: version of the Python package.
        plugin: the library's file, None when no engine needs it or others have registered it.
        plugin_sha256: of that file.
        registers_itself: the library is opened, not handed to TensorRT.
    """

    device: str
    compute_capability: str
    driver: str | None
    tensorrt: str
    plugin: Path | None = None
    plugin_sha256: str | None = None
    registers_itself: bool = False


def check_target(manifest: Manifest) -> None:
    """Raise InputError `target` for a bundle that is not for TensorRT."""
    if manifest.target not in [f"{PREFIX}{precision}" for precision in PRECISIONS]:
        raise InputError(
            f"this bundle is for the target '{manifest.target}', of which no engines are built",
            code="target",
            expected=f"a bundle for one of {', '.join(PREFIX + precision for precision in PRECISIONS)}",
            hint="run it as it is with `edgeprune run`, or export again with --target trt-fp16",
            details={"target": manifest.target},
        )


def find_machine() -> Machine:
    """Return the machine, its plugin aside. CUDA is asked before TensorRT is imported.

    Raises:
        EnvironmentLackError: `gpu-missing`, `tensorrt-missing`.
    """
    device = find_device()
    version = str(getattr(import_tensorrt(), "__version__", ""))
    capability = ".".join(map(str, device.compute_capability))
    return Machine(device.name, capability, device.driver, version)


def check_version(manifest: Manifest, tensorrt: str) -> None:
    """Raise EnvironmentLackError `tensorrt-version` when the export found that a version does not take the graphs."""
    reasons = reasons_against(manifest.tensorrt or {}, tensorrt)
    if not reasons:
        return
    good = [version for version, against in (manifest.tensorrt or {}).items() if not against]
    raise EnvironmentLackError(
        f"TensorRT {tensorrt} does not take this bundle: {'; '.join(reasons)}",
        code="tensorrt-version",
        expected=f"TensorRT {' or '.join(good)} or what is like it" if good else "graphs that some TensorRT takes",
        hint="export for another precision or --selection, or upgrade TensorRT (on a Jetson with its JetPack)",
        details={"tensorrt": tensorrt, "reasons": reasons, "versions": good},
    )


def check_capability(manifest: Manifest, capability: str) -> None:
    """Raise EnvironmentLackError `gpu-too-old` when a GPU has no kernels of the bundle's precision."""
    least = LEAST_CAPABILITY.get(manifest.target.removeprefix(PREFIX), (0, 0))
    if _numbers(capability) >= least:
        return
    wanted = ".".join(map(str, least))
    raise EnvironmentLackError(
        f"this GPU has compute capability {capability}, and {manifest.target} needs {wanted}",
        code="gpu-too-old",
        expected=f"a GPU of compute capability {wanted} or more",
        hint="export for trt-int8 or trt-fp16",
        details={"capability": capability, "least": wanted},
    )


def reasons_against(reasons: Mapping[str, Sequence[str]], tensorrt: str) -> list[str]:
    """Return why a version does not take the graphs: what holds for the newest version listed that is not newer."""
    found = _numbers(tensorrt)
    older = [version for version in reasons if _numbers(version) <= found[: len(_numbers(version))]]
    if reasons and not older:
        return [f"it is older than {min(reasons, key=_numbers)}, the oldest version the export looked at"]
    return list(reasons[max(older, key=_numbers)]) if older else []


def with_plugin(machine: Machine, roles: Sequence[Role]) -> tuple[Machine, tuple[Role, ...], list[str]]:
    """Return the machine with its plugin where engines need it, the roles that can be built, and warnings.

    Without a plugin a graph that has a native form too is built in that form alone.

    Raises:
        EnvironmentLackError: `plugin-missing`, `plugin-abi` or `plugin-refused` when a graph has no other form.
    """
    if not any(plan.plugin for role in roles for plan in role.plans()):
        return machine, tuple(roles), []
    try:
        loaded = load_plugins()
    except EnvironmentLackError as error:
        native = tuple(role.without(lambda plan: plan.plugin) for role in roles)
        if not all(role.ways for role in native):
            raise
        return machine, native, [f"only the native form is built, since {error.message}; {error.hint}"]
    sha256 = None if loaded.path is None else hash_file(loaded.path).sha256
    by_itself = loaded.way == "self-registration"
    machine = replace(machine, plugin=loaded.path, plugin_sha256=sha256, registers_itself=by_itself)
    return machine, tuple(roles), []


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))
