"""SaiT: one early cut by attention, whose density is chosen at run time; one set of weights serves them all.

Source: SaiT (arXiv 2210.05832), abstract, and claim 1 of US 12,299,960 B2. No code was published. The form of the
importance score, the defaults of the selectors and the weight of the distillation are our own reading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeprune.models.config import ViTConfig
from edgeprune.pruning.adaptive import Mass, Threshold
from edgeprune.pruning.base import Context, Method, MethodOption, Needs, Reducer, Scorer, Selector, Stage, TopK, Where
from edgeprune.pruning.counts import DYNAMICVIT_RULE, StageCounts

if TYPE_CHECKING:
    from torch import Tensor, nn

MASS, VALUE, TOP_K = "mass", "value", "topk"
CLS, COLUMN_MEAN = "cls", "colmean"


@dataclass(frozen=True)
class ImportanceScorer(Scorer):
    """Attention the patch tokens receive in the block in front of the stage, normalised to sum 1.

    Attributes:
        tis: "cls" reads the CLS query's row, mean over heads; "colmean" the mean over heads and all queries.
    """

    tis: str = CLS

    @property
    def needs(self) -> frozenset[Needs]:  # type: ignore[override]
        """The CLS row, or the mean over all rows."""
        return frozenset({Needs.CLASS_ATTENTION if self.tis == CLS else Needs.MEAN_ATTENTION})

    def score(self, context: Context, module: nn.Module | None) -> Tensor:
        """Return scores [B, N]; slots without a token have 0."""
        if self.tis == CLS:
            assert context.class_attention is not None
            received = context.class_attention.float().mean(1)
        else:
            assert context.mean_attention is not None
            received = context.mean_attention.float()
        return received / received.sum(1, keepdim=True).clamp(min=1e-30)


def make_stages(
    config: ViTConfig, blocks: Sequence[int], counts: Sequence[StageCounts], options: Mapping[str, Any]
) -> list[Stage]:
    """Return one stage in front of each block."""
    scorer = ImportanceScorer(options["tis"])
    return [
        Stage(block, Where.PRE_BLOCK, scorer, make_selector(c, options), Reducer.DROP, c)
        for block, c in zip(blocks, counts, strict=True)
    ]


def make_selector(counts: StageCounts, options: Mapping[str, Any]) -> Selector:
    """Return the selector the options ask for."""
    import numpy as np

    if options["select"] == TOP_K:
        return TopK(counts.kept)
    if options["select"] == MASS:
        return Mass(counts.kept, options["mass"])
    limit = np.nextafter(np.float32(options["value"] / counts.tokens_in), np.float32(-1))  # at the limit a token stays
    return Threshold(counts.kept, float(limit), least=1)


METHOD = Method(
    name="sait",
    summary="one cut in front of block 3 by attention mass, value or top-k; the density can change at run time",
    source="arXiv 2210.05832",
    rule=DYNAMICVIT_RULE,
    make_stages=make_stages,
    default_blocks=lambda config, options: (max(1, config.depth // 4),),
    adaptive=lambda options: options["select"] != TOP_K,
    needs_class_token=True,
    options=(
        MethodOption("select", str, MASS, "mass, value: the image decides how many stay; topk: floor(N0 * keep rate)",
                     (MASS, VALUE, TOP_K)),
        MethodOption("mass", float, 0.9, "share of the attention the kept tokens hold; 1 keeps all", least=0.0),
        MethodOption("value", float, 1.0, "least score of a kept token, in units of 1/N", least=0.0),
        MethodOption("tis", str, CLS, "attention read: of the CLS query, or of all queries", (CLS, COLUMN_MEAN)),
    ),
    notes=(
        "no official code exists: the importance score, the selectors' defaults and the weight of the distillation are "
        "our own reading of the abstract",
        "training by alternating dense and sparse epochs with token distillation is claimed by US 12,299,960 B2 "
        "(Samsung, granted 2025-05-13); whoever trains this way should have that looked at. Exporting and running does "
        "not train",
    ),
)  # fmt: skip
