"""manifest.json: the versioned description of a bundle. No torch, no onnx.

Unknown fields and unknown schema versions are refused: a bundle is either understood whole or not used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(gt=0)]
Deviation = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelInfo(_Model):
    """The backbone. `config` holds the fields of `ViTConfig`; None for a traced module."""

    name: str
    parameters: int
    config: dict[str, Any] | None = None


class WeightsInfo(_Model):
    """Where the weights came from; `file` is a name or a hub reference, never a path."""

    source: Literal["checkpoint", "random", "module"]
    file: str | None = None
    sha256: Sha256 | None = None
    seed: int | None = None
    ema: bool = False


class StageInfo(_Model):
    """One stage: counts exclude the prefix. `index` is its place in the method's list, stages that keep all counted.

    Of an adaptive stage `kept` is the number of slots: an image keeps as many tokens as it needs, up to that.
    """

    index: int
    block: int
    where: str
    tokens_in: int
    kept: int
    fused: int
    reducer: str = "drop"
    adaptive: bool = False


class MethodInfo(_Model):
    """The pruning method with the settings that produced the counts, and what a user should know of it."""

    name: str
    keep_rate: float
    options: dict[str, Any] = {}
    stages: list[StageInfo] = []
    notes: list[str] = []


class Macs(_Model):
    """Multiply-accumulates of one image.

    `dense` and `pruned` are what the literature counts; `*_executed` is what the graph computes once rows
    nobody reads are gone.
    """

    dense: int
    pruned: int
    dense_executed: int
    pruned_executed: int


class TensorInfo(_Model):
    """A graph input or output; -1 marks a dynamic dimension."""

    name: str
    dtype: str
    shape: list[int]


class GraphInfo(_Model):
    """One ONNX graph of the bundle."""

    file: str
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]


class PreprocessInfo(_Model):
    """How an image becomes an input; see `edgeprune.data.preprocess`."""

    image_size: tuple[Size, Size]
    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat]
    std: tuple[Deviation, Deviation, Deviation]
    crop_pct: Annotated[float, Field(ge=0.1, le=1)]
    interpolation: str


class ParityInfo(_Model):
    """Agreement of the exported graph with PyTorch on fresh inputs, as `edgeprune verify` computes it.

    Attributes:
        images: inputs the figures are of.
        kept_overlap: mean Jaccard index of the kept sets, None when the graph does not tell them.
        counts_agreement: share of images with the same token counts and overflow, None likewise.
        undecided: inputs set aside: both sides disagreed, and rounding decides what they keep.
    """

    images: int
    max_abs_error: float
    max_rel_error: float
    top1_agreement: float
    kept_overlap: float | None = None
    counts_agreement: float | None = None
    undecided: int = 0
    tolerance: float


class FileInfo(_Model):
    """Size and hash of a file of the bundle."""

    sha256: Sha256
    bytes: int


class Manifest(_Model):
    """The whole manifest; `graphs["model"]` is the pruned graph, `dense` and `random` are its baselines."""

    schema_version: Literal[1] = 1
    tool: str = "edgeprune"
    tool_version: str
    created: str
    model: ModelInfo
    weights: WeightsInfo
    method: MethodInfo
    target: str
    precision: str
    opset: int
    batch: tuple[int, int]
    lowering: Literal["emitted", "traced"]
    selection: Literal["native", "plugin", "none"]
    dead_rows: bool
    macs: Macs | None = None
    graphs: dict[str, GraphInfo]
    preprocessing: PreprocessInfo
    labels: list[str] | None = None
    parity: ParityInfo | None = None
    warnings: list[str] = []
    files: dict[str, FileInfo]
