from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from edgeprune.models.config import ViTConfig
from edgeprune.models.vit import policy_softmax
from edgeprune.pruning import get_method
from edgeprune.pruning.base import Stage, StageRequest
from edgeprune.pruning.model import PrunedViT
from edgeprune.pruning.ops import rank_tokens
from edgeprune.training.adapters import Batch
from edgeprune.training.masking import gumbel_decision, masked_forward
from tests.helpers.reference_vit import LVVIT, randomize, tiny, tiny_lvvit

KINDS = {
    "plain": {},
    "distilled": {"distilled": True},
    "registers": {"reg_tokens": 3},
    "average": {"class_token": False, "global_pool": "avg"},
    "average-fc-norm": {"class_token": False, "global_pool": "avg", "fc_norm": True},
    "average-with-prefix": {"global_pool": "avg", "fc_norm": True, "pool_include_prefix": True},
    "lvvit": LVVIT,
}


def dynamicvit(config: ViTConfig, keep_rate: float = 0.6) -> PrunedViT:
    method = get_method("dynamicvit")
    return randomize(PrunedViT(config, method.stages(config, StageRequest(keep_rate), {})))


def images(config: ViTConfig, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, *config.image_size, generator=torch.Generator().manual_seed(1))


def uniform(count: int) -> Callable[..., torch.Tensor]:
    return Batch(torch.zeros(count, 1), torch.zeros(count), 0.0).uniform


def best(kept_before: list[torch.Tensor]) -> object:
    """Return a choice that keeps what inference would: the best of the tokens that are left."""

    def decide(stage: Stage, logits: torch.Tensor) -> torch.Tensor:
        scores = logits[..., 0] - logits[..., 1]
        if kept_before:
            scores = scores.masked_fill(kept_before[-1] == 0, -torch.inf)
        keep = torch.zeros_like(scores).scatter(1, rank_tokens(scores)[:, : stage.counts.kept], 1.0)
        kept_before.append(keep)
        return keep

    return decide


def test_policy_softmax_equals_softmax_over_the_kept_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 9, 9, generator=generator) * 0.5
    keep = torch.tensor([0, 1, 2, 5, 8])
    policy = torch.zeros(2, 9)
    policy[:, keep] = 1
    masked = policy_softmax(logits, policy)[:, :, keep][..., keep]
    assert (masked - logits[:, :, keep][..., keep].softmax(-1)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_masking_equals_gathering_when_the_choices_are_the_same(kind: str) -> None:
    config = tiny(depth=6, **KINDS[kind])
    model = dynamicvit(config)
    assert len(model.stages) == 3
    with torch.no_grad():
        gathered = model.run(images(config))
        masked = masked_forward(model, images(config), best([]))
    assert (gathered.logits - masked.logits).abs().max() < 1e-5 * gathered.logits.abs().max()
    for kept, decision in zip(gathered.kept, masked.decisions, strict=True):
        assert torch.equal(kept.sort(1).values, decision.nonzero()[:, 1].reshape(kept.shape))


def test_model_without_stages_is_the_dense_model() -> None:
    model = randomize(PrunedViT(tiny(distilled=True)))
    with torch.no_grad():
        out = masked_forward(model, images(model.config))
        assert torch.allclose(out.logits, model(images(model.config)), atol=1e-6)
    assert out.features.shape == (3, 16, 32)
    assert out.decisions == []


def test_decisions_only_ever_drop() -> None:
    model = dynamicvit(tiny(depth=6))
    out = masked_forward(model, images(model.config, 8), gumbel_decision(uniform(8)))
    shares = [decision.mean().item() for decision in out.decisions]
    for before, after in zip(out.decisions, out.decisions[1:], strict=False):
        assert (after <= before + 1e-6).all()
    assert 1 > shares[0] > shares[1] > shares[2] > 0


@pytest.mark.parametrize("kind", ["plain", "distilled", "registers"])
def test_prefix_is_never_scored_nor_masked(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(depth=6, **KINDS[kind])
    model, P = dynamicvit(config), config.num_prefix_tokens
    policies = []
    for block in model.blocks:
        forward = block.forward

        def watch(x: torch.Tensor, policy: torch.Tensor | None = None, forward: object = forward) -> torch.Tensor:
            policies.append(policy)
            return forward(x, policy)  # type: ignore[operator]

        monkeypatch.setattr(block, "forward", watch)
    seen = []

    def drop_all(stage: Stage, logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.shape)
        return logits[..., 0] * 0

    masked_forward(model, images(config), drop_all)
    assert set(seen) == {(3, 16, 2)}
    assert policies[0] is None
    for policy in policies[model.stages[0].block :]:
        assert torch.equal(policy[:, :P], torch.ones(3, P))
        assert torch.equal(policy[:, P:], torch.zeros(3, 16))


@pytest.mark.parametrize("kind", KINDS)
def test_everything_dropped_stays_finite(kind: str) -> None:
    model = dynamicvit(tiny(depth=6, **KINDS[kind]))
    out = masked_forward(model, images(model.config), lambda stage, logits: logits[..., 0] * 0)
    assert out.logits.isfinite().all()


def test_aux_head_scores_every_token_and_the_best_kept_one_counts() -> None:
    model = dynamicvit(tiny_lvvit(depth=6))
    with torch.no_grad():
        out = masked_forward(model, images(model.config), best([]))
    assert out.token_logits is not None
    assert out.token_logits.shape == (3, 16, 5)
    kept = [out.token_logits[b][out.decisions[-1][b] > 0].amax(0) for b in range(3)]
    torch.testing.assert_close(out.logits, out.class_logits + 0.5 * torch.stack(kept))


def test_without_aux_head_the_losses_read_the_logits() -> None:
    out = masked_forward(dynamicvit(tiny(depth=6)), images(tiny()))
    assert out.class_logits is out.logits
    assert out.token_logits is None


def test_gumbel_decision_draws_by_the_probabilities() -> None:
    logits = torch.tensor([0.8, 0.2]).log().expand(200, 100, 2)
    decision = gumbel_decision(uniform(200))(SimpleNamespace(index=0), logits)  # type: ignore[arg-type]
    assert ((decision - decision.round()).abs() < 1e-6).all()
    assert decision.mean().item() == pytest.approx(0.8, abs=0.01)


def test_gradient_reaches_every_predictor_through_the_attention() -> None:
    model = dynamicvit(tiny(depth=6))
    masked_forward(model, images(model.config), gumbel_decision(uniform(3))).logits.square().sum().backward()
    assert sorted(model.prune) == ["0", "1", "2"]
    for name, parameter in model.prune.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
