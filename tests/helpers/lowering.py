"""Lower tiny models in memory's reach: plan, graph, ONNX Runtime session, without bundles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

from edgeprune.export.emit.weights import weight_arrays
from edgeprune.export.pipeline import PLAN_PASSES, lower
from edgeprune.export.plan import Counts, Plan, build_plan
from edgeprune.export.targets.registry import TARGETS
from edgeprune.export.writer import WeightStore
from edgeprune.models.config import ViTConfig
from edgeprune.pruning import get_method
from edgeprune.pruning.base import Stage, StageRequest, parse_stages
from edgeprune.pruning.model import PrunedViT
from edgeprune.quantization import Quantization
from tests.helpers.reference_vit import randomize_statistics

PlanPass = Callable[[Plan], Plan]


def small(**fields: Any) -> ViTConfig:
    """Return a model of 16 patches, 4 blocks and width 32."""
    size = {"image_size": (32, 32), "patch_size": (8, 8), "embed_dim": 32, "depth": 4, "num_heads": 2}
    return ViTConfig(**{"name": "small", "num_classes": 5, **size, **fields})


def stages_of(config: ViTConfig, method: str, keep_rate: float = 0.7, text: str | None = None, **options: Any) -> Any:
    """Return the stages of a method, places and rates written as for --stages."""
    request: StageRequest = parse_stages(text, keep_rate)
    found = get_method(method)
    return found.stages(config, request, found.parse_options(options))


def random_model(config: ViTConfig, stages: tuple[Stage, ...] = (), seed: int = 0) -> PrunedViT:
    """Return a model whose every parameter is random, so that scores differ and a forgotten bias shows."""
    model = PrunedViT(config, stages).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = p[0].numel() ** -0.5 if p.ndim > 1 and name.endswith("weight") else 0.3
            p.copy_(torch.randn(p.shape, generator=generator) * gain)
            if p.ndim == 1 and ("norm" in name or ".bn" in name) and name.endswith("weight"):
                p.add_(1.0)
        randomize_statistics(model, generator)
    return model


def noise(config: ViTConfig, batch: int = 1, seed: int = 1) -> np.ndarray:
    """Return images [batch, C, H, W] of white noise."""
    shape = (batch, config.in_chans, *config.image_size)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@dataclass(frozen=True)
class Lowered:
    """A graph as written and how to run it."""

    model: onnx.ModelProto
    path: Path
    plan: Plan

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Return every output by name."""
        return run_onnx(self.path, {"images": images})

    def ops(self) -> set[str]:
        """Return the kinds of operators, with their domain unless it is the standard one."""
        return {f"{n.domain}.{n.op_type}".lstrip(".") for n in self.model.graph.node}


def lowered(
    model: PrunedViT,
    folder: Path,
    *,
    target: str = "onnx",
    batch: tuple[int, int] = (1, 1),
    passes: Sequence[PlanPass] = PLAN_PASSES,
    token_outputs: bool = True,
    opset: int | None = None,
    selection: str = "native",
    name: str = "model",
    counts: Counts = Counts.SLOTS,
    packed: int = 0,
    quantization: Quantization | None = None,
) -> Lowered:
    """Lower a model with some plan passes; none of them computes every row. The opset is the target's unless given."""
    plan = build_plan(
        model.config, model.stages, batch=batch, token_outputs=token_outputs, counts=counts, packed=packed
    )
    for plan_pass in passes:
        plan = plan_pass(plan)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.onnx"
    with WeightStore(folder / f"{name}.onnx.data") as store:
        options: dict[str, Any] = {
            "opset": opset or TARGETS[target].opset,
            "selection": selection,
            "quantization": quantization,
        }
        proto = lower(plan, weight_arrays(model), TARGETS[target], [path], store, **options)[path]
    return Lowered(proto, path, plan)


def run_onnx(model: Path | bytes, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a graph in ONNX Runtime on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feeds)), strict=True))


def reference(model: PrunedViT, images: np.ndarray) -> dict[str, np.ndarray]:
    """Return what the torch model gives, under the names of the graph's outputs."""
    with torch.inference_mode():
        out = model.run(torch.from_numpy(images))
    kept = {f"kept_indices_{s}": k.numpy() for s, k in enumerate(out.kept)}
    return {"logits": out.logits.numpy(), **kept}


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the largest difference as a share of the largest value of `theirs`."""
    return float(np.abs(ours.astype(np.float64) - theirs).max() / np.abs(theirs).max())
