"""Linear layers of a torch model that compute what kernels of 8 bits would, with gradients to train by.

Weights and inputs are rounded to the numbers a kernel holds and multiplied as floats; a kernel sums exactly, so the
two differ by the rounding of a float sum alone. Rounding passes the gradient as if it were not there (straight-through
estimator, Bengio et al., 2013, https://arxiv.org/abs/1308.3432); a value cut off at the end of a range gets none.

`torch.fake_quantize_per_tensor_affine` multiplies by the reciprocal of the scale, where the operators of ONNX divide,
and so rounds some values to the other neighbour; hence rounding is done here.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeprune.errors import InternalError
from edgeprune.pruning.model import PrunedViT
from edgeprune.quantization.scheme import (
    FP8_MAX,
    SMALLEST_SCALE,
    Quantization,
    Range,
    signed_scale,
    unsigned_activation,
)

M = TypeVar("M", bound=nn.Module)

UINT8_MAX = 255


class FakeQuantizedLinear(nn.Linear):
    """A linear layer with the parameters of another and quantized weights and inputs.

    A dynamic range is that of the tensor the layer is called with, so an image's output depends on its batch, as it
    does in a kernel; or of each image, as in a kernel that gets one at a time.

    Args:
        linear: whose parameters are shared.
        quantization: its precision, scheme and bits of weights.
        values: the measured range of the input, for the static scheme.
        symmetric: static integers are signed with zero in their middle, as TensorRT wants them, not unsigned with a
            zero point.
        per_image: every entry of the input's first dimension has a dynamic range of its own.
    """

    def __init__(
        self,
        linear: nn.Linear,
        quantization: Quantization,
        values: Range | None = None,
        *,
        symmetric: bool = False,
        per_image: bool = False,
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.precision, self.weight_bits = quantization.precision, quantization.weight_bits
        self.values, self.symmetric, self.per_image = values, symmetric, per_image
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return [..., out] of [..., in]."""
        return F.linear(self.rounded_input(input), self.rounded_weight(), self.bias)

    def rounded_weight(self) -> Tensor:
        """Return the weight [out, in] as the kernel sees it, with a scale per output channel."""
        weight = self.weight.detach().float()
        top = FP8_MAX if self.precision == "fp8" else 2 ** (self.weight_bits - 1) - 1
        largest = weight.abs().amax(1, keepdim=True)
        scale = (largest / torch.full_like(largest, top)).clamp(min=SMALLEST_SCALE)  # tensors: a GPU divides exactly
        held = to_fp8(weight / scale) if self.precision == "fp8" else (weight / scale).round_().clamp_(-top, top)
        return straight_through(self.weight, held.mul_(scale))

    def rounded_input(self, x: Tensor) -> Tensor:
        """Return an input [..., in] as the kernel sees it."""
        floats = x.detach().float()
        if self.values is None:
            scale, zero = dynamic_scale(floats, per_image=self.per_image)
            held = (floats / scale).round_().add_(zero).clamp_(0, UINT8_MAX)
            return straight_through(x, held.sub_(zero).mul_(scale))
        if self.precision == "fp8":
            scale = floats.new_tensor(float(signed_scale(self.values, "fp8")))
            wanted = floats / scale
            return straight_through(x, to_fp8(wanted).mul_(scale), wanted.abs() <= FP8_MAX)
        if self.symmetric:
            step, point, low, high = signed_scale(self.values), 0, -128, 127
        else:
            step, zero_point = unsigned_activation(self.values)
            point, low, high = int(zero_point), 0, UINT8_MAX
        scale = floats.new_tensor(float(step))
        wanted = (floats / scale).round_().add_(point)
        inside = (wanted >= low) & (wanted <= high)
        return straight_through(x, wanted.clamp_(low, high).sub_(point).mul_(scale), inside)

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        scheme = "dynamic" if self.values is None else f"range {self.values[0]:.4g} to {self.values[1]:.4g}"
        return f"{super().extra_repr()}, {self.precision}, {scheme}"


def dynamic_scale(x: Tensor, *, per_image: bool = False) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of 8-bit unsigned integers for the values of a tensor and zero.

    Both are float32 [1, ..., 1], or [B, 1, ..., 1] for every image alone; zero points are whole numbers.

    Source: the operator DynamicQuantizeLinear of ONNX; a tensor of zeros has scale 1, as in ONNX Runtime.
    """
    over = tuple(range(int(per_image), x.ndim))
    low, high = x.amin(over, keepdim=True).clamp_(max=0), x.amax(over, keepdim=True).clamp_(min=0)
    scale = (high - low) / torch.full_like(high, UINT8_MAX)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, (-low / scale).clamp(0, UINT8_MAX).round()


def to_fp8(x: Tensor) -> Tensor:
    """Return float32 values rounded to float8e4m3fn; those beyond its largest become it."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rounded: Tensor, inside: Tensor | None) -> Tensor:
        ctx.save_for_backward(inside)
        return rounded.to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] if inside is None else grads[0] * inside, None, None


def straight_through(values: Tensor, rounded: Tensor, inside: Tensor | None = None) -> Tensor:
    """Return `rounded` in the type of `values`, with the gradient of `values` where `inside`; None means everywhere."""
    result: Tensor = _StraightThrough.apply(values, rounded, inside)
    return result


def fake_quantized(model: M, quantization: Quantization, *, symmetric: bool = False, per_image: bool = False) -> M:
    """Return a copy of a model whose named linear layers compute as quantized ones.

    The copy shares every parameter and buffer with the model and has the same state_dict: training one trains the
    other. Layers are quantized where they are called; who reads a layer's `weight` finds it as it was.

    Args:
        model: stays as it is.
        quantization: which layers, and how.
        symmetric: as in `FakeQuantizedLinear`; for the static scheme.
        per_image: likewise; for the dynamic one.

    Raises:
        InternalError: `quantization` when a name is no linear layer of the model, a static layer has no range, or the
            scheme does not exist: float8 and symmetric integers have no dynamic one.
    """
    static = quantization.scheme == "static"
    if not static and (symmetric or quantization.precision == "fp8"):
        raise InternalError("only unsigned integers have a dynamic scheme", code="quantization")
    missing = sorted(quantization.layers - quantization.ranges.keys()) if static else []
    if missing:
        raise InternalError(f"the input of {missing[0]} has no measured range", code="quantization")
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, shared)
    modules = dict(other.named_modules())
    for name in sorted(quantization.layers):
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise InternalError(f"'{name}' is no linear layer of the model", code="quantization")
        parent, _, last = name.rpartition(".")
        values = quantization.ranges[name] if static else None
        fake = FakeQuantizedLinear(linear, quantization, values, symmetric=symmetric, per_image=per_image)
        setattr(modules[parent], last, fake)
    if isinstance(other, PrunedViT):
        other.ranges_of_batch = not (static or per_image)
    return other
