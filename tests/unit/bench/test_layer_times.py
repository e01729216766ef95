from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from edgeprune.bench import bench_bundle
from edgeprune.bench.layers import NodeTime, node_times, part_of, summarise_layers
from edgeprune.bench.report import BAR, format_bar, layers_table
from edgeprune.errors import InputError
from tests.unit.bench.test_bench import make_bundle

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("patch_embed.proj", "embed"),
        ("rows", "embed"),
        ("blocks.0.norm1", "norm"),
        ("blocks.0.attn.q", "attention"),
        ("blocks.0.tokens_2", "attention"),
        ("blocks.2.select.topk_gather.topk", "selection"),
        ("blocks.2.select.q_cls", "selection"),
        ("kept_indices_0", "selection"),
        ("blocks.2.mlp.fc1", "mlp"),
        ("head.norm", "head"),
        ("head.logits", "head"),
        ("/blocks/blocks.0/attn/qkv/MatMul", "attention"),
        ("/blocks/blocks.0/norm1/LayerNormalization", "norm"),
        ("images.fp16", "embed"),
        ("blocks.0.k_heads.split", "attention"),
        ("something", "other"),
    ],
)
def test_parts_by_the_names_of_nodes(name: str, part: str) -> None:
    assert part_of(name) == part


@pytest.mark.parametrize(
    "path", sorted([*GOLDEN.glob("*-ort-cpu.txt"), *GOLDEN.glob("*-trt-fp16.txt")]), ids=lambda path: path.stem
)
def test_every_node_of_an_exported_graph_belongs_to_a_part(path: Path) -> None:
    lines = path.read_text().splitlines()
    names = [line.split()[1] for line, after in pairwise(lines) if after.startswith("    (")]
    assert names
    assert [name for name in names if part_of(name) == "other"] == []


def event(name: str, dur: int, op: str = "Gemm", cat: str = "Node") -> dict[str, Any]:
    return {"cat": cat, "name": f"{name}_kernel_time", "dur": dur, "args": {"op_name": op}}


def test_times_of_nodes_are_medians_without_the_warm_up() -> None:
    events = [event("blocks.0.mlp.fc1", us) for us in (9000, 9000, 1000, 2000, 3000)]
    events += [event("model_run", 5, cat="Session"), {"cat": "Node", "name": "x_fence_before", "dur": 3}]
    assert node_times(events, 2, 3) == [NodeTime("blocks.0.mlp.fc1", "Gemm", "mlp", 2.0)]


def test_a_graph_that_runs_several_times_counts_as_often() -> None:
    events = [event("blocks.0.mlp.fc1", 1000) for _ in range(2 * 3)]
    assert node_times(events, 0, 3)[0].ms == 2.0  # twice in each run
    assert node_times(events, 0, 3, per_run=2)[0].ms == 1.0


def test_parts_add_up_and_the_slowest_nodes_come_first() -> None:
    nodes = [NodeTime("a", "", "mlp", 3.0), NodeTime("b", "", "attention", 1.0), NodeTime("c", "", "mlp", 0.0)]
    layers = summarise_layers("dense", ["dense"], nodes, runs=5, wall_ms=4.5)
    assert [(part.part, part.ms, part.share, part.nodes) for part in layers.parts] == [
        ("attention", 1.0, 0.25, 1),
        ("mlp", 3.0, 0.75, 2),
    ]
    assert layers.nodes[0].name == "a"
    rows = layers_table([layers])
    assert [row["share (%)"] for row in rows] == ["25.0", "75.0"]


@pytest.mark.parametrize(
    ("share", "filled"), [(0.0, ""), (1.0, "█" * BAR), (0.5, "█" * (BAR // 2)), (0.01, "▎"), (2.0, "█" * BAR)]
)
def test_bars_are_as_long_as_the_share(share: float, filled: str) -> None:
    assert format_bar(share) == filled.ljust(BAR)


def test_layers_of_a_bundle_name_where_its_time_goes(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("torch")
    from edgeprune.export import ExportRequest, export_model

    request = ExportRequest(
        model="vit_digits",
        model_options={"depth": 3},
        random_weights=True,
        method="evit",
        densities=(1.0, 0.7),
        stages="1",
        target="ort-cpu",
        verify=False,
    )
    bundle = export_model(request, tmp_path / "bundle")
    layers = bench_bundle(bundle, rounds=2, quick=True, layers=True).layers
    assert [one.runner for one in layers] == ["dense", "pruned at 0.7", "random"]
    parts = {one.runner: {part.part for part in one.parts} for one in layers}
    assert {"embed", "attention", "mlp", "norm", "head"} <= parts["dense"]
    assert "selection" in parts["pruned at 0.7"]
    assert "selection" not in parts["dense"]
    assert all(part.ms >= 0 for one in layers for part in one.parts)
    assert str(tmp_path) not in str(layers)


def test_layers_of_a_provider_that_only_times_starts_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        bench_bundle(make_bundle(tmp_path / "bundle", target="ort-cuda-fp16"), layers=True)
    assert (caught.value.code, caught.value.exit_code) == ("bench-layers", 2)
