"""Running bundles."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from edgeprune import Session
from edgeprune.errors import EdgepruneWarning, EnvironmentLackError, InputError
from edgeprune.runtime import ort
from edgeprune.runtime.bundle import BundleWriter, load_bundle
from tests.helpers.bundles import WEIGHTS, graph_info, manifest_fields, tiny_model, write_tiny

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "dark": (0, 0, 0)}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "bundle").path


def open_session(path: Path, **options: Any) -> Session:
    return Session(path, threads=1, spinning=False, **options)


def random_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 3, 8, 8)).astype(np.float32)


def colour_files(directory: Path, names: list[str]) -> list[Path]:
    files = [directory / f"{i}_{name}.png" for i, name in enumerate(names)]
    for file, name in zip(files, names, strict=True):
        Image.new("RGB", (12, 10), COLOURS[name]).save(file)
    return files


def code_of(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert caught.value.expected
    return caught.value.code


def test_run_returns_the_logits(bundle: Path) -> None:
    images = random_images(1)
    result = open_session(bundle).run(images)
    np.testing.assert_allclose(result.logits, images.mean((2, 3)) @ WEIGHTS, rtol=1e-5, atol=1e-6)
    assert result.logits.dtype == np.float32


def test_run_returns_the_kept_patches_and_counts(bundle: Path) -> None:
    images = np.zeros((1, 3, 8, 8), np.float32)
    images[:, :, 4:, :4] = 1  # patch 2
    images[:, :, :4, 4:] = 0.5  # patch 1
    result = open_session(bundle).run(images)
    assert [k.tolist() for k in result.kept] == [[[2, 1]]]
    assert result.kept[0].dtype == np.int32
    assert result.kept_counts is not None
    assert result.kept_counts.tolist() == [[2]]


def test_result_has_no_kept_patches_when_the_bundle_has_no_token_outputs(tmp_path: Path) -> None:
    result = open_session(write_tiny(tmp_path / "b", kept=False).path).run(random_images(1))
    assert result.kept == []
    assert result.kept_counts is None


def test_fused_token_stays_minus_one(tmp_path: Path) -> None:
    session = open_session(write_tiny(tmp_path / "b", prefix_ids=True).path)
    assert session.run(random_images(1)).kept[0][0, -1] == -1


def test_session_runs_the_dense_graph_when_asked(bundle: Path) -> None:
    images = random_images(1)
    dense, pruned = open_session(bundle, graph="dense"), open_session(bundle)
    np.testing.assert_allclose(dense.run(images).logits, 2 * pruned.run(images).logits, rtol=1e-5)


def test_session_takes_a_loaded_bundle(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    session = Session(loaded, threads=1, spinning=False)
    assert session.bundle is loaded
    assert session.manifest.method.name == "evit"
    assert session.labels == ["red", "green", "blue", "dark"]


def test_session_refuses_an_absent_graph(bundle: Path) -> None:
    assert code_of(open_session, bundle, graph="random") == "graph-missing"


def test_session_refuses_negative_threads(bundle: Path) -> None:
    assert code_of(Session, bundle, threads=-1) == "threads"


def test_session_refuses_a_tampered_bundle(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(b"")
    assert code_of(open_session, bundle) == "bundle-tampered"


@pytest.mark.parametrize("count", [1, 3, 8])
def test_dynamic_batch_takes_every_size_in_range(tmp_path: Path, count: int) -> None:
    session = open_session(write_tiny(tmp_path / "b", (1, 8)).path)
    assert session.run(random_images(count)).logits.shape == (count, 4)


@pytest.mark.parametrize("batch", [(1, 1), (2, 4), (3, 3)])
def test_warmup_runs_at_any_batch_range(tmp_path: Path, batch: tuple[int, int]) -> None:
    open_session(write_tiny(tmp_path / "b", batch).path).warmup()


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (9, 3, 8, 8), (1, 1, 8, 8), (1, 3, 8, 9), (3, 8, 8), (1, 8, 8, 3), ()])
def test_run_refuses_a_wrong_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    session = open_session(write_tiny(tmp_path / "b", (1, 8)).path)
    with pytest.raises(InputError) as caught:
        session.run(np.zeros(shape, np.float32))
    assert caught.value.code == "input-shape"
    assert "[batch, 3, 8, 8] with a batch of 1 to 8" in str(caught.value)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.uint8, ">f4"])
def test_run_refuses_a_wrong_dtype(bundle: Path, dtype: Any) -> None:
    assert code_of(open_session(bundle).run, np.zeros((1, 3, 8, 8), dtype)) == "input-dtype"


@pytest.mark.parametrize("images", [[[1.0]], None, "image.png"])
def test_run_refuses_what_is_no_array(bundle: Path, images: Any) -> None:
    assert code_of(open_session(bundle).run, images) == "input-dtype"


def test_run_takes_strided_arrays(bundle: Path) -> None:
    images = random_images(1)
    strided = np.asfortranarray(images)
    session = open_session(bundle)
    np.testing.assert_array_equal(session.run(strided).logits, session.run(images).logits)


def test_run_passes_nan_through(bundle: Path) -> None:
    images = random_images(1)
    images[0, 0, 0, 0] = np.nan
    assert np.isnan(open_session(bundle).run(images).logits).any()


def test_classify_returns_labels_and_probabilities_in_order(bundle: Path, tmp_path: Path) -> None:
    (file,) = colour_files(tmp_path, ["green"])
    (prediction,) = open_session(bundle).classify([str(file)], top=3)
    assert prediction.path == file
    assert prediction.top[0][:2] == (1, "green")
    assert [p for *_, p in prediction.top] == sorted((p for *_, p in prediction.top), reverse=True)
    logits = np.array([1, -1, -1]) @ WEIGHTS[[1, 0, 2]]  # green is 1, the others -1 after normalising
    assert prediction.top[0][2] == pytest.approx(np.exp(logits[1]) / np.exp(logits).sum(), rel=1e-5)
    assert [k.shape for k in prediction.kept] == [(2,)]


def test_classify_takes_a_single_path(bundle: Path, tmp_path: Path) -> None:
    (file,) = colour_files(tmp_path, ["blue"])
    assert open_session(bundle).classify(file)[0].top[0][1] == "blue"


def test_classify_gives_all_classes_when_more_are_asked_for(bundle: Path, tmp_path: Path) -> None:
    (prediction,) = open_session(bundle).classify(colour_files(tmp_path, ["red"]), top=50)
    assert sorted(c for c, *_ in prediction.top) == [0, 1, 2, 3]
    assert sum(p for *_, p in prediction.top) == pytest.approx(1)


def test_classify_gives_no_labels_when_the_bundle_has_none(tmp_path: Path) -> None:
    session = open_session(write_tiny(tmp_path / "b", labels=None).path)
    assert session.classify(colour_files(tmp_path, ["red"]), top=1)[0].top[0][:2] == (0, None)


@pytest.mark.parametrize("batch", [(1, 1), (1, 2), (1, 8), (2, 2), (3, 4), (4, 4)])
def test_classify_answers_every_image_in_order_at_any_batch_range(tmp_path: Path, batch: tuple[int, int]) -> None:
    session = open_session(write_tiny(tmp_path / "b", batch).path)
    names = ["red", "green", "blue", "dark", "blue"]
    predictions = session.classify(colour_files(tmp_path, names), top=1)
    assert [p.top[0][1] for p in predictions] == names


def test_classify_returns_nothing_for_no_files(bundle: Path) -> None:
    assert open_session(bundle).classify([]) == []


def test_classify_refuses_top_zero(bundle: Path) -> None:
    assert code_of(open_session(bundle).classify, [], top=0) == "top"


def test_classify_names_the_file_that_is_missing(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.jpg") as caught:
        open_session(bundle).classify([*colour_files(tmp_path, ["red"]), tmp_path / "absent.jpg"])
    assert caught.value.code == "image-unreadable"


def test_classify_warns_about_transparency_and_goes_on(bundle: Path, tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 10)).save(tmp_path / "a.png")
    with pytest.warns(EdgepruneWarning, match="transparency"):
        (prediction,) = open_session(bundle).classify([tmp_path / "a.png"])
    assert prediction.top[0][1] == "red"


def edit_manifest(bundle: Path, change: Any) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    change(data)
    (bundle / "manifest.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(batch=[1, 64]),
        lambda m: m.update(batch=[2, 2]),
        lambda m: m["preprocessing"].update(image_size=[16, 16]),
        lambda m: m["graphs"]["model"]["inputs"][0].update(shape=[1, 3, 16, 16]),
        lambda m: m["graphs"]["model"]["outputs"][0].update(name="scores"),
        lambda m: m["graphs"]["model"]["outputs"][0].update(shape=[1, 5]),
        lambda m: m["graphs"]["model"]["outputs"][1].update(dtype="int64"),
        lambda m: m["graphs"]["model"]["outputs"].pop(),
    ],
)
def test_session_refuses_a_manifest_that_describes_another_graph(bundle: Path, change: Any) -> None:
    edit_manifest(bundle, change)
    assert code_of(open_session, bundle) == "bundle-tampered"


@pytest.mark.parametrize("target", ["ort-cpu-int4", "nonsense"])
def test_session_names_a_target_it_cannot_run(bundle: Path, target: str) -> None:
    edit_manifest(bundle, lambda m: m.update(target=target))
    with pytest.raises(EnvironmentLackError, match=target) as caught:
        open_session(bundle)
    assert caught.value.code == "target-not-runnable"


def test_session_runs_the_portable_target(tmp_path: Path) -> None:
    assert open_session(write_tiny(tmp_path / "b", target="onnx").path).run(random_images(1)).logits.shape == (1, 4)


def write_model(out: Path, model: onnx.ModelProto, **extra: Any) -> Path:
    with BundleWriter(out) as writer:
        (writer.path / "model.onnx").write_bytes(model.SerializeToString())
        return writer.finish(manifest_fields({"model": graph_info(model, "model.onnx")}, **extra)).path


def test_session_gives_the_engines_words_when_it_refuses_the_graph(tmp_path: Path) -> None:
    model = tiny_model()
    model.graph.node[2].op_type = "NoSuchOp"
    with pytest.raises(InputError) as caught:
        open_session(write_model(tmp_path / "b", model))
    assert caught.value.code == "graph-invalid"
    assert str(caught.value).index("cannot load") < str(caught.value).index("NoSuchOp")


def test_session_refuses_a_graph_without_logits(tmp_path: Path) -> None:
    model = tiny_model(kept=False)
    model.graph.node[2].output[0] = model.graph.output[0].name = "scores"
    assert code_of(open_session, write_model(tmp_path / "b", model)) == "graph-invalid"


def test_run_gives_the_engines_words_when_the_graph_fails(tmp_path: Path) -> None:
    model = tiny_model((1, 2))
    model.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(np.array([1, 4], np.int64), "flat"))
    session = open_session(write_model(tmp_path / "b", model, batch=(1, 2)))
    assert code_of(session.run, random_images(2)) == "graph-invalid"


def test_missing_onnxruntime_names_the_extra(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EnvironmentLackError, match="onnxruntime") as caught:
        open_session(bundle)
    assert "edgeprune[ort]" in str(caught.value.hint)


@pytest.mark.parametrize(("spinning", "entries"), [(True, {"allow": "1"}), (False, {"allow": "0", "stop": "1"})])
def test_spinning_reaches_the_engine(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, spinning: bool, entries: dict[str, str]
) -> None:
    real = ort.import_onnxruntime()
    made: list[Any] = []

    class Options(real.SessionOptions):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(real, "SessionOptions", Options)
    Session(bundle, threads=3, spinning=spinning)
    (options,) = made
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == entries["allow"]
    if "stop" in entries:
        assert options.get_session_config_entry("session.force_spinning_stop") == entries["stop"]
    else:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry("session.force_spinning_stop")
