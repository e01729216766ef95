from __future__ import annotations

import argparse
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgeprune.errors import EdgepruneError, EnvironmentLackError, InputError
from edgeprune.export import ExportRequest, export_model, load_torch_model, plan_export
from edgeprune.export.graphs import random_stages
from edgeprune.export.request import resolve
from edgeprune.export.targets.registry import TARGETS
from edgeprune.models.registry import get_model_config
from edgeprune.pruning.base import Constant
from edgeprune.pruning.model import PrunedViT
from edgeprune.runtime.bundle import Bundle, load_bundle
from edgeprune.runtime.manifest import Manifest
from tests.helpers import reference_pruning
from tests.helpers.lowering import noise, random_model, relative_error, run_onnx, stages_of

SHORT = {"depth": 4}
CONFIG = get_model_config("vit_digits", **SHORT)
REQUEST = ExportRequest(
    model="vit_digits",
    model_options=SHORT,
    method="dynamicvit",
    keep_rate=0.7,
    random_weights=True,
    seed=3,
    token_outputs=True,
    batch=(1, 3),
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_model(REQUEST, tmp_path_factory.mktemp("api") / "bundle")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a DynamicViT checkpoint in the official layout: wrapped, with arguments, predictors by their old names."""
    official = official_state()
    path = tmp_path_factory.mktemp("checkpoint") / "dynamicvit.pth"
    torch.save({"model": official, "args": argparse.Namespace(base_rate=0.7), "epoch": 29}, path)
    return path


def official_state() -> dict[str, torch.Tensor]:
    """Return the weights of the checkpoint by their official names."""
    model = random_model(CONFIG, stages_of(CONFIG, "dynamicvit", 0.7))
    return {k.replace("prune.", "score_predictor."): v for k, v in model.state_dict().items()}


def logits(bundle: Bundle, images: np.ndarray, graph: str = "model") -> np.ndarray:
    return run_onnx(bundle.graph_path(graph), {"images": images})["logits"]


def torch_logits(model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(images)).numpy()


# ------------------------------------------------------------------------------------------------ the bundle


def test_bundle_is_complete_and_loads(bundle: Bundle) -> None:
    names = {p.name for p in bundle.path.iterdir()}
    assert names == {"manifest.json", "model.onnx", "dense.onnx", "random.onnx", "model.onnx.data"}
    assert load_bundle(bundle.path).manifest == bundle.manifest
    assert list(bundle.path.parent.iterdir()) == [bundle.path]


def test_manifest_describes_the_export(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert (manifest.model.name, manifest.model.config) == ("vit_digits", CONFIG.to_dict())
    assert manifest.model.parameters == sum(p.numel() for p in load_torch_model(REQUEST).parameters())
    assert (manifest.weights.source, manifest.weights.seed, manifest.weights.file) == ("random", 3, None)
    assert (manifest.method.name, manifest.method.keep_rate, manifest.method.options) == ("dynamicvit", 0.7, {})
    assert [(s.block, s.where, s.tokens_in, s.kept, s.fused) for s in manifest.method.stages] == [
        (1, "pre_block", 64, 44, 0),
        (2, "pre_block", 44, 31, 0),
        (3, "pre_block", 31, 21, 0),
    ]
    assert (manifest.target, manifest.precision, manifest.opset, manifest.batch) == ("ort-cpu", "fp32", 17, (1, 3))
    assert (manifest.lowering, manifest.selection, manifest.dead_rows) == ("emitted", "native", True)
    assert manifest.preprocessing.image_size == (64, 64)


def test_manifest_records_tensors_as_the_graph_declares_them(bundle: Bundle) -> None:
    graph = bundle.manifest.graphs["model"]
    assert [(t.name, t.dtype, t.shape) for t in graph.inputs] == [("images", "float32", [-1, 3, 64, 64])]
    assert {t.name: (t.dtype, t.shape) for t in graph.outputs} == {
        "logits": ("float32", [-1, 10]),
        "kept_indices_0": ("int32", [-1, 44]),
        "kept_indices_1": ("int32", [-1, 31]),
        "kept_indices_2": ("int32", [-1, 21]),
        "kept_counts": ("int32", [-1, 3]),
    }


def test_manifest_counts_macs_with_and_without_dead_rows(bundle: Bundle) -> None:
    macs = bundle.manifest.macs
    assert macs is not None
    assert macs.pruned_executed < macs.pruned < macs.dense
    assert macs.pruned_executed < macs.dense_executed < macs.dense


def test_parity_is_recorded(bundle: Bundle) -> None:
    parity = bundle.manifest.parity
    assert parity is not None
    assert parity.max_rel_error < 1e-5 and parity.top1_agreement == 1 and parity.kept_overlap == 1


def test_dense_baseline_is_the_dense_model(bundle: Bundle) -> None:
    model = load_torch_model(REQUEST)
    dense = PrunedViT(model.config).eval()
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("prune.")})
    images = noise(CONFIG, 3)
    assert relative_error(logits(bundle, images, "dense"), torch_logits(dense, images)) < 1e-5


def test_random_baseline_keeps_as_many_tokens_without_looking(bundle: Bundle) -> None:
    model = load_torch_model(REQUEST)
    stages = random_stages(model.stages)
    assert [(s.block, s.where, s.counts.tokens_in, s.counts.tokens_out) for s in stages] == [
        (s.block, s.where, s.counts.tokens_in, s.counts.tokens_out) for s in model.stages
    ]
    pruned = PrunedViT(model.config, stages).eval()
    pruned.load_state_dict(model.state_dict(), strict=False)
    images = noise(CONFIG, 2)
    assert relative_error(logits(bundle, images, "random"), torch_logits(pruned, images)) < 1e-5


def test_random_baseline_of_a_fusing_method_has_its_counts() -> None:
    stages = stages_of(CONFIG, "evit", 0.7)
    made = random_stages(stages)
    assert [s.counts.tokens_out for s in made] == [s.counts.tokens_out for s in stages]
    assert all(isinstance(s.selector, Constant) and len(s.selector.indices) == s.counts.kept for s in made)


def test_random_baseline_of_random_is_the_same_graph(tmp_path: Path) -> None:
    """Both have constants of one name, and a bundle stores a name once."""
    options: dict[str, Any] = {"method": "random", "method_options": {"seed": "7"}, "image_size": (128, 128)}
    request = replace(REQUEST, **options, verify=False)
    bundle = export_model(request, tmp_path / "out")
    model = load_torch_model(request)
    images = noise(model.config, 1)
    wanted = torch_logits(model, images)
    for graph in ("model", "random"):
        assert relative_error(logits(bundle, images, graph), wanted) < 1e-5


def test_keep_rate_one_has_no_baselines(tmp_path: Path) -> None:
    bundle = export_model(replace(REQUEST, keep_rate=1.0), tmp_path / "out")
    assert set(bundle.manifest.graphs) == {"model"}
    assert {p.name for p in bundle.path.iterdir()} == {"manifest.json", "model.onnx", "model.onnx.data"}
    assert (bundle.manifest.selection, bundle.manifest.method.stages) == ("none", [])
    assert bundle.manifest.macs is not None and bundle.manifest.macs.pruned == bundle.manifest.macs.dense


def test_dead_rows_may_stay(tmp_path: Path) -> None:
    bundle = export_model(replace(REQUEST, dead_rows=False, token_outputs=False), tmp_path / "out")
    macs = bundle.manifest.macs
    assert not bundle.manifest.dead_rows
    assert macs is not None and (macs.pruned_executed, macs.dense_executed) == (macs.pruned, macs.dense)


@pytest.mark.parametrize("method", ["evit", "random", "dense"])
def test_every_method_exports_to_the_portable_target(tmp_path: Path, method: str) -> None:
    request = replace(REQUEST, method=method, target="onnx", opset=18, batch=(2, 2))
    bundle = export_model(request, tmp_path / "out")
    assert (bundle.manifest.target, bundle.manifest.opset) == ("onnx", 18)
    images = noise(CONFIG, 2)
    assert relative_error(logits(bundle, images), torch_logits(load_torch_model(request), images)) < 1e-5


def test_labels_are_kept(tmp_path: Path) -> None:
    labels = list("abcdefghij")
    bundle = export_model(replace(REQUEST, method="dense", labels=labels, verify=False), tmp_path / "out")
    assert (bundle.manifest.labels, bundle.manifest.parity) == (labels, None)


def test_progress_ends_at_one_and_never_goes_back(tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    export_model(REQUEST, tmp_path / "out", progress=lambda step, share: seen.append((step, share)))
    shares = [share for _, share in seen]
    assert shares == sorted(shares) and (shares[0], shares[-1]) == (0.0, 1.0)
    assert any("dense.onnx" in step for step, _ in seen)


# ------------------------------------------------------------------------------------------------ weights


def test_random_weights_follow_the_seed() -> None:
    first, again, other = (load_torch_model(replace(REQUEST, seed=seed)).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_random_weights_tell_tokens_apart() -> None:
    model = load_torch_model(REQUEST)
    with torch.inference_mode():
        out = model.run(torch.from_numpy(noise(CONFIG, 2)))
    assert all(float(s.std(1).min()) > 1e-3 for s in out.scores)
    assert not model.training


def test_official_checkpoint_is_exported(checkpoint: Path, tmp_path: Path) -> None:
    request = replace(REQUEST, random_weights=False, checkpoint=str(checkpoint))
    bundle = export_model(request, tmp_path / "out")
    weights = bundle.manifest.weights
    assert (weights.source, weights.file, weights.ema) == ("checkpoint", "dynamicvit.pth", False)
    assert weights.sha256 is not None
    state = official_state()
    images = noise(CONFIG, 2)
    wanted, kept = reference_pruning.every(
        torch.from_numpy(images),
        lambda image: reference_pruning.dynamicvit(CONFIG, state, image, {1: 44, 2: 31, 3: 21}, "score_predictor"),
    )
    found = run_onnx(bundle.graph_path("model"), {"images": images})
    assert relative_error(found["logits"], wanted.numpy()) < 1e-4
    for s in range(3):
        assert [set(row) for row in found[f"kept_indices_{s}"].tolist()] == [set(image[s]) for image in kept]


def test_checkpoint_of_dynamicvit_at_keep_rate_one_is_dense(checkpoint: Path) -> None:
    request = replace(REQUEST, random_weights=False, checkpoint=str(checkpoint))
    whole, dense = (load_torch_model(replace(request, **f)) for f in ({"keep_rate": 1.0}, {"method": "dense"}))
    assert whole.state_dict().keys() == dense.state_dict().keys()
    assert not any("predictor" in k or k.startswith("prune") for k in whole.state_dict())
    images = noise(CONFIG, 2)
    np.testing.assert_array_equal(torch_logits(whole, images), torch_logits(dense, images))
    pruned = load_torch_model(request)
    backbone = {k: v for k, v in pruned.state_dict().items() if not k.startswith("prune.")}
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in backbone.items())


def test_predictors_of_stages_that_keep_all_are_left_in_the_file(checkpoint: Path) -> None:
    request = replace(REQUEST, random_weights=False, checkpoint=str(checkpoint), stages="1:0.7,2:1.0,3:0.3")
    model = load_torch_model(request)
    state = official_state()
    for stage in (0, 2):
        key = "out_conv.2.weight"
        assert torch.equal(model.state_dict()[f"prune.{stage}.{key}"], state[f"score_predictor.{stage}.{key}"])
    assert not any(k.startswith("prune.1.") for k in model.state_dict())


def test_checkpoint_without_predictors_is_refused_by_dynamicvit(tmp_path: Path) -> None:
    save_file(random_model(CONFIG).state_dict(), tmp_path / "dense.safetensors")
    request = replace(REQUEST, random_weights=False, checkpoint=str(tmp_path / "dense.safetensors"))
    with pytest.raises(InputError) as caught:
        export_model(request, tmp_path / "out")
    assert caught.value.code == "checkpoint-mismatch"
    assert not (tmp_path / "out").exists()


def test_own_layout_is_loaded_too(tmp_path: Path) -> None:
    model = random_model(CONFIG, stages_of(CONFIG, "dynamicvit", 0.7))
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    request = replace(REQUEST, random_weights=False, checkpoint=str(tmp_path / "ours.safetensors"))
    loaded = load_torch_model(request).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in model.state_dict().items())


# ------------------------------------------------------------------------------------------------ dry run


def test_plan_says_what_the_export_would_do(bundle: Bundle) -> None:
    plan, manifest = plan_export(REQUEST), bundle.manifest
    assert plan["macs"] == manifest.macs.model_dump()
    assert plan["stages"] == [s.model_dump() for s in manifest.method.stages]
    assert set(plan["files"]) == {p.name for p in bundle.path.iterdir()}
    assert (plan["target"], plan["opset"], plan["batch"]) == ("ort-cpu", 17, [1, 3])
    assert len(plan["steps"]) == 1 + 4 + 3 + 1


def test_plan_has_no_side_effects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy(), REQUEST)
    plan_export(replace(REQUEST, checkpoint="missing.pth", random_weights=False))
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


# ------------------------------------------------------------------------------------------------ refusals

REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"model": "deit_smal_patch16_224", "model_options": {}}, "model-unknown"),
    ({"method": "dynamicvitt"}, "method-unknown"),
    ({"target": "ort_cpu"}, "target-unknown"),
    ({"keep_rate": 0.0}, "keep-rate"),
    ({"keep_rate": 1.5}, "keep-rate"),
    ({"keep_rate": 9}, "keep-rate"),
    ({"keep_rate": 0.1}, "keep-rate"),  # 64 * 0.001 is less than a token
    ({"stages": "1,9"}, "stages"),
    ({"stages": "one"}, "stages"),
    ({"stages": "1:2.0"}, "keep-rate"),
    ({"method": "evit", "method_options": {"fuse": "maybe"}}, "method-option"),
    ({"method_options": {"fuse": "true"}}, "method-option"),
    ({"batch": (0, 1)}, "batch"),
    ({"batch": (4, 2)}, "batch"),
    ({"selection": "magic"}, "selection"),
    ({"opset": 16}, "opset"),
    ({"opset": 0}, "opset"),
    ({"opset": 99}, "opset"),
    ({"labels": ["a", "b"]}, "labels"),
    ({"image_size": (60, 60)}, "model-config"),
    ({"patch_size": 7}, "model-config"),
    ({"random_weights": False}, "weights"),
    ({"checkpoint": "x.pth"}, "weights"),
    ({"random_weights": False, "checkpoint": "no/such/file.pth"}, "checkpoint-not-found"),
]


@pytest.mark.parametrize(("fields", "code"), REFUSALS, ids=[f"{code} {list(f)[-1]}" for f, code in REFUSALS])
def test_bad_request_is_refused_before_anything_is_written(tmp_path: Path, fields: dict[str, Any], code: str) -> None:
    with pytest.raises(InputError) as caught:
        export_model(replace(REQUEST, **fields), tmp_path / "out")
    error = caught.value
    assert (error.code, error.exit_code) == (code, 2)
    assert error.expected
    assert list(tmp_path.iterdir()) == []


def test_target_that_lacks_a_package_is_not_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "ort-cpu-int8", replace(TARGETS["ort-cpu-int8"], packages=(("no_such", "ort"),)))
    with pytest.raises(EnvironmentLackError) as caught:
        export_model(replace(REQUEST, target="ort-cpu-int8"), tmp_path / "out")
    assert (caught.value.code, caught.value.exit_code) == ("target-unavailable", 3)
    assert "ort-cpu" in str(caught.value.expected)
    assert list(tmp_path.iterdir()) == []


def test_method_that_reads_the_class_token_is_refused_without_one(tmp_path: Path) -> None:
    request = replace(
        REQUEST, model="vit_base_patch16_gap_224", model_options={"depth": 4}, method="evit", keep_rate=0.7
    )
    with pytest.raises(InputError) as caught:
        export_model(request, tmp_path / "out")
    assert caught.value.code == "model-config"


def test_existing_output_is_not_overwritten_unasked(bundle: Bundle) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in bundle.path.iterdir()}
    with pytest.raises(InputError) as caught:
        export_model(REQUEST, bundle.path)
    assert caught.value.code == "output-exists"
    assert {p.name: p.stat().st_mtime_ns for p in bundle.path.iterdir()} == before


def test_existing_bundle_is_replaced_when_asked(tmp_path: Path) -> None:
    first = export_model(replace(REQUEST, method="dense", verify=False), tmp_path / "out").manifest
    second = export_model(replace(REQUEST, overwrite=True, verify=False), tmp_path / "out").manifest
    assert isinstance(first, Manifest) and first.method.name == "dense"
    assert load_bundle(tmp_path / "out").manifest == second
    assert second.method.name == "dynamicvit"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_interrupted_export_leaves_nothing(tmp_path: Path, stop: type[BaseException]) -> None:
    def progress(step: str, share: float) -> None:
        if share > 0.3:
            raise stop

    with pytest.raises(stop):
        export_model(REQUEST, tmp_path / "out", progress=progress)
    assert list(tmp_path.iterdir()) == []


def test_graph_that_disagrees_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeprune.export import api

    def load_reference(resolved: Any) -> Any:
        found = original(resolved)
        monkeypatch.setattr("edgeprune.export.emit.weights.weight_arrays", broken)
        return found

    def broken(model: torch.nn.Module) -> dict[str, np.ndarray]:
        return {k: v.numpy() * np.float32(1.001) for k, v in model.state_dict().items()}

    original = api.load_reference
    monkeypatch.setattr(api, "load_reference", load_reference)
    with pytest.raises(EdgepruneError) as caught:
        export_model(REQUEST, tmp_path / "out")
    assert (caught.value.code, caught.value.exit_code) == ("parity", 4)
    assert caught.value.details["max_rel_error"] > 1e-4
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ resolving


def test_resolve_computes_stages_and_defaults() -> None:
    resolved = resolve(replace(REQUEST, image_size=(32, 32), num_classes=4))
    assert (resolved.config.num_patches, resolved.config.num_classes, resolved.config.depth) == (16, 4, 4)
    assert [s.counts.kept for s in resolved.stages] == [11, 7, 5]
    assert (resolved.opset, resolved.target.name, resolved.options) == (17, "ort-cpu", {})


def test_plan_needs_no_weights_and_resolves_patch_size() -> None:
    plan = plan_export(replace(REQUEST, patch_size=16, method="evit"))
    assert [s["tokens_in"] for s in plan["stages"]] == [16, 13, 11]
