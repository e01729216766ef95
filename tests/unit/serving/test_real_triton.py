"""Repositories in the real Triton, of the Python package nvidia-pytriton, which has Triton and its Python backend.

    python3.11 -m venv DIR && DIR/bin/pip install 'nvidia-pytriton==0.5.8' onnxruntime 'numpy<2'
    EDGEPRUNE_TRITON=DIR/lib/python3.11/site-packages pytest tests/unit/serving/test_real_triton.py

That Triton has no backend for ONNX Runtime, so the graphs are run by Python models with ONNX Runtime inside, under the
configs that were written. Its Python backend passes nothing on with numpy 2.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format

from edgeprune import Session
from edgeprune.export import ExportRequest, export_model
from edgeprune.serving import ServeOptions, write_repository
from tests.helpers.fake_triton import read_config
from tests.unit.serving.test_repository import REQUESTS, images_for

PACKAGES = Path(os.environ.get("EDGEPRUNE_TRITON", "nowhere"))
SERVER = PACKAGES / "pytriton" / "tritonserver"
FUTURE = "from __future__ import annotations\n"
GRAPH = """
import json
from pathlib import Path
import onnxruntime
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.session = onnxruntime.InferenceSession(str(Path(__file__).with_name("model.onnx")))

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        names = [value.name for value in self.session.get_inputs()]
        feeds = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in names}
        outputs = zip(self.session.get_outputs(), self.session.run(None, feeds))
        return pb_utils.InferenceResponse([pb_utils.Tensor(info.name, value) for info, value in outputs])
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SERVER.is_dir(), reason="EDGEPRUNE_TRITON names no folder with nvidia-pytriton"),
]


def without_onnx_backend(repository: Path) -> None:
    """Put Python models in the place of graphs, and their packages before others."""
    first = f"import sys; sys.path.insert(0, {str(PACKAGES)!r})\n"
    for folder in (path for path in repository.iterdir() if path.is_dir()):
        config, model = read_config(folder), folder / "1" / "model.py"
        if config.backend == "onnxruntime":
            config.backend, config.default_model_filename = "python", "model.py"
            (folder / "config.pbtxt").write_text(text_format.MessageToString(config))
            model.write_text(first + GRAPH)
        else:
            model.write_text(model.read_text().replace(FUTURE, FUTURE + first))


def free_port() -> int:
    with closing(socket.socket()) as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@contextmanager
def running(repository: Path, work: Path) -> Iterator[Any]:
    """Yield a client of the server on a repository."""
    import tritonclient.grpc as triton

    backends, port = work / "backends", free_port()
    shutil.copytree(SERVER / "backends", backends)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(SERVER / "python_backend_stubs" / version / "triton_python_backend_stub", backends / "python")
    libraries = [Path(sys.base_prefix) / "lib", PACKAGES / "nvidia_pytriton.libs"]
    command = [SERVER / "bin" / "tritonserver", f"--model-repository={repository}", f"--backend-directory={backends}"]
    command += ["--disable-auto-complete-config", "--grpc-address=127.0.0.1", f"--grpc-port={port}"]
    command += ["--allow-http=false", "--allow-metrics=false"]
    environment = {**os.environ, "PYTHONHOME": sys.base_prefix, "LD_LIBRARY_PATH": ":".join(map(str, libraries))}
    with (work / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        client = triton.InferenceServerClient(f"127.0.0.1:{port}")
        for _ in range(60):
            if server.poll() is not None:
                raise AssertionError((work / "log").read_text()[-4000:])
            try:
                if client.is_server_ready():
                    break
            except triton.InferenceServerException:  # not listening yet
                pass
            time.sleep(1)
        yield client
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.parametrize("name", ["buckets", "buckets, told", "buckets of two", "computed", "four", "dynamic"])
def test_the_real_server_serves_what_a_session_computes(name: str, tmp_path: Path) -> None:
    import tritonclient.grpc as triton

    bundle = export_model(ExportRequest(**REQUESTS[name]), tmp_path / "bundle")
    write_repository(bundle, tmp_path / "repository", ServeOptions(name="digits", instances=2))
    without_onnx_backend(tmp_path / "repository")
    images = images_for(bundle, bundle.manifest.batch[1])
    expected = Session(bundle, threads=1).run(images)
    with running(tmp_path / "repository", tmp_path) as client:

        def ask(part: np.ndarray) -> Any:
            tensor = triton.InferInput("images", list(part.shape), "FP32")
            tensor.set_data_from_numpy(part)
            return client.infer("digits", [tensor])

        whole = ask(images)
        np.testing.assert_allclose(whole.as_numpy("logits"), expected.logits, rtol=1e-4, atol=1e-5)
        if expected.bucket is not None:
            np.testing.assert_array_equal(whole.as_numpy("bucket").ravel(), expected.bucket)
        with ThreadPoolExecutor(8) as pool:
            singles = list(pool.map(lambda i: ask(images[i % len(images) :][:1]).as_numpy("logits")[0], range(40)))
        for i, logits in enumerate(singles):
            np.testing.assert_allclose(logits, expected.logits[i % len(images)], rtol=1e-4, atol=1e-5)
        stats = client.get_inference_statistics("digits").model_stats[0]
        assert stats.inference_count >= 40 + len(images)  # warm-up counts too
        assert stats.execution_count < 41, "the server gathered nothing"
