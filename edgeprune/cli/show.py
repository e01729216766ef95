"""Tables that several verbs show of a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from edgeprune.cli.ui import table
from edgeprune.pruning import METHODS
from edgeprune.pruning.base import RateUse, Reducer, Where
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.manifest import (
    AdaptiveInfo,
    CalibrationInfo,
    DensityInfo,
    Macs,
    Manifest,
    ParityInfo,
    QuantizationInfo,
    StageInfo,
)

BARS = " ▁▂▃▄▅▆▇█"
BINS = 32
SHOWN_LAYERS = 8  # kept float
OTHERS = {
    Reducer.DROP.value: "dropped",
    Reducer.FUSE.value: "fused into one",
    Reducer.STASH.value: "back in the last block",
    Reducer.MERGE.value: "merged into kept ones",
}


def summary(bundle: Bundle) -> list[tuple[str, Any]]:
    """Return what a bundle is: rows for `pairs`."""
    m = bundle.manifest
    return [
        ("bundle", bundle.path),
        ("model", f"{m.model.name}, {m.model.parameters / 1e6:.2f} M parameters"),
        ("weights", weights_words(m)),
        ("method", method_words(m)),
        ("target", f"{m.target} ({m.precision}), opset {m.opset}, batch {batch_words(m.batch)}"),
        ("graph", f"{m.lowering}, selection {m.selection}, dead rows {'left out' if m.dead_rows else 'computed'}"),
        ("token counts", None if m.adaptive is None else adaptive_words(m.adaptive)),
        ("keep rates", ", ".join(f"{d.keep_rate:g}" for d in m.densities) or None),
        ("MACs", None if m.macs is None else macs_words(m.macs, m.method.stages)),
        ("quantized", None if m.quantization is None else quantization_words(m.quantization)),
        ("cost", None if m.quantization is None else quantization_cost(m.quantization)),
        ("parity", None if m.parity is None else parity_words(m.parity)),
        ("TensorRT", None if m.tensorrt is None else tensorrt_words(m.tensorrt)),
    ]


def plan_summary(plan: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return what an export would do: rows for `pairs`."""
    options = "".join(f", {key}={str(value).lower()}" for key, value in plan["options"].items())
    return [
        ("model", plan["model"]),
        ("method", plan["method"] + options),
        ("target", f"{plan['target']}, opset {plan['opset']}, batch {batch_words(plan['batch'])}"),
        ("token counts", plan["form"] and f"{plan['form']} {plan['buckets'] or ''}".rstrip()),
        ("keep rates", ", ".join(plan["densities"]) or None),
        ("MACs", macs_words(Macs(**plan["macs"]), [StageInfo(**stage) for stage in plan["stages"]])),
        ("steps", "\n".join(plan["steps"])),
        ("files", ", ".join(plan["files"])),
    ]


def quantization_words(info: QuantizationInfo) -> str:
    """Return which layers are quantized and how."""
    of = info.layers + len(info.kept_float)
    ranges = info.ranges
    how = "ranges taken as it runs" if ranges is None else f"{ranges.method} of {ranges.images} images of {ranges.data}"
    text = f"{info.layers} of {of} linear layers, {info.weight_bits}-bit weights, {info.scheme}: {how}"
    return text + "".join(f"\nfloat: {layer}" for layer in info.kept_float[:SHOWN_LAYERS])


def quantization_cost(info: QuantizationInfo) -> str | None:
    """Return what quantization costs in accuracy and gains in time, as far as it was measured."""
    parts, found = [], info.accuracy
    if found is not None:
        if found.float_top1 is not None and found.top1 is not None:
            parts.append(f"top-1 {100 * found.float_top1:.2f} % in float, {100 * found.top1:.2f} % quantized")
        parts.append(f"the same class for {100 * found.top1_agreement:.2f} %")
        if found.kept_overlap is not None:
            parts.append(f"kept tokens overlap by {100 * found.kept_overlap:.1f} %")
        parts[-1] += f" ({found.images} {'held-out ' if found.held_out else ''}images of {found.data})"
    if info.speed is not None:
        ms = info.speed.ms
        parts.append(
            f"{ms['float'] / ms[info.scheme]:.2f} times as fast as float32 where it was exported ({info.speed.cpu}, "
            f"batch {info.speed.batch}, {info.speed.threads} thread)"
        )
    return ", ".join(parts) or None


def emulation_words(reason: str) -> str:
    """Return what it means that a check did not run on the bundle's device, and why it did not."""
    return f"emulated on this processor, float32 with every tensor rounded to its type: {reason}"


def tensorrt_words(why_not: Mapping[str, Sequence[str]]) -> str:
    """Return which versions of TensorRT take the graphs, and what stops the others."""
    takes = ", ".join(version for version, reasons in why_not.items() if not reasons) or "none"
    refuses = [f"\nnot {version}: {'; '.join(reasons)}" for version, reasons in why_not.items() if reasons]
    return f"{takes}{''.join(refuses)}"


def adaptive_words(adaptive: AdaptiveInfo) -> str:
    """Return how token counts that depend on the image run."""
    if adaptive.form != "buckets":
        return {
            "slots": "as many slots as an image may need; those it does not need are masked",
            "computed": "shapes follow the image, images run one by one",
            "ragged": "rows of all images of the batch lie one behind the other",
        }[adaptive.form]
    sizes = ", ".join(str(bucket.capacities[0]) for bucket in adaptive.buckets)
    fill = "masked" if adaptive.fill == "mask" else "filled with the next best tokens"
    text = f"buckets of {sizes} patch tokens, free slots {fill}"
    found = adaptive.calibration
    return text if found is None else f"{text}; {found.expected_ms:.3g} ms expected per image, {found.threads} thread"


def bucket_rows(adaptive: AdaptiveInfo) -> Table:
    """Return the buckets with what calibration says of them."""
    shown = table("bucket", ">slots per stage", "graph", ">share of images (%)", ">rest (ms)")
    for number, bucket in enumerate(adaptive.buckets):
        share = "" if bucket.share is None else f"{100 * bucket.share:.1f}"
        latency = "" if bucket.latency_ms is None else f"{bucket.latency_ms:.3f}"
        shown.add_row(str(number), ", ".join(map(str, bucket.capacities)), bucket.graph, share, latency)
    return shown


def calibration_rows(found: CalibrationInfo) -> list[tuple[str, Any]]:
    """Return what calibration saw and expects: rows for `pairs`."""
    others = found.held_out_overflow
    return [
        ("calibrated on", f"{found.images} images of {found.data}; {found.cpu}, {found.threads} thread(s)"),
        ("stem", f"{found.stem_ms:.3f} ms"),
        ("expected", f"{found.expected_ms:.3f} ms per run; {found.dense_ms:.3f} ms for the dense graph"),
        ("run again", f"{100 * found.overflow:.1f} % of these images, in a larger bucket"),
        ("of other images", None if others is None else f"{100 * others:.1f} %, cross-validated"),
        ("rest by slots", ", ".join(f"{tokens}: {ms:.3f} ms" for tokens, ms in found.curve)),
    ]


def histogram_rows(found: CalibrationInfo, most: int) -> Table:
    """Return a row per stage with the distribution of the tokens images keep, 0 to `most`."""
    shown = table("stage", ">least", ">median", ">90 %", ">most", f"tokens kept, 0 to {most}")
    for stage, counts in enumerate(found.histograms):
        values = [count for count, images in counts for _ in range(images)]
        at = [values[round(share * (len(values) - 1))] for share in (0.0, 0.5, 0.9, 1.0)]
        bins = [0] * BINS
        for count, images in counts:
            bins[min(count * BINS // max(most, 1), BINS - 1)] += images
        bars = "".join(BARS[-(-n * (len(BARS) - 1) // max(bins))] for n in bins)
        shown.add_row(str(stage), *map(str, at), bars)
    return shown


def density_rows(densities: Sequence[DensityInfo]) -> Table:
    """Return the keep rates of a bundle with their operations."""
    shown = table(">keep rate", "graph", ">patch tokens kept", ">MACs/image (G)", ">fewer (x)")
    for density in densities:
        kept = ", ".join(str(stage.kept) for stage in density.stages) or "all"
        macs = density.macs
        shown.add_row(
            f"{density.keep_rate:g}", density.graph, kept, f"{macs.pruned / 1e9:.3f}", f"{macs.dense / macs.pruned:.2f}"
        )
    return shown


def stage_rows(stages: Sequence[StageInfo]) -> Table:
    """Return the token counts per stage; of an adaptive one the slots."""
    shown = table("stage", "place", ">patch tokens in", ">kept", ">fused", ">kept of all (%)", "the others")
    for stage in stages:
        place = "in front of block" if stage.where == Where.PRE_BLOCK.value else "inside block"
        most = "up to " if stage.adaptive else ""
        share = f"{most}{100 * stage.kept / stages[0].tokens_in:.1f}"
        counts = (str(stage.tokens_in), f"{most}{stage.kept}", str(stage.fused))
        shown.add_row(
            str(stage.index), f"{place} {stage.block}", *counts, share, OTHERS.get(stage.reducer, stage.reducer)
        )
    return shown


def weights_words(manifest: Manifest) -> str:
    """Return where the weights came from."""
    w = manifest.weights
    if w.source == "random":
        return f"random (seed {w.seed}): speed is real, outputs mean nothing"
    named = f"{w.file or w.source}{' (averaged)' if w.ema else ''}"
    return named if w.sha256 is None else f"{named}, sha256 {w.sha256[:12]}..."


def method_words(manifest: Manifest) -> str:
    """Return the method with its settings."""
    method = manifest.method
    options = "".join(f", {key}={str(value).lower()}" for key, value in method.options.items())
    known = METHODS.get(method.name)
    use = RateUse.REQUIRED if known is None else known.rate_use(method.options)
    rate = f", keep rate {method.keep_rate:g}" if method.stages and use is not RateUse.NONE else ""
    slots = " (limits the slots)" if rate and use is RateUse.SLOTS else ""
    return f"{method.name}{rate}{slots}{options}"


def macs_words(macs: Macs, stages: Sequence[StageInfo] = ()) -> str:
    """Return the multiply-accumulates of one image, dense and pruned; of adaptive stages with every slot in use."""
    slots = "with every slot in use, " if any(stage.adaptive for stage in stages) else ""
    if macs.dense == macs.pruned and macs.dense_executed == macs.pruned_executed:
        return f"{macs.dense / 1e9:.3f} G; the graph computes {macs.dense_executed / 1e9:.3f} G"
    return (
        f"{macs.dense / 1e9:.3f} G dense, {macs.pruned / 1e9:.3f} G pruned "
        f"({slots}{macs.dense / macs.pruned:.2f}x less); "
        f"the graphs compute {macs.dense_executed / 1e9:.3f} G and {macs.pruned_executed / 1e9:.3f} G"
    )


def parity_words(parity: ParityInfo) -> str:
    """Return how well the graph agrees with PyTorch."""
    kept = "" if parity.kept_overlap is None else f", kept tokens {parity.kept_overlap:.1%} the same"
    counts = "" if parity.counts_agreement is None else f", token counts {parity.counts_agreement:.1%} the same"
    aside = f", {parity.undecided} set aside: rounding decides what they keep" if parity.undecided else ""
    return (
        f"max relative error {parity.max_rel_error:.1e} (limit {parity.tolerance:g}), "
        f"top-1 {parity.top1_agreement:.1%} the same{kept}{counts}; {parity.images} images{aside}"
    )


def batch_words(batch: Sequence[int]) -> str:
    """Return "8" or "1 to 8"."""
    low, high = batch
    return str(low) if low == high else f"{low} to {high}"


def files_words(manifest: Manifest) -> str:
    """Return the files with their sizes."""
    return ", ".join(f"{name} ({size_words(info.bytes)})" for name, info in manifest.files.items())


def size_words(size: int) -> str:
    """Return a number of bytes for people."""
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
