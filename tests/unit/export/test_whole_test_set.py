"""Trained adaptive methods on real images, and a DeiT: every form gives what torch gives the image alone.

An image is set aside only when its selection is a tie and the sides disagree, as `edgeprune.checks.compare` defines it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgeprune import Session
from edgeprune.checks.compare import draw_images, limits_of
from edgeprune.data import open_dataset
from edgeprune.export import ExportRequest, export_model, load_torch_model
from edgeprune.export.api import preprocessing
from edgeprune.pruning.model import PrunedViT
from edgeprune.runtime.manifest import PreprocessInfo
from edgeprune.runtime.session import Result

pytestmark = pytest.mark.slow
CHECKPOINTS = Path(__file__).resolve().parents[3] / "checkpoints"
LIMITS = limits_of("fp32")
IMAGES = 200
DIGITS: dict[str, dict[str, Any]] = {
    "ats": {"method": "ats"},
    "asvit": {"method": "asvit", "stages": "1,3,4"},
    "sait": {"method": "sait", "method_options": {"mass": "0.8"}},
}
FORMS: dict[str, dict[str, Any]] = {
    "computed": {"adaptive": "computed"},
    "buckets, ort-cpu": {"buckets": "auto:3", "calibration": "digits", "calibration_images": 64},
    "buckets, onnx": {"buckets": "auto:3", "calibration": "digits", "calibration_images": 64, "target": "onnx"},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Reference:
    """What torch says of every image alone.

    Attributes:
        logits: [n, classes].
        counts: [n, S].
        kept: per stage and image the patches that stay.
        overflow: [n] bool.
        tied: [n] bool, a stage's choice comes within rounding of another one.
    """

    logits: np.ndarray
    counts: np.ndarray
    kept: list[list[set[int]]]
    overflow: np.ndarray
    tied: np.ndarray


def alone(model: PrunedViT, images: np.ndarray) -> Reference:
    outs, tied = [], []
    with torch.inference_mode():
        for image in torch.from_numpy(images).split(1):
            out = model.run(image)
            outs.append(out)
            margins = [
                stage.selector.margin(scores, valid, model.scorer_module(stage))
                for stage, scores, valid in zip(model.stages, out.scores, out.valid, strict=True)
            ]
            tied.append(min(float(margin) for margin in margins) <= LIMITS.tie)
    return Reference(
        np.concatenate([out.logits.numpy() for out in outs]),
        np.array([[int(c) for c in out.counts] for out in outs]),
        [[set(out.kept[s][0].tolist()) - {-1} for out in outs] for s in range(len(model.stages))],
        np.array([bool(out.overflow[0]) for out in outs]),
        np.array(tied),
    )


def differing(session: Session, images: np.ndarray, order: Sequence[int], size: int, reference: Reference) -> set[int]:
    """Return the images whose result is not that of the image alone."""
    found: set[int] = set()
    for at in range(0, len(order), size):
        group = list(order[at : at + size])
        result = session.run(images[group])
        found |= {i for row, i in enumerate(group) if not same(result, row, reference, i)}
    return found


def same(result: Result, row: int, reference: Reference, i: int) -> bool:
    """Tell whether logits, counts, overflow and kept sets of a row are those of image i."""
    assert result.kept_counts is not None and result.overflow is not None
    theirs = reference.logits[i]
    return bool(
        np.abs(result.logits[row] - theirs).max() <= LIMITS.relative_error * np.abs(theirs).max()
        and (result.kept_counts[row] == reference.counts[i]).all()
        and result.overflow[row] == reference.overflow[i]
        and all(set(k[row].tolist()) - {-1} == own[i] for k, own in zip(result.kept, reference.kept, strict=True))
    )


# ------------------------------------------------------------------------------------------------ digits


@pytest.fixture(scope="module")
def digits() -> Callable[[str], tuple[ExportRequest, np.ndarray, Reference]]:
    """Return a function method -> request, test images and what torch says of them, each made once."""
    made: dict[str, tuple[ExportRequest, np.ndarray, Reference]] = {}

    def make(name: str) -> tuple[ExportRequest, np.ndarray, Reference]:
        if name not in made:
            file = CHECKPOINTS / f"vit_digits_{name}.safetensors"
            request = ExportRequest(
                model="vit_digits", **DIGITS[name], checkpoint=str(file), token_outputs=True, batch=(1, 8), verify=False
            )
            model = load_torch_model(request)
            info = PreprocessInfo.model_validate(preprocessing(model.config))
            images = np.concatenate([x for x, _ in open_dataset("digits", limit=IMAGES).batches(50, info)])
            made[name] = (request, images, alone(model, images))
        return made[name]

    return make


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", DIGITS)
def test_every_test_image_gets_the_result_it_gets_alone(
    tmp_path: Path,
    digits: Callable[[str], tuple[ExportRequest, np.ndarray, Reference]],
    record_property: Callable[[str, object], None],
    name: str,
    form: str,
) -> None:
    request, images, reference = digits(name)
    assert len(images) == IMAGES
    assert len({tuple(row) for row in reference.counts.tolist()}) > 5
    session = Session(export_model(replaced(request, FORMS[form]), tmp_path / "b"), threads=1, spinning=False)
    orders = [list(range(IMAGES)), np.random.default_rng(0).permutation(IMAGES).tolist()]
    wrong: set[int] = set()
    for size in (1, 3, 8):
        for order in orders:
            wrong |= differing(session, images, order, size, reference)
    record_property("ties", int(reference.tied.sum()))
    record_property("undecided", len(wrong))
    print(f"{name}, {form}: {int(reference.tied.sum())} ties, {len(wrong)} of them differ")
    assert wrong <= set(np.flatnonzero(reference.tied).tolist())
    assert len(wrong) <= IMAGES // 50


def replaced(request: ExportRequest, fields: dict[str, Any]) -> ExportRequest:
    return ExportRequest(**{**vars(request), **fields})


# ------------------------------------------------------------------------------------------------ DeiT-S

DEIT: dict[str, dict[str, Any]] = {
    "ats": {"method": "ats"},
    "asvit": {"method": "asvit"},
    "sait": {"method": "sait"},
}
SHARPENING = 4.0  # of queries and keys: attention is peaked, so that counts differ between images


@pytest.fixture(scope="module")
def deit_weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ExportRequest], str]:
    """Return a function that writes random weights with peaked attention for a request."""

    def make(request: ExportRequest) -> str:
        model = load_torch_model(replaced(request, {"random_weights": True, "seed": 7}))
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        for key, value in weights.items():
            if key.endswith("attn.qkv.weight"):
                value[: 2 * model.config.embed_dim] *= SHARPENING**0.5
            elif key.endswith("keep_threshold"):
                value.fill_(1 / 250)
        file = tmp_path_factory.mktemp("deit") / "model.safetensors"
        save_file(weights, file)
        return str(file)

    return make


@pytest.mark.parametrize("name", DEIT)
def test_deit_small_gives_every_image_the_result_it_gets_alone(
    tmp_path: Path, deit_weights: Callable[[ExportRequest], str], name: str
) -> None:
    request = ExportRequest(
        model="deit_small_patch16_224", **DEIT[name], token_outputs=True, batch=(1, 3), verify=False
    )
    request = replaced(request, {"checkpoint": deit_weights(request)})
    model = load_torch_model(request)
    images = draw_images((3, 224, 224), 6, np.random.default_rng(3))
    reference = alone(model, images)
    assert len({tuple(row) for row in reference.counts.tolist()}) == len(images)
    firsts = sorted(reference.counts[:, 0].tolist())
    for label, fields in (("computed", {}), ("buckets", {"buckets": f"{firsts[1]},{firsts[4]}"})):
        bundle = export_model(replaced(request, fields), tmp_path / label)
        session = Session(bundle, threads=1, spinning=False, check_hashes=False)
        wrong = differing(session, images, [4, 0, 5, 2, 1, 3], 3, reference)
        print(f"{name}, {label}: counts {firsts}, {int(reference.tied.sum())} ties, {len(wrong)} of them differ")
        assert wrong <= set(np.flatnonzero(reference.tied).tolist())
        assert len(wrong) < 2
