"""`edgeprune finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeprune.cli import parse
from edgeprune.cli.common import verb
from edgeprune.cli.ui import Ui, pairs


@verb(
    "finetune",
    "Train a method's weights.\n\nWrites a .safetensors file and beside it a .json with the command, the recipe, the "
    "versions and the accuracy. A method that learns from a dense model, as dynamicvit does, needs its checkpoint.",
)
@click.option("-m", "--model", required=True, metavar="NAME", help="A name `edgeprune models` lists.")
@click.option("--method", default="dense", show_default=True, metavar="NAME", help="See `edgeprune methods`.")
@click.option("--keep-rate", type=float, default=1.0, metavar="SHARE", help="Share of tokens that stays, above 0 to 1.")
@click.option("--stages", metavar="LIST", help="Blocks, 3,6,9, or with a rate each, 3:0.7,6:0.5,9:0.35.")
@click.option("--method-option", multiple=True, metavar="KEY=VALUE", help="Setting of the method; repeatable.")
@click.option("--data", default="digits", show_default=True, metavar="DATA", help="digits, or imagefolder:PATH.")
@click.option("--checkpoint", metavar="PATH", help="Weights to start from: a file, or hf-hub:owner/name.")
@click.option("--teacher", metavar="PATH", help="Dense weights to learn from; by default those of --checkpoint.")
@click.option("--epochs", type=click.IntRange(min=1), metavar="N", help="Instead of the recipe's.")
@click.option("--batch-size", type=click.IntRange(min=1), metavar="N", help="Instead of the recipe's.")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), metavar="RATE", help="Instead of the recipe's.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--threads", type=click.IntRange(min=0), default=0, metavar="N", help="Of torch; 0: its own choice.")
@click.option("--overwrite", is_flag=True, help="Replace the file at --output.")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE", help="A .safetensors file."
)
def command(ui: Ui, output: Path, method_option: tuple[str, ...], **options: Any) -> dict[str, Any]:
    """Train, then print the accuracy."""
    settings = parse.key_values(method_option, "--method-option")
    from edgeprune.training.finetune import FinetuneRequest, finetune

    with ui.steps() as report:
        result = finetune(FinetuneRequest(out=output, method_options=settings, **options), report)
    ui.written += [result.path, result.record_path]
    before = None if result.top1_before is None else f"{100 * result.top1_before:.2f} %"
    ui.data(
        pairs(
            [
                ("top-1 before", before),
                ("top-1", f"{100 * result.top1:.2f} %"),
                ("training", f"{result.seconds:.0f} s"),
                ("weights", result.path),
                ("record", result.record_path),
            ]
        )
    )
    ui.note(f"\nnext: {_export_command(result.path, settings, result.record, options)}")
    return {"weights": str(result.path), "record": result.record}


def _export_command(path: Path, settings: dict[str, str], record: dict[str, Any], options: dict[str, Any]) -> str:
    """Return the command that exports what was trained."""
    words = [f"edgeprune export -m {options['model']} --num-classes {record['num_classes']}"]
    if options["method"] != "dense":
        words.append(f"--method {options['method']} --keep-rate {options['keep_rate']:g}")
    if options["stages"]:
        words.append(f"--stages {options['stages']}")
    words += [f"--method-option {key}={value}" for key, value in settings.items()]
    return " ".join([*words, f"--checkpoint {path} -o out/my-model"])
