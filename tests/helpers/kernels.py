"""Cases for the CUDA kernels and their host rendition, judged by the torch reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks._kernels import GatherTokensParams, ScatterTokensParams, TopkGatherParams
from edgeprune.pruning.ops import MODE_MASS, MODE_THRESHOLD, MODE_TOP_K, ORDER_POSITION, ORDER_RANK, topk_gather
from tests.helpers.scores import AWKWARD

SCORE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
EDGE_SIZES = (1, 2, 3, 31, 32, 33, 64, 196, 255, 256, 257, 511, 576, 1023, 1024, 1025, 2048, 4095, 4096)
ROW_BYTES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 40, 48, 64, 96, 768)
ORDERS = (ORDER_RANK, ORDER_POSITION)
MODES = (MODE_TOP_K, MODE_THRESHOLD, MODE_MASS)
POISON = 0xA5

Scores = Callable[[np.random.Generator, int], np.ndarray]


def _softmax(rng: np.random.Generator, n: int) -> np.ndarray:
    values = np.exp(rng.standard_normal(n) * 2)
    return values / values.sum()


SCORES: dict[str, Scores] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "softmax": _softmax,
    "few values": lambda rng, n: rng.integers(0, 4, n) / 1024,
    "equal": lambda rng, n: np.full(n, rng.standard_normal()),
    "nan": lambda rng, n: np.full(n, np.nan),
    "zeros of both signs": lambda rng, n: np.where(rng.random(n) < 0.5, 0.0, -0.0),
    "awkward": lambda rng, n: np.array(AWKWARD)[rng.integers(0, len(AWKWARD), n)],
    "subnormal": lambda rng, n: rng.integers(0, 1 << 20, n).astype(np.uint32).view(np.float32),
    "any bits": lambda rng, n: rng.integers(0, 1 << 32, n, np.uint32).view(np.float32),
    "neighbours": lambda rng, n: 1 + rng.integers(0, 8, n) * 2.0**-23,
    "rising": lambda rng, n: np.arange(n),
    "falling": lambda rng, n: -np.arange(n),
}


@dataclass(frozen=True)
class Case:
    """One call of topk_gather: scores [B, N] of a score type, tokens [B, P+N, bytes of a row] as bytes."""

    name: str
    scores: torch.Tensor
    tokens: np.ndarray
    k: int
    order: int = ORDER_RANK
    mode: int = MODE_TOP_K
    threshold: float = 0.0

    @property
    def prefix(self) -> int:
        """P."""
        return self.tokens.shape[1] - self.scores.shape[1]

    def params(self) -> TopkGatherParams:
        """Return the case as the C interface takes it."""
        batch, n = self.scores.shape
        row_bytes, score_type = self.tokens.shape[2], SCORE_TYPES[self.scores.dtype]
        return TopkGatherParams(
            batch, n, self.k, self.prefix, row_bytes, score_type, self.order, self.mode, self.threshold
        )

    def score_bytes(self) -> np.ndarray:
        """Return the scores as bytes."""
        return self.scores.contiguous().view(torch.uint8).numpy()

    def outputs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return poisoned kept, indices and count."""
        batch, _, row_bytes = self.tokens.shape
        shapes = ((batch, self.prefix + self.k, row_bytes), np.uint8), ((batch, self.k), np.int32), ((batch,), np.int32)
        return tuple(poisoned(shape, dtype) for shape, dtype in shapes)

    def check(self, kept: np.ndarray, indices: np.ndarray, count: np.ndarray) -> None:
        """Hold outputs against the reference, byte for byte."""
        reference = topk_gather(
            self.scores, torch.from_numpy(self.tokens), self.k, self.prefix, self.order, self.mode, self.threshold
        )
        for what, ours, wanted in zip(("kept", "indices", "count"), (kept, indices, count), reference, strict=True):
            assert np.array_equal(ours, wanted.numpy()), f"{what} of {self}"

    def __str__(self) -> str:
        batch, n = self.scores.shape
        return (
            f"{self.name}, {self.scores.dtype}, B={batch} N={n} k={self.k} P={self.prefix} "
            f"row={self.tokens.shape[2]} order={self.order} mode={self.mode} threshold={self.threshold!r}"
        )


def poisoned(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Return an array none of whose bytes is what a kernel should leave by accident."""
    array = np.empty(shape, dtype)
    array.view(np.uint8)[...] = POISON
    return array


def random_tokens(rng: np.random.Generator, batch: int, rows: int, row_bytes: int) -> np.ndarray:
    """Return [batch, rows, row_bytes] uint8."""
    return rng.integers(0, 256, (batch, rows, row_bytes), np.uint8)


def random_case(seed: int, sizes: tuple[int, ...] = EDGE_SIZES, families: tuple[str, ...] = tuple(SCORES)) -> Case:
    """Return a case of any kind; every second size is drawn from `sizes`, the others from their range."""
    rng = np.random.default_rng(seed)
    n = int(rng.choice(sizes)) if rng.random() < 0.5 else int(rng.integers(min(sizes), max(sizes) + 1))
    batch = int(rng.integers(1, 4))
    name = str(rng.choice(families))
    values = np.stack([SCORES[name](rng, n) for _ in range(batch)]).astype(np.float32)
    with np.errstate(over="ignore"):
        scores = torch.from_numpy(values).to(list(SCORE_TYPES)[rng.integers(3)])
    k = int(rng.choice([1, n, max(1, n - 1), int(rng.integers(1, n + 1)), int(rng.integers(1, n + 1))]))
    tokens = random_tokens(rng, batch, n + int(rng.integers(0, 6)), int(rng.choice(ROW_BYTES)))
    mode = int(rng.integers(3))
    return Case(name, scores, tokens, k, int(rng.integers(2)), mode, random_threshold(rng, mode, scores))


def random_threshold(rng: np.random.Generator, mode: int, scores: torch.Tensor) -> float:
    """Return a threshold in float32; in mode 1 often one of the scores, so that the edge is hit."""
    if mode == MODE_THRESHOLD and rng.random() < 0.6:
        return float(scores.flatten()[int(rng.integers(scores.numel()))])
    choices = [0.0, -0.5, 0.25, 0.5, 0.9, 1.0, 1.5, float(rng.random()), float("inf"), float("nan")]
    return float(np.float32(rng.choice(choices)))


def random_indices(rng: np.random.Generator, batch: int, n: int, k: int, *, awkward: bool = False) -> np.ndarray:
    """Return [batch, k] int32 below n: distinct, or when awkward also repeated and out of range."""
    if awkward:
        return rng.integers(-3, n + 3, (batch, k)).astype(np.int32)
    return np.stack([rng.permutation(n)[:k] for _ in range(batch)]).astype(np.int32)


def gathered(tokens: np.ndarray, indices: np.ndarray, prefix: int) -> np.ndarray:
    """Return what gather_tokens gives: zeros where an index is out of range."""
    rows = []
    for image, chosen in zip(tokens, indices, strict=True):
        patches = image[prefix:]
        zeros = np.zeros_like(image[0])
        picked = [patches[i] if 0 <= i < len(patches) else zeros for i in chosen]
        rows.append(np.stack([*image[:prefix], *picked]))
    return np.stack(rows)


def scattered(base: np.ndarray, tokens: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Return what scatter_tokens gives: the last of equal indices counts, those out of range are ignored."""
    out = base.copy()
    for image, rows, chosen in zip(out, tokens, indices, strict=True):
        for row, i in zip(rows, chosen, strict=True):
            if 0 <= i < len(image):
                image[i] = row
    return out


def gather_params(tokens: np.ndarray, indices: np.ndarray, prefix: int) -> GatherTokensParams:
    """Return sizes as the C interface takes them."""
    batch, rows, row_bytes = tokens.shape
    return GatherTokensParams(batch, rows - prefix, indices.shape[1], prefix, row_bytes)


def scatter_params(base: np.ndarray, indices: np.ndarray) -> ScatterTokensParams:
    """Return sizes as the C interface takes them."""
    batch, n, row_bytes = base.shape
    return ScatterTokensParams(batch, n, indices.shape[1], row_bytes)
