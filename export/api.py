"""`export_model`: the request of a user becomes a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import BuildError, InputError
from edgeprune.models.config import ViTConfig
from edgeprune.models.registry import get_model_config
from edgeprune.pruning import METHODS, get_method
from edgeprune.pruning.base import Method, Reducer, Stage, StageRequest
from edgeprune.pruning.counts import check_keep_rate
from edgeprune.pruning.random import NoScorer, constant_selector

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.export.plan import Plan
    from edgeprune.export.targets.base import Target
    from edgeprune.models.checkpoint import Checkpoint
    from edgeprune.pruning.model import PrunedViT
    from edgeprune.runtime.bundle import Bundle

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class ExportRequest:
    """Everything `edgeprune export` can be told.

    Attributes:
        stages: "3,6,9", or "3:0.7,6:0.5,9:0.35" with a keep rate for each; None for the method's own places.
        checkpoint: path or `hf-hub:owner/name`; or `random_weights` with `seed`.
        batch: smallest and largest batch; equal for a fixed one.
        token_outputs: also return what each stage kept.
        dead_rows: do not compute rows nobody reads.
        selection: "native" or "plugin".
        verify: compare with PyTorch on fresh inputs before the bundle is finished.
    """

    model: str
    method: str = "dense"
    keep_rate: float = 1.0
    stages: str | None = None
    method_options: Mapping[str, str] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)
    target: str = "ort-cpu"
    checkpoint: str | None = None
    ema: bool = False
    random_weights: bool = False
    seed: int = 0
    image_size: tuple[int, int] | None = None
    patch_size: int | None = None
    num_classes: int | None = None
    batch: tuple[int, int] = (1, 1)
    token_outputs: bool = False
    dead_rows: bool = True
    selection: str = "native"
    opset: int | None = None
    labels: list[str] | None = None
    verify: bool = True
    overwrite: bool = False


@dataclass(frozen=True)
class Resolved:
    """A request with every name looked up and every count computed; no weights yet."""

    request: ExportRequest
    config: ViTConfig
    method: Method
    options: dict[str, Any]
    stages: tuple[Stage, ...]
    target: Target
    opset: int


def resolve(request: ExportRequest) -> Resolved:
    """Look up and check everything that can be checked without weights.

    Raises:
        InputError: with the code of whatever is wrong.
        EnvironmentLackError: `target-unavailable`.
    """
    from edgeprune.export.targets.registry import get_target

    method = get_method(request.method)
    config = resolve_config(request)
    target = get_target(request.target)
    check_batch(request.batch)
    if request.selection not in target.selections:
        raise InputError(
            f"target '{target.name}' has no selection form '{request.selection}'",
            code="selection",
            expected=" or ".join(target.selections),
        )
    opset = request.opset or target.opset
    if opset not in target.opsets:
        raise InputError(
            f"target '{target.name}' does not write opset {opset}",
            code="opset",
            expected=f"one of {', '.join(map(str, target.opsets))}",
        )
    if request.labels is not None and len(request.labels) != config.num_classes:
        raise InputError(
            f"{len(request.labels)} labels for {config.num_classes} classes",
            code="labels",
            expected="one label per class",
            hint="check the labels file and --num-classes",
        )
    options = method.parse_options(request.method_options)
    stages = method.stages(config, parse_stages(request.stages, request.keep_rate), options)
    return Resolved(request, config, method, options, stages, target, opset)


def resolve_config(request: ExportRequest) -> ViTConfig:
    """Return the architecture a request asks for."""
    patch = None if request.patch_size is None else (request.patch_size, request.patch_size)
    fields = {"image_size": request.image_size, "patch_size": patch, "num_classes": request.num_classes}
    return get_model_config(request.model, **fields, **dict(request.model_options))


def check_batch(batch: tuple[int, int]) -> None:
    """Raise InputError `batch` unless 1 <= smallest <= largest."""
    if not 1 <= batch[0] <= batch[1]:
        raise InputError(
            f"batch {batch[0]}:{batch[1]} is empty",
            code="batch",
            expected="a fixed size like 1 or a range like 1:8, at least 1",
        )


def parse_stages(text: str | None, keep_rate: float) -> StageRequest:
    """Return where to prune: None, "3,6,9" or "3:0.7,6:0.5,9:0.35".

    Raises:
        InputError: `stages` when the text is neither, `keep-rate` when a rate is out of range.
    """
    check_keep_rate(keep_rate)
    if text is None:
        return StageRequest(keep_rate)
    try:
        pairs = [part.split(":") for part in text.split(",")]
        blocks = tuple(int(pair[0]) for pair in pairs)
        rates = tuple(float(pair[1]) for pair in pairs if len(pair) == 2)
        if any(len(pair) > 2 for pair in pairs) or len(rates) not in (0, len(blocks)):
            raise ValueError
    except ValueError:
        raise InputError(
            f"--stages {text} cannot be read",
            code="stages",
            expected="block indices, all with a keep rate or none",
            hint="for example --stages 3,6,9 or --stages 3:0.7,6:0.5,9:0.35",
        ) from None
    return StageRequest(keep_rate, blocks, rates or None)


def load_torch_model(request: ExportRequest) -> PrunedViT:
    """Return the reference model with its weights, in eval mode.

    Raises:
        InputError: when the request or the checkpoint does not fit.
    """
    return load_reference(resolve(request))[0]


def load_reference(resolved: Resolved) -> tuple[PrunedViT, dict[str, Any], list[str]]:
    """Return the model, the manifest's `weights` field and warnings."""
    import torch

    from edgeprune.models.checkpoint import load_checkpoint, load_into
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
    report = load_into(model, checkpoint, key_prefixes=resolved.method.key_prefixes, ignore_prefixes=ignore)
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

    A fused token is replaced by one more kept token.
    """
    made = []
    for seed, stage in enumerate(stages):
        counts = replace(stage.counts, kept=stage.counts.tokens_out, fused=0)
        selector = constant_selector(counts, seed)
        made.append(replace(stage, scorer=NoScorer(), selector=selector, reducer=Reducer.DROP, counts=counts))
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
    report: Progress = progress or (lambda text, share: None)
    report("checking the request", 0.0)
    resolved = resolve(request)
    from edgeprune.runtime.bundle import BundleWriter

    with BundleWriter(Path(out), overwrite=request.overwrite) as writer:
        report("loading weights", 0.05)
        model, weights, warnings = load_reference(resolved)
        return write_bundle(resolved, model, weights, warnings, writer, report)


def write_bundle(
    resolved: Resolved,
    model: PrunedViT,
    weights: dict[str, Any],
    warnings: list[str],
    writer: Any,
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
        parity = verify_graph(writer.path / "model.onnx", model, request, resolved.target.precision)
    report("hashing and moving into place", 0.95)
    config = resolved.config
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


def verify_graph(path: Path, model: PrunedViT, request: ExportRequest, precision: str) -> Any:
    """Return the parity of a written graph.

    Raises:
        BuildError: `parity` when it is outside the tolerance.
    """
    from edgeprune.checks.compare import compare, passes
    from edgeprune.runtime.ort import OrtBackend

    parity = compare(OrtBackend(path, spinning=False).run, model, batch=request.batch[1], precision=precision, images=4)
    if not passes(parity):
        raise BuildError(
            f"the graph differs from PyTorch: largest relative error {parity.max_rel_error:.2e} of the logits",
            code="parity",
            expected=f"at most {parity.tolerance:.0e} on inputs that were not used to make the graph",
            hint="please report this with the command; --no-verify writes the bundle all the same",
            details=parity.model_dump(),
        )
    return parity
