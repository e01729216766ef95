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

    PRE_BLOCK = "pre_block"  # on the residual stream, before the block; attention read here is the previous block's
    MID_BLOCK = "mid_block"  # after the attention residual, before the MLP


class Needs(str, Enum):
    """What a scorer reads; the block computes that and nothing more, the main attention stays fusable."""

    TOKENS = "tokens"  # the patch tokens themselves, [B, N, D]
    CLASS_ATTENTION = "class_attention"  # the CLS row of the attention, [B, H, N]
    MEAN_ATTENTION = "mean_attention"  # the attention a token receives, mean over heads and queries, [B, N]
    KEYS = "keys"  # [B, H, N, d]
    VALUES = "values"  # [B, H, N, d]
    CONTEXT = "context"  # what the attention puts out per head, before the projection, [B, H, N, d]


OF_ATTENTION = frozenset(Needs) - {Needs.TOKENS}


@dataclass
class Context:
    """What a stage sees; a field is None unless the scorer needs it.

    Attributes:
        tokens: [B, N, D] patch tokens at the place of the stage.
        valid: [B, N] bool, slots that hold a token; None when all do.
        class_attention: [B, H, N] attention of the CLS query over the patch tokens.
        mean_attention: [B, N] attention the patch tokens receive, mean over heads and queries.
        keys, values, context: [B, H, N, d] of the patch tokens.
    """

    tokens: Tensor
    valid: Tensor | None = None
    class_attention: Tensor | None = None
    mean_attention: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    context: Tensor | None = None


class Scorer:
    """Ranks tokens; higher stays. Subclasses are frozen dataclasses."""

    needs: frozenset[Needs] = frozenset()

    def build(self, config: ViTConfig) -> nn.Module | None:
        """Return the module that holds the scorer's weights, or None when it has none."""
        return None

    def macs(self, config: ViTConfig, tokens: int) -> int:
        """Multiply-accumulates for `tokens` patch tokens of one image, as the literature counts them."""
        return 0

    def with_training_parts(self) -> Scorer:
        """Return the scorer whose module also holds what only training reads."""
        return self

    def score(self, context: Context, module: nn.Module | None) -> Tensor:
        """Return scores [B, N] float32; slots without a token may hold anything finite."""
        raise NotImplementedError


@dataclass
class Selection:
    """Which tokens stay.

    Attributes:
        positions: [B, K] int64 into the N tokens, best first.
        counts: [B] int64 tokens the image keeps; slots from there on are not its tokens. More than K means that the
            slots did not suffice.
    """

    positions: Tensor
    counts: Tensor


class Selector:
    """Chooses tokens from scores. Subclasses are frozen dataclasses.

    Attributes:
        adaptive: the number of tokens depends on the image; the stage's count is then the number of slots.
        fill: slots past an image's count hold tokens that stay too.
        exact_in_batch: what an image keeps does not depend on the other images of its batch.
    """

    adaptive: bool = False
    fill: bool = False
    exact_in_batch: bool = True

    def select(self, scores: Tensor, valid: Tensor | None, module: nn.Module | None) -> Selection:
        """Return the choice.

        Args:
            scores: [B, N] float32.
            valid: [B, N] bool, slots that hold a token; None when all do.
            module: the stage's weights, None when it has none.
        """
        raise NotImplementedError

    def margin(self, scores: Tensor, valid: Tensor | None, module: nn.Module | None) -> Tensor:
        """Return [B]: how far an image's choice is from another one, as a share of the scores next to it."""
        import torch

        return torch.full((len(scores),), torch.inf)


@dataclass(frozen=True)
class TopK(Selector):
    """The `k` highest scores, by rank; ties go to the lower index."""

    k: int

    def select(self, scores: Tensor, valid: Tensor | None, module: nn.Module | None) -> Selection:
        """Return `k` positions for every image."""
        from edgeprune.pruning.ops import rank_tokens

        return Selection(rank_tokens(scores)[:, : self.k], scores.new_full((len(scores),), self.k).long())

    def margin(self, scores: Tensor, valid: Tensor | None, module: nn.Module | None) -> Tensor:
        """Return [B]: between the worst kept and the best dropped score."""
        from edgeprune.pruning.adaptive import rank_margin

        return rank_margin(scores, self.k)


@dataclass(frozen=True)
class Constant(Selector):
    """Always the same positions, whatever the image."""

    indices: tuple[int, ...]

    def select(self, scores: Tensor, valid: Tensor | None, module: nn.Module | None) -> Selection:
        """Return the positions for every image."""
        import torch

        positions = torch.tensor(self.indices, device=scores.device).expand(len(scores), -1)
        return Selection(positions, scores.new_full((len(scores),), len(self.indices)).long())


class RateUse(str, Enum):
    """What a keep rate means to a method."""

    REQUIRED = "required"  # it says how many tokens stay
    SLOTS = "limits slots"  # optional; the image decides, up to that many
    NONE = "not taken"  # the method's options say how many tokens go, or nothing does


class Reducer(str, Enum):
    """What becomes of the tokens that are not selected."""

    DROP = "drop"
    FUSE = "fuse"  # their score-weighted sum stands behind the kept tokens (EViT)
    STASH = "stash"  # they wait, as they are, and come back in front of the last block (last-layer fusion of Cropr)
    MERGE = "merge"  # each is averaged into the token most like it (ToMe)


@dataclass(frozen=True)
class Stage:
    """One point where the sequence shrinks.

    Attributes:
        block: 0-based block index.
        where: place relative to that block.
        counts: tokens before and after, resolved; of an adaptive stage, slots.
        index: the stage's place in the method's list; its weights live under `prune.<index>.`.
    """

    block: int
    where: Where
    scorer: Scorer
    selector: Selector
    reducer: Reducer
    counts: StageCounts
    index: int = 0

    @property
    def attention_block(self) -> int | None:
        """The block whose attention the scorer reads, None when it reads none."""
        if not self.scorer.needs & OF_ATTENTION:
            return None
        return self.block - 1 if self.where is Where.PRE_BLOCK else self.block


@dataclass(frozen=True)
class MethodOption:
    """A setting of a method: `--method-option NAME=VALUE`.

    Attributes:
        kind: bool, int, float or str; how the text is read.
        choices: allowed values, empty for any.
        least, most: limits of a number, None for none.
    """

    name: str
    kind: type
    default: Any
    help: str
    choices: tuple[Any, ...] = ()
    least: float | None = None
    most: float | None = None

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
        if value is None or (self.choices and value not in self.choices) or not self._within(value):
            raise InputError(
                f"--method-option {self.name}={text} does not fit method '{method}'",
                code="method-option",
                expected=f"one of {', '.join(map(str, self.choices))}" if self.choices else self._kind_text(),
                hint="run `edgeprune methods` for every method's options",
            )
        return value

    def _within(self, value: Any) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def _kind_text(self) -> str:
        text = {bool: "true or false", int: "a whole number", float: "a number"}.get(self.kind, "a text")
        text += "" if self.least is None else f", at least {self.least:g}"
        return text + ("" if self.most is None else f", at most {self.most:g}")


@dataclass(frozen=True)
class StageRequest:
    """Where and how much a user wants to prune; None means the method's own rule."""

    keep_rate: float = 1.0
    blocks: tuple[int, ...] | None = None
    rates: tuple[float, ...] | None = None


Schedule = tuple[tuple[int, ...], tuple[StageCounts, ...]]  # blocks, and the counts of each


@dataclass(frozen=True)
class Method:
    """A pruning method: everything the tool needs to know of it.

    Attributes:
        summary: one line for `edgeprune methods`.
        source: paper and section.
        rule: how keep rates become counts (of an adaptive method, slots); None when the method's options say how many
            tokens go and a keep rate has no meaning.
        make_stages: builds the stages from (config, blocks, counts, options).
        schedule: blocks and counts from (config, request, options) where the rule does not say it all.
        default_blocks: places of the stages for (config, options).
        adaptive: whether, for some options, the image decides how many tokens stay; a keep rate is then optional and
            limits the slots.
        needs_class_token: the method reads the CLS token.
        key_prefixes: official state_dict prefix -> ours, both ways.
        training_keys: regular expression found in keys, by either name, that only training reads.
        notes: what a user should know of it: where it follows the paper, the official code or our reading, licences.
    """

    name: str
    summary: str
    source: str
    rule: CountRule | None
    make_stages: Callable[[ViTConfig, Sequence[int], Sequence[StageCounts], Mapping[str, Any]], list[Stage]]
    schedule: Callable[[ViTConfig, StageRequest, Mapping[str, Any]], Schedule] | None = None
    default_blocks: Callable[[ViTConfig, Mapping[str, Any]], tuple[int, ...]] = lambda config, options: quarter_blocks(
        config.depth
    )
    adaptive: Callable[[Mapping[str, Any]], bool] = lambda options: False
    needs_class_token: bool = False
    options: tuple[MethodOption, ...] = ()
    key_prefixes: Mapping[str, str] = field(default_factory=dict)
    training_keys: str | None = None
    notes: tuple[str, ...] = ()

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

    def rate_use(self, options: Mapping[str, Any]) -> RateUse:
        """Return what a keep rate means with these options, defaults filled in."""
        if self.rule is None:
            return RateUse.NONE
        return RateUse.SLOTS if self.adaptive(options) else RateUse.REQUIRED

    def blocks(self, config: ViTConfig, request: StageRequest, options: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the places of the stages: those of the request, or the method's own.

        Raises:
            InputError: `stages` when they do not fit the model.
        """
        blocks = self.default_blocks(config, options) if request.blocks is None else request.blocks
        check_blocks(blocks, config.depth)
        return blocks

    def rates(self, config: ViTConfig, request: StageRequest, options: Mapping[str, Any]) -> tuple[float, ...]:
        """Return the keep rate of every stage in the sense of the method's rule."""
        assert self.rule is not None
        blocks = self.blocks(config, request, options)
        return request.rates or self.rule.stage_rates(request.keep_rate, len(blocks))

    def official_key(self, key: str) -> str:
        """Return the name the method's official code gives to one of our keys."""
        for official, ours in self.key_prefixes.items():
            if key.startswith(ours):
                return official + key.removeprefix(ours)
        return key

    def stages(self, config: ViTConfig, request: StageRequest, options: Mapping[str, Any]) -> tuple[Stage, ...]:
        """Return the stages that change something, counts resolved.

        Stages of a fixed count that keep every token are left out, so keep rate 1 is the dense model.

        Raises:
            InputError: `keep-rate`, `stages`, `method-option` or `model-config` when the request does not fit.
        """
        stages = self.every_stage(config, request, options)
        return tuple(s for s in stages if s.selector.adaptive or s.counts.kept < s.counts.tokens_in)

    def every_stage(self, config: ViTConfig, request: StageRequest, options: Mapping[str, Any]) -> tuple[Stage, ...]:
        """Return the stages, counts resolved, also those that keep every token: all that may hold weights.

        Raises:
            InputError: `keep-rate`, `stages`, `method-option` or `model-config` when the request does not fit.
        """
        check_keep_rate(request.keep_rate)
        if self.needs_class_token and not config.class_token:
            raise InputError(
                f"method '{self.name}' ranks tokens by the CLS token's attention; '{config.name}' has no CLS token",
                code="model-config",
                expected="a model with a class token",
                hint="use dynamicvit, tome or random, or a model with a class token",
            )
        if self.rule is None and (request.keep_rate != 1 or request.rates):
            raise InputError(
                f"method '{self.name}' takes no keep rate",
                code="keep-rate",
                expected=f"the options {', '.join(o.name for o in self.options)}",
                hint="leave out --keep-rate and rates in --stages; see `edgeprune methods`",
            )
        if self.schedule is not None:
            blocks, counts = self.schedule(config, request, options)
        else:
            blocks, rates = self.blocks(config, request, options), self.rates(config, request, options)
            assert self.rule is not None
            counts = resolve_counts(self.rule, config.num_patches, rates, fuse=bool(options.get("fuse", False)))
        made = self.make_stages(config, blocks, counts, options)
        stages = tuple(replace(stage, index=i) for i, stage in enumerate(made))
        if any(stage.attention_block == -1 for stage in stages):
            raise InputError(
                f"method '{self.name}' cannot prune in front of block 0: it ranks by the attention of the block before",
                code="stages",
                expected=f"block indices from 1 to {config.depth - 1}",
            )
        return stages


def quarter_blocks(depth: int) -> tuple[int, ...]:
    """Return the usual three places: 3, 6, 9 of 12 blocks; 4, 8, 12 of 16; 5, 10, 15 of 20."""
    return tuple(sorted({depth * s // 4 for s in (1, 2, 3)} - {0}))


def check_blocks(blocks: Sequence[int], depth: int) -> None:
    """Raise InputError `stages` unless the blocks exist and ascend."""
    if any(not 0 <= b < depth for b in blocks) or list(blocks) != sorted(set(blocks)):
        raise InputError(
            f"stages {','.join(map(str, blocks))} do not fit a model of {depth} blocks",
            code="stages",
            expected=f"ascending block indices from 0 to {depth - 1}",
            hint=f"for example --stages {','.join(map(str, quarter_blocks(depth)))}",
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


def format_stages(blocks: Sequence[int], rates: Sequence[float] | None = None) -> str | None:
    """Return the text `parse_stages` reads as these blocks and rates; None for no block."""
    if not blocks:
        return None
    return ",".join(f"{b}:{r:g}" for b, r in zip(blocks, rates, strict=True)) if rates else ",".join(map(str, blocks))
