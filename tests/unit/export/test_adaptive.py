"""Graphs of every further method agree with the torch model, whatever the image keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from edgeprune.export.pipeline import PLAN_PASSES
from edgeprune.pruning.model import PrunedViT
from tests.helpers.adaptive import ADAPTIVE, FIXED, METHODS, model_of
from tests.helpers.lowering import Lowered, lowered, noise, relative_error
from tests.helpers.pruned import counts_of, kept_sets, run

TARGETS = ["onnx", "ort-cpu"]
# every batch and every prefix with the plan passes and without
CASES = [
    ((1, 1), True, 1),
    ((1, 1), False, 2),
    ((3, 3), True, 5),
    ((3, 3), False, 1),
    ((1, 4), True, 2),
    ((1, 4), False, 5),
]
FORBIDDEN = {"NonZero", "Loop", "If", "Unique", "Scan", "Compress"}


def graph_of(model: PrunedViT, folder: Path, target: str, batch: tuple[int, int], short: bool = True) -> Lowered:
    return lowered(model, folder, target=target, batch=batch, passes=PLAN_PASSES if short else ())


def assert_agrees(graph: Lowered, model: PrunedViT, images: np.ndarray, *, adaptive: bool) -> None:
    ours, theirs = graph.run(images), run(model, torch.from_numpy(images))
    assert relative_error(ours["logits"], theirs.logits.numpy()) <= 1e-4
    for b, image in enumerate(kept_sets(theirs)):
        assert [set(ours[f"kept_indices_{s}"][b].tolist()) - {-1} for s in range(len(image))] == image
    assert ours["kept_counts"].dtype == np.int32
    assert ours["kept_counts"].tolist() == counts_of(theirs)
    assert ("overflow" in ours) == adaptive
    if adaptive:
        assert ours["overflow"].dtype == np.int32
        assert ours["overflow"].tolist() == theirs.overflow.int().tolist()


@pytest.mark.parametrize(("batch", "short", "prefix"), CASES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", METHODS)
def test_graph_agrees_with_torch(
    tmp_path: Path, name: str, target: str, batch: tuple[int, int], short: bool, prefix: int
) -> None:
    model = model_of(name, prefix)
    graph = graph_of(model, tmp_path, target, batch, short)
    assert not {op.rpartition(".")[2] for op in graph.ops()} & FORBIDDEN
    for size in {*batch, min(batch[0] + 1, batch[1])}:
        for seed in (11, 12):
            assert_agrees(graph, model, noise(model.config, size, seed), adaptive=name in ADAPTIVE)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ADAPTIVE)
def test_graph_follows_images_that_keep_different_numbers(tmp_path: Path, name: str, target: str) -> None:
    model = model_of(name)
    graph = graph_of(model, tmp_path, target, (1, 1))
    seen = set()
    for seed in range(20, 28):
        images = noise(model.config, 1, seed)
        assert_agrees(graph, model, images, adaptive=True)
        seen.add(tuple(graph.run(images)["kept_counts"][0].tolist()))
    assert len(seen) > 1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [n for n in METHODS if n != "asvit, batch mean"])
def test_image_alone_gives_what_it_gives_in_a_batch(tmp_path: Path, name: str, target: str) -> None:
    model = model_of(name)
    graph = graph_of(model, tmp_path, target, (1, 4))
    images = noise(model.config, 4, 5)
    together = graph.run(images)
    for i in range(4):
        alone = graph.run(images[i : i + 1])
        np.testing.assert_allclose(alone["logits"][0], together["logits"][i], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(alone["kept_counts"][0], together["kept_counts"][i])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", METHODS)
def test_k_of_every_top_k_is_a_constant_of_the_schedule(tmp_path: Path, name: str, target: str) -> None:
    """Slots of a stage, all tokens that reach it, or the pairs it merges."""
    model = model_of(name)
    graph = graph_of(model, tmp_path, target, (2, 2))
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.model.graph.initializer if not t.external_data}
    found = [int(constants[n.input[1]].item()) for n in graph.model.graph.node if n.op_type == "TopK"]
    counts = [s.counts for s in model.stages]
    pairs = {c.tokens_in // 2 for c in counts} | {c.kept - (c.tokens_in + 1) // 2 for c in counts}  # P is 1
    allowed = {c.kept for c in counts} | {c.tokens_in for c in counts} | (pairs if "tome" in name else set())
    assert set(found) <= allowed


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["cropr without fusion", "sait topk"])
def test_fixed_counts_need_one_top_k_of_the_count(tmp_path: Path, name: str, target: str) -> None:
    model = model_of(name)
    graph = graph_of(model, tmp_path, target, (1, 1))
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.model.graph.initializer if not t.external_data}
    found = [int(constants[n.input[1]].item()) for n in graph.model.graph.node if n.op_type == "TopK"]
    assert found == [s.counts.kept for s in model.stages]


@pytest.mark.parametrize("name", METHODS)
def test_outputs_are_declared(tmp_path: Path, name: str) -> None:
    model = model_of(name)
    graph = graph_of(model, tmp_path, "onnx", (2, 2))
    shapes = {
        v.name: (v.type.tensor_type.elem_type, [d.dim_value for d in v.type.tensor_type.shape.dim])
        for v in graph.model.graph.output
    }
    S, integer = len(model.stages), onnx.TensorProto.INT32
    expected = {"logits": (onnx.TensorProto.FLOAT, [2, 5]), "kept_counts": (integer, [2, S])}
    expected |= {f"kept_indices_{s}": (integer, [2, stage.counts.kept]) for s, stage in enumerate(model.stages)}
    expected |= {"overflow": (integer, [2])} if name in ADAPTIVE else {}
    assert shapes == expected


def test_both_kinds_are_covered() -> None:
    assert len(ADAPTIVE) == 7 and len(FIXED) == 5
