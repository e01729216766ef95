"""What a target is: a dialect, graph passes, lint rules and what the machine must have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from edgeprune.errors import EnvironmentLackError

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from edgeprune.export.emit.dialects.plain import PlainDialect
    from edgeprune.export.lint import Rule

GraphPass = Callable[["gs.Graph"], "gs.Graph"]


@dataclass(frozen=True)
class Target:
    """One row of `edgeprune targets`. Nothing heavy is imported until a graph is made.

    Attributes:
        backend: what runs the graph.
        opset: default version of the standard operators.
        opsets: versions `--opset` may ask for.
        packages: what running it needs, each (import name, extra).
        domains: operator domains the backend knows besides the standard one.
        selections: forms of the selection it takes, the default first.
        adaptive_form: how a method whose token counts depend on the image runs unless somebody asks for another form.
        takes_slots: token counts may be an input of the graph at no cost, so that one graph serves several.
        bucket_multiple: token counts it likes are multiples of it.
        ir_version: of the files; the parser of TensorRT 8.6 knows 8.
        bodies: plugin nodes carry their body as a function; engines that prefer it to the plugin get none.
        told: a graph that is told its token counts stands beside the buckets', to be chosen from on the device.
        device: what it runs on when that is not this machine's processor, "tensorrt" or "cuda".
        quantizes: what linear layers become, "int8" or "fp8"; the dialect is then made with a `Quantization`.
    """

    name: str
    backend: str
    precision: str
    summary: str
    opset: int
    opsets: tuple[int, ...]
    domains: tuple[str, ...]
    packages: tuple[tuple[str, str], ...]
    selections: tuple[str, ...] = ("native", "plugin")
    adaptive_form: str = "slots"
    takes_slots: bool = False
    bucket_multiple: int = 8
    ir_version: int = 10
    bodies: bool = True
    told: bool = False
    device: str | None = None
    quantizes: str | None = None
    dialect: Callable[..., PlainDialect] | None = None
    passes: Callable[[str, tuple[int, int]], tuple[GraphPass, ...]] | None = None
    rules: Callable[[], tuple[Rule, ...]] | None = None

    def why_not_runnable(self) -> str | None:
        """Return why bundles for the target cannot run on this machine, None when they can; nothing is loaded."""
        if self.device is None:
            return self.why_unavailable()
        from edgeprune.runtime.cuda import find_device

        try:
            find_device()
        except EnvironmentLackError as error:
            return error.message
        package, extra = {"tensorrt": ("tensorrt", "trt"), "cuda": ("onnxruntime", "cuda")}[self.device]
        return None if find_spec(package) is not None else f"package '{package}' is missing, see extra '{extra}'"

    def why_unavailable(self) -> str | None:
        """Return why the target cannot be used here, None when it can."""
        for package, extra in self.packages:
            if find_spec(package) is None:
                return f"package '{package}' is missing: pip install 'edgeprune[{extra}]'"
        return None
