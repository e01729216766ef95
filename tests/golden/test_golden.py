"""The lowered graph of a tiny ViT as text. `pytest --update-golden` rewrites it; read the difference first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import onnx
import pytest
from onnx import helper, numpy_helper

from edgeprune.export.targets.registry import TARGETS as TARGETS_BY_NAME
from edgeprune.quantization.scheme import Precision
from tests.helpers.lowering import lowered, random_model, small, stages_of
from tests.helpers.quantized import made_up

HERE = Path(__file__).parent
# method: keep rate, stages, options; one stage or two, so that a graph can be read
METHODS: dict[str, tuple[float, str | None, dict[str, str]]] = {
    "dense": (0.6, "2", {}),
    "dynamicvit": (0.6, "2", {}),
    "evit": (0.6, "2", {}),
    "ats": (0.5, "2", {}),
    "asvit": (0.5, "1,2", {}),
    "sait": (0.5, "2", {"mass": "0.7"}),
    "cropr": (1.0, "1,2", {"tokens_per_block": "4"}),
    "tome": (1.0, "1,2", {"r": "3"}),
}
TARGETS = ["onnx", "ort-cpu", "trt-fp16"]
QUANTIZED = [
    ("dense", "trt-int8"),
    ("evit", "trt-int8"),
    ("evit", "trt-fp8"),
    ("dense", "ort-cpu-int8"),
    ("dynamicvit", "ort-cpu-int8"),
    ("evit", "ort-cpu-int8"),
]
DYNAMIC = [("dynamicvit", "ort-cpu-int8"), ("evit", "ort-cpu-int8")]
CASES = [*((method, target) for target in TARGETS for method in METHODS), *QUANTIZED]
SHOWN_VALUES = 8


def describe(model: onnx.ModelProto) -> Iterator[str]:
    """Yield the graph line by line: interface, operators in order with attributes, constants without weights."""
    graph = model.graph
    for opset in sorted(model.opset_import, key=lambda o: o.domain):
        yield f"opset {opset.domain or 'ai.onnx'} {opset.version}"
    shapes = {v.name: shape_text(v) for v in (*graph.input, *graph.output, *graph.value_info)}
    yield from (f"input {v.name} {shapes[v.name]}" for v in graph.input)
    yield from (f"output {v.name} {shapes[v.name]}" for v in graph.output)
    yield ""
    for node in graph.node:
        kind = f"{node.domain}.{node.op_type}".lstrip(".")
        attrs = "".join(
            f" {a.name}={value_text(helper.get_attribute_value(a))}"
            for a in sorted(node.attribute, key=lambda a: a.name)
        )
        outputs = ", ".join(f"{o} {shapes.get(o, '?')}" for o in node.output)
        yield f"{kind} {node.name}{attrs}\n    ({', '.join(node.input)})\n    -> {outputs}"
    yield ""
    for tensor in sorted(graph.initializer, key=lambda t: t.name):
        yield f"constant {tensor.name} {constant_text(tensor)}"


def shape_text(value: onnx.ValueInfoProto) -> str:
    kind = value.type.tensor_type
    dims = ",".join(str(d.dim_value or d.dim_param or "?") for d in kind.shape.dim)
    return f"{helper.tensor_dtype_to_np_dtype(kind.elem_type)}[{dims}]"


def value_text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else value.decode() if isinstance(value, bytes) else str(value)


def constant_text(tensor: onnx.TensorProto) -> str:
    """Return type and shape, and the values of few integers: they are structure, floats are weights."""
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    text = f"{dtype}[{','.join(map(str, tensor.dims))}]"
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return f"{text} external"
    values = numpy_helper.to_array(tensor).reshape(-1)
    return f"{text} {values.tolist()}" if dtype.kind == "i" and len(values) <= SHOWN_VALUES else text


@pytest.mark.parametrize(("method", "target"), CASES)
def test_lowered_graph_is_the_recorded_one(tmp_path: Path, method: str, target: str, update_golden: bool) -> None:
    config = small()  # 4 blocks of width 32, 4x4 patches
    rate, stages, options = METHODS[method]
    model = random_model(config, stages_of(config, method, rate, stages, **options))
    precision = TARGETS_BY_NAME[target].quantizes
    quantization = None if precision is None else made_up(config, cast(Precision, precision))
    if quantization is not None and (method, target) in DYNAMIC:
        quantization = replace(quantization, scheme="dynamic", ranges={}, weight_bits=7)
    with_tokens = method in ("evit", "asvit", "tome")
    graph = lowered(model, tmp_path, target=target, token_outputs=with_tokens, quantization=quantization)
    text = "\n".join(describe(graph.model)) + "\n"
    path = HERE / f"{method}-{target}.txt"
    if update_golden:
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"{path.name} is not recorded yet: run pytest --update-golden"
    assert text == path.read_text(encoding="utf-8"), (
        f"{path.name} differs: run pytest --update-golden if it is meant to"
    )


def test_no_golden_file_is_left_over() -> None:
    assert {p.name for p in HERE.glob("*.txt")} == {f"{m}-{t}.txt" for m, t in CASES}
