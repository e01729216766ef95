"""What a user asks for, and the same with every name looked up and every count computed. No weights yet, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from edgeprune.errors import InputError
from edgeprune.export.buckets import check_asked, parse_buckets
from edgeprune.export.sensitivity import parse_keep_float
from edgeprune.export.targets.base import Target
from edgeprune.export.targets.registry import get_target
from edgeprune.models.config import ViTConfig
from edgeprune.models.registry import get_model_config
from edgeprune.pruning import get_method
from edgeprune.pruning.base import Method, Stage, parse_stages
from edgeprune.quantization.ranges import parse_method

AUTO = "auto"
FORMS = ("slots", "computed", "ragged", "buckets")
FILLS = ("mask", "next-best")
MAX_DENSITIES = 16


@dataclass(frozen=True)
class ExportRequest:
    """Everything `edgeprune export` can be told.

    Attributes:
        stages: "3,6,9", or "3:0.7,6:0.5,9:0.35" with a keep rate for each; None for the method's own places.
        checkpoint: path or `hf-hub:owner/name`; or `random_weights` with `seed`.
        batch: smallest and largest batch; equal for a fixed one.
        densities: several keep rates in one bundle, the first the one a session starts with; `keep_rate` is not read
            then.
        adaptive: how a method whose token counts depend on the image runs: "slots", "computed", "ragged", "buckets"
            (see `AdaptiveInfo`), or "auto" for what suits the target best, and buckets where there are some.
        buckets: "auto:4", or sizes at the first stage, "48,96,144"; None for no buckets.
        fill: what slots past an image's count hold in a bucket, "mask" or "next-best".
        calibration: images to choose buckets for, or to quantize by: "digits" or "imagefolder:PATH".
        calibration_images: how many of them.
        calibration_method: how ranges follow from images, see `parse_method`.
        quantization: "dynamic", "static", or "auto" for the faster one here; of a target that quantizes.
        keep_float: names or patterns of linear layers that are not quantized, or "auto:POINTS".
        weight_bits: of quantized weights, 8 or 7; None for 7 where the processor may need it, see `Quantization`.
        max_drop: points of top-1 that quantization may cost; None for any.
        token_outputs: also return what each stage kept.
        dead_rows: do not compute rows nobody reads.
        selection: "native", "plugin", or "auto" for both, of which the device takes the faster; None for the target's
            own choice.
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
    densities: tuple[float, ...] = ()
    adaptive: str = "auto"
    buckets: str | None = None
    fill: str = "mask"
    calibration: str | None = None
    calibration_images: int = 512
    calibration_method: str = "percentile"
    quantization: str = "auto"
    keep_float: tuple[str, ...] = ()
    weight_bits: int | None = None
    max_drop: float | None = None
    token_outputs: bool = False
    dead_rows: bool = True
    selection: str | None = None
    opset: int | None = None
    labels: list[str] | None = None
    verify: bool = True
    overwrite: bool = False


@dataclass(frozen=True)
class Resolved:
    """A request with every name looked up and every count computed; no weights yet.

    Attributes:
        stages: of the keep rate, or of the first density that prunes.
        form: how an adaptive method runs, None for another one.
        densities: stages by keep rate, in the order asked for; empty for a single one.
    """

    request: ExportRequest
    config: ViTConfig
    method: Method
    options: dict[str, Any]
    stages: tuple[Stage, ...]
    target: Target
    opset: int
    form: str | None = None
    densities: dict[float, tuple[Stage, ...]] = field(default_factory=dict)

    @property
    def selection(self) -> str:
        """The form of the selection that is written."""
        return check_selection(self.request.selection, self.target)

    @property
    def weighted_stages(self) -> tuple[Stage, ...]:
        """All stages that may hold weights: those of the density that has most."""
        return max((self.stages, *self.densities.values()), key=len)


def resolve(request: ExportRequest, config: ViTConfig | None = None) -> Resolved:
    """Look up and check everything that can be checked without weights.

    Args:
        request: what to export.
        config: the architecture, when it is not the registered model of the request's name.

    Raises:
        InputError: with the code of whatever is wrong.
        EnvironmentLackError: `target-unavailable`.
    """
    method = get_method(request.method)
    config = config or resolve_config(request)
    target = get_target(request.target)
    check_batch(request.batch)
    check_selection(request.selection, target)
    check_quantization(request, target)
    opset = target.opset if request.opset is None else request.opset
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
    densities = resolve_densities(request, method, config, options)
    if densities:
        stages = next((stages for stages in densities.values() if stages), ())
    else:
        stages = method.stages(config, parse_stages(request.stages, request.keep_rate), options)
    form = resolve_form(request, target, stages)
    return Resolved(request, config, method, options, stages, target, opset, form, densities)


def resolve_densities(
    request: ExportRequest, method: Method, config: ViTConfig, options: Mapping[str, Any]
) -> dict[float, tuple[Stage, ...]]:
    """Return the stages of every density by keep rate.

    Raises:
        InputError: `keep-rate` when a rate is out of range or comes twice, or the method has no use for several.
    """
    rates = request.densities
    if not rates:
        return {}
    if len(set(rates)) < len(rates) or len(rates) > MAX_DENSITIES:
        raise InputError(
            f"{len(rates)} keep rates, {len(set(rates))} different ones",
            code="keep-rate",
            expected=f"up to {MAX_DENSITIES} keep rates, each once",
        )
    if method.rule is None or ":" in (request.stages or "") or method.name == "dense":
        raise InputError(
            f"method '{method.name}' takes no list of keep rates here",
            code="keep-rate",
            expected="a method that takes a keep rate, and --stages without rates of their own",
            hint="see `edgeprune methods`",
        )
    return {rate: method.stages(config, parse_stages(request.stages, rate), options) for rate in rates}


def resolve_form(request: ExportRequest, target: Target, stages: tuple[Stage, ...]) -> str | None:
    """Return the form of an adaptive method, None for another one.

    Raises:
        InputError: `adaptive`, `buckets` or `calibration` when what was asked for does not go together.
    """
    adaptive = bool(stages) and all(stage.selector.adaptive for stage in stages)
    alone = all(stage.selector.exact_in_batch for stage in stages)
    asked = request.adaptive
    if asked not in (AUTO, *FORMS):
        raise InputError(f"no form '{asked}'", code="adaptive", expected=f"one of {', '.join((AUTO, *FORMS))}")
    if asked == AUTO:
        asked = target.adaptive_form if alone else "slots"
        asked = asked if request.buckets is None else "buckets"
    if (asked == "buckets") != (request.buckets is not None):
        raise InputError(
            f"--adaptive {asked} with{'out' if request.buckets is None else ''} --buckets",
            code="buckets",
            expected="--buckets with --adaptive buckets, or with no --adaptive at all",
            hint="add --buckets auto:4 --calibration imagefolder:DIR, or leave both out",
        )
    if not adaptive:
        if request.buckets is not None or request.adaptive != AUTO:
            raise InputError(
                f"method '{request.method}' keeps as many tokens of every image",
                code="adaptive" if request.buckets is None else "buckets",
                expected="buckets and forms for a method whose token count depends on the image: ats, asvit, sait",
                hint="give several keep rates instead: --keep-rate 1.0,0.7,0.5" if stages else None,
            )
        check_bucket_options(request, target)
        return None
    if asked != "slots" and not alone:
        raise InputError(
            "with these options an image's count depends on its batch, which only one graph for the batch can do",
            code="adaptive",
            expected="--adaptive slots",
            hint="leave the option count=batch-mean out",
        )
    if asked == "ragged" and not (target.takes_slots and request.batch[0] == request.batch[1] > 1):
        raise InputError(
            f"--adaptive ragged for target '{target.name}' and batch {request.batch[0]}:{request.batch[1]}",
            code="adaptive",
            expected="--target ort-cpu and one batch of at least 2, such as --batch 8",
            hint="--adaptive computed runs any batch image by image",
        )
    if request.densities and asked == "buckets":
        raise InputError(
            "several keep rates and buckets together",
            code="buckets",
            expected="one of both: buckets follow the image, keep rates the user",
        )
    check_bucket_options(request, target)
    if request.buckets is not None:  # refused before weights are read
        check_asked(parse_buckets(request.buckets), tuple(stage.counts.kept for stage in stages))
    return asked


def check_bucket_options(request: ExportRequest, target: Target) -> None:
    """Raise InputError unless the options that go with buckets are used with them."""
    if request.fill not in FILLS:
        raise InputError(f"no fill '{request.fill}'", code="fill", expected=f"one of {', '.join(FILLS)}")
    if request.buckets is None:
        calibration = request.calibration is not None and target.quantizes is None
        if calibration or request.fill != FILLS[0]:
            raise InputError(
                "--calibration and --fill are for buckets" + (", --calibration for quantizing" if calibration else ""),
                code="calibration" if calibration else "fill",
                expected="--buckets beside them" + (", or a target such as ort-cpu-int8" if calibration else ""),
                hint="add --buckets auto:4, or leave them out",
            )
    elif request.calibration is None and parse_buckets(request.buckets).count is not None:
        raise InputError(
            "buckets can only be chosen for images",
            code="calibration",
            expected="--calibration digits or imagefolder:DIR, or the sizes themselves: --buckets 48,96,144",
        )


def check_quantization(request: ExportRequest, target: Target) -> None:
    """Raise InputError unless the options of quantization fit the target and each other."""
    defaults = {f.name: f.default for f in fields(ExportRequest)}
    options = ("quantization", "keep_float", "weight_bits", "max_drop", "calibration_method")
    given = [name for name in options if getattr(request, name) != defaults[name]]
    if target.quantizes is None:
        if given:
            flag = given[0].replace("_", "-")
            raise InputError(
                f"--{flag} for target '{target.name}', which does not quantize",
                code=flag,
                expected=f"a target that does, without --{flag} otherwise",
                hint="--target ort-cpu-int8; see `edgeprune targets`",
            )
        return
    parse_method(request.calibration_method)
    parse_keep_float(request.keep_float)
    schemes = ("auto", "static") if target.device else ("auto", "dynamic", "static")
    bits = (8,) if target.device else (7, 8)
    if request.quantization not in schemes:
        raise InputError(
            f"no quantization '{request.quantization}' for target '{target.name}'",
            code="quantization",
            expected=f"one of {', '.join(schemes)}",
        )
    if request.weight_bits is not None and request.weight_bits not in bits:
        raise InputError(
            f"weights of {request.weight_bits} bits for target '{target.name}'",
            code="weight-bits",
            expected=" or ".join(map(str, bits)),
        )
    if request.max_drop is not None and not (0 <= request.max_drop < 100 and request.calibration is not None):
        raise InputError(
            f"--max-drop {request.max_drop:g}" + ("" if request.calibration else " without images to measure it by"),
            code="max-drop",
            expected="points of top-1 from 0 to below 100, and --calibration beside it",
            hint="add --calibration digits or imagefolder:DIR",
        )


def resolve_config(request: ExportRequest) -> ViTConfig:
    """Return the architecture a request asks for."""
    patch = None if request.patch_size is None else (request.patch_size, request.patch_size)
    fields = {"image_size": request.image_size, "patch_size": patch, "num_classes": request.num_classes}
    return get_model_config(request.model, **fields, **dict(request.model_options))


def check_selection(selection: str | None, target: Target) -> str:
    """Return the form of the selection.

    Raises:
        InputError: `selection` when the target does not take it.
    """
    if selection is None:
        return target.selections[0]
    if selection not in target.selections:
        raise InputError(
            f"target '{target.name}' has no selection form '{selection}'",
            code="selection",
            expected=" or ".join(target.selections),
        )
    return selection


def check_batch(batch: tuple[int, int]) -> None:
    """Raise InputError `batch` unless 1 <= smallest <= largest."""
    if not 1 <= batch[0] <= batch[1]:
        raise InputError(
            f"batch {batch[0]}:{batch[1]} is empty",
            code="batch",
            expected="a fixed size like 1 or a range like 1:8, at least 1",
        )
