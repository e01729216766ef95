from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgeprune.checks import compare as module
from edgeprune.checks.compare import compare, draw_images, failures, passes
from edgeprune.errors import InputError
from edgeprune.models.config import ViTConfig
from edgeprune.pruning import get_method
from edgeprune.pruning.base import StageRequest
from edgeprune.pruning.model import PrunedViT
from edgeprune.runtime.manifest import ParityInfo
from tests.helpers.lowering import random_model

CONFIG = ViTConfig("tiny", (16, 16), (4, 4), num_classes=5, embed_dim=16, depth=4, num_heads=2)


@pytest.fixture
def model() -> PrunedViT:
    torch.manual_seed(0)
    stages = get_method("dynamicvit").stages(CONFIG, StageRequest(0.7), {})
    made = PrunedViT(CONFIG, stages).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return made


class Graph:
    """What a faithful graph does, with a fault to inject and the batch sizes it was called with."""

    def __init__(self, model: PrunedViT, *, add: float = 0.0, swap: int = 0, names: bool = True) -> None:
        self.model, self.add, self.swap, self.names = model, add, swap, names
        self.sizes: list[int] = []

    def __call__(self, images: np.ndarray) -> dict[str, Any]:
        self.sizes.append(len(images))
        with torch.no_grad():
            out = self.model.run(torch.from_numpy(images))
        outputs = {"logits": out.logits.numpy() + np.float32(self.add)}
        for s, kept in enumerate(out.kept):
            ids = kept.numpy().astype(np.int32)
            ids[:, : self.swap] = 1000
            if self.names:
                outputs[f"kept_indices_{s}"] = ids
        return outputs


def test_faithful_graph_passes(model: PrunedViT) -> None:
    parity = compare(Graph(model), model, batch=1)
    assert passes(parity)
    assert (parity.images, parity.max_rel_error < 1e-6, parity.top1_agreement, parity.kept_overlap) == (8, True, 1, 1)


def test_shifted_logits_fail(model: PrunedViT) -> None:
    parity = compare(Graph(model, add=0.01), model, batch=1)
    assert parity.max_abs_error == pytest.approx(0.01, rel=1e-3)
    assert failures(parity)[0].startswith("logits differ by")


def test_not_a_number_fails(model: PrunedViT) -> None:
    assert not passes(compare(Graph(model, add=float("nan")), model, batch=1))


def test_other_kept_tokens_fail_even_when_the_logits_agree(model: PrunedViT) -> None:
    parity = compare(Graph(model, swap=1), model, batch=1)
    assert parity.kept_overlap is not None
    assert parity.kept_overlap < 1
    assert [f.split()[0] for f in failures(parity)] == ["kept"]


def test_kept_tokens_are_not_compared_when_they_are_not_exported(model: PrunedViT) -> None:
    assert compare(Graph(model, names=False), model, batch=1).kept_overlap is None


def test_another_best_class_fails() -> None:
    parity = ParityInfo(images=8, max_abs_error=0, max_rel_error=0, top1_agreement=0.875, tolerance=1e-4)
    assert failures(parity) == ["top-1 agrees on 87.5% of the images, the limit is 100.0%"]


def test_tolerance_replaces_the_limit_of_the_precision(model: PrunedViT) -> None:
    assert passes(compare(Graph(model, add=1e-3), model, batch=1, tolerance=0.5))


def test_fixed_batch_is_filled_up(model: PrunedViT) -> None:
    graph = Graph(model)
    assert compare(graph, model, batch=3, images=8).images == 8
    assert graph.sizes == [3, 3, 3]


def test_batch_range_is_used_from_end_to_end(model: PrunedViT) -> None:
    graph = Graph(model)
    compare(graph, model, batch=(1, 4), images=8)
    assert graph.sizes == [1, 4, 3]


def test_any_module_can_be_the_reference(model: PrunedViT) -> None:
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3)).eval()
    parity = compare(lambda x: {"logits": plain(torch.from_numpy(x)).detach().numpy()}, plain, batch=1, shape=(3, 4, 4))
    assert passes(parity)
    assert parity.kept_overlap is None


def test_inputs_are_reproducible_and_of_both_kinds() -> None:
    first, again = (draw_images((3, 32, 48), 4, np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(first, again)
    assert first.dtype == np.float32
    step = np.abs(np.diff(first, axis=-1)).mean((1, 2, 3)) / first.std((1, 2, 3))
    assert step[0::2].max() < 0.7 * step[1::2].min()  # neighbours of a smooth image are alike


def say_tied(monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    monkeypatch.setattr(module, "_find_ties", lambda model, output, tie: np.full(len(output.logits), tied))


class Flips(Graph):
    """Keeps another token of the first images it sees, as rounding may."""

    def __init__(self, model: PrunedViT, images: int) -> None:
        super().__init__(model)
        self.left = images

    def __call__(self, images: np.ndarray) -> dict[str, Any]:
        outputs = super().__call__(images)
        for i in range(min(self.left, len(images))):
            outputs["kept_indices_0"][i, 0] = 1000
            outputs["logits"][i] += 0.1
        self.left -= min(self.left, len(images))
        return outputs


def test_disagreement_at_a_tie_is_set_aside_and_replaced(model: PrunedViT, monkeypatch: pytest.MonkeyPatch) -> None:
    say_tied(monkeypatch, True)
    graph = Flips(model, 2)
    parity = compare(graph, model, batch=1, images=6)
    assert (parity.images, parity.undecided, parity.kept_overlap) == (6, 2, 1)
    assert parity.max_rel_error < 1e-6
    assert len(graph.sizes) == 8
    assert passes(parity)


def test_disagreement_without_a_tie_fails_at_once(model: PrunedViT, monkeypatch: pytest.MonkeyPatch) -> None:
    say_tied(monkeypatch, False)
    graph = Flips(model, 1)
    parity = compare(graph, model, batch=1, images=6)
    assert (parity.images, parity.undecided, len(graph.sizes)) == (6, 0, 6)
    assert [f.split()[0] for f in failures(parity)] == ["logits", "kept"]


def test_agreement_at_a_tie_counts(model: PrunedViT, monkeypatch: pytest.MonkeyPatch) -> None:
    say_tied(monkeypatch, True)
    parity = compare(Graph(model), model, batch=1, images=6)
    assert (parity.images, parity.undecided) == (6, 0)


@pytest.mark.parametrize("fault", [{"add": 0.1}, {"add": float("nan")}, {"swap": 1}])
def test_fault_that_is_everywhere_fails_though_every_image_is_a_tie(
    model: PrunedViT, monkeypatch: pytest.MonkeyPatch, fault: dict[str, Any]
) -> None:
    say_tied(monkeypatch, True)
    graph = Graph(model, **fault)
    parity = compare(graph, model, batch=1, images=3)
    assert (parity.images, parity.undecided) == (0, 3 * module.DRAWS)
    assert len(graph.sizes) == 3 * module.DRAWS
    assert "more than the 0 others" in failures(parity)[-1]


def test_more_undecided_than_decided_images_fail() -> None:
    figures = {"max_abs_error": 0, "max_rel_error": 0, "top1_agreement": 1, "tolerance": 1e-4}
    assert passes(ParityInfo(images=4, undecided=4, **figures))
    assert not passes(ParityInfo(images=4, undecided=5, **figures))


def test_tie_is_found_at_the_edge_of_the_selection_only(model: PrunedViT) -> None:
    out = model.run(torch.from_numpy(draw_images((3, 16, 16), 2, np.random.default_rng(0))))
    k = model.stages[0].selector.k
    scores = torch.linspace(1, 0, 16).repeat(2, 1)
    scores[1, k] = scores[1, k - 1]  # the best dropped token of the second image
    scores[:, 1] = scores[:, 0]  # a tie among kept tokens changes nothing
    out.scores = [scores, *(torch.linspace(1, 0, s.shape[1]).repeat(2, 1) for s in out.scores[1:])]
    assert module._find_ties(model, out, 1e-5).tolist() == [False, True]


def adaptive(count: str = "image", keep_rate: float = 1.0) -> PrunedViT:
    """Return a model whose images keep different numbers of tokens."""
    method = get_method("asvit")
    model = random_model(CONFIG, method.stages(CONFIG, StageRequest(keep_rate), method.parse_options({"count": count})))
    with torch.no_grad():
        for stage in model.stages:
            model.scorer_module(stage).keep_threshold.fill_(0.06)
    return model


class Counting(Graph):
    """Tells counts and overflow too; `more` is added to the first count, `over` flips the overflow."""

    def __init__(self, model: PrunedViT, *, more: int = 0, over: bool = False) -> None:
        super().__init__(model)
        self.more, self.over = more, over

    def __call__(self, images: np.ndarray) -> dict[str, Any]:
        outputs = super().__call__(images)
        with torch.no_grad():
            out = self.model.run(torch.from_numpy(images))
        outputs["kept_counts"] = torch.stack(out.counts, 1).int().numpy()
        outputs["kept_counts"][:, 0] += self.more
        outputs["overflow"] = (out.overflow ^ self.over).int().numpy()
        return outputs


@pytest.mark.parametrize("keep_rate", [1.0, 0.5])
def test_counts_and_overflow_are_compared(keep_rate: float) -> None:
    model = adaptive(keep_rate=keep_rate)
    parity = compare(Counting(model), model, batch=(1, 3), images=7)
    assert (parity.images, parity.counts_agreement, parity.kept_overlap) == (7, 1, 1)
    assert passes(parity)


@pytest.mark.parametrize("fault", [{"more": 1}, {"over": True}])
def test_other_counts_fail_even_when_the_logits_agree(fault: dict[str, Any]) -> None:
    model = adaptive()
    parity = compare(Counting(model, **fault), model, batch=1)
    assert parity.counts_agreement == 0
    assert [f.split()[0] for f in failures(parity)] == ["token"]


def test_counts_are_not_compared_when_the_graph_does_not_tell_them(model: PrunedViT) -> None:
    assert compare(Graph(model), model, batch=1).counts_agreement is None


@pytest.mark.parametrize("batch", [(1, 1), (1, 4), (4, 4), (5, 5)])
def test_counts_of_a_batch_are_compared_in_the_same_batches(batch: tuple[int, int]) -> None:
    model = adaptive("batch-mean")
    assert not model.exact_in_batch
    assert adaptive().exact_in_batch
    parity = compare(Counting(model), model, batch=batch, images=7)
    assert (parity.images, parity.undecided, parity.counts_agreement) == (7, 0, 1)
    assert passes(parity)


def test_unknown_precision_is_refused(model: PrunedViT) -> None:
    with pytest.raises(InputError) as raised:
        compare(Graph(model), model, batch=1, precision="int3")
    assert raised.value.code == "parity-precision"
