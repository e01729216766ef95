from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeprune.errors import BuildError, InputError
from edgeprune.export import ExportRequest, export_module
from edgeprune.pruning.model import PrunedViT
from edgeprune.runtime.session import Session
from tests.helpers.lowering import noise, small, stages_of
from tests.helpers.modules import Pruner, VisionTransformer


@pytest.fixture(scope="module")
def module() -> VisionTransformer:
    return VisionTransformer(small()).eval()


def test_timm_module_is_taken_over_with_its_weights(module: VisionTransformer, tmp_path: Path) -> None:
    bundle = export_module(module, ExportRequest(model="mine", token_outputs=True), tmp_path / "out")
    manifest = bundle.manifest
    assert (manifest.lowering, manifest.weights.source, manifest.model.name) == ("emitted", "module", "mine")
    assert manifest.preprocessing.mean == (0.1, 0.2, 0.3)
    images = noise(module._config)
    with torch.inference_mode():
        wanted = module(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(Session(bundle, threads=1).run(images).logits, wanted, rtol=1e-4, atol=1e-4)


def test_timm_module_can_be_pruned_by_a_method_without_weights(module: VisionTransformer, tmp_path: Path) -> None:
    request = ExportRequest(model="mine", method="evit", keep_rate=0.5, token_outputs=True, batch=(1, 2))
    bundle = export_module(module, request, tmp_path / "out")
    assert set(bundle.manifest.graphs) == {"model", "dense", "random"}
    model = PrunedViT(module._config, stages_of(module._config, "evit", 0.5)).eval()
    model.load_state_dict(module.state_dict())
    images = noise(module._config, 2)
    with torch.inference_mode():
        wanted = model.run(torch.from_numpy(images))
    result = Session(bundle, threads=1).run(images)
    np.testing.assert_allclose(result.logits, wanted.logits.numpy(), rtol=1e-4, atol=1e-4)
    assert [k.tolist() for k in result.kept] == [k.tolist() for k in wanted.kept]


def test_method_with_weights_is_refused_for_a_module_without_them(module: VisionTransformer, tmp_path: Path) -> None:
    request = ExportRequest(model="mine", method="dynamicvit", keep_rate=0.5)
    with pytest.raises(InputError) as caught:
        export_module(module, request, tmp_path / "out")
    assert caught.value.code == "checkpoint-mismatch"
    assert "prune.0" in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_unknown_module_is_traced(tmp_path: Path) -> None:
    request = ExportRequest(model="mine", image_size=(32, 32), batch=(1, 3), target="onnx")
    bundle = export_module(Pruner(), request, tmp_path / "out")
    manifest = bundle.manifest
    assert (manifest.lowering, manifest.selection, manifest.opset) == ("traced", "native", 18)
    assert manifest.macs is None and set(manifest.graphs) == {"model"}
    assert "Pruner" in manifest.warnings[0]
    assert manifest.parity is not None and manifest.parity.max_rel_error < 1e-4


def test_scores_of_a_traced_module_may_be_nan(tmp_path: Path) -> None:
    """ONNX Runtime's TopK puts NaN anywhere; parity would fail if the op's rule did not reach the graph."""
    module = Pruner(missing=True)
    bundle = export_module(module, ExportRequest(model="mine", image_size=(32, 32)), tmp_path / "out")
    assert bundle.manifest.parity is not None and bundle.manifest.parity.max_rel_error < 1e-4


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"method": "evit"}, "module"),
        ({"image_size": None}, "module"),
        ({"token_outputs": True}, "module"),
        ({"opset": 17}, "opset"),
        ({"selection": "magic"}, "selection"),
        ({"batch": (2, 1)}, "batch"),
        ({"target": "nowhere"}, "target-unknown"),
    ],
)
def test_request_that_tracing_cannot_meet_is_refused(tmp_path: Path, fields: dict[str, object], code: str) -> None:
    request = ExportRequest(**{"model": "mine", "image_size": (32, 32), **fields})
    with pytest.raises(InputError) as caught:
        export_module(Pruner(), request, tmp_path / "out")
    assert caught.value.code == code
    assert caught.value.expected
    assert list(tmp_path.iterdir()) == []


def test_module_that_branches_on_values_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :5] if images.sum() > 0 else images.flatten(1)[:, 5:10]

    with pytest.raises(BuildError) as caught:
        export_module(Branching(), ExportRequest(model="mine", image_size=(32, 32)), tmp_path / "out")
    error = caught.value
    assert (error.code, error.exit_code) == ("trace", 4)
    assert "Branching" in error.message and "torch says" in str(error.hint)
    assert list(tmp_path.iterdir()) == []
