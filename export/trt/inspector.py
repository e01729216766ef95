"""What TensorRT's engine inspector says, in one form for all its versions.

The inspector answers with JSON whose layers are names alone (verbosity "layer names only"), lines of text, or objects
(verbosity "detailed"). Types are words in a sentence in TensorRT 8 ("Row major linear FP16 format") and names in later
versions ("Half"). Layers of further optimization profiles come behind those of the first, marked "[profile 1]".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

UNKNOWN = "unknown"
# Words of a type, in the order they are looked for: "BFloat16" holds "Float", "UInt8" holds "Int8".
_TYPES = (
    ("bfloat16", r"bfloat16|bf16"),
    ("float16", r"half|fp16|float16"),
    ("float8", r"fp8|float8|e4m3|e5m2"),
    ("float4", r"fp4|float4|e2m1"),
    ("float32", r"float32|fp32|float|tf32"),
    ("uint8", r"uint8"),
    ("int4", r"int4"),
    ("int8", r"int8"),
    ("int64", r"int64"),
    ("int32", r"int32"),
    ("bool", r"bool"),
)
_TYPE = re.compile("|".join(f"(?P<{name}>{words})" for name, words in _TYPES), re.IGNORECASE)
_ONNX_LAYER = re.compile(r"\[(?:ONNX Layer: )?([^\]]+)\]")
_PROFILE = re.compile(r"\s*\[profile (\d+)\]")
_LINE_KIND = re.compile(r"^Layer\((?P<kind>[^)]*)\): (?P<rest>.*)$", re.DOTALL)
_LINE_TENSOR = re.compile(r"([^\s,(\[]+) \(([A-Za-z0-9]+)\[[^\]]*\]\)")
_GROUP = re.compile(r"ForeignNode\[(?P<first>.*?)\.\.\.(?P<last>.*?)\]")
_FUSED = re.compile(
    r"(?<![a-z])f?mha(?![a-z])|gem[mv]_f?mha|fused_?(?:multi_?head|mha|att)|flash_?att|multi_?head_?att|sdpa",
    re.IGNORECASE,
)
_ATTENTION = re.compile(r"(?<!pre)attention", re.IGNORECASE)
_MATRIX = re.compile(r"gemm|gemv|mat_?mul|matrix|conv|fully_?connected|(?<![a-z])fc(?![a-z])", re.IGNORECASE)
_CODE = re.compile(r"__myl_(?P<words>[A-Z][A-Za-z]*)")
_MOVES = {"cas", "cast", "mov", "move", "res", "resh", "tra", "tran"}  # words of generated kernels that compute nothing


@dataclass(frozen=True)
class Tensor:
    """An input or output of a layer; `dtype` is "float16" or the like, "unknown" when nothing tells."""

    name: str
    dtype: str


@dataclass(frozen=True)
class Layer:
    """One layer of an engine.

    Attributes:
        name: TensorRT's.
        kind: its LayerType, empty when not told.
        profile: the optimization profile it belongs to.
        tactic: name of the kernel or whatever else is told of it.
        metadata: ONNX nodes it was made of; empty when not told.
        words: everything else that is told of it.
    """

    name: str
    kind: str = ""
    profile: int = 0
    tactic: str = ""
    metadata: tuple[str, ...] = ()
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    words: str = field(default="", compare=False, repr=False)

    @cached_property
    def origin(self) -> str:
        """The ONNX nodes it was made of, as far as metadata or name tell."""
        return "\n".join(self.metadata) or ("" if self.is_reformat else self.name)

    @property
    def dtype(self) -> str:
        """The type of its first output."""
        return self.outputs[0].dtype if self.outputs else UNKNOWN

    @property
    def is_opaque(self) -> bool:
        """Many nodes compiled into one layer that the inspector does not open."""
        return self.kind.lower() == "myelin" or "ForeignNode[" in self.name

    @property
    def is_fused_attention(self) -> bool:
        """Its name, kernel or kind is that of a fused attention; ONNX names do not count."""
        generated = not (self.is_opaque or self.is_reformat or "/" in self.name or re.search(r"blocks[._]", self.name))
        own = self.name if generated else ""
        return any(_FUSED.search(text) for text in (own, self.kind, self.tactic)) or any(
            _ATTENTION.search(text) for text in (self.kind, self.tactic)
        )

    @property
    def is_reformat(self) -> bool:
        """It changes a layout or type and computes nothing."""
        if self.kind.lower() in ("reformat", "cast", "reformatter") or self.name.startswith("Reformatting CopyNode"):
            return True
        code = _CODE.match(self.name)
        words = re.findall("[A-Z][a-z]*", code["words"]) if code else []
        return bool(words) and {word.lower() for word in words} <= _MOVES and any(w.startswith("Cas") for w in words)

    @property
    def is_idle(self) -> bool:
        """It runs no kernel."""
        return self.kind.lower() in ("noop", "wait", "signal")

    @property
    def is_matrix(self) -> bool:
        """Matrix products, convolutions and fused attention: what a low precision is asked for."""
        if self.is_reformat or self.is_opaque:
            return False
        return self.is_fused_attention or any(_MATRIX.search(text) for text in (self.kind, self.tactic))

    @property
    def is_plugin(self) -> bool:
        """It runs in a plugin."""
        return self.kind.lower().startswith("plugin")

    @property
    def group(self) -> tuple[str, str] | None:
        """First and last node of those compiled into one layer, as its name tells."""
        match = _GROUP.search(self.name)
        return (match["first"], match["last"]) if match else None

    @property
    def short(self) -> str:
        """Its name, cut to what a sentence can hold."""
        return self.name if len(self.name) <= 80 else f"{self.name[:77]}..."


def read_layers(text: str) -> list[Layer]:
    """Return the layers of `get_engine_information(JSON)`.

    Raises:
        ValueError: the text is not JSON, or holds no list of layers.
    """
    document = json.loads(text, strict=False)  # names may hold control characters
    layers = document.get("Layers", document.get("layers")) if isinstance(document, dict) else document
    if not isinstance(layers, list):
        raise ValueError("there is no list of layers")
    return [_from_object(entry) if isinstance(entry, dict) else read_line(str(entry)) for entry in layers]


def type_in(text: str) -> str:
    """Return the type a text names: "Row major linear FP16 format" gives "float16"."""
    match = _TYPE.search(text)
    return match.lastgroup or UNKNOWN if match else UNKNOWN


def _from_object(entry: dict[str, Any]) -> Layer:
    name = str(entry.get("Name", entry.get("name", "")))
    metadata = str(entry.get("Metadata", ""))
    tactic = " ".join(str(v) for k, v in entry.items() if "tactic" in k.lower() and isinstance(v, str))
    known = ("Name", "name", "Metadata")
    return Layer(
        name=_PROFILE.sub("", name),
        kind=str(entry.get("LayerType", "")),
        profile=_profile(name),
        tactic=tactic,
        metadata=tuple(_ONNX_LAYER.findall(metadata)),
        inputs=tuple(_tensors(entry.get("Inputs"))),
        outputs=tuple(_tensors(entry.get("Outputs"))),
        words=" ".join(str(value) for key, value in entry.items() if key not in known),
    )


def _tensors(entries: Any) -> Iterator[Tensor]:
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict):
            words = [str(value) for key, value in entry.items() if "datatype" in key.lower() or key == "Format"]
            types = [found for found in map(type_in, words) if found != UNKNOWN]
            yield Tensor(str(entry.get("Name", "")), types[0] if types else UNKNOWN)


def read_line(line: str) -> Layer:
    """Return a layer of a line: a name, or "Layer(kind): name, Tactic: x, a (Half[1,3]) -> b (Half[1,3])"."""
    name, kind, tactic = line, "", ""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    match = _LINE_KIND.match(line)
    if match:
        kind = match["kind"]
        name, _, rest = match["rest"].partition(", Tactic: ")
        before, _, after = rest.rpartition(" -> ")
        tactic = before.partition(", ")[0]
        inputs = [Tensor(n, type_in(t)) for n, t in _LINE_TENSOR.findall(before)]
        outputs = [Tensor(n, type_in(t)) for n, t in _LINE_TENSOR.findall(after)]
    profile = _profile(name)
    return Layer(_PROFILE.sub("", name), kind, profile, tactic, inputs=tuple(inputs), outputs=tuple(outputs))


def _profile(name: str) -> int:
    match = _PROFILE.search(name)
    return int(match[1]) if match else 0
