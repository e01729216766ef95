from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from edgeprune.models.config import ViTConfig
from edgeprune.models.vit import policy_softmax
from edgeprune.pruning import get_method
from edgeprune.pruning.base import Context, Stage, StageRequest
from edgeprune.pruning.model import PrunedViT
from edgeprune.pruning.predictor import Predictor
from edgeprune.training.adapters import Batch
from edgeprune.training.masking import gumbel_decision, masked_forward, selected, threshold_decision
from tests.helpers.lowering import noise, random_model, small, stages_of
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


def nothing(stage: Stage, seen: Context, module: object, keep: torch.Tensor) -> torch.Tensor:
    """Drop every token."""
    return keep * 0


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
        masked = masked_forward(model, images(config), selected)
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
    masked_forward(model, images(config), nothing)
    assert policies[0] is None
    for policy in policies[model.stages[0].block :]:
        assert torch.equal(policy[:, :P], torch.ones(3, P))
        assert torch.equal(policy[:, P:], torch.zeros(3, 16))


@pytest.mark.parametrize("kind", KINDS)
def test_everything_dropped_stays_finite(kind: str) -> None:
    model = dynamicvit(tiny(depth=6, **KINDS[kind]))
    out = masked_forward(model, images(model.config), nothing)
    assert out.logits.isfinite().all()


def test_aux_head_scores_every_token_and_the_best_kept_one_counts() -> None:
    model = dynamicvit(tiny_lvvit(depth=6))
    with torch.no_grad():
        out = masked_forward(model, images(model.config), selected)
    assert out.token_logits is not None
    assert out.token_logits.shape == (3, 16, 5)
    kept = [out.token_logits[b][out.decisions[-1][b] > 0].amax(0) for b in range(3)]
    torch.testing.assert_close(out.logits, out.class_logits + 0.5 * torch.stack(kept))


def test_without_aux_head_the_losses_read_the_logits() -> None:
    out = masked_forward(dynamicvit(tiny(depth=6)), images(tiny()), selected)
    assert out.class_logits is out.logits
    assert out.token_logits is None


def test_gumbel_decision_draws_by_the_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([0.8, 0.2]).log().expand(200, 100, 2)
    predictor = Predictor(8)
    monkeypatch.setattr(predictor, "logits", lambda tokens, keep: logits)
    seen, keep = Context(torch.zeros(200, 100, 8)), torch.ones(200, 100)
    decision = gumbel_decision(uniform(200))(SimpleNamespace(index=0), seen, predictor, keep)  # type: ignore[arg-type]
    assert ((decision - decision.round()).abs() < 1e-6).all()
    assert decision.mean().item() == pytest.approx(0.8, abs=0.01)


ADAPTIVE = [
    ("ats", {}),
    ("ats", {"variant": "paper"}),
    ("asvit", {}),
    ("sait", {}),
    ("sait", {"select": "value"}),
    ("sait", {"select": "topk"}),
    ("sait", {"tis": "colmean"}),
]


@pytest.mark.parametrize(("name", "options"), ADAPTIVE)
@pytest.mark.parametrize("fields", [{}, {"distilled": True}, {"reg_tokens": 4}, {"image_size": (40, 24)}], ids=str)
def test_masking_equals_gathering_for_methods_that_read_attention(
    name: str, options: dict[str, str], fields: dict[str, Any]
) -> None:
    config = small(depth=5, **fields)
    rate = 0.7 if "paper" in options.values() or "topk" in options.values() else 1.0
    model = random_model(config, stages_of(config, name, rate, **options))
    for key, parameter in model.named_parameters():
        if key.endswith("keep_threshold"):
            parameter.data.fill_(0.05)
    x = torch.from_numpy(noise(config, 4))
    with torch.no_grad():
        gathered, masked = model.run(x), masked_forward(model, x, selected)
    assert (gathered.logits - masked.logits).abs().max() < 1e-5
    for count, keep in zip(gathered.counts, masked.decisions, strict=True):
        assert torch.equal(count, keep.sum(1).long())


def test_threshold_decision_is_hard_forward_and_a_sigmoid_backward() -> None:
    config = small(depth=5)
    model = random_model(config, stages_of(config, "asvit", 1.0, "2"))
    (stage,) = model.stages
    module = model.scorer_module(stage)
    attention = torch.rand(3, 2, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    outputs = torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(1))
    seen = Context(outputs, class_attention=attention, context=outputs)
    module.keep_threshold.data.fill_(0.5)
    keep = threshold_decision(0.1)(stage, seen, module, torch.ones(3, 16))
    scores = stage.scorer.score(seen, module)
    assert torch.equal(keep > 0.5, scores > 0.5)
    keep.sum().backward()
    soft = ((scores - 0.5) / 0.1).sigmoid()
    slope = (soft * (1 - soft) / 0.1).detach()
    assert module.keep_threshold.grad.item() == pytest.approx(-slope.sum().item(), rel=1e-4)
    assert attention.grad is not None and (attention.grad != 0).all()


def test_threshold_training_masks_as_inference_gathers() -> None:
    config = small(depth=5)
    model = random_model(config, stages_of(config, "asvit", 1.0))
    for s, module in enumerate(model.prune.values()):
        module.keep_threshold.data.fill_(0.04 + 0.02 * s)
    x = torch.from_numpy(noise(config, 6))
    with torch.no_grad():
        gathered, masked = model.run(x), masked_forward(model, x, threshold_decision(1e-4))
    assert len(set(gathered.counts[-1].tolist())) > 1
    assert (gathered.logits - masked.logits).abs().max() < 1e-5


def test_gradient_reaches_every_predictor_through_the_attention() -> None:
    model = dynamicvit(tiny(depth=6))
    masked_forward(model, images(model.config), gumbel_decision(uniform(3))).logits.square().sum().backward()
    assert sorted(model.prune) == ["0", "1", "2"]
    for name, parameter in model.prune.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
