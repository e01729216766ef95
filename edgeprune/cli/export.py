"""`edgeprune export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from edgeprune.cli import parse
from edgeprune.cli.common import verb
from edgeprune.cli.recipe import apply_recipe, weights_differ
from edgeprune.cli.show import bucket_rows, files_words, plan_summary, stage_rows, summary
from edgeprune.cli.ui import Ui, pairs
from edgeprune.errors import InputError
from edgeprune.runtime.manifest import StageInfo
from edgeprune.search.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from edgeprune.runtime.bundle import Bundle
    from edgeprune.runtime.engines import EngineIndex

TENSORRT = "trt-"


@verb(
    "export",
    "Compile a checkpoint into a bundle.\n\nExactly one of --checkpoint and --random-weights says where the weights "
    "come from. The bundle holds the pruned graph and its baselines; it appears whole or not at all.",
)
@click.option("-m", "--model", metavar="NAME", help="A name `edgeprune models` lists.")
@click.option("--recipe", type=click.Path(path_type=Path), metavar="FILE", help="A schedule `edgeprune search` found.")
@click.option("--method", default="dense", show_default=True, metavar="NAME", help="See `edgeprune methods`.")
@click.option(
    "--keep-rate",
    type=parse.KeepRates(),
    help="Share of tokens that stays, above 0 to 1; several in one bundle: 1,0.7,0.5.",
)
@click.option("--stages", metavar="LIST", help="Blocks, 3,6,9, or with a rate each, 3:0.7,6:0.5,9:0.35.")
@click.option("--method-option", multiple=True, metavar="KEY=VALUE", help="Setting of the method; repeatable.")
@click.option(
    "--model-option", multiple=True, metavar="KEY=VALUE", help="Field of the model, e.g. reg_tokens=4; repeatable."
)
@click.option("--checkpoint", metavar="PATH", help="A .safetensors, .pth or .bin file, or hf-hub:owner/name.")
@click.option("--ema", is_flag=True, help="Take the checkpoint's averaged weights.")
@click.option("--random-weights", is_flag=True, help="For latency studies; recorded in every report.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random weights and of the comparison.")
@click.option("--image-size", type=parse.ImageSize(), help="224, or 224x320 (height x width).")
@click.option("--patch-size", type=click.IntRange(min=1), metavar="PIXELS")
@click.option("--num-classes", type=click.IntRange(min=1), metavar="N")
@click.option("--target", default="ort-cpu", show_default=True, metavar="NAME", help="See `edgeprune targets`.")
@click.option("--batch", type=parse.BatchRange(), default="1", show_default=True, help="1, 8, or 1:8 for any between.")
@click.option(
    "--adaptive",
    type=click.Choice(["auto", "computed", "ragged", "slots", "buckets"]),
    default="auto",
    show_default=True,
    help="How counts that depend on the image run: shapes that follow it, one by one or packed; slots; buckets.",
)
@click.option("--buckets", metavar="LIST", help="auto:4, or sizes in patch tokens, 48,96,144, for static shapes.")
@click.option(
    "--fill",
    type=click.Choice(["mask", "next-best"]),
    default="mask",
    show_default=True,
    help="Free slots of a bucket: masked, exact; or the next best tokens, faster.",
)
@click.option(
    "--calibration",
    metavar="DATA",
    help="Images to choose buckets for, or to quantize by: digits, or imagefolder:PATH.",
)
@click.option("--calibration-images", type=click.IntRange(min=2), default=512, show_default=True, metavar="N")
@click.option(
    "--calibration-method",
    metavar="NAME",
    default="percentile",
    show_default=True,
    help="Ranges of static quantization: percentile[:99.99], entropy, or minmax.",
)
@click.option(
    "--quantization",
    type=click.Choice(["auto", "dynamic", "static"]),
    default="auto",
    show_default=True,
    help="int8: ranges taken as it runs, or from --calibration; auto takes the faster one here.",
)
@click.option(
    "--keep-float",
    multiple=True,
    metavar="LAYER",
    help="Linear layers not to quantize, 'blocks.0.*'; auto:0.2 finds them until the rest costs 0.2 points.",
)
@click.option("--weight-bits", type=int, metavar="N", help="7 suits every processor, 8 those with dot products (VNNI).")
@click.option("--max-drop", type=float, metavar="POINTS", help="Fail when quantization costs more points of top-1.")
@click.option("--token-outputs", is_flag=True, help="The graph also returns what each stage kept.")
@click.option("--no-dead-rows", is_flag=True, help="Compute rows nobody reads, as the literature does.")
@click.option(
    "--selection",
    type=click.Choice(["auto", "native", "plugin"]),
    help="Standard ops, the edgeprune op, or both, to choose from on the device (trt-*, their default).",
)
@click.option("--opset", type=int, metavar="N", help="Instead of the target's own.")
@click.option(
    "--labels", type=click.Path(path_type=Path), metavar="FILE", help="Class names, one per line or a JSON list."
)
@click.option(
    "--require-engine", is_flag=True, help="trt-*: fail, before anything is written, where no engine can be built."
)
@click.option("--no-engine", is_flag=True, help="trt-*: build no engine here; `edgeprune build` does on the device.")
@click.option("--no-verify", is_flag=True, help="Do not compare the result with PyTorch.")
@click.option("--overwrite", is_flag=True, help="Replace a bundle at --output.")
@click.option("--dry-run", is_flag=True, help="Show the plan; write nothing.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="The bundle's directory.")
def command(ui: Ui, **options: Any) -> dict[str, Any]:
    """Plan or export."""
    output: Path | None = options.pop("output")
    dry_run: bool = options.pop("dry_run")
    require_engine, no_engine = options.pop("require_engine"), options.pop("no_engine")
    if output is None and not dry_run:
        raise InputError(
            "no output directory", code="usage", expected="-o DIR", hint="add -o out/my-model, or --dry-run"
        )
    recipe = _take_recipe(ui, options)
    request = _request(**options)
    from edgeprune.export import export_model, plan_export

    if dry_run:
        return _dry_run(ui, plan_export(request))
    assert output is not None
    why_no_engine = _why_no_engine(request.target, required=require_engine, wanted=not no_engine)
    with ui.steps() as report:
        bundle = export_model(request, output, progress=report)
    ui.written.append(bundle.path)
    manifest = bundle.manifest
    for warning in manifest.warnings:
        ui.warn(warning)
    if recipe is not None and (said := weights_differ(recipe, manifest.weights.sha256)):
        ui.warn(said)
    ui.note(pairs([*summary(bundle), ("files", files_words(manifest))]))
    if manifest.method.stages:
        ui.note()
        ui.note(stage_rows(manifest.method.stages))
    if manifest.adaptive is not None and manifest.adaptive.buckets:
        ui.note()
        ui.note(bucket_rows(manifest.adaptive))
    index = None if why_no_engine else _build(ui, bundle)
    if request.target.startswith(TENSORRT) and index is None:
        ui.note(f"\nno engine: {why_no_engine}\nnext: edgeprune build {output}      (on the device, with the bundle)")
    else:
        ui.note(f"\nnext: edgeprune run {output} IMAGE...\n      edgeprune bench {output}")
    engines = {} if index is None else {"engines": index.model_dump(mode="json")}
    return {"bundle": str(output), "manifest": manifest.model_dump(mode="json"), **engines}


def _take_recipe(ui: Ui, options: dict[str, Any]) -> Recipe | None:
    """Put what a recipe says into the options and return it, None without --recipe.

    Raises:
        InputError: `usage` without a model, `recipe` when the file is none.
    """
    path: Path | None = options.pop("recipe")
    if path is None:
        if options["model"] is None:
            raise InputError(
                "no model", code="usage", expected="-m NAME, or --recipe FILE", hint="run `edgeprune models`"
            )
        return None
    recipe = load_recipe(path)
    context = click.get_current_context()
    given = {name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    options.update(apply_recipe(ui, recipe, options, given))
    return recipe


def _why_no_engine(target: str, *, required: bool, wanted: bool) -> str | None:
    """Return why no engine is built behind the export, None when one is.

    Raises:
        InputError: `usage` where an engine is required of a target that has none, or required and not wanted.
        EnvironmentLackError: where one is required and cannot be built.
    """
    if required and not (wanted and target.startswith(TENSORRT)):
        raise InputError(
            f"--require-engine with {'--no-engine' if not wanted else f'--target {target}'}",
            code="usage",
            expected="--require-engine alone, with a target trt-*",
        )
    if not target.startswith(TENSORRT):
        return "the target has none"
    if not wanted:
        return "--no-engine"
    if required:
        from edgeprune.export.trt.machine import find_machine

        find_machine()
    from edgeprune.export.trt import can_build_here

    return can_build_here()


def _build(ui: Ui, bundle: Bundle) -> EngineIndex:
    from edgeprune.cli.build import show_engines
    from edgeprune.export.trt import BuildOptions, build_engines

    with ui.steps() as report:
        index = build_engines(bundle, BuildOptions(), report)
    show_engines(ui, bundle, index)
    return index


def _dry_run(ui: Ui, plan: dict[str, Any]) -> dict[str, Any]:
    """Print what would be exported."""
    ui.data(pairs(plan_summary(plan)))
    if plan["stages"]:
        ui.data("")
        ui.data(stage_rows([StageInfo(**stage) for stage in plan["stages"]]))
    ui.note("dry run: nothing was written")
    return {"dry_run": True, **plan}


def _request(
    *,
    method: str,
    keep_rate: tuple[float, ...] | None,
    stages: str | None,
    checkpoint: str | None,
    random_weights: bool,
    method_option: tuple[str, ...],
    model_option: tuple[str, ...],
    labels: Path | None,
    no_verify: bool,
    no_dead_rows: bool,
    **fields: Any,
) -> Any:
    """Return the ExportRequest of the options."""
    if (checkpoint is None) == (not random_weights):
        both = checkpoint is not None
        raise InputError(
            "--checkpoint and --random-weights together" if both else "no weights given",
            code="weights",
            expected="exactly one of --checkpoint and --random-weights",
            hint="leave one out" if both else "add --checkpoint FILE, or --random-weights for a latency study",
        )
    if fields["ema"] and checkpoint is None:
        raise InputError("--ema without --checkpoint", code="weights", expected="--ema with --checkpoint only")
    settings: dict[str, Any] = {
        "method_options": parse.key_values(method_option, "--method-option"),
        "model_options": parse.model_options(model_option),
        "labels": None if labels is None else parse.read_labels(labels),
    }
    rate = parse.keep_rate(keep_rate, method, settings["method_options"], stages)
    from edgeprune.export import ExportRequest

    return ExportRequest(
        **fields,
        **settings,
        method=method,
        keep_rate=rate,
        densities=keep_rate if keep_rate is not None and len(keep_rate) > 1 else (),
        stages=stages,
        checkpoint=checkpoint,
        random_weights=random_weights,
        verify=not no_verify,
        dead_rows=not no_dead_rows,
    )
