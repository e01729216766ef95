"""The TensorRT plugin libraries without a GPU: built, asked as a builder asks, and loaded into real registries.

Needs nvcc, cmake and headers (TENSORRT8_ROOT, TENSORRT10_ROOT; TENSORRT11_ROOT adds a second reader of the library for
TensorRT 10); the registries come from plugins/tests/registries.sh. What is missing is skipped with the reason.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
TESTS = ROOT / "plugins" / "tests"
BUILD = ROOT / "build" / "plugin-tests"
README = ROOT / "plugins" / "tensorrt" / "README.md"
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))

LIBRARIES = {8: (8,), 10: (10, 11)}  # generation -> majors of headers it is built with
READERS = [(8, 8), (10, 10), (11, 10)]  # headers of the harness, generation of the library
FLOAT, HALF, INT8, INT32, FP8, BF16 = 0, 1, 2, 3, 6, 7  # nvinfer1::DataType
SCORES = {8: [FLOAT, HALF], 10: [FLOAT, HALF, BF16]}
TOKENS = {8: [FLOAT, HALF, INT8], 10: [FLOAT, HALF, INT8, FP8, BF16]}

FIELDS = {
    "TopKGather": {"k": "i", "num_prefix_tokens": "i", "order": "i", "mode": "i", "threshold": "f"},
    "GatherTokens": {"num_prefix_tokens": "i"},
    "ScatterTokens": {},
}
GOOD = {
    "TopKGather": {"k": "3", "num_prefix_tokens": "1", "order": "1", "mode": "2", "threshold": "0.25"},
    "GatherTokens": {"num_prefix_tokens": "2"},
    "ScatterTokens": {},
}
INPUTS = {
    "TopKGather": "-1,16;-1,17,64",
    "GatherTokens": "-1,18,64;-1,5",
    "ScatterTokens": "-1,16,64;-1,5,64;-1,5",
}


def headers(major: int) -> Path | None:
    """Return the folder with TensorRT's headers of a major version."""
    roots = [Path(os.environ[n]) for n in (f"TENSORRT{major}_ROOT", "TENSORRT_ROOT") if os.environ.get(n)]
    folders = [root / "include" for root in roots] + [Path(f"/usr/include/{platform.machine()}-linux-gnu")]
    for folder in folders:
        version = folder / "NvInferVersion.h"
        defined = r"#define (?:NV_TENSORRT_MAJOR|TRT_MAJOR_ENTERPRISE) +(\d+)"
        if version.is_file() and (found := re.search(defined, version.read_text())) and int(found[1]) == major:
            # TensorRT 8.5 has no finder, and its library can register itself alone.
            return folder if "class ILoggerFinder" in (folder / "NvInferRuntime.h").read_text() else None
    return None


def build(folder: Path, *options: str) -> None:
    """Build the plugins in a folder that is kept: a second run compiles what has changed."""
    archs = "-DCMAKE_CUDA_ARCHITECTURES=80-real"
    for command in (
        ["cmake", "-S", str(ROOT / "plugins"), "-B", str(folder), archs, *options],
        ["cmake", "--build", str(folder), "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.fixture(scope="session")
def libraries() -> dict[int, Path]:
    """Return the libraries that can be built here, by generation."""
    if not shutil.which("cmake"):
        pytest.skip("cmake is not installed")
    if not (shutil.which("nvcc") or (CUDA / "bin" / "nvcc").is_file()):
        pytest.skip("nvcc is not installed")
    found = {generation: next(filter(None, map(headers, majors)), None) for generation, majors in LIBRARIES.items()}
    if not any(found.values()):
        pytest.skip("no headers of TensorRT: set TENSORRT8_ROOT or TENSORRT10_ROOT")
    build(BUILD, *(f"-DTENSORRT{generation}_ROOT={folder.parent}" for generation, folder in found.items() if folder))
    return {generation: BUILD / f"libedgeprune_trt{generation}.so" for generation, folder in found.items() if folder}


@pytest.fixture(scope="session")
def library(libraries: dict[int, Path]) -> Callable[[int], Path]:
    def of(generation: int) -> Path:
        if generation not in libraries:
            pytest.skip(f"no headers of TensorRT {generation}: set TENSORRT{generation}_ROOT")
        return libraries[generation]

    return of


def compile_host(output: Path, major: int, *arguments: str) -> Path:
    """Compile C++ against one version of the headers."""
    folder = headers(major)
    if folder is None:
        pytest.skip(f"no headers of TensorRT {major}: set TENSORRT{major}_ROOT")
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-deprecated-declarations"]
    flags += [flag for path in (folder, CUDA / "include") for flag in ("-isystem", str(path))]
    subprocess.run(["c++", *flags, *arguments, "-o", str(output), "-ldl"], check=True)
    return output


class Harness:
    """Asks one library through the harness built with one version of the headers."""

    def __init__(self, program: Path, library: Path, generation: int) -> None:
        self.program, self.library, self.generation = program, library, generation
        self.called = ""

    def __call__(self, op: str, fields: dict[str, str] | str | None = None, *shapes: str) -> Any:
        """Return what the plugin of an op answers; `called` is what the kernels of a recording library told."""
        given = fields if isinstance(fields, str) else in_words(op, fields or GOOD[op])
        command = [str(self.program), str(self.library), op, given, *(shapes or [INPUTS[op]])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        self.called = done.stderr.strip()
        return json.loads(done.stdout)


@pytest.fixture(scope="session", params=READERS, ids=[f"headers{h}-library{g}" for h, g in READERS])
def ask(
    request: pytest.FixtureRequest, library: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory
) -> Harness:
    major, generation = request.param
    built = library(generation)
    program = tmp_path_factory.mktemp("harness") / "harness"
    return Harness(compile_host(program, major, "-rdynamic", str(TESTS / "harness.cpp")), built, generation)


@pytest.fixture(scope="session", params=LIBRARIES)
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Harness:
    """Return a harness around a library whose kernels tell how they were called."""
    if not (CUDA / "include" / "cuda_runtime_api.h").is_file():
        pytest.skip("CUDA's headers are not installed")
    generation: int = request.param
    folder = tmp_path_factory.mktemp("recorded")
    parts = [ROOT / "plugins" / "tensorrt" / name for name in ("common", "v2" if generation == 8 else "v3")]
    sources = [str(path) for part in parts for path in sorted(part.glob("*.cpp"))]
    includes = [f"-I{path}" for path in (*parts, ROOT / "plugins" / "kernels")]
    flags = ["-shared", "-fPIC", "-fvisibility=hidden", '-DEDGEPRUNE_PLUGIN_VERSION="0"', *includes]
    kernels = str(TESTS / "recording_kernels.cpp")
    built = compile_host(folder / "recorded.so", generation, *flags, *sources, kernels)
    return Harness(
        compile_host(folder / "harness", generation, "-rdynamic", str(TESTS / "harness.cpp")), built, generation
    )


def in_words(op: str, values: dict[str, str]) -> str:
    return ",".join(f"{name}:{FIELDS[op].get(name, 'i')}={value}" for name, value in values.items())


def type_combinations(op: str, generation: int) -> set[str]:
    """Return what an op takes: inputs, then outputs, as numbers of nvinfer1::DataType."""
    scores, tokens = SCORES[generation], TOKENS[generation]
    made = {
        "TopKGather": [(s, t, t, INT32, INT32) for s, t in product(scores, tokens)],
        "GatherTokens": [(t, INT32, t) for t in tokens],
        "ScatterTokens": [(t, t, INT32, t) for t in tokens],
    }[op]
    return {" ".join(map(str, types)) for types in made}


@pytest.mark.parametrize("op", FIELDS)
def test_op_describes_itself_as_documented(ask: Harness, op: str) -> None:
    answer = ask(op)
    assert answer["declared"] == [f"{name}:{kind}" for name, kind in FIELDS[op].items()]
    assert answer["name"] == f"edgeprune::{op} 1"
    assert set(answer["accepted"]) == type_combinations(op, ask.generation)
    assert len(answer["accepted"]) == len(set(answer["accepted"]))
    assert answer["wrong_types"] == 0, "getOutputDataType contradicts supportsFormatCombination"
    assert answer["other_layouts"] == 0, "only the linear format is implemented"


@pytest.mark.parametrize("op", FIELDS)
def test_copies_and_stored_plugins_hold_the_same(ask: Harness, op: str) -> None:
    answer = ask(op)
    original, clone, restored = answer["stored"]
    assert original == clone == restored
    assert answer["refuses_damage"]
    if ask.generation == 8:
        held = [GOOD[op].get(name, "0") for name in ("k", "num_prefix_tokens", "order", "mode")]
        assert [int.from_bytes(bytes.fromhex(original)[i : i + 4], "little") for i in range(0, 20, 4)] == [
            1,
            *map(int, held),
        ]
    else:
        assert original == [f"{name}:{FIELDS[op][name]}={value}" for name, value in GOOD[op].items()]


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, fields in FIELDS.items() for name in fields])
def test_timing_id_tells_values_apart(ask: Harness, op: str, name: str) -> None:
    other = {**GOOD[op], name: {"threshold": "0.2500001"}.get(name, "0" if name != "k" else "4")}
    ids = [ask(op, values)["timing_id"] for values in (GOOD[op], GOOD[op], other)]
    assert ids[0] == ids[1]
    assert len(set(ids)) == (1 if ask.generation == 8 else 2), "TensorRT 8 asks for none"


def test_shapes_of_outputs_follow_the_rules_of_the_compiler(ask: Harness) -> None:
    pytest.importorskip("onnx_graphsurgeon")
    from edgeprune.export.ops import gather_tokens, scatter_tokens, topk_gather

    topk = topk_gather.output_shapes([-1, 16], [-1, 17, 64], 3, 1)
    assert ask("TopKGather")["shapes"] == [list(shape) for shape in topk]
    assert ask("GatherTokens")["shapes"] == [gather_tokens.output_shape([-1, 18, 64], [-1, 5], 2)]
    assert ask("ScatterTokens")["shapes"] == [scatter_tokens.output_shape([-1, 16, 64])]


def test_fields_are_the_attributes_of_the_onnx_ops(ask: Harness) -> None:
    pytest.importorskip("onnx_graphsurgeon")
    from edgeprune.export.ops import PLUGIN_FIELDS, gather_tokens, scatter_tokens, topk_gather

    for module in (topk_gather, gather_tokens, scatter_tokens):
        attributes = {name: a for name, a in module.schema().attributes.items() if name not in PLUGIN_FIELDS}
        kinds = {name: {"INT": "i", "FLOAT": "f"}[a.type.name] for name, a in attributes.items()}
        assert set(ask(module.NAME)["declared"]) == {f"{name}:{kind}" for name, kind in kinds.items()}
        assert all(attribute.required for attribute in attributes.values())


def test_unknown_sizes_are_left_open(ask: Harness) -> None:
    assert ask("TopKGather", None, "-1,-1;-1,-1,-1")["shapes"] == [[-1, 4, -1], [-1, 3], [-1]]
    assert ask("GatherTokens", None, "2,-1,8;2,-1")["shapes"] == [[2, -1, 8]]


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, fields in FIELDS.items() for name in fields])
def test_missing_and_wrong_fields_are_refused_with_a_reason(ask: Harness, op: str, name: str) -> None:
    words = [f"{field}:{FIELDS[op][field]}={value}" for field, value in GOOD[op].items()]
    own = next(word for word in words if word.startswith(f"{name}:"))
    others = ",".join(word for word in words if word != own)
    other_kind = own.replace(":i=", ":f=") if ":i=" in own else own.replace(":f=", ":i=")
    kind = "int32" if FIELDS[op][name] == "i" else "float32"
    for fields, reason in {
        others: f"field {name} is missing",
        f"{others},{other_kind}": f"field {name} must be {kind}",
    }.items():
        answer = ask(op, fields.strip(",") or "nothing:i=0")
        assert "name" not in answer, "a plugin was made"
        assert [line for line in answer["log"] if "unknown" not in line] == [f"edgeprune: {op}: {reason}"]


def test_field_of_two_values_is_refused(ask: Harness) -> None:
    answer = ask("GatherTokens", "num_prefix_tokens:l=1")
    assert answer["log"] == ["edgeprune: GatherTokens: field num_prefix_tokens must hold one value"]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("k", "0", "k is 0, possible are 1 to 4096"),
        ("k", "4097", "k is 4097, possible are 1 to 4096"),
        ("num_prefix_tokens", "-1", "num_prefix_tokens is -1, possible are 0 to 4096"),
        ("order", "2", "order is 2, known are 0 (by rank) and 1 (by position)"),
        ("mode", "3", "mode is 3, known are 0 (top-k), 1 (threshold) and 2 (mass)"),
        ("mode", "-1", "mode is -1, known are 0 (top-k), 1 (threshold) and 2 (mass)"),
        ("threshold", "nan", "threshold is not a number"),
    ],
)
def test_values_out_of_range_are_refused(ask: Harness, name: str, value: str, reason: str) -> None:
    answer = ask("TopKGather", {**GOOD["TopKGather"], name: value})
    assert "name" not in answer
    assert answer["log"] == [f"edgeprune: TopKGather: {reason}"]


def test_unknown_field_is_mentioned(ask: Harness) -> None:
    answer = ask("GatherTokens", {"num_prefix_tokens": "1", "prefix": "1"})
    assert answer["name"] == "edgeprune::GatherTokens 1"
    assert "edgeprune: GatherTokens: field prefix is unknown and without effect" in answer["log"]


@pytest.mark.parametrize(
    ("op", "shapes", "reason"),
    [
        ("TopKGather", "2,2;2,3,8", "k is 3, but an image has 2 scores"),
        ("TopKGather", "2,16;2,16,8", "tokens have 16 rows, needed are num_prefix_tokens + scores of an image = 17"),
        ("TopKGather", "2,16;3,17,8", "scores are of 2 images and tokens of 3"),
        ("TopKGather", "2,5000;2,5001,8", "an image has 5000 tokens, at most 4096 are possible"),
        ("TopKGather", "1025,16;1025,17,8", "the batch is 1025, at most 1024 is possible"),
        ("TopKGather", "2,16,1;2,17,8", "scores has 3 axes, needed are 2"),
        ("TopKGather", "2,16;2,17", "tokens has 2 axes, needed are 3"),
        ("TopKGather", "2,16;2,17,8,1", "tokens has 4 axes, needed are 3"),
        ("TopKGather", "2,16;2,17,0", "tokens is empty"),
        ("GatherTokens", "2,2,8;2,5", "tokens have 2 rows, needed are more than num_prefix_tokens = 2"),
        ("GatherTokens", "2,18,8;3,5", "tokens are of 2 images and indices of 3"),
        ("GatherTokens", "2,5002,8;2,5", "an image has 5000 tokens, at most 4096 are possible"),
        ("ScatterTokens", "2,16,8;2,5,8;2,6", "5 tokens of an image have 6 indices"),
        ("ScatterTokens", "2,16,8;2,5,9;2,5", "rows of base have 8 values and rows of tokens 9"),
        ("ScatterTokens", "2,16,8;2,5,8;1,5", "base is of 2 images, tokens of 2 and indices of 1"),
        ("ScatterTokens", "2,5000,8;2,5,8;2,5", "an image has 5000 tokens, at most 4096 are possible"),
    ],
)
def test_shapes_that_cannot_be_are_refused_while_building_and_running(
    ask: Harness, op: str, shapes: str, reason: str
) -> None:
    built = ask(op, None, shapes)
    assert built["shapes"] is None
    line = f"edgeprune: {op}: {reason}"
    assert line in built["log"]
    run = ask(op, None, INPUTS[op], shapes)
    assert run["refuses"]
    assert line in run["log"]


def test_wrong_number_of_inputs_is_refused(ask: Harness) -> None:
    answer = ask("ScatterTokens", None, "2,16,8;2,5,8")
    assert answer["shapes"] is None
    assert "edgeprune: ScatterTokens: 2 inputs, needed are 3" in answer["log"]


@pytest.mark.parametrize(
    ("op", "shapes", "types", "called"),
    [
        ("TopKGather", "2,16;2,17,64", "0,1", "topk_gather 2 16 3 1 128 0 1 2 0.25 0x1 0x2 0xb 0xc 0xd 0x63"),
        ("TopKGather", "5,16;5,17,8", "1,2", "topk_gather 5 16 3 1 8 1 1 2 0.25 0x1 0x2 0xb 0xc 0xd 0x63"),
        ("GatherTokens", "2,18,6;2,5", "0,3", "gather_tokens 2 16 5 2 24 0x1 0x2 0xb 0x63"),
        ("ScatterTokens", "2,16,6;2,5,6;2,5", "1,1,3", "scatter_tokens 2 16 5 12 0x1 0x2 0x3 0xb 0x63"),
    ],
)
def test_kernel_gets_sizes_and_addresses(recorded: Harness, op: str, shapes: str, types: str, called: str) -> None:
    assert recorded(op, None, shapes, f"run={types}")["code"] == 0
    assert recorded.called == called


def test_bfloat16_scores_are_told_to_the_kernel(recorded: Harness) -> None:
    if recorded.generation == 8:
        pytest.skip("TensorRT 8 has no bfloat16")
    recorded("TopKGather", None, "2,16;2,17,64", f"run={BF16},{FP8}")
    assert recorded.called.startswith("topk_gather 2 16 3 1 64 2 ")


def test_failed_launch_is_reported(recorded: Harness) -> None:
    answer = recorded("GatherTokens", None, "13,18,6;13,5", "run=0,3")
    assert answer["code"] != 0
    assert answer["log"][-1] == "edgeprune: GatherTokens: the launch failed"


@pytest.mark.parametrize("generation", LIBRARIES)
def test_library_tells_its_generation_and_version(library: Callable[[int], Path], generation: int) -> None:
    from edgeprune.version import __version__

    loaded = ctypes.CDLL(str(library(generation)))
    loaded.edgeprune_plugin_version.restype = ctypes.c_char_p
    assert loaded.edgeprune_plugin_abi() == generation
    assert loaded.edgeprune_plugin_version().decode() == __version__


@pytest.mark.parametrize("generation", LIBRARIES)
def test_library_shows_its_entry_points_alone(library: Callable[[int], Path], generation: int) -> None:
    if not shutil.which("nm") or not shutil.which("readelf"):
        pytest.skip("binutils are not installed")
    path = str(library(generation))
    symbols = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    entry = "getPluginCreators" if generation == 8 else "getCreators"
    assert {line.split()[-1] for line in symbols.splitlines()} == {
        entry,
        "setLoggerFinder",
        "edgeprune_plugin_abi",
        "edgeprune_plugin_version",
    }
    needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"NEEDED.*(libcud|libnv)", needed), "the library must load where neither CUDA nor TensorRT is"


def installed(registry: str) -> Path:
    """Return the folder of a registry."""
    folder = ROOT / "build" / "registries" / registry
    if not (folder / "ready").is_file():
        pytest.skip(f"registry {registry} is not installed: plugins/tests/registries.sh {registry}")
    return folder


def probe(registry: str, path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the probe with the Python of a registry."""
    command = [str(installed(registry) / "bin" / "python"), str(TESTS / "probe.py"), str(path), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.tensorrt
@pytest.mark.parametrize(("registry", "generation"), [("trt8", 8), ("trt11", 10)])
def test_real_registry_takes_the_library(library: Callable[[int], Path], registry: str, generation: int) -> None:
    done = probe(registry, library(generation))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["loaded"]
    assert report["tensorrt"].startswith("8.6.0" if registry == "trt8" else "11.4")
    for op, told in report["ops"].items():
        kinds = {name: {"i": "INT32", "f": "FLOAT32"}[kind] for name, kind in FIELDS[op].items()}
        assert told["fields"] == kinds
        assert told["name"] == f"edgeprune::{op} 1"
        assert told["outputs"] == (3 if op == "TopKGather" else 1)
        assert all(told["refused"]), "a plugin was made of missing or wrong fields"
        assert len(told["refused"]) == 2 * len(kinds)
        assert all(told["copies_agree"])
        assert told.get("refuses_damage", True)
        assert told["found_elsewhere"] == [False, False], "found without its namespace or under another version"


@pytest.mark.tensorrt
@pytest.mark.parametrize(("registry", "generation"), [("trt8", 10), ("trt11", 8)])
def test_library_of_the_other_generation_is_not_loaded(
    library: Callable[[int], Path], registry: str, generation: int
) -> None:
    done = probe(registry, library(generation))
    assert done.returncode == 3
    assert f"is for TensorRT {generation}" in done.stderr


@pytest.mark.tensorrt
@pytest.mark.slow
@pytest.mark.parametrize(
    ("registry", "major", "generation", "code"),
    [("trt8", 8, 8, 0), ("trt11", 11, 10, 0), ("trt11", 10, 10, 4)],
)
def test_linked_library_registers_itself_where_its_headers_fit(
    libraries: dict[int, Path], registry: str, major: int, generation: int, code: int
) -> None:
    folder = headers(major)
    if folder is None:
        pytest.skip(f"no headers of TensorRT {major}: set TENSORRT{major}_ROOT")
    names = ("libnvinfer.so.*", "libnvinfer_lean.so.*")
    (runtime,) = (path for name in names for path in installed(registry).rglob(name))
    linked = BUILD.with_name("plugin-tests-linked")
    build(
        linked,
        "-DEDGEPRUNE_SELF_REGISTER=ON",
        f"-DTENSORRT{generation}_ROOT={folder.parent}",
        f"-DTENSORRT{18 - generation}_ROOT=/nowhere",
        f"-DTENSORRT{generation}_LIBRARY={runtime}",
    )
    done = probe(registry, linked / f"libedgeprune_trt{generation}.so", "--registered")
    assert done.returncode == code, done.stderr
    assert ("not registered" in done.stderr) == (code == 4)


def documented() -> dict[str, list[tuple[str, str, str]]]:
    """Return the rows (what, name, type) of the interface tables in the README, by op."""
    made: dict[str, list[tuple[str, str, str]]] = {}
    for section in re.split(r"^### ", README.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        op = section.split("\n", 1)[0].strip()
        rows = re.findall(r"^\| (input|output|field) \| `(\w+)` \| ([^|]+?) \|", section, re.MULTILINE)
        if op in FIELDS:
            made[op] = rows
    return made


def test_readme_tables_name_the_registered_fields(ask: Harness) -> None:
    for op, rows in documented().items():
        kinds = {"int32": "i", "float32": "f"}
        assert [f"{name}:{kinds[kind]}" for what, name, kind in rows if what == "field"] == ask(op)["declared"]


def test_readme_tables_name_the_ports() -> None:
    ports = {
        op: [[name for what, name, _ in rows if what == kind] for kind in ("input", "output")]
        for op, rows in documented().items()
    }
    assert ports == {
        "TopKGather": [["scores", "tokens"], ["kept", "indices", "count"]],
        "GatherTokens": [["tokens", "indices"], ["kept"]],
        "ScatterTokens": [["base", "tokens", "indices"], ["out"]],
    }
