"""`edgeprune convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeprune.cli import parse
from edgeprune.cli.common import verb
from edgeprune.cli.show import size_words
from edgeprune.cli.ui import Ui, pairs, table


@verb(
    "convert",
    "Rewrite a checkpoint, checked and described.\n\nReads SOURCE, a file or hf-hub:owner/name, checks every tensor "
    "against the model and the method, and writes one file, whole or not at all. A file edgeprune wrote says itself "
    "what it is for.",
)
@click.argument("source")
@click.option("-m", "--model", metavar="NAME", help="A name `edgeprune models` lists.")
@click.option("--method", metavar="NAME", help="See `edgeprune methods`; dense by default.")
@click.option("--keep-rate", type=float, metavar="SHARE", help="Share of tokens that stays; goes into the metadata.")
@click.option("--stages", metavar="LIST", help="Blocks, 3,6,9, or with a rate each, 3:0.7,6:0.5,9:0.35.")
@click.option("--method-option", multiple=True, metavar="KEY=VALUE", help="Setting of the method; repeatable.")
@click.option(
    "--model-option", multiple=True, metavar="KEY=VALUE", help="Field of the model, e.g. reg_tokens=4; repeatable."
)
@click.option("--num-classes", type=click.IntRange(min=1), metavar="N")
@click.option("--image-size", type=parse.ImageSize(), help="224, or 224x320 (height x width).")
@click.option("--ema", is_flag=True, help="Take the checkpoint's averaged weights.")
@click.option(
    "--layout",
    type=click.Choice(["official", "edgeprune"]),
    default="official",
    show_default=True,
    help="Keys of the method's own code, or ours.",
)
@click.option(
    "--format",
    type=click.Choice(["safetensors", "pth"]),
    default="safetensors",
    show_default=True,
    help="pth: {'model': state_dict} for the method's own code, without metadata.",
)
@click.option("--keep-training", is_flag=True, help="Keep what only training reads, where the model can hold it.")
@click.option("--overwrite", is_flag=True, help="Replace the file at --output.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The new file.")
def command(
    ui: Ui, output: Path, method_option: tuple[str, ...], model_option: tuple[str, ...], **options: Any
) -> dict[str, Any]:
    """Convert, then print what became of the tensors."""
    settings = parse.key_values(method_option, "--method-option")
    fields = parse.model_options(model_option)
    from edgeprune.convert import ConvertRequest, convert

    result = convert(ConvertRequest(out=output, method_options=settings, model_options=fields, **options))
    ui.written.append(result.path)
    shown = table("tensors", ">count", "what")
    shown.add_row("read", str(result.read), result.metadata["source"])
    shown.add_row("matched", str(result.matched), f"{result.metadata['model']}, {result.metadata['method']}")
    for what in result.resized:
        shown.add_row("resized", "1", what)
    for count, what in (text.split(" ", 1) for text in result.cast):
        shown.add_row("cast", count, what)
    for reason, keys in result.left_out.items():
        shown.add_row("left out", str(len(keys)), f"{reason}: {keys[0]}{', ...' if len(keys) > 1 else ''}")
    shown.add_row("written", str(result.written), f"{result.metadata['layout']} keys")
    ui.data(shown)
    ui.data("")
    ui.data(pairs([("file", result.path), ("size", size_words(result.bytes)), ("sha256", result.sha256)]))
    return {
        "file": str(result.path),
        "sha256": result.sha256,
        "bytes": result.bytes,
        "format": options["format"],
        "read": result.read,
        "matched": result.matched,
        "written": result.written,
        "resized": list(result.resized),
        "cast": list(result.cast),
        "left_out": {reason: list(keys) for reason, keys in result.left_out.items()},
        "metadata": dict(result.metadata),
    }
