"""How a model is lowered, in order. Read this file and you know.

1. `build_plan`: backbone and stages become typed steps with token counts resolved.
2. `PLAN_PASSES` rewrite the steps (`--no-dead-rows` skips them).
3. `emit_graph` writes the steps in the target's dialect; selections are `edgeprune` nodes.
4. The target's graph passes lower those nodes and drop what is dead; `pack_rows` makes a batch of one image's graph.
5. `write_graph` streams the weights beside the graph.
6. The target's lint rules look at the file as written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from edgeprune.export.emit.emitter import emit_graph
from edgeprune.export.lint import LintContext, run_lint
from edgeprune.export.passes.eliminate_dead_rows import eliminate_dead_rows
from edgeprune.export.passes.fold_keys_and_values import fold_keys_and_values
from edgeprune.export.passes.pack_rows import pack_rows
from edgeprune.export.plan import Plan
from edgeprune.export.targets.base import Target
from edgeprune.export.writer import WeightStore, write_graph
from edgeprune.quantization.scheme import Quantization

PLAN_PASSES = (eliminate_dead_rows, fold_keys_and_values)


def run_plan_passes(plan: Plan) -> Plan:
    """Return the plan after every plan pass."""
    for plan_pass in PLAN_PASSES:
        plan = plan_pass(plan)
    return plan


def lower(
    plan: Plan,
    weights: Mapping[str, np.ndarray],
    target: Target,
    paths: Sequence[Path | None],
    store: WeightStore,
    *,
    opset: int,
    selection: str = "native",
    quantization: Quantization | None = None,
) -> dict[Path, onnx.ModelProto]:
    """Write the graph of a plan for a target and return it, weights as references; of a split plan stem and rest.

    Args:
        plan: after its passes.
        weights: state_dict as arrays.
        target: dialect, passes and rules.
        paths: the .onnx files, beside the store's file: one, or two for a split plan, of which None is not written.
        store: shared by all graphs of a bundle.
        opset: version of the standard operators.
        selection: "native" standard operators or "plugin" nodes with bodies.
        quantization: of the linear layers, for a target that quantizes.

    Raises:
        BuildError: `lint` when the graph breaks a rule of the target.
    """
    dialect = target.dialect(quantization) if target.quantizes else target.dialect()
    graphs = emit_graph(plan, dialect, weights, name=next(path.stem for path in paths if path), opset=opset)
    return {
        path: finish_graph(graph, plan, target, path, store, selection=selection, batch=plan.batch)
        for graph, path in zip(graphs, paths, strict=True)
        if path is not None
    }


def finish_graph(
    graph: gs.Graph,
    plan: Plan | None,
    target: Target,
    path: Path,
    store: WeightStore,
    *,
    selection: str,
    batch: tuple[int, int],
) -> onnx.ModelProto:
    """Apply the target's graph passes, write the graph and lint it; `plan` is None for a traced graph."""
    G_LOGGER.severity = G_LOGGER.ERROR
    for graph_pass in target.passes(selection, batch):
        graph = graph_pass(graph)
    if plan is not None and plan.packed:
        graph = pack_rows(graph, plan.packed, [stage.counts.kept for stage in plan.stages])
    model = write_graph(graph, path, store, ir_version=target.ir_version, bodies=target.bodies)
    run_lint(LintContext(model, plan, target.domains), target.rules(), target.name)
    return model
