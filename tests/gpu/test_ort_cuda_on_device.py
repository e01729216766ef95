"""ONNX Runtime's CUDA provider on a device, against its CPU provider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from edgeprune.checks.parity import check_parity, model_from_manifest, verify_bundle
from edgeprune.export import ExportRequest, export_model
from edgeprune.runtime.ort import OrtBackend, import_onnxruntime
from edgeprune.runtime.ort_cuda import PROVIDER, DeviceRows, OrtCudaBackend
from edgeprune.runtime.router import Router
from edgeprune.runtime.session import Session
from tests.helpers.bundles import tiny_model
from tests.helpers.device_kernels import missing_device
from tests.helpers.routed import write_rest, write_stem

pytestmark = pytest.mark.gpu

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"


@pytest.fixture(scope="module", autouse=True)
def device() -> None:
    reason = missing_device()
    if reason is None and PROVIDER not in import_onnxruntime().get_available_providers():
        reason = f"this onnxruntime has no {PROVIDER}"
    if reason is not None:
        pytest.skip(reason)


def images(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("graphs", [True, False])
def test_results_are_those_of_the_cpu(tmp_path: Path, graphs: bool) -> None:
    onnx.save(tiny_model((1, 8)), tmp_path / "tiny.onnx")
    ours, plain = OrtCudaBackend(tmp_path / "tiny.onnx", graphs=graphs), OrtBackend(tmp_path / "tiny.onnx")
    for seed, batch in enumerate((1, 3, 1, 8, 3, 1)):  # again and again: the first runs record, later ones replay
        feeds = {"images": images(batch, seed)}
        got, wanted = ours.run(feeds), plain.run(feeds)
        np.testing.assert_allclose(got["logits"], wanted["logits"], rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(got["kept_indices_0"], wanted["kept_indices_0"])


def test_a_static_graph_of_the_provider_alone_is_recorded(tmp_path: Path) -> None:
    ours = OrtCudaBackend(write_stem(tmp_path / "stem.onnx", 2))
    assert ours.graphs
    for seed in range(4):
        out = ours.run({"images": images(2, seed)}, keep={"tokens"})
        assert isinstance(out["tokens"], DeviceRows)
        np.testing.assert_array_equal(out["tokens"].numpy(), images(2, seed).reshape(2, -1).astype(np.float16))


@pytest.mark.parametrize(("stem_batch", "rest_batch"), [(1, 1), ("batch", 1), ("batch", "batch"), (4, 2)])
def test_routed_results_are_those_of_the_cpu(tmp_path: Path, stem_batch: int | str, rest_batch: int | str) -> None:
    write_stem(tmp_path / "stem.onnx", stem_batch)
    for i, scale in enumerate((2.0, 5.0)):
        write_rest(tmp_path / f"rest{i}.onnx", rest_batch, scale)

    def router(make: Any) -> Router:
        rests = [make(tmp_path / f"rest{i}.onnx") for i in (0, 1)]
        return Router(make(tmp_path / "stem.onnx"), rests, [(95,), (192,)])

    ours, plain = router(OrtCudaBackend), router(OrtBackend)
    for seed in range(6):
        got, wanted = ours.run(images(5, seed)), plain.run(images(5, seed))
        for name, array in wanted.items():
            np.testing.assert_allclose(got[name], array, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("method", "keep_rate"), [("dense", 1.0), ("evit", 0.5), ("dynamicvit", 0.5)])
def test_a_bundle_agrees_with_pytorch(tmp_path: Path, method: str, keep_rate: float) -> None:
    weights = str(CHECKPOINTS / f"vit_digits_{method}.safetensors")
    request = ExportRequest(
        model="vit_digits",
        method=method,
        keep_rate=keep_rate,
        checkpoint=weights,
        target="ort-cuda-fp16",
        token_outputs=method != "dense",
        verify=False,
    )
    bundle = export_model(request, tmp_path / "bundle")
    model = model_from_manifest(bundle.manifest, weights)
    check_parity(verify_bundle(bundle, model, session=Session(bundle), images=16), bundle.manifest.precision)
