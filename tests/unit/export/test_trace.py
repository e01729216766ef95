"""The fallback: modules the emitter does not know go through torch.onnx and the same graph passes and rules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from torch import Tensor, nn

from edgeprune.errors import BuildError
from edgeprune.export.pipeline import finish_graph
from edgeprune.export.targets.registry import TARGETS
from edgeprune.export.trace import TRACE_OPSET, trace_graph
from edgeprune.export.writer import WeightStore
from tests.helpers.lowering import run_onnx
from tests.helpers.modules import Pruner

IMAGE = (3, 32, 32)


class Compacting(nn.Module):
    """Keeps what is above zero: the number of tokens depends on the image."""

    def forward(self, images: Tensor) -> Tensor:
        values = images.flatten()
        return values[values.nonzero().squeeze(1)].sum().reshape(1, 1).expand(images.shape[0], 5)


class OneBatch(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :5].reshape(4, 5)


def traced(module: nn.Module, batch: tuple[int, int]) -> gs.Graph:
    return trace_graph(module.eval(), np.zeros((1, *IMAGE), np.float32), batch)


def finished(graph: gs.Graph, folder: Path, target: str, selection: str, batch: tuple[int, int]) -> Path:
    path = folder / "model.onnx"
    with WeightStore(folder / "model.onnx.data") as store:
        finish_graph(graph, None, TARGETS[target], path, store, selection=selection, batch=batch)
    return path


def assert_agrees(path: Path, module: nn.Module, sizes: tuple[int, ...]) -> None:
    for size in sizes:
        images = np.random.default_rng(size).standard_normal((size, *IMAGE), np.float32)
        with torch.inference_mode():
            wanted = module(torch.from_numpy(images)).numpy()
        np.testing.assert_allclose(run_onnx(path, {"images": images})["logits"], wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def programs() -> dict[tuple[int, int], onnx.ModelProto]:
    """Return the traced module for a fixed and for a dynamic batch; tracing takes seconds."""
    return {batch: gs.export_onnx(traced(Pruner(), batch)) for batch in ((2, 2), (1, 4))}


def test_our_ops_become_our_nodes(programs: dict[tuple[int, int], onnx.ModelProto]) -> None:
    graph = gs.import_onnx(programs[2, 2])
    ours = {node.op: node for node in graph.nodes if node.domain == "edgeprune"}
    assert set(ours) == {"TopKGather", "GatherTokens"}
    attrs = ours["TopKGather"].attrs
    assert {k: attrs[k] for k in ("k", "num_prefix_tokens", "order", "mode", "threshold")} == {
        "k": 12, "num_prefix_tokens": 1, "order": 0, "mode": 0, "threshold": 0.0
    }  # fmt: skip
    assert all(n.attrs["plugin_namespace"] == "edgeprune" and n.attrs["plugin_version"] == "1" for n in ours.values())
    assert graph.opset == TRACE_OPSET
    assert ([t.name for t in graph.inputs], [t.name for t in graph.outputs]) == (["images"], ["logits"])


@pytest.mark.parametrize(("target", "selection"), [("onnx", "native"), ("ort-cpu", "native"), ("onnx", "plugin")])
def test_dynamic_batch_runs_at_every_size(
    programs: dict[tuple[int, int], onnx.ModelProto], tmp_path: Path, target: str, selection: str
) -> None:
    path = finished(gs.import_onnx(programs[1, 4]), tmp_path, target, selection, (1, 4))
    assert_agrees(path, Pruner().eval(), (1, 3, 4))


@pytest.mark.parametrize("target", ["onnx", "ort-cpu"])
def test_fixed_batch_runs(programs: dict[tuple[int, int], onnx.ModelProto], tmp_path: Path, target: str) -> None:
    path = finished(gs.import_onnx(programs[2, 2]), tmp_path, target, "native", (2, 2))
    assert_agrees(path, Pruner().eval(), (2,))


def test_module_with_nonzero_is_refused_by_lint(tmp_path: Path) -> None:
    with pytest.raises(BuildError) as caught:
        finished(traced(Compacting(), (1, 1)), tmp_path, "onnx", "native", (1, 1))
    assert caught.value.code == "lint"
    assert "NonZero" in caught.value.message


def test_module_that_fixes_its_batch_is_refused_when_it_should_vary() -> None:
    with pytest.raises(BuildError) as caught:
        traced(OneBatch(), (1, 4))
    error = caught.value
    assert error.code == "trace"
    assert "1 to 4" in str(error.expected) and "x.shape[0]" in str(error.hint)
