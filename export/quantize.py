"""How the linear layers of a bundle are quantized: which stay float, which ranges, dynamic or static, at what cost.

What is decided by measuring is decided on trial graphs of the pruned model, which are written to a temporary folder,
run on this machine and thrown away.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.checks.compare import draw_images
from edgeprune.errors import BuildError, CheckFailed, InputError
from edgeprune.export.emit.weights import weight_arrays
from edgeprune.export.emulate import open_emulated
from edgeprune.export.graphs import make_plan
from edgeprune.export.pipeline import lower
from edgeprune.export.quantized_accuracy import ImageSet, Report, Run, judge, open_images, refer
from edgeprune.export.request import Resolved
from edgeprune.export.saturation import saturates
from edgeprune.export.sensitivity import choose_float, match_layers, parse_keep_float
from edgeprune.export.targets.base import Target
from edgeprune.export.targets.registry import get_target
from edgeprune.export.turns import measure_in_turns
from edgeprune.export.writer import WeightStore
from edgeprune.plugins.locate import cache_root
from edgeprune.quantization.ranges import observe_ranges, parse_method
from edgeprune.quantization.scheme import (
    DOT_PRODUCT_BITS,
    PORTABLE_BITS,
    Quantization,
    Range,
    Scheme,
    linear_layers,
)
from edgeprune.runtime.kernels import float_layers, integer_layers, linear_layer, profile_nodes
from edgeprune.runtime.manifest import (
    PreprocessInfo,
    QuantizationInfo,
    QuantizedAccuracy,
    QuantizedSpeed,
    RangesInfo,
)
from edgeprune.runtime.ort import OrtBackend
from edgeprune.runtime.processor import processor_name
from edgeprune.runtime.router import IMAGES

if TYPE_CHECKING:
    from edgeprune.pruning.model import PrunedViT

FLOAT = "float"
NOISE, NOISE_IMAGES = "noise", 16
THREADS = 1  # of the runs that decide
BY_TRIAL = 512  # images that tell whether a faster scheme is as good
FASTER = 0.98  # static is taken when it needs at most this share of the time and agrees with the float model as often


@dataclass(frozen=True)
class Quantized:
    """What was decided.

    Attributes:
        pruned, dense: of the graphs with and without stages; the same layers, ranges of their own unless a density
            keeps every token.
        info: the manifest's `quantization`.
        warnings: what a user should know.
    """

    pruned: Quantization
    dense: Quantization
    info: QuantizationInfo
    warnings: list[str]


def quantize(resolved: Resolved, model: PrunedViT, preprocessing: PreprocessInfo, report: Report) -> Quantized:
    """Decide how the layers of a model are quantized and judge what it costs.

    Args:
        resolved: for a target that quantizes.
        model: the float model with the stages of the request, in eval mode.
        preprocessing: of the calibration images.
        report: called with (step, share done).

    Raises:
        InputError: `keep-float`, `calibration`, `calibration-method`, `quantization`; those of opening the data.
        CheckFailed: `max-drop` when the quantized graph loses more than the request allows.
        BuildError: `kernels` when the runtime does not compute a quantized layer on integers.
    """
    return _Quantizer(resolved, model, preprocessing, report).run()


@dataclass
class _Quantizer:
    resolved: Resolved
    model: PrunedViT
    preprocessing: PreprocessInfo
    report: Report
    images: ImageSet | None = None
    judged: ImageSet | None = None
    ranges: dict[str, dict[str, Range]] = field(default_factory=dict)  # of "pruned" and "dense"

    def run(self) -> Quantized:
        request, layers = self.resolved.request, linear_layers(self.resolved.config)
        patterns, points = parse_keep_float(request.keep_float)
        kept = match_layers(patterns, layers)
        if len(kept) == len(layers):
            raise InputError(
                "--keep-float leaves no layer to quantize",
                code="keep-float",
                expected="at least one quantized layer",
                hint="--target ort-cpu keeps all of them float",
            )
        self._open_images()
        if points is not None and self.images is None:
            raise InputError(
                "--keep-float auto needs images to measure layers by",
                code="keep-float",
                expected="--calibration digits or imagefolder:DIR beside it",
            )
        bits = PORTABLE_BITS if self.resolved.target.device is None else DOT_PRODUCT_BITS
        precision: Any = self.resolved.target.quantizes
        first = Quantization(
            precision, "dynamic", frozenset(layers) - set(kept), weight_bits=request.weight_bits or bits
        )
        static = self._observe(first)
        with Trials(self.resolved, self.model) as trials:
            chosen, speed = self._choose_scheme(trials, first, static)
            if points is not None and self.images is not None:
                gains = trials.gains(chosen)
                more = choose_float(self._fake, chosen, self.model, self.images, gains, points, self.report)
                chosen = replace(chosen, layers=chosen.layers - set(more))
                if not chosen.layers:
                    raise CheckFailed(
                        f"each layer that is quantized costs more than {points:g} points",
                        code="keep-float",
                        expected=f"some layers that cost at most {points:g} points together",
                        hint="allow more points, or fine-tune with `edgeprune finetune --quantize`",
                    )
                speed = trials.speed({FLOAT: None, chosen.scheme: chosen}) if speed is not None else None
            trials.check_kernels(chosen)
            accuracy = self._judge(trials, chosen)
        info = QuantizationInfo(
            precision=precision,
            scheme=chosen.scheme,
            weight_bits=chosen.weight_bits,
            layers=len(chosen.layers),
            kept_float=[layer for layer in layers if layer not in chosen.layers],
            ranges=self._ranges_info(chosen) if chosen.scheme == "static" else None,
            accuracy=accuracy,
            speed=speed,
        )
        dense = replace(chosen, ranges=self.ranges["dense"]) if chosen.scheme == "static" else chosen
        return Quantized(chosen, dense, info, quantization_warnings(self.resolved, info))

    def _open_images(self) -> None:
        """Load the images asked for; noise where a static scheme has none and the weights are random anyway."""
        request, config, target = self.resolved.request, self.resolved.config, self.resolved.target
        if request.calibration is not None:
            self.report("reading images", 0.0)
            self.images, self.judged = open_images(
                request.calibration,
                self.preprocessing,
                request.calibration_images,
                classes=config.num_classes,
                labels=request.labels,
            )
        elif target.device is not None or request.quantization == "static":
            if not request.random_weights:
                raise InputError(
                    f"no images to measure ranges by for target '{target.name}'",
                    code="calibration",
                    expected="--calibration digits or imagefolder:DIR"
                    + ("" if target.device else ", or --quantization dynamic"),
                    hint="some hundred images like those of the task; labels are used where there are some",
                )
            shape, rng = (config.in_chans, *config.image_size), np.random.default_rng(request.seed)
            self.images = ImageSet(NOISE, draw_images(shape, NOISE_IMAGES, rng), None)

    def _observe(self, quantization: Quantization) -> Quantization | None:
        """Return the static form, None where it is not to be tried."""
        if self.images is None or self.resolved.request.quantization == "dynamic":
            return None
        digest = hashlib.sha256(json.dumps(self.resolved.config.to_dict()).encode())
        for name, array in weight_arrays(self.model).items():
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(array).data)
        densities = list(self.resolved.densities.values()) or [self.model.stages]
        pruned = [self.model.with_stages(stages) for stages in densities]
        for name, models in (("pruned", pruned), ("dense", [self.model.with_stages(())])):
            if name == "dense" and () in densities:  # a density of its own, which the manifest's ranges are for too
                self.ranges[name] = self.ranges["pruned"]
                continue
            self.ranges[name] = observe_ranges(
                models,
                quantization.layers,
                self.images.batches(),
                self.resolved.request.calibration_method,
                cache=cache_root() / "ranges",
                weights=digest.hexdigest() + "".join(str(m.stages) for m in models),
                report=self.report,
            )
        return replace(quantization, scheme="static", ranges=self.ranges["pruned"])

    def _ranges_info(self, chosen: Quantization) -> RangesInfo:
        assert self.images is not None
        name, percentile = parse_method(self.resolved.request.calibration_method)
        method = f"{name}:{percentile:g}" if name == "percentile" else name
        values = {layer: chosen.ranges[layer] for layer in sorted(chosen.layers)}
        return RangesInfo(data=self.images.name, images=len(self.images), method=method, values=values)

    def _choose_scheme(
        self, trials: Trials, dynamic: Quantization, static: Quantization | None
    ) -> tuple[Quantization, QuantizedSpeed | None]:
        """Return the scheme asked for, or the faster one here unless it is worse, and what each form takes."""
        asked = self.resolved.request.quantization
        if self.resolved.target.device is not None:
            assert static is not None
            return static, None
        forms: dict[str, Quantization | None] = {FLOAT: None}
        forms |= {"dynamic": dynamic} if asked != "static" else {}
        forms |= {"static": static} if static is not None else {}
        self.report("measuring the forms", 0.0)
        speed = trials.speed(forms)
        if len(forms) < 3 or static is None:
            return next(form for form in forms.values() if form is not None), speed
        assert self.images is not None
        some = refer(self.model, self.images.first(BY_TRIAL), trials.batch, self.report)
        agreement = [
            judge(trials.run_of(form), some, trials.batch, self.report).top1_agreement for form in (dynamic, static)
        ]
        faster = speed.ms["static"] < FASTER * speed.ms["dynamic"]
        return (static if faster and agreement[1] >= agreement[0] else dynamic), speed

    def _fake(self, quantization: Quantization) -> PrunedViT:
        return quantized_reference(self.model, quantization, self.resolved.target, per_image=True)

    def _judge(self, trials: Trials, chosen: Quantization) -> QuantizedAccuracy | None:
        """Return what the quantized graph costs on the images to judge by, None without.

        Raises:
            CheckFailed: `max-drop`.
        """
        most = self.resolved.request.max_drop
        if self.judged is None:
            return None
        reference = refer(self.model, self.judged, trials.batch, self.report)
        found = judge(trials.run_of(chosen), reference, trials.batch, self.report)
        if most is not None and found.drop > most:
            what = "top-1" if found.top1 is not None else "agreement with the float model"
            raise CheckFailed(
                f"quantized, the model loses {found.drop:.2f} points of {what} on {found.images} images, more than "
                f"--max-drop {most:g}",
                code="max-drop",
                expected=f"at most {most:g} points",
                hint="--keep-float auto:0.2 finds layers to keep float; fine-tune with `edgeprune finetune --quantize`",
                details=found.model_dump(),
            )
        return found


def one_by_one(form: str | None, batch: tuple[int, int], target: Target) -> bool:
    """Return whether a bundle runs every image alone, so that a dynamic range is an image's own.

    Args:
        form: of an adaptive method, None for another one.
        batch: smallest and largest.
        target: of the bundle.
    """
    return batch[1] == 1 or form == "computed" or (form == "buckets" and target.takes_slots)


def quantized_reference(model: PrunedViT, quantization: Quantization, target: Target, *, per_image: bool) -> PrunedViT:
    """Return the model as a target's kernels quantize it, in torch; dynamic ranges of an image or of a batch."""
    from edgeprune.quantization.fake import fake_quantized

    return fake_quantized(model, quantization, symmetric=target.device is not None, per_image=per_image)


class Trials:
    """Graphs of the pruned model in several forms, with what they keep among their outputs.

    Args:
        resolved: what is exported.
        model: its weights.
    """

    def __init__(self, resolved: Resolved, model: PrunedViT) -> None:
        self.resolved, self.batch = resolved, resolved.request.batch[0]
        self._arrays = weight_arrays(model)
        self._folder = TemporaryDirectory(prefix="edgeprune-trial-")
        self._files: dict[tuple[Scheme, frozenset[str]] | None, Path] = {}
        self._open: dict[Path, OrtBackend] = {}

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()
        self._folder.cleanup()

    def run_of(self, form: Quantization | None) -> Run:
        """Return a call that runs a form, None for float."""
        path = self._file(form)
        if path not in self._open:
            self._open[path] = self._backend(path)
        backend = self._open[path]
        return lambda images: backend.run({IMAGES: images})

    def speed(self, forms: Mapping[str, Quantization | None]) -> QuantizedSpeed:
        """Return what the forms take here, in turns."""
        images = self._images()
        ms = measure_in_turns({name: partial(self.run_of(form), images) for name, form in forms.items()})
        return QuantizedSpeed(ms=ms, batch=self.batch, threads=THREADS, cpu=processor_name())

    def gains(self, form: Quantization) -> dict[str, float]:
        """Return what each layer saves: milliseconds here, or weights times tokens where it runs elsewhere."""
        if self.resolved.target.device is not None:
            return {layer: float(self._arrays[f"{layer}.weight"].size) for layer in form.layers}
        both = [self._layer_ms(kind) for kind in (None, form)]
        return {layer: both[0].get(layer, 0.0) - both[1].get(layer, 0.0) for layer in form.layers}

    def check_kernels(self, form: Quantization) -> None:
        """Raise BuildError `kernels` when a quantized layer does not run on integers here."""
        if self.resolved.target.device is not None:
            return
        nodes = self._nodes(form)
        found = float_layers(nodes, self._kept_float(form))
        if not found:
            found = [f"{layer} was not seen to run" for layer in sorted(form.layers - integer_layers(nodes))]
        if found:
            raise BuildError(
                f"ONNX Runtime does not compute {len(found)} quantized layers on integers: {'; '.join(found[:3])}",
                code="kernels",
                expected="an integer kernel for every quantized layer",
                hint="use target ort-cpu, and please report the versions that `edgeprune doctor` shows",
                details={"layers": found},
            )

    def _kept_float(self, form: Quantization) -> list[str]:
        return [layer for layer in linear_layers(self.resolved.config) if layer not in form.layers]

    def _layer_ms(self, form: Quantization | None) -> dict[str, float]:
        ms: dict[str, float] = {}
        for node in self._nodes(form):
            if layer := linear_layer(node.name):
                ms[layer] = ms.get(layer, 0.0) + node.ms
        return ms

    def _nodes(self, form: Quantization | None) -> Sequence[Any]:
        return profile_nodes(partial(self._backend, self._file(form)), {IMAGES: self._images()})

    def _images(self) -> np.ndarray:
        config = self.resolved.config
        return np.zeros((self.batch, config.in_chans, *config.image_size), np.float32)

    def _backend(self, path: Path, **options: Any) -> OrtBackend:
        opened = OrtBackend if self.resolved.target.device is None else open_emulated
        return opened(path, threads=THREADS, spinning=False, **options)

    def _file(self, form: Quantization | None) -> Path:
        key = None if form is None else (form.scheme, form.layers)
        if key not in self._files:
            target = self.resolved.target if form is not None else get_target("ort-cpu")
            path = Path(self._folder.name) / f"trial_{len(self._files)}.onnx"
            plan = make_plan(self.resolved, self.resolved.stages, token_outputs=True, batch=(self.batch, self.batch))
            with WeightStore(path.with_suffix(".data")) as store:
                lower(plan, self._arrays, target, [path], store, opset=target.opset, quantization=form)
            self._files[key] = path
        return self._files[key]


def quantization_warnings(resolved: Resolved, info: QuantizationInfo) -> list[str]:
    """Return what a user should know of a quantized bundle."""
    warnings = []
    if info.weight_bits > PORTABLE_BITS and resolved.target.device is None and saturates():
        warnings.append(
            f"weights of {info.weight_bits} bits overflow the integer kernels of this processor ({processor_name()}): "
            "leave --weight-bits out"
        )
    alone = one_by_one(resolved.form, resolved.request.batch, resolved.target)
    if info.scheme == "dynamic" and not alone:
        warnings.append(
            "the ranges of a dynamic quantization are taken over a batch: an image's logits depend on its batch"
        )
    if info.accuracy is None and not resolved.request.random_weights:
        warnings.append("nobody measured what quantization costs: add --calibration digits or imagefolder:DIR")
    if info.accuracy is not None and not info.accuracy.held_out:
        warnings.append("the images that judge the quantized model are those it was calibrated by")
    if info.speed is not None and info.speed.ms[info.scheme] >= info.speed.ms[FLOAT]:
        ms = info.speed.ms
        warnings.append(
            f"quantization does not pay here: {ms[info.scheme]:.3g} ms, and {ms[FLOAT]:.3g} ms in float32 "
            f"({info.speed.cpu})"
        )
    return warnings
