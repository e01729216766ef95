"""Sessions on engines, end to end on the stand-ins: the numbers of ONNX Runtime, and how they are come by."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprune import Session
from edgeprune.errors import EdgepruneError, EdgepruneWarning
from edgeprune.export import ExportRequest, export_model
from edgeprune.export.emulate import open_emulated
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.engine_backend import EngineBackend
from edgeprune.runtime.engine_rows import EngineRows, join_rows
from edgeprune.runtime.engines import INDEX_NAME
from edgeprune.runtime.router import COUNT, IMAGES, SLOTS
from edgeprune.runtime.session import Result
from edgeprune.runtime.trt import Engines
from tests.helpers.bundles import write_tiny
from tests.helpers.engines import EngineSpec, copy_bundle, own_engines, write_engines
from tests.helpers.fake_cuda import LAYOUTS
from tests.helpers.fake_trt import VERSIONS, FakeTensorRT, install, other_process
from tests.helpers.tensorrt import empty_machine

ROOT = Path(__file__).resolve().parents[3]
BATCH = 4
SLOT_ROWS = ((36, 36), (39, 39), (64, 64))
MODEL: dict[str, Any] = {"model": "vit_digits", "model_options": {"depth": 3}, "random_weights": True, "seed": 4}
ADAPTIVE = {**MODEL, "method": "sait", "method_options": {"mass": "0.8"}, "stages": "1,2", "buckets": "36,39"}


@pytest.fixture(params=VERSIONS)
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorRT]:
    """A device that runs as late as it may; afterwards nothing was done that should not be."""
    made = install(monkeypatch, request.param, lazy=True)
    yield made
    assert made.device.complaints == []
    assert made.device.left_pushed() == 0
    assert not [name for name, _ in made.device.events if name == "synchronize"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    requests: dict[str, dict[str, Any]] = {
        "buckets": {**ADAPTIVE, "target": "trt-fp32"},
        "buckets-fp16": {**ADAPTIVE, "target": "trt-fp16"},
        "buckets-bf16": {**ADAPTIVE, "target": "trt-bf16"},
        "densities": {**MODEL, "method": "evit", "densities": (1.0, 0.7), "stages": "1", "target": "trt-fp32"},
    }
    found: dict[str, Bundle] = {}

    def export(name: str) -> Bundle:
        if name not in found:
            request = ExportRequest(**requests[name], batch=(1, BATCH), token_outputs=True, verify=False)
            found[name] = export_model(request, tmp_path_factory.mktemp(name) / "bundle")
        return found[name]

    return export


def images_of(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((count, 3, 64, 64), np.float32)
    images[::2] = rng.standard_normal((len(images[::2]), 3, 8, 8), np.float32).repeat(8, 2).repeat(8, 3)
    return images * np.geomspace(0.3, 3, count, dtype=np.float32)[:, None, None, None]


def tiny_images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, 8, 8)).astype(np.float32)


def assert_same(ours: Result, theirs: Result, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(ours.logits, theirs.logits, rtol=1e-4, atol=atol)
    assert [stage.tolist() for stage in ours.kept] == [stage.tolist() for stage in theirs.kept]
    for name in ("kept_counts", "overflow", "bucket"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def emulate(bundle: Bundle) -> Session:
    return Session(bundle, threads=1, spinning=False, check_hashes=False, open_graph=open_emulated)


def launches(fake: FakeTensorRT) -> int:
    return sum(name == "launched" for name, _ in fake.device.events)


def runs(fake: FakeTensorRT) -> list[tuple[int, int, bool]]:
    return fake.called("execute_async_v3")


def refused(call: Callable[[], Any]) -> EdgepruneError:
    with pytest.raises(EdgepruneError) as caught:
        call()
    assert caught.value.exit_code in (2, 3) and caught.value.hint
    return caught.value


@pytest.fixture
def tiny(tmp_path: Path, fake: FakeTensorRT) -> Bundle:
    """A bundle of one graph and a baseline, with engines for batches 1 and 4."""
    bundle = write_tiny(tmp_path / "bundle", (1, BATCH), target="trt-fp32")
    write_engines(bundle, fake, own_engines(bundle, (1, BATCH)))
    return bundle


# ------------------------------------------------------------------------------------------------ one graph


def test_session_computes_what_onnx_runtime_does(fake: FakeTensorRT, tiny: Bundle, tmp_path: Path) -> None:
    session = Session(tiny)
    reference = Session(write_tiny(tmp_path / "reference", (1, BATCH)))
    for count in (1, 4, 3, 2, 4):
        images = tiny_images(count, seed=count)
        assert_same(session.run(images), reference.run(images))
    dense = Session(tiny, graph="dense").run(tiny_images(2))
    np.testing.assert_allclose(dense.logits, 2 * session.run(tiny_images(2)).logits, rtol=1e-5)


def test_every_profile_is_run_and_captured_before_the_first_image(fake: FakeTensorRT, tiny: Bundle) -> None:
    session = Session(tiny)
    opened = runs(fake)
    assert [(profile, captured) for _, profile, captured in opened] == [(0, False), (0, True), (1, False), (1, True)]
    for count in (1, 2, 4, 1):
        session.run(tiny_images(count))
    assert runs(fake) == opened, "later runs only launch graphs"
    assert launches(fake) == 4


def test_a_graph_replays_at_fixed_addresses(fake: FakeTensorRT, tiny: Bundle) -> None:
    session = Session(tiny)
    first, later = (session.run(tiny_images(4, seed)).logits for seed in (1, 2))
    assert not np.allclose(first, later)
    np.testing.assert_array_equal(first, session.run(tiny_images(4, 1)).logits)
    graphs = [about for name, about in fake.device.events if name == "captured"]
    for graph in graphs:
        (kind, source, target, size), (run, addresses), *back = graph
        assert (kind, run, addresses["images"]) == ("h2d", "execute", target)
        assert fake.device.find(source, size, by="host").kind == "pinned"
        assert [kind for kind, *_ in back] == ["d2h"], "integers are written to the host by the engine"
        for name in ("kept_indices_0", "kept_counts"):
            assert fake.device.find(addresses[name], 4).kind == "mapped"


def test_a_short_batch_is_filled_up_with_its_last_image(fake: FakeTensorRT, tiny: Bundle) -> None:
    backend = Engines(tiny).backend("model")
    out = backend.run({IMAGES: tiny_images(3)})
    assert {name: value.shape[0] for name, value in out.items()} == dict.fromkeys(out, 3)
    staged = backend._host.staging[IMAGES].view(np.float32).reshape(4, 3, 8, 8)
    np.testing.assert_array_equal(staged[3], tiny_images(3)[2])


def test_a_batch_larger_than_any_profile_takes_turns(fake: FakeTensorRT, tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "bundle", (1, 8), target="trt-fp32")
    write_engines(bundle, fake, own_engines(bundle, (1, 3)))
    reference = Session(write_tiny(tmp_path / "reference", (1, 8)))
    assert_same(Session(bundle).run(tiny_images(7)), reference.run(tiny_images(7)))


def test_a_fixed_batch(fake: FakeTensorRT, tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "bundle", (2, 2), target="trt-fp32")
    write_engines(bundle, fake, own_engines(bundle, (2,)))
    backend = Engines(bundle).backend("model")
    assert backend.inputs[0].shape == [2, 3, 8, 8]
    reference = Session(write_tiny(tmp_path / "reference", (2, 2)))
    assert_same(Session(bundle).run(tiny_images(2)), reference.run(tiny_images(2)))


def test_several_threads(fake: FakeTensorRT, tiny: Bundle, tmp_path: Path) -> None:
    session = Session(tiny)
    reference = Session(write_tiny(tmp_path / "reference", (1, BATCH)))
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in range(10):
            images = tiny_images(1 + (seed + i) % BATCH, seed=10 * seed + i)
            if not np.allclose(session.run(images).logits, reference.run(images).logits, atol=1e-5):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_contexts_share_one_block_of_scratch_memory(fake: FakeTensorRT, tiny: Bundle) -> None:
    engines = Engines(tiny)
    backends = [engines.backend(graph) for graph in ("model", "dense")]
    assert set(fake.called("create_execution_context")) == {"user-managed"}
    contexts = [profile._context for backend in backends for profile in backend._profiles]
    assert len(contexts) == 4 and len({context._memory for context in contexts}) == 1
    held = fake.device.find(contexts[0]._memory, 10000)
    assert held.size == 10000, "as much as the profile that needs most"


def test_scratch_memory_grows_under_contexts_that_exist(fake: FakeTensorRT, tiny: Bundle) -> None:
    folder = write_engines(tiny, fake, own_engines(tiny, (1,)))
    assert folder.is_dir()
    engines = Engines(tiny)
    first = engines.backend("model")
    before = first.run({IMAGES: tiny_images(1)})["logits"]
    write_engines(tiny, fake, own_engines(tiny, (1, 2, 3, 4)))
    engines.index = Engines(tiny).index
    engines.backend("dense")
    np.testing.assert_array_equal(first.run({IMAGES: tiny_images(1)})["logits"], before)
    assert len({profile._context._memory for profile in first._profiles}) == 1
    assert fake.device.find(first._profiles[0]._context._memory, 1).size == 20000


# ------------------------------------------------------------------------------------------------ stem and rests


def test_buckets_with_an_engine_each(fake: FakeTensorRT, exported: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle = copy_bundle(exported("buckets"), tmp_path / "bundle")
    write_engines(bundle, fake, own_engines(bundle, (1, 2, BATCH)))
    ours, theirs = Session(bundle), emulate(exported("buckets"))
    buckets: set[int] = set()
    for seed, count in enumerate((1, 4, 3, 1, 2, 4)):
        images = images_of(count, seed)
        result = ours.run(images)
        assert_same(result, theirs.run(images))
        assert result.bucket is not None
        buckets |= set(result.bucket.tolist())
    assert len(buckets) > 1


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_is_handed_on_in_a_low_precision(
    fake: FakeTensorRT, exported: Callable[[str], Bundle], tmp_path: Path, precision: str
) -> None:
    if fake.old and precision == "bf16":
        pytest.skip("TensorRT 8.6 has no bfloat16")
    bundle = copy_bundle(exported(f"buckets-{precision}"), tmp_path / "bundle")
    write_engines(bundle, fake, own_engines(bundle, (1, BATCH)))
    stem = Engines(bundle).backend("stem")
    low = {"fp16": "float16", "bf16": "bfloat16"}[precision]
    assert low in [tensor.dtype for tensor in stem.outputs]
    ours, theirs = Session(bundle), emulate(exported(f"buckets-{precision}"))
    for seed, count in enumerate((1, 4, 3)):
        assert_same(ours.run(images_of(count, seed)), theirs.run(images_of(count, seed)), atol=0.02)


def test_engines_of_plugin_graphs(fake: FakeTensorRT, exported: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle = copy_bundle(exported("buckets"), tmp_path / "bundle")
    graphs = bundle.manifest.graphs.items()
    specs = [
        EngineSpec(name, ((info.variant_of, 2, None),), ("TopKGather", "GatherTokens"))
        for name, info in graphs
        if info.variant_of is not None
    ]
    write_engines(bundle, fake, specs)
    assert_same(Session(bundle).run(images_of(4)), emulate(exported("buckets")).run(images_of(4)))


def test_a_stem_built_for_smaller_batches_takes_turns(
    fake: FakeTensorRT, exported: Callable[[str], Bundle], tmp_path: Path
) -> None:
    bundle = copy_bundle(exported("buckets"), tmp_path / "bundle")
    rests = [spec for spec in own_engines(bundle, (2,)) if spec.source.startswith("rest")]
    write_engines(bundle, fake, [EngineSpec("stem", (("stem", 1, None),)), *rests])
    assert_same(Session(bundle).run(images_of(4)), emulate(exported("buckets")).run(images_of(4)))


def told_engines(batch: int, *, by_caller: bool = False) -> list[EngineSpec]:
    """Return a stem, and one engine for all buckets."""
    rest = [("rest" if by_caller else f"rest_{slots[0]}", batch, slots) for slots in SLOT_ROWS]
    return [EngineSpec("stem", (("stem", batch, None),)), EngineSpec("rest", tuple(rest))]


def test_buckets_on_one_engine_that_is_told(
    fake: FakeTensorRT, exported: Callable[[str], Bundle], tmp_path: Path
) -> None:
    bundle = copy_bundle(exported("buckets"), tmp_path / "bundle")
    write_engines(bundle, fake, told_engines(BATCH))
    backend = Engines(bundle).backend("rest_39")
    assert SLOTS not in [tensor.name for tensor in backend.inputs]
    assert [tensor.shape for tensor in backend.outputs] == [[-1, 10], [-1, 39], [-1, 39], [-1, 2]]
    fake.calls.clear()
    ours, theirs = Session(bundle), emulate(exported("buckets"))
    assert len(fake.called("deserialize_cuda_engine")) == 2, "one engine for all buckets"
    for seed, count in enumerate((1, 4, 3)):
        assert_same(ours.run(images_of(count, seed)), theirs.run(images_of(count, seed)))


def tell(manifest: dict[str, Any]) -> None:
    for bucket in manifest["adaptive"]["buckets"]:
        bucket["graph"] = "rest"


def test_a_caller_may_tell_the_slots(fake: FakeTensorRT, exported: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle = copy_bundle(exported("buckets"), tmp_path / "bundle", tell)
    write_engines(bundle, fake, told_engines(1, by_caller=True))
    images = images_of(3)
    assert_same(Session(bundle).run(images), emulate(exported("buckets")).run(images))
    engines = Engines(bundle)
    stem, rest = engines.backend("stem"), engines.backend("rest")
    feeds = stem.run({IMAGES: images[:1]})
    error = refused(lambda: rest.run({**feeds, SLOTS: np.array([10, 10])}))
    assert error.code == "slots" and "(36, 36)" in str(error).replace("[", "(").replace("]", ")")


def test_what_the_stem_hands_on_stays_where_it_is(
    fake: FakeTensorRT, exported: Callable[[str], Bundle], tmp_path: Path
) -> None:
    bundle = copy_bundle(exported("buckets"), tmp_path / "bundle")
    write_engines(bundle, fake, own_engines(bundle, (1, 2)))
    engines = Engines(bundle)
    stem, rest = engines.backend("stem"), engines.backend("rest_64")
    handed = {tensor.name for tensor in rest.inputs} - {COUNT}
    images = images_of(1)
    arrays = stem.run({IMAGES: images})
    expected = rest.run({name: arrays[name] for name in (*handed, COUNT)})
    kept = stem.run({IMAGES: images}, keep=handed)
    assert {name for name, value in kept.items() if isinstance(value, EngineRows)} == handed
    assert isinstance(kept[COUNT], np.ndarray)
    for _ in range(2):  # run, then replayed
        fake.device.events.clear()
        out = rest.run({name: kept[name] for name in (*handed, COUNT)})
        np.testing.assert_array_equal(out["logits"], expected["logits"])
    graph = [name for name, _ in fake.device.events]
    assert graph.count("launched") == 1 and "captured" not in graph
    captured = rest._profiles[0].graphs
    bound = next(key for key in captured if any(isinstance(place, int) for place in key[0]))
    assert set(bound[0]) - {"host"} == {kept[name].pieces[0].address for name in handed}


def test_rows_from_several_places_are_brought_together(
    fake: FakeTensorRT, exported: Callable[[str], Bundle], tmp_path: Path
) -> None:
    bundle = copy_bundle(exported("buckets"), tmp_path / "bundle")
    write_engines(bundle, fake, own_engines(bundle, (1, BATCH)))
    engines = Engines(bundle)
    stem, rest = engines.backend("stem"), engines.backend("rest_39")
    handed = {tensor.name for tensor in rest.inputs} - {COUNT}
    images = images_of(4)
    kept, more = (stem.run({IMAGES: part}, keep=handed) for part in (images, images[::-1].copy()))
    arrays = stem.run({IMAGES: images})
    for rows in ([0, 1, 2, 3], [2], [3, 1], [1, 2, 3], [0, 1]):
        feeds = {name: rest.join([kept[name][i : i + 1] for i in rows]) for name in (*handed, COUNT)}
        out = rest.run(feeds)
        expected = rest.run({name: arrays[name][rows] for name in (*handed, COUNT)})
        np.testing.assert_allclose(out["logits"], expected["logits"], rtol=1e-4, atol=1e-5)
        mirrored = rest.run({n: rest.join([more[n][3 - i : 4 - i] for i in rows]) for n in (*handed, COUNT)})
        np.testing.assert_allclose(mirrored["logits"], expected["logits"], rtol=1e-4, atol=1e-5)


def test_neighbours_become_one_piece_again(
    fake: FakeTensorRT, exported: Callable[[str], Bundle], tmp_path: Path
) -> None:
    bundle = copy_bundle(exported("buckets"), tmp_path / "bundle")
    write_engines(bundle, fake, own_engines(bundle, (BATCH,)))
    rows = Engines(bundle).backend("stem").run({IMAGES: images_of(4)}, keep=["token_ranks"])["token_ranks"]
    assert rows.shape == (4, 64) and rows[1:3].shape == (2, 64) and len(rows[3:9]) == 1
    apart = join_rows([rows[2:3], rows[0:1]])
    assert [piece.first for piece in apart.pieces] == [2, 0]
    assert apart[1:2].pieces == rows[0:1].pieces
    assert join_rows([rows[0:1], rows[1:2], rows[2:4]]).pieces == rows.pieces


def test_rows_hold_while_others_run_the_stem(
    fake: FakeTensorRT, exported: Callable[[str], Bundle], tmp_path: Path
) -> None:
    bundle = copy_bundle(exported("buckets"), tmp_path / "bundle")
    write_engines(bundle, fake, own_engines(bundle, (1,)))
    engines = Engines(bundle)
    stem, rest = engines.backend("stem"), engines.backend("rest_64")
    handed = {tensor.name for tensor in rest.inputs} - {COUNT}
    alone = stem.run({IMAGES: images_of(1, 1)})
    expected = rest.run({name: alone[name] for name in (*handed, COUNT)})
    kept = stem.run({IMAGES: images_of(1, 1)}, keep=handed)
    others = [stem.run({IMAGES: images_of(1, seed)}, keep=handed) for seed in (2, 3)]
    out = rest.run({name: kept[name] for name in (*handed, COUNT)})
    np.testing.assert_array_equal(out["logits"], expected["logits"])
    assert len(stem._sets) == 3
    del kept, others
    for seed in range(4):
        stem.run({IMAGES: images_of(1, seed)}, keep=handed)
    assert len(stem._sets) == 3, "buffers are used again when nobody has their rows"


def test_rows_outlive_the_backend_they_are_of(
    fake: FakeTensorRT, exported: Callable[[str], Bundle], tmp_path: Path
) -> None:
    bundle = copy_bundle(exported("buckets"), tmp_path / "bundle")
    write_engines(bundle, fake, own_engines(bundle, (1,)))
    rows = Engines(bundle).backend("stem").run({IMAGES: images_of(1)}, keep=["token_ranks"])["token_ranks"]
    rest = Engines(bundle).backend("rest_64")
    assert fake.device.find(rows.pieces[0].address, 4 * 64).kind == "device"
    arrays = Engines(bundle).backend("stem").run({IMAGES: images_of(1)})
    given = rest.run({**arrays, "token_ranks": rows})
    np.testing.assert_array_equal(given["logits"], rest.run(arrays)["logits"])


def test_the_first_images_find_everything_captured_but_the_way_between(
    fake: FakeTensorRT, exported: Callable[[str], Bundle], tmp_path: Path
) -> None:
    bundle = copy_bundle(exported("buckets"), tmp_path / "bundle")
    write_engines(bundle, fake, own_engines(bundle, (1, 2)))
    session = Session(bundle)
    opened = len(runs(fake))
    assert opened == 2 * 2 * 4, "stem and three rests, run and captured"
    session.run(images_of(1))
    assert len(runs(fake)) == opened + 2, "the rest's inputs are bound where the stem has left them"
    session.run(images_of(1))
    assert len(runs(fake)) == opened + 2


def test_threads_on_buckets(fake: FakeTensorRT, exported: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle = copy_bundle(exported("buckets"), tmp_path / "bundle")
    write_engines(bundle, fake, own_engines(bundle, (1, BATCH)))
    session, reference = Session(bundle), emulate(exported("buckets"))
    inputs = [images_of(1 + seed % BATCH, seed) for seed in range(8)]
    expected = [reference.run(images) for images in inputs]
    found: dict[int, Result] = {}

    def work(start: int) -> None:
        for seed in range(start, 8, 2):
            found[seed] = session.run(inputs[seed])

    threads = [threading.Thread(target=work, args=(start,)) for start in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(8):
        assert_same(found[seed], expected[seed])


def test_the_count_is_read_from_memory_the_engine_writes(
    fake: FakeTensorRT, exported: Callable[[str], Bundle], tmp_path: Path
) -> None:
    bundle = copy_bundle(exported("buckets"), tmp_path / "bundle")
    write_engines(bundle, fake, own_engines(bundle, (1,)))
    session = Session(bundle)
    session.run(images_of(1))
    stem = [about for name, about in fake.device.events if name == "captured" and "token_count" in str(about)]
    copies = [about for graph in stem for about in graph if about[0] == "d2h"]
    for graph in stem:
        for about in graph:
            if about[0] == "execute" and "images" in about[1]:
                assert fake.device.find(about[1][COUNT], 4).kind == "mapped"
    assert stem and all(size >= 40 for *_, size in copies), "only logits are copied"


# ------------------------------------------------------------------------------------------------ densities, governor


def test_densities_and_governor(fake: FakeTensorRT, exported: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle = copy_bundle(exported("densities"), tmp_path / "bundle")
    write_engines(bundle, fake, own_engines(bundle, (1, BATCH)))
    ours, theirs = Session(bundle), emulate(exported("densities"))
    for density in ours.densities:
        ours.density = theirs.density = density
        assert_same(ours.run(images_of(3)), theirs.run(images_of(3)))
    Session(bundle, deadline_ms=1000.0).warmup()


# ------------------------------------------------------------------------------------------------ what is missing


@pytest.mark.parametrize(("count", "words"), [(None, "no CUDA driver"), (0, "no device: cuInit answers 100")])
def test_without_a_device_tensorrt_is_not_touched(
    fake: FakeTensorRT, tiny: Bundle, count: int | None, words: str
) -> None:
    fake.device.count = count
    error = refused(lambda: Session(tiny))
    assert (error.code, error.exit_code) == ("gpu-missing", 3) and words in error.message
    assert f"edgeprune build {tiny.path}" in str(error.hint)


@pytest.mark.parametrize("package", ["tensorrt", "pycuda.driver"])
def test_without_a_package(fake: FakeTensorRT, tiny: Bundle, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    error = refused(lambda: Session(tiny))
    expected = {"tensorrt": ("tensorrt-missing", "pip install tensorrt"), "pycuda.driver": ("package-missing", "[trt]")}
    assert error.code == expected[package][0] and expected[package][1] in str(error.hint)


def test_a_driver_that_is_too_old(fake: FakeTensorRT, tiny: Bundle) -> None:
    fake.faults.runtime = True
    error = refused(lambda: Session(tiny))
    assert error.code == "tensorrt-unusable" and "error: 35" in error.message and "CUDA 12.6" in str(error.hint)


def test_without_cuda_python_engines_run_without_graphs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = install(monkeypatch, layout=None)
    bundle = write_tiny(tmp_path / "bundle", (1, BATCH), target="trt-fp32")
    write_engines(bundle, fake, own_engines(bundle, (1, BATCH)))
    with pytest.warns(EdgepruneWarning, match="cuda-python") as seen:
        session = Session(bundle)
    assert len(seen) == 1, "said once"
    assert session.run(tiny_images(2)).logits.shape == (2, 4)
    assert launches(fake) == 0


@pytest.mark.parametrize("by", ["CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "a planted fault"])
def test_a_capture_that_fails_is_said_once(fake: FakeTensorRT, tiny: Bundle, by: str) -> None:
    fake.faults.capture = by == fake.faults.reason
    fake.device.refuse_capture = None if fake.faults.capture else "something in the engine"
    with pytest.warns(EdgepruneWarning, match=by) as seen:
        session = Session(tiny)
    assert len(seen) == 1
    assert session.run(tiny_images(3)).logits.shape == (3, 4) and launches(fake) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_layouts_of_cuda_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, layout: str) -> None:
    fake = install(monkeypatch, layout=layout)
    bundle = write_tiny(tmp_path / "bundle", target="trt-fp32")
    write_engines(bundle, fake, own_engines(bundle, (1,)))
    session = Session(bundle)
    session.run(tiny_images(1))
    assert launches(fake) == 1


def test_no_engine_was_built(fake: FakeTensorRT, tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "a bundle", target="trt-fp32")
    error = refused(lambda: Session(bundle))
    assert (error.code, error.exit_code) == ("engine-missing", 3)
    assert error.hint == f"build them here: edgeprune build '{bundle.path}'"
    write_engines(bundle, fake, own_engines(bundle, (1,))[1:])
    assert refused(lambda: Session(bundle)).code == "engine-missing"


def test_engines_of_others(fake: FakeTensorRT, tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(fake.device), "name", "Another GPU")
    error = refused(lambda: Session(tiny))
    assert error.code == "engine-other-device" and "nvidia-pretend-gpu-trt" in error.message
    monkeypatch.undo()


def test_an_index_of_another_capability(fake: FakeTensorRT, tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(fake.device), "capability", (9, 0))
    assert refused(lambda: Session(tiny)).code == "engine-other-device"


def edit_index(bundle: Bundle, change: Callable[[dict[str, Any]], Any]) -> None:
    (path,) = bundle.path.glob(f"engines/*/{INDEX_NAME}")
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["engines"][0].update(source_sha256="0" * 64),
        lambda index: index["engines"][0].update(weights_sha256={"model.onnx.data": "0" * 64}),
        lambda index: index["engines"][0].update(source="nonsense"),
        lambda index: index["engines"][0].update(sha256="0" * 64),
        lambda index: index["engines"][0]["profiles"][0].update(batch=3),
        lambda index: index["engines"][0].update(file="../model.engine"),
        lambda index: index.update(schema_version=9),
    ],
)
def test_stale_engines(fake: FakeTensorRT, tiny: Bundle, change: Callable[[dict[str, Any]], Any]) -> None:
    edit_index(tiny, change)
    error = refused(lambda: Session(tiny))
    assert (error.code, error.exit_code) == ("engine-stale", 3) and "edgeprune build" in str(error.hint)


def test_a_lost_engine(fake: FakeTensorRT, tiny: Bundle) -> None:
    next(tiny.path.glob("engines/*/model.engine")).unlink()
    assert refused(lambda: Session(tiny)).code == "engine-missing"


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("Magic tag does not match", "engine-stale"),
        ("Requested amount of GPU memory (1 bytes) could not be allocated", "gpu-out-of-memory"),
    ],
)
def test_tensorrt_refuses_an_engine(fake: FakeTensorRT, tiny: Bundle, reason: str, code: str) -> None:
    fake.faults.deserialize, fake.faults.reason = True, reason
    error = refused(lambda: Session(tiny))
    assert error.code == code and reason in error.message


@pytest.mark.parametrize("fault", ["context", "execute"])
@pytest.mark.parametrize(
    ("reason", "code"), [("it broke", "engine-run-failed"), ("Out of memory", "gpu-out-of-memory")]
)
def test_tensorrt_fails(fake: FakeTensorRT, tiny: Bundle, fault: str, reason: str, code: str) -> None:
    session = Session(tiny) if fault == "execute" else None
    fake.faults.reason = reason
    setattr(fake.faults, fault, True)
    error = refused(lambda: Session(tiny))
    assert error.code == code and reason in error.message
    assert session is None or session.run(tiny_images(1)) is not None, "what was captured runs"


def test_no_memory_is_left(fake: FakeTensorRT, tiny: Bundle) -> None:
    fake.device.total_bytes = 4000
    error = refused(lambda: Session(tiny))
    assert error.code == "gpu-out-of-memory" and "--batches" in str(error.hint)
    assert error.details["free"] == 4000


def test_the_plugin_is_loaded_first(
    fake: FakeTensorRT, tiny: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty_machine(tmp_path / "home", monkeypatch)
    specs = [EngineSpec(g, ((g, 1, None),), ("TopKGather",)) for g in ("model", "dense")]
    write_engines(tiny, fake, specs)
    assert Session(tiny).run(tiny_images(1)).logits.shape == (1, 4)
    fake.registry.held.clear()
    error = refused(lambda: Session(tiny))
    assert error.code == "plugin-missing" and error.exit_code == 3


def test_an_engine_that_is_another_graph(fake: FakeTensorRT, tiny: Bundle) -> None:
    def rename(manifest: dict[str, Any]) -> None:
        manifest["graphs"]["model"]["outputs"][0]["shape"] = [-1, 7]

    manifest = json.loads((tiny.path / "manifest.json").read_text())
    rename(manifest)
    (tiny.path / "manifest.json").write_text(json.dumps(manifest))
    assert refused(lambda: Session(tiny.path)).code == "bundle-tampered"


def test_candidates_are_opened_by_name(fake: FakeTensorRT, tiny: Bundle) -> None:
    found = Engines(tiny)
    folder = next(tiny.path.glob("engines/*"))
    engines = Engines(tiny, folder, found.index)
    by_file = {info.file: info for info in found.index.engines}
    backend = engines.open("model", [(by_file["dense.engine"], 1)])
    assert isinstance(backend, EngineBackend)
    logits = backend.run({IMAGES: tiny_images(4)})["logits"]
    np.testing.assert_allclose(logits, Session(tiny, graph="dense").run(tiny_images(4)).logits)


def test_the_faster_of_two_engines_runs(fake: FakeTensorRT, tiny: Bundle) -> None:
    def add(index: dict[str, Any]) -> None:
        index["engines"][0]["profiles"][0]["median_ms"] = 2.0
        index["engines"][1]["profiles"][0].update(graph="model", median_ms=1.0)

    edit_index(tiny, add)
    dense = Engines(tiny).backend("model")
    assert [profile._engine._plan["model"][-10:] for profile in dense._profiles] == ["dense.onnx", "model.onnx"]


def test_a_process_without_torch_and_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks what edgeprune imports: the stand-ins themselves need onnx."""
    code = """
import sys
import edgeprune.runtime.session, edgeprune.runtime.trt, edgeprune.runtime.cuda, edgeprune.runtime.engine_backend
print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "onnx", "tensorrt", "pycuda", "cuda"}))
from edgeprune import Session
try:
    Session(sys.argv[1])
except Exception as error:
    print(type(error).__name__, error.code)
print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "onnx", "onnxruntime", "tensorrt"}))
"""
    bundle = write_tiny(tmp_path / "bundle", target="trt-fp32")
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle.path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.split("\n")[:3] == ["[]", "EnvironmentLackError gpu-missing", "[]"], done.stderr


def test_a_session_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, "11.4.0")
    bundle = write_tiny(tmp_path / "bundle", target="trt-fp32")
    write_engines(bundle, fake, own_engines(bundle, (1,)))
    code = """
import sys, numpy
from edgeprune import Session
print(Session(sys.argv[1]).run(numpy.zeros((1, 3, 8, 8), numpy.float32)).logits.shape)
"""
    environment = other_process(tmp_path / "site", "11.4.0")
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle.path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "(1, 4)\n", done.stderr


def test_a_timer_is_told_the_time_on_the_device(
    fake: FakeTensorRT, exported: Callable[[str], Bundle], tmp_path: Path
) -> None:
    from edgeprune.runtime.timing import DeviceTimer

    bundle = copy_bundle(exported("densities"), tmp_path / "bundle")
    write_engines(bundle, fake, own_engines(bundle, (1, BATCH)))
    session, timer = Session(bundle), DeviceTimer()
    assert session.time_device(timer) is True
    images = images_of(1)
    for _ in range(3):
        session.run(images)
        told = timer.take()
        assert told is not None
        assert told[0] == 0.25  # what the stand-in says of any two events
        assert told[1] >= 0
    session.time_device(None)
    session.run(images)
    assert timer.take() is None


def test_layers_are_timed_without_graphs_and_change_no_result(
    fake: FakeTensorRT, exported: Callable[[str], Bundle], tmp_path: Path
) -> None:
    bundle = copy_bundle(exported("buckets"), tmp_path / "bundle")
    write_engines(bundle, fake, own_engines(bundle, (1, BATCH)))
    session, images = Session(bundle), images_of(BATCH)
    before = session.run(images)
    logs = session.time_layers()
    assert set(logs) == {"stem", "rest_36", "rest_39", "rest_64"}
    fake.device.events.clear()
    calls = len(fake.called("execute_async_v3"))
    for _ in range(3):
        assert_same(session.run(images), before)
    graph_events = [name for name, _ in fake.device.events if name in ("captured", "launched")]
    assert graph_events == []
    assert {capturing for _, _, capturing in fake.called("execute_async_v3")[calls:]} == {False}
    stem = next(log for log in logs["stem"] if log.times)
    assert {len(times) for times in stem.times.values()} == {3}
    assert json.loads(stem.information)["Layers"]


def test_layers_of_a_bundle_without_engines_are_not_timed(tmp_path: Path) -> None:
    assert Session(write_tiny(tmp_path / "bundle")).time_layers() == {}
