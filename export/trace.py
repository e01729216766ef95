"""The fallback: a module the emitter does not know goes through torch.onnx and gets the graph level only.

Such a module may call `torch.ops.edgeprune.*`; those ops are lowered like the emitter's own. Its tokens are not ours to
count, so a traced bundle has no plan, no MACs and no baselines, and says that it was traced.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import nn

from edgeprune.errors import BuildError
from edgeprune.export.ops import PLUGIN_FIELDS

TRACE_OPSET = 18


def trace_graph(module: nn.Module, example: np.ndarray, batch: tuple[int, int]) -> gs.Graph:
    """Return the graph of a module, input `images`, output `logits`.

    Args:
        module: in eval mode; maps [B, C, H, W] to logits [B, classes].
        example: float32 [1, C, H, W]; only its shape matters.
        batch: smallest and largest batch.

    Raises:
        BuildError: `trace` with torch's reason.
    """
    images = torch.from_numpy(np.repeat(example, max(2, batch[1]) if batch[0] != batch[1] else batch[0], axis=0))
    dynamic = ({0: torch.export.Dim("batch", min=batch[0], max=batch[1])},) if batch[0] != batch[1] else None
    try:
        with quiet_exporter():
            program = torch.onnx.export(
                module,
                (images,),
                input_names=["images"],
                output_names=["logits"],
                opset_version=TRACE_OPSET,
                dynamo=True,
                dynamic_shapes=dynamic,
                custom_translation_table=translations(),
                verbose=False,
            )
    except Exception as error:  # torch raises many kinds
        raise BuildError(
            f"torch.onnx cannot trace {type(module).__name__}",
            code="trace",
            expected="a module whose forward maps images [B, C, H, W] to logits with torch operators",
            hint=f"torch says: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}",
        ) from error
    assert program is not None
    graph = gs.import_onnx(program.model_proto)
    if dynamic and isinstance(graph.inputs[0].shape[0], int):
        raise BuildError(
            f"the forward pass of {type(module).__name__} works for one batch size only once it is traced",
            code="trace",
            expected=f"any batch from {batch[0]} to {batch[1]}",
            hint="write x.shape[0] instead of len(x) or a number in its forward pass, or give one batch size",
        )
    return graph


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return how torch.onnx writes our ops: as `edgeprune` nodes."""
    from onnxscript.values import Op, Opset

    import edgeprune.pruning.ops  # noqa: F401  registers the ops
    from edgeprune.export.ops import DOMAIN, DOMAIN_VERSION
    from edgeprune.export.ops import gather_tokens as gather
    from edgeprune.export.ops import scatter_tokens as scatter
    from edgeprune.export.ops import topk_gather as topk

    ours = Opset(DOMAIN, DOMAIN_VERSION)
    topk_op, gather_op, scatter_op = (Op(ours, op.NAME, op.schema()) for op in (topk, gather, scatter))

    def topk_gather(
        scores: Any,
        tokens: Any,
        k: int,
        num_prefix_tokens: int = 1,
        order: int = 0,
        mode: int = 0,
        threshold: float = 0,
    ) -> Any:
        attrs = {"k": k, "num_prefix_tokens": num_prefix_tokens, "order": order, "mode": mode}
        return topk_op(scores, tokens, **attrs, threshold=float(threshold), **PLUGIN_FIELDS)

    def gather_tokens(tokens: Any, indices: Any, num_prefix_tokens: int = 1) -> Any:
        return gather_op(tokens, indices, num_prefix_tokens=num_prefix_tokens, **PLUGIN_FIELDS)

    def scatter_tokens(base: Any, tokens: Any, indices: Any) -> Any:
        return scatter_op(base, tokens, indices, **PLUGIN_FIELDS)

    return {
        torch.ops.edgeprune.topk_gather.default: topk_gather,
        torch.ops.edgeprune.gather_tokens.default: gather_tokens,
        torch.ops.edgeprune.scatter_tokens.default: scatter_tokens,
    }


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep torch's exporter from printing advice to its own developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
