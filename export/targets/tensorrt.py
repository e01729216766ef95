"""Targets `trt-*`: typed graphs for TensorRT 8.6 to 11.x, which `edgeprune build` makes engines of on the device."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from edgeprune.export.targets import onnx
from edgeprune.export.targets.base import GraphPass, Target

if TYPE_CHECKING:
    from edgeprune.export.emit.dialects.plain import PlainDialect
    from edgeprune.export.lint import Rule

WORDS = {
    "fp32": "float32 throughout, TF32 off",
    "fp16": "float16 with float32 scores and normalisation",
    "bf16": "bfloat16 with float32 scores and normalisation; from TensorRT 10 on",
}


def make_dialect(precision: str) -> PlainDialect:
    """Return the portable dialect: its attention is the pattern TensorRT fuses, its GELU follows the opset."""
    from edgeprune.export.emit.dialects.plain import PlainDialect

    return PlainDialect(precision)


def graph_passes(selection: str, batch: tuple[int, int]) -> tuple[GraphPass, ...]:
    """Return the ordered graph passes; nodes of the plugin stay as they are."""
    from edgeprune.export.passes.drop_dead_nodes import drop_dead_nodes
    from edgeprune.export.passes.expand_cumsum import expand_cumsum
    from edgeprune.export.passes.expand_isnan import expand_isnan
    from edgeprune.export.passes.lower_selection import inline_bodies
    from edgeprune.export.passes.narrow_io import narrow_io

    lowered = () if selection == "plugin" else (inline_bodies,)
    return (*lowered, expand_cumsum, expand_isnan, narrow_io, drop_dead_nodes)


def lint_rules() -> tuple[Rule, ...]:
    """Return the rules of TensorRT's parsers and of engines worth building, and those every static graph must obey."""
    from edgeprune.export.lint.tensorrt import tensorrt_rules

    return tensorrt_rules()


def _target(precision: str) -> Target:
    return Target(
        name=f"trt-{precision}",
        backend="TensorRT",
        precision=precision,
        summary=WORDS[precision],
        opset=17,
        opsets=(17, 18, 19, 20),
        domains=(*onnx.STANDARD_DOMAINS, "edgeprune"),
        packages=onnx.TARGET.packages,
        selections=("auto", "native", "plugin"),
        ir_version=8,
        bodies=False,
        told=True,
        device="tensorrt",
        dialect=partial(make_dialect, precision),
        passes=graph_passes,
        rules=lint_rules,
    )


TARGETS = tuple(_target(precision) for precision in WORDS)
