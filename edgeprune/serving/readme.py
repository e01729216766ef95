"""README.md of a model repository: how to start Triton on it, and what is in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.runtime.bundle import Bundle

if TYPE_CHECKING:
    from edgeprune.serving.repository import Repository

IMAGE = "nvcr.io/nvidia/tritonserver"
ONNX_TAG = "25.06-py3"
# Monthly images whose TensorRT was seen named in public files; an engine loads in no other version.
TAGS = {"10.3": "24.08-py3", "10.8": "25.01-py3", "10.9": "25.03-py3", "10.11": "25.06-py3", "10.14": "25.11-py3"}
UNKNOWN_TAG = "YY.MM-py3"


def readme(bundle: Bundle, written: Repository) -> str:
    """Return the text."""
    manifest = bundle.manifest
    rows = "\n".join(f"| `{name}` | {what} | {backend} |" for name, what, backend in written.models)
    names = ", ".join(f"`{name}`" for name in written.public)
    command = run_line(manifest.target, written.tensorrt, written.plugin)
    parts = [
        f"# Model repository for Triton: {written.public[0]}\n",
        f"{manifest.model.name}, method {manifest.method.name}, target {manifest.target}; written by edgeprune "
        f"{manifest.tool_version} with `edgeprune serve-repo`. Clients call {names}; the others are called by it.\n",
        f"| model | what | backend |\n|---|---|---|\n{rows}\n",
        "## Start\n",
        f"In this folder:\n\n```sh\n{command}\n```\n",
        *_notes(written),
        "## Ask\n",
        f"```sh\npip install 'tritonclient[grpc]' numpy pillow\npython client.py --model {written.public[0]} "
        "photo.jpg\n```\n",
        "`images` is float32 [batch, 3, height, width], normalised as `edgeprune.json` says; the outputs are those of "
        "`edgeprune.Session`. Numbers that are one for each image are columns [batch, 1].\n",
    ]
    return "\n".join(parts)


def run_line(target: str, tensorrt: str | None, plugin: str | None) -> str:
    """Return the command that starts Triton in the repository."""
    words = ["docker run --rm"]
    if tensorrt is not None or target.startswith("ort-cuda"):
        words.append("--gpus all")
    words += ["--shm-size=256m", "-p 8000:8000 -p 8001:8001 -p 8002:8002", '-v "$PWD:/models:ro"']
    words += [f"{IMAGE}:{tag_for(tensorrt)}", "tritonserver", "--model-repository=/models"]
    words.append("--disable-auto-complete-config")
    if plugin is not None:
        words.append(f"--backend-config=tensorrt,plugins=/models/{plugin}")
    return " ".join(words)


def tag_for(tensorrt: str | None) -> str:
    """Return the image for engines of a TensorRT, a pattern where it is not known."""
    return ONNX_TAG if tensorrt is None else TAGS.get(".".join(tensorrt.split(".")[:2]), UNKNOWN_TAG)


def _notes(written: Repository) -> list[str]:
    notes = [
        "Port 8000 is HTTP, 8001 gRPC, 8002 metrics. Weights that graphs share are one file with several names; copy "
        "with `cp -a` or `rsync -H` to keep it so.\n"
    ]
    if written.tensorrt is not None:
        notes.append(
            f"The engines load in TensorRT {written.tensorrt} alone, on the GPU they were built on. Take the image of "
            "that TensorRT (NVIDIA's support matrix lists them); on a Jetson the one whose name ends in -igpu.\n"
        )
    if written.plugin is not None:
        notes.append(
            f"`{written.plugin}` is opened before any engine is read, and registers edgeprune's plugin. Where "
            f"Triton is too old to know that option, give docker `-e LD_PRELOAD=/models/{written.plugin}` instead.\n"
        )
    if any(backend == "python" for _, _, backend in written.models):
        notes.append(
            "The model in front is Python and runs on the processor: what the stem hands to the rest passes through "
            "main memory.\n"
        )
    return notes
