"""Integer and 8-bit floating-point forms of a network's linear layers."""

from edgeprune.quantization.scheme import Quantization, linear_layers

__all__ = ["Quantization", "linear_layers"]
