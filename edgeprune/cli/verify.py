"""`edgeprune verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeprune.cli.common import BUNDLE, verb
from edgeprune.cli.show import emulation_words
from edgeprune.cli.ui import Ui, pairs
from edgeprune.runtime.manifest import ParityInfo


@verb(
    "verify",
    "Compare a bundle with PyTorch on fresh inputs.\n\nThe model is rebuilt from the manifest: with the checkpoint the "
    "bundle was made of, or with random weights of the recorded seed. Exit code 1 when they differ.",
)
@click.argument("bundle", type=BUNDLE)
@click.option("--checkpoint", metavar="PATH", help="The file the bundle was exported from; its sha256 is checked.")
@click.option("--images", type=click.IntRange(min=1), default=8, show_default=True, help="Number of inputs.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the inputs.")
@click.option("--tolerance", type=float, help="Largest relative error; by default that of the precision.")
def command(
    ui: Ui, bundle: Path, checkpoint: str | None, images: int, seed: int, tolerance: float | None
) -> dict[str, Any]:
    """Print the agreement."""
    from edgeprune.runtime.bundle import load_bundle

    loaded = load_bundle(bundle)
    from edgeprune.checks.parity import check_parity, model_from_manifest, open_for_checks, remark, verify_bundle

    rates: list[float | None] = [d.keep_rate for d in loaded.manifest.densities] or [None]
    found: dict[float | None, ParityInfo] = {}
    session, emulated = open_for_checks(loaded)
    with ui.steps() as report:
        report("rebuilding the model in torch", 0.0)
        model = model_from_manifest(loaded.manifest, checkpoint)
        for i, rate in enumerate(rates):
            report("comparing", 0.3 + 0.7 * i / len(rates))
            found[rate] = verify_bundle(
                loaded, model, session=session, images=images, seed=seed, tolerance=tolerance, density=rate
            )
    ui.results = {"bundle": str(bundle), "seed": seed, "emulated": emulated, "parity": found[rates[0]].model_dump()}
    if emulated is not None:
        ui.note(emulation_words(emulated))
    if len(rates) > 1:
        ui.results["densities"] = [{"keep_rate": r, "parity": p.model_dump()} for r, p in found.items()]
    for rate, parity in found.items():
        ui.data(pairs([*([("keep rate", f"{rate:g}")] if rate is not None else []), *parity_rows(parity, seed)]))
    if found[rates[-1]].kept_overlap is None and loaded.manifest.method.stages:
        ui.note("kept tokens are not compared: the bundle was exported without --token-outputs")
    for parity in found.values():
        if said := remark(parity):
            ui.warn(said)
        check_parity(parity, loaded.manifest.precision)
    ui.note("PASSED: the bundle agrees with PyTorch")
    return ui.results


def parity_rows(parity: ParityInfo, seed: int) -> list[tuple[str, str | None]]:
    """Return how well a bundle agrees with PyTorch: rows for `pairs`."""
    return [
        ("images", f"{parity.images} (seed {seed})"),
        ("max absolute error", f"{parity.max_abs_error:.2e}"),
        ("max relative error", f"{parity.max_rel_error:.2e} (limit {parity.tolerance:g})"),
        ("top-1 agreement", f"{parity.top1_agreement:.1%}"),
        ("kept tokens the same", None if parity.kept_overlap is None else f"{parity.kept_overlap:.2%}"),
        ("counts the same", None if parity.counts_agreement is None else f"{parity.counts_agreement:.1%}"),
        ("undecided", f"{parity.undecided}, set aside and replaced" if parity.undecided else None),
    ]
