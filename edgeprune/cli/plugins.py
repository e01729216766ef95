"""`edgeprune plugins`: build, find and check the TensorRT plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeprune.cli.common import VerbWithParts, verb
from edgeprune.cli.ui import Ui, table
from edgeprune.plugins.build import PRESETS, BuildRequest, build_plugins
from edgeprune.plugins.contract import MAJORS, library_for
from edgeprune.plugins.loader import Creator, import_tensorrt, load_plugins, missing
from edgeprune.plugins.locate import VARIABLE, chosen, find_candidates


@verb(
    "build",
    "Build its libraries for a device.\n\nFrom a checkout's plugins/ into the user's cache. Needs cmake, nvcc and "
    "TensorRT's headers, not TensorRT itself. A library appears whole or not at all.",
)
@click.option("--preset", type=click.Choice(PRESETS), help="desktop: Turing to Blackwell; orin, thor: that Jetson.")
@click.option("--archs", metavar="LIST", help="CUDA architectures, 87 or 86,89, instead of the preset's.")
@click.option(
    "--tensorrt-root",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="DIR",
    help="Folder above include/NvInfer.h; once for 8.x, once for 10 or 11. By default TENSORRT8_ROOT, "
    "TENSORRT10_ROOT, TENSORRT_ROOT, then the system's.",
)
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Compilers at once; by default one per core.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help=f"Instead of the cache; {VARIABLE} then names it.",
)
@click.option(
    "--self-register", is_flag=True, help="Link it to TensorRT, so that opening it is enough, as Triton does."
)
def build(
    ui: Ui,
    preset: str | None,
    archs: str | None,
    tensorrt_root: tuple[Path, ...],
    jobs: int | None,
    output: Path | None,
    self_register: bool,
) -> dict[str, Any]:
    """Build and print where the libraries are."""
    names = tuple(arch.strip() for arch in (archs or "").split(",") if arch.strip())
    with ui.steps() as report:
        libraries = build_plugins(BuildRequest(preset, names, tensorrt_root, output, jobs, self_register), report)
    ui.written.extend(libraries)
    for path in libraries:
        ui.data(str(path))
    ui.note(f"next: {f'{VARIABLE}={output} ' if output else ''}edgeprune plugins check")
    return {"libraries": libraries, "preset": preset, "archs": names}


@verb(
    "path",
    "Print the library that would be loaded.\n\nAnd, for people, why other places were passed over. "
    f"{VARIABLE}, a file or a directory, decides alone when it is set. No library is opened.",
)
@click.option(
    "--tensorrt",
    type=click.Choice([str(major) for major in MAJORS]),
    help="Major version; by default the installed one's.",
)
def path(ui: Ui, tensorrt: str | None) -> dict[str, Any]:
    """Print the path."""
    version = tensorrt or str(getattr(import_tensorrt(), "__version__", ""))
    library = library_for(version)
    candidates = find_candidates(library)
    found = chosen(candidates)
    results = {
        "tensorrt": version,
        "library": library.file,
        "path": found.path if found else None,
        "candidates": [vars(candidate) for candidate in candidates],
    }
    ui.results = results  # also when nothing was found
    shown = table("place", "file", "")
    for candidate in candidates:
        shown.add_row(candidate.place, str(candidate.path), candidate.passed_over or "taken")
    ui.note(shown)
    if found is None:
        raise missing(library, version, candidates)
    ui.data(str(found.path))
    return results


@verb(
    "check",
    "Load it and print its creators.\n\nInto the registry of the installed TensorRT. Needs no GPU: neither a builder "
    "nor a runtime is made.",
)
@click.option("--self-register", is_flag=True, help="Let the library register itself, as TensorRT 8.5 always does.")
def check(ui: Ui, self_register: bool) -> dict[str, Any]:
    """Load and print."""
    loaded = load_plugins(self_register=self_register)
    shown = table("creator", "version", "namespace", "fields")
    for creator in loaded.creators:
        shown.add_row(creator.name, creator.version, creator.namespace, field_words(creator))
    ui.data(shown)
    ui.note(f"TensorRT {loaded.tensorrt}, plugin {loaded.version or 'of unknown version'}, by {loaded.way}")
    ui.note(f"file: {loaded.path or 'registered before this command'}")
    return {name: value for name, value in vars(loaded).items() if name != "handle"}


def field_words(creator: Creator) -> str:
    """Return "k INT32, cls INT32"."""
    return ", ".join(f"{field.name} {field.kind}" for field in creator.fields) or "-"


command = VerbWithParts("plugins", "Build, find and check the TensorRT plugin.", (build, path, check))
