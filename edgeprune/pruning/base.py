"""One abstraction for every pruning method: a backbone and a list of stages.

A stage scores the patch tokens, selects some and reduces the sequence to them. Scorers, selectors and reducers are
plain data; what they compute in torch stands beside them, how they are lowered stands in `edgeprune.export.emit`.
Prefix tokens (CLS, distillation, registers) are invisible to all three. Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from edgeprune.errors import InputError
from edgeprune.models.config import ViTConfig
from edgeprune.pruning.counts import CountRule, StageCounts, check_keep_rate, resolve_counts

if TYPE_CHECKING:
    from torch import Tensor, nn


class Where(str, Enum):
    """The place of a stage relative to its block."""

    PRE_BLOCK = "pre_block"  # on the residual stream, before the block
    MID_BLOCK = "mid_block"  # after the attention residual, before the MLP


class Needs(str, Enum):
    """What a scorer reads; the block computes that and nothing more."""

    TOKENS = "tokens"  # the patch tokens themselves, [B, N, D]
    CLASS_ATTENTION = "class_attention"  # the CLS row of the same block's attention, [B, H, N]
    NOTHING = "nothing"


@dataclass
class Context:
    """What a stage sees.

    Attributes:
        tokens: [B, N, D] patch tokens at the place of the stage.
        class_attention: [B, H, N] attention of the CLS query over the patch tokens, when the scorer needs it.
    """

    tokens: Tensor
    class_attention: Tensor | None = None


class Scorer:
    """Ranks tokens; higher stays. Subclasses are frozen dataclasses."""

    needs: Needs = Needs.NOTHING

    def build(self, config: ViTConfig) -> nn.Module | None:
        """Return the module that holds the scorer's weights, or None when it has none."""
        return None

    def macs(self, config: ViTConfig, tokens: int) -> int:
        """Multiply-accumulates for `tokens` patch tokens of one image, as the literature counts them."""
        return 0

    def score(self, context: Context, module: nn.Module | None) -> Tensor:
        """Return scores [B, N] float32."""
        raise NotImplementedError


class Selector:
    """Chooses tokens from scores. Subclasses are frozen dataclasses."""

    def select(self, scores: Tensor) -> Tensor:
        """Return positions [B, K] int64 of the tokens that stay."""
        raise NotImplementedError


@dataclass(frozen=True)
class TopK(Selector):
    """The `k` highest scores, by rank; ties go to the lower index."""

    k: int

    def select(self, scores: Tensor) -> Tensor:
        """Return positions [B, k] int64, best first."""
        from edgeprune.pruning.ops import rank_tokens

        return rank_tokens(scores)[:, : self.k]


@dataclass(frozen=True)
class Constant(Selector):
    """Always the same positions, whatever the image."""

    indices: tuple[int, ...]

    def select(self, scores: Tensor) -> Tensor:
        """Return positions [B, K] int64."""
        import torch

        return torch.tensor(self.indices, device=scores.device).expand(len(scores), -1)


class Reducer(str, Enum):
    """What becomes of the tokens that are not selected."""

    DROP = "drop"
    FUSE = "fuse"  # their score-weighted sum stands behind the kept tokens (EViT)


@dataclass(frozen=True)
class Stage:
    """One point where the sequence shrinks.

    Attributes:
        block: 0-based block index.
        where: place relative to that block.
        counts: tokens before and after, resolved.
        index: the stage's place in the method's list; its weights live under `prune.<index>.`.
    """

    block: int
    where: Where
    scorer: Scorer
    selector: Selector
    reducer: Reducer
    counts: StageCounts
    index: int = 0


@dataclass(frozen=True)
class MethodOption:
    """A setting of a method: `--method-option NAME=VALUE`.

    Attributes:
        kind: bool, int, float or str; how the text is read.
        choices: allowed values, empty for any.
    """

    name: str
    kind: type
    default: Any
    help: str
    choices: tuple[Any, ...] = ()

    def parse(self, text: str, method: str) -> Any:
        """Return the value a text stands for.

        Raises:
            InputError: `method-option` when the text is not of the option's kind or choices.
        """
        value: Any = None
        if self.kind is bool:
            value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower())
        else:
            try:
                value = self.kind(text)
            except ValueError:
                value = None
        if value is None or (self.choices and value not in self.choices):
            raise InputError(
                f"--method-option {self.name}={text} does not fit method '{method}'",
                code="method-option",
                expected=f"one of {', '.join(map(str, self.choices))}" if self.choices else self._kind_text(),
                hint="run `edgeprune methods` for every method's options",
            )
        return value

    def _kind_text(self) -> str:
        return {bool: "true or false", int: "a whole number", float: "a number"}.get(self.kind, "a text")


@dataclass(frozen=True)
class StageRequest:
    """Where and how much a user wants to prune; None means the method's own rule."""

    keep_rate: float = 1.0
    blocks: tuple[int, ...] | None = None
    rates: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Method:
    """A pruning method: everything the tool needs to know of it.

    Attributes:
        summary: one line for `edgeprune methods`.
        source: paper and section.
        rule: how keep rates become counts.
        make_stages: builds the stages from (config, blocks, counts, options).
        needs_class_token: the method reads the CLS token.
        key_prefixes: official state_dict prefix -> ours, both ways.
        exact_in_batch: an image's logits do not depend on what else is in the batch.
    """

    name: str
    summary: str
    source: str
    rule: CountRule
    make_stages: Callable[[ViTConfig, Sequence[int], Sequence[StageCounts], Mapping[str, Any]], list[Stage]]
    needs_class_token: bool = False
    options: tuple[MethodOption, ...] = ()
    key_prefixes: Mapping[str, str] = field(default_factory=dict)

    def parse_options(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return every option with its value, defaults filled in; texts are parsed, other values are taken.

        Raises:
            InputError: `method-option` for an unknown name or a value that does not fit.
        """
        known = {option.name: option for option in self.options}
        values = {option.name: option.default for option in self.options}
        for name, value in settings.items():
            if name not in known:
                raise InputError(
                    f"method '{self.name}' has no option '{name}'",
                    code="method-option",
                    expected=f"one of {', '.join(known)}" if known else "no option",
                    hint="run `edgeprune methods` for every method's options",
                )
            values[name] = known[name].parse(value, self.name) if isinstance(value, str) else value
        return values

    def stages(self, config: ViTConfig, request: StageRequest, options: Mapping[str, Any]) -> tuple[Stage, ...]:
        """Return the stages that change something, counts resolved.

        Stages that keep every token are left out, so keep rate 1 is the dense model.

        Raises:
            InputError: `keep-rate`, `stages` or `model-config` when the request does not fit the model.
        """
        check_keep_rate(request.keep_rate)
        if self.needs_class_token and not config.class_token:
            raise InputError(
                f"method '{self.name}' ranks tokens by the CLS token's attention; '{config.name}' has no CLS token",
                code="model-config",
                expected="a model with a class token",
                hint="use dynamicvit or random, or a model with a class token",
            )
        blocks = default_blocks(config.depth) if request.blocks is None else request.blocks
        check_blocks(blocks, config.depth)
        rates = request.rates or self.rule.stage_rates(request.keep_rate, len(blocks))
        counts = resolve_counts(self.rule, config.num_patches, rates, fuse=bool(options.get("fuse", False)))
        made = self.make_stages(config, blocks, counts, options)
        stages = [replace(stage, index=i) for i, stage in enumerate(made)]
        return tuple(s for s in stages if s.counts.kept < s.counts.tokens_in)


def default_blocks(depth: int) -> tuple[int, ...]:
    """Return the usual three places: 3, 6, 9 of 12 blocks; 4, 8, 12 of 16; 5, 10, 15 of 20."""
    return tuple(sorted({depth * s // 4 for s in (1, 2, 3)} - {0}))


def check_blocks(blocks: Sequence[int], depth: int) -> None:
    """Raise InputError `stages` unless the blocks exist and ascend."""
    if any(not 0 <= b < depth for b in blocks) or list(blocks) != sorted(set(blocks)):
        raise InputError(
            f"stages {','.join(map(str, blocks))} do not fit a model of {depth} blocks",
            code="stages",
            expected=f"ascending block indices from 0 to {depth - 1}",
            hint=f"for example --stages {','.join(map(str, default_blocks(depth)))}",
        )


def parse_stages(text: str | None, keep_rate: float) -> StageRequest:
    """Return where to prune: None, "3,6,9" or "3:0.7,6:0.5,9:0.35".

    Raises:
        InputError: `stages` when the text is neither, `keep-rate` when a rate is out of range.
    """
    check_keep_rate(keep_rate)
    if text is None:
        return StageRequest(keep_rate)
    try:
        pairs = [part.split(":") for part in text.split(",")]
        blocks = tuple(int(pair[0]) for pair in pairs)
        rates = tuple(float(pair[1]) for pair in pairs if len(pair) == 2)
        if any(len(pair) > 2 for pair in pairs) or len(rates) not in (0, len(blocks)):
            raise ValueError
    except ValueError:
        raise InputError(
            f"--stages {text} cannot be read",
            code="stages",
            expected="block indices, all with a keep rate or none",
            hint="for example --stages 3,6,9 or --stages 3:0.7,6:0.5,9:0.35",
        ) from None
    return StageRequest(keep_rate, blocks, rates or None)
