"""Run a pruned model and hold it against the formulas or against itself in other batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from edgeprune.pruning.base import Stage
from edgeprune.pruning.model import PrunedOutput, PrunedViT
from tests.helpers.lowering import noise
from tests.helpers.reference_pruning import Outcome

# class token; distilled; one class token and four registers; sides whose number of patches is odd
VARIANTS: dict[str, dict[str, Any]] = {
    "class token": {},
    "distilled": {"distilled": True},
    "registers": {"reg_tokens": 4},
    "odd sides": {"image_size": (40, 24)},
    "layer scale, no qkv bias": {"layer_scale": True, "qkv_bias": False},
    "average pooling": {"global_pool": "avg"},
}


def run(model: PrunedViT, images: Tensor) -> PrunedOutput:
    with torch.inference_mode():
        return model.run(images)


def images_of(model: PrunedViT, batch: int, seed: int = 1) -> Tensor:
    return torch.from_numpy(noise(model.config, batch, seed))


def kept_sets(out: PrunedOutput) -> list[list[set[int]]]:
    """Return per image and stage the patches that stayed; -1 stands for no patch."""
    return [[set(stage[b].tolist()) - {-1} for stage in out.kept] for b in range(len(out.logits))]


def counts_of(out: PrunedOutput) -> list[list[int]]:
    """Return per image and stage how many tokens it wanted to keep."""
    return [[int(stage[b]) for stage in out.counts] for b in range(len(out.logits))]


def chosen(stage: Stage, scores: Sequence[float], valid: int | None = None, module: Any = None) -> set[int]:
    """Return the positions a stage's selector keeps of one image's scores, of which the first `valid` are tokens."""
    mask = None if valid is None else (torch.arange(len(scores)) < valid)[None]
    selection = stage.selector.select(torch.tensor([scores], dtype=torch.float32), mask, module)
    return set(selection.positions[0].tolist()[: int(selection.counts[0])])


def assert_follows(model: PrunedViT, one: Callable[[Tensor], Outcome], batch: int = 3, seed: int = 1) -> PrunedOutput:
    """Compare logits, kept sets and counts with the formulas, image by image."""
    images = images_of(model, batch, seed)
    out, outcomes = run(model, images), [one(image) for image in images]
    assert kept_sets(out) == [[set(kept) for kept in o.kept] for o in outcomes]
    assert counts_of(out) == [o.counts for o in outcomes]
    logits = torch.stack([o.logits for o in outcomes]).float()
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-5)
    assert_overflow_is_counted(model, out)
    return out


def assert_overflow_is_counted(model: PrunedViT, out: PrunedOutput) -> None:
    """The flag is up exactly when a stage had too few slots."""
    slots = [stage.counts.kept for stage in model.stages]
    wanted = [any(c > s for c, s in zip(own, slots, strict=True)) for own in counts_of(out)]
    assert out.overflow.tolist() == wanted


def assert_independent(model: PrunedViT, seed: int = 1) -> None:
    """An image alone gives what it gives inside batches of 3 and 8, wherever it stands there."""
    images = images_of(model, 8, seed)
    alone = [run(model, image[None]) for image in images]
    for order in ([5, 0, 2], [7, 3, 1, 0, 6, 5, 2, 4]):
        together = run(model, images[order])
        expected = torch.cat([alone[i].logits for i in order])
        torch.testing.assert_close(together.logits, expected, rtol=0, atol=1e-5)
        assert kept_sets(together) == [kept_sets(alone[i])[0] for i in order]
        assert counts_of(together) == [counts_of(alone[i])[0] for i in order]
        assert together.overflow.tolist() == [bool(alone[i].overflow[0]) for i in order]


def assert_missing_image_harms_no_other(model: PrunedViT) -> None:
    """An image of NaN in the batch leaves the others as they are."""
    images = images_of(model, 3)
    expected = run(model, images)
    broken = images.clone()
    broken[1] = torch.nan
    out = run(model, broken)
    for b in (0, 2):
        torch.testing.assert_close(out.logits[b], expected.logits[b], rtol=0, atol=1e-5)
        assert kept_sets(out)[b] == kept_sets(expected)[b]
        assert counts_of(out)[b] == counts_of(expected)[b]


def uniform_attention(model: PrunedViT, *, values: bool = True) -> PrunedViT:
    """Make every query zero and every value the same, or zero: attention is exactly uniform in every block."""
    D = model.config.embed_dim
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.zero_()
            block.attn.qkv.bias[:D] = 0
            if not values:
                block.attn.qkv.bias[2 * D :] = 0
    return model
