"""manifest.json: the versioned description of a bundle. No torch, no onnx.

Unknown fields and unknown schema versions are refused: a bundle is either understood whole or not used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 31)]
Size = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
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

    index: Count
    block: Count
    where: str
    tokens_in: Count
    kept: Count
    fused: Count
    reducer: str = "drop"
    adaptive: bool = False


class MethodInfo(_Model):
    """The pruning method with the settings that produced the counts, and what a user should know of it."""

    name: str
    keep_rate: float
    options: dict[str, Any] = {}
    stages: list[StageInfo] = []
    notes: list[str] = []


class BucketInfo(_Model):
    """One static size of the network behind the first adaptive stage.

    Attributes:
        capacities: slots of every stage.
        graph: the rest that runs it; one that takes `slots` as an input may serve several.
        share: share of the calibration images that end here.
        latency_ms: of one run of the rest, measured when the bundle was made.
    """

    capacities: list[Annotated[int, Field(ge=1, lt=1 << 31)]]
    graph: str
    share: Share | None = None
    latency_ms: Milliseconds | None = None


class CalibrationInfo(_Model):
    """What real images kept, and what running them is expected to take.

    Attributes:
        data: what was asked for, without its path.
        histograms: per stage (tokens an image wants to keep, images).
        curve: measured (slots at every stage, milliseconds of one run of the rest).
        stem_ms: milliseconds of one run of the stem.
        dense_ms: milliseconds the dense graph takes for as many images.
        expected_ms: mean over the images of stem and rest, runs that overflow included.
        overflow: share of these images that run again in a larger bucket.
        held_out_overflow: the same of images the buckets were not chosen by (two halves, each judged by the buckets of
            the other): what to expect of others. None with filled slots, whose buckets are tried out instead.
        batch, threads: of the measured runs.
        cpu: processor they were measured on.
    """

    data: str
    images: Size
    histograms: list[list[tuple[int, int]]]
    curve: list[tuple[int, Milliseconds]]
    stem_ms: Milliseconds
    dense_ms: Milliseconds
    expected_ms: Milliseconds
    overflow: Share
    held_out_overflow: Share | None = None
    batch: int
    threads: int
    cpu: str


class AdaptiveInfo(_Model):
    """How a bundle runs a method whose token counts depend on the image.

    Attributes:
        form: "slots": one graph with as many slots as an image may need, of which it pays all; "computed": one graph
            for one image whose shapes follow it; "ragged": one for a batch, whose images' rows lie one behind the
            other; "buckets": a stem, and a rest for each of a few sizes.
        fill: what slots past an image's count hold: tokens that are masked, which is exact, or the next best ones.
        buckets: nested, the last holds all.
        told: a graph that takes `slots` and could run every bucket, beside those of the buckets: an engine of it has a
            profile for each. None where there is no such choice.
    """

    form: Literal["slots", "computed", "ragged", "buckets"]
    fill: Literal["mask", "next-best"] = "mask"
    buckets: list[BucketInfo] = []
    told: str | None = None
    calibration: CalibrationInfo | None = None


class RangesInfo(_Model):
    """Which images gave the ranges of a static quantization.

    Attributes:
        data: what was asked for, without its path; "noise" when there was none.
        method: how a range follows from what was seen, such as "percentile:99.99".
        values: least and largest value of the input of every quantized layer, of the pruned graph.
    """

    data: str
    images: Size
    method: str
    values: dict[str, tuple[FiniteFloat, FiniteFloat]]


class QuantizedAccuracy(_Model):
    """What quantization costs, judged on real images.

    Attributes:
        data: what was asked for, without its path.
        held_out: the images had no part in choosing anything.
        float_top1, top1: share of the images that the float model and the quantized graph get right; None when the
            images have no labels that the model knows.
        top1_agreement: share with the same best class.
        kept_overlap: mean Jaccard index of the kept sets, None without stages.
    """

    data: str
    images: Size
    held_out: bool
    float_top1: Share | None = None
    top1: Share | None = None
    top1_agreement: Share
    kept_overlap: Share | None = None

    @property
    def drop(self) -> float:
        """Points of top-1 lost; without labels the points that disagree, which are as many at most."""
        if self.float_top1 is None or self.top1 is None:
            return 100 * (1 - self.top1_agreement)
        return 100 * (self.float_top1 - self.top1)


class QuantizedSpeed(_Model):
    """Milliseconds of the pruned graph in each form that was tried, in turns, on the machine that exported.

    Attributes:
        ms: by form: "float", "dynamic", "static".
    """

    ms: dict[str, Milliseconds]
    batch: Size
    threads: Size
    cpu: str


class QuantizationInfo(_Model):
    """How the linear layers are quantized, and what that costs.

    Attributes:
        precision: of weights and activations.
        scheme: "dynamic": the range of a layer's input is taken as it runs, over the whole batch; "static": from
            `ranges`.
        weight_bits: of a weight.
        layers: how many are quantized.
        kept_float: linear layers that are not.
        ranges: None for the dynamic scheme.
        accuracy: None when no images were given.
        speed: None for a bundle of another device.
    """

    precision: Literal["int8", "fp8"]
    scheme: Literal["dynamic", "static"]
    weight_bits: Size
    layers: Size
    kept_float: list[str] = []
    ranges: RangesInfo | None = None
    accuracy: QuantizedAccuracy | None = None
    speed: QuantizedSpeed | None = None


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
    """One ONNX graph of the bundle.

    Attributes:
        variant_of: the graph that computes the same in another form; which of the two runs is chosen on the device.
        plugin: it holds nodes of the `edgeprune` plugin without bodies.
    """

    file: str
    inputs: Annotated[list[TensorInfo], Field(min_length=1)]
    outputs: Annotated[list[TensorInfo], Field(min_length=1)]
    variant_of: str | None = None
    plugin: bool = False


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


class DensityInfo(_Model):
    """One of several keep rates of a bundle.

    Attributes:
        keep_rate: names it.
        graph: runs it; one that takes `slots` as an input runs several.
        stages: those of this keep rate; none where every token stays.
    """

    keep_rate: Share
    graph: str
    stages: list[StageInfo]
    macs: Macs
    parity: ParityInfo | None = None


class FileInfo(_Model):
    """Size and hash of a file of the bundle."""

    sha256: Sha256
    bytes: int


class Manifest(_Model):
    """The whole manifest; `graphs["model"]` is the pruned graph, `dense` and `random` are its baselines.

    A bucketed bundle has `stem` and one or more `rest` graphs in place of `model`. `densities` are the keep rates
    a session can switch between, in the order they were asked for; `method` and `macs` describe the first that prunes.
    `tensorrt` tells for each version of TensorRT why it does not take the graphs; nothing where it does, None for a
    bundle that is not for TensorRT.
    """

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
    selection: Literal["native", "plugin", "auto", "none"]
    quantization: QuantizationInfo | None = None
    dead_rows: bool
    macs: Macs | None = None
    graphs: dict[str, GraphInfo]
    adaptive: AdaptiveInfo | None = None
    densities: list[DensityInfo] = []
    preprocessing: PreprocessInfo
    labels: list[str] | None = None
    tensorrt: dict[str, list[str]] | None = None
    parity: ParityInfo | None = None
    warnings: list[str] = []
    files: dict[str, FileInfo]
