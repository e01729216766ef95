"""One engine from one graph, in the building process: the only module that calls TensorRT's builder.

What a version of TensorRT can do is asked of its module, never told from its number. The types are those of the graph:
binding where TensorRT knows strongly typed networks, else by a constraint on every layer.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from edgeprune.errors import BuildError, EnvironmentLackError
from edgeprune.export.trt import timing_cache
from edgeprune.export.trt.job import Built, Job
from edgeprune.export.trt.proof import prove
from edgeprune.plugins.loader import import_tensorrt, load_plugins
from edgeprune.runtime.cuda import find_device
from edgeprune.runtime.router import SLOTS

PRECISION_FLAGS = {"fp16": "FP16", "bf16": "BF16"}  # of BuilderFlag, where networks cannot be strongly typed
QUANTIZED = ("int8", "fp8")  # by the graph alone: no flag, no calibrator
FLOATS = ("FLOAT", "HALF", "BF16")
BUILTIN_TACTICS = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
# layers whose precision says nothing: they change or make a type, or compute shapes, or bring their own kernel
UNCONSTRAINED = ("CONSTANT", "SHAPE", "CAST", "IDENTITY", "PLUGIN", "PLUGIN_V2", "PLUGIN_V3")
REASONS = 8  # of TensorRT's errors in ours
_ATTENTION = re.compile(r"blocks\.(\d+)\.attn\.softmax")
_MEMORY = re.compile(r"out ?of ?memory|insufficient (memory|workspace)|cudaErrorMemoryAllocation", re.IGNORECASE)

Report = Callable[[str, float], None]


def build(job: Job, log: TextIO, report: Report) -> Built:
    """Build an engine, write it with its inspector's answer, and return what it is.

    Args:
        job: what to build.
        log: gets everything TensorRT says.
        report: called with (phase, share done) where TensorRT tells.

    Raises:
        EnvironmentLackError: `gpu-missing`, `tensorrt-missing`, `tensorrt-version`, the plugin's.
        BuildError: `parse` with the node, `engine-build` with TensorRT's reasons.
    """
    find_device()  # before TensorRT is touched: 8.6.0 crashes without one
    trt = import_tensorrt()
    logger = make_logger(trt, log)
    if job.plugin:
        load_plugins(trt, logger)
    made = make_plan(trt, logger, job, report)
    content = memoryview(made.plan)
    Path(job.engine).write_bytes(content)
    scratch_bytes, answer = inspect(trt, logger, content, job)
    Path(job.layers).write_text(answer, encoding="utf-8")
    return Built(
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=content.nbytes,
        scratch_bytes=scratch_bytes,
        build_s=made.build_s,
        proof=prove(answer, precision=job.precision, blocks=made.blocks, plugin=job.plugin),
        warnings=made.warnings,
    )


@dataclass(frozen=True)
class Made:
    """A plan in memory; network, weights and parser are gone.

    Attributes:
        blocks: attentions of the network.
        build_s: seconds the build took.
    """

    plan: Any
    blocks: int
    build_s: float
    warnings: list[str]


def make_plan(trt: Any, logger: Any, job: Job, report: Report) -> Made:
    """Parse, configure and build.

    Raises:
        EnvironmentLackError: `tensorrt-version`.
        BuildError: `parse`, `engine-build`.
    """
    builder = _made(lambda: trt.Builder(logger), logger, job, "it made no builder")
    network = builder.create_network(creation_flags(trt))
    parser = parse(trt, network, logger, job)
    config = builder.create_builder_config()
    warnings = configure(trt, config, job)
    warnings += constrain_types(trt, network, job.precision)
    add_profiles(builder, config, job)
    path = None if job.timing_cache is None else Path(job.timing_cache)
    warnings += timing_cache.attach(config, path)
    monitor = make_monitor(trt, report)
    if monitor is not None and hasattr(config, "progress_monitor"):
        config.progress_monitor = monitor
    start = time.perf_counter()
    plan = _made(lambda: builder.build_serialized_network(network, config), logger, job, "it made no engine")
    build_s = time.perf_counter() - start
    del parser  # until here: it holds the weights
    if path is not None:
        warnings += timing_cache.save(config, path)
    return Made(plan, attention_blocks(layer.name for layer in layers_of(network)), build_s, warnings)


def make_logger(trt: Any, log: TextIO) -> Any:
    """Return a TensorRT logger that writes into a file; `errors` holds what went wrong."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self._lock = threading.Lock()

        def log(self, severity: Any, msg: str) -> None:
            if severity == trt.ILogger.VERBOSE:
                return
            with self._lock:
                log.write(f"[{getattr(severity, 'name', severity)}] {msg}\n")
                log.flush()
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR) and msg not in self.errors:
                    self.errors.append(msg)

    return Logger()


def make_monitor(trt: Any, report: Report) -> Any:
    """Return a TensorRT progress monitor, None where the version has none."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):
        """Phases may lie in each other and come from several threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, list[Any]] = {}  # name -> [phase around it, steps, steps done]
            self._lock = threading.Lock()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases[phase_name] = [parent_phase, max(num_steps, 1), 0]
                self._tell(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                if phase_name in self._phases:
                    self._phases[phase_name][2] = step + 1
                    self._tell(phase_name)
            return True

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._phases.pop(phase_name, None)

        def _tell(self, name: str) -> None:
            outermost = next(
                (phase for phase, (parent, *_) in self._phases.items() if parent not in self._phases), name
            )
            report(name, self._share(outermost))

        def _share(self, name: str) -> float:
            """Return how much of a phase is done, with the part of its next step that phases in it have done."""
            _, steps, done = self._phases[name]
            inner = max(
                (self._share(phase) for phase, (parent, *_) in self._phases.items() if parent == name), default=0
            )
            return min((done + inner) / steps, 1.0)

    return Monitor()


def creation_flags(trt: Any) -> int:
    """Return the flags of a network: explicit batch and strong typing, each where there is such a flag."""
    members = trt.NetworkDefinitionCreationFlag
    flags = [getattr(members, name) for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED") if hasattr(members, name)]
    return sum(1 << int(flag) for flag in flags)


def is_strongly_typed(trt: Any) -> bool:
    """Return whether the types of a graph can be made binding."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def parse(trt: Any, network: Any, logger: Any, job: Job) -> Any:
    """Read the graph into a network and return the parser, which has to outlive the build.

    Raises:
        BuildError: `parse` with what the parser says of which node.
    """
    parser = trt.OnnxParser(network, logger)
    name = Path(job.graph).name
    if not parser.parse_from_file(job.graph):
        found = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        words = "; ".join(words for words, _ in found) or "; ".join(logger.errors) or "it does not say why"
        raise BuildError(
            f"TensorRT {trt.__version__} cannot parse {name}: {words}",
            code="parse",
            expected="operators and types this version's parser takes",
            hint="`edgeprune inspect` shows the reasons by version; a graph with plugin nodes may do with --selection "
            "native",
            details={"graph": name, "tensorrt": trt.__version__, "errors": [fields for _, fields in found]},
        )
    if network.num_layers == 0:
        raise BuildError(
            f"TensorRT {trt.__version__} read no layer from {name}",
            code="parse",
            expected="a graph of at least one node, its weights beside it",
            hint="copy the bundle again, or export it again",
            details={"graph": name, "tensorrt": trt.__version__, "errors": []},
        )
    return parser


def _parser_error(error: Any) -> tuple[str, dict[str, Any]]:
    """Return one error of the parser in words and as fields; older versions know a node by its number alone."""

    def ask(name: str) -> Any:
        method = getattr(error, name, None)
        return None if method is None else method()

    code = ask("code")
    fields = {
        "node": ask("node_name") or None,
        "number": ask("node"),
        "operator": ask("node_operator") or None,
        "code": getattr(code, "name", str(code)),
        "message": str(ask("desc")),
    }
    number = fields["number"]
    where = (
        f"node '{fields['node']}'" if fields["node"] else f"node number {number}" if (number or 0) >= 0 else "the graph"
    )
    operator = f" ({fields['operator']})" if fields["operator"] else ""
    return f"{where}{operator}, {fields['code']}: {fields['message']}", fields


def configure(trt: Any, config: Any, job: Job) -> list[str]:
    """Set all but types and profiles; return warnings.

    Raises:
        EnvironmentLackError: `tensorrt-version` when this version cannot build the precision at all.
    """
    warnings = []
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if hasattr(trt.BuilderFlag, "TF32"):  # float32 stays float32, the scores of tokens too
        config.clear_flag(trt.BuilderFlag.TF32)
    if job.precision in QUANTIZED and not is_strongly_typed(trt):
        raise EnvironmentLackError(
            f"TensorRT {trt.__version__} builds no {job.precision} engines of typed graphs",
            code="tensorrt-version",
            expected="TensorRT 10 or newer",
            hint="export for trt-fp16",
        )
    if job.precision in PRECISION_FLAGS and not is_strongly_typed(trt):
        flag = PRECISION_FLAGS[job.precision]
        if not hasattr(trt.BuilderFlag, flag):
            raise EnvironmentLackError(
                f"TensorRT {trt.__version__} builds no {job.precision} engines",
                code="tensorrt-version",
                expected="TensorRT 10 or newer",
                hint="export for trt-fp16",
            )
        config.set_flag(getattr(trt.BuilderFlag, flag))
        if hasattr(trt.BuilderFlag, "OBEY_PRECISION_CONSTRAINTS"):
            config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    if hasattr(config, "max_aux_streams"):
        config.max_aux_streams = 0  # a run is captured into a CUDA graph on one stream
    if job.optimization_level is not None:
        if hasattr(config, "builder_optimization_level"):
            config.builder_optimization_level = job.optimization_level
        else:
            warnings.append(f"TensorRT {trt.__version__} has no optimization levels: --optimization-level is ignored")
    if job.tactics == "builtin":
        sources = [getattr(trt.TacticSource, name) for name in BUILTIN_TACTICS if hasattr(trt.TacticSource, name)]
        config.set_tactic_sources(sum(1 << int(source) for source in sources))
    return warnings


def constrain_types(trt: Any, network: Any, precision: str) -> list[str]:
    """Where types do not bind by themselves, ask every layer to keep those of the graph; return warnings."""
    if precision not in PRECISION_FLAGS or is_strongly_typed(trt):
        return []
    free = [layer.name for layer in layers_of(network) if not _constrain(trt, layer)]
    if not free:
        return []
    more = f" and {len(free) - 3} more" if len(free) > 3 else ""
    return [f"TensorRT {trt.__version__} chooses the types of these layers itself: {', '.join(free[:3])}{more}"]


def _constrain(trt: Any, layer: Any) -> bool:
    """Set a layer's types to those of its outputs; return whether that could be done where it is of use."""
    outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
    floats = [(i, out) for i, out in enumerate(outputs) if out is not None and out.dtype.name in FLOATS]
    floats = [(i, out) for i, out in floats if not out.is_shape_tensor]
    if not floats or layer.type.name in ("CONSTANT", "SHAPE"):
        return True
    try:
        if layer.type.name not in UNCONSTRAINED:
            layer.precision = floats[0][1].dtype
        for i, out in floats:
            layer.set_output_type(i, out.dtype)
    except Exception:  # the binding raises what it likes
        return False
    return True


def add_profiles(builder: Any, config: Any, job: Job) -> None:
    """Add a profile of one shape for each of the job's; a graph with nothing open has none."""
    for profile in job.profiles:
        if not profile.shapes and profile.slots is None:
            continue
        made = builder.create_optimization_profile()
        for name, shape in profile.shapes.items():
            made.set_shape(name, shape, shape, shape)
        if profile.slots is not None:
            made.set_shape_input(SLOTS, profile.slots, profile.slots, profile.slots)
        config.add_optimization_profile(made)


def layers_of(network: Any) -> Iterator[Any]:
    """Yield the layers of a network."""
    return (network.get_layer(i) for i in range(network.num_layers))


def attention_blocks(names: Iterator[str]) -> int:
    """Return how many attentions a network has, by the names the emitter gives their softmax."""
    return len({match[1] for name in names if (match := _ATTENTION.search(name))})


def inspect(trt: Any, logger: Any, plan: Any, job: Job) -> tuple[int, str]:
    """Return the device memory a context of an engine needs, and its inspector's answer as JSON.

    Raises:
        BuildError: `engine-build` when TensorRT does not take the plan it has just made.
    """
    runtime = trt.Runtime(logger)
    engine = _made(lambda: runtime.deserialize_cuda_engine(plan), logger, job, "it cannot load the engine it made")
    size = getattr(engine, "device_memory_size_v2", None)
    answer = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return int(engine.device_memory_size if size is None else size), str(answer)


def _made(make: Callable[[], Any], logger: Any, job: Job, what: str) -> Any:
    """Return what TensorRT makes.

    Raises:
        BuildError: `engine-build` when it makes nothing, with the errors it logged.
    """
    raised = None
    try:
        made = make()
        if made is not None:
            return made
    except TypeError as error:  # how the binding says that a factory returned nothing
        raised = error
    reasons: Sequence[str] = logger.errors[-REASONS:] or ([str(raised)] if raised else ["TensorRT does not say why"])
    memory = any(_MEMORY.search(reason) for reason in reasons)
    raise BuildError(
        f"TensorRT built no engine of {Path(job.graph).name}, {what}: {'; '.join(reasons)}",
        code="engine-build",
        expected="a kernel for every layer on this device, in the memory there is",
        hint="give a smaller --workspace, or fewer and smaller --batches"
        if memory
        else "try --selection native, another --optimization-level, or --tactic-sources builtin",
        details={"graph": Path(job.graph).name, "reasons": list(reasons)},
    ) from raised
