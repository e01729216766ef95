"""Every rule fires on a graph made to break it, and on no graph the emitter writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeprune.errors import BuildError
from edgeprune.export.lint import LintContext, Rule, run_lint
from edgeprune.export.lint.constant_k import MAX_K, constant_k
from edgeprune.export.lint.data_dependent_ops import DATA_DEPENDENT, data_dependent_ops
from edgeprune.export.lint.foreign_domains import foreign_domains
from edgeprune.export.lint.tokens_shrink import infer_shapes, tokens_shrink
from edgeprune.export.plan import Plan, build_plan
from edgeprune.export.targets.registry import TARGETS
from tests.helpers.lowering import lowered, random_model, small, stages_of

STANDARD = ("", "ai.onnx")
RULES: dict[str, Rule] = {
    "foreign-domain": foreign_domains,
    "data-dependent": data_dependent_ops,
    "constant-k": constant_k,
    "tokens-shrink": tokens_shrink,
}


def context(
    nodes: Sequence[onnx.NodeProto],
    *,
    constants: dict[str, np.ndarray] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
    plan: Plan | None = None,
    domains: tuple[str, ...] = STANDARD,
) -> LintContext:
    info = helper.make_tensor_value_info
    initializers = [numpy_helper.from_array(v, k) for k, v in (constants or {}).items()]
    graph = helper.make_graph(
        list(nodes),
        "broken",
        [info("x", TensorProto.FLOAT, [1, 8])],
        [info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        initializers,
    )
    return LintContext(helper.make_model(graph, functions=list(functions)), plan, domains)


def node(op: str, *inputs: str, domain: str = "", name: str = "culprit", **attrs: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), ["y"], name, domain=domain, **attrs)


# ------------------------------------------------------------------------------------------------ data dependence


@pytest.mark.parametrize("op", ["NonZero", "Loop", "If", "Unique", "Compress", "Scan", "NonMaxSuppression"])
def test_operator_with_shapes_that_depend_on_data_is_refused(op: str) -> None:
    (finding,) = data_dependent_ops(context([node(op, "x")]))
    assert (finding.rule, finding.node) == ("data-dependent", "culprit")
    assert op in finding.reason
    assert op in DATA_DEPENDENT


def test_data_dependence_inside_a_function_is_refused() -> None:
    imports = [helper.make_opsetid("", 17)]
    body = helper.make_function("edgeprune", "F", ["x"], ["y"], [node("NonZero", "x", name="")], imports)
    (finding,) = data_dependent_ops(context([node("F", "x", domain="edgeprune")], functions=[body]))
    assert finding.node == "y"


# ------------------------------------------------------------------------------------------------ domains


def test_operator_of_an_unknown_domain_is_refused() -> None:
    (finding,) = foreign_domains(context([node("Gelu", "x", domain="com.microsoft")]))
    assert (finding.rule, finding.node) == ("foreign-domain", "culprit")
    assert "com.microsoft.Gelu" in finding.reason


def test_operator_of_the_targets_domain_is_accepted() -> None:
    domains = TARGETS["ort-cpu"].domains
    assert foreign_domains(context([node("Gelu", "x", domain="com.microsoft")], domains=domains)) == []
    assert len(foreign_domains(context([node("Gelu", "x", domain="com.example")], domains=domains))) == 1


def test_operator_with_a_body_is_accepted() -> None:
    body = helper.make_function("edgeprune", "F", ["x"], ["y"], [node("Identity", "x")], [helper.make_opsetid("", 17)])
    assert foreign_domains(context([node("F", "x", domain="edgeprune")], functions=[body])) == []
    assert len(foreign_domains(context([node("G", "x", domain="edgeprune")], functions=[body]))) == 1


def test_body_with_an_operator_of_an_unknown_domain_is_refused() -> None:
    inside = node("Gelu", "x", domain="com.microsoft", name="")
    body = helper.make_function("edgeprune", "F", ["x"], ["y"], [inside], [helper.make_opsetid("", 17)])
    (finding,) = foreign_domains(context([node("F", "x", domain="edgeprune")], functions=[body]))
    assert "com.microsoft.Gelu" in finding.reason


# ------------------------------------------------------------------------------------------------ K of TopK


def topk(k: str) -> onnx.NodeProto:
    return helper.make_node("TopK", ["x", k], ["values", "y"], "culprit")


def test_computed_k_is_refused() -> None:
    shape = helper.make_node("Shape", ["x"], ["k"], "shape")
    (finding,) = constant_k(context([shape, topk("k")]))
    assert (finding.rule, finding.node) == ("constant-k", "culprit")
    assert "computed" in finding.reason


@pytest.mark.parametrize(("k", "found"), [(1, 0), (MAX_K, 0), (MAX_K + 1, 1)])
def test_k_above_the_limit_is_refused(k: int, found: int) -> None:
    findings = constant_k(context([topk("k")], constants={"k": np.array([k])}))
    assert len(findings) == found
    assert all(str(MAX_K) in f.reason and str(k) in f.reason for f in findings)


# ------------------------------------------------------------------------------------------------ shrinking


@pytest.mark.parametrize("target", ["onnx", "ort-cpu"])
@pytest.mark.parametrize("method", ["dynamicvit", "evit", "random"])
@pytest.mark.parametrize("batch", [(1, 1), (2, 2), (1, 4)], ids=["one", "fixed", "dynamic"])
def test_graph_whose_tokens_do_not_shrink_is_refused(
    tmp_path: Path, method: str, target: str, batch: tuple[int, int]
) -> None:
    """A graph that only masks has the shapes of the dense one."""
    config = small()
    masked = lowered(random_model(config), tmp_path, target=target, batch=batch, passes=())
    promised = build_plan(config, stages_of(config, method, 0.5, "2"), batch=batch)
    findings = tokens_shrink(LintContext(masked.model, promised, TARGETS[target].domains))
    assert [f.node for f in findings] == [f"blocks.{i}.mlp.fc1" for i in (2, 3)]
    assert {f.rule for f in findings} == {"tokens-shrink"}
    assert "where the plan keeps" in findings[0].reason


def test_declared_shapes_are_not_believed(tmp_path: Path) -> None:
    config = small()
    masked = lowered(random_model(config), tmp_path, passes=())
    for info in masked.model.graph.value_info:
        if info.name.startswith("blocks.3.mlp.fc1"):
            info.type.tensor_type.shape.dim[1].dim_value = 9
    promised = build_plan(config, stages_of(config, "dynamicvit", 0.5, "3"))
    assert [f.node for f in tokens_shrink(LintContext(masked.model, promised, STANDARD))] == ["blocks.3.mlp.fc1"]


def test_missing_block_is_refused(tmp_path: Path) -> None:
    model = random_model(small(depth=2))
    graph = lowered(model, tmp_path, passes=())
    findings = tokens_shrink(LintContext(graph.model, build_plan(small(depth=3), ()), STANDARD))
    assert [f.node for f in findings] == ["blocks.2.mlp.fc1"]


def test_traced_graph_has_no_plan_to_hold() -> None:
    assert tokens_shrink(context([node("Identity", "x")])) == []


@pytest.mark.parametrize("selection", ["native", "plugin"])
@pytest.mark.parametrize("target", ["onnx", "ort-cpu"])
def test_shapes_are_inferred_for_every_operator(tmp_path: Path, target: str, selection: str) -> None:
    config = small(depth=2)
    model = random_model(config, stages_of(config, "evit", 0.5, "0"))
    graph = lowered(model, tmp_path, target=target, selection=selection, batch=(1, 4))
    shapes = infer_shapes(graph.model, 4)
    missing = [o for n in graph.model.graph.node for o in n.output if o not in shapes or None in shapes[o]]
    assert set(missing) <= {v.name for v in graph.model.graph.output}


# ------------------------------------------------------------------------------------------------ together


@pytest.mark.parametrize("selection", ["native", "plugin"])
@pytest.mark.parametrize("target", ["onnx", "ort-cpu"])
@pytest.mark.parametrize("method", ["dense", "dynamicvit", "evit", "random"])
def test_emitted_graph_breaks_no_rule(tmp_path: Path, method: str, target: str, selection: str) -> None:
    config = small(depth=2)
    model = random_model(config, stages_of(config, method, 0.5, "1"))
    graph = lowered(model, tmp_path, target=target, batch=(2, 2), selection=selection)
    for name, rule in RULES.items():
        assert rule(LintContext(graph.model, graph.plan, TARGETS[target].domains)) == [], name


def test_all_findings_are_reported_together() -> None:
    broken = context([node("NonZero", "x", name="first"), node("Gelu", "x", domain="com.example", name="second")])
    with pytest.raises(BuildError) as caught:
        run_lint(broken, tuple(RULES.values()), "onnx")
    error = caught.value
    assert (error.code, error.exit_code) == ("lint", 4)
    assert "'onnx'" in error.message and "first" in error.message and "second" in error.message
    assert {f["rule"] for f in error.details["findings"]} == {"foreign-domain", "data-dependent"}


@pytest.mark.parametrize("target", ["onnx", "ort-cpu"])
def test_targets_apply_every_rule(target: str) -> None:
    rules = TARGETS[target].rules
    assert rules is not None and set(rules()) == set(RULES.values())
