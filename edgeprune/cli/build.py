"""`edgeprune build`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from edgeprune.cli import parse
from edgeprune.cli.common import BUNDLE, verb
from edgeprune.cli.show import size_words
from edgeprune.cli.ui import Ui, table
from edgeprune.runtime.engines import ENGINES_FOLDER, ChoiceInfo, EngineIndex, EngineInfo, ProfileInfo, folder_name

if TYPE_CHECKING:
    from edgeprune.export.trt.plan import Role
    from edgeprune.runtime.bundle import Bundle


@verb(
    "build",
    "Build a bundle's TensorRT engines on this device.\n\nInto engines/ inside the bundle, where `edgeprune run` and "
    "`bench` find them; what the bundle lists is not touched. Each engine is a plain plan that trtexec loads. Finished "
    "engines and kernel timings are kept in the user's cache.",
)
@click.argument("bundle", type=BUNDLE)
@click.option("--batches", type=parse.Batches(), default=(), help="Images per run: 1,8; by default the bundle's.")
@click.option(
    "--engines",
    type=click.Choice(["auto", "profiles", "per-bucket"]),
    default="auto",
    show_default=True,
    help="Of buckets: one engine with a profile for each, or an engine each; auto measures both.",
)
@click.option(
    "--selection",
    type=click.Choice(["auto", "native", "plugin"]),
    default="auto",
    show_default=True,
    help="Standard layers or the plugin; auto measures both where the bundle has both.",
)
@click.option(
    "--workspace",
    type=parse.ByteSize(),
    default="1GiB",
    show_default=True,
    help="Device memory a layer may use: 512MiB, 1GB.",
)
@click.option(
    "--timing-cache", type=click.Path(path_type=Path), metavar="FILE", help="Kernel timings, instead of the cache's."
)
@click.option("--no-cache", is_flag=True, help="Neither read nor write the user's cache.")
@click.option("--rebuild", is_flag=True, help="Build even what the cache has.")
@click.option("--optimization-level", type=click.IntRange(0, 5), metavar="0-5", help="TensorRT's, where it has one.")
@click.option(
    "--tactic-sources",
    type=click.Choice(["default", "builtin"]),
    default="default",
    show_default=True,
    help="builtin: without cuBLAS and cuDNN.",
)
@click.option("--graphs", metavar="LIST", help="Only these: model,dense.")
@click.option("--dry-run", is_flag=True, help="Show what would be built; needs no GPU.")
def command(
    ui: Ui, bundle: Path, tactic_sources: Any, no_cache: bool, graphs: str | None, dry_run: bool, **options: Any
) -> dict[str, Any]:
    """Build and show the engines."""
    from edgeprune.export.trt import BuildOptions, build_engines
    from edgeprune.export.trt.api import plan_build
    from edgeprune.runtime.bundle import load_bundle

    names = tuple(name.strip() for name in (graphs or "").split(",") if name.strip())
    asked = BuildOptions(**options, tactics=tactic_sources, cache=not no_cache, graphs=names)
    loaded = load_bundle(bundle)
    if dry_run:
        return _dry_run(ui, bundle, plan_build(loaded, asked))
    with ui.steps() as report:
        index = build_engines(loaded, asked, report)
    folder = show_engines(ui, loaded, index)
    ui.note(f"\nnext: edgeprune verify {bundle}\n      edgeprune bench {bundle}")
    return {"bundle": str(bundle), "folder": str(folder), "index": index.model_dump(mode="json")}


def show_engines(ui: Ui, bundle: Bundle, index: EngineIndex) -> Path:
    """Print the engines that were built and return their folder."""
    folder = bundle.path / ENGINES_FOLDER / folder_name(index.device, index.tensorrt)
    ui.written.append(folder)
    for finding in findings_of(index):
        ui.warn(finding)
    ui.data(engine_rows(index))
    for choice in index.choices:
        ui.note(choice_words(choice))
    ui.note(f"engines: {folder}, for {index.device} and TensorRT {index.tensorrt}")
    return folder


def _dry_run(ui: Ui, bundle: Path, roles: Sequence[Role]) -> dict[str, Any]:
    """Print what would be built."""
    shown = table("role", "way", "graph", "selection", "batches", "slots", ">profiles")
    rows = list(plan_rows(roles))
    for row in rows:
        slots = "  ".join(",".join(map(str, slots)) for slots in row["slots"])
        batches = ",".join(map(str, row["batches"]))
        shown.add_row(
            row["role"], row["way"], row["source"], row["selection"], batches, slots or "-", str(row["profiles"])
        )
    ui.data(shown)
    measured = [role.name for role in roles if len(list(role.plans())) > 1]
    if measured:
        ui.note(f"of several candidates the faster are kept: {', '.join(measured)}")
    ui.note("dry run: nothing was built")
    return {"bundle": str(bundle), "dry_run": True, "engines": rows}


def plan_rows(roles: Sequence[Role]) -> Iterator[dict[str, Any]]:
    """Yield every candidate as plain values."""
    for role in roles:
        for way, units in role.ways.items():
            for form, plan in ((form, plan) for unit in units for form, plan in unit.forms.items()):
                yield {
                    "role": role.name,
                    "way": way,
                    "source": plan.source,
                    "selection": form,
                    "batches": sorted({profile.batch for profile in plan.profiles}),
                    "slots": [list(s) for s in dict.fromkeys(p.slots for p in plan.profiles) if s is not None],
                    "profiles": len(plan.profiles),
                }


def findings_of(index: EngineIndex) -> list[str]:
    """Return what the inspector found in the engines that is not as it should be."""
    proofs = [(info.file, info.proof) for info in index.engines if info.proof is not None]
    return [f"{file}: {finding}" for file, proof in proofs for finding in proof.findings]


def engine_rows(index: EngineIndex) -> Table:
    """Return a row for every profile; what holds for the whole engine stands in the first of its rows."""
    shown = table("graph", ">batch", "source", ">engine", ">build", ">median", ">attention fused")
    for info in index.engines:
        whole = (info.source, size_words(info.bytes), build_words(info))
        fused = "-" if info.proof is None else f"{info.proof.fused_attention}/{info.proof.attention_blocks}"
        for profile in info.profiles:
            shown.add_row(profile.graph, str(profile.batch), *whole, median_words(profile), fused)
            whole, fused = ("", "", ""), ""
    return shown


def build_words(info: EngineInfo) -> str:
    """Return how long the build took."""
    return f"{info.build_s:.1f} s" if info.build_s else "from cache"


def median_words(profile: ProfileInfo) -> str:
    """Return the median of a profile's runs."""
    return "-" if profile.median_ms is None else f"{profile.median_ms:.3g} ms"


def choice_words(choice: ChoiceInfo) -> str:
    """Return what was chosen, and between what: "selection of model: plugin (native 1.2 ms, plugin 1.1 ms)"."""
    found = ", ".join(f"{name} {ms:.3g} ms" for name, ms in choice.median_ms.items())
    return f"{choice.what} of {choice.graph}: {choice.chosen} ({found})"
