"""`edgeprune verify`: the torch model a bundle was made of, rebuilt from its manifest, against the bundle's graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.checks.compare import compare_session, failures, remark
from edgeprune.errors import CheckFailed, EnvironmentLackError, InputError, missing_package
from edgeprune.models.config import ViTConfig
from edgeprune.pruning import get_method
from edgeprune.pruning.base import Stage
from edgeprune.pruning.counts import StageCounts
from edgeprune.quantization.scheme import quantization_of
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.manifest import Manifest, MethodInfo, ParityInfo, StageInfo
from edgeprune.runtime.session import Session

__all__ = ["check_parity", "model_from_manifest", "open_for_checks", "remark", "verify_bundle"]

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.pruning.model import PrunedViT


def verify_bundle(
    bundle: Bundle,
    model: nn.Module,
    *,
    session: Session | None = None,
    images: int = 8,
    seed: int = 1,
    tolerance: float | None = None,
    density: float | None = None,
) -> ParityInfo:
    """Compare what a bundle runs with the model it was made of.

    Args:
        bundle: its pruned graphs are compared.
        model: the reference in eval mode: a `PrunedViT`, or any module images -> logits. Its linear layers are
            quantized as the bundle's are.
        session: runs the bundle; None opens one.
        images: number of inputs.
        seed: of the inputs.
        tolerance: largest relative error of the logits; None takes that of the precision.
        density: keep rate to compare, of a bundle that holds several; `model` must then be a `PrunedViT`.

    Raises:
        InputError: `parity-adopted`, `parity-precision`, or those of `Session`.
    """
    manifest = bundle.manifest
    if manifest.quantization is None and manifest.precision in ("int8", "fp8"):
        raise InputError(
            "another tool quantized this bundle's model, for images like those it was calibrated with and not for "
            "drawn ones",
            code="parity-adopted",
            expected="a bundle that edgeprune quantized",
            hint="compare accuracies with `edgeprune evaluate`; `edgeprune adopt --data` compares with the float graph",
        )
    session = session or open_for_checks(bundle)[0]
    if manifest.quantization is not None or density is not None:
        config = config_from_manifest(manifest)
    if manifest.quantization is not None:
        from edgeprune.export.quantize import one_by_one, quantized_reference
        from edgeprune.export.targets.registry import get_target

        quantization, target = quantization_of(manifest.quantization, config), get_target(manifest.target)
        form = None if manifest.adaptive is None else manifest.adaptive.form
        alone = one_by_one(form, manifest.batch, target)
        model = quantized_reference(model, quantization, target, per_image=alone)  # type: ignore[arg-type]
    if density is not None:
        session.density = density
        info = next(d for d in manifest.densities if d.keep_rate == density)
        model = model.with_stages(stages_from_manifest(manifest.method, config, info.stages))  # type: ignore[operator]
    return compare_session(session, model, images=images, seed=seed, tolerance=tolerance)


def open_for_checks(bundle: Bundle, **options: Any) -> tuple[Session, str | None]:
    """Return a session, and why it emulates on this machine's processor what the bundle is for; None when it does not.

    Args:
        bundle: to be run.
        options: as of `Session`.

    Raises:
        InputError: those of `Session`.
        EnvironmentLackError: for a bundle of the processor that cannot run here.
    """
    options = {"spinning": False, "check_hashes": False, **options}
    try:
        return Session(bundle, **options), None
    except EnvironmentLackError as error:
        from edgeprune.export.targets.registry import TARGETS

        target = TARGETS.get(bundle.manifest.target)
        if target is None or target.device is None:
            raise
        from edgeprune.export.emulate import open_emulated

        return Session(bundle, open_graph=open_emulated, **options), error.message


def check_parity(parity: ParityInfo, precision: str) -> None:
    """Raise CheckFailed `parity` with the numbers unless a comparison passes."""
    found = failures(parity, precision)
    if found:
        raise CheckFailed(
            f"the bundle does not agree with PyTorch: {'; '.join(found)}",
            code="parity",
            expected=f"agreement on {parity.images} fresh inputs at {precision}",
            hint="export the bundle again; if it still differs, please report it with both commands",
            details=parity.model_dump(),
        )


def model_from_manifest(manifest: Manifest, checkpoint: str | Path | None = None) -> PrunedViT:
    """Rebuild the torch model a bundle was made of, in eval mode.

    Args:
        manifest: of the bundle.
        checkpoint: file or hub reference, needed unless the weights are random.

    Raises:
        InputError: `verify-module` for a model that was given as a Python object, `weights` when a checkpoint is
            missing or not wanted, `checkpoint-differs` when its sha256 is not the recorded one; those of loading.
        EnvironmentLackError: `package-missing` without torch.
    """
    _check_weights(manifest, checkpoint)
    try:
        import torch  # noqa: F401 - asked for first, so that the error names the extra
    except ImportError as error:
        raise missing_package("torch", "export", "comparing a bundle with PyTorch") from error
    from edgeprune.export.api import load_reference
    from edgeprune.export.request import ExportRequest, Resolved
    from edgeprune.export.targets.registry import get_target

    config, method, weights = config_from_manifest(manifest), get_method(manifest.method.name), manifest.weights
    request = ExportRequest(
        model=config.name,
        method=method.name,
        checkpoint=None if checkpoint is None else str(checkpoint),
        ema=weights.ema,
        random_weights=weights.source == "random",
        seed=weights.seed or 0,
    )
    options = method.parse_options(manifest.method.options)
    stages = stages_from_manifest(manifest.method, config)
    densities = {d.keep_rate: stages_from_manifest(manifest.method, config, d.stages) for d in manifest.densities}
    target = get_target(manifest.target)
    resolved = Resolved(request, config, method, options, stages, target, manifest.opset, densities=densities)
    model, found, _ = load_reference(resolved)
    if found.get("sha256") != weights.sha256:
        raise InputError(
            f"checkpoint '{checkpoint}' is not the one the bundle was made of",
            code="checkpoint-differs",
            expected=f"sha256 {weights.sha256}, recorded for '{weights.file}'",
            hint="pass the checkpoint the bundle was exported from, or export again",
            details={"found": found.get("sha256"), "recorded": weights.sha256},
        )
    return model.with_stages(stages)


def config_from_manifest(manifest: Manifest) -> ViTConfig:
    """Return the architecture a manifest records.

    Raises:
        InputError: `bundle-invalid` when its fields are not those of an architecture.
    """
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in (manifest.model.config or {}).items()
    }
    try:
        return ViTConfig(**fields)
    except TypeError as error:
        raise InputError(
            f"the manifest's model.config is not an architecture: {error}",
            code="bundle-invalid",
            expected="the manifest.json that `edgeprune export` wrote, unchanged",
            hint="export the bundle again",
        ) from error


def stages_from_manifest(
    info: MethodInfo, config: ViTConfig, infos: Sequence[StageInfo] | None = None
) -> tuple[Stage, ...]:
    """Return the stages a bundle was made with; those that kept every token stay out, as they did then.

    Args:
        info: the method.
        config: the architecture.
        infos: stages of one of its densities; None takes those of the method.
    """
    method = get_method(info.name)
    recorded = {stage.index: stage for stage in (info.stages if infos is None else infos)}
    all_kept = StageCounts(config.num_patches, config.num_patches)
    blocks, counts = [], []
    for index in range(max(recorded, default=-1) + 1):
        stage = recorded.get(index)
        blocks.append(0 if stage is None else stage.block)
        counts.append(all_kept if stage is None else StageCounts(stage.tokens_in, stage.kept, stage.fused))
    made = method.make_stages(config, blocks, counts, method.parse_options(info.options))
    numbered = (replace(stage, index=index) for index, stage in enumerate(made))
    return tuple(stage for stage in numbered if stage.index in recorded)


def macs_by_counts(manifest: Manifest, stages: Sequence[StageInfo] | None = None) -> Callable[[tuple[int, ...]], float]:
    """Return a function from an image's token counts per stage to its multiply-accumulates.

    Args:
        manifest: of a bundle that records its architecture.
        stages: those of one density; None takes the method's.
    """
    from edgeprune.export.plan import macs_at

    config = config_from_manifest(manifest)
    made = stages_from_manifest(manifest.method, config, stages)
    return lambda counts: macs_at(config, made, counts)


def _check_weights(manifest: Manifest, checkpoint: str | Path | None) -> None:
    """Refuse a bundle that cannot be rebuilt, and a checkpoint too few or too many."""
    weights = manifest.weights
    if manifest.model.config is None or weights.source == "module":
        raise InputError(
            f"'{manifest.model.name}' was exported from a Python object, which a bundle does not hold",
            code="verify-module",
            expected="a bundle of a model that `edgeprune models` lists",
            hint="in Python: edgeprune.checks.parity.verify_bundle(bundle, module)",
        )
    if weights.source == "random" and checkpoint is not None:
        raise InputError(
            f"the bundle's weights are random (seed {weights.seed}), not those of a checkpoint",
            code="weights",
            expected="no --checkpoint for this bundle",
        )
    if weights.source == "checkpoint" and checkpoint is None:
        raise InputError(
            f"the bundle was made of the checkpoint '{weights.file}', which is needed to compare",
            code="weights",
            expected=f"the same file, sha256 {weights.sha256}",
            hint=f"add --checkpoint {weights.file}",
        )
