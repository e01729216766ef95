"""The ladder of every op: torch reference = ONNX function run by ONNX Runtime = the same body inlined = flattened."""

from __future__ import annotations

import itertools
import math

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import TensorProto, helper

from edgeprune.errors import BuildError
from edgeprune.export.ops import DOMAIN, DOMAIN_VERSION, PLUGIN_FIELDS, gather_tokens, topk_gather
from edgeprune.export.ops.functions import function_for
from edgeprune.export.passes.lower_selection import attach_bodies, flatten_selection, inline_bodies
from edgeprune.pruning import ops
from tests.helpers.lowering import run_onnx
from tests.helpers.scores import awkward_batch

N, D, K = 9, 4, 5
VARIANTS = list(itertools.product([0, 1], [0, 1, 2]))  # order, mode
PREFIXES = [0, 1, 2]
BATCHES = {"fixed": 3, "dynamic": "batch"}
FLOAT, INT32 = TensorProto.FLOAT, TensorProto.INT32


def attrs_of(k: int, prefix: int, order: int, mode: int, threshold: float) -> dict[str, object]:
    return {"k": k, "num_prefix_tokens": prefix, "order": order, "mode": mode, "threshold": threshold, **PLUGIN_FIELDS}


def topk_model(
    batch: int | str, k: int, prefix: int, order: int, mode: int, threshold: float, *, opset: int = 17, n: int = N
) -> onnx.ModelProto:
    """Return a model of one TopKGather, and a GatherTokens at its indices, with their bodies as functions."""
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node(
            "TopKGather",
            ["scores", "tokens"],
            ["kept", "indices", "count"],
            "select",
            domain=DOMAIN,
            **attrs_of(k, prefix, order, mode, threshold),
        ),
        helper.make_node(
            "GatherTokens",
            ["tokens", "indices"],
            ["again"],
            "gather",
            domain=DOMAIN,
            num_prefix_tokens=prefix,
            **PLUGIN_FIELDS,
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "op",
        [info("scores", FLOAT, [batch, n]), info("tokens", FLOAT, [batch, prefix + n, D])],
        [
            info("kept", FLOAT, [batch, prefix + k, D]),
            info("indices", INT32, [batch, k]),
            info("count", INT32, [batch]),
            info("again", FLOAT, [batch, prefix + k, D]),
        ],
    )
    functions = [function_for("TopKGather", opset, order, mode), function_for("GatherTokens", opset)]
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    return helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=10)


def lowered_by(graph_pass: object, model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model after a graph pass, bodies gone."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.functions[:]
    graph = graph_pass(gs.import_onnx(copy))
    exported = gs.export_onnx(graph.cleanup().toposort(), ir_version=10)
    onnx.checker.check_model(exported, full_check=True)
    assert {node.domain for node in exported.graph.node} <= {"", "ai.onnx"}
    return exported


def reference(
    scores: np.ndarray, tokens: np.ndarray, k: int, prefix: int, order: int, mode: int, threshold: float
) -> dict[str, np.ndarray]:
    found = ops.topk_gather(torch.from_numpy(scores), torch.from_numpy(tokens), k, prefix, order, mode, threshold)
    kept, indices, count = (t.numpy() for t in found)
    return {"kept": kept, "indices": indices, "count": count, "again": kept}


def inputs(batch: int, prefix: int, seed: int, n: int = N) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(seed).standard_normal((batch, prefix + n, D), np.float32)
    return awkward_batch(batch, n, seed), tokens


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


# ------------------------------------------------------------------------------------------------ the ladder


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(("order", "mode"), VARIANTS)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_body_equals_reference(batch: int | str, order: int, mode: int, prefix: int) -> None:
    threshold = 0.25
    model = topk_model(batch, K, prefix, order, mode, threshold)
    inlined = lowered_by(inline_bodies, model)
    for seed in range(4):
        rows = batch if isinstance(batch, int) else 1 + 20 * seed
        scores, tokens = inputs(rows, prefix, seed)
        if mode == ops.MODE_MASS:  # sums of dyadic numbers are exact, so the order of summing does not matter
            scores = np.round(np.nan_to_num(scores, nan=np.nan, posinf=2, neginf=-2) * 16) / 64
        wanted = reference(scores, tokens, K, prefix, order, mode, threshold)
        feeds = {"scores": scores, "tokens": tokens}
        assert_same(run_onnx(model.SerializeToString(), feeds), wanted)
        assert_same(run_onnx(inlined.SerializeToString(), feeds), wanted)


@pytest.mark.parametrize("k", [1, 8, 67, 137, 196])
@pytest.mark.parametrize("batch", [1, 3])
def test_ties_of_a_long_sequence_go_to_the_lower_index(batch: int, k: int) -> None:
    """ONNX Runtime chooses among algorithms by K, N and batch; each must break ties alike."""
    model = topk_model(batch, k, 1, 0, 0, 0.0, n=196)
    rng = np.random.default_rng(k)
    tokens = rng.standard_normal((batch, 197, D), np.float32)
    for scores in (rng.integers(0, 3, (batch, 196)).astype(np.float32), np.zeros((batch, 196), np.float32)):
        wanted = reference(scores, tokens, k, 1, 0, 0, 0.0)
        feeds = {"scores": scores, "tokens": tokens}
        assert_same(run_onnx(model.SerializeToString(), feeds), wanted)
        assert_same(run_onnx(lowered_by(flatten_selection, model).SerializeToString(), feeds), wanted)


@pytest.mark.parametrize("opset", [17, 18, 19, 20, 21])
@pytest.mark.parametrize(("order", "mode"), VARIANTS)
def test_body_passes_the_full_check(opset: int, order: int, mode: int) -> None:
    model = topk_model("batch", K, 1, order, mode, 0.5, opset=opset)
    onnx.checker.check_model(model, full_check=True)
    scores, tokens = inputs(2, 1, 0)
    found = run_onnx(model.SerializeToString(), {"scores": scores, "tokens": tokens})
    np.testing.assert_array_equal(found["indices"], reference(scores, tokens, K, 1, order, mode, 0.5)["indices"])


@pytest.mark.parametrize("k", [1, N])
@pytest.mark.parametrize("order", [0, 1])
def test_body_equals_reference_at_the_ends_of_k(k: int, order: int) -> None:
    scores, tokens = inputs(6, 1, 5)
    model = topk_model("batch", k, 1, order, 0, 0.0)
    found = run_onnx(model.SerializeToString(), {"scores": scores, "tokens": tokens})
    assert_same(found, reference(scores, tokens, k, 1, order, 0, 0.0))


@pytest.mark.parametrize("threshold", [0.0, 0.125, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("mode", [1, 2])
def test_body_counts_uniform_scores_like_the_reference(mode: int, threshold: float) -> None:
    scores, tokens = np.full((2, 8), 1 / 8, np.float32), np.zeros((2, 8, D), np.float32)
    model = topk_model("batch", 3, 0, 0, mode, threshold, n=8)
    found = run_onnx(model.SerializeToString(), {"scores": scores, "tokens": tokens})
    assert_same(found, reference(scores, tokens, 3, 0, 0, mode, threshold))


def test_body_counts_mass_like_the_reference_but_for_rounding() -> None:
    threshold, seen = 0.6, 0
    model = topk_model("batch", K, 0, 0, ops.MODE_MASS, threshold, n=40).SerializeToString()
    rng = np.random.default_rng(0)
    scores = rng.random((300, 40), np.float32) ** 3
    scores /= scores.sum(1, keepdims=True)
    found = run_onnx(model, {"scores": scores, "tokens": np.zeros((300, 40, D), np.float32)})["count"]
    wanted = ops.count_tokens(torch.from_numpy(scores), K, ops.MODE_MASS, threshold).numpy()
    sums = np.cumsum(-np.sort(-scores.astype(np.float64), axis=1), axis=1)
    for row in range(300):
        if np.abs(sums[row] - threshold).min() > 1e-6:  # else the sum itself is the threshold, up to rounding
            assert found[row] == wanted[row]
            seen += 1
    assert seen > 290
    assert len(set(wanted.tolist())) > 5


def test_body_of_gather_tokens_runs_alone_for_any_batch() -> None:
    info = helper.make_tensor_value_info
    node = helper.make_node(
        "GatherTokens", ["tokens", "indices"], ["kept"], domain=DOMAIN, num_prefix_tokens=1, **PLUGIN_FIELDS
    )
    graph = helper.make_graph(
        [node],
        "gather",
        [info("tokens", FLOAT, ["batch", 1 + N, D]), info("indices", INT32, ["batch", K])],
        [info("kept", FLOAT, ["batch", 1 + K, D])],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    functions = [function_for("GatherTokens", 17)]
    model = helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    rng = np.random.default_rng(0)
    for batch in (1, 3):
        tokens = rng.standard_normal((batch, 1 + N, D), np.float32)
        indices = rng.integers(0, N, (batch, K)).astype(np.int32)  # repeats are allowed
        found = run_onnx(model.SerializeToString(), {"tokens": tokens, "indices": indices})["kept"]
        wanted = ops.gather_tokens(torch.from_numpy(tokens), torch.from_numpy(indices), 1).numpy()
        np.testing.assert_array_equal(found, wanted)


# ------------------------------------------------------------------------------------------------ flattened


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("batch", [1, 3])
def test_flat_form_equals_reference(batch: int, prefix: int) -> None:
    flat = lowered_by(flatten_selection, topk_model(batch, K, prefix, 0, 0, 0.0))
    assert "GatherND" not in {node.op_type for node in flat.graph.node}
    for seed in range(5):
        scores, tokens = inputs(batch, prefix, seed)
        scores = np.nan_to_num(scores, nan=0.5, posinf=np.inf, neginf=-np.inf)  # ties and infinities stay
        found = run_onnx(flat.SerializeToString(), {"scores": scores, "tokens": tokens})
        assert_same(found, reference(scores, tokens, K, prefix, 0, 0, 0.0))


@pytest.mark.parametrize(("order", "mode"), [v for v in VARIANTS if v != (0, 0)])
def test_flat_form_leaves_variants_to_the_body(order: int, mode: int) -> None:
    flat = lowered_by(flatten_selection, topk_model(2, K, 1, order, mode, 0.25))
    scores, tokens = inputs(2, 1, 3)
    scores = np.round(np.nan_to_num(scores, posinf=2, neginf=-2) * 16) / 64
    found = run_onnx(flat.SerializeToString(), {"scores": scores, "tokens": tokens})
    assert_same(found, reference(scores, tokens, K, 1, order, mode, 0.25))


# ------------------------------------------------------------------------------------------------ form


@pytest.mark.parametrize(("order", "mode"), VARIANTS)
def test_inlined_body_is_portable(order: int, mode: int) -> None:
    model = lowered_by(inline_bodies, topk_model("batch", K, 1, order, mode, 0.25))
    kinds = [node.op_type for node in model.graph.node]
    assert {"TopK", "GatherND"} <= set(kinds)
    assert not {"GatherElements", "NonZero", "Loop", "If", "Range"} & set(kinds)
    initializers = {t.name for t in model.graph.initializer}
    first = next(node for node in model.graph.node if node.op_type == "TopK")
    assert first.input[1] in initializers  # K is a constant of the graph


def test_attached_bodies_leave_the_nodes() -> None:
    graph = attach_bodies(gs.import_onnx(topk_model(1, K, 1, 0, 0, 0.0)))
    assert [node.op for node in graph.nodes] == ["TopKGather", "GatherTokens"]


def test_two_variants_cannot_share_one_function() -> None:
    graph = gs.import_onnx(topk_model(1, K, 1, 0, 0, 0.0))
    second = gs.import_onnx(topk_model(1, K, 1, 1, 0, 0.0)).nodes[0]
    graph.nodes.append(second)
    with pytest.raises(BuildError) as caught:
        attach_bodies(graph)
    assert caught.value.code == "no-lowering"
    assert caught.value.hint


@pytest.mark.parametrize("op", [topk_gather, gather_tokens])
def test_schema_names_what_the_function_takes(op: object) -> None:
    schema, function = op.schema(), function_for(op.NAME, 17)
    assert (schema.name, schema.domain, schema.since_version) == (function.name, DOMAIN, DOMAIN_VERSION)
    assert [p.name for p in schema.inputs] == list(function.input)
    assert [p.name for p in schema.outputs] == list(function.output)
    assert set(schema.attributes) == set(function.attribute)


def test_shape_rules_agree_with_the_reference() -> None:
    scores, tokens = torch.rand(2, N), torch.rand(2, 1 + N, D)
    outputs = ops.topk_gather(scores, tokens, K, 1)
    assert topk_gather.output_shapes(scores.shape, tokens.shape, K, 1) == tuple(list(t.shape) for t in outputs)
    indices = outputs[1]
    expected = list(ops.gather_tokens(tokens, indices, 1).shape)
    assert gather_tokens.output_shape(tokens.shape, indices.shape, 1) == expected


def test_nan_of_every_score_keeps_the_first_tokens() -> None:
    scores, tokens = np.full((1, N), math.nan, np.float32), inputs(1, 1, 0)[1]
    found = run_onnx(topk_model(1, 3, 1, 0, 0, 0.0).SerializeToString(), {"scores": scores, "tokens": tokens})
    assert found["indices"].tolist() == [[0, 1, 2]]


def scatter_model(batch: int | str, opset: int) -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    node = helper.make_node(
        "ScatterTokens", ["base", "tokens", "indices"], ["out"], "scatter", domain=DOMAIN, **PLUGIN_FIELDS
    )
    graph = helper.make_graph(
        [node],
        "op",
        [info("base", FLOAT, [batch, N, D]), info("tokens", FLOAT, [batch, K, D]), info("indices", INT32, [batch, K])],
        [info("out", FLOAT, [batch, N, D])],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    functions = [function_for("ScatterTokens", opset)]
    return helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=10)


@pytest.mark.parametrize("opset", [13, 17, 21])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_scattered_tokens_stand_in_their_places(batch: int | str, opset: int) -> None:
    rng = np.random.default_rng(4)
    base, tokens = (rng.standard_normal((3, n, D), np.float32) for n in (N, K))
    indices = np.stack([rng.permutation(N)[:K] for _ in range(3)]).astype(np.int32)
    expected = ops.scatter_tokens(*(torch.from_numpy(x) for x in (base, tokens, indices))).numpy()
    rest = np.delete(np.arange(N), indices[1])
    assert np.array_equal(expected[1][indices[1]], tokens[1])
    assert np.array_equal(expected[1][rest], base[1][rest])
    model, feeds = scatter_model(batch, opset), {"base": base, "tokens": tokens, "indices": indices}
    for variant in (model, lowered_by(inline_bodies, model)):
        assert np.array_equal(run_onnx(variant.SerializeToString(), feeds)["out"], expected)
