"""Reading what an engine became, from inspector answers in the forms of TensorRT 8.6, 10 and 11.

The answers are written for these tests after the forms in public issue threads; no engine was built for them.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from edgeprune.export.trt.inspector import read_layers, type_in
from edgeprune.export.trt.proof import prove
from edgeprune.runtime.engines import ProofInfo

BLOCKS = 4
HALF, FLOAT = "Half", "Float"
OLD = {"Half": "Row major linear FP16 format", "Float": "Row major linear FP32", "Int32": "Row major linear INT32"}


def layer(
    name: str,
    kind: str,
    nodes: tuple[str, ...] = (),
    *,
    reads: tuple[tuple[str, str], ...] = (("x", HALF),),
    makes: tuple[tuple[str, str], ...] = (("y", HALF),),
    **more: Any,
) -> dict[str, Any]:
    """Return a layer as TensorRT 10 tells it with detailed verbosity."""

    def tensors(pairs: tuple[tuple[str, str], ...]) -> list[dict[str, Any]]:
        return [{"Name": n, "Location": "Device", "Dimensions": [1, 8], "Format/Datatype": t} for n, t in pairs]

    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": tensors(reads),
        "Outputs": tensors(makes),
        **more,
        "StreamId": 0,
        "Metadata": "\x1f".join(f"[ONNX Layer: {node}]" for node in nodes),
    }


def gemm(block: int, part: str, dtype: str = HALF) -> dict[str, Any]:
    name = f"blocks_{block}_{part.replace('.', '_')}_myl0_{block}"
    tactic = "sm80_xmma_gemm_f16f16_f16f16_f16_tn_n_tilesize64x64x64"
    types = {"reads": (("a", dtype),), "makes": (("b", dtype),)}
    return layer(name, "gemm", (f"blocks.{block}.{part}",), TacticName=tactic, **types)


def fused(block: int, dtype: str = HALF) -> dict[str, Any]:
    nodes = tuple(f"blocks.{block}.attn.{part}" for part in ("logits", "softmax", "context", "merge"))
    return layer(
        f"_gemm_mha_v2_myl0_{10 + block}",
        "kgen",
        nodes,
        TacticName="_gemm_mha_v2_0x957a",
        reads=(("q", dtype),),
        makes=(("c", dtype),),
    )


def split(block: int) -> list[dict[str, Any]]:
    return [
        gemm(block, "attn.logits"),
        layer(f"__myl_MaxSubExpSumDiv_myl0_{block}", "kgen", (f"blocks.{block}.attn.softmax",)),
        gemm(block, "attn.context"),
    ]


def network(*attentions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the layers of blocks with these attentions."""
    layers = []
    for block, attention in enumerate(attentions):
        layers += [gemm(block, "attn.q"), *attention, gemm(block, "attn.proj"), gemm(block, "mlp.fc1")]
    return layers


def answer(layers: list[Any], **more: Any) -> str:
    return json.dumps({"Layers": layers, "Bindings": ["images", "logits"], **more})


def proof(layers: list[Any], *, precision: str = "fp16", plugin: bool = False) -> ProofInfo:
    return prove(answer(layers), precision=precision, blocks=BLOCKS, plugin=plugin)


def test_an_engine_that_is_as_it_should_be_has_no_findings() -> None:
    found = proof(network(*([fused(b)] for b in range(BLOCKS))))
    assert (found.layers, found.fused_attention, found.hidden_attention, found.reformats) == (16, BLOCKS, 0, 0)
    assert found.precisions == {"float16": 16}
    assert found.findings == []


def test_attention_that_is_not_fused_is_named_with_the_layers_it_runs_as() -> None:
    found = proof(network([fused(0)], split(1), [fused(2)], split(3)))
    assert found.fused_attention == 2
    (finding,) = found.findings
    assert finding.startswith("attention of 2 of 4 blocks is not fused: blocks 1, 3 run as gemm + kgen + gemm (")
    assert "__myl_MaxSubExpSumDiv_myl0_1" in finding


def test_one_layer_that_does_a_whole_attention_is_fused_whatever_its_name() -> None:
    nodes = tuple(f"blocks.1.attn.{part}" for part in ("logits", "softmax", "context"))
    odd = layer("__myl_MulFcMaxExpSumDivFc_myl0_1", "kgen", nodes)
    assert proof(network([fused(0)], [odd], [fused(2)], [fused(3)])).fused_attention == BLOCKS


def test_the_softmax_alone_does_not_make_an_attention_fused() -> None:
    assert proof(network(split(0), split(1), split(2), split(3))).fused_attention == 0


def test_fused_attention_is_found_without_metadata_and_with_the_kinds_of_other_versions() -> None:
    bare = [
        {k: v for k, v in fused(0).items() if k != "Metadata"},
        layer("__mye8037_gemm_mha_v2_myl1_4", "kgen"),
        layer("fused", "Attention"),
        layer("k", "kgen", TacticName="fmha_v2_flash_attention_fp16_64_128_S_64_sm87"),
    ]
    assert proof([gemm(0, "mlp.fc1"), *bare]).fused_attention == 4


def test_a_node_called_mha_is_no_fused_attention() -> None:
    named = layer("/encoder/mha/query/MatMul_myl0_16", "gemm", ("/encoder/mha/query/MatMul",))
    assert not read_layers(answer([named]))[0].is_fused_attention


def test_old_types_are_sentences() -> None:
    half = layer("a", "CaskGemmMatrixMultiply", reads=(("x", OLD[HALF]),), makes=(("y", OLD[HALF]),))
    found = proof([half, *network(*([fused(b)] for b in range(BLOCKS)))])
    assert found.precisions == {"float16": 17}
    assert found.findings == []


@pytest.mark.parametrize(
    ("words", "dtype"),
    [
        ("Row major linear FP16 format", "float16"),
        ("Two wide channel vectorized row major FP16 format", "float16"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
        ("Row major linear FP32", "float32"),
        ("BFloat16", "bfloat16"),
        ("Half", "float16"),
        ("FP8", "float8"),
        ("UInt8", "uint8"),
        ("Int64", "int64"),
        ("Bool", "bool"),
        ("N/A due to dynamic shapes", "unknown"),
    ],
)
def test_type_names(words: str, dtype: str) -> None:
    assert type_in(words) == dtype


@pytest.mark.parametrize("separator", ["", "\x1f", " "])
def test_metadata_names_the_nodes(separator: str) -> None:
    metadata = separator.join(["[ONNX Layer: blocks.0.attn.logits]", "[blocks.0.attn.softmax]"])
    (found,) = read_layers(answer([{"Name": "a", "Metadata": metadata}]))
    assert found.metadata == ("blocks.0.attn.logits", "blocks.0.attn.softmax")


def test_separate_keys_of_format_and_type_are_read() -> None:
    entry = {"Name": "a", "LayerType": "gemm", "Outputs": [{"Name": "y", "Format": "Linear", "Datatype": "BFloat16"}]}
    assert read_layers(answer([entry]))[0].dtype == "bfloat16"


def test_float32_everywhere_is_found() -> None:
    layers = [gemm(b, part, FLOAT) for b in range(BLOCKS) for part in ("attn.q", "mlp.fc1")]
    found = proof([*layers, *(fused(b, FLOAT) for b in range(BLOCKS))])
    (finding,) = found.findings
    assert finding.startswith("0 of 12 matrix layers work in float16, the others do not: 12 in float32 (blocks_0_")
    assert finding.endswith(" and 9 more)")


def test_float32_islands_and_widened_outputs_are_no_finding() -> None:
    norm = layer("__myl_CastMeanSubMulMeanAddSqrtDivMulCast", "kgen", ("blocks.0.norm1",), makes=(("n", FLOAT),))
    widened = layer("head_fc", "gemm", ("head.fc",), makes=(("logits", FLOAT),))
    found = proof([norm, widened, *network(*([fused(b)] for b in range(BLOCKS)))])
    assert found.precisions == {"float16": 16, "float32": 2}
    assert found.findings == []


def test_int8_may_leave_attention_alone() -> None:
    layers = network(*([fused(b)] for b in range(BLOCKS)))
    for entry in layers:
        if entry["LayerType"] == "gemm":
            entry["Inputs"][0]["Format/Datatype"] = "Int8"
    assert proof(layers, precision="int8").findings == []
    assert "0 of 16 matrix layers work in float8" in proof(layers, precision="fp8").findings[0]


def test_what_lies_beside_nameless_fused_kernels_is_no_finding() -> None:
    nameless = [layer(f"_gemm_mha_v2_myl0_{b}", "kgen") for b in range(BLOCKS)]
    around = [layer(f"blocks.{b}.attn.logits", "Shuffle") for b in range(BLOCKS)]
    assert proof([gemm(0, "mlp.fc1"), *nameless, *around]).findings == []


def test_nodes_that_prepare_an_attention_are_not_part_of_it() -> None:
    prepared = layer("blocks.0.attn.logits.scaled", "PointWise", ("blocks.0.attn.logits.scaled",))
    idle = layer("blocks.0.attn.context", "NoOp", ("blocks.0.attn.context",))
    (finding,) = proof([*network([fused(0)], [fused(1)], [fused(2)]), prepared, idle]).findings
    assert finding.startswith("no layer is named like the attention of 1 of 4 blocks")


def test_float32_attention_is_not_asked_to_be_fused() -> None:
    layers = [gemm(b, part, FLOAT) for b in range(BLOCKS) for part in ("attn.logits", "attn.softmax", "attn.context")]
    assert proof(layers, precision="fp32").findings == []


def test_a_network_compiled_as_a_whole_says_that_nothing_can_be_seen() -> None:
    name = "{ForeignNode[blocks.0.norm1.../head.fc]}"
    myelin = layer(name, "Myelin", reads=(("images", OLD[FLOAT]),), makes=(("logits", OLD[FLOAT]),), TacticValue="0x0")
    found = proof([myelin])
    assert (found.fused_attention, found.hidden_attention) == (0, BLOCKS)
    assert found.findings[0] == "whether 1 layer that TensorRT compiled as a whole work in float16 cannot be seen"
    assert found.findings[1].startswith(
        "attention of 4 of 4 blocks cannot be seen: the inspector does not open 1 layer"
    )
    assert "blocks.0.norm1 to head.fc" in found.findings[1]


def test_tactics_of_a_network_compiled_as_a_whole_tell_its_attention() -> None:
    tactics = "_gemm_mha_v2_0xab, sm80_xmma_gemm_f16f16, _gemm_mha_v2_0xab, _gemm_mha_v2_0xab, _gemm_mha_v2_0xab"
    myelin = layer("{ForeignNode[blocks.0.norm1.../head.fc]}", "Myelin", TacticName=tactics)
    found = proof([myelin])
    assert (found.fused_attention, found.hidden_attention, found.findings) == (BLOCKS, 0, [])


def test_selection_and_its_reformats_are_named() -> None:
    selection = [
        layer("Reformatting CopyNode for Input Tensor 1 to select.0.topk_gather", "Reformat", makes=(("r", HALF),)),
        layer(
            "select.0.topk_gather",
            "PluginV3",
            ("select.0.topk_gather",),
            reads=(("scores", FLOAT), ("r", HALF)),
            makes=(("kept", HALF), ("indices", "Int32"), ("count", "Int32")),
            PluginType="TopKGather",
        ),
        layer("__myl_Cast_myl1_0", "kgen", (), reads=(("kept", HALF),), makes=(("z", FLOAT),)),
        layer("Reformatting CopyNode for Output Tensor 0 to head", "Reformat", reads=(("logits", HALF),)),
    ]
    found = proof([*network(*([fused(b)] for b in range(BLOCKS))), *selection], plugin=True)
    assert found.selection == ["select.0.topk_gather"]
    assert found.reformats == 2
    (finding,) = found.findings
    assert finding.startswith("2 layers directly beside the selection only change layout or type: Reformatting")


def test_native_selection_is_named() -> None:
    selection = [
        layer("__myl_IsnSel_myl0_3", "kgen", ("select.0.topk_gather.missing",), makes=(("ranks", FLOAT),)),
        layer("select.0.topk_gather.topk", "TopK", ("select.0.topk_gather.topk",), makes=(("i", "Int32"),)),
        layer("blocks.1.select.moving", "Gather", ("blocks.1.select.moving",)),
        layer("head.cls", "Gather", ("head.cls",)),
    ]
    found = proof([*network(*([fused(b)] for b in range(BLOCKS))), *selection])
    assert found.selection == [entry["Name"] for entry in selection[:3]]


def test_a_plugin_that_is_asked_for_and_not_there_is_found() -> None:
    found = proof(network(*([fused(b)] for b in range(BLOCKS))), plugin=True)
    assert found.findings == ["the graph selects with the edgeprune plugin, but no layer of the engine runs in it"]


def test_names_alone_say_what_they_can() -> None:
    names = [
        "blocks.0.mlp.fc1 + blocks.0.mlp.fc1.add_bias",
        "Reformatting CopyNode for Input Tensor 1 to select.0.topk_gather",
        "select.0.topk_gather",
        *(f"_gemm_mha_v2_myl0_{i}" for i in range(3)),
    ]
    found = proof(names, plugin=True)
    assert (found.fused_attention, found.selection, found.reformats) == (3, ["select.0.topk_gather"], 1)
    assert found.precisions == {"unknown": 6}
    types, attention, reformats = found.findings
    assert types.startswith("the inspector tells the types of none of 6 layers")
    assert attention.startswith("no layer is named like the attention of 1 of 4 blocks")
    assert reformats.startswith("1 layer directly beside")


def test_lines_of_text_are_read() -> None:
    line = (
        "Layer(Myelin): {ForeignNode[blocks.0.norm1.../head.fc]}, Tactic: 0x0000000000000000, "
        "images (Float[1,3,224,224]), ids (Int32[1,40]) -> logits (Half[1,1000])"
    )
    (found,) = read_layers(answer([line]))
    assert (found.kind, found.dtype, found.is_opaque) == ("Myelin", "float16", True)
    assert [(t.name, t.dtype) for t in found.inputs] == [("images", "float32"), ("ids", "int32")]
    assert found.group == ("blocks.0.norm1", "/head.fc")


def test_profiles_are_counted_apart_and_the_worst_one_is_told() -> None:
    first = network(*([fused(b)] for b in range(BLOCKS)))
    second = network([fused(0)], [fused(1)], [fused(2)], split(3))
    for entry in second:
        entry["Name"] += " [profile 1]"
    found = proof([*first, *second])
    assert (found.layers, found.fused_attention) == (16, 3)
    assert found.findings[0].startswith("attention of 1 of 4 blocks is not fused in profile 1: block 3 runs as gemm")


@pytest.mark.parametrize("text", ["", "not JSON", "{}", '{"Layers": 3}'])
def test_an_answer_that_cannot_be_read_is_a_finding(text: str) -> None:
    found = prove(text, precision="fp16", blocks=BLOCKS, plugin=False)
    assert (found.layers, found.hidden_attention) == (0, BLOCKS)
    assert found.findings[0].startswith("the engine inspector's answer cannot be read")


def test_an_engine_without_layer_information_is_a_finding() -> None:
    assert "detailed profiling verbosity" in proof([]).findings[0]
