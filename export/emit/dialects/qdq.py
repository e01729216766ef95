"""Linear layers between QuantizeLinear and DequantizeLinear, the form TensorRT and others make 8-bit products of.

Inputs have one scale per tensor, weights one per output channel; both are symmetric about zero, as TensorRT wants it.
Weights are stored as they are multiplied. The queries, keys and values of a block read one quantized tensor.

Left in floating point, besides what a `Quantization` leaves out: everything precise; the products of attention, whose
operands a `Quantization` has no ranges of, and whose fused kernel is lost when some of them are quantized and others
are not; a product of one row, which is a reading of weights that no tensor core speeds up (NVIDIA's Model Optimizer
leaves those out for the same reason, `modelopt/onnx/quantization/fp8.py`).
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from edgeprune.errors import InternalError
from edgeprune.export.emit.builder import GraphBuilder
from edgeprune.export.emit.dialects.plain import PlainDialect
from edgeprune.export.passes.assign_types import low_type
from edgeprune.quantization.scheme import FP8_MAX, SMALLEST_SCALE, Precision, Quantization, layer_of, signed_scale

TYPES: dict[Precision, np.dtype[np.generic]] = {
    "int8": np.dtype(np.int8),
    "fp8": np.dtype(helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)),
}
OUTPUTS = 1  # the axis of a weight [in, out]


class QdqDialect(PlainDialect):
    """The portable dialect with quantized linear layers.

    Args:
        precision: of what stays floating point. Scales are held in it, and weights quantized by the scales so rounded.
        quantization: of the linear layers, static.
    """

    def __init__(self, precision: str, quantization: Quantization) -> None:
        super().__init__(precision)
        self.quantization = quantization
        self.dtype = TYPES[quantization.precision]
        self._inputs: dict[tuple[str, float], gs.Tensor] = {}  # by tensor and scale, what the products read

    def linear(
        self, g: GraphBuilder, name: str, x: gs.Tensor, weight: np.ndarray, bias: np.ndarray | None, key: str
    ) -> gs.Tensor:
        """Return x W^T + b, the product of 8-bit numbers where the layer is quantized."""
        layer = layer_of(key)
        if g.is_precise or layer not in self.quantization.layers or _is_one_row(x):
            return super().linear(g, name, x, weight, bias, key)
        shape = [*x.shape[:-1], weight.shape[0]]
        y = g.node("MatMul", [self._input(g, x, layer), self._weight(g, name, key, weight)], shape=shape, name=name)
        if bias is None:
            return y
        return g.node("Add", [y, g.constant(f"{key}.bias", bias)], shape=shape, name=f"{name}.add_bias")

    def _input(self, g: GraphBuilder, x: gs.Tensor, layer: str) -> gs.Tensor:
        """Return the input of a layer after rounding to 8 bits, once for all layers that read it."""
        if layer not in self.quantization.ranges:
            raise InternalError(f"{layer} is to be quantized and has no range", code="quantization-range")
        scale = signed_scale(self.quantization.ranges[layer], self.quantization.precision)
        if (x.name, float(scale)) not in self._inputs:
            part = layer.split(".", 2)[2]
            scales = [g.constant(f"{layer}.input.scale", np.array(scale, np.float32)), self._zero(g, ())]
            made = g.node("QuantizeLinear", [x, *scales], shape=x.shape, name=f"{part}.quantized", dtype=self.dtype)
            self._inputs[x.name, float(scale)] = g.node(
                "DequantizeLinear", [made, *scales], shape=x.shape, name=f"{part}.input"
            )
        return self._inputs[x.name, float(scale)]

    def _weight(self, g: GraphBuilder, name: str, key: str, weight: np.ndarray) -> gs.Tensor:
        """Return the weight [in, out] of a product."""
        values, scale = quantize_rows(weight, self.dtype, low_type(self.precision))
        stored = g.constant(f"{key}.weight.T.{self.quantization.precision}", values.T)
        inputs = [stored, g.constant(f"{key}.weight.scale", scale), self._zero(g, (len(scale),))]
        return g.node("DequantizeLinear", inputs, shape=stored.shape, name=f"{name}.weight", axis=OUTPUTS)

    def _zero(self, g: GraphBuilder, shape: tuple[int, ...]) -> gs.Constant:
        """Return the zero point, which has the shape of the scale and says the type."""
        label = "_".join(map(str, shape)) or "scalar"
        return g.constant(f"const.{self.quantization.precision}.zero_{label}", np.zeros(shape, self.dtype))


def quantize_rows(
    weight: np.ndarray, dtype: np.dtype[np.generic], scale_type: np.dtype[np.generic] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return 8-bit numbers [out, in] and float32 scales [out], so that weight is about numbers * scales.

    Args:
        weight: [out, in].
        dtype: int8 or float8e4m3fn.
        scale_type: in which the scales can be held without another rounding; None for float32.
    """
    integers = dtype.kind == "i"
    top = 127.0 if integers else FP8_MAX
    scale = np.maximum(np.abs(weight).max(axis=1) / top, SMALLEST_SCALE).astype(np.float32)
    if scale_type is not None:
        scale = scale.astype(scale_type).astype(np.float32)
    scaled = np.clip(weight / scale[:, None], -top, top)
    return (np.rint(scaled) if integers else scaled).astype(dtype), scale


def _is_one_row(x: gs.Tensor) -> bool:
    return all(side == 1 for side in x.shape[:-1])
