"""Whole exports for `ort-cpu-int8`: every method and form, and what the manifest says of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from edgeprune.checks.parity import check_parity, model_from_manifest, verify_bundle
from edgeprune.errors import BuildError, CheckFailed, InputError
from edgeprune.export import ExportRequest, export_model
from edgeprune.export import quantize as module
from edgeprune.export.quantize import Trials, one_by_one
from edgeprune.export.targets.registry import TARGETS
from edgeprune.pruning import METHODS
from edgeprune.quantization import linear_layers
from edgeprune.runtime.bundle import Bundle, load_bundle
from edgeprune.runtime.kernels import NodeRun
from edgeprune.runtime.manifest import QuantizedSpeed
from edgeprune.runtime.session import Session
from tests.helpers.lowering import relative_error

TINY = {"embed_dim": 32, "depth": 4, "num_heads": 2}
REQUEST = ExportRequest(
    model="vit_digits",
    model_options=TINY,
    image_size=(32, 32),
    target="ort-cpu-int8",
    random_weights=True,
    seed=3,
)
RATES = {"dynamicvit": 0.6, "evit": 0.6, "random": 0.6, "ats": 0.8, "asvit": 0.8, "sait": 0.8}
OWN_OPTIONS = {"cropr": {"tokens_per_block": "3"}, "tome": {"r": "2"}}
CHECKPOINT = Path(__file__).resolve().parents[3] / "checkpoints" / "vit_digits_evit.safetensors"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge digits by a few images, draw no more of them."""
    monkeypatch.setattr("edgeprune.export.quantized_accuracy.JUDGED_IMAGES", 24)
    monkeypatch.setattr(module, "BY_TRIAL", 8)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a directory of 12 images without classes."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{number}.png")
    return f"imagefolder:{folder}"


def of_method(method: str, **fields: Any) -> ExportRequest:
    options = OWN_OPTIONS.get(method, {})
    return replace(REQUEST, method=method, keep_rate=RATES.get(method, 1.0), method_options=options, **fields)


def drawn(count: int, seed: int = 0) -> np.ndarray:
    """Return images [count, 3, 32, 32] of very different brightness."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, 3, 32, 32)) * np.geomspace(0.2, 5, count)[:, None, None, None]).astype(
        np.float32
    )


def exported(tmp_path: Path, request: ExportRequest) -> Bundle:
    bundle = export_model(request, tmp_path / "bundle")
    assert load_bundle(bundle.path).manifest == bundle.manifest
    return bundle


def assert_verifies(bundle: Bundle) -> None:
    manifest = bundle.manifest
    check_parity(verify_bundle(bundle, model_from_manifest(manifest), images=2), manifest.precision)


# ------------------------------------------------------------------------------------------------ methods and forms


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_exported_and_runs(tmp_path: Path, method: str) -> None:
    bundle = exported(tmp_path, of_method(method, token_outputs=True, batch=(1, 4)))
    manifest = bundle.manifest
    assert (manifest.target, manifest.precision) == ("ort-cpu-int8", "int8")
    assert manifest.parity is not None
    assert_verifies(bundle)
    result = Session(bundle).run(drawn(3))
    assert result.logits.shape == (3, 10) and np.isfinite(result.logits).all()
    for name in manifest.graphs:
        ops = [node.op_type for node in onnx.load(bundle.graph_path(name), load_external_data=False).graph.node]
        assert ops.count("MatMulIntegerToFloat") >= 4 * 4


FORMS: dict[str, dict[str, Any]] = {
    "slots": {"adaptive": "slots", "batch": (1, 4)},
    "computed": {"adaptive": "computed", "batch": (1, 4)},
    "ragged": {"adaptive": "ragged", "batch": (3, 3)},
    "buckets": {"buckets": "4,8,12", "batch": (1, 4)},
}


@pytest.mark.parametrize(
    ("form", "quantization"), [*((form, "dynamic") for form in FORMS), ("computed", "static"), ("buckets", "static")]
)
def test_every_form_is_exported_and_runs(tmp_path: Path, form: str, quantization: str) -> None:
    request = of_method("ats", token_outputs=True, quantization=quantization, **FORMS[form])
    bundle = exported(tmp_path, request)
    manifest = bundle.manifest
    assert manifest.adaptive is not None and manifest.adaptive.form == form
    assert manifest.quantization is not None and manifest.quantization.scheme == quantization
    assert manifest.parity is not None
    session, batch = Session(bundle), drawn(3)
    together = session.run(batch).logits
    alone_in_form = one_by_one(manifest.adaptive.form, manifest.batch, TARGETS["ort-cpu-int8"])
    said = any("taken over a batch" in warning for warning in manifest.warnings)
    assert said == (quantization == "dynamic" and not alone_in_form)
    if form == "ragged":
        return
    alone = np.concatenate([session.run(image[None]).logits for image in batch])
    assert (relative_error(together, alone) < 1e-5) == (not said)


@pytest.mark.parametrize("quantization", ["dynamic", "static"])
def test_several_densities(tmp_path: Path, quantization: str) -> None:
    request = replace(REQUEST, method="dynamicvit", densities=(1.0, 0.7, 0.5), quantization=quantization)
    session = Session(exported(tmp_path, request))
    found = []
    for rate in (1.0, 0.7, 0.5):
        session.density = rate
        found.append(session.run(drawn(1)).logits)
    assert not np.array_equal(found[0], found[1]) and not np.array_equal(found[1], found[2])


def test_static_density_that_keeps_all_has_the_ranges_of_the_manifest(tmp_path: Path) -> None:
    request = replace(REQUEST, method="dynamicvit", densities=(1.0, 0.5), quantization="static", dead_rows=False)
    manifest = exported(tmp_path, request).manifest
    assert [density.parity.max_rel_error < 1e-5 for density in manifest.densities if density.parity] == [True, True]


@pytest.mark.parametrize("batch", [(2, 2), (1, 4)])
def test_fixed_and_dynamic_batches(tmp_path: Path, batch: tuple[int, int]) -> None:
    bundle = exported(tmp_path, of_method("evit", batch=batch))
    assert bundle.manifest.graphs["model"].inputs[0].shape[0] == (2 if batch == (2, 2) else -1)
    assert any("taken over a batch" in warning for warning in bundle.manifest.warnings)
    assert Session(bundle).run(drawn(2)).logits.shape == (2, 10)


def test_images_run_alone_have_ranges_of_their_own() -> None:
    target, gpu = TARGETS["ort-cpu-int8"], TARGETS["trt-int8"]
    assert one_by_one(None, (1, 1), target) and one_by_one("computed", (8, 8), target)
    assert one_by_one("buckets", (1, 8), target) and not one_by_one("buckets", (1, 8), gpu)
    assert not one_by_one(None, (1, 8), target) and not one_by_one("ragged", (8, 8), target)


def test_weights_are_stored_once_and_as_bytes(tmp_path: Path) -> None:
    sizes = {}
    for target in ("ort-cpu", "ort-cpu-int8"):
        request = of_method("dynamicvit", verify=False, target=target, model_options={"depth": 4})
        bundle = export_model(request, tmp_path / target)
        places = set()
        for name in bundle.manifest.graphs:
            for tensor in onnx.load(bundle.graph_path(name), load_external_data=False).graph.initializer:
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    entry = {item.key: item.value for item in tensor.external_data}
                    places.add((tensor.name, entry["offset"]))
                    if target == "ort-cpu-int8" and tensor.name.endswith(".int8"):
                        assert int(entry["length"]) == np.prod(tensor.dims)
        assert len({name for name, _ in places}) == len(places)
        sizes[target] = (bundle.path / "model.onnx.data").stat().st_size
    assert sizes["ort-cpu-int8"] < 0.55 * sizes["ort-cpu"]  # patch embedding, head, predictors, folded keys stay float


# ------------------------------------------------------------------------------------------------ the decision


def spoken(monkeypatch: pytest.MonkeyPatch, **ms: float) -> list[tuple[str, ...]]:
    """Let forms take so many milliseconds; return the forms that were asked about."""
    asked: list[tuple[str, ...]] = []

    def speed(self: Trials, forms: dict[str, Any]) -> QuantizedSpeed:
        asked.append(tuple(forms))
        return QuantizedSpeed(ms={name: ms[name] for name in forms}, batch=self.batch, threads=1, cpu="a processor")

    monkeypatch.setattr(Trials, "speed", speed)
    return asked


@pytest.mark.parametrize(
    ("dynamic", "static", "chosen"), [(10.0, 5.0, "static"), (10.0, 9.9, "dynamic"), (5.0, 10.0, "dynamic")]
)
def test_faster_scheme_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: str, dynamic: float, static: float, chosen: str
) -> None:
    asked = spoken(monkeypatch, float=20.0, dynamic=dynamic, static=static)
    request = of_method("evit", calibration=images, calibration_method="minmax", verify=False)
    info = exported(tmp_path, request).manifest.quantization
    assert info is not None and info.scheme == chosen
    assert asked == [("float", "dynamic", "static")]
    assert info.speed is not None and info.speed.ms == {"float": 20.0, "dynamic": dynamic, "static": static}
    assert (info.ranges is not None) == (chosen == "static")


def test_faster_scheme_that_agrees_less_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: str
) -> None:
    spoken(monkeypatch, float=20.0, dynamic=10.0, static=1.0)
    monkeypatch.setattr(
        module, "observe_ranges", lambda models, layers, *args, **kw: dict.fromkeys(layers, (0.0, 1e-3))
    )
    info = exported(tmp_path, of_method("evit", calibration=images, verify=False)).manifest.quantization
    assert info is not None and info.scheme == "dynamic"


@pytest.mark.parametrize("asked", ["dynamic", "static"])
def test_scheme_that_was_asked_for_is_the_only_one_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: str, asked: str
) -> None:
    tried = spoken(monkeypatch, float=5.0, dynamic=20.0, static=20.0)
    bundle = exported(tmp_path, of_method("evit", calibration=images, quantization=asked, verify=False))
    info = bundle.manifest.quantization
    assert info is not None and info.scheme == asked
    assert tried == [("float", asked)]
    assert any("does not pay here: 20 ms, and 5 ms in float32" in warning for warning in bundle.manifest.warnings)


def test_manifest_tells_how_it_is_quantized_and_what_that_costs(tmp_path: Path, images: str) -> None:
    request = of_method("evit", calibration=images, quantization="static", calibration_method="percentile:99.9",
                        keep_float=("blocks.0.*", "*.fc2"))  # fmt: skip
    bundle = exported(tmp_path, request)
    info, layers = bundle.manifest.quantization, linear_layers(model_from_manifest(bundle.manifest).config)
    assert info is not None and info.ranges is not None and info.accuracy is not None and info.speed is not None
    kept = [layer for layer in layers if layer.startswith("blocks.0.") or layer.endswith("fc2")]
    assert (info.precision, info.scheme, info.weight_bits) == ("int8", "static", 7)
    assert info.kept_float == kept and info.layers == len(layers) - len(kept)
    name = images.rpartition("/")[2]
    assert (info.ranges.data, info.ranges.images) == (f"imagefolder:{name}", 6)
    assert info.ranges.method == "percentile:99.9" and set(info.ranges.values) == set(layers) - set(kept)
    assert (info.accuracy.data, info.accuracy.images, info.accuracy.held_out) == (f"imagefolder:{name}", 6, True)
    assert info.accuracy.top1 is None and info.accuracy.float_top1 is None
    assert info.accuracy.kept_overlap is not None and info.accuracy.kept_overlap > 0.8
    assert set(info.speed.ms) == {"float", "static"} and info.speed.threads == 1
    assert not any("nobody measured" in warning for warning in bundle.manifest.warnings)
    ops = [
        n
        for n in onnx.load(bundle.graph_path("model"), load_external_data=False).graph.node
        if n.name == "blocks.1.mlp.fc2"
    ]
    assert [node.op_type for node in ops] == ["Gemm"]


@pytest.mark.usefixtures("quick")
def test_digits_are_judged_by_labels_and_max_drop_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoken(monkeypatch, float=3.0, dynamic=1.0, static=2.0)
    request = ExportRequest(
        model="vit_digits", method="evit", keep_rate=0.7, checkpoint=str(CHECKPOINT), target="ort-cpu-int8",
        calibration="digits", calibration_images=8, calibration_method="minmax", max_drop=10.0, verify=False,
    )  # fmt: skip
    bundle = exported(tmp_path, request)
    info = bundle.manifest.quantization
    assert info is not None and info.accuracy is not None and info.scheme == "dynamic"
    assert (info.accuracy.images, info.accuracy.data, info.accuracy.held_out) == (24, "digits", True)
    assert info.accuracy.top1 is not None and info.accuracy.float_top1 is not None
    assert info.accuracy.drop == pytest.approx(100 * (info.accuracy.float_top1 - info.accuracy.top1))
    assert info.accuracy.top1 > 0.8 and info.accuracy.top1_agreement > 0.8

    monkeypatch.setattr(Trials, "run_of", lambda self, form: lambda images: spoilt(len(images)))
    with pytest.raises(CheckFailed) as caught:
        export_model(request, tmp_path / "other" / "bundle")
    assert (caught.value.code, caught.value.exit_code) == ("max-drop", 1)
    assert "--max-drop 10" in caught.value.message and caught.value.details["images"] == 24
    assert not (tmp_path / "other").exists() or list((tmp_path / "other").iterdir()) == []


def spoilt(count: int) -> dict[str, np.ndarray]:
    """Return the outputs of a graph that always says the same."""
    logits = np.zeros((count, 10), np.float32)
    logits[:, 3] = 1
    return {"logits": logits, **{f"kept_indices_{s}": np.zeros((count, 1), np.int32) for s in range(3)}}


def test_trials_leave_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    exported(tmp_path, replace(REQUEST, verify=False))
    assert list((tmp_path / "tmp").iterdir()) == []


def test_random_weights_are_calibrated_by_noise(tmp_path: Path) -> None:
    bundle = exported(tmp_path, replace(REQUEST, quantization="static"))
    info = bundle.manifest.quantization
    assert info is not None and info.ranges is not None
    assert (info.ranges.data, info.accuracy) == ("noise", None)
    assert bundle.manifest.warnings == [w for w in bundle.manifest.warnings if "does not pay" in w]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of the tiny model."""
    from edgeprune.export import load_torch_model

    file = tmp_path_factory.mktemp("checkpoint") / "tiny.pth"
    torch.save(load_torch_model(REQUEST).state_dict(), file)
    return file


def test_nobody_measured(tmp_path: Path, checkpoint: Path) -> None:
    request = replace(REQUEST, random_weights=False, checkpoint=str(checkpoint), verify=False)
    assert any("nobody measured" in warning for warning in exported(tmp_path, request).manifest.warnings)


@pytest.mark.parametrize(
    "fields", [{"target": "trt-int8"}, {"target": "trt-fp8"}, {"quantization": "static"}], ids=["int8", "fp8", "static"]
)
def test_static_ranges_need_images(tmp_path: Path, checkpoint: Path, fields: dict[str, Any]) -> None:
    request = replace(REQUEST, random_weights=False, checkpoint=str(checkpoint), **fields)
    with pytest.raises(InputError) as caught:
        export_model(request, tmp_path / "bundle")
    assert (caught.value.code, caught.value.exit_code) == ("calibration", 2)
    assert "--calibration digits" in str(caught.value.expected)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("where", "fields"),
    [
        ("blocks.1.attn.qkv.weight", {"quantization": "static"}),
        ("head.weight", {"quantization": "static"}),
        ("blocks.1.attn.qkv.weight", {"quantization": "dynamic"}),
        ("norm.weight", {}),
    ],
)
def test_weights_that_are_not_finite(
    tmp_path: Path, images: str, checkpoint: Path, where: str, fields: dict[str, Any]
) -> None:
    state = torch.load(checkpoint)
    state[where] = state[where] * torch.nan
    torch.save(state, tmp_path / "nan.pth")
    request = replace(REQUEST, random_weights=False, checkpoint=str(tmp_path / "nan.pth"), calibration=images, **fields)
    with pytest.raises(InputError) as caught:
        export_model(request, tmp_path / "bundle")
    assert caught.value.code == "calibration" and "not finite" in caught.value.message
    assert not (tmp_path / "bundle").exists()


def nodes_of(**other: str) -> list[NodeRun]:
    """Return what a profile shows when every linear layer runs on integers but `other`, by part of block 1."""
    parts = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
    ops = {f"blocks.1.mlp.{part}": op for part, op in other.items()}
    names = [f"blocks.{block}.{part}" for block in range(4) for part in parts]
    return [NodeRun(name, ops.get(name, "MatMulIntegerToFloat"), 1.0) for name in names if ops.get(name) != ""]


@pytest.mark.parametrize(
    ("nodes", "what"),
    [
        (nodes_of(fc2="MatMulNBits"), "blocks.1.mlp.fc2 ran as MatMulNBits"),
        (nodes_of(fc2=""), "blocks.1.mlp.fc2 was not seen to run"),
    ],
)
def test_layer_that_does_not_run_on_integers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: list[NodeRun], what: str
) -> None:
    monkeypatch.setattr(Trials, "_nodes", lambda self, form: nodes)
    with pytest.raises(BuildError, match=rf"1 quantized layers on integers: {what}") as caught:
        export_model(replace(REQUEST, verify=False), tmp_path / "bundle")
    assert (caught.value.code, caught.value.exit_code) == ("kernels", 4)
    assert caught.value.details == {"layers": [what]}
    assert not (tmp_path / "bundle").exists()
    bundle = exported(tmp_path, replace(REQUEST, verify=False, keep_float=("blocks.1.mlp.fc2",)))
    assert bundle.manifest.quantization is not None and bundle.manifest.quantization.layers == 15


@pytest.mark.parametrize("saturating", [True, False])
def test_weights_of_8_bits_are_warned_of_where_they_overflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saturating: bool
) -> None:
    monkeypatch.setattr(module, "saturates", lambda: saturating)
    bundle = exported(tmp_path, replace(REQUEST, weight_bits=8, verify=False))
    assert any("overflow the integer kernels" in warning for warning in bundle.manifest.warnings) == saturating
    info = bundle.manifest.quantization
    assert info is not None and info.weight_bits == 8


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"target": "ort-cpu", "quantization": "static"}, "quantization"),
        ({"target": "onnx", "keep_float": ("blocks.0.*",)}, "quantization"),
        ({"target": "ort-cpu", "weight_bits": 7}, "quantization"),
        ({"target": "trt-fp16", "max_drop": 1.0}, "quantization"),
        ({"target": "ort-cpu", "calibration_method": "minmax"}, "quantization"),
        ({"target": "ort-cpu", "calibration": "digits"}, "calibration"),
        ({"quantization": "weights"}, "quantization"),
        ({"target": "trt-int8", "quantization": "dynamic"}, "quantization"),
        ({"target": "trt-int8", "weight_bits": 7}, "weight-bits"),
        ({"weight_bits": 4}, "weight-bits"),
        ({"calibration_method": "mean"}, "calibration-method"),
        ({"calibration_method": "percentile:20"}, "calibration-method"),
        ({"calibration_method": "percentile:x"}, "calibration-method"),
        ({"calibration_method": "entropy:99"}, "calibration-method"),
        ({"max_drop": 1.0}, "max-drop"),
        ({"max_drop": -1.0, "calibration": "digits"}, "max-drop"),
        ({"max_drop": float("nan"), "calibration": "digits"}, "max-drop"),
        ({"keep_float": ("auto:0.2",)}, "keep-float"),
        ({"keep_float": ("auto",), "calibration": "digits"}, "keep-float"),
        ({"keep_float": ("auto:-1",), "calibration": "digits"}, "keep-float"),
        ({"keep_float": ("auto:0.1", "auto:0.2"), "calibration": "digits"}, "keep-float"),
        ({"keep_float": ("blocks.9.*",)}, "keep-float"),
        ({"keep_float": ("head",)}, "keep-float"),
        ({"keep_float": ("*",)}, "keep-float"),
        ({"keep_float": ("blocks.[0-2].*", "blocks.3.*")}, "keep-float"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, fields: dict[str, Any], code: str) -> None:
    with pytest.raises(InputError) as caught:
        export_model(replace(REQUEST, **fields), tmp_path / "bundle")
    assert (caught.value.code, caught.value.exit_code) == (code, 2)
    assert caught.value.expected
    assert not (tmp_path / "bundle").exists()
