"""A bundle whose model another tool has quantized, such as NVIDIA's Model Optimizer or ONNX Runtime's own quantizer.

The tool gets `model.onnx` of a bundle for TensorRT and gives back a graph with QuantizeLinear and DequantizeLinear.
That graph is looked at: what it takes and gives, the rules of TensorRT's parser, what it says of images. What costs
speed alone, as attention in integers does, becomes a warning: tools differ in what they quantize.

Model Optimizer is no extra of this package: its own pins onnxruntime-gpu, which cannot stand beside onnxruntime.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import external_data_helper
from onnx.checker import ValidationError
from onnx.shape_inference import InferenceError

from edgeprune.checks.compare import Images, draw_images, jaccard, limits_of
from edgeprune.errors import BuildError, InputError
from edgeprune.export.emulate import open_emulated
from edgeprune.export.lint import LintContext, run_lint
from edgeprune.export.lint.tensorrt import FORM_RULES, QUANTIZED_RULES, merge_why_not, tensorrt_rules, why_not
from edgeprune.export.targets.registry import get_target
from edgeprune.export.writer import INLINE_BYTES, graph_info
from edgeprune.runtime.bundle import Bundle, BundleWriter, load_bundle
from edgeprune.runtime.manifest import GraphInfo, Manifest, ParityInfo
from edgeprune.runtime.ort import OrtBackend
from edgeprune.runtime.router import IMAGES, KEPT

FROM = ("trt-fp32", "trt-fp16")
MODEL, FILE, WEIGHTS = "model", "model.onnx", "model.quantized.data"
BY_IMAGES = 16
SHOWN = 3  # nodes in a warning
FLOAT8 = onnx.TensorProto.FLOAT8E4M3FN
Progress = Callable[[str, float], None]


def adopt(
    bundle: Bundle | Path | str,
    graph: Path | str,
    out: Path | str,
    *,
    images: Images | None = None,
    seed: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Write a bundle for trt-int8 or trt-fp8 whose model is a graph quantized elsewhere; baselines stay as they are.

    Args:
        bundle: for trt-fp32 or trt-fp16, of one graph that runs every image.
        graph: made of its `model.onnx`, with the same inputs and outputs.
        out: directory to make; it appears whole or not at all.
        images: [N, C, H, W] model inputs to compare both graphs on; 16 drawn ones when None.
        seed: of drawn images.
        overwrite: replace a bundle at `out`.
        progress: called with (step, share done).

    Raises:
        InputError: `target`, `adaptive`, `graph-not-found`, `graph-invalid`, `graph-differs`, `graph-not-quantized`;
            those of loading a bundle and writing one.
        BuildError: `lint` with every rule of the parser it breaks, `parity` when it answers differently.
    """
    report = progress or (lambda step, share: None)
    source = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    _check_source(source.manifest)
    report("reading the graph", 0.1)
    model = _read(Path(graph))
    info = GraphInfo.model_validate(graph_info(model, FILE))
    _check_interface(info, source.manifest.graphs[MODEL])
    target = get_target(f"trt-{precision_of(model)}")
    report("checking the rules of TensorRT", 0.3)
    context = LintContext(model, None, target.domains)
    run_lint(context, tensorrt_rules(), target.name)
    remarks = _remarks(context)
    with BundleWriter(Path(out), overwrite=overwrite) as writer:
        kept = {name: g for name, g in source.manifest.graphs.items() if name != MODEL and g.variant_of is None}
        _write(model, source, kept, writer.path)
        report("comparing with the graph it was made of", 0.5)
        if images is None:
            channels = source.manifest.graphs[MODEL].inputs[0].shape[1]
            shape = (channels, *source.manifest.preprocessing.image_size)
            images = draw_images(shape, BY_IMAGES, np.random.default_rng(seed))
        agreement = _compare(writer.path / FILE, source, images, limits_of(target.precision).relative_error)
        _check_agreement(agreement, target.precision)
        models = [onnx.load(writer.path / g.file, load_external_data=False) for g in kept.values()]
        tables = [why_not(each, None) for each in (model, *models)]
        fields = _fields(source.manifest, target.name, target.precision, {MODEL: info, **kept}, agreement)
        fields["warnings"] += remarks
        fields |= {"opset": _opset(model), "tensorrt": merge_why_not(tables)}
        report("hashing and moving into place", 0.9)
        made = writer.finish(fields)
    report("done", 1.0)
    return made


def precision_of(model: onnx.ModelProto) -> str:
    """Return "fp8" when a graph quantizes to float8e4m3fn anywhere, else "int8".

    Raises:
        InputError: `graph-not-quantized`.
    """
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    if not nodes:
        raise InputError(
            "the graph has no DequantizeLinear, so nothing in it is quantized",
            code="graph-not-quantized",
            expected="QuantizeLinear and DequantizeLinear in front of the products",
            hint="give the file the quantizer wrote, with standard operators rather than those of an engine",
        )
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return "fp8" if any(types.get(name) == FLOAT8 for node in nodes for name in node.input) else "int8"


def _check_source(manifest: Manifest) -> None:
    """Raise InputError `target` or `adaptive` for a bundle whose model is not one float graph for TensorRT."""
    if manifest.target not in FROM:
        raise InputError(
            f"this bundle is for the target '{manifest.target}'",
            code="target",
            expected=f"a bundle for {' or '.join(FROM)}, whose model.onnx was quantized",
            hint="edgeprune export --target trt-fp16, then quantize model.onnx in it",
        )
    if (
        manifest.densities
        or MODEL not in manifest.graphs
        or [t.name for t in manifest.graphs[MODEL].inputs] != [IMAGES]
    ):
        raise InputError(
            "this bundle runs several graphs, or one graph in several sizes",
            code="adaptive",
            expected="a bundle of one graph that takes images alone",
            hint="export without --buckets and with one keep rate",
        )


def _read(path: Path) -> onnx.ModelProto:
    """Return a graph with its weights.

    Raises:
        InputError: `graph-not-found`, `graph-invalid`.
    """
    if not path.is_file():
        raise InputError(f"no graph at {path}", code="graph-not-found", expected="an .onnx file")
    try:
        model = onnx.load(path)
        onnx.shape_inference.infer_shapes(model)
    except (OSError, ValueError, DecodeError, ValidationError, InferenceError) as error:
        said = str(error).strip() or type(error).__name__
        raise InputError(
            f"{path} cannot be read: {said.splitlines()[0]}",
            code="graph-invalid",
            expected="an ONNX graph with its weights beside it",
            hint="quantize again, and copy its data file with it",
        ) from error
    if not model.graph.node:
        raise InputError(f"{path} is no ONNX graph", code="graph-invalid", expected="an ONNX graph with nodes")
    return model


def _check_interface(found: GraphInfo, wanted: GraphInfo) -> None:
    """Raise InputError `graph-differs` unless a graph takes and gives what the bundle's model does."""
    for side in ("inputs", "outputs"):
        ours, theirs = ({t.name: (t.dtype, t.shape) for t in getattr(info, side)} for info in (wanted, found))
        if ours != theirs:
            name = next(name for name in (*ours, *theirs) if ours.get(name) != theirs.get(name))
            raise InputError(
                f"the graph's {side} are not those of the bundle's model: {name} is "
                f"{_words(theirs.get(name))} and not {_words(ours.get(name))}",
                code="graph-differs",
                expected=f"the {side} {', '.join(ours)}, unchanged",
                hint="give the graph that was made of this bundle's model.onnx; keep the types of inputs and outputs",
            )


def _words(tensor: tuple[str, list[int]] | None) -> str:
    return "absent" if tensor is None else f"{tensor[0]}{tensor[1]}"


def _remarks(context: LintContext) -> list[str]:
    """Return what may cost an engine speed, or agreement on the tokens that stay, each once with its nodes."""
    nodes: dict[str, list[str]] = {}
    for rule in (*QUANTIZED_RULES, *FORM_RULES):
        for finding in rule(context):
            nodes.setdefault(finding.reason, []).append(finding.node)
    return [
        f"{reason} ({', '.join(names[:SHOWN])}{f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''})"
        for reason, names in nodes.items()
    ]


def _write(model: onnx.ModelProto, source: Bundle, kept: dict[str, GraphInfo], folder: Path) -> None:
    """Write the graph with its weights, and copy the baselines with theirs."""
    for name in sorted(_files(source, kept)):
        shutil.copy2(source.path / name, folder / name)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    external_data_helper.convert_model_to_external_data(copy, location=WEIGHTS, size_threshold=INLINE_BYTES)
    onnx.save(copy, folder / FILE)


def _files(source: Bundle, kept: dict[str, GraphInfo]) -> Iterator[str]:
    """Yield the files of graphs and their weights."""
    for info in kept.values():
        yield info.file
        model = onnx.load(source.path / info.file, load_external_data=False)
        for tensor in external_data_helper._get_all_tensors(model):
            yield from (entry.value for entry in tensor.external_data if entry.key == "location")


@dataclass(frozen=True)
class Agreement:
    """How alike two graphs answer; relative errors are shares of the largest logit of an image.

    Attributes:
        parity: the figures as a manifest has them.
        median_error: of the images.
        same_class: share of images with the same best class, or whose two best are as near as the error allowed.
    """

    parity: ParityInfo
    median_error: float
    same_class: float


def _compare(path: Path, source: Bundle, images: Images, tolerance: float) -> Agreement:
    """Return how a graph agrees with the bundle's model, both emulated on this machine's processor."""
    ours, theirs = (open_emulated(p, spinning=False) for p in (path, source.graph_path(MODEL)))
    errors, largest, same, tied, overlaps = [], 0.0, [], [], list[float]()
    for found, wanted in _runs(ours, theirs, images, source.manifest.batch[0]):
        logits = wanted["logits"]
        most, difference = float(np.abs(logits).max()), float(np.abs(found["logits"] - logits).max())
        errors.append((difference, difference / max(most, 1e-12)))
        largest = max(largest, most)
        same.append(bool(found["logits"].argmax() == logits.argmax()))
        second, best = np.sort(logits)[-2:] if len(logits) > 1 else (-np.inf, 0.0)
        tied.append(bool(best - second <= 2 * tolerance * most))
        overlaps += [jaccard(found[name], wanted[name]) for name in wanted if name.startswith(KEPT)]
    worst = float(np.max([error for error, _ in errors]))
    parity = ParityInfo(
        images=len(images),
        max_abs_error=worst,
        max_rel_error=worst / max(largest, 1e-12),
        top1_agreement=float(np.mean(same)),
        kept_overlap=float(np.mean(overlaps)) if overlaps else None,
        tolerance=tolerance,
    )
    median = float(np.median([relative for _, relative in errors]))
    return Agreement(parity, median, float(np.mean([one or other for one, other in zip(same, tied, strict=True)])))


def _runs(
    ours: OrtBackend, theirs: OrtBackend, images: Images, batch: int
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Yield what both graphs say of one image after the other."""
    for image in images:
        feeds = {IMAGES: np.repeat(image[None], batch, axis=0)}
        yield tuple({name: value[0] for name, value in b.run(feeds).items()} for b in (ours, theirs))  # type: ignore[misc]


def _check_agreement(agreement: Agreement, precision: str) -> None:
    """Raise BuildError `parity` when most images get other logits, or too many another class."""
    limits, parity = limits_of(precision), agreement.parity
    assert limits.loose is not None
    least = limits.loose[1]  # rounding may decide what an image keeps
    if agreement.median_error <= limits.relative_error and agreement.same_class >= least:  # NaN fails
        return
    raise BuildError(
        f"the graph answers differently from the one it was made of: the median image's logits differ by "
        f"{agreement.median_error:.2e} relative, and {1 - agreement.same_class:.1%} of {parity.images} images get "
        "another class, ties aside",
        code="parity",
        expected=f"at most {limits.relative_error:g} and {1 - least:.0%} for {precision}",
        hint="calibrate with images like those of the task, and compare on them with --data",
        details=parity.model_dump(),
    )


def _fields(
    manifest: Manifest, target: str, precision: str, graphs: dict[str, GraphInfo], agreement: Agreement
) -> dict[str, Any]:
    """Return the manifest's fields that follow from a new model."""
    fields = manifest.model_dump(exclude={"files", "created", "tool_version"})
    said = "the model was quantized by another tool; `parity` compares it with the float graph it was made of"
    return fields | {
        "target": target,
        "precision": precision,
        "selection": "plugin" if graphs[MODEL].plugin else "native" if manifest.method.stages else "none",
        "graphs": graphs,
        "densities": [],
        "parity": agreement.parity,
        "warnings": [*manifest.warnings, said],
    }


def _opset(model: onnx.ModelProto) -> int:
    return max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
