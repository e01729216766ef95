"""Everything of edgeprune that needs a GPU, by the commands users run, within a time budget.

Bundles of DeiT-S with random weights: static EViT at 0.7 for TensorRT in float16, with standard layers and with the
plugin; SaiT with sharpened attention in buckets; EViT at three densities; EViT for ONNX Runtime's CUDA provider. They
are exported here, or on a machine with torch (`--prepare DIR`) and given (`--bundles DIR`). What cannot run says why;
what there is no time for is listed as not run. After every step the result file is written anew.

    python benchmarks/gpu_check.py [--bundles DIR] [--budget 570]
    python benchmarks/gpu_check.py --prepare DIR
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from _kernels import find_nvcc  # noqa: E402
from _steps import FAILED, LACKS, NOT_RUN, RAN, SKIPPED, Done, Figures, NotDone, Outcome, Step, execute, run_steps  # noqa: E402

from edgeprune.bench.fingerprint import describe_gpu, take_fingerprint  # noqa: E402
from edgeprune.errors import EnvironmentLackError  # noqa: E402
from edgeprune.models.registry import get_model_config  # noqa: E402

SCHEMA = "edgeprune-gpu-check/1"
RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "out" / "gpu_check"
BUDGET_S = 570.0  # ten minutes, less what starting and fetching take
BATCHES = (1, 8, 32)
EFFICIENCY_GOAL, EFFICIENCY_BATCH = 0.9, 8
EVIT = ("--method", "evit", "--random-weights", "--no-verify")
TRT = ("--target", "trt-fp16", "--no-engine")
SAIT_OPTION = "mass=0.9"

# What each bundle is exported with; "{weights}" is a checkpoint that is made first, "{buckets}" are sizes.
BUNDLES: dict[str, tuple[str, ...]] = {
    "static": (*EVIT, "--keep-rate", "0.7", *TRT, "--selection", "auto", "--batch", "1:32"),
    "buckets": (
        *("--method", "sait", "--method-option", SAIT_OPTION, "--checkpoint", "{weights}", "--no-verify"),
        *(*TRT, "--buckets", "{buckets}"),
    ),
    "density": (*EVIT, "--keep-rate", "1,0.7,0.5", *TRT),
    "cuda": (*EVIT, "--keep-rate", "0.7", "--target", "ort-cuda-fp16", "--batch", "1:32"),
}
BUCKET_SHARES = (0.3, 0.5, 0.75)
TENSORRT = ("device", "tensorrt", "pycuda")
# Ways to build a bundle's engines.
WAYS: dict[str, tuple[str, ...]] = {
    "native": ("--selection", "native"),
    "plugin": ("--selection", "plugin"),
    "profiles": ("--selection", "native", "--engines", "profiles"),
    "per-bucket": ("--selection", "native", "--engines", "per-bucket"),
}


@dataclass(frozen=True)
class Setting:
    """What a run is made of.

    Attributes:
        bundles: the folder of the bundles.
        exported: they are exported into it first, where torch is; otherwise they must be there.
        results: where result files go.
        device: slug of the device's name.
        architecture: as nvcc counts, "90"; empty when unknown.
        edgeprune: the command.
        python: the interpreter for tests and scripts.
        tactics: TensorRT's tactic sources.
    """

    bundles: Path
    exported: bool
    results: Path
    device: str
    architecture: str
    edgeprune: tuple[str, ...]
    python: str
    model: str
    tactics: str
    seconds: float


def main() -> None:
    arguments = parse_arguments()
    if arguments.prepare is not None:
        sys.exit(prepare(arguments))
    started = time.monotonic()
    lacking, machine = look_around(arguments.python)
    lacking |= missing_bundles(arguments.bundles)
    slug = re.sub(r"[^a-z0-9]+", "-", str(machine.get("name", "no-device")).lower()).strip("-")
    for need, reason in lacking.items():
        say(f"without {need}: {reason}")
    results = arguments.results or (WORK if "device" in lacking else RESULTS)
    path = results / f"gpu_check.{slug}.json"
    setting = Setting(
        bundles=(arguments.bundles or WORK / "bundles").resolve(),
        exported=arguments.bundles is None,
        results=results.resolve(),
        device=slug,
        architecture=str(machine.get("compute_capability", "")).replace(".", ""),
        edgeprune=tuple(shlex.split(arguments.edgeprune)),
        python=arguments.python,
        model=arguments.model,
        tactics=tactic_sources() if arguments.tactic_sources == "auto" else arguments.tactic_sources,
        seconds=arguments.bench_seconds,
    )
    results.mkdir(parents=True, exist_ok=True)
    setting.bundles.mkdir(parents=True, exist_ok=True)
    steps = [step for step in make_steps(setting) if chosen(step.name, arguments.only)]

    def report(outcomes: list[Outcome]) -> None:
        say(f"  {outcomes[-1].status}{f': {outcomes[-1].reason}' if outcomes[-1].reason else ''}")
        write(path, arguments, machine, outcomes, time.monotonic() - started)

    outcomes = run_steps(
        announced(steps),
        lacking=lacking,
        budget_s=arguments.budget,
        execute=partial(execute, env=environment(), cwd=str(ROOT)),
        clock=time.monotonic,
        report=report,
    )
    print(summary(outcomes))
    print(f"\n{counts(outcomes)}; {path}")
    sys.exit(exit_code(outcomes, lacking))


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--prepare", type=Path, metavar="DIR", help="export the bundles into DIR; needs torch, no GPU")
    where.add_argument("--bundles", type=Path, metavar="DIR", help="bundles that --prepare made")
    parser.add_argument("--model", default="deit_small_patch16_224", help="(default: %(default)s)")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds in all (default: %(default)g)")
    parser.add_argument("--bench-seconds", type=float, default=6.0, help="of a measurement (default: %(default)g)")
    parser.add_argument("--only", metavar="LIST", help="steps or bundles whose names hold one of these: static,kernels")
    parser.add_argument("--results", type=Path, metavar="DIR", help="(default: benchmarks/results)")
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter for kernel tests, which need torch and pytest"
    )
    parser.add_argument(
        "--tactic-sources",
        choices=["auto", "default", "builtin"],
        default="auto",
        help="of the builds; auto leaves cuBLAS and cuDNN out where they are not installed",
    )
    parser.add_argument(
        "--edgeprune", default=f"{shlex.quote(sys.executable)} -m edgeprune", help="(default: this checkout)"
    )
    arguments = parser.parse_args(words)
    if arguments.budget <= 0 or arguments.bench_seconds <= 0:
        parser.error("--budget and --bench-seconds must be above 0")
    if arguments.bundles is not None and not arguments.bundles.is_dir():
        parser.error(f"--bundles: there is no folder {arguments.bundles}")
    return arguments


def prepare(arguments: argparse.Namespace) -> int:
    """Export every bundle; return the exit code."""
    folder: Path = arguments.prepare.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lacking = {need: reason for need, reason in packages(arguments.python).items() if need == "export"}
    setting = Setting(
        *(folder, True, folder, "none", ""),
        *(tuple(shlex.split(arguments.edgeprune)), arguments.python, arguments.model, "default", 0.0),
    )
    steps = [step for step in export_steps(setting, needs=("export",)) if chosen(step.name, arguments.only)]
    run = partial(execute, env=environment(), cwd=str(ROOT))
    outcomes = run_steps(
        announced(steps), lacking=lacking, budget_s=arguments.budget, execute=run, clock=time.monotonic
    )
    weights_path(setting).unlink(missing_ok=True)
    print(summary(outcomes))
    print(f"\nnext, on the GPU host: benchmarks/gpu_check.sh --bundles {arguments.prepare}")
    return exit_code(outcomes, {"device": lacking["export"]} if lacking else {})


def make_steps(setting: Setting) -> list[Step]:
    """Return all steps, the most valuable first."""
    exports = {step.name: step for step in export_steps(setting, needs=("device", "export"))}
    steps = [Step("doctor", "what is installed", command(setting, "doctor"), limit_s=30, read=read_doctor)]
    for way, batch in (("native", 1), ("native", 8), ("plugin", 1), ("plugin", 8), ("native", 32)):
        first = (way, batch) == ("native", 1)
        if first:
            steps += take(exports, "static")
        if (way, batch) == ("plugin", 1):
            steps += plugin_steps(setting)
        steps += engine_steps(setting, "static", way, batch, checked=first)
    steps += kernel_steps(setting)
    for bundle, way in (("buckets", "profiles"), ("density", "native")):
        steps += [*take(exports, bundle), *engine_steps(setting, bundle, way, 1)]
    steps += take(exports, "cuda")
    steps += provider_steps(setting)
    steps += engine_steps(setting, "buckets", "per-bucket", 1)
    steps += engine_steps(setting, "static", "plugin", 32)
    steps.append(
        Step(
            "tests on the device",
            "every test that needs a GPU",
            (setting.python, "-m", "pytest", "-q", "-rs", "tests/gpu", "--ignore=tests/gpu/test_kernels.py"),
            needs=("device", "pytest"),
            least_s=30,
            limit_s=180,
            read=read_pytest,
        )
    )
    return steps


def plugin_steps(setting: Setting) -> Iterator[Step]:
    """Yield the build of the plugin for this device, and whether TensorRT takes it, or one that was there."""
    archs = ("--archs", setting.architecture) if setting.architecture else ()
    yield Step(
        "plugin build",
        "the plugin compiles for this device",
        command(setting, "plugins", "build", *archs),
        needs=(*TENSORRT, "nvcc", "cmake"),
        least_s=10,
        limit_s=120,
    )
    yield Step(
        "plugin check", "TensorRT takes the plugin", command(setting, "plugins", "check"), needs=TENSORRT, limit_s=30
    )


def export_steps(setting: Setting, needs: tuple[str, ...]) -> Iterator[Step]:
    """Yield the exports, and before them the checkpoint one of them takes; none for bundles that were prepared."""
    weights = weights_path(setting)
    script = (sys.executable, "benchmarks/_sharpened.py", setting.model, "sait", str(weights), SAIT_OPTION)
    for name, options in BUNDLES.items() if setting.exported else ():
        takes = "{weights}" in options
        if takes:
            yield Step("weights of buckets", "weights whose token counts differ", script, needs=needs, limit_s=60)
        words = [word.format(weights=weights, buckets=bucket_sizes(setting.model)) for word in options]
        yield Step(
            f"export {name}",
            "the bundle",
            command(setting, "export", "-m", setting.model, *words, "--overwrite", "-o", bundle_path(setting, name)),
            needs=needs,
            after=("weights of buckets",) if takes else (),
            least_s=15,
            limit_s=120,
        )


def bucket_sizes(model: str) -> str:
    """Return four sizes of a model's patch tokens, multiples of 8 but for the last, which holds all."""
    tokens = get_model_config(model).num_patches
    return ",".join(str(round(share * tokens / 8) * 8) for share in BUCKET_SHARES) + f",{tokens}"


def take(exports: dict[str, Step], bundle: str) -> Iterator[Step]:
    """Yield the steps that make a bundle."""
    for name in (f"weights of {bundle}", f"export {bundle}"):
        if name in exports:
            yield exports[name]


def engine_steps(setting: Setting, bundle: str, way: str, batch: int, *, checked: bool = False) -> Iterator[Step]:
    """Yield the build of a bundle's engines for a batch, and what is asked of them."""
    case = f"{bundle} {way} batch {batch}"
    build = f"build {case}"
    path = bundle_path(setting, bundle)
    after = [f"export {bundle}"] if setting.exported else []
    if way == "plugin":
        after.append("plugin check")
    yield Step(
        build,
        "engines, and whether precision and fused attention are really there",
        command(
            setting,
            *("build", path, *WAYS[way], "--batches", str(batch), "--graphs", "model,dense"),
            *("--tactic-sources", setting.tactics),
        ),
        needs=(*TENSORRT, f"bundle {bundle}"),
        after=tuple(after),
        least_s=20,
        limit_s=240,
        read=read_build,
    )
    if checked:
        yield Step(
            f"inspect {case}", "what the bundle says of its engines", command(setting, "inspect", path), after=(build,)
        )
    if checked or way == "plugin":
        yield Step(
            f"verify {case}",
            "the engine against PyTorch",
            command(setting, "verify", path),
            needs=("torch",),
            after=(build,),
            least_s=10,
            limit_s=90,
            read=read_verify,
        )
    yield bench_step(setting, bundle, case, batch, after=(build,))


def bench_step(
    setting: Setting, bundle: str, case: str, batch: int, *, needs: tuple[str, ...] = (), after: tuple[str, ...] = ()
) -> Step:
    """Return the measurement of a bundle's pruned graph against its dense one, in turns."""
    output = setting.results / f"gpu_check.{setting.device}.{case.replace(' ', '-')}.json"
    return Step(
        f"bench {case}",
        "dense against pruned, in turns",
        command(
            setting,
            *("bench", bundle_path(setting, bundle), "--batch", str(batch), "--against", "dense"),
            *("--duration", f"{setting.seconds:g}", "-o", str(output)),
        ),
        needs=needs,
        after=after,
        least_s=setting.seconds + 6,
        limit_s=10 * setting.seconds + 30,
        read=read_bench,
    )


def kernel_steps(setting: Setting) -> Iterator[Step]:
    """Yield the tests and the benchmark of the CUDA kernels, which need no TensorRT."""
    yield Step(
        "kernels bench",
        "the selection against torch.topk and the bytes-moved floor",
        (setting.python, "benchmarks/kernels.py", "--quick", "--out", str(setting.results / kernels_file(setting))),
        needs=("device", "nvcc"),
        least_s=20,
        limit_s=120,
        read=partial(read_kernels, setting.results / kernels_file(setting)),
    )
    yield Step(
        "kernels tests",
        "byte for byte against the torch reference",
        (setting.python, "-m", "pytest", "-q", "-rs", "-m", "gpu and not slow", "tests/gpu/test_kernels.py"),
        needs=("device", "nvcc", "pytest"),
        least_s=20,
        limit_s=150,
        read=read_pytest,
    )


def provider_steps(setting: Setting) -> Iterator[Step]:
    """Yield what is asked of ONNX Runtime's CUDA provider."""
    needs = ("device", "cuda provider", "bundle cuda")
    after = ("export cuda",) if setting.exported else ()
    yield Step(
        "verify cuda",
        "ONNX Runtime's CUDA provider against PyTorch",
        command(setting, "verify", bundle_path(setting, "cuda")),
        needs=(*needs, "torch"),
        after=after,
        limit_s=90,
        read=read_verify,
    )
    for batch in BATCHES:
        yield bench_step(setting, "cuda", f"cuda batch {batch}", batch, needs=needs, after=after)


def look_around(python: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Return condition -> why it is not fulfilled here, and what the device is."""
    lacking = packages(python)
    machine: dict[str, Any] = {}
    try:
        machine = describe_gpu()["gpu"]
    except EnvironmentLackError as error:
        lacking["device"] = error.message
    if find_nvcc() is None:
        lacking["nvcc"] = "no nvcc on the path or in CUDA_HOME"
    if not any((Path(folder) / "cmake").exists() for folder in os.get_exec_path()):
        lacking["cmake"] = "no cmake on the path"
    with_version = [name for name in ("tensorrt", "pycuda", "onnxruntime-gpu", "torch") if version(name)]
    return lacking, {**machine, "packages": {name: version(name) for name in with_version}}


def packages(python: str) -> dict[str, str]:
    """Return which packages are missing: of this interpreter, and of the one for tests."""
    hints = {
        "tensorrt": "pip install tensorrt, or JetPack's",
        "pycuda": "pip install 'edgeprune[trt]'",
        "torch": "verify on a machine with torch",
    }
    lacking = {name: f"no {name} here: {hint}" for name, hint in hints.items() if not is_there(name)}
    wanted = ("torch", "onnx", "onnx_graphsurgeon", "safetensors")
    absent = [name for name in wanted if not is_there(name)]
    if absent:
        lacking["export"] = (
            f"no {', '.join(absent)} here: --prepare DIR makes the bundles where they are, --bundles DIR takes them"
        )
    if not imports(python, "torch", "pytest", "hypothesis", "onnx"):
        lacking["pytest"] = f"{Path(python).name} lacks torch, onnx, pytest or hypothesis: name another with --python"
    providers = available_providers()
    if "CUDAExecutionProvider" not in providers:
        found = f"onnxruntime has only {', '.join(providers)}" if providers else "no onnxruntime"
        lacking["cuda provider"] = f"{found}: pip install 'edgeprune[cuda]'"
    return lacking


def is_there(module: str) -> bool:
    """Tell whether this interpreter finds a module, without importing it."""
    return module in sys.modules or find_spec(module) is not None


def imports(python: str, *names: str) -> bool:
    """Tell whether an interpreter finds some packages."""
    if python == sys.executable:
        return all(is_there(name) for name in names)
    code = f"import importlib.util as u, sys; sys.exit(any(u.find_spec(n) is None for n in {names!r}))"
    try:
        return subprocess.run([python, "-c", code], check=False, capture_output=True).returncode == 0
    except OSError:
        return False


def available_providers() -> list[str]:
    """Return the execution providers of the installed onnxruntime, none without it."""
    try:
        import onnxruntime
    except ImportError:
        return []
    return list(onnxruntime.get_available_providers())


def missing_bundles(folder: Path | None) -> dict[str, str]:
    """Return the bundles that a folder given with --bundles lacks."""
    if folder is None:
        return {}
    absent = [name for name in BUNDLES if not (folder / name / "manifest.json").is_file()]
    return {f"bundle {name}": f"there is no bundle '{name}' in the folder given with --bundles" for name in absent}


def version(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def tactic_sources() -> str:
    """Return "builtin" where the libraries that TensorRT 8 would take kernels of are not installed."""
    for name in ("libcublas.so.12", "libcublas.so.11"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return "default"
    return "builtin"


def command(setting: Setting, verb: str, *words: str) -> tuple[str, ...]:
    """Return a command line of edgeprune that answers in JSON."""
    return (*setting.edgeprune, verb, *words, "--json")


def bundle_path(setting: Setting, name: str) -> str:
    """Return where a bundle is."""
    return str(setting.bundles / name)


def weights_path(setting: Setting) -> Path:
    """Return where the checkpoint lies that a bundle is made of."""
    return setting.bundles / "sharpened.safetensors"


def kernels_file(setting: Setting) -> str:
    """Return the name of the kernels' result file."""
    return f"gpu_check.{setting.device}.kernels.json"


def environment() -> dict[str, str]:
    """Return the environment of the commands: this checkout is what they import."""
    known = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *([known] if known else [])])}


def chosen(name: str, only: str | None) -> bool:
    """Tell whether a step is asked for."""
    return only is None or any(part.strip() in name for part in only.split(",") if part.strip())


def announced(steps: Sequence[Step]) -> Iterator[Step]:
    """Yield steps and say which one comes."""
    for i, step in enumerate(steps, 1):
        say(f"[{i}/{len(steps)}] {step.name}")
        yield step


def read_doctor(done: Done) -> Figures:
    """Return what is not right."""
    found = done.document["results"]
    return {"not right": [f["check"] for f in found if f["level"] in ("fail", "warn")]}


def read_build(done: Done) -> Figures:
    """Return what was built, and what its proof found."""
    if done.code != 0:
        return {}
    index = done.document["results"]["index"]
    proofs = {engine["file"]: engine["proof"] for engine in index["engines"] if engine.get("proof")}
    return {
        "engines": len(index["engines"]),
        "build_s": round(sum(engine["build_s"] for engine in index["engines"]), 1),
        "fused": {file: f"{proof['fused_attention']}/{proof['attention_blocks']}" for file, proof in proofs.items()},
        "findings": [finding for proof in proofs.values() for finding in proof["findings"]],
        "choices": [f"{choice['what']}: {choice['chosen']}" for choice in index.get("choices", [])],
    }


def read_verify(done: Done) -> Figures:
    """Return how well the outputs agree; there are figures of a failed check too."""
    results = done.document["results"] if done.code in (0, 1) else {}
    if results.get("emulated"):
        raise NotDone(f"emulated on the processor: {results['emulated']}")
    parity = results.get("parity", {})
    names = ("max_rel_error", "top1_agreement", "kept_overlap")
    return {name: parity[name] for name in names if parity.get(name) is not None}


def read_bench(done: Done) -> Figures:
    """Return medians and ratios."""
    if done.code != 0:
        return {}
    result = done.document["results"]
    speedup, macs = result["speedup"], result["macs"]
    figures: Figures = {f"{runner['name']}_ms": runner["median_wall_ms"] for runner in result["runners"]}
    figures["unstable"] = len(result["unstable"])
    if speedup is not None:
        figures |= {"speedup": speedup["estimate"], "low": speedup["low"], "high": speedup["high"]}
    if macs is not None and speedup is not None:
        figures |= {"macs_ratio": macs["ratio"], "efficiency": speedup["estimate"] / macs["ratio"]}
        batch = result["batch"]
        share = EFFICIENCY_GOAL if batch >= EFFICIENCY_BATCH else 1 / macs["ratio"]  # never slower than dense
        figures["goal reached"] = figures["efficiency"] >= share
    if result.get("switch_us") is not None:
        figures["switch_us"] = result["switch_us"]
    return figures


def read_pytest(done: Done) -> Figures:
    """Return how many tests passed, failed and were skipped."""
    found = re.findall(r"(\d+) (passed|failed|error|errors|skipped)\b", done.stdout.strip().rpartition("\n")[2])
    return {word: int(number) for number, word in found}


def read_kernels(path: Path, done: Done) -> Figures:
    """Return the goals of the kernels' result file."""
    if done.code != 0:
        return {}
    goals = json.loads(path.read_text(encoding="utf-8"))["goals"]
    return {
        goal["what"]: f"{goal['measured']['estimate']:.2f}{'' if goal['reached'] else ' (missed)'}" for goal in goals
    }


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return the steps as a Markdown table."""
    rows = [("step", "", "s", "what came out"), ("---", "---", "---:", "---")]
    for outcome in outcomes:
        told = [outcome.reason or "", figures_words(outcome.figures)]
        rows.append((outcome.name, outcome.status, f"{outcome.seconds:.0f}", "; ".join(part for part in told if part)))
    return "\n".join(f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in row)} |" for row in rows)


def figures_words(figures: Figures) -> str:
    """Return figures in one line."""
    parts = []
    for name, value in figures.items():
        if isinstance(value, dict):
            value = ", ".join(dict.fromkeys(map(str, value.values())))
        elif isinstance(value, list):
            value = ", ".join(textwrap.shorten(str(one), 80) for one in value[:3]) + (
                f" and {len(value) - 3} more" if len(value) > 3 else ""
            )
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, float):
            value = f"{value:.4g}"
        if value not in ("", None):
            parts.append(f"{name} {value}")
    return ", ".join(parts)


def counts(outcomes: Sequence[Outcome]) -> str:
    """Return how many steps ended in which way."""
    found = {status: sum(o.status == status for o in outcomes) for status in (RAN, SKIPPED, FAILED, NOT_RUN)}
    return ", ".join(f"{count} {status}" for status, count in found.items() if count)


def exit_code(outcomes: Sequence[Outcome], lacking: dict[str, str]) -> int:
    """Return 1 when something failed, 3 without a device, else 0."""
    if any(outcome.status == FAILED for outcome in outcomes):
        return 1
    return LACKS if "device" in lacking else 0


def write(
    path: Path, arguments: argparse.Namespace, machine: dict[str, Any], outcomes: Sequence[Outcome], elapsed_s: float
) -> None:
    """Write the result file, whole or not at all."""
    content = {
        "schema": SCHEMA,
        "script": "benchmarks/gpu_check.py",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "arguments": {name: getattr(arguments, name) for name in ("model", "budget", "bench_seconds", "only")},
        "random_weights": True,
        "gpu": machine,
        "fingerprint": take_fingerprint().to_dict(),
        "elapsed_s": round(elapsed_s, 1),
        "steps": [outcome.to_dict() for outcome in outcomes],
    }
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def say(text: str) -> None:
    """Tell people what happens, beside the result."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
