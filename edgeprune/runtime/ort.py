"""ONNX Runtime behind `Session`: the only module that imports onnxruntime to run a bundle."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from edgeprune.errors import InputError, missing_package
from edgeprune.runtime.manifest import TensorInfo

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
}


def import_onnxruntime() -> ModuleType:
    """Return onnxruntime.

    Raises:
        EnvironmentLackError: `package-missing` when it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_package("onnxruntime", "ort", "running a bundle") from error
    return onnxruntime


class OrtBackend:
    """One graph in ONNX Runtime.

    Args:
        model_path: the .onnx file; its weights lie beside it.
        threads: threads inside an operator; 0 lets ONNX Runtime take every core.
        spinning: idle threads wait in a busy loop: lower latency, at the cost of everything else that runs.
        providers: execution providers, first choice first; with their options as pairs.
        prepack: rearrange the weights for the processor, which costs another copy of them. Without, graphs that share
            a weight file share its memory too, and run some 10 % slower.
        graph: the graph to run in place of the file's; its weights are those beside the file.
        profile: start of the name of a file that takes down what every node takes; see `end_profiling`.

    Raises:
        InputError: `graph-invalid` when ONNX Runtime refuses the graph.
        EnvironmentLackError: `package-missing`.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        threads: int = 0,
        spinning: bool = True,
        providers: Sequence[str | tuple[str, Mapping[str, str]]] = ("CPUExecutionProvider",),
        prepack: bool = True,
        graph: bytes | None = None,
        profile: Path | None = None,
    ) -> None:
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
        if not spinning:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if not prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = f"{profile}-{model_path.stem}"
        if graph is not None:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(model_path.parent)
            )
        self._path = model_path
        try:
            self._session = ort.InferenceSession(graph or str(model_path), options, providers=list(providers))
        except Exception as error:  # the binding's exceptions share no public base
            raise self._refusal("cannot load", error) from error
        self.inputs = _describe(self._session.get_inputs())
        self.outputs = _describe(self._session.get_outputs())

    def run(self, feeds: Mapping[str, np.ndarray], keep: Collection[str] = ()) -> dict[str, np.ndarray]:
        """Return every output by name; several threads may call it at once.

        Args:
            feeds: every input by name, as the graph says.
            keep: makes no difference here.

        Raises:
            InputError: `graph-invalid` when the graph fails while it runs.
        """
        try:
            values = self._session.run(None, feeds)
        except Exception as error:
            raise self._refusal("cannot run", error) from error
        return {info.name: value for info, value in zip(self.outputs, values, strict=True)}

    def end_profiling(self) -> Path:
        """Return the file with what every node took, a list of events as JSON; to be called once."""
        return Path(self._session.end_profiling())

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Return some parts as one array."""
        return np.concatenate(parts)

    def _refusal(self, what: str, error: Exception) -> InputError:
        return InputError(
            f"ONNX Runtime {what} {self._path}: {error}",
            code="graph-invalid",
            expected="a graph exported for a target that ONNX Runtime runs",
            hint="export the bundle again",
            details={"graph": str(self._path)},
        )


def _describe(values: Sequence[Any]) -> list[TensorInfo]:
    """Return ONNX Runtime's inputs or outputs in the manifest's terms."""
    return [
        TensorInfo(
            name=value.name,
            dtype=_DTYPES.get(value.type, value.type),
            shape=[side if isinstance(side, int) else -1 for side in value.shape],
        )
        for value in values
    ]
