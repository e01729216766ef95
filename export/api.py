"""`export_model`: the request of a user becomes a bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import BuildError, InputError
from edgeprune.export.request import ExportRequest, Resolved, resolve
from edgeprune.models.config import ViTConfig
from edgeprune.pruning import METHODS
from edgeprune.pruning.base import Stage

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.export.targets.base import Target
    from edgeprune.models.checkpoint import Checkpoint
    from edgeprune.pruning.model import PrunedViT
    from edgeprune.runtime.bundle import Bundle, BundleWriter
    from edgeprune.runtime.manifest import AdaptiveInfo, ParityInfo
    from edgeprune.runtime.session import Session

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
        model = PrunedViT(resolved.config, resolved.weighted_stages)
        randomize(model, request.seed)
        return model.eval(), {"source": "random", "seed": request.seed}, []
    checkpoint: Checkpoint = load_checkpoint(request.checkpoint, ema=request.ema)
    with torch.device("meta"):
        model = PrunedViT(resolved.config, resolved.weighted_stages)
    # predictors of stages that are switched off are left in the file, as are those of any method when exporting dense
    methods = METHODS.values() if not resolved.weighted_stages else (resolved.method,)
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


def count_macs(resolved: Resolved, stages: tuple[Stage, ...]) -> dict[str, int]:
    """Return the manifest's `macs` field for some stages."""
    from edgeprune.export.graphs import make_plan
    from edgeprune.export.plan import build_plan

    return {
        "dense": build_plan(resolved.config, ()).macs(),
        "pruned": build_plan(resolved.config, stages).macs(),
        "dense_executed": make_plan(resolved, ()).macs(),
        "pruned_executed": make_plan(resolved, stages).macs(),
    }


def plan_export(request: ExportRequest) -> dict[str, Any]:
    """Return what an export would do, without weights or files: for `--dry-run`."""
    from edgeprune.export.graphs import bucket_graphs, make_plan, whole_plans

    resolved = resolve(request)
    plan = make_plan(resolved, resolved.stages, token_outputs=request.token_outputs)
    graphs = [*bucket_graphs(resolved), *whole_plans(resolved)[0]]
    return {
        "model": resolved.config.name,
        "method": resolved.method.name,
        "options": resolved.options,
        "target": resolved.target.name,
        "opset": resolved.opset,
        "batch": list(request.batch),
        "form": resolved.form,
        "buckets": request.buckets,
        "densities": {str(rate): stage_infos(stages) for rate, stages in resolved.densities.items()},
        "stages": stage_infos(resolved.stages),
        "macs": count_macs(resolved, resolved.stages),
        "steps": plan.describe(),
        "files": ["manifest.json", "model.onnx.data", *(f"{name}.onnx" for name in graphs)],
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


def export_model(request: ExportRequest, out: Path | str, *, progress: Progress | None = None) -> Bundle:
    """Write a bundle and return it.

    Args:
        request: what to export.
        out: directory to make; it appears whole or not at all.
        progress: called with (step, share done).

    Raises:
        InputError: when the request, the checkpoint or the output does not fit.
        EnvironmentLackError: when a package is missing or the disk is full.
        BuildError: `lint`, `kernels`, or `parity` when the graph does not agree with PyTorch.
        CheckFailed: `max-drop` when quantization costs more than the request allows.
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
    from edgeprune.checks.compare import remark
    from edgeprune.export.emit.weights import weight_arrays
    from edgeprune.export.graphs import GraphWriter, whole_plans
    from edgeprune.export.quantize import one_by_one, quantize, quantized_reference
    from edgeprune.export.writer import WeightStore
    from edgeprune.runtime.manifest import AdaptiveInfo, PreprocessInfo

    request, config = resolved.request, resolved.config
    model = model.with_stages(resolved.stages)
    adaptive, quantized = None, None
    image_info = PreprocessInfo.model_validate(preprocessing(config))
    if resolved.target.quantizes:
        quantized = quantize(resolved, model, image_info, lambda step, share: report(step, 0.05 + 0.15 * share))
        warnings = [*warnings, *quantized.warnings]
    with WeightStore(writer.path / "model.onnx.data") as store:
        graphs = GraphWriter(resolved, weight_arrays(model), store, writer.path)
        if quantized is not None:
            graphs.pruned, graphs.dense = quantized.pruned, quantized.dense
        plans, of_density = whole_plans(resolved)
        for step, (name, plan) in enumerate(plans.items()):
            report(f"lowering {name}.onnx", 0.2 + 0.2 * step / len(plans))
            graphs.write([name], plan)
        if resolved.form == "buckets":
            report("lowering stem and rest", 0.4)
            adaptive = graphs.write_buckets(model, image_info, lambda step, share: report(step, 0.4 + 0.25 * share))
            warnings = [*warnings, *bucket_warnings(adaptive, resolved.target)]
        elif resolved.form is not None:
            adaptive = AdaptiveInfo.model_validate({"form": resolved.form})
    if not model.exact_in_batch and request.batch[1] > 1:
        warnings = [*warnings, f"method '{resolved.method.name}' counts over a batch: {DEPENDS_ON_BATCH}"]
    fields: dict[str, Any] = {
        "model": {
            "name": config.name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "config": config.to_dict(),
        },
        "weights": weights,
        "method": {
            "name": resolved.method.name,
            "keep_rate": next((r for r, stages in resolved.densities.items() if stages), request.keep_rate),
            "options": resolved.options,
            "stages": stage_infos(resolved.stages),
            "notes": list(resolved.method.notes),
        },
        "target": resolved.target.name,
        "precision": resolved.target.precision,
        "opset": resolved.opset,
        "batch": request.batch,
        "lowering": "emitted",
        "selection": resolved.selection if resolved.stages else "none",
        "quantization": None if quantized is None else quantized.info,
        "dead_rows": request.dead_rows,
        "macs": count_macs(resolved, resolved.stages),
        "graphs": graphs.infos,
        "adaptive": adaptive,
        "densities": [
            {
                "keep_rate": rate,
                "graph": of_density[rate],
                "stages": stage_infos(stages),
                "macs": count_macs(resolved, stages),
            }
            for rate, stages in resolved.densities.items()
        ],
        "preprocessing": preprocessing(config),
        "labels": request.labels,
        "tensorrt": graphs.tensorrt,
        "warnings": warnings,
    }
    if request.verify:
        report("comparing with PyTorch", 0.7)
        reference = model
        if quantized is not None:
            alone = one_by_one(resolved.form, request.batch, resolved.target)
            reference = quantized_reference(model, quantized.pruned, resolved.target, per_image=alone)
        fields |= verify_fields(writer.preview(fields), reference, resolved)
        if said := remark(fields["parity"]):
            fields["warnings"] = [*warnings, said]
    report("hashing and moving into place", 0.95)
    bundle = writer.finish(fields)
    report("done", 1.0)
    return bundle


def bucket_warnings(adaptive: AdaptiveInfo, target: Target) -> list[str]:
    """Return a warning when calibration expects no gain, or could not measure where the bundle will run."""
    found = adaptive.calibration
    if found is None:
        return []
    if target.device is not None:
        return [
            f"the buckets were chosen by what float32 graphs take on this processor ({found.cpu}), not on the device"
        ]
    if found.expected_ms < found.dense_ms:
        return []
    return [
        f"the buckets are expected to take {found.expected_ms:.3g} ms for these images, the dense graph takes "
        f"{found.dense_ms:.3g} ms here"
    ]


def preprocessing(config: ViTConfig) -> dict[str, Any]:
    """Return the manifest's `preprocessing` field."""
    names = ("image_size", "mean", "std", "crop_pct", "interpolation")
    return {name: getattr(config, name) for name in names}


def verify_fields(bundle: Bundle, model: PrunedViT, resolved: Resolved) -> dict[str, Any]:
    """Return the manifest's `parity`, and `densities` with one each, on inputs that no graph was made of.

    Graphs for a device are emulated on the processor, in every form the device may run.

    Args:
        bundle: the graphs as written.
        model: the reference in eval mode, quantized where the graphs are.
        resolved: says which stages each density has.

    Raises:
        BuildError: `parity` when a graph is outside the limits of its precision.
    """
    if resolved.target.device is None:
        return verify_form(open_session(bundle), model, resolved)
    from edgeprune.export.emulate import forms_of, open_emulated

    fields: dict[str, Any] = {}
    for form in forms_of(bundle):
        found = verify_form(open_session(form, open_graph=open_emulated), model, resolved)
        fields = fields or found
    return fields


def open_session(bundle: Bundle, **options: Any) -> Session:
    """Return a session that leaves the processor to others; `options` as of `Session`."""
    from edgeprune.runtime.session import Session

    return Session(bundle, spinning=False, check_hashes=False, **options)


def verify_form(session: Session, model: PrunedViT, resolved: Resolved) -> dict[str, Any]:
    """Return what `verify_fields` does, of one form of a bundle."""
    densities = session.manifest.densities
    if not densities:
        return {"parity": verify_session(session, model)}
    found = []
    for density in densities:
        session.density = density.keep_rate
        parity = verify_session(session, model.with_stages(resolved.densities[density.keep_rate]))
        found.append(density.model_copy(update={"parity": parity}))
    return {"parity": next(d.parity for d in found if d.stages or not resolved.stages), "densities": found}


def verify_session(session: Session, model: nn.Module) -> ParityInfo:
    """Return the parity of what a session runs now.

    Raises:
        BuildError: `parity` when it is outside the limits of its precision.
    """
    from edgeprune.checks.compare import compare_session, failures

    parity = compare_session(session, model, images=VERIFY_IMAGES)
    if found := failures(parity, session.manifest.precision):
        raise BuildError(
            f"the graph differs from PyTorch: {'; '.join(found)}",
            code="parity",
            expected="agreement on inputs that were not used to make the graph",
            hint="please report this with the command; --no-verify writes the bundle all the same",
            details=parity.model_dump(),
        )
    return parity
