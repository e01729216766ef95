"""Where the time of engines goes: layers and their parts, and benches of engines on stand-ins of TensorRT and CUDA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from edgeprune.bench import bench_bundle
from edgeprune.bench.engine_layers import NOTE, engine_nodes, part_of_layer
from edgeprune.bench.layers import LayersResult, NodeTime
from edgeprune.export import ExportRequest, export_model
from edgeprune.export.trt.inspector import Layer, read_line
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.timing import LayerLog
from tests.helpers.engines import copy_bundle, own_engines, write_engines
from tests.helpers.fake_trt import VERSIONS, FakeTensorRT, install

MODEL: dict[str, Any] = {"model": "vit_digits", "model_options": {"depth": 3}, "random_weights": True}
FORMS: dict[str, dict[str, Any]] = {
    "static": {"method": "evit", "keep_rate": 0.7, "stages": "1"},
    "densities": {"method": "evit", "densities": (1.0, 0.7), "stages": "1"},
    "buckets": {"method": "sait", "method_options": {"mass": "0.8"}, "stages": "1,2", "buckets": "36,39"},
}
RUNNERS = {
    "static": ["dense", "pruned", "random"],
    "densities": ["dense", "pruned at 0.7", "random"],
    "buckets": ["dense", "pruned"],
}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("blocks.0.mlp.fc1", "mlp"),
        ("blocks.0.mlp.fc1 + blocks.0.mlp.fc1.add_bias + blocks.0.mlp.gelu", "mlp"),
        ("PWN(PWN(blocks.0.mlp.gelu.erf), blocks.0.mlp.gelu.mul)", "mlp"),
        ("Reformatting CopyNode for Input Tensor 0 to blocks.0.attn.proj", "reformat"),
        ("_gemm_mha_v2_blocks.0.attn.softmax", "attention"),
        ("blocks.0.attn.q + blocks.0.attn.k + blocks.0.norm1.fp16", "attention"),
        ("blocks.0.attn.add + blocks.0.norm2", "fused"),
        ("{ForeignNode[blocks.0.attn.q...blocks.0.attn.proj]}", "attention"),
        ("{ForeignNode[blocks.0.norm1...blocks.0.norm2]}", "fused"),
        ("{ForeignNode[blocks.0.attn.q...blocks.1.attn.proj]}", "fused"),
        ("{ForeignNode[patch_embed.flatten...head.logits]}", "fused"),
        ("{ForeignNode[head.norm...head.logits]}", "head"),
        ("(Unnamed Layer* 12) [Shuffle]", "other"),
        ("blocks.1.select.topk [profile 1]", "selection"),
        ("Layer(CaskGemmMatrixMultiply): blocks.0.mlp.fc2, Tactic: 0x1, a (Half[1,2]) -> b (Half[1,2])", "mlp"),
    ],
)
def test_parts_by_the_name_of_a_layer(name: str, part: str) -> None:
    assert part_of_layer(read_line(name)) == part


@pytest.mark.parametrize(
    ("kind", "metadata", "part"),
    [
        ("kgen", ("blocks.0.norm2", "blocks.0.attn.proj", "blocks.0.attn.add"), "attention"),
        ("kgen", ("blocks.0.norm2", "blocks.0.attn.add"), "fused"),
        ("kgen", ("const.a", "blocks.0.norm2"), "norm"),
        ("kgen", ("const.a",), "other"),
        ("Myelin", ("blocks.0.norm2", "blocks.0.attn.proj", "blocks.0.attn.add"), "fused"),
        ("Myelin", ("blocks.0.mlp.fc1", "blocks.0.mlp.fc2"), "mlp"),
        ("Reformat", ("blocks.0.mlp.fc1",), "reformat"),
    ],
)
def test_parts_by_the_nodes_that_the_inspector_tells(kind: str, metadata: tuple[str, ...], part: str) -> None:
    assert part_of_layer(Layer("__myl_Fc_1", kind, metadata=metadata)) == part


def information(*layers: tuple[str, str, str]) -> str:
    entries = [{"Name": n, "LayerType": k, "Metadata": f"[ONNX Layer: {node}]"} for n, k, node in layers]
    return json.dumps({"Layers": entries})


def test_times_are_medians_of_a_run_with_what_the_inspector_tells_of_each_layer() -> None:
    told = information(("__myl_A", "gemm", "blocks.0.mlp.fc1"), ("__myl_A [profile 1]", "kgen", "blocks.0.norm1"))
    logs = [LayerLog(told, 0), LayerLog(told, 1), LayerLog("no JSON", 0)]
    for ms in (1.0, 3.0, 2.0, 9.0):  # two calls of two runs each
        logs[0].add("__myl_A", ms)
    for ms in (1.0, 2.0, 2.0, 3.0, 2.0, 2.0, 2.0, 2.0):  # twice in each run
        logs[1].add("__myl_A [profile 1]", ms)
    for _ in range(2):  # in one run of two
        logs[2].add("head.logits", 4.0)
    assert engine_nodes(logs, 2, 2) == [
        NodeTime("__myl_A", "gemm", "mlp", 2.5),
        NodeTime("__myl_A", "kgen", "norm", 4.0),
        NodeTime("head.logits", "", "head", 2.0),
    ]


@pytest.fixture(params=VERSIONS)
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    return install(monkeypatch, request.param, lazy=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    found: dict[str, Bundle] = {}

    def export(form: str) -> Bundle:
        if form not in found:
            request = ExportRequest(**MODEL, **FORMS[form], target="trt-fp16", batch=(1, 2), verify=False)
            found[form] = export_model(request, tmp_path_factory.mktemp(form) / "bundle")
        return found[form]

    return export


def bench_layers(bundle: Bundle, **options: Any) -> dict[str, LayersResult]:
    result = bench_bundle(bundle, rounds=2, quick=True, layers=True, images=4, **options)
    return {one.runner: one for one in result.layers}


@pytest.mark.parametrize("form", FORMS)
def test_layers_of_every_form_of_bundle(
    fake: FakeTensorRT, exported: Callable[[str], Bundle], tmp_path: Path, form: str
) -> None:
    bundle = copy_bundle(exported(form), tmp_path / "bundle")
    write_engines(bundle, fake, own_engines(bundle, (1, 2)))
    layers = bench_layers(bundle)
    assert list(layers) == RUNNERS[form]
    parts = {name: {part.part: part for part in one.parts} for name, one in layers.items()}
    for name, one in layers.items():
        assert (one.source, one.note) == ("tensorrt profiler", NOTE)
        assert {"embed", "attention", "mlp", "norm", "head"} <= set(parts[name])
        assert "other" not in parts[name]
        assert one.wall_ms > 0
        assert sum(part.share or 0 for part in one.parts) == pytest.approx(1)
    assert "selection" not in parts["dense"]
    assert "selection" in parts[RUNNERS[form][1]]
    pruned = layers[RUNNERS[form][1]]
    if form == "buckets":
        assert "stem" in pruned.graphs and len(pruned.graphs) > 1
        stem = len(bundle_nodes(bundle, "stem"))
        assert sum(part.nodes for part in pruned.parts) > stem
    else:
        nodes = len(bundle_nodes(bundle, pruned.graphs[0]))
        assert sum(part.nodes for part in pruned.parts) == nodes
        assert sum(part.ms for part in pruned.parts) == pytest.approx(0.125 * nodes)


def bundle_nodes(bundle: Bundle, graph: str) -> list[Any]:
    onnx = pytest.importorskip("onnx")
    return list(onnx.load(bundle.graph_path(graph), load_external_data=False).graph.node)


def test_the_slowest_layer_comes_first(fake: FakeTensorRT, exported: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle = copy_bundle(exported("static"), tmp_path / "bundle")
    write_engines(bundle, fake, own_engines(bundle, (1, 2)))
    fake.layer_ms = {"blocks.0.mlp.fc1": 100.0}
    (layers,) = bench_layers(bundle, against=()).values()
    assert (layers.nodes[0].name, layers.nodes[0].ms) == ("blocks.0.mlp.fc1", 100.0)
    assert max(layers.parts, key=lambda part: part.share or 0).part == "mlp"
    assert fake.device.complaints == []


def test_every_profile_is_timed_by_itself(
    fake: FakeTensorRT, exported: Callable[[str], Bundle], tmp_path: Path
) -> None:
    bundle = copy_bundle(exported("static"), tmp_path / "bundle")
    write_engines(bundle, fake, own_engines(bundle, (1, 2)))
    layers = bench_layers(bundle, batch=2)["pruned"]  # in the second profile
    assert layers.nodes and not any("[profile" in node.name for node in layers.nodes)
    assert sum(part.nodes for part in layers.parts) == len(bundle_nodes(bundle, "model"))
