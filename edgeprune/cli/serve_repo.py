"""`edgeprune serve-repo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeprune.cli.common import BUNDLE, verb
from edgeprune.cli.ui import Ui, table


@verb(
    "serve-repo",
    "Write a model repository for NVIDIA Triton.\n\nOne model for every graph or engine that runs, and a router in "
    "front of them where there are buckets. Its README.md has the command that starts the server. Needs neither Triton "
    "nor a GPU.",
)
@click.argument("bundle", type=BUNDLE)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help="The repository.")
@click.option("--overwrite", is_flag=True, help="Replace a repository written by edgeprune.")
@click.option("--name", metavar="NAME", help="Of the model clients call; by default that of the bundle's folder.")
@click.option("--dense", is_flag=True, help="Serve the dense baseline as well.")
@click.option("--instances", type=click.IntRange(min=1), default=1, show_default=True, help="Of each model.")
@click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of a run in ONNX Runtime; 0: its choice.",
)
@click.option(
    "--queue-delay",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="MICROSECONDS",
    help="How long a request may wait for others to make a batch.",
)
@click.option("--engines", metavar="FOLDER", help="Which of several devices' engines.")
@click.option(
    "--plugin", type=click.Path(path_type=Path), metavar="FILE", help="The plugin library, where engines need it."
)
def command(ui: Ui, bundle: Path, output: Path, overwrite: bool, queue_delay: int, **options: Any) -> dict[str, Any]:
    """Write and show the repository."""
    from edgeprune.runtime.bundle import load_bundle
    from edgeprune.serving import ServeOptions, write_repository

    written = write_repository(
        load_bundle(bundle), output, ServeOptions(delay_us=queue_delay, **options), overwrite=overwrite
    )
    ui.written.append(output)
    shown = table("model", "what", "backend", "")
    for name, what, backend in written.models:
        shown.add_row(name, what, backend, "clients call it" if name in written.public else "")
    ui.data(shown)
    ui.note(f"next: cd {output}, and the command in README.md")
    return {
        "repository": str(output),
        "models": [{"name": name, "what": what, "backend": backend} for name, what, backend in written.models],
        "public": list(written.public),
        "tensorrt": written.tensorrt,
        "plugin": written.plugin,
    }
