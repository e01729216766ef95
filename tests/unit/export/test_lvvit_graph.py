"""LV-ViT as a graph: the stem without BatchNorm, scaled branches, the best of the tokens that are left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from edgeprune.export.pipeline import PLAN_PASSES
from edgeprune.export.plan import Head
from tests.helpers.lowering import (
    Lowered,
    lowered,
    noise,
    random_model,
    reference,
    relative_error,
    small,
    stages_of,
)
from tests.helpers.reference_vit import LVVIT

TARGETS = ["onnx", "ort-cpu"]
METHODS: dict[str, tuple[str, dict[str, str]]] = {
    "dense": ("dense", {}),
    "dynamicvit": ("dynamicvit", {}),
    "evit fused": ("evit", {}),
    "evit unfused": ("evit", {"fuse": "false"}),
    "random": ("random", {}),
}


def made(folder: Path, method: str, target: str, text: str | None = "1", **options):
    fields = options.pop("fields", {})
    config = small(**{"depth": 3, **LVVIT, **fields})
    name, settings = METHODS[method]
    model = random_model(config, stages_of(config, name, 0.6, text, **settings))
    return lowered(model, folder, target=target, **options), model


def assert_agrees(graph: Lowered, model, sizes: tuple[int, ...]) -> None:
    for size in sizes:
        images = noise(model.config, size, seed=10 + size)
        ours, theirs = graph.run(images), reference(model, images)
        assert relative_error(ours["logits"], theirs["logits"]) <= 1e-5
        for name in theirs.keys() - {"logits"}:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [(1, 1), (2, 2), (1, 4)], ids=["one", "two", "dynamic"])
@pytest.mark.parametrize("passes", [PLAN_PASSES, ()], ids=["no dead rows", "dead rows"])
def test_graph_agrees_with_torch(tmp_path: Path, method: str, target: str, batch: tuple[int, int], passes) -> None:
    graph, model = made(tmp_path, method, target, batch=batch, passes=passes)
    assert_agrees(graph, model, tuple({*batch}))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", ["evit fused", "evit unfused"])
def test_graph_agrees_with_torch_when_the_last_block_prunes(tmp_path: Path, method: str, target: str) -> None:
    graph, model = made(tmp_path, method, target, "0,2")
    assert_agrees(graph, model, (1,))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "fields",
    [
        {"image_size": (48, 32), "patch_size": (16, 8), "in_chans": 1},
        {"reg_tokens": 2},
        {"stem": "patch", "residual_scale": 3.0},
        {"aux_head": False},
    ],
    ids=["oblong, grey", "registers", "no stem", "no aux head"],
)
def test_graph_of_a_variant_agrees_with_torch(tmp_path: Path, fields: dict[str, object], target: str) -> None:
    graph, model = made(tmp_path, "dynamicvit", target, fields=fields, batch=(2, 2))
    assert_agrees(graph, model, (2,))


@pytest.mark.parametrize("opset", [17, 18, 20])
def test_portable_graph_passes_the_full_check(tmp_path: Path, opset: int) -> None:
    graph, model = made(tmp_path, "dynamicvit", "onnx", opset=opset, batch=(1, 2))
    onnx.checker.check_model(str(graph.path), full_check=True)
    assert_agrees(graph, model, (1, 2))


@pytest.mark.parametrize("target", TARGETS)
def test_batch_norm_is_folded_and_the_statistics_matter(tmp_path: Path, target: str) -> None:
    graph, model = made(tmp_path / "a", "dense", target, None)
    assert "BatchNormalization" not in graph.ops()
    assert sum(n.op_type == "Relu" for n in graph.model.graph.node) == 3
    assert not [t.name for t in graph.model.graph.initializer if "running" in t.name]
    before = graph.run(noise(model.config))["logits"]
    model.patch_embed.bn2.running_var.mul_(9)
    changed = lowered(model, tmp_path / "b", target=target)
    assert relative_error(changed.run(noise(model.config))["logits"], before) > 1e-3
    assert_agrees(changed, model, (1,))


@pytest.mark.parametrize("target", TARGETS)
def test_head_reads_the_rows_that_are_left(tmp_path: Path, target: str) -> None:
    graph, model = made(tmp_path, "dynamicvit", target)
    kept = model.stages[0].counts.kept
    assert graph.plan.steps[-1] == Head(1 + kept)
    (best,) = (n for n in graph.model.graph.node if n.op_type == "ReduceMax")
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.model.graph.value_info}
    assert shapes[best.input[0]] == [1, kept, 5]


def test_macs_count_the_aux_head_on_the_rows_that_are_left(tmp_path: Path) -> None:
    graph, model = made(tmp_path, "dynamicvit", "onnx")
    (head,) = (count for step, count in graph.plan.macs_by_step() if isinstance(step, Head))
    assert head == (1 + model.stages[0].counts.kept) * 32 * 5
