"""`edgeprune run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeprune.cli.common import BUNDLE, GRAPHS, verb
from edgeprune.cli.ui import Ui, table
from edgeprune.errors import InputError
from edgeprune.runtime.manifest import Manifest


@verb("run", "Classify images with a bundle: the five most probable classes of each.")
@click.argument("bundle", type=BUNDLE)
@click.argument("images", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--graph", type=GRAPHS, default="model", show_default=True, help="The pruned graph or a baseline.")
@click.option("--density", type=float, metavar="SHARE", help="Keep rate to run, of a bundle that holds several.")
@click.option(
    "--overlay", type=click.Path(path_type=Path), metavar="DIR", help="Write each image with dropped patches dimmed."
)
def command(
    ui: Ui, bundle: Path, images: tuple[Path, ...], graph: str, density: float | None, overlay: Path | None
) -> dict[str, Any]:
    """Print the predictions."""
    from edgeprune.runtime.bundle import load_bundle
    from edgeprune.runtime.session import Session

    loaded = load_bundle(bundle)
    if overlay is not None:
        check_token_outputs(loaded.manifest, graph)
    session = Session(loaded, graph=graph, density=density, check_hashes=False)
    found = []
    shown = table("image", ">rank", "class", ">probability (%)")
    for prediction in session.classify(images):
        result: dict[str, Any] = {
            "image": str(prediction.path),
            "top": [{"class": c, "label": label, "probability": p} for c, label, p in prediction.top],
            "kept": [stage.tolist() for stage in prediction.kept],
            "overflow": prediction.overflow,
            **({} if prediction.bucket is None else {"bucket": prediction.bucket}),
        }
        if prediction.overflow:
            ui.warn(
                f"{prediction.path} keeps more tokens than the bundle has slots; its result is not the method's: "
                "export with a higher --keep-rate"
            )
        for rank, (index, label, probability) in enumerate(prediction.top, start=1):
            name = str(index) if label is None else label
            shown.add_row(str(prediction.path) if rank == 1 else "", str(rank), name, f"{100 * probability:.2f}")
        found.append(result)
    ui.data(shown)
    if overlay is not None:
        paths = write_overlays(ui, loaded.manifest, [(Path(r["image"]), r["kept"]) for r in found], overlay)
        for result, path in zip(found, paths, strict=True):
            result["overlay"] = str(path)
        ui.note(f"overlays in {overlay}: a patch is darker the earlier it was dropped")
    return {"bundle": str(bundle), "graph": graph, "density": session.density, "images": found}


def check_token_outputs(manifest: Manifest, graph: str) -> None:
    """Raise InputError `token-outputs` unless a graph says which tokens it kept."""
    buckets = [] if manifest.adaptive is None else manifest.adaptive.buckets
    last = buckets[0].graph if buckets and graph == "model" else graph
    if last in manifest.graphs and not any(t.name.startswith("kept_indices") for t in manifest.graphs[last].outputs):
        pruned = bool(manifest.method.stages) and graph != "dense"
        raise InputError(
            f"graph '{graph}' does not say which patches it keeps, so there is nothing to draw",
            code="token-outputs",
            expected="a bundle exported with --token-outputs",
            hint="export again with --token-outputs" if pruned else "a dense graph drops nothing; use the pruned one",
        )


def write_overlays(ui: Ui, manifest: Manifest, kept: list[tuple[Path, list[Any]]], directory: Path) -> list[Path]:
    """Write one PNG per image, each stage dimming what it drops, and return the paths.

    Names end in `_kept.png`, so that no input is ever overwritten.

    Raises:
        InputError: `output-not-writable`.
    """
    import numpy as np

    from edgeprune.data.overlay import draw_kept
    from edgeprune.data.preprocess import crop_only, load_image

    config = manifest.model.config or {}
    rows, columns = (side // patch for side, patch in zip(config["image_size"], config["patch_size"], strict=True))
    paths: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for source, stages in kept:
            image = crop_only(load_image(source), manifest.preprocessing)
            for stage in stages:
                image = draw_kept(image, np.asarray(stage), (rows, columns))
            path = directory / f"{source.stem}_kept.png"
            if path in paths:
                path = directory / f"{source.stem}_{len(paths)}_kept.png"
            image.save(path)
            paths.append(path)
            ui.written.append(path)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise InputError(
            f"cannot write overlays to '{directory}': {error.strerror}",
            code="output-not-writable",
            expected="a directory that can be written to",
        ) from error
    return paths
