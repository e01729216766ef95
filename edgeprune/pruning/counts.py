"""The one place where keep rates become token counts. Plain arithmetic, no torch.

Every rounding rule is data: what a rate refers to and how the product is rounded. All arithmetic is float64 and in
the order the official code uses, since one reordered subtraction moves a count by a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgeprune.errors import InputError


@dataclass(frozen=True)
class CountRule:
    """How a method turns the keep rate of a stage into a number of tokens.

    Attributes:
        base: the rate is a share of the "initial" number of patch tokens or of the "current" one.
        rounding: "floor" or "ceil" of rate times base.
        cumulative: one keep rate r means r, r**2, r**3, ... for successive stages.
    """

    base: Literal["initial", "current"]
    rounding: Literal["floor", "ceil"]
    cumulative: bool

    def stage_rates(self, keep_rate: float, num_stages: int) -> tuple[float, ...]:
        """Return the rate of every stage for one overall keep rate."""
        check_keep_rate(keep_rate)
        return tuple(keep_rate ** (s + 1) if self.cumulative else keep_rate for s in range(num_stages))


DYNAMICVIT_RULE = CountRule(base="initial", rounding="floor", cumulative=True)
EVIT_RULE = CountRule(base="current", rounding="ceil", cumulative=False)


@dataclass(frozen=True)
class StageCounts:
    """Tokens of one stage, prefix not counted.

    Attributes:
        tokens_in: patch tokens that reach the stage, an earlier fused token included.
        kept: tokens that stay.
        fused: tokens made of the dropped ones, 0 or 1.
    """

    tokens_in: int
    kept: int
    fused: int = 0

    @property
    def tokens_out(self) -> int:
        """Patch tokens that leave the stage."""
        return self.kept + self.fused


def check_keep_rate(rate: float, where: str = "--keep-rate") -> float:
    """Return the rate if it is a share in (0, 1].

    Raises:
        InputError: `keep-rate` otherwise.
    """
    if not (isinstance(rate, (int, float)) and math.isfinite(rate) and 0 < rate <= 1):
        share = f"did you mean {rate / 100:g}?" if isinstance(rate, (int, float)) and 1 < rate <= 100 else None
        raise InputError(
            f"keep rate {rate} from {where} is out of range",
            code="keep-rate",
            expected="the share of tokens that stay, above 0 and at most 1",
            hint=share or "give for example 0.7 to keep 70 % of the tokens at every stage",
            details={"keep_rate": rate},
        )
    return float(rate)


def resolve_counts(
    rule: CountRule, num_patches: int, rates: Sequence[float], *, fuse: bool = False
) -> tuple[StageCounts, ...]:
    """Return the token counts of every stage.

    A stage that would keep every token changes nothing; it appears with `kept == tokens_in` and no fused token.

    Args:
        rule: the method's rule.
        num_patches: patch tokens of one image.
        rates: the rate of every stage, in order.
        fuse: the dropped tokens of a stage become one more token.

    Raises:
        InputError: `keep-rate` when a rate is out of range or leaves a stage without a token.
    """
    counts: list[StageCounts] = []
    current = num_patches
    for stage, rate in enumerate(rates):
        check_keep_rate(rate, f"stage {stage}")
        product = rate * (num_patches if rule.base == "initial" else current)
        kept = min(math.floor(product) if rule.rounding == "floor" else math.ceil(product), current)
        if kept < 1:
            raise InputError(
                f"stage {stage} would keep {product:.2f} of {current} tokens, which is none",
                code="keep-rate",
                expected="at least one token at every stage",
                hint=f"use a keep rate of at least {1 / num_patches:.3g} for that stage, or fewer stages",
                details={"stage": stage, "rate": rate, "tokens_in": current},
            )
        counts.append(StageCounts(current, kept, int(fuse and kept < current)))
        current = counts[-1].tokens_out
    return tuple(counts)
