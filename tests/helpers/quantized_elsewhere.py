"""Another tool that quantizes graphs: ONNX Runtime's quantizer, asked for what TensorRT takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from edgeprune.data.digits import DigitsSet
from edgeprune.runtime.bundle import load_bundle
from edgeprune.runtime.manifest import PreprocessInfo


def digits(split: str, count: int, preprocessing: PreprocessInfo) -> np.ndarray:
    ((images, _),) = DigitsSet(split, limit=count).batches(count, preprocessing)
    return images


class Images(CalibrationDataReader):  # type: ignore[misc]
    """Digits, one at a time."""

    def __init__(self, preprocessing: PreprocessInfo) -> None:
        self._images: Iterator[np.ndarray] = iter(digits("train", 16, preprocessing))

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self._images, None)
        return None if image is None else {"images": image[None]}


def quantized_elsewhere(source: Path, out: Path) -> Path:
    """Return model.onnx of a bundle as the quantizer of ONNX Runtime writes it for TensorRT."""
    graph = onnx.load(source, load_external_data=False).graph
    images = Images(load_bundle(source.parent).manifest.preprocessing)
    layers = [n.name for n in graph.node if n.op_type == "MatMul" and _is_layer(n, graph)]
    quantize_static(
        source, out, images, quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8, nodes_to_quantize=layers, op_types_to_quantize=["MatMul"],
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "OpTypesToExcludeOutputQuantization":
                       ["MatMul"]},
    )  # fmt: skip
    return out


def _is_layer(node: onnx.NodeProto, graph: onnx.GraphProto) -> bool:
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    return node.name.startswith("blocks.") and node.input[1] in matrices
