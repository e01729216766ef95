"""What TensorRT's ONNX parser takes, by version. Facts only; the rules in `edgeprune.export.lint` apply them.

A version is judged by the newest one listed that is not newer: JetPack's 8.6.2 by 8.6, 10.13 by 10.9, 10.16 by 10.14
and 11.4 by 11.1. Only versions are listed at which something changes that a graph of a vision transformer can meet.

Sources: `docs/operators.md`, `docs/Changelog.md` and the importers of github.com/onnx/onnx-tensorrt: branches 8.5-GA,
8.6-GA, 9.0-GA to 9.3, 10.0-GA and 10.1-GA, the documents alone of 10.6 and 10.15. Of 11.x neither was at hand; it is
taken to lose no operator. Where the documents name fewer types than the code takes, the code counts: IReduceLayer takes
int32 since 8.2 by its own documentation, and the importer of ConstantOfShape any value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from edgeprune.errors import InputError

LEAST = "8.6"  # the oldest version that takes what the emitter writes

# Letters of element types. An 8.x parser reads int64 as int32, so there "i" means both as well.
KINDS: dict[str, tuple[str, ...]] = {
    "f": ("float32", "float16", "bfloat16"),
    "h": ("float32", "float16"),
    "s": ("float32",),
    "i": ("int32", "int64"),
    "b": ("bool",),
    "u": ("uint8",),
    "q": ("int8", "float8e4m3fn", "int4"),
}

# What came with a version: the element types of the data, and the operators that take them.
_NEW: dict[str, dict[str, str]] = {
    "8.5": {
        "fib": "Cast Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity If"
        " Loop OneHot Reshape Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where",
        "fi": "Abs Add Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean Min Mod Mul Neg Pad ReduceMax"
        " ReduceMin ReduceProd ReduceSum ScatterElements ScatterND Sign Sub Sum",
        "f": "ArgMax ArgMin AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos CumSum Dropout Einsum"
        " Elu Erf Exp Floor Gemm GlobalAveragePool GlobalMaxPool HardSigmoid HardSwish InstanceNormalization"
        " LeakyRelu Log LogSoftmax LpNormalization MatMul MaxPool MeanVarianceNormalization PRelu Pow"
        " QuantizeLinear Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMean ReduceSumSquare Relu"
        " Resize Round Scan Selu Sigmoid Sin Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu TopK Upsample",
        "h": "GridSample NonMaxSuppression NonZero",
        "si": "Range",
        "b": "And Not Or Xor",
        "q": "DequantizeLinear",
    },
    "8.6": {"f": "GroupNormalization IsInf LayerNormalization", "fi": "ArgMax ArgMin TopK", "fibu": "Cast"},
    "10.0": {
        "f": "Gelu Hardmax",
        "fibu": "CastLike",
        "fi": "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMean ReduceSumSquare Relu",
    },
    "10.14": {"f": "Attention", "fi": "Pow"},  # Pow on integers from 10.12 on
    "11.1": {"f": "RMSNormalization RotaryEmbedding Swish"},  # the first two from 10.15 on
}


@dataclass(frozen=True)
class Family:
    """What the parser of a TensorRT version takes.

    Attributes:
        version: the version its facts are of; newer ones up to the next family are judged by it.
        opset: highest version of the standard operators.
        operators: element types of the data by operator; what is not listed is unknown.
        types: element types tensors may have. float64 is read as float32.
        topk_limit: largest K of TopK.
        k_tensor: K of TopK may be computed from shapes, or be an input.
        functions: whether local functions are known, and who wins where a plugin has the name of one.
        constant: the operators one of whose inputs must be an initializer, and the place of that input.
        loops: operators imported as a loop; an engine with a loop cannot be captured into a CUDA graph.
        ignored: attributes by operator that make no difference to what is computed, though they should.
        int64: int64 tensors are such, inside and as inputs and outputs; they are int32 otherwise.
        strong: networks can be strongly typed, so that what the graph quantizes is what runs so.
    """

    version: str
    opset: int
    operators: Mapping[str, frozenset[str]]
    types: frozenset[str]
    topk_limit: int
    k_tensor: bool
    functions: Literal["unknown", "function wins", "plugin wins"]
    constant: Mapping[str, int]
    loops: frozenset[str]
    ignored: Mapping[str, tuple[str, ...]]
    int64: bool
    strong: bool

    def takes(self, operator: str, element_type: str) -> bool:
        """Return whether the parser takes an operator on data of a type."""
        return element_type in self.operators.get(operator, frozenset())


_IGNORED = {"ScatterND": ("reduction",)}
_ONCE_IGNORED = {"ScatterElements": ("reduction",), "Shape": ("start", "end")}
_OLD_TYPES = frozenset({"float32", "float16", "float64", "int64", "int32", "int8", "uint8", "bool"})
_TYPES = _OLD_TYPES | {"bfloat16", "float8e4m3fn", "int4"}
_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
_CONSTANT = {**{f"Reduce{name}": 1 for name in _REDUCTIONS}, "CumSum": 1, "Slice": 3, "Squeeze": 1, "Unsqueeze": 1}
_SINCE_10_3 = {k: v for k, v in _CONSTANT.items() if k != "Slice"}
_SINCE_10_7 = {k: v for k, v in _SINCE_10_3.items() if k not in ("Squeeze", "Unsqueeze")}


def _operators(version: str) -> dict[str, frozenset[str]]:
    taken: dict[str, frozenset[str]] = {}
    for since, came in _NEW.items():
        if as_numbers(since) <= as_numbers(version):
            for letters, names in came.items():
                types = {t for letter in letters for t in KINDS[letter]}
                taken |= {name: taken.get(name, frozenset()) | types for name in names.split()}
    return taken


def as_numbers(version: str) -> tuple[int, int]:
    """Return major and minor of "10.3" or "10.3.0.26".

    Raises:
        InputError: `tensorrt-version` for anything else.
    """
    found = re.match(r"(\d+)\.(\d+)(\.|$)", version)
    if found is None:
        raise InputError(
            f"'{version}' is no version of TensorRT",
            code="tensorrt-version",
            expected="major and minor, as in 10.3",
        )
    return int(found[1]), int(found[2])


def _family(
    version: str,
    opset: int,
    functions: Literal["unknown", "function wins", "plugin wins"],
    constant: Mapping[str, int],
    loops: tuple[str, ...] = (),
) -> Family:
    number = as_numbers(version)
    modern = number >= (10, 0)
    return Family(
        version,
        opset,
        _operators(version),
        _TYPES if modern else _OLD_TYPES,
        topk_limit=3840,
        k_tensor=number >= (8, 6),
        functions=functions,
        constant=constant,
        loops=frozenset(loops),
        ignored=_IGNORED if modern else _IGNORED | _ONCE_IGNORED,
        int64=modern,
        strong=modern,
    )


# Opset 22 is what the document of 10.6 names, 23 what the Attention of 10.14 is from, 24 the document of 10.15.
# CumSum is a layer of its own from 10.8 on.
FAMILIES: dict[str, Family] = {
    family.version: family
    for family in (
        _family("8.5", 17, "unknown", _CONSTANT, ("CumSum",)),
        _family("8.6", 17, "unknown", _CONSTANT, ("CumSum",)),
        _family("10.0", 20, "function wins", _CONSTANT, ("CumSum",)),
        _family("10.3", 20, "function wins", _SINCE_10_3, ("CumSum",)),
        _family("10.7", 22, "plugin wins", _SINCE_10_7, ("CumSum",)),
        _family("10.9", 22, "plugin wins", _SINCE_10_7),
        _family("10.14", 23, "plugin wins", _SINCE_10_7),
        _family("11.1", 24, "plugin wins", _SINCE_10_7),
    )
}


def family_of(version: str) -> Family:
    """Return what is known of a version of TensorRT: "10.16.2" is judged by "10.14".

    Raises:
        InputError: `tensorrt-version` for a version older than all that are known, or for no version at all.
    """
    known = [family for family in FAMILIES.values() if as_numbers(family.version) <= as_numbers(version)]
    if not known:
        raise InputError(
            f"nothing is known of TensorRT {version}",
            code="tensorrt-version",
            expected=f"TensorRT {next(iter(FAMILIES))} or newer",
        )
    return known[-1]


def first_that(takes: Callable[[Family], bool]) -> str | None:
    """Return the oldest version of which something is true, None if it is true of none."""
    return next((family.version for family in FAMILIES.values() if takes(family)), None)
