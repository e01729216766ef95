"""Tables that several verbs show of a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from edgeprune.cli.ui import table
from edgeprune.pruning import METHODS
from edgeprune.pruning.base import RateUse, Reducer, Where
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.manifest import Macs, Manifest, ParityInfo, StageInfo

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
        ("MACs", None if m.macs is None else macs_words(m.macs, m.method.stages)),
        ("parity", None if m.parity is None else parity_words(m.parity)),
    ]


def plan_summary(plan: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return what an export would do: rows for `pairs`."""
    options = "".join(f", {key}={str(value).lower()}" for key, value in plan["options"].items())
    return [
        ("model", plan["model"]),
        ("method", plan["method"] + options),
        ("target", f"{plan['target']}, opset {plan['opset']}, batch {batch_words(plan['batch'])}"),
        ("MACs", macs_words(Macs(**plan["macs"]), [StageInfo(**stage) for stage in plan["stages"]])),
        ("steps", "\n".join(plan["steps"])),
        ("files", ", ".join(plan["files"])),
    ]


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
