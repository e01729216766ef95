from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from edgeprune.errors import InternalError
from edgeprune.export.emit.weights import weight_arrays
from edgeprune.export.graphs import random_stages
from edgeprune.export.pipeline import PLAN_PASSES, lower
from edgeprune.export.plan import build_plan
from edgeprune.export.targets.registry import TARGETS
from edgeprune.export.writer import ALIGNMENT, INLINE_BYTES, WeightStore
from edgeprune.pruning.model import PrunedViT
from tests.helpers.lowering import lowered, noise, random_model, run_onnx, small, stages_of


def read(path: Path, tensor: onnx.TensorProto) -> np.ndarray:
    """Return the values a tensor refers to."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    where = {e.key: e.value for e in tensor.external_data}
    data = (path.parent / where["location"]).read_bytes()
    raw = data[int(where["offset"]) : int(where["offset"]) + int(where["length"])]
    return np.frombuffer(raw, np.float32 if tensor.data_type == 1 else np.int64).reshape(tuple(tensor.dims))


def external(model: onnx.ModelProto) -> dict[str, dict[str, str]]:
    """Return name -> location, offset, length of the tensors outside the graph."""
    return {
        t.name: {e.key: e.value for e in t.external_data}
        for t in model.graph.initializer
        if t.data_location == onnx.TensorProto.EXTERNAL
    }


# ------------------------------------------------------------------------------------------------ the store


def test_equal_names_are_stored_once(tmp_path: Path) -> None:
    with WeightStore(tmp_path / "w.data") as store:
        values = np.arange(600, dtype=np.float32)
        first, second = store.put("a", values), store.put("a", values)
    assert first == second
    assert (tmp_path / "w.data").stat().st_size == values.nbytes


def test_equal_names_of_other_shapes_are_a_defect(tmp_path: Path) -> None:
    with WeightStore(tmp_path / "w.data") as store:
        store.put("a", np.zeros(4, np.float32))
        with pytest.raises(InternalError) as caught:
            store.put("a", np.zeros((2, 2), np.float32))
    assert caught.value.code == "weight-name"


def test_tensors_begin_at_page_boundaries(tmp_path: Path) -> None:
    with WeightStore(tmp_path / "w.data") as store:
        tensors = [store.put(str(n), np.full(n, n, np.float32)) for n in (3, 1024, 1500)]
    offsets = [int(e.value) for t in tensors for e in t.external_data if e.key == "offset"]
    assert offsets == [0, ALIGNMENT, 2 * ALIGNMENT]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.int32])
def test_stored_bytes_are_the_values(tmp_path: Path, dtype: type) -> None:
    values = np.random.default_rng(0).integers(-9, 9, (7, 5)).astype(dtype)
    with WeightStore(tmp_path / "w.data") as store:
        tensor = store.put("turned", values.T)  # a view whose memory is not in order
    onnx.external_data_helper.load_external_data_for_tensor(tensor, str(tmp_path))
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), values.T)


# ------------------------------------------------------------------------------------------------ graphs


def test_large_tensors_leave_the_graph_and_small_ones_stay(tmp_path: Path) -> None:
    graph = lowered(random_model(small()), tmp_path)
    sizes = {t.name: int(np.prod(t.dims)) * 4 for t in graph.model.graph.initializer if t.data_type == 1}
    outside = external(graph.model)
    assert outside and set(outside) == {name for name, size in sizes.items() if size >= INLINE_BYTES}
    assert {w["location"] for w in outside.values()} == {"model.onnx.data"}
    assert all(int(w["offset"]) % ALIGNMENT == 0 for w in outside.values())


def test_written_file_is_what_was_returned(tmp_path: Path) -> None:
    graph = lowered(random_model(small()), tmp_path)
    assert onnx.load(str(graph.path), load_external_data=False) == graph.model


@pytest.mark.parametrize("target", ["onnx", "ort-cpu"])
def test_weights_in_the_file_are_those_of_the_model(tmp_path: Path, target: str) -> None:
    config = small()
    model = random_model(config, stages_of(config, "dynamicvit", 0.5, "2"))
    graph = lowered(model, tmp_path, target=target, passes=())
    state = weight_arrays(model)
    found: dict[str, np.ndarray] = {}
    for tensor in graph.model.graph.initializer:
        name = tensor.name
        if name.startswith(("blocks.", "head.", "norm.", "prune.")) and ".qkv." not in name:
            values = read(graph.path, tensor)
            found[name.removesuffix(".T")] = values.T if name.endswith(".T") else values
    whole = {n for n in found if n in state}
    assert {"blocks.0.mlp.fc1.weight", "blocks.3.attn.proj.bias", "norm.weight", "head.weight"} <= whole
    assert "prune.0.out_conv.2.weight" in whole
    for name in whole:
        np.testing.assert_array_equal(found[name], state[name], err_msg=name)
    qkv = {t.name: read(graph.path, t) for t in graph.model.graph.initializer if "blocks.1.attn.qkv." in t.name}
    for i, part in enumerate("qkv"):
        weight = next(v for n, v in qkv.items() if f".qkv.{part}.weight" in n)
        weight = weight.T if f"blocks.1.attn.qkv.{part}.weight.T" in qkv else weight
        np.testing.assert_array_equal(weight, state["blocks.1.attn.qkv.weight"][32 * i : 32 * (i + 1)])


@pytest.mark.parametrize("target", ["onnx", "ort-cpu"])
@pytest.mark.parametrize("method", ["dynamicvit", "evit"])
def test_graphs_of_a_bundle_share_their_weights(tmp_path: Path, method: str, target: str) -> None:
    config = small(image_size=(64, 64))
    stages = stages_of(config, method, 0.7, "1,2")
    model = random_model(config, stages)
    arrays = weight_arrays(model)
    written = {}
    with WeightStore(tmp_path / "model.onnx.data") as store:
        for name, some in (("model", stages), ("dense", ()), ("random", random_stages(stages))):
            plan = build_plan(config, some)
            for plan_pass in PLAN_PASSES:
                plan = plan_pass(plan)
            (written[name],) = lower(
                plan, arrays, TARGETS[target], [tmp_path / f"{name}.onnx"], store, opset=17
            ).values()
    places = {name: external(proto) for name, proto in written.items()}
    assert set(places["dense"]) <= set(places["model"])
    for name, where in places["dense"].items():
        assert where == places["model"][name]
    parameters = sum(p.numel() for p in model.parameters()) * 4
    pages = len({w["offset"] for graph in places.values() for w in graph.values()}) * ALIGNMENT
    # what is computed from weights (folded or scaled ones of a block) may come on top
    assert (tmp_path / "model.onnx.data").stat().st_size <= parameters * 1.1 + pages
    images = {"images": noise(config)}
    with torch.inference_mode():
        dense = PrunedViT(config)
        dense.load_state_dict(model.state_dict(), strict=False)
        expected = dense.eval()(torch.from_numpy(images["images"])).numpy()
    np.testing.assert_allclose(run_onnx(tmp_path / "dense.onnx", images)["logits"], expected, rtol=0, atol=1e-5)


MEASURE = """
import resource, sys, tempfile
from pathlib import Path
import torch
from edgeprune.export.emit.weights import weight_arrays
from edgeprune.export.pipeline import PLAN_PASSES, lower
from edgeprune.export.plan import build_plan
from edgeprune.export.targets.registry import TARGETS
from edgeprune.export.writer import WeightStore
from edgeprune.models.registry import get_model_config
from edgeprune.pruning.model import PrunedViT
from tests.helpers.lowering import random_model, lowered, small, stages_of

torch.set_num_threads(1)
target, folder = sys.argv[1], Path(sys.argv[2])
lowered(random_model(small()), folder / "warm", target=target)  # imports and caches are not the export's
config = get_model_config("vit_base_patch16_224")
stages = stages_of(config, "evit", 0.7)
with torch.device("meta"):
    model = PrunedViT(config, stages)
model = model.to_empty(device="cpu").eval()  # pages nobody has written: a copy of them would be resident, they are not
arrays = weight_arrays(model)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with WeightStore(folder / "model.onnx.data") as store:
    for name, some in (("model", stages), ("dense", ())):
        plan = build_plan(config, some)
        for plan_pass in PLAN_PASSES:
            plan = plan_pass(plan)
        lower(plan, arrays, TARGETS[target], [folder / f"{name}.onnx"], store, opset=17)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(grown / sum(a.nbytes for a in arrays.values()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "ort-cpu"])
def test_weights_are_not_copied_in_memory(tmp_path: Path, target: str) -> None:
    """A ViT-B of 330 MiB; the share of a second copy that lowering needed at its worst moment."""
    pytest.importorskip("resource", reason="peak memory is read through the resource module of Unix")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, target, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.onnx.data").stat().st_size > 300e6
    assert float(done.stdout) < 0.2
