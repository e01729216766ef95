"""`edgeprune finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeprune.cli import parse
from edgeprune.cli.common import verb
from edgeprune.cli.ui import Ui, pairs, table
from edgeprune.pruning import get_method


def list_recipes(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Print the presets and leave."""
    if not value or ctx.resilient_parsing:
        return
    from edgeprune.training.recipes import PRESETS

    shown = table("recipe", ">epochs", ">batch", ">lr", "source")
    for name, recipe in PRESETS.items():
        rate = f"{recipe.lr:g}" + (f" per {recipe.lr_batch}" if recipe.lr_batch else "")
        shown.add_row(name, str(recipe.epochs), str(recipe.batch_size), rate, recipe.source)
    ctx.obj.out.print(shown)
    ctx.exit()


@verb(
    "finetune",
    "Train a method's weights.\n\nWrites a .safetensors file and beside it a .json with the command, the recipe, the "
    "versions and the accuracy. A method that learns from a dense model, as dynamicvit does, needs its checkpoint.",
)
@click.option("-m", "--model", required=True, metavar="NAME", help="A name `edgeprune models` lists.")
@click.option("--method", default="dense", show_default=True, metavar="NAME", help="See `edgeprune methods`.")
@click.option("--keep-rate", type=float, metavar="SHARE", help="Share of tokens that stays, above 0 to 1.")
@click.option("--stages", metavar="LIST", help="Blocks, 3,6,9, or with a rate each, 3:0.7,6:0.5,9:0.35.")
@click.option("--method-option", multiple=True, metavar="KEY=VALUE", help="Setting of the method; repeatable.")
@click.option("--data", default="digits", show_default=True, metavar="DATA", help="digits, or imagefolder:PATH.")
@click.option("--checkpoint", metavar="PATH", help="Weights to start from: a file, or hf-hub:owner/name.")
@click.option("--teacher", metavar="PATH", help="Dense weights to learn from; by default those of --checkpoint.")
@click.option("--epochs", type=click.IntRange(min=1), metavar="N", help="Instead of the recipe's.")
@click.option("--batch-size", type=click.IntRange(min=1), metavar="N", help="Of all processes together.")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), metavar="RATE", help="Instead of the recipe's.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--teacher-model", metavar="NAME", help="Architecture of the teacher, when it is another.")
@click.option("--recipe", metavar="NAME", help="A preset --list-recipes prints; else by method, model and data.")
@click.option("--recipe-option", multiple=True, metavar="KEY=VALUE", help="Field of the recipe to set; repeatable.")
@click.option("--max-steps", type=click.IntRange(min=1), metavar="N", help="Stop after N steps.")
@click.option("--mixed-precision", type=click.Choice(["no", "fp16", "bf16"]), default="no", show_default=True)
@click.option("--quantize", type=click.Choice(["int8"]), help="Train for linear layers of 8-bit integers.")
@click.option("--device", type=click.Choice(["auto", "cpu"]), default="auto", show_default=True)
@click.option("--workers", type=click.IntRange(min=0), metavar="N", help="Processes that load images.")
@click.option("--save-every", metavar="STEPS", help="Steps between states to resume from, or epoch; else 2 minutes.")
@click.option("--resume", is_flag=True, help="Go on where a killed training stopped; no state: from the start.")
@click.option("--log", type=click.Choice(["csv", "tensorboard", "none"]), default="csv", show_default=True)
@click.option("--log-every", type=click.IntRange(min=1), default=50, show_default=True, metavar="STEPS")
@click.option("--list-recipes", is_flag=True, is_eager=True, expose_value=False, callback=list_recipes)
@click.option("--threads", type=click.IntRange(min=0), default=0, metavar="N", help="Of torch; 0: its own choice.")
@click.option("--overwrite", is_flag=True, help="Replace the file at --output.")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE", help="A .safetensors file."
)
def command(
    ui: Ui,
    output: Path,
    keep_rate: float | None,
    method_option: tuple[str, ...],
    recipe_option: tuple[str, ...],
    **options: Any,
) -> dict[str, Any] | None:
    """Train, then print the accuracy."""
    settings = parse.key_values(method_option, "--method-option")
    rate = parse.keep_rate(None if keep_rate is None else (keep_rate,), options["method"], settings, options["stages"])
    recipe_options = parse.key_values(recipe_option, "--recipe-option")
    from edgeprune.training.distributed import is_main_process
    from edgeprune.training.finetune import FinetuneRequest, finetune

    if not is_main_process():  # of several processes one speaks; errors come from all
        ui.quiet, ui.json = True, False
    request = FinetuneRequest(
        out=output, keep_rate=rate, method_options=settings, recipe_options=recipe_options, **options
    )
    with ui.steps() as report:
        result = finetune(request, report)
    if not is_main_process():
        return None
    ui.written += [result.path, result.record_path]
    quantized = result.record.get("quantized") or {}
    ui.data(
        pairs(
            [
                ("top-1 before", _percent(result.top1_before)),
                ("top-1", _percent(result.top1)),
                ("quantized before", _percent(quantized.get("top1_before"))),
                ("quantized", _percent(quantized.get("top1"))),
                ("training", f"{result.seconds:.0f} s"),
                ("averaged", _averaged(result.record)),
                ("weights", result.path),
                ("record", result.record_path),
            ]
        )
    )
    ui.note(f"\nnext: {_export_command(result.path, keep_rate, settings, result.record, options)}")
    return {"weights": str(result.path), "record": result.record}


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.2f} %"


def _averaged(record: dict[str, Any]) -> str | None:
    """Return what the averaged weights reach and where they are."""
    ema = record.get("ema")
    if not ema:
        return None
    quantized = f", quantized {_percent(ema['top1_quantized'])}" if ema["top1_quantized"] is not None else ""
    return f"{_percent(ema['top1'])} top-1{quantized}, {ema['file']}"


def _export_command(
    path: Path, keep_rate: float | None, settings: dict[str, str], record: dict[str, Any], options: dict[str, Any]
) -> str:
    """Return the command that exports what was trained."""
    words = [f"edgeprune export -m {options['model']} --num-classes {record['num_classes']}"]
    if options["method"] != "dense":
        words.append(f"--method {options['method']}")
        if keep_rate is not None and get_method(options["method"]).rule is not None:
            words.append(f"--keep-rate {keep_rate:g}")
    if options["stages"]:
        words.append(f"--stages {options['stages']}")
    words += [f"--method-option {key}={value}" for key, value in settings.items()]
    if options["quantize"] is not None:
        words.append(f"--target ort-cpu-{options['quantize']}")
    return " ".join([*words, f"--checkpoint {path} -o out/my-model"])
