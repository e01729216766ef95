from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgeprune.checks.parity import (
    check_parity,
    config_from_manifest,
    model_from_manifest,
    stages_from_manifest,
    verify_bundle,
)
from edgeprune.errors import CheckFailed, InputError
from edgeprune.export import ExportRequest, export_model, load_torch_model
from edgeprune.export.api import resolve, stage_infos
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.manifest import Manifest, MethodInfo, ParityInfo

REQUEST = ExportRequest(
    model="vit_digits",
    method="dynamicvit",
    stages="1:0.8,2:1.0,4:0.5",  # the second stage keeps all, so it is left out
    random_weights=True,
    seed=5,
    token_outputs=True,
    verify=False,
    batch=(1, 4),
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.set_num_threads(1)
    return export_model(REQUEST, tmp_path_factory.mktemp("parity") / "bundle")


def changed(manifest: Manifest, **weights: object) -> Manifest:
    return manifest.model_copy(update={"weights": manifest.weights.model_copy(update=weights)})


def test_model_is_rebuilt_with_its_weights(bundle: Bundle) -> None:
    wanted, model = load_torch_model(REQUEST), model_from_manifest(bundle.manifest)
    assert model.config == wanted.config
    assert model.stages == wanted.stages
    assert [s.index for s in model.stages] == [0, 2]
    ours, theirs = model.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("method", ["dense", "dynamicvit", "evit", "random", "ats", "asvit", "sait"])
def test_stages_are_rebuilt_for_every_method(method: str) -> None:
    resolved = resolve(replace(REQUEST, method=method, keep_rate=0.7, stages="1:1.0,2:0.7,4:0.4"))
    info = MethodInfo(name=method, keep_rate=0.7, options=resolved.options, stages=stage_infos(resolved.stages))
    assert stages_from_manifest(info, resolved.config) == resolved.stages


@pytest.mark.parametrize("method", ["cropr", "tome"])
@pytest.mark.parametrize("stages", [None, "1,2,4"])
def test_stages_are_rebuilt_for_methods_without_keep_rates(method: str, stages: str | None) -> None:
    resolved = resolve(replace(REQUEST, method=method, stages=stages))
    info = MethodInfo(name=method, keep_rate=1.0, options=resolved.options, stages=stage_infos(resolved.stages))
    assert stages_from_manifest(info, resolved.config) == resolved.stages


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_adaptive_bundle_agrees_though_its_samples_lie_close(tmp_path: Path, seed: int) -> None:
    request = ExportRequest("vit_digits", "ats", random_weights=True, seed=seed, token_outputs=True, batch=(1, 4))
    bundle = export_model(request, tmp_path / "bundle")
    parity = verify_bundle(bundle, model_from_manifest(bundle.manifest), images=8, seed=seed)
    check_parity(parity, "fp32")
    assert (parity.images, parity.kept_overlap, parity.counts_agreement) == (8, 1, 1)


def test_bundle_agrees_with_its_model(bundle: Bundle) -> None:
    parity = verify_bundle(bundle, model_from_manifest(bundle.manifest), images=6)
    check_parity(parity, "fp32")
    assert parity.images == 6
    assert parity.kept_overlap == 1


def test_bundle_disagrees_with_other_weights(bundle: Bundle) -> None:
    other = model_from_manifest(changed(bundle.manifest, seed=6))
    with pytest.raises(CheckFailed) as raised:
        check_parity(verify_bundle(bundle, other), "fp32")
    assert raised.value.details["max_rel_error"] > 1e-2


def test_check_passes_at_the_limit() -> None:
    check_parity(ParityInfo(images=1, max_abs_error=1, max_rel_error=1e-4, top1_agreement=1, tolerance=1e-4), "fp32")


def test_checkpoint_is_asked_for(bundle: Bundle) -> None:
    manifest = changed(bundle.manifest, source="checkpoint", file="ckpt.pth", sha256="0" * 64, seed=None)
    with pytest.raises(InputError) as raised:
        model_from_manifest(manifest)
    assert raised.value.hint == "add --checkpoint ckpt.pth"


def test_another_checkpoint_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "ckpt.pth"
    torch.save(model_from_manifest(bundle.manifest).state_dict(), file)
    manifest = changed(bundle.manifest, source="checkpoint", file="ckpt.pth", sha256="0" * 64, seed=None)
    with pytest.raises(InputError) as raised:
        model_from_manifest(manifest, file)
    assert raised.value.code == "checkpoint-differs"


def test_checkpoint_for_random_weights_is_refused(bundle: Bundle) -> None:
    with pytest.raises(InputError) as raised:
        model_from_manifest(bundle.manifest, "ckpt.pth")
    assert raised.value.code == "weights"


def test_module_cannot_be_rebuilt(bundle: Bundle) -> None:
    with pytest.raises(InputError) as raised:
        model_from_manifest(changed(bundle.manifest, source="module"))
    assert raised.value.code == "verify-module"


def test_foreign_configuration_is_refused(bundle: Bundle) -> None:
    model = bundle.manifest.model.model_copy(update={"config": {"name": "x", "wings": 2}})
    with pytest.raises(InputError) as raised:
        config_from_manifest(bundle.manifest.model_copy(update={"model": model}))
    assert raised.value.code == "bundle-invalid"
