"""A repository serves what a session computes, through the published config schema and a stand-in for the server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprune import Session
from edgeprune.data.preprocess import preprocess
from edgeprune.errors import EdgepruneError
from edgeprune.export import ExportRequest, export_model
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.manifest import PreprocessInfo
from edgeprune.serving import ServeOptions, triton_client, write_repository
from edgeprune.serving.pbtxt import Word, render
from tests.helpers.bundles import write_tiny
from tests.helpers.engines import EngineSpec, own_engines, write_engines
from tests.helpers.fake_triton import FakeTriton, ModelError, read_config
from tests.helpers.fake_trt import install
from tests.helpers.trt_bundles import write_for_tensorrt, write_two_buckets

MODEL: dict[str, Any] = {
    "model": "vit_digits", "model_options": {"depth": 3}, "random_weights": True, "seed": 4, "verify": False,
}  # fmt: skip
SAIT = {**MODEL, "method": "sait", "method_options": {"mass": "0.8"}, "stages": "1,2"}
EVIT = {**MODEL, "method": "evit", "keep_rate": 0.7, "stages": "1", "token_outputs": True}
REQUESTS: dict[str, dict[str, Any]] = {
    "buckets": {**SAIT, "target": "onnx", "buckets": "36,39", "batch": (1, 6)},
    "buckets, told": {**SAIT, "target": "ort-cpu", "buckets": "36,39", "batch": (1, 4)},
    "buckets, filled": {**SAIT, "target": "onnx", "buckets": "36,39", "fill": "next-best", "batch": (1, 3)},
    "buckets of two": {**SAIT, "target": "onnx", "buckets": "36,39", "batch": (2, 2)},
    "computed": {**SAIT, "target": "ort-cpu", "adaptive": "computed", "batch": (1, 3)},
    "slots": {**SAIT, "target": "onnx", "batch": (1, 2)},
    "one": {**EVIT, "target": "ort-cpu"},
    "dynamic": {**EVIT, "target": "onnx", "batch": (1, 4)},
    "four": {**EVIT, "target": "ort-cpu", "batch": (4, 4)},
}
DENSITIES = {**MODEL, "method": "evit", "densities": (1.0, 0.7, 0.5), "stages": "1", "target": "ort-cpu"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    found: dict[str, Bundle] = {}

    def export(name: str) -> Bundle:
        if name not in found:
            request = REQUESTS.get(name, DENSITIES)
            found[name] = export_model(ExportRequest(**request), tmp_path_factory.mktemp("bundles") / "digits")
        return found[name]

    return export


def images_for(bundle: Bundle, count: int, seed: int = 0) -> np.ndarray:
    """Return images of which some are plain, so that they need few tokens and others many."""
    rng = np.random.default_rng(seed)
    made = rng.normal(size=(count, 3, *bundle.manifest.preprocessing.image_size)).astype(np.float32)
    return made * rng.uniform(0.0, 3.0, size=(count, 1, 1, 1)).astype(np.float32)


def assert_same(served: dict[str, np.ndarray], bundle: Bundle, images: np.ndarray, **options: Any) -> None:
    result = Session(bundle, threads=1, **options).run(images)
    np.testing.assert_allclose(served["logits"], result.logits, rtol=1e-4, atol=1e-5)
    kept = [value for name, value in served.items() if name.startswith("kept_indices_")]
    for ours, theirs in zip(kept, result.kept, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for name, expected in (
        ("kept_counts", result.kept_counts),
        ("overflow", result.overflow),
        ("bucket", result.bucket),
    ):
        if expected is not None:
            np.testing.assert_array_equal(served[name].reshape(expected.shape), expected)


@pytest.mark.parametrize("name", REQUESTS)
def test_a_repository_serves_what_a_session_computes(
    exported: Callable[[str], Bundle], name: str, tmp_path: Path
) -> None:
    bundle = exported(name)
    written = write_repository(bundle, tmp_path / "repository", ServeOptions(name="digits"))
    server = FakeTriton(tmp_path / "repository")
    count = bundle.manifest.batch[1]
    for seed in range(3):
        images = images_for(bundle, count, seed)
        assert_same(server.infer(written.public[0], images), bundle, images)


def test_requests_are_routed_together_and_answered_apart(exported: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle = exported("buckets")
    write_repository(bundle, tmp_path / "repository", ServeOptions(name="digits"))
    server = FakeTriton(tmp_path / "repository")
    images = images_for(bundle, 6)
    parts = [images[:1], images[1:4], images[4:]]
    answers = server.infer_many("digits", parts)
    stems = [count for model, count in server.calls if model == "digits_stem"]
    assert stems == [6]
    for part, answer in zip(parts, answers, strict=True):
        assert_same(answer, bundle, part)
    buckets = {int(b) for answer in answers for b in answer["bucket"].ravel()}
    assert len(buckets) > 1, "the images do not test the routing"


def test_a_smaller_batch_is_filled_up(exported: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle = exported("four")
    write_repository(bundle, tmp_path / "repository", ServeOptions(name="digits"))
    server = FakeTriton(tmp_path / "repository")
    images = images_for(bundle, 4)
    np.testing.assert_allclose(
        server.infer("digits", images[:3])["logits"], Session(bundle).run(images).logits[:3], rtol=1e-4, atol=1e-5
    )
    assert server.calls == [("digits", 3), ("digits_model", 4)]


def test_every_density_is_a_model(exported: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle = exported("densities")
    written = write_repository(bundle, tmp_path / "repository", ServeOptions(name="digits", dense=True))
    assert written.public == ("digits_1", "digits_0.7", "digits_0.5", "digits_dense")
    server = FakeTriton(tmp_path / "repository")
    images = images_for(bundle, 1)
    for rate in (1.0, 0.7, 0.5):
        served = server.infer(f"digits_{rate:g}", images)
        np.testing.assert_allclose(
            served["logits"], Session(bundle, density=rate).run(images).logits, rtol=1e-4, atol=1e-5
        )


def test_a_failing_graph_fails_the_requests(exported: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle = exported("buckets")
    write_repository(bundle, tmp_path / "repository", ServeOptions(name="digits"))
    server = FakeTriton(tmp_path / "repository")
    del server.graphs["digits_stem"]
    with pytest.raises(ModelError, match="digits_stem"):
        server.infer("digits", images_for(bundle, 1))


def test_weights_are_written_once(exported: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle = exported("buckets")
    write_repository(bundle, tmp_path / "repository", ServeOptions(name="digits"))
    weights = list((tmp_path / "repository").rglob("*.data"))
    assert len(weights) == 4
    assert len({path.stat().st_ino for path in weights}) == 1


def test_options_stand_in_the_configs(exported: Callable[[str], Bundle], tmp_path: Path) -> None:
    options = ServeOptions(name="digits", instances=3, threads=2, delay_us=250)
    write_repository(exported("dynamic"), tmp_path / "repository", options)
    config = read_config(tmp_path / "repository" / "digits")
    assert config.max_batch_size == 4
    assert list(config.dynamic_batching.preferred_batch_size) == [2, 4]
    assert config.dynamic_batching.max_queue_delay_microseconds == 250
    assert config.instance_group[0].count == 3
    assert config.parameters["intra_op_thread_count"].string_value == "2"


def test_labels_are_written(tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "bundle", labels=["red", "a\nb", "blue", "dark"])
    write_repository(bundle, tmp_path / "repository", ServeOptions(name="tiny"))
    folder = tmp_path / "repository" / "tiny"
    outputs = {output.name: output.label_filename for output in read_config(folder).output}
    assert (folder / outputs["logits"]).read_text().splitlines() == ["red", "a b", "blue", "dark"]


def test_the_name_is_that_of_the_folder(tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "my tiny bundle")
    assert write_repository(bundle, tmp_path / "repository", ServeOptions()).public == ("my_tiny_bundle",)


def refused(call: Callable[[], Any]) -> EdgepruneError:
    with pytest.raises(EdgepruneError) as caught:
        call()
    return caught.value


def test_a_repository_replaces_only_a_repository(tmp_path: Path) -> None:
    bundle, out = write_tiny(tmp_path / "bundle"), tmp_path / "repository"
    write_repository(bundle, out, ServeOptions(name="first"))
    assert refused(lambda: write_repository(bundle, out, ServeOptions())).code == "output-exists"
    write_repository(bundle, out, ServeOptions(name="second"), overwrite=True)
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["second"]
    code = refused(lambda: write_repository(bundle, bundle.path, ServeOptions(), overwrite=True)).code
    assert code == "output-not-a-repository"


def test_nothing_is_left_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*paths: Any) -> None:
        raise OSError(28, "No space left on device")

    bundle = write_tiny(tmp_path / "bundle")
    monkeypatch.setattr("edgeprune.serving.repository.shutil.copyfile", broken)
    assert refused(lambda: write_repository(bundle, tmp_path / "repository", ServeOptions())).code == "disk-full"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_bad_name_is_refused(tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "bundle")
    error = refused(lambda: write_repository(bundle, tmp_path / "repository", ServeOptions(name="a/b")))
    assert (error.code, error.exit_code) == ("serving-name", 2)
    assert not (tmp_path / "repository").exists()


def test_engines_are_models_of_the_tensorrt_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, "11.4.0")
    bundle = write_two_buckets(tmp_path / "bundle")
    specs = [
        EngineSpec("stem", (("stem", 1, None), ("stem", 2, None))),
        EngineSpec("rest", tuple((f"rest_{k}", batch, (k,)) for k in (2, 4) for batch in (1, 2))),
    ]
    write_engines(bundle, fake, specs)
    written = write_repository(bundle, tmp_path / "repository", ServeOptions(name="tiny"))
    assert written.tensorrt == "11.4.0"
    configs = {path.parent.name: read_config(path.parent) for path in (tmp_path / "repository").glob("*/config.pbtxt")}
    assert {name: config.backend for name, config in configs.items()} == {
        "tiny": "python", "tiny_stem": "tensorrt", "tiny_rest": "tensorrt",
    }  # fmt: skip
    rest = configs["tiny_rest"]
    assert list(rest.instance_group[0].profile) == ["0", "1", "2", "3"]
    assert [i.is_shape_tensor for i in rest.input] == [False, False, True]
    assert [sample.inputs["slots"].input_data_file for sample in rest.model_warmup] == [
        "zeros_1_2", "zeros_2_2", "zeros_1_4", "zeros_2_4",
    ]  # fmt: skip
    raw = (tmp_path / "repository/tiny_rest/warmup/zeros_1_4").read_bytes()
    assert np.frombuffer(raw, np.int64).tolist() == [4]
    route = json.loads((tmp_path / "repository/tiny/1/route.json").read_text())
    assert route["graphs"]["rest_4"]["models"] == [["tiny_rest", [1, 2]]]
    assert configs["tiny"].max_batch_size == 2
    text = (tmp_path / "repository/README.md").read_text()
    assert "--gpus all" in text and "YY.MM-py3" in text and "TensorRT 11.4.0 alone" in text


def test_engines_of_an_unknown_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_for_tensorrt(tmp_path / "bundle")
    out = tmp_path / "repository"
    assert refused(lambda: write_repository(bundle, out, ServeOptions())).code == "engine-missing"
    for version in ("8.6.0", "11.4.0"):
        with pytest.MonkeyPatch.context() as patch:
            write_engines(bundle, install(patch, version), own_engines(bundle, [1]))
    error = refused(lambda: write_repository(bundle, out, ServeOptions()))
    assert error.code == "engines" and len(error.details["engines"]) == 2
    written = write_repository(bundle, out, ServeOptions(engines=error.details["engines"][0]))
    assert written.models == (("bundle", "engine", "tensorrt"),)


def test_an_engine_with_the_plugin_wants_a_library_that_registers_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = install(monkeypatch, "11.4.0")
    bundle = write_for_tensorrt(tmp_path / "bundle", plugin=True)
    spec = EngineSpec("model_plugin", (("model", 1, None),), plugins=("GatherTokens",))
    write_engines(bundle, fake, [spec])
    index = next(bundle.path.glob("engines/*/index.json"))
    index.write_text(index.read_text().replace('"plugin":false', '"plugin":true'))
    library = tmp_path / "libedgeprune_trt10.so"
    options = ServeOptions(plugin=library)
    out = tmp_path / "repository"
    assert refused(lambda: write_repository(bundle, out, options)).code == "plugin-missing"
    head = b"\x7fELF\x02\x01\x01" + bytes(11) + (62).to_bytes(2, "little")
    library.write_bytes(head + bytes(100))
    error = refused(lambda: write_repository(bundle, out, options))
    assert error.code == "plugin-not-registering" and "--self-register" in str(error.hint)
    library.write_bytes(head + b"\0libnvinfer.so.10\0")
    written = write_repository(bundle, out, options)
    assert written.plugin == library.name and (out / library.name).read_bytes() == library.read_bytes()
    assert f"--backend-config=tensorrt,plugins=/models/{library.name}" in (out / "README.md").read_text()


def test_bfloat16_between_stem_and_rest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, "11.4.0")
    bundle = write_two_buckets(tmp_path / "bundle")
    write_engines(bundle, fake, own_engines(bundle, [1]))
    for info in bundle.manifest.graphs["stem"].outputs:
        object.__setattr__(info, "dtype", "bfloat16")
    assert refused(lambda: write_repository(bundle, tmp_path / "out", ServeOptions())).code == "serving-bfloat16"


def test_the_client_prepares_images_as_edgeprune_does() -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    for size, crop, way in (((32, 48), 0.875, "bicubic"), ((64, 64), 1.0, "bilinear"), ((224, 224), 0.9, "lanczos")):
        info = PreprocessInfo(
            image_size=size, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), crop_pct=crop, interpolation=way
        )
        image = Image.fromarray(pixels)
        np.testing.assert_array_equal(triton_client.to_input(image, info.model_dump()), preprocess(image, info))


def test_the_client_asks_a_server(exported: Callable[[str], Bundle], tmp_path: Path) -> None:
    import grpc
    from PIL import Image
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    bundle = exported("buckets")
    write_repository(bundle, tmp_path / "repository", ServeOptions(name="digits"))
    server = FakeTriton(tmp_path / "repository")

    class Service(service_pb2_grpc.GRPCInferenceServiceServicer):
        def ModelInfer(self, request: Any, context: Any) -> Any:
            raw = np.frombuffer(request.raw_input_contents[0], np.float32).reshape(request.inputs[0].shape)
            logits = server.infer(request.model_name, raw)["logits"]
            answer = service_pb2.ModelInferResponse(model_name=request.model_name)
            answer.outputs.add(name="logits", datatype="FP32", shape=logits.shape)
            answer.raw_output_contents.append(logits.tobytes())
            return answer

    listening = grpc.server(futures.ThreadPoolExecutor(1))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(), listening)
    port = listening.add_insecure_port("127.0.0.1:0")
    listening.start()
    try:
        pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photo.png")
        command = [sys.executable, str(tmp_path / "repository" / "client.py"), str(tmp_path / "photo.png")]
        command += ["--url", f"127.0.0.1:{port}", "--top", "1"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    finally:
        listening.stop(None)
    assert done.returncode == 0, done.stderr
    best, _, share = Session(bundle).classify(tmp_path / "photo.png", top=1)[0].top[0]
    assert done.stdout == f"{tmp_path / 'photo.png'}: {best} {share:.3f}\n"


def test_text_form() -> None:
    text = render({"a": Word("ONE"), "b": [1, 2], "c": True, "d": 'say "x"', "e": [{"f": 1}, {"f": []}]})
    assert text == 'a: ONE\nb: [1, 2]\nc: true\nd: "say \\"x\\""\ne {\n  f: 1\n}\ne {\n  f: []\n}\n'
