"""`export_model`: the request of a user becomes a bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import BuildError, InputError
from edgeprune.export.request import ExportRequest, Resolved, resolve
from edgeprune.models.config import ViTConfig
from edgeprune.pruning import METHODS
from edgeprune.pruning.base import Constant, Reducer, Stage
from edgeprune.pruning.random import NoScorer, constant_selector

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.export.plan import Plan
    from edgeprune.models.checkpoint import Checkpoint
    from edgeprune.pruning.model import PrunedViT
    from edgeprune.runtime.bundle import Bundle, BundleWriter
    from edgeprune.runtime.manifest import ParityInfo

VERIFY_IMAGES = 4
DEPENDS_ON_BATCH = "an image's logits depend on its batch"
Progress = Callable[[str, float], None]


def load_torch_model(request: ExportRequest) -> PrunedViT:
    """Return the reference model with its weights, in eval mode.

    Raises:
        InputError: when the request or the checkpoint does not fit.
    """
    return load_reference(resolve(request))[0]


def load_reference(resolved: Resolved) -> tuple[PrunedViT, dict[str, Any], list[str]]:
    """Return the model, the manifest's `weights` field and warnings."""
    import torch

    from edgeprune.models.checkpoint import load_checkpoint
    from edgeprune.models.fit import load_into
    from edgeprune.pruning.model import PrunedViT

    request = resolved.request
    if (request.checkpoint is None) == (not request.random_weights):
        raise InputError(
            "no weights were given"
            if request.checkpoint is None
            else "a checkpoint and random weights were both asked for",
            code="weights",
            expected="exactly one of --checkpoint and --random-weights",
            hint="--random-weights makes a bundle for latency studies, which is recorded in it",
        )
    if request.checkpoint is None:
        model = PrunedViT(resolved.config, resolved.stages)
        randomize(model, request.seed)
        return model.eval(), {"source": "random", "seed": request.seed}, []
    checkpoint: Checkpoint = load_checkpoint(request.checkpoint, ema=request.ema)
    with torch.device("meta"):
        model = PrunedViT(resolved.config, resolved.stages)
    # predictors of stages that are switched off are left in the file, as are those of any method when exporting dense
    methods = METHODS.values() if not resolved.stages else (resolved.method,)
    ignore = [prefix for method in methods for pair in method.key_prefixes.items() for prefix in pair]
    patterns = [method.training_keys for method in methods if method.training_keys]
    report = load_into(
        model,
        checkpoint,
        key_prefixes=resolved.method.key_prefixes,
        ignore_prefixes=ignore,
        ignore_pattern="|".join(patterns) or None,
    )
    warnings = [f"{checkpoint.file}: {what}" for what in report.resized]
    weights = {
        "source": "checkpoint",
        "file": checkpoint.file,
        "sha256": checkpoint.sha256,
        "ema": request.ema,
    }
    return model.eval(), weights, warnings


def randomize(model: nn.Module, seed: int) -> None:
    """Draw weights of unit gain, so that attention and scores differ between tokens as in a trained model."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel() if name.endswith("weight") else parameter.shape[-1]
                parameter.normal_(0, fan_in**-0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()


def make_plan(resolved: Resolved, stages: tuple[Stage, ...], *, token_outputs: bool = False) -> Plan:
    """Return the plan for some stages, with the plan passes the request asks for."""
    from edgeprune.export.pipeline import run_plan_passes
    from edgeprune.export.plan import build_plan

    plan = build_plan(resolved.config, stages, batch=resolved.request.batch, token_outputs=token_outputs)
    return run_plan_passes(plan) if resolved.request.dead_rows else plan


def random_stages(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Return stages at the same places with the same counts that keep constant positions: the cost without choosing.

    A fused token is replaced by one more kept token. Positions that are constant already stay.
    """
    made = []
    for seed, stage in enumerate(stages):
        if isinstance(stage.selector, Constant):
            made.append(stage)
            continue
        counts = replace(stage.counts, kept=stage.counts.tokens_out, fused=0)
        selector = constant_selector(counts, seed)
        reducer = Reducer.STASH if stage.reducer is Reducer.STASH else Reducer.DROP
        made.append(replace(stage, scorer=NoScorer(), selector=selector, reducer=reducer, counts=counts))
    return tuple(made)


def count_macs(resolved: Resolved) -> dict[str, int]:
    """Return the manifest's `macs` field."""
    from edgeprune.export.plan import build_plan

    return {
        "dense": build_plan(resolved.config, ()).macs(),
        "pruned": build_plan(resolved.config, resolved.stages).macs(),
        "dense_executed": make_plan(resolved, ()).macs(),
        "pruned_executed": make_plan(resolved, resolved.stages).macs(),
    }


def plan_export(request: ExportRequest) -> dict[str, Any]:
    """Return what an export would do, without weights or files: for `--dry-run`."""
    resolved = resolve(request)
    plan = make_plan(resolved, resolved.stages, token_outputs=request.token_outputs)
    return {
        "model": resolved.config.name,
        "method": resolved.method.name,
        "options": resolved.options,
        "target": resolved.target.name,
        "opset": resolved.opset,
        "batch": list(request.batch),
        "stages": stage_infos(resolved.stages),
        "macs": count_macs(resolved),
        "steps": plan.describe(),
        "files": ["manifest.json", "model.onnx.data", *(f"{name}.onnx" for name in _graph_plans(resolved))],
    }


def stage_infos(stages: tuple[Stage, ...]) -> list[dict[str, Any]]:
    """Return the manifest's `stages` field."""
    return [
        {
            "index": stage.index,
            "block": stage.block,
            "where": stage.where.value,
            "tokens_in": stage.counts.tokens_in,
            "kept": stage.counts.kept,
            "fused": stage.counts.fused,
            "reducer": stage.reducer.value,
            "adaptive": stage.selector.adaptive,
        }
        for stage in stages
    ]


def _graph_plans(resolved: Resolved) -> dict[str, Plan]:
    """Return the plans of a bundle: the model, and its baselines when it prunes."""
    plans = {"model": make_plan(resolved, resolved.stages, token_outputs=resolved.request.token_outputs)}
    if resolved.stages:
        plans["dense"] = make_plan(resolved, ())
        plans["random"] = make_plan(resolved, random_stages(resolved.stages))
    return plans


def export_model(request: ExportRequest, out: Path | str, *, progress: Progress | None = None) -> Bundle:
    """Write a bundle and return it.

    Args:
        request: what to export.
        out: directory to make; it appears whole or not at all.
        progress: called with (step, share done).

    Raises:
        InputError: when the request, the checkpoint or the output does not fit.
        EnvironmentLackError: when a package is missing or the disk is full.
        BuildError: `lint`, or `parity` when the graph does not agree with PyTorch.
    """
    report = progress or silent
    report("checking the request", 0.0)
    resolved = resolve(request)
    from edgeprune.runtime.bundle import BundleWriter

    with BundleWriter(Path(out), overwrite=request.overwrite) as writer:
        report("loading weights", 0.05)
        model, weights, warnings = load_reference(resolved)
        return write_bundle(resolved, model, weights, warnings, writer, report)


def silent(step: str, share: float) -> None:
    """Report no progress."""


def write_bundle(
    resolved: Resolved,
    model: PrunedViT,
    weights: dict[str, Any],
    warnings: list[str],
    writer: BundleWriter,
    report: Progress,
) -> Bundle:
    """Lower, verify and finish a bundle inside an open writer."""
    from edgeprune.export.emit.weights import weight_arrays
    from edgeprune.export.pipeline import lower
    from edgeprune.export.writer import WeightStore

    request, graphs = resolved.request, {}
    plans = _graph_plans(resolved)
    with WeightStore(writer.path / "model.onnx.data") as store:
        arrays = weight_arrays(model)
        for step, (name, plan) in enumerate(plans.items()):
            report(f"lowering {name}.onnx", 0.2 + 0.4 * step / len(plans))
            path = writer.path / f"{name}.onnx"
            proto = lower(plan, arrays, resolved.target, path, store, opset=resolved.opset, selection=request.selection)
            graphs[name] = graph_info(proto, path.name)
    parity = None
    if request.verify:
        report("comparing with PyTorch", 0.65)
        shape = (resolved.config.in_chans, *resolved.config.image_size)
        parity = verify_graph(writer.path / "model.onnx", model, shape, request.batch, resolved.target.precision)
    report("hashing and moving into place", 0.95)
    config = resolved.config
    if not model.exact_in_batch and request.batch[1] > 1:
        warnings = [*warnings, f"method '{resolved.method.name}' counts over a batch: {DEPENDS_ON_BATCH}"]
    fields = {
        "model": {
            "name": config.name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "config": config.to_dict(),
        },
        "weights": weights,
        "method": {
            "name": resolved.method.name,
            "keep_rate": request.keep_rate,
            "options": resolved.options,
            "stages": stage_infos(resolved.stages),
            "notes": list(resolved.method.notes),
        },
        "target": resolved.target.name,
        "precision": resolved.target.precision,
        "opset": resolved.opset,
        "batch": request.batch,
        "lowering": "emitted",
        "selection": request.selection if resolved.stages else "none",
        "dead_rows": request.dead_rows,
        "macs": count_macs(resolved),
        "graphs": graphs,
        "preprocessing": preprocessing(config),
        "labels": request.labels,
        "parity": parity,
        "warnings": warnings,
    }
    bundle = writer.finish(fields)
    report("done", 1.0)
    return bundle


def preprocessing(config: ViTConfig) -> dict[str, Any]:
    """Return the manifest's `preprocessing` field."""
    names = ("image_size", "mean", "std", "crop_pct", "interpolation")
    return {name: getattr(config, name) for name in names}


def graph_info(model: Any, file: str) -> dict[str, Any]:
    """Return the manifest's entry of a graph; dynamic dimensions are -1."""
    from onnx import helper

    def tensors(values: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": value.name,
                "dtype": helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
                "shape": [d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim],
            }
            for value in values
        ]

    return {"file": file, "inputs": tensors(model.graph.input), "outputs": tensors(model.graph.output)}


def verify_graph(
    path: Path, model: nn.Module, shape: tuple[int, ...], batch: tuple[int, int], precision: str
) -> ParityInfo:
    """Return the parity of a written graph on inputs that nothing was traced with.

    Args:
        path: the graph.
        model: the reference in eval mode.
        shape: (C, H, W) of an input.
        batch: smallest and largest batch.
        precision: chooses the limits.

    Raises:
        BuildError: `parity` when the graph is outside the limits.
    """
    from edgeprune.checks.compare import compare, failures
    from edgeprune.runtime.ort import OrtBackend

    run = OrtBackend(path, spinning=False).run
    parity = compare(run, model, batch=batch, precision=precision, images=VERIFY_IMAGES, shape=shape)
    if found := failures(parity, precision):
        raise BuildError(
            f"the graph differs from PyTorch: {'; '.join(found)}",
            code="parity",
            expected="agreement on inputs that were not used to make the graph",
            hint="please report this with the command; --no-verify writes the bundle all the same",
            details=parity.model_dump(),
        )
    return parity
