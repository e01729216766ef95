"""Each rule for QuantizeLinear and DequantizeLinear fires on a graph made to break it, and not on the sound one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeprune.export.lint import LintContext, Rule
from edgeprune.export.lint.quantized_attention import quantized_attention
from edgeprune.export.lint.quantized_gather import quantized_gather
from edgeprune.export.lint.quantized_products import quantized_products
from edgeprune.export.lint.quantized_tensors import quantized_tensors
from edgeprune.export.ops import PLUGIN_FIELDS
from edgeprune.export.targets.tensorrt_versions import FAMILIES

F16 = TensorProto.FLOAT16
FLOAT8 = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)
DOMAINS = ("", "ai.onnx", "edgeprune")
RULES: tuple[Rule, ...] = (quantized_tensors, quantized_products, quantized_attention, quantized_gather)
Change = Callable[[onnx.GraphProto], None]


def linear() -> onnx.GraphProto:
    """Return x [2, 8] times weights [8, 4], both quantized, as the emitter writes it."""
    half = np.float16
    constants = {
        "scale": np.array(0.5, half),
        "zero": np.array(0, np.int8),
        "weight": np.ones((8, 4), np.int8),
        "weight_scale": np.full(4, 0.25, half),
        "weight_zero": np.zeros(4, np.int8),
        "float_weight": np.ones((8, 4), half),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["x_q"], "quantize"),
        helper.make_node("DequantizeLinear", ["x_q", "scale", "zero"], ["x_dq"], "dequantize"),
        helper.make_node(
            "DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["w_dq"], "dequantize_weight", axis=1
        ),
        helper.make_node("MatMul", ["x_dq", "w_dq"], ["y"], "product"),
    ]
    return graph_of(nodes, {"x": [2, 8], "y": [2, 4]}, constants)


def graph_of(nodes: list[onnx.NodeProto], ends: dict[str, list[int]], constants: dict[str, Any]) -> onnx.GraphProto:
    values = [helper.make_tensor_value_info(name, F16, shape) for name, shape in ends.items()]
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    return helper.make_graph(nodes, "quantized", values[:-1], values[-1:], stored)


def findings(graph: onnx.GraphProto) -> list[tuple[str, str]]:
    """Return (node, reason) of all rules."""
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("edgeprune", 1)]
    context = LintContext(helper.make_model(graph, opset_imports=imports), None, DOMAINS, "10.0")
    return [(f.node, f.reason) for rule in RULES for f in rule(context)]


def put(graph: onnx.GraphProto, name: str, value: np.ndarray) -> None:
    """Replace a constant."""
    (stored,) = (one for one in graph.initializer if one.name == name)
    stored.CopyFrom(numpy_helper.from_array(value, name))


def node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    (found,) = (one for one in graph.node if one.name == name)
    return found


def computed(graph: onnx.GraphProto, name: str) -> None:
    """Make a tensor an output of the graph's input in place of a constant."""
    (stored,) = (one for one in graph.initializer if one.name == name)
    graph.initializer.remove(stored)
    graph.input.append(helper.make_tensor_value_info(name, stored.data_type, list(stored.dims)))


def turned(axis: int) -> Change:
    """Store the weights as [out, in] with scales along an axis and turn them in front of the product."""

    def change(graph: onnx.GraphProto) -> None:
        put(graph, "weight", np.ones((4, 8), np.int8))
        (given,) = node(graph, "dequantize_weight").attribute
        given.i = axis
        graph.node.insert(3, helper.make_node("Transpose", ["w_dq"], ["w_t"], "turn", perm=[1, 0]))
        node(graph, "product").input[1] = "w_t"

    return change


def square(graph: onnx.GraphProto) -> None:
    """Make the weights [8, 8] with scales along the inputs."""
    put(graph, "weight", np.ones((8, 8), np.int8))
    put(graph, "weight_scale", np.ones(8, np.float16))
    put(graph, "weight_zero", np.zeros(8, np.int8))
    (given,) = node(graph, "dequantize_weight").attribute
    given.i = 0


def quantize_on_the_way(graph: onnx.GraphProto) -> None:
    """Hold the weights as floats, as other tools do."""
    graph.node.insert(
        2,
        helper.make_node(
            "QuantizeLinear", ["float_weight", "weight_scale", "weight_zero"], ["w_q"], "quantize_weight", axis=1
        ),
    )
    node(graph, "dequantize_weight").input[0] = "w_q"


def cast_behind(graph: onnx.GraphProto) -> None:
    graph.node.insert(3, helper.make_node("Cast", ["w_dq"], ["w_cast"], "cast", to=F16))
    node(graph, "product").input[1] = "w_cast"


def channels_of_activation(graph: onnx.GraphProto) -> None:
    put(graph, "scale", np.ones(8, np.float16))
    put(graph, "zero", np.zeros(8, np.int8))


@pytest.mark.parametrize(
    "change",
    [lambda graph: None, turned(0), quantize_on_the_way],
    ids=["as emitted", "turned", "weights quantized in the graph"],
)
def test_sound_graph_breaks_no_rule(change: Change) -> None:
    graph = linear()
    change(graph)
    assert findings(graph) == []


BROKEN: dict[str, tuple[Change, str, str]] = {
    "zero point": (lambda g: put(g, "weight_zero", np.array([0, 0, 1, 0], np.int8)), "dequantize_weight", "not 0"),
    "computed zero point": (lambda g: computed(g, "weight_zero"), "dequantize_weight", "zero point is computed"),
    "unsigned": (
        lambda g: put(g, "zero", np.array(0, np.uint8)),
        "quantize",
        "uint8 is no quantized type",
    ),
    "scale of zero": (
        lambda g: put(g, "weight_scale", np.array([1, 0, 1, 1], np.float16)),
        "dequantize_weight",
        "not positive",
    ),
    "scale not finite": (
        lambda g: put(g, "weight_scale", np.array([1, np.nan, 1, 1], np.float16)),
        "dequantize_weight",
        "not positive",
    ),
    "computed scale": (lambda g: computed(g, "weight_scale"), "dequantize_weight", "scale is computed"),
    "too few scales": (
        lambda g: put(g, "weight_scale", np.ones(3, np.float16)),
        "dequantize_weight",
        "3 scales for 4 channels",
    ),
    "scales of blocks": (
        lambda g: put(g, "weight_scale", np.ones((2, 4), np.float16)),
        "dequantize_weight",
        "of blocks",
    ),
    "channels of an activation": (channels_of_activation, "quantize", "an activation has a scale per channel"),
    "scales of the inputs": (square, "product", "along axis 0, which is not that of the outputs"),
    "scales of the inputs, turned": (turned(1), "product", "along axis 1, which is not that of the outputs"),
    "one scale for all": (
        lambda g: put(g, "weight_scale", np.array(1, np.float16)),
        "product",
        "one scale, needed is one per output",
    ),
    "cast": (cast_behind, "product", "a Cast stands between"),
    "weights alone": (
        lambda g: node(g, "product").input.__setitem__(0, "x"),
        "product",
        "only the second factor is quantized",
    ),
    "input alone": (
        lambda g: node(g, "product").input.__setitem__(1, "float_weight"),
        "product",
        "only the first factor is quantized",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_graph_is_refused(name: str) -> None:
    change, where, reason = BROKEN[name]
    graph = linear()
    change(graph)
    found = findings(graph)
    assert any(at == where and reason in words for at, words in found), found


def test_quantized_graph_is_for_versions_with_strong_typing() -> None:
    context = LintContext(helper.make_model(linear(), opset_imports=[helper.make_opsetid("", 17)]), None, DOMAINS)
    refusing = [version for version in FAMILIES if quantized_tensors(context.at(version))]
    assert refusing == ["8.5", "8.6"]
    assert quantized_tensors(context.at("8.6"))[0].reason.endswith("from TensorRT 10.0 on")


# ------------------------------------------------------------------------------------------------ attention

OPERANDS = ("queries", "keys", "softmax", "values")


def attention(*quantized: str, dtype: Any = FLOAT8, scale: float = 1 / 448) -> onnx.GraphProto:
    """Return softmax(q k) v with some operands between QuantizeLinear and DequantizeLinear."""
    constants = {
        "scale": np.array(0.5, np.float16),
        "softmax_scale": np.array(scale, np.float16),
        "zero": np.zeros((), dtype),
    }
    nodes: list[onnx.NodeProto] = []

    def operand(name: str, tensor: str) -> str:
        if name not in quantized:
            return tensor
        rest = ["softmax_scale" if name == "softmax" else "scale", "zero"]
        nodes.append(helper.make_node("QuantizeLinear", [tensor, *rest], [f"{tensor}_q"], f"{name}_quantize"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{tensor}_q", *rest], [f"{tensor}_dq"], f"{name}_dq"))
        return f"{tensor}_dq"

    inputs = [operand("queries", "q"), operand("keys", "k")]
    nodes.append(helper.make_node("MatMul", inputs, ["logits"], "first"))
    nodes.append(helper.make_node("Softmax", ["logits"], ["p"], "softmax", axis=-1))
    inputs = [operand("softmax", "p"), operand("values", "v")]
    nodes.append(helper.make_node("MatMul", inputs, ["y"], "second"))
    return graph_of(nodes, {"q": [1, 2, 4, 8], "k": [1, 2, 8, 4], "v": [1, 2, 4, 8], "y": [1, 2, 4, 8]}, constants)


@pytest.mark.parametrize("operands", [(), OPERANDS], ids=["none", "all"])
def test_attention_quantized_not_at_all_or_as_the_kernel_wants_it_is_taken(operands: tuple[str, ...]) -> None:
    assert findings(attention(*operands)) == []


@pytest.mark.parametrize("left", OPERANDS)
def test_attention_of_which_one_operand_is_left_out_is_refused(left: str) -> None:
    found = findings(attention(*(name for name in OPERANDS if name != left)))
    assert any(at == "softmax" and f"and {left} are not" in reason for at, reason in found), found


def test_attention_in_integers_is_refused() -> None:
    found = findings(attention(*OPERANDS, dtype=np.int8))
    assert [at for at, _ in found] == ["softmax"] and "integers" in found[0][1]


def test_softmax_of_another_scale_is_refused() -> None:
    found = findings(attention(*OPERANDS, scale=1 / 127))
    assert [at for at, _ in found] == ["softmax"] and "1/448" in found[0][1]


# ------------------------------------------------------------------------------------------------ plugins


def gather(*, dequantize: str) -> onnx.GraphProto:
    """Return gathered rows, quantized and dequantized before or behind the plugin, or around it."""
    constants = {
        "scale": np.array(0.5, np.float16),
        "zero": np.array(0, np.int8),
        "rows": np.array([[0, 1]], np.int32),
    }
    orders = {"around": "QGD", "before": "QDG", "behind": "GQD"}
    ops = {"Q": "QuantizeLinear", "D": "DequantizeLinear", "G": "GatherTokens"}
    nodes, tensor = [], "x"
    for i, letter in enumerate(orders[dequantize]):
        out = "y" if i == 2 else f"t{i}"
        if letter == "G":
            made = helper.make_node(
                ops[letter], [tensor, "rows"], [out], ops[letter], domain="edgeprune", num_prefix_tokens=1,
                **PLUGIN_FIELDS,
            )  # fmt: skip
        else:
            made = helper.make_node(ops[letter], [tensor, "scale", "zero"], [out], ops[letter])
        nodes.append(made)
        tensor = out
    return graph_of(nodes, {"x": [1, 5, 8], "y": [1, 3, 8]}, constants)


def test_plugin_belongs_between_quantize_and_dequantize() -> None:
    assert findings(gather(dequantize="around")) == []
    assert findings(gather(dequantize="before")) == [
        ("GatherTokens", "DequantizeLinear stands in front of GatherTokens, and belongs behind it")
    ]
    assert findings(gather(dequantize="behind")) == [
        ("GatherTokens", "QuantizeLinear stands behind GatherTokens, and belongs in front of it")
    ]
