"""The targets by name: the table behind `edgeprune targets`. A new target is a file and a line here."""

from __future__ import annotations

import difflib

from edgeprune.errors import EnvironmentLackError, InputError
from edgeprune.export.targets import onnx, ort_cpu, ort_cpu_int8, ort_cuda, tensorrt
from edgeprune.export.targets.base import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        onnx.TARGET,
        ort_cpu.TARGET,
        ort_cpu_int8.TARGET,
        ort_cuda.TARGET,
        *tensorrt.TARGETS,
    )
}


def get_target(name: str) -> Target:
    """Return a target that can be used here.

    Raises:
        InputError: `target-unknown` for a name that is not listed.
        EnvironmentLackError: `target-unavailable` with the reason.
    """
    if name not in TARGETS:
        close = difflib.get_close_matches(name, TARGETS, n=2, cutoff=0.4)
        raise InputError(
            f"unknown target '{name}'",
            code="target-unknown",
            expected=f"one of {', '.join(TARGETS)}",
            hint=f"did you mean {' or '.join(close)}?" if close else "run `edgeprune targets`",
        )
    target = TARGETS[name]
    reason = target.why_unavailable()
    if reason:
        raise EnvironmentLackError(
            f"target '{name}' is not available here: {reason}",
            code="target-unavailable",
            expected=f"one of {', '.join(t.name for t in TARGETS.values() if t.why_unavailable() is None) or 'none'}",
            hint="run `edgeprune targets`",
        )
    return target
