"""Token pruning written from the papers' formulas: one image at a time, float64, tokens masked instead of gathered.

Nothing is shared with `edgeprune.pruning`: places, rounding and ranking are restated here. A token that was dropped
stays in the sequence and is hidden from every attention and mean, which gives the same result as removing it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeprune.models.config import ViTConfig
from tests.helpers.reference_vit import stem

FUSED = -1


@dataclass
class Outcome:
    """Result for one image.

    Attributes:
        logits: [classes].
        kept: per stage, the original patch numbers that stayed; best first where the method ranks.
        counts: per stage, how many tokens the image wanted to keep; more than stayed when slots were too few.
    """

    logits: Tensor
    kept: list[list[int]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


class Image:
    """One image on its way through the network: every token it ever had, and which are alive."""

    def __init__(self, config: ViTConfig, weights: Mapping[str, Tensor], image: Tensor) -> None:
        self.config = config
        self.w = {name: tensor.double() for name, tensor in weights.items()}
        self.prefix = config.class_token + config.distilled + config.reg_tokens
        self.x = self._embed(image.double())
        self.ids = [None] * self.prefix + list(range(len(self.x) - self.prefix))
        self.alive = [True] * len(self.x)
        self.kept: list[list[int]] = []
        self.weights: list[int] = []  # of the rows in an average; none means all alike
        self.counts: list[int] = []
        # of the block that attended last: attention [H, T, T], per-head outputs, keys and values [H, T, d]
        self.attention = self.outputs = self.keys = self.values = torch.empty(0)

    @property
    def patches(self) -> list[int]:
        """Rows of the patch and fused tokens that are alive."""
        return [i for i in range(self.prefix, len(self.x)) if self.alive[i]]

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def _embed(self, image: Tensor) -> Tensor:
        (h, w), (rows, cols) = self.config.patch_size, self.config.grid
        if self.config.stem == "lvvit":
            image, h, w = stem(self.w, image[None])[0], h // 2, w // 2
        kernel = self.w["patch_embed.proj.weight"]
        patches = []
        for r in range(rows):
            for c in range(cols):
                patch = image[:, r * h : (r + 1) * h, c * w : (c + 1) * w]
                patches.append((kernel * patch).sum((1, 2, 3)) + self.w["patch_embed.proj.bias"])
        x = torch.stack(patches)
        prefix = [self.w[name][0] for name in ("cls_token", "dist_token", "reg_token") if name in self.w]
        pos = self.w["pos_embed"][0]
        if self.config.no_embed_class:
            return torch.cat([*prefix, x + pos])
        return torch.cat([*prefix, x]) + pos

    def attend(self, block: int, key_bias: Tensor | None = None) -> Tensor:
        """Add the attention branch of a block and return its attention [H, T, T]; the bias [T] is one per key."""
        name, H = f"blocks.{block}", self.config.num_heads
        D = self.x.shape[1]
        d = D // H
        qkv = self.linear(self.norm(self.x, f"{name}.norm1", self.config.norm_eps), f"{name}.attn.qkv")
        q, k, v = (qkv[:, i * D : (i + 1) * D] for i in range(3))
        hidden = torch.tensor([not a for a in self.alive])
        outputs, attention = [], []
        for h in range(H):
            part = slice(h * d, (h + 1) * d)
            logits = q[:, part] @ k[:, part].T / math.sqrt(d)
            logits = logits if key_bias is None else logits + key_bias
            attention.append(logits.masked_fill(hidden, -math.inf).softmax(-1))
            outputs.append(attention[-1] @ v[:, part])
        y = self.linear(torch.cat(outputs, 1), f"{name}.attn.proj")
        self.x = self.x + y * self.w.get(f"{name}.ls1.gamma", 1.0) / self.config.residual_scale
        self.attention, self.outputs = torch.stack(attention), torch.stack(outputs)
        self.keys, self.values = (t.reshape(len(t), H, d).transpose(0, 1) for t in (k, v))
        return self.attention

    def add_mlp(self, block: int) -> None:
        """Add the MLP branch of a block."""
        name = f"blocks.{block}"
        h = self.norm(self.x, f"{name}.norm2", self.config.norm_eps)
        y = self.linear(F.gelu(self.linear(h, f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        self.x = self.x + y * self.w.get(f"{name}.ls2.gamma", 1.0) / self.config.residual_scale

    def keep(self, rows: Sequence[int], count: int | None = None) -> list[int]:
        """Let only these patch rows live and return the rows that died; the image wanted `count` tokens."""
        dropped = [i for i in self.patches if i not in set(rows)]
        for i in dropped:
            self.alive[i] = False
        self.kept.append([self.ids[i] for i in rows])
        self.counts.append(len(rows) if count is None else count)
        return dropped

    def outcome(self) -> Outcome:
        """Return what became of the image."""
        return Outcome(self.classify(), self.kept, self.counts)

    def classify(self) -> Tensor:
        """Return logits [classes]."""
        c = self.config
        x = self.x if c.fc_norm else self.norm(self.x, "norm", c.norm_eps)
        rows = [*range(self.prefix), *self.patches] if c.pool_include_prefix else self.patches
        share = torch.tensor([self.weights[i] if self.weights else 1.0 for i in rows], dtype=torch.float64)
        pooled = (share / share.sum()) @ x[rows] if c.global_pool == "avg" else x[0]
        if c.fc_norm:
            pooled = self.norm(pooled, "fc_norm", c.norm_eps)
        logits = self.linear(pooled, "head")
        if c.aux_head:
            logits = logits + 0.5 * self.linear(x[self.patches], "aux_head").max(0).values
        return (logits + self.linear(x[1], "head_dist")) / 2 if c.distilled else logits


def best(scores: Mapping[int, float], count: int) -> list[int]:
    """Return the rows of the highest scores, ties to the lower row."""
    return sorted(scores, key=lambda row: (-scores[row], row))[:count]


def dynamicvit(
    config: ViTConfig,
    weights: Mapping[str, Tensor],
    image: Tensor,
    places: Mapping[int, int],
    predictors: str = "prune",
) -> Outcome:
    """Methods section 3: predictors in front of blocks; `places` maps a block to the number of tokens it keeps."""
    state = Image(config, weights, image)
    for block in range(config.depth):
        if block in places:
            stage = list(places).index(block)
            state.keep(best(_predictor(state, f"{predictors}.{stage}"), places[block]))
        state.attend(block)
        state.add_mlp(block)
    return state.outcome()


def _predictor(state: Image, name: str) -> dict[int, float]:
    """Log-probability of channel 0 (keep) for every patch that is alive."""
    rows, half = state.patches, state.config.embed_dim // 2
    z = F.gelu(state.linear(state.norm(state.x[rows], f"{name}.in_conv.0", 1e-5), f"{name}.in_conv.1"))
    mean = sum(z[i, half:] for i in range(len(rows))) / len(rows)
    scores = {}
    for i, row in enumerate(rows):
        h = torch.cat([z[i, :half], mean])
        for layer in (0, 2):
            h = F.gelu(state.linear(h, f"{name}.out_conv.{layer}"))
        scores[row] = float(state.linear(h, f"{name}.out_conv.4").log_softmax(-1)[0])
    return scores


def evit(
    config: ViTConfig,
    weights: Mapping[str, Tensor],
    image: Tensor,
    blocks: Sequence[int],
    rate: float,
    *,
    fuse: bool,
) -> Outcome:
    """Methods section 8.1: mean CLS attention of the same block; the rest is summed into one token, or dropped."""
    state = Image(config, weights, image)
    for block in range(config.depth):
        attention = state.attend(block)
        if block in blocks:
            cls = attention[:, 0].mean(0)
            scores = {row: float(cls[row]) for row in state.patches}
            dropped = state.keep(best(scores, math.ceil(rate * len(scores))))
            if fuse and dropped:
                fused = sum(cls[row] * state.x[row] for row in dropped)
                state.x = torch.cat([state.x, fused[None]])
                state.alive.append(True)
                state.ids.append(FUSED)
        state.add_mlp(block)
    return state.outcome()


def constant(
    config: ViTConfig, weights: Mapping[str, Tensor], image: Tensor, positions: Mapping[int, Sequence[int]]
) -> Outcome:
    """Section 8.3: in front of a block only the tokens at these positions of the current sequence stay."""
    state = Image(config, weights, image)
    for block in range(config.depth):
        if block in positions:
            current = state.patches
            state.keep([current[i] for i in positions[block]])
        state.attend(block)
        state.add_mlp(block)
    return state.outcome()


# ------------------------------------------------------------------------------------------------ adaptive sampling


def ats(
    config: ViTConfig,
    weights: Mapping[str, Tensor],
    image: Tensor,
    points: Mapping[int, int],
    variant: str = "official",
) -> Outcome:
    """Methods section 4: inverse transform sampling inside blocks; `points` maps a block to its sample points."""
    choose = {"official": ats_official_choice, "paper": ats_paper_choice}[variant]
    state = Image(config, weights, image)
    for block in range(config.depth):
        state.attend(block)
        if block in points:
            rows = state.patches  # ascending: token order is the order of the patches in the image
            scores = [_ats_score(state, row, variant) for row in rows]
            state.keep([rows[i] for i in choose(scores, points[block])])
        state.add_mlp(block)
    return state.outcome()


def _ats_score(state: Image, row: int, variant: str) -> float:
    """Attention of CLS times the value's length: of all heads together as released, head by head in the paper."""
    heads = range(state.config.num_heads)
    attention = [float(state.attention[h, 0, row]) for h in heads]
    lengths = [math.sqrt(sum(float(e) ** 2 for e in state.values[h, row])) for h in heads]
    if variant == "official":
        return sum(attention) * math.sqrt(sum(n**2 for n in lengths))
    return sum(a * n for a, n in zip(attention, lengths, strict=True))


def ats_official_choice(scores: Sequence[float], points: int) -> list[int]:
    """Section 4.2: sorted ascending, CDF stretched to [0, 1], points from its smallest positive entry to 1."""
    everything = list(range(len(scores)))
    order = sorted(everything, key=lambda i: (scores[i], i))
    total, running, cdf = sum(scores), 0.0, []
    if len(scores) < 2 or not total > 0:
        return everything
    for i in order:
        running += scores[i] / total
        cdf.append(running)
    low, high = cdf[0], cdf[-1]
    if not high > low:
        return everything
    cdf = [(c - low) / (high - low) for c in cdf]
    start = min(c for c in cdf if c > 0)
    steps = max(points - 1, 1)
    picked = {_nearest(cdf, start + t / steps * (1 - start)) for t in range(points)}
    return [order[p] for p in sorted(picked)]


def ats_paper_choice(scores: Sequence[float], points: int) -> list[int]:
    """Section 4.1: CDF in token order, points in the middle of `points` equal parts of [0, 1]."""
    total, running, cdf = sum(scores), 0.0, []
    if len(scores) < 2 or not total > 0:
        return list(range(len(scores)))
    for score in scores:
        running += score / total
        cdf.append(running)
    return sorted({_nearest(cdf, (2 * i - 1) / (2 * points)) for i in range(1, points + 1)})


def _nearest(cdf: Sequence[float], y: float) -> int:
    """Return the first position whose entry is closest to y."""
    found = 0
    for i, c in enumerate(cdf):
        if abs(y - c) < abs(y - cdf[found]):
            found = i
    return found


# ------------------------------------------------------------------------------------------------ thresholds


def asvit(
    config: ViTConfig,
    weights: Mapping[str, Tensor],
    image: Tensor,
    blocks: Sequence[int],
    slots: Sequence[int] | None = None,
) -> Outcome:
    """Section 5: in front of a block stays what the previous block scored above the stage's threshold."""
    return asvit_batch(config, weights, [image], blocks, slots)[0]


def asvit_batch(
    config: ViTConfig,
    weights: Mapping[str, Tensor],
    images: Sequence[Tensor],
    blocks: Sequence[int],
    slots: Sequence[int] | None = None,
) -> list[Outcome]:
    """Section 5.5: every image keeps as many as the batch keeps on average, rounded down."""
    states = [Image(config, weights, image) for image in images]
    for block in range(config.depth):
        if block in blocks:
            stage = list(blocks).index(block)
            scored = [asvit_scores(state) for state in states]
            above = [sum(s > float(weights[f"prune.{stage}.keep_threshold"]) for s in own.values()) for own in scored]
            count = sum(above) // len(states)
            for state, own in zip(states, scored, strict=True):
                state.keep(best(own, count if slots is None else min(count, slots[stage])), count)
        for state in states:
            state.attend(block)
            state.add_mlp(block)
    return [state.outcome() for state in states]


def asvit_scores(state: Image) -> dict[int, float]:
    """Section 5.1: CLS attention, heads weighted by the length of what they put out at the token."""
    scores = {}
    for row in state.patches:
        lengths = [math.sqrt(sum(float(e) ** 2 for e in head[row])) for head in state.outputs]
        total = sum(lengths) + 1e-8
        scores[row] = sum(n / total * float(a[0, row]) for n, a in zip(lengths, state.attention, strict=True))
    return scores


def sait(
    config: ViTConfig,
    weights: Mapping[str, Tensor],
    image: Tensor,
    block: int,
    select: str,
    amount: float,
    tis: str = "cls",
    slots: int | None = None,
) -> Outcome:
    """Section 6: one cut in front of a block; `amount` is the mass, the value in units of 1/N, or the number."""
    state = Image(config, weights, image)
    for i in range(config.depth):
        if i == block:
            scores = _sait_scores(state, tis)
            order = best(scores, len(scores))
            count = sait_count([scores[row] for row in order], select, amount)
            state.keep(order[: count if slots is None else min(count, slots)], count)
        state.attend(i)
        state.add_mlp(i)
    return state.outcome()


def _sait_scores(state: Image, tis: str) -> dict[int, float]:
    """Attention of CLS, or of all living tokens on average, shared out over the patches."""
    queries = [0] if tis == "cls" else [i for i, alive in enumerate(state.alive) if alive]
    raw = {row: sum(float(a[q, row]) for a in state.attention for q in queries) for row in state.patches}
    return {row: score / sum(raw.values()) for row, score in raw.items()}


def sait_count(ordered: Sequence[float], select: str, amount: float) -> int:
    """Section 6.2: how many of the scores, best first and of sum 1, stay."""
    if select == "topk":
        return int(amount)
    if select == "value":
        return max(1, sum(s >= amount / len(ordered) for s in ordered))
    if amount >= 1:
        return len(ordered)
    before, count = 0.0, 0
    for score in ordered:
        if before >= amount:
            break
        before += score
        count += 1
    return max(1, count)


# ------------------------------------------------------------------------------------------------ fixed counts


def cropr(
    config: ViTConfig, weights: Mapping[str, Tensor], image: Tensor, removed: Mapping[int, int], *, llf: bool
) -> Outcome:
    """Section 7: learned queries rank the raw tokens; `removed` maps a block to the tokens taken away before it.

    With last-layer fusion they wait as they are and come back in front of the last block.
    """
    state = Image(config, weights, image)
    waiting: dict[int, Tensor] = {}
    for block in range(config.depth):
        if block in removed:
            queries = state.w[f"prune.{list(removed).index(block)}.cross_attn.queries"][0]
            rows = state.patches
            scores = {row: sum(float(query @ state.x[row]) for query in queries) for row in rows}
            dropped = state.keep(best(scores, len(rows) - removed[block]))
            waiting |= {row: state.x[row].clone() for row in dropped}
        if llf and block == config.depth - 1:
            for row, token in waiting.items():
                state.x[row], state.alive[row] = token, True
        state.attend(block)
        state.add_mlp(block)
    return state.outcome()


def tome(
    config: ViTConfig, weights: Mapping[str, Tensor], image: Tensor, merged: Mapping[int, int], *, prop_attn: bool
) -> Outcome:
    """Section 8.2: bipartite merging inside blocks; `merged` maps a block to how many tokens it wants to merge away."""
    state = Image(config, weights, image)
    sizes = [1] * len(state.x)
    for block in range(config.depth):
        bias = torch.tensor([math.log(n) for n in sizes], dtype=torch.float64) if prop_attn else None
        state.attend(block, bias)
        if merged.get(block, 0) > 0:
            pairs = tome_pairs(state.keys.mean(0), state.prefix, merged[block])
            sizes = _merge(state, pairs, sizes)
        state.add_mlp(block)
    state.weights = sizes
    return state.outcome()


def tome_pairs(metric: Tensor, prefix: int, wanted: int) -> dict[int, int]:
    """Return source -> destination, positions of the sequence: the `wanted` likeliest pairs of metric [T, d]."""
    T = len(metric)
    unit = [row / math.sqrt(sum(float(e) ** 2 for e in row)) for row in metric]
    edges: dict[int, tuple[float, int]] = {}
    for a in range(prefix, T):
        for b in range(prefix, T):
            if a % 2 == 0 and b % 2 == 1:
                likeness = float((unit[a] * unit[b]).sum())
                if a not in edges or likeness > edges[a][0]:
                    edges[a] = (likeness, b)
    chosen = best({a: likeness for a, (likeness, _) in edges.items()}, min(wanted, (T - prefix) // 2))
    return {a: edges[a][1] for a in chosen}


def _merge(state: Image, pairs: Mapping[int, int], sizes: Sequence[int]) -> list[int]:
    """Shorten the sequence to prefix, sources that stay, destinations; return the sizes of its tokens."""
    x, size = {i: sizes[i] * row for i, row in enumerate(state.x)}, dict(enumerate(sizes))
    for a, b in pairs.items():
        x[b], size[b] = x[b] + x[a], size[b] + size[a]
    patches = range(state.prefix, len(state.x))
    stay = [i for i in patches if i % 2 == 0 and i not in pairs]
    rows = [*range(state.prefix), *stay, *(i for i in patches if i % 2 == 1)]
    state.x = torch.stack([x[i] / size[i] for i in rows])
    state.ids = [state.ids[i] for i in rows]
    state.alive = [True] * len(rows)
    state.kept.append(state.ids[state.prefix :])
    state.counts.append(len(rows) - state.prefix)
    return [size[i] for i in rows]


def every(images: Tensor, one: Callable[[Tensor], Outcome]) -> tuple[Tensor, list[list[list[int]]]]:
    """Return logits [B, classes] and, per image and stage, what stayed."""
    outcomes = [one(image) for image in images]
    return torch.stack([o.logits for o in outcomes]).float(), [o.kept for o in outcomes]
