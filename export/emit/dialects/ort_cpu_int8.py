"""The fastest integer form on ONNX Runtime's CPU provider: its own integer products, written out.

A quantizer that rewrites float graphs leaves it to the runtime to fuse what it wrote; a fusion that does not happen
costs all of the gain. Here every quantized layer is one MatMulIntegerToFloat, and layers that read the same rows share
their integers.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from edgeprune.export.emit.builder import GraphBuilder
from edgeprune.export.emit.dialects.ort_cpu import MICROSOFT, OrtCpuDialect
from edgeprune.quantization.scheme import Quantization, layer_of, quantize_weight, unsigned_activation

Integers = tuple[gs.Tensor, gs.Tensor, gs.Tensor]  # uint8 rows, float32 scale, uint8 zero point


class OrtCpuInt8Dialect(OrtCpuDialect):
    """Linear layers on unsigned 8-bit rows and signed weights with a scale per output channel.

    Args:
        quantization: which layers, and the ranges of their inputs unless those are measured as the graph runs.
    """

    def __init__(self, quantization: Quantization) -> None:
        super().__init__()
        self.quantization = quantization
        self._integers: dict[str, Integers] = {}

    def linear(
        self, g: GraphBuilder, name: str, x: gs.Tensor, weight: np.ndarray, bias: np.ndarray | None, key: str
    ) -> gs.Tensor:
        """Return one integer product of x [rows, in], or a Gemm where the layer stays float."""
        layer = layer_of(key)
        if layer not in self.quantization.layers:
            return super().linear(g, name, x, weight, bias, key)
        rows, scale, zero_point = self._quantized(g, x, layer)
        integers, scales = quantize_weight(weight, self.quantization.weight_bits)
        inputs = [
            rows,
            g.constant(f"{key}.weight.T.int8", integers.T),
            scale,
            g.constant(f"{key}.weight.scale", scales),
            zero_point,
        ]
        if bias is not None:
            inputs += [gs.Variable.empty(), g.constant(f"{key}.bias", bias)]
        shape = [x.shape[0], weight.shape[0]]
        return g.node("MatMulIntegerToFloat", inputs, shape=shape, name=name, domain=MICROSOFT)

    def _quantized(self, g: GraphBuilder, x: gs.Tensor, layer: str) -> Integers:
        """Return rows as integers, made once for all layers that read them."""
        if x.name not in self._integers:
            name = f"{layer.split('.', 2)[2]}.quantized"
            if self.quantization.scheme == "dynamic":
                kinds = [("rows", np.uint8, x.shape), ("scale", np.float32, []), ("zero_point", np.uint8, [])]
                made = g.multi_node("DynamicQuantizeLinear", [x], kinds, name=name)
                self._integers[x.name] = (made[0], made[1], made[2])
            else:
                scale, zero_point = unsigned_activation(self.quantization.ranges[layer])
                constants = (
                    g.unnamed_constant("scale", np.array(scale)),
                    g.unnamed_constant("zero_point", np.array(zero_point)),
                )
                rows = g.node("QuantizeLinear", [x, *constants], shape=x.shape, name=name, dtype=np.uint8)
                self._integers[x.name] = (rows, *constants)
        return self._integers[x.name]
