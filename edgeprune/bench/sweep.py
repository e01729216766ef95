"""Benches over keep rates and batches: one after the other, each with its graphs interleaved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edgeprune.bench.bench import bench_bundle
from edgeprune.bench.measure import Progress
from edgeprune.bench.result import SWEEP_SCHEMA, BenchResult, SweepCase, SweepResult
from edgeprune.errors import InputError
from edgeprune.runtime.bundle import Bundle, load_bundle
from edgeprune.runtime.manifest import Manifest

KEEP_RATE = "keep-rate"


def parse_sweep(text: str) -> list[float]:
    """Return the keep rates of a text such as "keep-rate=1.0,0.7,0.5", the largest first.

    Raises:
        InputError: `bench-sweep`.
    """
    name, found, values = text.partition("=")
    try:
        rates = [float(value) for value in values.split(",")]
    except ValueError:
        rates = []
    if name.strip() != KEEP_RATE or not found or not rates or not all(0 < rate <= 1 for rate in rates):
        raise InputError(
            f"--sweep {text} is no sweep",
            code="bench-sweep",
            expected=f"{KEEP_RATE}= and shares above 0 and up to 1",
            hint=f"--sweep {KEEP_RATE}=1.0,0.7,0.5; batches are given with --batch 1,8",
        )
    return sorted(set(rates), reverse=True)


def sweep_bundles(
    bundles: Sequence[Bundle | Path | str],
    *,
    keep_rates: Sequence[float] = (),
    batches: Sequence[int] = (),
    bench: Callable[..., BenchResult] = bench_bundle,
    progress: Progress | None = None,
    **options: Any,
) -> SweepResult:
    """Bench every bundle at every batch.

    Args:
        bundles: of one or several keep rates each.
        keep_rates: those to measure; 1 is the dense graph, which every bench has. All there are when empty.
        batches: images per run; each bundle's smallest when empty.
        bench: benches one bundle.
        progress: called with (step, share done) of each bench.
        options: of `bench_bundle`.

    Raises:
        InputError: `bench-sweep` when no bundle has a keep rate; those of `bench_bundle`.
    """
    opened = [bundle if isinstance(bundle, Bundle) else load_bundle(bundle) for bundle in bundles]
    held = sorted({rate for bundle in opened for rate in rates_of(bundle.manifest)}, reverse=True)
    chosen = [made for bundle in opened if (made := choose_rates(bundle, keep_rates)) is not None]
    missing = [rate for rate in keep_rates if (rate < 1 or not chosen) and rate not in held]
    if missing:
        raise InputError(
            f"no bundle has the keep rate {missing[0]:g}",
            code="bench-sweep",
            expected=f"some of {', '.join(f'{rate:g}' for rate in held)}; 1, the dense graph, is measured beside them",
            hint=f"export with --keep-rate {','.join(f'{rate:g}' for rate in keep_rates)}, or give more bundles",
            details={"missing": missing, "held": held},
        )
    cases = []
    for bundle in chosen:
        for batch in batches or [bundle.manifest.batch[0]]:
            result = bench(bundle, batch=batch, progress=progress, **options)
            cases.append(SweepCase(bundle.path.name, batch, rates_of(bundle.manifest), result))
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return SweepResult(SWEEP_SCHEMA, created, list(keep_rates), sorted({case.batch for case in cases}), cases)


def rates_of(manifest: Manifest) -> list[float]:
    """Return the keep rates of a bundle's pruned graphs, in the order of its densities."""
    if manifest.densities:
        return [density.keep_rate for density in manifest.densities if density.stages]
    rate = manifest.method.keep_rate
    return [rate] if manifest.method.stages and rate is not None else []


def choose_rates(bundle: Bundle, keep_rates: Sequence[float]) -> Bundle | None:
    """Return a bundle of which only some keep rates are run; None when none of them is in it."""
    if not keep_rates:
        return bundle
    if not bundle.manifest.method.stages:  # a dense bundle
        return bundle if 1.0 in keep_rates else None
    if not set(rates_of(bundle.manifest)) & set(keep_rates):
        return None
    densities = [d for d in bundle.manifest.densities if d.keep_rate in keep_rates]
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"densities": densities}))
