"""What TensorRT is asked, against stand-ins that have the names of 8.6.0 and of 11.4 and no others."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeprune.errors import BuildError, EdgepruneError, EnvironmentLackError
from edgeprune.export.trt.builder import build
from edgeprune.export.trt.job import Built, Job, JobProfile
from tests.helpers import fake_trt
from tests.helpers.bundles import tiny_model
from tests.helpers.fake_trt import FakeTensorRT
from tests.helpers.lowering import lowered, random_model, small
from tests.helpers.quantized import made_up
from tests.helpers.trt_bundles import with_plugin_node

OLD, NEW = fake_trt.VERSIONS


@pytest.fixture(params=fake_trt.VERSIONS)
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    return fake_trt.install(monkeypatch, request.param)


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    return fake_trt.install(monkeypatch, OLD)


@pytest.fixture
def new(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    return fake_trt.install(monkeypatch, NEW)


def half_model(batch: int | str = 1, *, slots: bool = False) -> onnx.ModelProto:
    """Return a typed graph: float32 in and out, a float16 attention of block 0 between; told its slots or not."""
    B = batch
    nodes = [
        helper.make_node("Cast", ["images"], ["half"], name="cast_in", to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["half", "w"], ["x"], name="blocks.0.attn.qk"),
        helper.make_node("Softmax", ["x"], ["p"], name="blocks.0.attn.softmax", axis=-1),
    ]
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, [B, 8, 8])]
    last = "p"
    if slots:
        inputs.append(helper.make_tensor_value_info("slots", TensorProto.INT64, [2]))
        nodes += [
            helper.make_node("Slice", ["slots", "zero", "one"], ["k"], name="k"),
            helper.make_node("TopK", ["p", "k"], ["best", "ids"], name="select.topk"),
            helper.make_node("ReduceMax", ["best"], ["most"], name="most", axes=[2], keepdims=1),
        ]
        last = "most"
    nodes.append(helper.make_node("Cast", [last], ["logits"], name="cast_out", to=TensorProto.FLOAT))
    width = 1 if slots else 8
    graph = helper.make_graph(
        nodes,
        "half",
        inputs,
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [B, 8, width])],
        [
            numpy_helper.from_array(np.eye(8, dtype=np.float16), "w"),
            numpy_helper.from_array(np.array([0], np.int64), "zero"),
            numpy_helper.from_array(np.array([1], np.int64), "one"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def job(folder: Path, model: onnx.ModelProto, **fields: Any) -> Job:
    path = folder / "graph.onnx"
    onnx.save(model, path)
    paths = {name: str(folder / name) for name in ("engine", "layers", "log")}
    defaults = {"profiles": [JobProfile(shapes={})], "precision": "fp32", "workspace": 1 << 28}
    return Job.model_validate({"graph": str(path), **paths, **defaults, **fields})


def run(wanted: Job) -> tuple[Built, str, list[tuple[str, float]]]:
    log, steps = io.StringIO(), list[tuple[str, float]]()
    built = build(wanted, log, lambda step, share: steps.append((step, share)))
    return built, log.getvalue(), steps


def asked(trt: FakeTensorRT) -> dict[str, Any]:
    (found,) = trt.called("build_serialized_network")
    return found


def fails(wanted: Job, code: str, kind: type[EdgepruneError] = BuildError) -> EdgepruneError:
    with pytest.raises(kind) as caught:
        run(wanted)
    assert caught.value.code == code
    assert caught.value.expected and caught.value.hint
    return caught.value


def test_engine_is_written_with_its_layers(trt: FakeTensorRT, tmp_path: Path) -> None:
    built, _, _ = run(job(tmp_path, tiny_model()))
    plan = (tmp_path / "engine").read_bytes()
    assert built.bytes == len(plan)
    assert fake_trt.read_plan(plan)["model"] == str(tmp_path / "graph.onnx")
    assert json.loads((tmp_path / "layers").read_text())["Layers"]
    assert built.scratch_bytes == 4096
    assert built.proof.layers == len(tiny_model().graph.node)
    assert built.warnings == []


def test_settings_every_version_gets(trt: FakeTensorRT, tmp_path: Path) -> None:
    run(job(tmp_path, tiny_model(), optimization_level=4))
    found = asked(trt)
    assert found["pools"] == {"WORKSPACE": 1 << 28}
    assert found["verbosity"] == "DETAILED"
    assert found["level"] == 4
    assert found["settings"]["max_aux_streams"] == "0"
    assert "TF32" not in found["flags"]


def test_network_of_8_is_of_explicit_batch_and_of_11_strongly_typed(
    old: FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(job(tmp_path, half_model(), precision="fp16"))
    flag = old.module.NetworkDefinitionCreationFlag  # type: ignore[attr-defined]
    assert old.called("create_network") == [1 << int(flag.EXPLICIT_BATCH)]
    assert asked(old)["flags"] == ["FP16", "OBEY_PRECISION_CONSTRAINTS"]
    new = fake_trt.install(monkeypatch, NEW)
    run(job(tmp_path, half_model(), precision="fp16"))
    flag = new.module.NetworkDefinitionCreationFlag  # type: ignore[attr-defined]
    assert new.called("create_network") == [1 << int(flag.STRONGLY_TYPED)]
    assert asked(new)["flags"] == []


def test_layers_of_8_are_constrained_to_the_types_of_the_graph(old: FakeTensorRT, tmp_path: Path) -> None:
    built, _, _ = run(job(tmp_path, half_model(), precision="fp16"))
    plan = fake_trt.read_plan((tmp_path / "engine").read_bytes())
    assert plan["precisions"] == {"blocks.0.attn.qk": "HALF", "blocks.0.attn.softmax": "HALF"}
    assert built.warnings == []


def test_layer_that_takes_no_type_is_told_of(
    old: FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(layer: Any, index: int, dtype: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr(old.module.ILayer, "set_output_type", refuse)  # type: ignore[attr-defined]
    built, _, _ = run(job(tmp_path, half_model(), precision="fp16"))
    (warning,) = built.warnings
    assert warning.endswith(
        "chooses the types of these layers itself: cast_in, blocks.0.attn.qk, blocks.0.attn.softmax and 1 more"
    )


def test_float32_is_not_constrained(old: FakeTensorRT, tmp_path: Path) -> None:
    run(job(tmp_path, tiny_model()))
    assert asked(old)["flags"] == []
    assert fake_trt.read_plan((tmp_path / "engine").read_bytes())["precisions"] == {}


def test_bfloat16_is_refused_where_there_is_no_such_engine(old: FakeTensorRT, tmp_path: Path) -> None:
    error = fails(job(tmp_path, tiny_model(), precision="bf16"), "tensorrt-version", EnvironmentLackError)
    assert "TensorRT 8.6.0 builds no bf16 engines" in error.message


def test_static_graph_has_no_profile(trt: FakeTensorRT, tmp_path: Path) -> None:
    run(job(tmp_path, tiny_model()))
    assert asked(trt)["profiles"] == [{"shapes": {}, "values": {}}]


def test_profiles_have_one_shape_each(trt: FakeTensorRT, tmp_path: Path) -> None:
    shapes = [[1, 3, 8, 8], [8, 3, 8, 8]]
    profiles = [JobProfile(shapes={"images": shape}) for shape in shapes]
    run(job(tmp_path, tiny_model((1, 8)), profiles=profiles))
    assert asked(trt)["profiles"] == [{"shapes": {"images": [shape] * 3}, "values": {}} for shape in shapes]


def test_slots_are_the_value_of_a_shape_input(trt: FakeTensorRT, tmp_path: Path) -> None:
    profiles = [JobProfile(shapes={}, slots=[k, k]) for k in (2, 5)]
    run(job(tmp_path, half_model(slots=True), profiles=profiles, precision="fp16"))
    assert asked(trt)["profiles"] == [{"shapes": {}, "values": {"slots": [[k, k]] * 3}} for k in (2, 5)]


def test_attentions_are_counted_by_name(trt: FakeTensorRT, tmp_path: Path) -> None:
    built, _, _ = run(job(tmp_path, half_model(), precision="fp16"))
    assert (built.proof.attention_blocks, built.proof.fused_attention) == (1, 1)


def test_builtin_tactics_leave_out_libraries(trt: FakeTensorRT, tmp_path: Path) -> None:
    run(job(tmp_path, tiny_model(), tactics="builtin"))
    sources = trt.module.TacticSource  # type: ignore[attr-defined]
    wanted = (sources.EDGE_MASK_CONVOLUTIONS, sources.JIT_CONVOLUTIONS)
    assert asked(trt)["tactic_sources"] == sum(1 << int(source) for source in wanted)


def test_progress_is_told_where_there_is_any(new: FakeTensorRT, tmp_path: Path) -> None:
    _, _, steps = run(job(tmp_path, tiny_model()))
    assert [step for step, _ in steps][:2] == ["Building Engine", "Timing Runner"]
    shares = [share for _, share in steps]
    assert shares[0] == 0
    assert 0.5 in shares
    assert shares[-1] == 1


def test_no_progress_where_there_is_none(old: FakeTensorRT, tmp_path: Path) -> None:
    assert run(job(tmp_path, tiny_model()))[2] == []


def test_plugin_is_in_the_registry_before_parsing(trt: FakeTensorRT, tmp_path: Path) -> None:
    built, log, _ = run(job(tmp_path, with_plugin_node(tiny_model(kept=False)), plugin=True))
    assert "edgeprune: TopKGather, GatherTokens, ScatterTokens" in log
    assert built.proof.selection == ["select.gather_tokens"]


def test_missing_plugin_is_told(trt: FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt.registry.held.clear()
    monkeypatch.setenv("EDGEPRUNE_PLUGIN_PATH", str(tmp_path / "nowhere"))
    error = fails(
        job(tmp_path, with_plugin_node(tiny_model(kept=False)), plugin=True), "plugin-missing", EnvironmentLackError
    )
    assert "edgeprune plugins build" in str(error.hint)


def test_device_is_asked_for_before_tensorrt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trt = fake_trt.install(monkeypatch, OLD, count=0)
    fails(job(tmp_path, tiny_model()), "gpu-missing", EnvironmentLackError)
    assert trt.calls == []


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (OLD, "node number 2, UNSUPPORTED_NODE: no"),
        (NEW, "node 'blocks.0.attn.softmax' (Softmax), UNSUPPORTED_NODE: no"),
    ],
)
def test_parser_error_names_the_node(version: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = fake_trt.install(monkeypatch, version)
    trt.faults.parse, trt.faults.reason = "blocks.0.attn.softmax", "no"
    error = fails(job(tmp_path, half_model(), precision="fp16"), "parse")
    assert words in error.message
    assert error.details["errors"][0]["code"] == "UNSUPPORTED_NODE"


def test_parser_error_without_a_node(trt: FakeTensorRT, tmp_path: Path) -> None:
    wanted = job(tmp_path, tiny_model())
    Path(wanted.graph).write_bytes(b"no graph")
    assert "the graph, INVALID_GRAPH: Failed to parse" in fails(wanted, "parse").message


def test_empty_network_is_refused(trt: FakeTensorRT, tmp_path: Path) -> None:
    model = tiny_model(kept=False)
    del model.graph.node[:]
    assert "read no layer" in fails(job(tmp_path, model), "parse").message


def test_refused_build_tells_why(trt: FakeTensorRT, tmp_path: Path) -> None:
    trt.faults.build, trt.faults.reason = True, "Could not find any implementation for node select"
    error = fails(job(tmp_path, tiny_model()), "engine-build")
    assert "Could not find any implementation for node select" in error.message
    assert error.details["reasons"] == ["Could not find any implementation for node select"]
    assert "--selection native" in str(error.hint)


def test_refused_build_for_want_of_memory_has_its_own_hint(trt: FakeTensorRT, tmp_path: Path) -> None:
    trt.faults.build, trt.faults.reason = True, "Requested amount of GPU memory: OutOfMemory"
    assert "--workspace" in str(fails(job(tmp_path, tiny_model()), "engine-build").hint)


def test_plan_that_cannot_be_loaded_is_refused(trt: FakeTensorRT, tmp_path: Path) -> None:
    trt.faults.deserialize = True
    assert (
        "it cannot load the engine it made: a planted fault"
        in fails(job(tmp_path, tiny_model()), "engine-build").message
    )


def test_log_holds_what_tensorrt_says(trt: FakeTensorRT, tmp_path: Path) -> None:
    trt.faults.build = True
    log = io.StringIO()
    with pytest.raises(BuildError):
        build(job(tmp_path, tiny_model()), log, lambda step, share: None)
    assert "[ERROR] a planted fault" in log.getvalue()


# timing cache


def test_timings_are_saved_and_taken_again(trt: FakeTensorRT, tmp_path: Path) -> None:
    path = tmp_path / "timing" / "device.cache"
    first = job(tmp_path, tiny_model(), timing_cache=str(path))
    run(first)
    one = json.loads(path.read_bytes())["entries"]
    run(job(tmp_path, tiny_model(kept=False), timing_cache=str(path)))
    both = json.loads(path.read_bytes())["entries"]
    assert one.items() < both.items()
    assert len(both) == 2
    assert [entry.name for entry in path.parent.iterdir() if not entry.name.endswith(".lock")] == [path.name]


def test_timings_saved_meanwhile_stay(trt: FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "device.cache"
    run(job(tmp_path, tiny_model(), timing_cache=str(path)))
    held = json.loads(path.read_bytes())
    held["entries"] = {"of another build": []}
    builder = trt.module.Builder  # type: ignore[attr-defined]
    build_plan = builder.build_serialized_network

    def build_beside(self: Any, network: Any, config: Any) -> Any:
        path.write_text(json.dumps(held))
        return build_plan(self, network, config)

    monkeypatch.setattr(builder, "build_serialized_network", build_beside)
    run(job(tmp_path, tiny_model(kept=False), timing_cache=str(path)))
    assert "of another build" in json.loads(path.read_bytes())["entries"]


@pytest.mark.parametrize("content", [b"rubbish", b'{"stamp": "8.6.0 on another GPU", "entries": {}}'])
def test_timings_of_others_are_replaced_with_a_warning(trt: FakeTensorRT, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "device.cache"
    path.write_bytes(content)
    built, _, _ = run(job(tmp_path, tiny_model(), timing_cache=str(path)))
    (warning,) = built.warnings
    assert f"'{path}' is not one of this TensorRT and device" in warning
    assert len(json.loads(path.read_bytes())["entries"]) == 1


def test_timings_that_cannot_be_written_are_a_warning(trt: FakeTensorRT, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    built, _, _ = run(job(tmp_path, tiny_model(), timing_cache=str(tmp_path / "file" / "device.cache")))
    assert "cannot be" in built.warnings[-1]


def test_no_timing_file_is_read_or_written(trt: FakeTensorRT, tmp_path: Path) -> None:
    run(job(tmp_path, tiny_model()))
    assert asked(trt)["timing_cache"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["engine", "graph.onnx", "layers"]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_quantized_engine_takes_no_flag_and_no_version_without_strong_typing(
    old: FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    error = fails(job(tmp_path, half_model(), precision=precision), "tensorrt-version", EnvironmentLackError)
    assert "TensorRT 10 or newer" in str(error.expected)
    new = fake_trt.install(monkeypatch, NEW)
    run(job(tmp_path, half_model(), precision=precision))
    assert asked(new)["flags"] == []


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_emitted_quantized_graph_is_parsed_and_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any
) -> None:
    new = fake_trt.install(monkeypatch, NEW)
    config = small(depth=3)
    graph = lowered(random_model(config), tmp_path, target=f"trt-{precision}", quantization=made_up(config, precision))
    paths = {name: str(tmp_path / name) for name in ("engine", "layers", "log")}
    run(Job(graph=str(graph.path), profiles=[JobProfile(shapes={})], precision=precision, workspace=1 << 28, **paths))
    assert asked(new)["flags"] == []
    assert fake_trt.read_plan((tmp_path / "engine").read_bytes())["model"] == str(graph.path)
