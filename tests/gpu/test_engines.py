"""Engines on a device: they build, are what was asked for, and agree with PyTorch and with the emulation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from edgeprune.bench import bench_bundle
from edgeprune.bench.gate import Gate
from edgeprune.bench.gate_measure import PairPlan, compare_bundles
from edgeprune.bench.gate_rules import parse_rules
from edgeprune.checks.compare import draw_images
from edgeprune.checks.parity import check_parity, model_from_manifest, verify_bundle
from edgeprune.errors import EnvironmentLackError
from edgeprune.export import ExportRequest, export_model
from edgeprune.export.emulate import open_emulated
from edgeprune.export.trt import BuildOptions, build_engines
from edgeprune.plugins.loader import load_plugins
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.engines import EngineIndex
from edgeprune.runtime.session import Result, Session
from tests.helpers.device_kernels import missing_device

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
CLOSE = {"fp32": 2e-3, "fp16": 3e-2}  # of the largest logit; the device adds in another order
OVERLAP = 0.98


@pytest.fixture(scope="module", autouse=True)
def device() -> None:
    reason = missing_device()
    for name in ("tensorrt", "pycuda"):
        if reason is None and find_spec(name) is None:
            reason = f"{name} is not installed"
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder, with the caches of builds in it too."""
    with pytest.MonkeyPatch.context() as patch:
        made = tmp_path_factory.mktemp("engines")
        patch.setenv("XDG_CACHE_HOME", str(made / "cache"))
        yield made


def checkpoint(method: str) -> str:
    return str(CHECKPOINTS / f"vit_digits_{method}.safetensors")


def export(folder: Path, method: str, *, target: str = "trt-fp16", selection: str = "native", **fields: Any) -> Bundle:
    """Return a bundle of a shipped checkpoint."""
    settings = {"dynamicvit": {"keep_rate": 0.5}, "evit": {"keep_rate": 0.5}}.get(method, {})
    request = ExportRequest(
        model="vit_digits",
        method=method,
        checkpoint=checkpoint(method),
        target=target,
        selection=selection,
        verify=False,
        token_outputs=method != "dense",
        **{**settings, **fields},
    )
    count = len(list(folder.glob("bundle-*")))
    return export_model(request, folder / f"bundle-{count}")


def build(bundle: Bundle, **options: Any) -> EngineIndex:
    return build_engines(bundle, BuildOptions(tactics="builtin", **options))


def images(bundle: Bundle, count: int, seed: int = 0) -> np.ndarray:
    return draw_images((3, *bundle.manifest.preprocessing.image_size), count, np.random.default_rng(seed))


def hold(bundle: Bundle, got: Result, wanted: Result) -> None:
    """Compare logits by the precision, and the kept sets where there are some."""
    scale = np.abs(wanted.logits).max()
    assert np.abs(got.logits - wanted.logits).max() <= CLOSE[bundle.manifest.precision] * scale
    for ours, theirs in zip(got.kept, wanted.kept, strict=True):
        for a, b in zip(ours.tolist(), theirs.tolist(), strict=True):
            assert len(set(a) & set(b)) >= OVERLAP * len(set(a) | set(b)) - 1  # one token on the edge may differ


def need_plugin() -> None:
    try:
        load_plugins()
    except EnvironmentLackError as error:
        pytest.skip(f"no plugin: {error.message}")


@pytest.mark.parametrize("target", ["trt-fp32", "trt-fp16"])
@pytest.mark.parametrize("method", ["dense", "dynamicvit", "evit"])
def test_engines_agree_with_pytorch_and_the_emulation(folder: Path, method: str, target: str) -> None:
    bundle = export(folder, method, target=target)
    index = build(bundle)
    assert {profile.graph for info in index.engines for profile in info.profiles} >= {"model"}
    model = model_from_manifest(bundle.manifest, checkpoint(method))
    check_parity(verify_bundle(bundle, model, session=Session(bundle), images=16), bundle.manifest.precision)
    x = images(bundle, 1)
    hold(bundle, Session(bundle).run(x), Session(bundle, open_graph=open_emulated).run(x))


def test_the_proof_names_the_precision_and_the_selection(folder: Path) -> None:
    bundle = export(folder, "evit")
    for info in build(bundle, graphs=("model",)).engines:
        assert info.proof is not None
        assert info.proof.layers > 0
        assert info.proof.attention_blocks == 6
        assert info.proof.precisions.get("float16", 0) > 0 or info.proof.hidden_attention > 0


def test_every_batch_gives_what_the_images_give_alone(folder: Path) -> None:
    bundle = export(folder, "evit", batch=(1, 4))
    build(bundle, batches=(1, 4), graphs=("model",))
    session, x = Session(bundle), images(bundle, 4)
    alone = [session.run(x[i : i + 1]) for i in range(4)]
    for count in (1, 2, 3, 4):
        together = session.run(x[:count])
        for i in range(count):
            np.testing.assert_allclose(
                together.logits[i], alone[i].logits[0], atol=3e-2 * np.abs(alone[i].logits).max()
            )


def test_a_run_repeats_itself(folder: Path) -> None:
    bundle = export(folder, "dynamicvit")
    build(bundle, graphs=("model",))
    session, x, other = Session(bundle), images(bundle, 1), images(bundle, 1, seed=1)
    first = session.run(x).logits.copy()
    for _ in range(5):
        session.run(other)
        np.testing.assert_array_equal(session.run(x).logits, first)


@pytest.mark.parametrize("method", ["dynamicvit", "evit"])
def test_the_plugin_selects_as_the_standard_layers_do(folder: Path, method: str) -> None:
    need_plugin()
    bundle = export(folder, method, selection="auto")
    x, results = images(bundle, 1), {}
    for selection in ("native", "plugin"):
        index = build(bundle, selection=selection, graphs=("model",))
        assert [info.plugin for info in index.engines] == [selection == "plugin"]
        results[selection] = Session(bundle).run(x)
    hold(bundle, results["plugin"], results["native"])


@pytest.mark.parametrize("engines", ["profiles", "per-bucket"])
def test_buckets_agree_with_the_emulation(folder: Path, engines: str) -> None:
    bundle = export(folder, "sait", buckets="16,32,48,64", batch=(1, 3))
    build(bundle, engines=engines)
    session, reference = Session(bundle), Session(bundle, open_graph=open_emulated)
    for seed in range(4):
        x = images(bundle, 3, seed)
        got, wanted = session.run(x), reference.run(x)
        hold(bundle, got, wanted)
        assert got.bucket is not None
        assert wanted.bucket is not None
        assert np.abs(got.bucket - wanted.bucket).max() <= 1  # a count on the edge may go either way


def test_the_density_switches_without_a_new_build(folder: Path) -> None:
    bundle = export(folder, "evit", densities=(1.0, 0.7, 0.5))
    build(bundle)
    session, reference, x = Session(bundle), Session(bundle, open_graph=open_emulated), images(bundle, 1)
    for rate in (0.5, 1.0, 0.7, 0.5):
        session.density = reference.density = rate
        hold(bundle, session.run(x), reference.run(x))


def test_engines_run_beside_torch(folder: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    bundle = export(folder, "evit")
    build(bundle, graphs=("model",))
    a = torch.randn(512, 512, device="cuda")
    session, x = Session(bundle), images(bundle, 1)
    first, product = session.run(x).logits.copy(), (a @ a).sum().item()
    for _ in range(5):
        b = a @ a
        np.testing.assert_array_equal(session.run(x).logits, first)
        assert b.sum().item() == pytest.approx(product, rel=1e-3)


@pytest.mark.parametrize("form", ["static", "densities", "buckets"])
def test_layers_tell_where_the_time_goes(folder: Path, form: str) -> None:
    fields: dict[str, Any] = {"densities": {"densities": (1.0, 0.5)}, "buckets": {"buckets": "16,32,48,64"}}.get(
        form, {}
    )
    bundle = export(folder, "sait" if form == "buckets" else "evit", **fields)
    build(bundle)
    result = bench_bundle(bundle, rounds=4, quick=True, layers=True)
    assert [one.runner for one in result.layers] == [runner.name for runner in result.runners]
    for one in result.layers:
        times = {part.part: part.ms for part in one.parts}
        assert one.source == "tensorrt profiler"
        assert sum(times.values()) > 0
        assert times.get("other", 0.0) < 0.5 * sum(times.values()), one.nodes  # most layers tell what they were made of
        assert sum(times.values()) < one.wall_ms  # which has all layers in it


def test_a_bundle_against_itself_is_no_regression_on_two_builds_a_side(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeprune.bench.gate_builds.BuildOptions", partial(BuildOptions, tactics="builtin"))
    bundle = export(folder, "evit")
    gate, plan = Gate(parse_rules(["median:5%"]), paired=True), PairPlan(blocks=16, dense=False, quick=True, builds=2)
    found = compare_bundles(bundle, bundle, gate, plan)
    (outcome,) = found.outcomes
    assert outcome.status != "regressed", outcome
    assert outcome.spread is not None and outcome.spread >= 0
    assert not (bundle.path / "engines").exists()
