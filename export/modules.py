"""`export_module`: a model that exists as a Python object, known architecture or not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.errors import InputError
from edgeprune.export.api import Progress, open_session, preprocessing, silent, verify_session, write_bundle
from edgeprune.export.lint.tensorrt import why_not
from edgeprune.export.request import ExportRequest, check_batch, check_selection, resolve
from edgeprune.export.targets.registry import get_target
from edgeprune.export.writer import graph_info
from edgeprune.models.config import ViTConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgeprune.runtime.bundle import Bundle


def export_module(
    module: nn.Module, request: ExportRequest, out: Path | str, *, progress: Progress | None = None
) -> Bundle:
    """Write a bundle of a module.

    A timm or transformers ViT is taken over into edgeprune's own model: every method, option and target works, and
    `request.model` is the name it gets. Any other module is traced with torch.onnx as it is: the request must ask for
    method "dense" and give the image size, and the manifest says `lowering: traced`.

    Args:
        module: maps images [B, C, H, W] to logits [B, classes].
        request: as for `export_model`; weights come from the module.
        out: directory to make.
        progress: called with (step, share done).

    Raises:
        InputError: when the request does not fit the module.
        BuildError: `trace`, `lint` or `parity`.
    """
    from edgeprune.models.adapters import NotRepresentableError, from_module
    from edgeprune.pruning.model import PrunedViT
    from edgeprune.runtime.bundle import BundleWriter

    report = progress or silent
    module = module.eval()
    try:
        config, tensors = from_module(module)
    except NotRepresentableError as reason:
        return _export_traced(module, request, out, str(reason), report)
    resolved = resolve(request, replace(config, name=request.model))
    model = PrunedViT(resolved.config, resolved.weighted_stages)
    _take_weights(model, tensors, resolved.method.name)
    with BundleWriter(Path(out), overwrite=request.overwrite) as writer:
        return write_bundle(resolved, model.eval(), {"source": "module"}, [], writer, report)


def _take_weights(model: nn.Module, tensors: dict[str, Tensor], method: str) -> None:
    """Give the model the module's weights; what a method adds to them must not stay untrained."""
    missing = model.load_state_dict(tensors, strict=False, assign=True).missing_keys
    if missing:
        raise InputError(
            f"the module has no weights for {len(missing)} tensors method '{method}' needs, such as {missing[0]}",
            code="checkpoint-mismatch",
            expected="a method without weights of its own, such as evit, or a checkpoint of this method",
            hint="train the method with `edgeprune finetune` and export its checkpoint",
        )


def _export_traced(module: nn.Module, request: ExportRequest, out: Path | str, reason: str, report: Progress) -> Bundle:
    """Trace, lower what is ours, verify and write."""
    from edgeprune.export.emulate import open_emulated
    from edgeprune.export.ops.functions import is_edgeprune
    from edgeprune.export.passes.lower_selection import inline_bodies
    from edgeprune.export.pipeline import finish_graph
    from edgeprune.export.trace import TRACE_OPSET, trace_graph
    from edgeprune.export.writer import WeightStore
    from edgeprune.runtime.bundle import BundleWriter

    check_batch(request.batch)
    target = get_target(request.target)
    selection = check_selection(request.selection, target)
    if target.precision != "fp32":
        raise InputError(
            f"this module can only be traced: {reason}; target '{target.name}' wants a model whose parts are known",
            code="module",
            expected="a target of precision fp32 for a traced module",
            hint="convert it in torch, or use a timm or transformers ViT",
        )
    if request.method != "dense" or request.image_size is None or request.token_outputs:
        raise InputError(
            f"this module can only be traced: {reason}",
            code="module",
            expected="method 'dense', an image size and no token outputs: a traced module prunes as it is written",
            hint="pass ExportRequest(model=..., image_size=(224, 224))",
        )
    if request.opset not in (None, TRACE_OPSET):
        raise InputError(
            f"a traced module cannot be written with opset {request.opset}",
            code="opset",
            expected=f"opset {TRACE_OPSET}, the one torch.onnx writes",
            hint="leave the opset out",
        )
    shape = (3, *request.image_size)
    with BundleWriter(Path(out), overwrite=request.overwrite) as writer:
        report("tracing", 0.1)
        graph = trace_graph(module, np.zeros((1, *shape), np.float32), request.batch)
        selects = any(is_edgeprune(node) for node in graph.nodes)
        if selection == "native":
            graph = inline_bodies(graph)  # scores that are not ours may be NaN, which only the full body ranks last
        path = writer.path / "model.onnx"
        report("lowering model.onnx", 0.6)
        with WeightStore(writer.path / "model.onnx.data") as store:
            proto = finish_graph(graph, None, target, path, store, selection=selection, batch=request.batch)
        info = graph_info(proto, path.name)
        defaults = ViTConfig(name=request.model, image_size=request.image_size, patch_size=(1, 1))
        fields = {
            "model": {"name": request.model, "parameters": sum(p.numel() for p in module.parameters())},
            "weights": {"source": "module"},
            "method": {"name": "dense", "keep_rate": 1.0},
            "target": target.name,
            "precision": target.precision,
            "opset": TRACE_OPSET,
            "batch": request.batch,
            "lowering": "traced",
            "selection": selection if selects else "none",
            "dead_rows": False,
            "graphs": {"model": info},
            "preprocessing": preprocessing(defaults),
            "labels": request.labels,
            "tensorrt": why_not(proto, None) if target.device == "tensorrt" else None,
            "warnings": [f"traced: {reason}"],
        }
        if request.verify:
            report("comparing with PyTorch", 0.8)
            session = open_session(writer.preview(fields), **({"open_graph": open_emulated} if target.device else {}))
            fields["parity"] = verify_session(session, module)
        return writer.finish(fields)
