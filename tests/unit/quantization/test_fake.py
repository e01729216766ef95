"""Fake-quantized layers against integer arithmetic, against ONNX Runtime, and in every method's model."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from edgeprune.errors import InternalError
from edgeprune.models.config import ViTConfig
from edgeprune.pruning import METHODS
from edgeprune.quantization import Quantization, linear_layers
from edgeprune.quantization.fake import FakeQuantizedLinear, dynamic_scale, fake_quantized
from edgeprune.quantization.scheme import Range, Scheme, quantize_weight, unsigned_activation
from tests.helpers.lowering import random_model, small, stages_of
from tests.helpers.pruned import images_of, run
from tests.helpers.reference_vit import LVVIT

Floats = NDArray[np.float32]
OWN_OPTIONS = {"cropr": {"tokens_per_block": "2"}, "tome": {"r": "2"}}


def layer(bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    linear = nn.Linear(48, 20, bias=bias)
    with torch.no_grad():
        linear.weight[3].zero_()
        linear.weight[4].mul_(50)
    return linear


def inputs(seed: int = 1, shift: float = 0.7) -> torch.Tensor:
    return torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(seed)) * 3 + shift


def quantized(
    linear: nn.Linear, scheme: Scheme = "dynamic", bits: int = 7, values: Range | None = None, symmetric: bool = False
) -> FakeQuantizedLinear:
    return FakeQuantizedLinear(
        linear, Quantization("int8", scheme, frozenset(["x"]), weight_bits=bits), values, symmetric=symmetric
    )


def all_layers(config: ViTConfig) -> Quantization:
    return Quantization("int8", "dynamic", frozenset(linear_layers(config)), weight_bits=7)


def integer_kernel(
    linear: nn.Linear, x: torch.Tensor, held: NDArray[np.int32], zero: int, scale: float, bits: int
) -> Floats:
    """Return what a kernel makes of integers `held`: sums of 32-bit integers, scaled per channel."""
    weight, scales = quantize_weight(linear.weight.detach().numpy(), bits)
    sums = (held - zero).reshape(-1, x.shape[-1]) @ weight.astype(np.int32).T
    assert sums.dtype == np.int32
    out = sums * (scales.astype(np.float64) * scale)
    if linear.bias is not None:
        out = out + linear.bias.detach().numpy()
    return out.reshape(*x.shape[:-1], -1)


def assert_equal_to(linear: FakeQuantizedLinear, x: torch.Tensor, expected: Floats) -> None:
    with torch.no_grad():
        found = linear(x).numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("shift", [0.7, 30.0, -30.0], ids=["mixed", "positive", "negative"])
def test_dynamic_layer_is_an_integer_kernel(shift: float, bits: int, bias: bool) -> None:
    linear, x = layer(bias), inputs(shift=shift)
    numbers = x.numpy()
    low, high = min(numbers.min(), np.float32(0)), max(numbers.max(), np.float32(0))
    scale = np.float32((high - low) / np.float32(255))
    zero = int(np.clip(np.rint(-low / scale), 0, 255))
    held = np.clip(np.rint(numbers / scale) + zero, 0, 255).astype(np.int32)
    assert held.max() == 255 or shift < 0
    assert_equal_to(quantized(linear, bits=bits), x, integer_kernel(linear, x, held, zero, float(scale), bits))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("values", [(-2.0, 5.0), (1.0, 4.0), (-4.0, -1.0)])
def test_static_layer_is_an_integer_kernel_that_cuts_off(values: Range, symmetric: bool) -> None:
    linear, x = layer(), inputs()
    if symmetric:
        scale, zero, low, high = np.float32(max(abs(v) for v in values) / 127), 0, -128, 127
    else:
        (scale, point), low, high = unsigned_activation(values), 0, 255
        zero = int(point)
    held = np.clip(np.rint(x.numpy() / scale) + zero, low, high).astype(np.int32)
    assert (held == low).sum() > 5
    expected = integer_kernel(linear, x, held, zero, float(scale), 8)
    assert_equal_to(quantized(linear, "static", 8, values, symmetric), x, expected)


def operator(x: Floats) -> list[np.ndarray]:
    """Return what DynamicQuantizeLinear of ONNX Runtime gives: integers, scale, zero point."""
    node = onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "scale", "zero"])
    kinds = {"y": onnx.TensorProto.UINT8, "scale": onnx.TensorProto.FLOAT, "zero": onnx.TensorProto.UINT8}
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [onnx.helper.make_tensor_value_info(n, k, x.shape if n == "y" else ()) for n, k in kinds.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})


@pytest.mark.parametrize("shift", [0.0, 30.0, -30.0])
@pytest.mark.parametrize("seed", range(4))
def test_dynamic_input_is_rounded_as_the_onnx_operator_does(seed: int, shift: float) -> None:
    x = (inputs(seed, shift) * 64).round() / 64  # a grid, so that some values lie right between two integers
    held, scale, zero = operator(x.numpy())
    found_scale, found_zero = dynamic_scale(x)
    assert found_scale.numpy() == scale
    assert found_zero.numpy() == zero
    expected = (held.astype(np.float32) - np.float32(zero)) * scale
    np.testing.assert_array_equal(quantized(layer()).rounded_input(x).detach().numpy(), expected)


def test_every_image_can_have_a_range_of_its_own() -> None:
    linear, x = layer(), torch.cat([inputs(1), inputs(2, 30.0) * 10])
    quantization = Quantization("int8", "dynamic", frozenset(["x"]), weight_bits=7)
    together = FakeQuantizedLinear(linear, quantization, per_image=True)(x)
    alone = torch.cat([quantized(linear)(image[None]) for image in x])
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(quantized(linear)(x)[:2], alone[:2], atol=0.1)


def test_input_of_zeros_stays_zeros() -> None:
    linear = layer()
    found = quantized(linear)(torch.zeros(2, 3, 48))
    torch.testing.assert_close(found, linear.bias.expand(2, 3, -1), rtol=0, atol=0)


@pytest.mark.parametrize("bits", [7, 8])
def test_weight_has_the_numbers_of_the_scheme(bits: int) -> None:
    linear = layer()
    held, scale = quantize_weight(linear.weight.detach().numpy(), bits)
    found = quantized(linear, bits=bits).rounded_weight().detach().numpy()
    np.testing.assert_array_equal(found, held.astype(np.float32) * scale[:, None])


def nearest_fp8(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the nearest float8e4m3fn, ties to even: 4 significant bits, steps of 2**-9 below 2**-6, 448 at most."""
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 1e-30))), -6)
    step = 2.0 ** (exponent - 3)
    return np.clip(np.rint(x / step) * step, -448, 448)


def test_fp8_layer_multiplies_the_nearest_floats() -> None:
    linear, x = layer(), inputs()
    quantization = Quantization("fp8", "static", frozenset(["x"]))
    found = FakeQuantizedLinear(linear, quantization, (-2.0, 5.0))
    weight = linear.weight.detach().numpy()
    scales = np.maximum(np.abs(weight).max(1, keepdims=True) / np.float32(448), np.float32(2**-14))
    scale = np.float32(5 / 448)
    expected_input = nearest_fp8((x.numpy() / scale).astype(np.float64)) * scale
    expected_weight = nearest_fp8((weight / scales).astype(np.float64)) * scales
    assert (expected_input == 448 * float(scale)).sum() > 5
    assert_equal_to(found, x, expected_input @ expected_weight.T + linear.bias.detach().numpy())


# ------------------------------------------------------------------------------------------------ gradients


def gradients(linear: nn.Linear, x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    linear.weight.grad = None
    linear(x).backward(upstream)
    assert x.grad is not None
    assert linear.weight.grad is not None
    return x.grad, linear.weight.grad


def test_dynamic_layer_has_the_gradient_of_a_float_layer_of_the_rounded_numbers() -> None:
    linear, x = layer(), inputs()
    fake = quantized(linear)
    upstream = torch.randn(2, 9, 20, generator=torch.Generator().manual_seed(3))
    of_input, of_weight = gradients(fake, x, upstream)
    torch.testing.assert_close(of_input, upstream @ fake.rounded_weight().detach())
    torch.testing.assert_close(of_weight, torch.einsum("bto,bti->oi", upstream, fake.rounded_input(x).detach()))


@pytest.mark.parametrize(("precision", "symmetric"), [("int8", False), ("int8", True), ("fp8", False)])
def test_values_outside_a_measured_range_get_no_gradient(precision: str, symmetric: bool) -> None:
    linear, x = layer(), inputs()
    quantization = Quantization(precision, "static", frozenset(["x"]))  # type: ignore[arg-type]
    fake = FakeQuantizedLinear(linear, quantization, (-3.0, 3.0), symmetric=symmetric)
    upstream = torch.ones(2, 9, 20)
    of_input, of_weight = gradients(fake, x, upstream)
    expected = upstream @ fake.rounded_weight().detach()
    inside, outside = x.abs() < 2.95, x.abs() > 3.05
    assert inside.sum() > 100
    assert outside.sum() > 100
    torch.testing.assert_close(of_input[inside], expected[inside])
    assert (of_input[outside] == 0).all()
    torch.testing.assert_close(of_weight, torch.einsum("bto,bti->oi", upstream, fake.rounded_input(x).detach()))


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_autocast_and_half_models_run(scheme: Scheme) -> None:
    linear, x = layer(), inputs()
    fake = quantized(linear, scheme, values=(-9.0, 9.0) if scheme == "static" else None)
    with torch.autocast("cpu", torch.bfloat16):
        out = fake(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert linear.weight.grad is not None
    torch.testing.assert_close(out.float(), fake(x), rtol=0.02, atol=0.1)
    half = fake.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), out.float(), rtol=0.05, atol=0.5)


# ------------------------------------------------------------------------------------------------ models


def test_copy_shares_parameters_and_leaves_the_model_alone() -> None:
    config = small(**LVVIT)
    model = random_model(config, stages_of(config, "dynamicvit"))
    images = images_of(model, 2)
    before = run(model, images).logits
    copy = fake_quantized(model, all_layers(config))
    assert list(copy.state_dict()) == list(model.state_dict())
    assert dict(copy.named_parameters()).keys() == dict(model.named_parameters()).keys()
    for (name, ours), theirs in zip(copy.named_parameters(), model.parameters(), strict=True):
        assert ours is theirs, name
    for (name, ours), theirs in zip(copy.named_buffers(), model.buffers(), strict=True):
        assert ours is theirs, name
    assert torch.equal(run(model, images).logits, before)
    found = {name for name, module in copy.named_modules() if isinstance(module, FakeQuantizedLinear)}
    assert found == set(linear_layers(config))
    assert not any(isinstance(module, FakeQuantizedLinear) for module in model.modules())
    copy.train()
    assert not model.training


def test_a_step_of_the_copy_trains_the_model() -> None:
    config = small()
    model = random_model(config)
    before = model.blocks[0].mlp.fc1.weight.detach().clone()
    copy = fake_quantized(model, all_layers(config)).train()
    optimizer = torch.optim.SGD(copy.parameters(), lr=0.1)
    copy(images_of(model, 2)).logsumexp(1).sum().backward()
    optimizer.step()
    assert not torch.equal(model.blocks[0].mlp.fc1.weight, before)
    assert torch.equal(copy.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)


def test_only_the_named_layers_are_quantized() -> None:
    config = small()
    model = random_model(config)
    named = frozenset({"blocks.1.attn.qkv", "blocks.3.mlp.fc2"})
    copy = fake_quantized(model, Quantization("int8", "dynamic", named))
    assert {name for name, module in copy.named_modules() if isinstance(module, FakeQuantizedLinear)} == named
    images, none = images_of(model, 2), Quantization("int8", "dynamic", frozenset())
    assert torch.equal(run(fake_quantized(model, none), images).logits, run(model, images).logits)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_keeps_what_its_layers_decide(method: str) -> None:
    config = small()
    rate = 1.0 if method in OWN_OPTIONS or METHODS[method].rule is None else 0.7
    model = random_model(config, stages_of(config, method, rate, **OWN_OPTIONS.get(method, {})))
    images = images_of(model, 3)
    exact = run(model, images)
    near = run(fake_quantized(model, Quantization("int8", "dynamic", frozenset(linear_layers(config)))), images)
    assert near.logits.shape == exact.logits.shape
    assert torch.isfinite(near.logits).all()
    assert not torch.equal(near.logits, exact.logits)
    assert [kept.shape[0] for kept in near.kept] == [kept.shape[0] for kept in exact.kept]
    copy = fake_quantized(model, all_layers(config)).train()
    copy(images).logsumexp(1).sum().backward()
    weights = [block.mlp.fc1.weight for block in model.blocks]
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in weights)


@pytest.mark.parametrize(
    ("quantization", "symmetric", "words"),
    [
        (Quantization("int8", "dynamic", frozenset(["blocks.9.attn.qkv"])), False, "blocks.9.attn.qkv"),
        (Quantization("int8", "dynamic", frozenset(["blocks.0.norm1"])), False, "blocks.0.norm1"),
        (Quantization("int8", "dynamic", frozenset([""])), False, "''"),
        (Quantization("int8", "static", frozenset(["head"]), {"norm": (0, 1)}), False, "head"),
        (Quantization("int8", "dynamic", frozenset(["head"])), True, "dynamic"),
        (Quantization("fp8", "dynamic", frozenset(["head"])), False, "dynamic"),
    ],
)
def test_what_cannot_be_quantized_is_refused(quantization: Quantization, symmetric: bool, words: str) -> None:
    with pytest.raises(InternalError, match=words) as error:
        fake_quantized(random_model(small()), quantization, symmetric=symmetric)
    assert error.value.code == "quantization"
