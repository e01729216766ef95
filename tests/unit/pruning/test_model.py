"""The torch reference against the formulas, written a second time in tests/helpers/reference_pruning.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from edgeprune.pruning.base import Constant, Context
from edgeprune.pruning.model import PrunedOutput, PrunedViT, Stream
from tests.helpers import reference_pruning, reference_vit
from tests.helpers.lowering import noise, random_model, small, stages_of
from tests.helpers.reference_pruning import Outcome
from tests.helpers.reference_vit import LVVIT

VARIANTS = {
    "class token": {},
    "distilled": {"distilled": True},
    "registers": {"reg_tokens": 3},
    "average pooling": {"global_pool": "avg"},
    "registers without position, average, fc_norm": {
        "global_pool": "avg",
        "fc_norm": True,
        "reg_tokens": 2,
        "no_embed_class": True,
    },
    "layer scale, no qkv bias": {"layer_scale": True, "qkv_bias": False},
    "oblong image": {"image_size": (32, 48)},
    "average over the prefix too": {"global_pool": "avg", "fc_norm": True, "pool_include_prefix": True},
    "LV-ViT": LVVIT,
}
BATCH = 3


def run(model: PrunedViT, images: torch.Tensor) -> PrunedOutput:
    with torch.inference_mode():
        return model.run(images)


def check(model: PrunedViT, one: Callable[[torch.Tensor], Outcome]) -> PrunedOutput:
    """Compare logits and kept patches, best first, with the formulas, image by image."""
    images = torch.from_numpy(noise(model.config, BATCH))
    out = run(model, images)
    logits, kept = reference_pruning.every(images, one)
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-5)
    assert [[stage[b].tolist() for stage in out.kept] for b in range(BATCH)] == kept
    return out


# ------------------------------------------------------------------------------------------------ dynamicvit


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_dynamicvit_follows_the_formulas(fields: dict[str, object]) -> None:
    config = small(**fields)
    model = random_model(config, stages_of(config, "dynamicvit", 0.7))
    N, weights = config.num_patches, model.state_dict()
    kept = {1: int(N * 0.7), 2: int(N * 0.7**2), 3: int(N * 0.7**3)}
    check(model, lambda image: reference_pruning.dynamicvit(config, weights, image, kept))


def test_dynamicvit_without_class_token_follows_the_formulas() -> None:
    config = small(class_token=False, global_pool="avg")
    model = random_model(config, stages_of(config, "dynamicvit", 0.5, "0,3"))
    check(model, lambda image: reference_pruning.dynamicvit(config, model.state_dict(), image, {0: 8, 3: 4}))


def test_predictor_keeps_by_its_first_channel() -> None:
    config = small()
    model = random_model(config, stages_of(config, "dynamicvit", 0.5, "1"))
    flipped = random_model(config, stages_of(config, "dynamicvit", 0.5, "1"))
    last = flipped.prune["0"].out_conv[4]
    with torch.no_grad():
        last.weight.copy_(last.weight.flip(0))
        last.bias.copy_(last.bias.flip(0))
    images = torch.from_numpy(noise(config))
    a, b = run(model, images), run(flipped, images)
    torch.testing.assert_close(a.scores[0], -b.scores[0])
    assert set(a.kept[0][0].tolist()) | set(b.kept[0][0].tolist()) == set(range(16))  # best half and worst half


def test_predictor_mean_counts_only_what_is_alive() -> None:
    config = small()
    model = random_model(config, stages_of(config, "dynamicvit", 0.5, "1"))
    tokens = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    alive = torch.tensor([[1.0] * 5 + [0.0] * 3] * 2)
    predictor = model.prune["0"]
    with torch.no_grad():
        masked = predictor.logits(tokens, alive)[:, :5]
        torch.testing.assert_close(masked, predictor.logits(tokens[:, :5]))


# ------------------------------------------------------------------------------------------------ evit


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("fuse", [True, False])
def test_evit_follows_the_formulas(fields: dict[str, object], fuse: bool) -> None:
    config = small(**fields)
    model = random_model(config, stages_of(config, "evit", 0.7, fuse=str(fuse)))
    weights = model.state_dict()
    check(model, lambda image: reference_pruning.evit(config, weights, image, (1, 2, 3), 0.7, fuse=fuse))


def test_evit_prunes_in_the_first_block() -> None:
    config = small()
    model = random_model(config, stages_of(config, "evit", 0.5, "0"))
    out = check(model, lambda i: reference_pruning.evit(config, model.state_dict(), i, (0,), 0.5, fuse=True))
    assert out.kept[0].shape == (BATCH, 8)


def test_evit_fused_token_is_the_sum_by_raw_attention() -> None:
    config = small()
    (stage,) = stages_of(config, "evit", 0.5, "0")
    model = random_model(config, (stage,))
    x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0))
    attention = torch.rand(2, 2, 16, generator=torch.Generator().manual_seed(1)) / 16
    ids = torch.arange(16).expand(2, -1)
    out = PrunedOutput(logits=x)
    stream = Stream(x, ids)
    model.reduce(stage, stream, Context(x, class_attention=attention), out)
    shorter = stream.x
    for b in range(2):
        a = attention[b].mean(0)
        dropped = sorted(set(range(16)) - set(out.kept[0][b].tolist()))
        assert len(dropped) == 8 and float(a[dropped].sum()) < 0.5  # far from one, so a renormalised sum shows
        torch.testing.assert_close(shorter[b, -1], sum(a[i] * x[b, 1 + i] for i in dropped))


def test_evit_fused_token_competes_later_under_number_minus_one() -> None:
    config = small()
    found = 0
    for seed in range(6):
        model = random_model(config, stages_of(config, "evit", 0.7), seed)
        out = run(model, torch.from_numpy(noise(config, 8, seed)))
        assert -1 not in out.kept[0]
        assert [s.shape[1] for s in out.scores] == [16, 13, 11]
        found += int((out.kept[1] == -1).sum())
    assert 0 < found < 48  # sometimes it stays, sometimes it is fused again


def test_evit_scores_are_attention_without_the_prefix() -> None:
    config = small(reg_tokens=2)
    model = random_model(config, stages_of(config, "evit", 0.7))
    out = run(model, torch.from_numpy(noise(config, 4)))
    sums = out.scores[0].sum(1)
    assert bool(((sums > 0) & (sums < 1)).all())  # the share of CLS and registers is missing


# ------------------------------------------------------------------------------------------------ random


def test_random_follows_its_constant_positions() -> None:
    config = small(distilled=True)
    stages = stages_of(config, "random", 0.6)
    model = random_model(config, stages)
    positions = {s.block: s.selector.indices for s in stages}
    check(model, lambda image: reference_pruning.constant(config, model.state_dict(), image, positions))


def test_random_positions_are_a_draw_without_replacement() -> None:
    config = small(image_size=(64, 64))
    for stage in stages_of(config, "random", 0.7):
        assert isinstance(stage.selector, Constant)
        chosen = stage.selector.indices
        assert len(set(chosen)) == len(chosen) == stage.counts.kept
        assert min(chosen) >= 0 and max(chosen) < stage.counts.tokens_in
        assert chosen != tuple(range(len(chosen)))


def test_random_positions_follow_the_seed() -> None:
    config = small(image_size=(64, 64))
    first, again, other = (stages_of(config, "random", 0.7, seed=seed) for seed in ("1", "1", "2"))
    assert first == again
    assert first[0].selector != other[0].selector


# ------------------------------------------------------------------------------------------------ all methods


METHODS = [("dynamicvit", {}), ("evit", {}), ("evit", {"fuse": "false"}), ("random", {})]


@pytest.mark.parametrize(("method", "options"), METHODS)
@pytest.mark.parametrize("fields", [{}, {"distilled": True}, {"reg_tokens": 2}], ids=["CLS", "distilled", "registers"])
def test_prefix_is_never_dropped(method: str, options: dict[str, str], fields: dict[str, object]) -> None:
    config = small(**fields)
    P = config.num_prefix_tokens
    model = random_model(config, stages_of(config, method, 0.3, "1", **options))
    seen: list[torch.Tensor] = []
    hook = model.blocks[1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        model.run(torch.from_numpy(noise(config)))
    hook.remove()
    stage = model.stages[0]
    assert seen[0].shape[1] == P + stage.counts.tokens_out
    # the prefix may be changed at will and what is kept stays: it is not among the candidates
    tokens = torch.randn(1, P + 16, 32, generator=torch.Generator().manual_seed(0))
    attention = torch.rand(1, 2, 16, generator=torch.Generator().manual_seed(1))
    other = tokens.clone()
    other[:, :P] += 100
    outs = []
    for x in (tokens, other):
        out = PrunedOutput(logits=x)
        with torch.no_grad():
            stream = Stream(x, torch.arange(16)[None])
            model.reduce(stage, stream, Context(x, class_attention=attention), out)
        assert torch.equal(stream.x[:, :P], x[:, :P])
        outs.append(out.kept[0])
    assert torch.equal(*outs)


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_logits_of_an_image_do_not_depend_on_its_batch(method: str, options: dict[str, str]) -> None:
    config = small()
    model = random_model(config, stages_of(config, method, 0.6, **options))
    images = torch.from_numpy(noise(config, 5))
    alone = [run(model, images[i : i + 1]) for i in range(5)]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [3, 3, 3]):
        together = run(model, images[order])
        expected = torch.cat([alone[i].logits for i in order])
        torch.testing.assert_close(together.logits, expected, rtol=0, atol=1e-6)
        for s, kept in enumerate(together.kept):
            assert torch.equal(kept, torch.cat([alone[i].kept[s] for i in order]))


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_kept_patches_are_nested(method: str, options: dict[str, str]) -> None:
    config = small(image_size=(64, 64))
    model = random_model(config, stages_of(config, method, 0.6, **options))
    out = run(model, torch.from_numpy(noise(config, 2)))
    for b in range(2):
        first, second, third = (set(stage[b].tolist()) - {-1} for stage in out.kept)
        assert third <= second <= first <= set(range(64))


def test_no_stages_give_the_dense_model() -> None:
    config = small()
    model = random_model(config)
    images = torch.from_numpy(noise(config, 2))
    out = run(model, images)
    expected = reference_vit.logits(config, model.state_dict(), images)
    torch.testing.assert_close(out.logits, expected, rtol=0, atol=1e-5)
    assert (out.kept, out.scores) == ([], [])


def test_weights_of_a_left_out_stage_are_not_made() -> None:
    config = small()
    model = PrunedViT(config, stages_of(config, "dynamicvit", 1.0, "1:0.7,2:1.0,3:0.3"))
    assert {k.split(".")[1] for k in model.state_dict() if k.startswith("prune.")} == {"0", "2"}


def test_uniform_scores_keep_the_first_tokens() -> None:
    config = small()
    model = random_model(config, stages_of(config, "dynamicvit", 0.5, "1"))
    with torch.no_grad():
        for p in model.prune.parameters():
            p.zero_()
    assert run(model, torch.from_numpy(noise(config))).kept[0].tolist() == [list(range(8))]
