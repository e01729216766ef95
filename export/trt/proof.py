"""What a built engine really is: precision, fused attention, layers around the selection, read from its inspector.

TensorRT decides all of that itself, version by version and device by device, so it is looked at and not assumed. What
is not as it should be becomes a finding: a sentence with numbers.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from edgeprune.export.trt.inspector import UNKNOWN, Layer, read_layers
from edgeprune.runtime.engines import ProofInfo

LEAST_SHARE = {"int8": 0.5, "fp8": 0.5}  # of the matrix layers; quantized networks leave some of them alone
MOST = 0.9
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8", "fp8": "float8"}
SHOWN = 3  # names in a sentence

_ATTENTION_NODE = re.compile(r"blocks[._](\d+)[._]attn[._](logits|softmax|context)(?:_\d+)?(?=_myl|[^\w.]|$)")
_BLOCK = re.compile(r"blocks[._](\d+)[._]")
_CHOOSING = re.compile(r"topk|top_k|topkgather|topk_gather|gather_tokens|gathertokens|nonzero", re.IGNORECASE)
_SELECT = re.compile(r"(?<![A-Za-z])select[._]")
_TAKING = re.compile(r"gather|scatter|slice|shuffle", re.IGNORECASE)
_PLUGINS = re.compile(r"TopKGather|GatherTokens|ScatterTokens|topk_gather|gather_tokens|scatter_tokens")


def prove(inspector_json: str, *, precision: str, blocks: int, plugin: bool) -> ProofInfo:
    """Return what an engine is made of, with everything that is not as it should be.

    Counts are those of the first optimization profile; of the fused attentions the least of any profile counts.

    Args:
        inspector_json: `get_engine_information` as JSON, of an engine built with detailed verbosity where possible.
        precision: asked for: "fp32", "fp16", "bf16", "int8" or "fp8".
        blocks: attentions of the graph.
        plugin: the graph holds nodes of the edgeprune plugin.
    """
    try:
        layers = read_layers(inspector_json)
    except ValueError as error:
        return _unreadable(blocks, f"the engine inspector's answer cannot be read ({error}): nothing is proved")
    if not layers:
        return _unreadable(blocks, "the engine inspector lists no layers: build with detailed profiling verbosity")
    by_profile: dict[int, list[Layer]] = defaultdict(list)
    for layer in layers:
        by_profile[layer.profile].append(layer)
    profiles = [by_profile[number] for number in sorted(by_profile)]
    first = profiles[0]
    attentions = [_Attentions(part, blocks) for part in profiles]
    worst = min(attentions, key=lambda found: (found.fused, -found.hidden))
    selection = [layer for layer in first if _is_selection(layer)]
    reformats = _beside(first, selection)
    findings = [*_precision_findings(first, precision)]
    if precision != "fp32":  # TensorRT fuses no float32 attention
        where = "" if len(profiles) == 1 else f" in profile {sorted(by_profile)[attentions.index(worst)]}"
        findings += worst.findings(where)
    findings += _plugin_findings(first, plugin)
    if reformats:
        names = _names(layer.short for layer in reformats)
        findings.append(f"{_layers(len(reformats))} directly beside the selection only change layout or type: {names}")
    return ProofInfo(
        layers=len(first),
        precisions=dict(Counter(layer.dtype for layer in first).most_common()),
        attention_blocks=blocks,
        fused_attention=worst.fused,
        hidden_attention=worst.hidden,
        selection=[layer.name for layer in selection],
        reformats=len(reformats),
        findings=findings,
    )


def _unreadable(blocks: int, finding: str) -> ProofInfo:
    return ProofInfo(
        layers=0, precisions={}, attention_blocks=blocks, fused_attention=0, hidden_attention=blocks, findings=[finding]
    )


class _Attentions:
    """How the attentions of one profile run.

    Attributes:
        fused: as one kernel.
        hidden: inside a layer that the inspector does not open.
        split: block -> the layers it runs as instead.
    """

    def __init__(self, layers: Sequence[Layer], blocks: int) -> None:
        self.blocks = blocks
        fused_blocks: set[int] = set()
        unnamed = 0
        parts: dict[int, dict[str, list[Layer]]] = defaultdict(lambda: defaultdict(list))
        for layer in layers:
            if layer.is_opaque or layer.is_reformat or layer.is_idle:
                continue
            found = _ATTENTION_NODE.findall(layer.origin)
            here = {int(block) for block, _ in found}
            if layer.is_fused_attention:
                here = here or {int(block) for block in _BLOCK.findall(layer.origin)}
                fused_blocks |= here
                unnamed += not here
                continue
            for block, part in found:
                if layer not in parts[int(block)][part]:
                    parts[int(block)][part].append(layer)
        for block, by_part in parts.items():  # one layer does all three: fused, whatever its name
            if set.intersection(*({id(one) for one in by_part[part]} for part in ("logits", "softmax", "context"))):
                fused_blocks.add(block)
        self.split = {b: _in_order(layers, by_part) for b, by_part in sorted(parts.items()) if b not in fused_blocks}
        self.opaque = [layer for layer in layers if layer.is_opaque]
        inside = sum(len(re.findall(r"gem[mv]_mha|fmha", layer.words, re.IGNORECASE)) for layer in self.opaque)
        self.fused = min(len(fused_blocks) + unnamed + inside, blocks)
        if self.fused == blocks:
            self.split = {}  # what is left of their nodes lies beside fused kernels that tell no names
        rest = max(blocks - self.fused - len(self.split), 0)
        self.hidden = rest if self.opaque and not inside else 0
        self.untold = rest - self.hidden

    def findings(self, where: str) -> list[str]:
        """Return what to say; `where` names the profile."""
        said = []
        if self.split:
            patterns: dict[str, list[int]] = defaultdict(list)
            for block, layers in self.split.items():
                patterns[" + ".join(layer.kind or layer.short for layer in layers)].append(block)
            for pattern, found in patterns.items():
                example = _names(layer.short for layer in self.split[found[0]])
                some = f"block{'s' * (len(found) > 1)} {', '.join(map(str, found))}"
                said.append(
                    f"attention of {len(found)} of {self.blocks} blocks is not fused{where}: {some} "
                    f"run{'s' * (len(found) == 1)} as {pattern} ({example})"
                )
        if self.hidden:
            groups = _names(_span(layer) for layer in self.opaque)
            said.append(
                f"attention of {self.hidden} of {self.blocks} blocks cannot be seen{where}: the inspector does not "
                f"open {_layers(len(self.opaque))} that TensorRT compiled as a whole ({groups}); measure, or trace "
                "with nsys and look for kernels named mha"
            )
        if self.untold:
            said.append(
                f"no layer is named like the attention of {self.untold} of {self.blocks} blocks{where}: "
                "TensorRT did not fuse it, or merged it under another name"
            )
        return said


def _in_order(layers: Sequence[Layer], by_part: dict[str, list[Layer]]) -> list[Layer]:
    """Return the layers of an attention's parts as the engine runs them."""
    wanted = {id(one) for some in by_part.values() for one in some}
    return [layer for layer in layers if id(layer) in wanted]


def _span(layer: Layer) -> str:
    return f"{layer.group[0]} to {layer.group[1].lstrip('/')}" if layer.group else layer.short


def _precision_findings(layers: Sequence[Layer], precision: str) -> list[str]:
    """Return whether what was asked for is really there, judged by the layers it was asked for."""
    dtype = DTYPES.get(precision, precision)
    typed = [layer for layer in layers if layer.dtype != UNKNOWN]
    if not typed:
        return [
            f"the inspector tells the types of none of {len(layers)} layers: build with detailed profiling verbosity"
        ]
    matrices = [layer for layer in typed if layer.is_matrix]
    if not matrices:
        if any(layer.dtype == dtype or _reads(layer, dtype) for layer in typed):
            return []
        opaque = sum(layer.is_opaque for layer in layers)
        if opaque:
            return [f"whether {_layers(opaque)} that TensorRT compiled as a whole work in {dtype} cannot be seen"]
        others = ", ".join(f"{count} {name}" for name, count in Counter(one.dtype for one in typed).most_common())
        return [f"no layer works in {dtype}: {others}"]
    right = [layer for layer in matrices if layer.dtype == dtype or _reads(layer, dtype)]
    if len(right) >= LEAST_SHARE.get(precision, MOST) * len(matrices):
        return []
    wrong = [layer for layer in matrices if layer not in right]
    others = ", ".join(f"{count} in {name}" for name, count in Counter(one.dtype for one in wrong).most_common())
    return [
        f"{len(right)} of {len(matrices)} matrix layers work in {dtype}, the others do not: {others} "
        f"({_names(layer.short for layer in wrong)})"
    ]


def _reads(layer: Layer, dtype: str) -> bool:
    """Tell whether a layer's first input has a type; its output may be widened in the same kernel."""
    return bool(layer.inputs) and layer.inputs[0].dtype == dtype


def _is_selection(layer: Layer) -> bool:
    """Tell whether a layer chooses tokens or takes the chosen ones."""
    if layer.is_reformat or layer.is_opaque:
        return False
    if layer.is_plugin:
        return bool(_PLUGINS.search(f"{layer.name} {layer.words}"))
    choosing = any(_CHOOSING.search(text) for text in (layer.origin, layer.kind))
    return choosing or bool(_TAKING.search(layer.kind) and _SELECT.search(layer.origin))


def _beside(layers: Sequence[Layer], selection: Sequence[Layer]) -> list[Layer]:
    """Return the layers that only change a layout or type and feed the selection, or read what it made."""
    read = {tensor.name for layer in selection for tensor in layer.inputs}
    made = {tensor.name for layer in selection for tensor in layer.outputs}
    chosen = {layer.name for layer in selection}
    return [
        layer
        for layer in layers
        if layer.is_reformat
        and (
            any(tensor.name in read for tensor in layer.outputs)
            or any(tensor.name in made for tensor in layer.inputs)
            or (not layer.inputs and any(layer.name.endswith(f" to {name}") for name in chosen))
        )
    ]


def _plugin_findings(layers: Sequence[Layer], plugin: bool) -> list[str]:
    if not plugin or any(_is_selection(layer) and layer.is_plugin for layer in layers):
        return []
    if any(layer.kind == "" for layer in layers) and any(_PLUGINS.search(layer.name) for layer in layers):
        return []  # the inspector tells names alone
    return ["the graph selects with the edgeprune plugin, but no layer of the engine runs in it"]


def _layers(count: int) -> str:
    return f"{count} layer{'s' * (count != 1)}"


def _names(names: Iterable[str]) -> str:
    """Return some names, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more
