"""Each rule of the TensorRT targets fires on a graph made to break it, and on no other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeprune.errors import BuildError
from edgeprune.export.emit.weights import weight_arrays
from edgeprune.export.lint import Finding, LintContext, Rule, run_lint
from edgeprune.export.lint.attention_op import attention_op
from edgeprune.export.lint.attention_pattern import attention_pattern
from edgeprune.export.lint.constant_inputs import constant_inputs
from edgeprune.export.lint.dynamic_dims import dynamic_dims
from edgeprune.export.lint.float32_scores import float32_scores
from edgeprune.export.lint.gather_elements import gather_elements
from edgeprune.export.lint.ignored_attributes import ignored_attributes
from edgeprune.export.lint.int32_limits import int32_limits
from edgeprune.export.lint.int64_io import int64_io
from edgeprune.export.lint.known_operators import known_operators
from edgeprune.export.lint.known_types import known_types
from edgeprune.export.lint.layer_norm_form import layer_norm_form
from edgeprune.export.lint.local_functions import local_functions
from edgeprune.export.lint.loops import loops
from edgeprune.export.lint.name_collisions import name_collisions
from edgeprune.export.lint.opset_ceiling import opset_ceiling
from edgeprune.export.lint.plugin_fields import SCHEMAS, plugin_fields
from edgeprune.export.lint.same_types import same_types
from edgeprune.export.lint.shape_from_data import shape_from_data
from edgeprune.export.lint.tensorrt import (
    ENGINE_RULES,
    FORM_RULES,
    PARSER_RULES,
    QUANTIZED_RULES,
    merge_why_not,
    tensorrt_rules,
    why_not,
)
from edgeprune.export.lint.topk_form import topk_form
from edgeprune.export.ops import PLUGIN_FIELDS
from edgeprune.export.pipeline import PLAN_PASSES, lower
from edgeprune.export.plan import Counts, Plan, build_plan
from edgeprune.export.targets.registry import TARGETS
from edgeprune.export.targets.tensorrt_versions import FAMILIES
from edgeprune.export.writer import WeightStore
from edgeprune.plugins.contract import CREATORS
from edgeprune.pruning.model import PrunedViT
from edgeprune.quantization.scheme import Precision
from tests.helpers import adaptive
from tests.helpers.lowering import lowered, random_model, small, stages_of
from tests.helpers.quantized import made_up

ROOT = Path(__file__).resolve().parents[3]
DOMAINS = ("", "ai.onnx", "edgeprune")
ALL = list(FAMILIES)
F32, F16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
I64, I32, BOOL = TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL

Tensors = Mapping[str, tuple[int, Sequence[int | str] | None]]


def node(op: str, inputs: str, outputs: str = "y", *, name: str = "culprit", domain: str = "", **attrs: Any) -> Any:
    """Return a node; inputs and outputs are names with spaces between, "-" for one that is left out."""
    split = [[n.replace("-", "") for n in names.split()] for names in (inputs, outputs)]
    return helper.make_node(op, *split, name, domain=domain, **attrs)


def graph(
    *nodes: onnx.NodeProto,
    inputs: Tensors | None = None,
    outputs: Tensors | None = None,
    constants: Mapping[str, np.ndarray] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
    info: Tensors | None = None,
    opset: int = 17,
    tensorrt: str = "8.6",
    plan: Plan | None = None,
) -> LintContext:
    """Return the context of a graph; its input is x, float32 [2, 8], and its output y unless told otherwise."""

    def make(tensors: Tensors) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, *of) for name, of in tensors.items()]

    proto = helper.make_graph(
        list(nodes),
        "broken",
        make({"x": (F32, [2, 8])} if inputs is None else inputs),
        make({"y": (F32, None)} if outputs is None else outputs),
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
        value_info=make(info or {}),
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("edgeprune", 1)]
    model = helper.make_model(proto, functions=list(functions), opset_imports=imports)
    return LintContext(model, plan, DOMAINS, tensorrt)


def found(rule: Rule, context: LintContext) -> list[str]:
    """Return the reasons of a rule's findings, which must all be about the culprit."""
    findings = rule(context)
    assert {f.node for f in findings} <= {"culprit"}
    return [f.reason for f in findings]


def versions_that_refuse(rule: Rule, context: LintContext) -> list[str]:
    return [version for version in ALL if found(rule, context.at(version))]


def before(version: str) -> list[str]:
    return ALL[: ALL.index(version)]


# ------------------------------------------------------------------------------------------------ operators, types


@pytest.mark.parametrize(
    ("op", "first"), [("Gelu", "10.0"), ("LayerNormalization", "8.6"), ("IsInf", "8.6"), ("Relu", "8.5")]
)
def test_operator_is_refused_before_its_version(op: str, first: str) -> None:
    context = graph(node(op, "x"), opset=20)
    assert versions_that_refuse(known_operators, context) == before(first)
    if first != "8.5":
        assert found(known_operators, context.at("8.5")) == [f"{op} is taken from TensorRT {first} on"]


def test_operator_no_version_knows_is_refused_by_all() -> None:
    context = graph(node("Unique", "x"))
    assert versions_that_refuse(known_operators, context) == ALL
    assert found(known_operators, context) == ["Unique is taken by no version of TensorRT"]


@pytest.mark.parametrize(
    ("op", "element_type", "first"),
    [("TopK", I64, "8.6"), ("ArgMax", I32, "8.6"), ("ReduceMean", I32, "10.0"), ("CumSum", I64, None)],
)
def test_operator_is_refused_on_types_before_their_version(op: str, element_type: int, first: str | None) -> None:
    second = " k" if op in ("TopK", "CumSum") else ""
    outputs = "y other" if op == "TopK" else "y"
    context = graph(
        node(op, f"x{second}", outputs), inputs={"x": (element_type, [2, 8])}, constants={"k": np.array([1])}
    )
    assert versions_that_refuse(known_operators, context) == (ALL if first is None else before(first))
    name = {I64: "int64", I32: "int32"}[element_type]
    since = "by no version of TensorRT" if first is None else f"from TensorRT {first} on"
    assert found(known_operators, context.at("8.5")) == [f"{op} on {name} is taken {since}"]


def test_data_of_where_and_cast_are_looked_at() -> None:
    on_bools = graph(node("Equal", "x x"), inputs={"x": (BOOL, [2])}, outputs={"y": (BOOL, [2])})
    assert found(known_operators, on_bools) == ["Equal on bool is taken by no version of TensorRT"]
    where = graph(node("Where", "c x x"), inputs={"c": (BOOL, [2, 8]), "x": (F32, [2, 8])})
    assert found(known_operators, where) == []
    cast = graph(node("Cast", "x", to=TensorProto.UINT8), outputs={"y": (TensorProto.UINT8, [2, 8])})
    assert versions_that_refuse(known_operators, cast) == ["8.5"]


def test_operators_inside_branches_are_looked_at() -> None:
    y = helper.make_tensor_value_info("y", F32, None)
    branch = helper.make_graph([node("Unique", "x")], "branch", [], [y])
    context = graph(
        node("If", "c", name="if", then_branch=branch, else_branch=branch), inputs={"c": (BOOL, []), "x": (F32, [2, 8])}
    )
    assert found(known_operators, context) == ["Unique is taken by no version of TensorRT"] * 2


def test_float64_is_read_as_float32() -> None:
    assert found(known_operators, graph(node("Relu", "x"), inputs={"x": (TensorProto.DOUBLE, [2])})) == []


def test_bfloat16_is_refused_before_its_version() -> None:
    context = graph(node("Relu", "culprit"), inputs={"culprit": (BF16, [2])}, outputs={"y": (BF16, [2])})
    assert versions_that_refuse(known_types, context) == before("10.0")
    assert found(known_types, context) == ["bfloat16 tensors are known from TensorRT 10.0 on"]
    assert found(known_operators, context.at("8.6")) == []


def test_type_of_an_initializer_is_looked_at() -> None:
    context = graph(node("Identity", "culprit"), constants={"culprit": np.ones(2, np.uint16)})
    assert versions_that_refuse(known_types, context) == ALL
    assert found(known_types, context) == ["uint16 tensors are known to no version of TensorRT"]


@pytest.mark.parametrize(("opset", "first"), [(17, "8.5"), (18, "10.0"), (20, "10.0"), (21, "10.7"), (23, "10.14")])
def test_opset_is_refused_before_its_version(opset: int, first: str) -> None:
    context = graph(node("Relu", "x"), opset=opset)
    refusing = [version for version in ALL if opset_ceiling(context.at(version))]
    assert refusing == before(first)
    if refusing:
        (finding,) = opset_ceiling(context.at("8.6"))
        assert finding.reason == f"opset {opset} is read from TensorRT {first} on"


# ------------------------------------------------------------------------------------------------ TopK


def topk(k: np.ndarray | None = None, shape: Sequence[int] = (2, 8), **attrs: Any) -> LintContext:
    inputs: dict[str, Any] = {"x": (F32, shape)} | ({"slots": (I64, [1])} if k is None else {})
    constants = {} if k is None else {"slots": k}
    return graph(node("TopK", "x slots", "y ranks", **attrs), inputs=inputs, constants=constants)


@pytest.mark.parametrize(("k", "refused"), [(1, 0), (3840, 0), (3841, 1)])
def test_k_above_the_limit_is_refused(k: int, refused: int) -> None:
    reasons = found(topk_form, topk(np.array([k]), (2, 5000)))
    assert len(reasons) == refused
    assert all("3841" in reason and "3840" in reason for reason in reasons)


def test_k_as_a_tensor_is_refused_before_its_version() -> None:
    assert versions_that_refuse(topk_form, topk()) == ["8.5"]
    assert versions_that_refuse(topk_form, topk(np.array([2]))) == []
    assert "8.6" in found(topk_form, topk().at("8.5"))[0]


def test_unsorted_values_are_refused() -> None:
    assert "sorted=1" in found(topk_form, topk(np.array([2]), sorted=0))[0]
    assert found(topk_form, topk(np.array([2]), sorted=1)) == []


@pytest.mark.parametrize(("rank", "axis", "refused"), [(5, 0, 1), (5, 1, 0), (5, -5, 1), (5, -1, 0), (4, 0, 0)])
def test_axis_in_front_of_the_last_four_is_refused(rank: int, axis: int, refused: int) -> None:
    assert len(found(topk_form, topk(np.array([1]), [2] * rank, axis=axis))) == refused
    assert found(topk_form, topk(np.array([1]), [2] * rank)) == []


# ------------------------------------------------------------------------------------------------ forms of operators


@pytest.mark.parametrize(
    ("op", "inputs", "first"),
    [
        ("ReduceSum", "x axes", None),
        ("CumSum", "x axes", None),
        ("Slice", "x one one axes", "10.3"),
        ("Unsqueeze", "x axes", "10.7"),
    ],
)
def test_computed_axes_are_refused_before_their_version(op: str, inputs: str, first: str | None) -> None:
    one = {"one": np.array([1])}
    computed = graph(node(op, inputs), inputs={"x": (F32, [2, 8]), "axes": (I64, [1])}, constants=one)
    assert versions_that_refuse(constant_inputs, computed) == (ALL if first is None else before(first))
    assert (f" before TensorRT {first}" in found(constant_inputs, computed)[0]) is (first is not None)
    assert found(constant_inputs, graph(node(op, inputs), constants={**one, "axes": np.array([1])})) == []
    written = node("Constant", "", "axes", name="axes", value_ints=[1])
    assert found(constant_inputs, graph(written, node(op, inputs), constants=one)) == []


def test_axes_left_out_are_no_input() -> None:
    one = {"one": np.array([1])}
    assert found(constant_inputs, graph(node("Slice", "x one one - one"), constants=one)) == []
    assert found(constant_inputs, graph(node("ReduceMax", "x", axes=[1]))) == []


@pytest.mark.parametrize(("op", "refusing"), [("ScatterElements", before("10.0")), ("ScatterND", ALL)])
def test_scatter_that_adds_is_refused_where_it_would_overwrite(op: str, refusing: list[str]) -> None:
    tensors: Tensors = {"x": (F32, [2, 8]), "i": (I64, [2, 8]), "u": (F32, [2, 8])}
    for attrs, expected in (({"reduction": "add"}, refusing), ({"reduction": "none"}, []), ({}, [])):
        context = graph(node(op, "x i u", **attrs), inputs=tensors)
        assert versions_that_refuse(ignored_attributes, context) == expected


@pytest.mark.parametrize("bounds", [{"start": 1}, {"end": 1}, {"start": 0, "end": -1}, {"start": 0}, {}])
def test_bounds_of_shape_are_refused_where_they_are_ignored(bounds: dict[str, int]) -> None:
    context = graph(node("Shape", "x", **bounds), outputs={"y": (I64, [1])})
    refused = bounds not in ({}, {"start": 0})
    assert versions_that_refuse(ignored_attributes, context) == (before("10.0") if refused else [])
    reasons = found(ignored_attributes, context)
    assert all(reason.endswith("of Shape is ignored before TensorRT 10.0") for reason in reasons)


@pytest.mark.parametrize(
    ("inputs", "outputs", "reasons"),
    [
        ("x w b", "y", []),
        ("x w", "y", ["LayerNormalization needs a bias of its own"]),
        ("x - b", "y", ["LayerNormalization needs a scale of its own"]),
        ("x w b", "y mean", ["only the first output of LayerNormalization is made"]),
        ("x w b", "y -", []),
    ],
)
def test_layer_norm_has_scale_and_bias_and_one_output(inputs: str, outputs: str, reasons: list[str]) -> None:
    constants = {name: np.ones(8, np.float32) for name in "wb"}
    assert found(layer_norm_form, graph(node("LayerNormalization", inputs, outputs), constants=constants)) == reasons


def test_attention_operator_is_refused_in_forms_the_parser_does_not_take() -> None:
    def attention(inputs: str, outputs: str = "y", rank: int = 4) -> list[str]:
        tensors: Tensors = {name: (F32, [2] * rank) for name in "qkvmp"}
        return found(attention_op, graph(node("Attention", inputs, outputs), inputs=tensors))

    assert attention("q k v") == attention("q k v m") == []
    assert attention("q k v - p p") == ["Attention takes no past keys and values"]
    assert attention("q k v", "y keys values") == ["only the first output of Attention is made"]
    assert attention("q k v", rank=3) == ["Attention takes queries, keys, values and masks of 4 axes"]


@pytest.mark.parametrize(
    ("op", "inputs", "element_types", "refused"),
    [
        ("Add", "a b", (F16, F32), True),
        ("Add", "a b", (F16, F16), False),
        ("MatMul", "a b", (BF16, F16), True),
        ("Where", "c a b", (F16, F32), True),
        ("Where", "c a a", (F16, F32), False),
        ("Concat", "a a b", (F16, F32), True),
        ("LayerNormalization", "a b b", (F16, F32), True),
        ("LayerNormalization", "a b b", (F32, F32), False),
        ("Pow", "a b", (F16, F32), True),
        ("GatherND", "a b", (F16, I64), False),
        ("Greater", "a b", (F32, F16), True),
    ],
)
def test_mixed_types_are_refused(op: str, inputs: str, element_types: tuple[int, int], refused: bool) -> None:
    attrs = {"axis": -1} if op == "Concat" else {}
    tensors: Tensors = {"a": (element_types[0], [8, 8]), "b": (element_types[1], [8, 8]), "c": (BOOL, [8, 8])}
    reasons = found(same_types, graph(node(op, inputs, **attrs), inputs=tensors))
    assert bool(reasons) is refused
    assert all(reason.startswith(f"{op} of ") and " and " in reason for reason in reasons)


def test_types_behind_a_cast_are_known() -> None:
    cast = node("Cast", "x", "half", name="cast", to=F16)
    assert found(same_types, graph(cast, node("Add", "half x"))) == ["Add of float16 and float32: cast one of them"]


def test_dimension_beyond_32_bits_is_refused() -> None:
    for name, size, refused in (("culprit", 2**31, True), ("x", 2**31 - 1, False)):
        context = graph(node("Relu", name), inputs={name: (F32, [1, size])}, outputs={"y": (F32, None)})
        assert bool(found(int32_limits, context)) is refused


def test_int64_inputs_and_outputs_are_refused() -> None:
    (reason,) = found(int64_io, graph(node("Shape", "x", "culprit"), outputs={"culprit": (I64, [2])}))
    assert "int32 before TensorRT 10.0" in reason
    taken: Tensors = {"culprit": (I64, [2])}
    assert len(found(int64_io, graph(node("Cast", "culprit", to=F32), inputs=taken))) == 1
    assert found(int64_io, graph(node("Relu", "x"))) == []


def test_token_counts_may_be_int64() -> None:
    assert found(int64_io, graph(node("Cast", "slots", to=F32), inputs={"slots": (I64, [2])})) == []


# ------------------------------------------------------------------------------------------------ plugins


def plugin(op: str = "GatherTokens", outputs: str = "y", **changes: Any) -> LintContext:
    """Return a graph with one plugin node; an attribute changed to None is left out."""
    attrs: dict[str, Any] = {"num_prefix_tokens": 1, **PLUGIN_FIELDS}
    inputs = "tokens indices"
    if op == "TopKGather":
        attrs |= {"k": 3, "order": 0, "mode": 0, "threshold": 0.0}
        inputs = "x tokens"
    attrs = {k: v for k, v in (attrs | changes).items() if v is not None}
    tensors: Tensors = {"x": (F32, [2, 8]), "tokens": (F32, [2, 9, 4]), "indices": (I32, [2, 3])}
    return graph(node(op, inputs, outputs, domain="edgeprune", **attrs), inputs=tensors)


def test_complete_plugin_node_is_accepted() -> None:
    for context in (plugin(), plugin("TopKGather", "y indices_out count")):
        assert [f for rule in PARSER_RULES for f in rule(context)] == []


@pytest.mark.parametrize("field", PLUGIN_FIELDS)
@pytest.mark.parametrize("value", [None, "other"])
def test_plugin_node_without_namespace_or_version_is_refused(field: str, value: str | None) -> None:
    (reason,) = found(plugin_fields, plugin(**{field: value}))
    assert field in reason


def test_attributes_the_creator_does_not_list_are_refused() -> None:
    assert found(plugin_fields, plugin(colour=1)) == ["the creator of GatherTokens has no field colour"]
    assert found(plugin_fields, plugin(num_prefix_tokens=None)) == [
        "GatherTokens lacks the attribute num_prefix_tokens"
    ]


@pytest.mark.parametrize("outputs", ["y", "y indices_out", "y - count"])
def test_outputs_left_out_are_refused(outputs: str) -> None:
    (reason,) = found(plugin_fields, plugin("TopKGather", outputs))
    assert "of its 3 outputs" in reason


def test_inputs_left_out_are_refused() -> None:
    context = graph(node("GatherTokens", "x -", domain="edgeprune", num_prefix_tokens=1, **PLUGIN_FIELDS))
    assert found(plugin_fields, context) == ["GatherTokens needs all its 2 inputs"]


def test_plugin_without_a_creator_is_refused() -> None:
    (reason,) = found(plugin_fields, graph(node("SortTokens", "x", domain="edgeprune")))
    assert "SortTokens" in reason and all(name in reason for name in CREATORS)


def test_fields_are_those_of_the_libraries() -> None:
    """The creators take their fields from the table in op.cpp."""
    text = (ROOT / "plugins/tensorrt/common/op.cpp").read_text(encoding="utf-8")
    for name in CREATORS:
        fields = re.search(rf'{{"{name}",\s*{{(.*?)}},\s*{{{{"', text, re.DOTALL)
        assert fields is not None
        assert set(re.findall(r'{"(\w+)"', fields[1])) == set(SCHEMAS[name].attributes) - set(PLUGIN_FIELDS)


def test_attribute_beyond_32_bits_is_refused() -> None:
    (reason,) = found(int32_limits, plugin(num_prefix_tokens=2**31))
    assert "num_prefix_tokens=2147483648" in reason
    assert found(int32_limits, plugin(num_prefix_tokens=2**31 - 1)) == []


def test_name_of_a_standard_operator_is_refused() -> None:
    for op in ("TopK", "Gelu", "Attention"):
        reasons = found(name_collisions, graph(node(op, "x", domain="edgeprune")))
        assert reasons == [f"edgeprune.{op} is read as the standard {op}: the parser ignores domains"]
    assert found(name_collisions, graph(node("TopKGather", "x", domain="edgeprune"))) == []
    assert found(name_collisions, graph(node("TopK", "x x"))) == []


def function(name: str) -> onnx.FunctionProto:
    return helper.make_function(
        "edgeprune", name, ["a"], ["b"], [node("Relu", "a", "b")], [helper.make_opsetid("", 17)]
    )


@pytest.mark.parametrize(("name", "first"), [("GatherTokens", "10.7"), ("Halved", "10.0")])
def test_local_function_is_refused_where_it_is_unknown_or_wins(name: str, first: str) -> None:
    call = node(name, "x", domain="edgeprune")
    context = graph(call, functions=[function(name)])
    assert [v for v in ALL if local_functions(context.at(v))] == before(first)
    assert local_functions(graph(node("Relu", "x"), functions=[function(name)])) == []
    assert local_functions(graph(call)) == []


def test_local_function_in_place_of_the_plugin_is_explained() -> None:
    context = graph(
        node("GatherTokens", "x", domain="edgeprune"), functions=[function("GatherTokens")], tensorrt="10.3"
    )
    (finding,) = local_functions(context)
    assert finding.reason == "the body of GatherTokens is taken in place of the plugin before TensorRT 10.7"


# ------------------------------------------------------------------------------------------------ sizes


def sized(*nodes: onnx.NodeProto) -> list[str]:
    """Return what is found of a TopK whose K is made by some nodes from x or from slots."""
    tensors: Tensors = {"x": (F32, [2, 8]), "slots": (I64, [1])}
    return found(shape_from_data, graph(*nodes, node("TopK", "x k", "y ranks"), inputs=tensors))


def test_size_computed_from_the_image_is_refused() -> None:
    count = node("ReduceSum", "x", "sum", name="sum", keepdims=0)
    assert sized(count, node("Cast", "sum", "k", name="cast", to=I64)) == ["TopK gets a size that depends on the image"]


def test_size_from_shapes_or_slots_is_accepted() -> None:
    assert sized(node("Shape", "x", "k", name="shape", start=1)) == []
    assert sized(node("Identity", "slots", "k", name="identity")) == []


@pytest.mark.parametrize(
    ("dims", "slots", "refused"),
    [(["batch", 8], False, 0), (["batch", "tokens"], False, 1), (["batch", "tokens"], True, 0), ([2, 8], False, 0)],
)
def test_only_the_batch_may_change(dims: list[int | str], slots: bool, refused: int) -> None:
    tensors: dict[str, Any] = {"culprit": (F32, dims)} | ({"slots": (I64, [1])} if slots else {})
    assert len(found(dynamic_dims, graph(node("Relu", "culprit"), inputs=tensors))) == refused


# ------------------------------------------------------------------------------------------------ speed, agreement


def attention(
    *between: onnx.NodeProto, scores: str = "logits", mask: Sequence[int] = (2, 1, 1, 8), rest: Sequence[Any] = ()
) -> list[str]:
    """Return what is found of an attention with some nodes between its first product, "logits", and the softmax."""
    shape = [2, 4, 8, 16]
    nodes = [
        node("Mul", "q scale", "scaled", name="scaled"),
        node("MatMul", "scaled k", "logits", name="logits"),
        *between,
        node("Softmax", scores, "weights", axis=-1),
        node("MatMul", "weights v", "y", name="context"),
        *rest,
    ]
    tensors: Tensors = {"q": (F32, shape), "k": (F32, [2, 4, 16, 8]), "v": (F32, shape), "mask": (F32, mask)}
    return found(attention_pattern, graph(*nodes, inputs=tensors, constants={"scale": np.float32(0.25)}))


def test_attention_of_the_documented_form_is_accepted() -> None:
    assert attention() == []
    for inputs in ("logits mask", "mask logits"):
        assert attention(node("Add", inputs, "masked", name="masked"), scores="masked") == []


@pytest.mark.parametrize("op", ["Mul", "Div"])
def test_scaled_scores_are_refused(op: str) -> None:
    for inputs in ("logits scale", "scale logits"):
        (reason,) = attention(node(op, inputs, "late", name="late"), scores="late")
        assert reason.startswith(f"{op} scales the scores")
    late = [node(op, "logits scale", "late", name="late"), node("Add", "late mask", "masked", name="masked")]
    assert len(attention(*late, scores="masked")) == 1


def test_mask_of_fewer_axes_is_refused() -> None:
    add = node("Add", "logits mask", "masked", name="masked")
    assert attention(add, scores="masked", mask=(1, 8)) == ["the mask has 2 axes, needed are 4"]


def test_other_operators_in_front_of_the_softmax_are_refused() -> None:
    (reason,) = attention(node("Clip", "logits", "clipped", name="clipped"), scores="clipped")
    assert "Clip stands between" in reason


def test_weights_somebody_else_reads_are_refused() -> None:
    (reason,) = attention(rest=[node("ReduceMean", "weights", "mean", name="mean")])
    assert "read besides" in reason


def test_softmax_without_values_is_no_attention() -> None:
    late = node("Mul", "x x", "late", name="late")
    assert found(attention_pattern, graph(late, node("Softmax", "late"))) == []


def test_expanded_index_is_refused() -> None:
    tensors: Tensors = {"x": (F32, [2, 8, 4]), "i": (I64, [2, 3, 1]), "full": (I64, [2, 3, 4])}
    expand = node("Expand", "i shape", "wide", name="expand")
    gather = node("GatherElements", "x wide", axis=1)
    shape = {"shape": np.array([2, 3, 4])}
    (reason,) = found(gather_elements, graph(expand, gather, inputs=tensors, constants=shape))
    assert "GatherND with batch_dims=1" in reason
    assert found(gather_elements, graph(node("GatherElements", "x full", axis=1), inputs=tensors)) == []


@pytest.mark.parametrize("op", ["TopK", "ArgMax", "Greater", "CumSum", "TopKGather"])
@pytest.mark.parametrize(("element_type", "refused"), [(F32, False), (F16, True), (BF16, True), (I64, False)])
def test_decisions_on_half_precision_are_refused(op: str, element_type: int, refused: bool) -> None:
    domain = "edgeprune" if op == "TopKGather" else ""
    deciding = node(op, "s s", "y other" if op == "TopK" else "y", domain=domain)
    context = graph(deciding, inputs={"s": (element_type, [2, 8])}, outputs={"y": (BOOL, [2, 8])})
    assert bool(found(float32_scores, context)) is refused


def test_loop_is_refused_before_it_is_a_layer() -> None:
    context = graph(node("CumSum", "x axis"), constants={"axis": np.array(1)})
    assert versions_that_refuse(loops, context) == before("10.9")
    assert "CUDA graph" in found(loops, context)[0]


# ------------------------------------------------------------------------------------------------ together


def rules_that_fire(context: LintContext, least: str = "8.6") -> set[str]:
    return {f.rule for rule in tensorrt_rules(least) for f in rule(context)} - {"tokens-shrink"}


def test_rules_judge_for_the_version_asked_for() -> None:
    context = graph(node("Gelu", "x"))
    assert rules_that_fire(context) == {"operator-unknown"}
    assert rules_that_fire(context, "10.3") == set()
    assert len(tensorrt_rules()) == len(PARSER_RULES) + len(ENGINE_RULES) + len(FORM_RULES) + len(QUANTIZED_RULES)
    with pytest.raises(BuildError) as caught:
        run_lint(context, tensorrt_rules(), "trt-fp16")
    assert caught.value.code == "lint"


def test_opset_and_types_asked_for_raise_the_version() -> None:
    assert rules_that_fire(graph(node("Gelu", "x"), opset=20)) == set()
    brain: Tensors = {"x": (BF16, [2, 8])}
    assert rules_that_fire(graph(node("Relu", "x"), inputs=brain, outputs={"y": (BF16, [2, 8])})) == set()
    assert rules_that_fire(graph(node("IsInf", "x"), opset=17), "8.5") == {"operator-unknown"}


def test_opset_and_types_no_version_knows_are_refused() -> None:
    assert rules_that_fire(graph(node("Relu", "x"), opset=99)) == {"opset"}
    strings: Tensors = {"x": (TensorProto.STRING, [2])}
    assert "type-unknown" in rules_that_fire(graph(node("Identity", "x"), inputs=strings))


def test_what_costs_only_speed_is_asked_of_emitted_graphs_alone() -> None:
    for plan, refused in ((None, set()), (build_plan(small(), ()), {"loop"})):
        context = graph(node("CumSum", "x axis"), constants={"axis": np.array(1)}, plan=plan)
        assert rules_that_fire(context) == refused


def test_why_not_names_each_reason_once() -> None:
    first = node("Gelu", "x", "between", name="first")
    table = why_not(graph(first, node("Gelu", "between"), opset=20).model, None)
    assert list(table) == ALL
    assert table["8.6"] == ["opset 20 is read from TensorRT 10.0 on", "Gelu is taken from TensorRT 10.0 on"]
    assert all(table[version] == [] for version in ALL if version not in before("10.0"))


def test_why_not_of_a_bundle_is_that_of_all_its_graphs() -> None:
    tables = [why_not(graph(node(op, "x"), opset=20).model, None) for op in ("Gelu", "Unique", "Gelu")]
    merged = merge_why_not(tables)
    assert merged["11.1"] == ["Unique is taken by no version of TensorRT"]
    assert [reason.split()[0] for reason in merged["8.6"]] == ["opset", "Gelu", "Unique"]
    assert merge_why_not([]) == {version: [] for version in ALL}


# ------------------------------------------------------------------------------------------------ emitted graphs

METHODS = ["dense", "dynamicvit", "evit", "random", *adaptive.METHODS]
TYPED = ["trt-fp32", "trt-fp16", "trt-bf16"]


def model_of(name: str) -> PrunedViT:
    if name in adaptive.METHODS:
        return adaptive.model_of(name)
    config = small()
    return random_model(config, stages_of(config, name, 0.5, "1,2") if name != "dense" else ())


def findings(model: onnx.ModelProto, plan: Plan | None) -> list[Finding]:
    context = LintContext(model, plan, DOMAINS)
    return [f for rule in tensorrt_rules() for f in rule(context)]


def assert_taken(model: onnx.ModelProto, plan: Plan, first: str) -> None:
    """Check that no rule fires, and that exactly the versions before one do not take the graph."""
    assert findings(model, plan) == []
    assert [version for version, reasons in why_not(model, plan).items() if reasons] == before(first)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("batch", [(2, 2), (1, 4)], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("selection", ["native", "plugin"])
def test_emitted_graph_breaks_no_rule(tmp_path: Path, name: str, batch: tuple[int, int], selection: str) -> None:
    graph = lowered(model_of(name), tmp_path, target="trt-fp16", batch=batch, selection=selection)
    assert_taken(graph.model, graph.plan, "8.6")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("target", "first"), [("trt-fp32", "8.6"), ("trt-bf16", "10.0")])
def test_emitted_graph_of_another_precision_breaks_no_rule(tmp_path: Path, name: str, target: str, first: str) -> None:
    graph = lowered(model_of(name), tmp_path, target=target)
    assert_taken(graph.model, graph.plan, first)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("target", "selection"), [("trt-int8", "plugin"), ("trt-fp8", "native")])
def test_emitted_quantized_graph_breaks_no_rule(tmp_path: Path, name: str, target: str, selection: str) -> None:
    model, precision = model_of(name), cast(Precision, target.removeprefix("trt-"))
    quantization = made_up(model.config, precision)
    options: dict[str, Any] = {"target": target, "selection": selection, "quantization": quantization}
    graph = lowered(model, tmp_path, batch=(1, 4), **options)
    assert_taken(graph.model, graph.plan, "10.0")
    why = why_not(graph.model, graph.plan)["8.6"]
    assert "opset 19 is read from TensorRT 10.0 on" in why
    assert ("float8e4m3fn tensors are known from TensorRT 10.0 on" in why) == (precision == "fp8")


@pytest.mark.parametrize("opset", [18, 20])
def test_newer_opset_is_for_newer_versions(tmp_path: Path, opset: int) -> None:
    graph = lowered(model_of("evit"), tmp_path, target="trt-fp16", opset=opset)
    assert_taken(graph.model, graph.plan, "10.0")


def split(name: str, folder: Path, target: str, counts: Counts) -> tuple[Plan, list[onnx.ModelProto]]:
    model = model_of(name)
    plan = build_plan(model.config, model.stages, counts=counts, split=True)
    for plan_pass in PLAN_PASSES:
        plan = plan_pass(plan)
    paths = [folder / "stem.onnx", folder / "rest.onnx"]
    with WeightStore(folder / "model.onnx.data") as store:
        return plan, list(lower(plan, weight_arrays(model), TARGETS[target], paths, store, opset=17).values())


@pytest.mark.parametrize("name", adaptive.ADAPTIVE)
@pytest.mark.parametrize("target", TYPED)
@pytest.mark.parametrize(
    "counts",
    [
        pytest.param(Counts.SLOTS, id="static"),
        pytest.param(Counts.GIVEN, id="told"),
    ],
)
def test_stem_and_rest_break_no_rule(tmp_path: Path, name: str, target: str, counts: Counts) -> None:
    plan, graphs = split(name, tmp_path, target, counts)
    for graph in graphs:
        assert_taken(graph, plan, "10.0" if target == "trt-bf16" else "8.6")


@pytest.mark.parametrize("name", ["ats official", "sait mass"])
def test_portable_graph_loops(tmp_path: Path, name: str) -> None:
    """The dialect of the other targets has CumSum."""
    graph = lowered(model_of(name), tmp_path)
    assert {f.rule for f in findings(graph.model, graph.plan)} == {"loop"}


@pytest.mark.parametrize("name", adaptive.ADAPTIVE)
def test_counts_computed_in_the_graph_are_refused(tmp_path: Path, name: str) -> None:
    graph = lowered(model_of(name), tmp_path, counts=Counts.COMPUTED)
    assert "shape-from-data" in {f.rule for f in findings(graph.model, graph.plan)}


def test_bodies_beside_plugin_nodes_are_refused(tmp_path: Path) -> None:
    graph = lowered(model_of("dynamicvit"), tmp_path, selection="plugin")
    assert {f.rule for f in findings(graph.model, graph.plan)} == {"local-function"}
    del graph.model.functions[:]
    assert findings(graph.model, graph.plan) == []
