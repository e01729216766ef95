from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from edgeprune.pruning.ops import count_tokens, gather_rows, gather_tokens, rank_tokens, topk_gather
from tests.helpers.scores import awkward_scores, counted, ranked


def tokens_of(batch: int, patches: int, prefix: int, dim: int = 3) -> torch.Tensor:
    """Return tokens whose every element is distinct."""
    return torch.arange(batch * (prefix + patches) * dim, dtype=torch.float32).reshape(batch, prefix + patches, dim)


# ------------------------------------------------------------------------------------------------ ranking


@given(awkward_scores(9))
def test_ranking_is_that_of_the_loop(scores: list[float]) -> None:
    assert rank_tokens(torch.tensor([scores])).tolist() == [ranked(scores)]


def test_uniform_scores_rank_by_position() -> None:
    assert rank_tokens(torch.zeros(2, 6)).tolist() == [list(range(6))] * 2


def test_ties_rank_by_position_in_a_long_sequence() -> None:
    """Sorting algorithms change with the length; short sequences are stable by accident."""
    scores = torch.randint(0, 4, (3, 576), generator=torch.Generator().manual_seed(0)).float()
    scores[:, ::50] = math.nan
    assert rank_tokens(scores).tolist() == [ranked(image) for image in scores.tolist()]


def test_nan_ranks_behind_minus_infinity() -> None:
    assert rank_tokens(torch.tensor([[math.nan, -math.inf, math.nan, 1.0]])).tolist() == [[3, 1, 0, 2]]


def test_zeros_of_both_signs_tie() -> None:
    assert rank_tokens(torch.tensor([[-0.0, 0.0, -0.0]])).tolist() == [[0, 1, 2]]


def test_each_image_is_ranked_alone() -> None:
    assert rank_tokens(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_are_compared_in_float32(dtype: torch.dtype) -> None:
    near = torch.tensor([[1.0, 1.0 + 1e-12, 2.0]], dtype=dtype)  # the first two are equal in float32
    assert rank_tokens(near).tolist() == [[2, 0, 1]]


# ------------------------------------------------------------------------------------------------ TopKGather


@given(scores=awkward_scores(8), k=st.integers(1, 8), prefix=st.integers(0, 2), order=st.sampled_from([0, 1]))
def test_topk_gather_takes_the_prefix_and_the_best(scores: list[float], k: int, prefix: int, order: int) -> None:
    tokens = tokens_of(1, 8, prefix)
    kept, indices, count = topk_gather(torch.tensor([scores]), tokens, k, prefix, order)
    wanted = ranked(scores)[:k]
    wanted = sorted(wanted) if order else wanted
    assert indices.tolist() == [wanted]
    assert kept[0].tolist() == [tokens[0, i].tolist() for i in [*range(prefix), *(prefix + i for i in wanted)]]
    assert count.tolist() == [k]


def test_topk_gather_outputs_have_the_declared_types() -> None:
    kept, indices, count = topk_gather(torch.rand(2, 5), tokens_of(2, 5, 1).half(), 3)
    assert (kept.dtype, indices.dtype, count.dtype) == (torch.float16, torch.int32, torch.int32)
    assert (kept.shape, indices.shape, count.shape) == ((2, 4, 3), (2, 3), (2,))


def test_slots_past_the_count_hold_the_next_best() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.2]])
    kept, indices, count = topk_gather(scores, tokens_of(1, 4, 0), 3, 0, 0, 1, 0.5)
    assert (indices.tolist(), count.tolist()) == ([[1, 2, 3]], [1])
    assert kept[0].tolist() == tokens_of(1, 4, 0)[0, [1, 2, 3]].tolist()


# ------------------------------------------------------------------------------------------------ counts


@given(scores=awkward_scores(8), threshold=st.sampled_from([-1.0, 0.0, 0.25, 0.5, 2.0]))
def test_threshold_counts_scores_above_it(scores: list[float], threshold: float) -> None:
    assert count_tokens(torch.tensor([scores]), 3, 1, threshold).tolist() == [counted(scores, 3, 1, threshold)]


def test_score_equal_to_the_threshold_is_not_above_it() -> None:
    assert count_tokens(torch.tensor([[0.5, 0.5, 0.75, math.nan]]), 2, 1, 0.5).tolist() == [1]


# multiples of 1/64 sum exactly in float32, in any order
@given(
    parts=st.lists(st.integers(-8, 32), min_size=10, max_size=10),
    threshold=st.integers(0, 80).map(lambda n: n / 64),
)
def test_mass_counts_until_the_sum_reaches_it(parts: list[int], threshold: float) -> None:
    scores = [p / 64 for p in parts]
    assert count_tokens(torch.tensor([scores]), 3, 2, threshold).tolist() == [counted(scores, 3, 2, threshold)]


@pytest.mark.parametrize(
    ("threshold", "count"), [(0.0, 1), (0.125, 1), (0.1875, 2), (0.25, 2), (0.5, 4), (0.9375, 8), (1.0, 8), (1.5, 8)]
)
def test_mass_of_uniform_scores_is_shared_equally(threshold: float, count: int) -> None:
    assert count_tokens(torch.full((1, 8), 1 / 8), 3, 2, threshold).tolist() == [count]


def test_mass_from_one_up_keeps_all_whatever_the_sum() -> None:
    assert count_tokens(torch.full((2, 5), 10.0), 1, 2, 1.0).tolist() == [5, 5]


@pytest.mark.parametrize("scores", [[math.nan] * 4, [-1.0] * 4, [0.0] * 4])
def test_mass_keeps_one_token_at_least(scores: list[float]) -> None:
    assert count_tokens(torch.tensor([scores]), 3, 2, 0.0).tolist() == [1]


@pytest.mark.parametrize(("mode", "threshold"), [(1, 0.0), (2, 0.9)])
def test_count_exceeds_k_when_k_is_too_small(mode: int, threshold: float) -> None:
    kept, indices, count = topk_gather(torch.full((1, 6), 1 / 6), tokens_of(1, 6, 1), 2, 1, 0, mode, threshold)
    assert count.tolist() == [6]
    assert (kept.shape[1], indices.tolist()) == (3, [[0, 1]])


# ------------------------------------------------------------------------------------------------ GatherTokens


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_gather_tokens_puts_the_prefix_first(prefix: int) -> None:
    tokens = tokens_of(2, 5, prefix)
    indices = torch.tensor([[4, 0, 4], [1, 2, 3]], dtype=torch.int32)
    rows = [[*range(prefix), *(prefix + i for i in image)] for image in indices.tolist()]
    expected = torch.stack([tokens[b, r] for b, r in enumerate(rows)])
    assert torch.equal(gather_tokens(tokens, indices, prefix), expected)


def test_gather_rows_passes_gradients() -> None:
    tokens = tokens_of(1, 4, 1).requires_grad_()
    gather_rows(tokens, torch.tensor([[2, 0]]), 1).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad[0, :, 0].tolist() == [1, 1, 0, 1, 0]


# ------------------------------------------------------------------------------------------------ registration


@pytest.mark.parametrize(("order", "mode"), [(0, 0), (1, 2)])
def test_topk_gather_is_registered_soundly(order: int, mode: int) -> None:
    args = (torch.rand(2, 6), torch.rand(2, 7, 3), 4, 1, order, mode, 0.5)
    torch.library.opcheck(torch.ops.edgeprune.topk_gather, args)


def test_gather_tokens_is_registered_soundly() -> None:
    args = (torch.rand(2, 7, 3), torch.tensor([[0, 5], [1, 1]], dtype=torch.int32), 1)
    torch.library.opcheck(torch.ops.edgeprune.gather_tokens, args)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_fake_outputs_have_the_real_shapes_and_types(prefix: int) -> None:
    def call(scores: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kept, indices, count = torch.ops.edgeprune.topk_gather(scores, tokens, 4, prefix)
        again = torch.ops.edgeprune.gather_tokens(tokens, indices, prefix)
        return kept, indices, count, again

    scores, tokens = torch.rand(2, 6), torch.rand(2, prefix + 6, 3)
    real = call(scores, tokens)
    with FakeTensorMode() as mode:
        fake = call(mode.from_tensor(scores), mode.from_tensor(tokens))
    assert [(f.shape, f.dtype) for f in fake] == [(r.shape, r.dtype) for r in real]
