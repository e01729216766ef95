"""Whether this processor's integer kernels are exact with 8-bit weights.

Without dot-product instructions (VNNI on x86) two products of an unsigned and a signed byte are added in 16 bits, which
255 * 127 twice exceeds; the sum is cut off there. With 7-bit weights it always fits.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from edgeprune.runtime.ort import import_onnxruntime

ROWS, DEPTH, COLUMNS = 4, 64, 32
MICROSOFT = "com.microsoft"


@cache
def saturates() -> bool:
    """Return whether ONNX Runtime cuts sums of products off here, by trying the largest ones.

    Raises:
        EnvironmentLackError: `package-missing`.
    """
    rows = np.full((ROWS, DEPTH), 255, np.uint8)
    weights = np.full((DEPTH, COLUMNS), 127, np.int8)
    node = helper.make_node("MatMulIntegerToFloat", ["rows", "weights", "one", "one"], ["product"], domain=MICROSOFT)
    graph = helper.make_graph(
        [node],
        "saturates",
        [helper.make_tensor_value_info("rows", TensorProto.UINT8, rows.shape)],
        [helper.make_tensor_value_info("product", TensorProto.FLOAT, [ROWS, COLUMNS])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(np.float32(1).reshape(()), "one")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = import_onnxruntime().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    product = session.run(None, {"rows": rows})[0]
    return not np.array_equal(product, np.full_like(product, 255 * 127 * DEPTH))
