"""The rivals in benchmarks/ must be what they are called, or the comparison is worth nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgeprune.bench.naive import Exporter, export_naive  # noqa: E402
from edgeprune.models.config import ViTConfig  # noqa: E402
from edgeprune.models.registry import get_model_config  # noqa: E402
from edgeprune.models.vit import VisionTransformer  # noqa: E402
from edgeprune.pruning import METHODS  # noqa: E402
from edgeprune.pruning.base import StageRequest  # noqa: E402
from edgeprune.pruning.model import PrunedViT  # noqa: E402
from edgeprune.runtime.ort import OrtBackend  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = ViTConfig("tiny", image_size=(64, 64), patch_size=(8, 8), num_classes=5, embed_dim=24, depth=4, num_heads=3)


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    path = Path(__file__).parents[3] / "benchmarks" / "_peers.py"
    spec = importlib.util.spec_from_file_location("benchmark_peers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def lively(model: VisionTransformer) -> VisionTransformer:
    """Give every parameter a size at which tokens differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def dynamicvit() -> PrunedViT:
    method = METHODS["dynamicvit"]
    model = PrunedViT(CONFIG, method.stages(CONFIG, StageRequest(0.7), method.parse_options({})))
    lively(model)
    return model


@torch.no_grad()
def test_official_style_dynamicvit_equals_the_reference(peers: ModuleType, images: Tensor) -> None:
    model = dynamicvit()
    torch.testing.assert_close(peers.OfficialStyleDynamicViT(model)(images), model(images), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_merging_nothing_equals_the_dense_model(peers: ModuleType, images: Tensor) -> None:
    model = lively(VisionTransformer(CONFIG))
    torch.testing.assert_close(peers.MergingViT(model, 0)(images), model(images), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_merging_keeps_every_patch_in_some_token(peers: ModuleType, images: Tensor) -> None:
    x, size = peers.MergingViT(lively(VisionTransformer(CONFIG)), 10).tokens(images)
    assert x.shape[1] == 65 - 4 * 10
    assert size.sum(1).flatten().tolist() == [65, 65]
    assert size[:, 0].flatten().tolist() == [1, 1]  # CLS stands for itself


@torch.no_grad()
def test_merging_deit_small_leaves_41_tokens(peers: ModuleType) -> None:
    config = get_model_config("deit_small_patch16_224", embed_dim=12, num_heads=1)
    model = peers.MergingViT(VisionTransformer(config).eval(), 13)
    assert model.tokens(torch.zeros(1, 3, 224, 224))[0].shape[1] == 41


def test_merge_averages_the_most_similar_pair(peers: ModuleType) -> None:
    # A: CLS, p, q at places 0, 2, 4; B: s, t at 1, 3; q points the way of t
    metric = torch.tensor([[[1.0, 1.0], [1.0, 0.0], [1.0, -0.5], [0.0, 1.0], [0.1, 2.0]]])
    x = torch.tensor([[[5.0], [1.0], [7.0], [2.0], [6.0]]])
    size = torch.tensor([[[1.0], [1.0], [1.0], [3.0], [1.0]]])
    merged, sizes = peers.merge(x, size, metric, 1)
    assert merged.flatten().tolist() == [5.0, 7.0, 1.0, 3.0]  # (3 * 2 + 6) / 4
    assert sizes.flatten().tolist() == [1.0, 1.0, 1.0, 4.0]


def test_merge_never_takes_the_class_token(peers: ModuleType) -> None:
    metric = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.1]]])
    merged, _ = peers.merge(torch.arange(4.0).reshape(1, 4, 1), torch.ones(1, 4, 1), metric, 1)
    assert merged[0, 0].item() == 0.0
    assert merged.shape[1] == 3


@pytest.mark.parametrize("exporter", ["legacy", pytest.param("dynamo", marks=pytest.mark.slow)])
@torch.no_grad()
def test_official_style_export_computes_the_reference(
    peers: ModuleType, images: Tensor, exporter: Exporter, tmp_path: Path
) -> None:
    model = dynamicvit()
    path = export_naive(
        peers.OfficialStyleDynamicViT(model).eval(), tmp_path / "m.onnx", CONFIG, batch=2, exporter=exporter
    )
    logits = OrtBackend(path, threads=1, spinning=False).run({"images": images.numpy()})["logits"]
    np.testing.assert_allclose(logits, model(images).numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@torch.no_grad()
def test_merging_export_computes_the_module(peers: ModuleType, images: Tensor, tmp_path: Path) -> None:
    module = peers.MergingViT(lively(VisionTransformer(CONFIG)), 10).eval()
    path = export_naive(module, tmp_path / "m.onnx", CONFIG, batch=2, exporter="dynamo")
    logits = OrtBackend(path, threads=1, spinning=False).run({"images": images.numpy()})["logits"]
    np.testing.assert_allclose(logits, module(images).numpy(), rtol=1e-3, atol=1e-3)
