"""The ragged form: one graph for images that keep different numbers of tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from edgeprune.errors import InputError
from edgeprune.export.pipeline import PLAN_PASSES
from edgeprune.export.plan import Counts
from edgeprune.export.request import ExportRequest, resolve
from tests.helpers.adaptive import ADAPTIVE, model_of
from tests.helpers.lowering import Lowered, lowered, noise, relative_error
from tests.helpers.pruned import counts_of, kept_sets, run

NAMES = [name for name in ADAPTIVE if "batch mean" not in name]
BATCH = 5


def ragged(
    name: str, folder: Path, *, short: bool = True, prefix: int = 1, batch: int = BATCH
) -> tuple[Lowered, object]:
    model = model_of(name, prefix)
    passes = PLAN_PASSES if short else ()
    return lowered(model, folder, target="ort-cpu", passes=passes, counts=Counts.COMPUTED, packed=batch), model


@pytest.mark.parametrize(("short", "prefix"), [(True, 1), (False, 2), (True, 5)])
@pytest.mark.parametrize("name", NAMES)
def test_every_image_gets_what_it_gets_alone(tmp_path: Path, name: str, short: bool, prefix: int) -> None:
    graph, model = ragged(name, tmp_path, short=short, prefix=prefix)
    images = noise(model.config, BATCH)
    ours, theirs = graph.run(images), run(model, torch.from_numpy(images))
    assert relative_error(ours["logits"], theirs.logits.numpy()) <= 1e-4
    assert ours["kept_counts"].tolist() == counts_of(theirs)
    assert ours["overflow"].tolist() == theirs.overflow.int().tolist()
    for b, image in enumerate(kept_sets(theirs)):
        assert [set(ours[f"kept_indices_{s}"][b].tolist()) - {-1} for s in range(len(image))] == image


def test_images_of_the_tests_keep_different_numbers(tmp_path: Path) -> None:
    model = model_of("asvit")
    counts = counts_of(run(model, torch.from_numpy(noise(model.config, BATCH))))
    assert len({tuple(image) for image in counts}) > 1


def test_neighbours_do_not_matter(tmp_path: Path) -> None:
    graph, model = ragged("ats official", tmp_path)
    images = noise(model.config, BATCH)
    order = np.random.default_rng(3).permutation(BATCH)
    straight, shuffled = graph.run(images), graph.run(images[order])
    assert relative_error(shuffled["logits"], straight["logits"][order]) <= 1e-5
    assert np.array_equal(shuffled["kept_counts"], straight["kept_counts"][order])


@pytest.mark.parametrize("threshold", [1e3, -1.0], ids=["no token", "every token"])
def test_image_may_keep_nothing_or_everything(tmp_path: Path, threshold: float) -> None:
    model = model_of("asvit")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("keep_threshold"):
                parameter.fill_(threshold)
    graph = lowered(model, tmp_path, target="ort-cpu", counts=Counts.COMPUTED, packed=2)
    images = noise(model.config, 2)
    theirs = run(model, torch.from_numpy(images))
    assert relative_error(graph.run(images)["logits"], theirs.logits.numpy()) <= 1e-4
    assert set(np.ravel(counts_of(theirs))) == ({0} if threshold > 0 else {16})


def test_projections_are_there_once_and_attention_per_image(tmp_path: Path) -> None:
    graph, _ = ragged("asvit", tmp_path)
    names = [node.name for node in graph.model.graph.node]
    assert names.count("blocks.1.mlp.fc1") == 1
    attention = [
        n for n in graph.model.graph.node if n.op_type == "MultiHeadAttention" and n.name.startswith("blocks.1.")
    ]
    assert len(attention) == BATCH
    onnx.checker.check_model(str(graph.path))


@pytest.mark.parametrize(("target", "batch"), [("onnx", (8, 8)), ("ort-cpu", (1, 1)), ("ort-cpu", (1, 8))])
def test_it_needs_a_fixed_batch_on_onnx_runtime(target: str, batch: tuple[int, int]) -> None:
    request = ExportRequest(
        model="vit_digits", method="ats", adaptive="ragged", target=target, batch=batch, random_weights=True
    )
    with pytest.raises(InputError) as error:
        resolve(request)
    assert error.value.code == "adaptive"
