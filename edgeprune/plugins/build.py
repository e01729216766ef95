"""Builds the plugin libraries with CMake, in a temporary directory; what is finished is moved into place whole."""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from edgeprune.errors import BuildError, EnvironmentLackError, InputError
from edgeprune.plugins.contract import LIBRARIES, Library
from edgeprune.plugins.locate import cache_folder, is_shared_library, source_folder

PRESETS = ("desktop", "orin", "thor")
CUDA_FOLDERS = (Path("/usr/local/cuda"), Path("/opt/cuda"))
SYSTEM_ROOTS = (Path("/usr"), Path("/usr/local/tensorrt"), Path("/usr/local/TensorRT"), Path("/opt/tensorrt"))
ROOT_VARIABLES = {"TENSORRT8_ROOT": 8, "TENSORRT10_ROOT": 10, "TENSORRT_ROOT": None}  # with the ABI they are for
LEAST_CMAKE = (3, 21)
REPOSITORY = "https://github.com/NVIDIA/TensorRT"
TAIL = 15  # lines of output in an error
_PROGRESS = re.compile(r"\[\s*(?:(\d+)%|(\d+)/(\d+))\s*\]")  # of make and of ninja
_ERROR = re.compile(r"\b(fatal|error)\s*:", re.IGNORECASE)
_ARCH = re.compile(r"\d{2,3}[af]?(-real|-virtual)?|native|all|all-major")

_log = logging.getLogger(__name__)

Report = Callable[[str, float], None]


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        preset: one of `PRESETS`; None takes the architectures alone.
        archs: CUDA architectures, "87"; they replace the preset's.
        tensorrt_roots: folders with include/NvInfer.h; by default those of the environment and of the system.
        output: where the libraries go; by default the user's cache, where the loader looks.
        jobs: compilers at once; by default one per core.
        self_register: link to libnvinfer and register when opened, for programs such as Triton that only open it.
    """

    preset: str | None = None
    archs: tuple[str, ...] = ()
    tensorrt_roots: tuple[Path, ...] = ()
    output: Path | None = None
    jobs: int | None = None
    self_register: bool = False


@dataclass(frozen=True)
class Headers:
    """TensorRT's headers.

    Attributes:
        library: the plugin library they build.
        include: the folder with NvInfer.h.
        version: "10.3".
    """

    library: Library
    include: Path
    version: str


@dataclass(frozen=True)
class Tools:
    """What a build needs besides the headers."""

    source: Path
    cmake: str
    nvcc: str


def build_plugins(request: BuildRequest, progress: Report = lambda step, share: None) -> tuple[Path, ...]:
    """Build every library there are headers for and return where they are.

    Args:
        request: what to build.
        progress: called with (step, share done).

    Raises:
        InputError: `plugin-archs`, `tensorrt-root`.
        EnvironmentLackError: `plugin-sources`, `plugin-tools` with everything that is missing, `plugin-output`.
        BuildError: `plugin-build` with the last lines of the output.
    """
    check_archs(request)
    progress("looking for compilers and headers", 0.0)
    headers = find_headers(request.tensorrt_roots)
    tools = find_tools(headers)
    output = (request.output or cache_folder()).absolute()
    with _workplace(output) as work:
        configure = configure_command(request, tools, headers, work)
        _run("configuring", configure, tools.source, progress, (0.02, 0.1))
        jobs = str(request.jobs or len(os.sched_getaffinity(0)))
        compile_all = [tools.cmake, "--build", str(work / "build"), "--parallel", jobs]
        _run("compiling", compile_all, work, progress, (0.1, 0.95))
        stage = work / "stage"
        install = [tools.cmake, "--install", str(work / "build"), "--prefix", str(stage)]
        _run("installing", install, work, progress, (0.95, 0.99))
        built = [_built((stage, work / "build"), found.library) for found in headers]
        for path in built:
            path.replace(output / path.name)
    progress("installed", 1.0)
    return tuple(output / path.name for path in built)


def check_archs(request: BuildRequest) -> None:
    """Raise InputError `plugin-archs` unless the request says for which GPUs, in words CMake knows."""
    wrong = [arch for arch in request.archs if not _ARCH.fullmatch(arch)]
    if wrong:
        raise InputError(
            f"'{wrong[0]}' is no CUDA architecture",
            code="plugin-archs",
            expected="numbers such as 87 (Orin), 110 (Thor), 89 or 90, separated by commas",
            hint="--archs 87",
        )
    if request.preset is None and not request.archs:
        raise InputError(
            "neither a preset nor architectures given",
            code="plugin-archs",
            expected=f"--preset {', '.join(PRESETS)}, or --archs, or both",
            hint=f"--preset {'desktop' if platform.machine() == 'x86_64' else 'orin'}",
        )


def find_headers(roots: Sequence[Path] = (), environ: Mapping[str, str] = os.environ) -> tuple[Headers, ...]:
    """Return the first headers found for each library, in the order of `LIBRARIES`.

    Args:
        roots: folders to look in; without any, those of TENSORRT8_ROOT, TENSORRT10_ROOT and TENSORRT_ROOT, then the
            system's.
        environ: the environment.

    Raises:
        InputError: `tensorrt-root` for a folder, given or in the environment, without the headers it should have.
    """
    given = [("--tensorrt-root", root) for root in roots]
    if not roots:
        given = [(name, Path(environ[name])) for name in ROOT_VARIABLES if environ.get(name)]
    found: dict[int, Headers] = {}
    for name, root in given:
        headers = read_headers(root)
        if isinstance(headers, str):
            raise _wrong_root(name, headers)
        if ROOT_VARIABLES.get(name) not in (None, headers.library.abi):
            raise _wrong_root(name, f"the headers in '{headers.include}' are of TensorRT {headers.version}")
        found.setdefault(headers.library.abi, headers)
    for root in () if roots else SYSTEM_ROOTS:
        headers = read_headers(root)
        if isinstance(headers, Headers):
            found.setdefault(headers.library.abi, headers)
    return tuple(found[library.abi] for library in LIBRARIES if library.abi in found)


def read_headers(root: Path) -> Headers | str:
    """Return the headers of a folder, or why there are none to use."""
    folders = [root / "include", root / "include" / f"{platform.machine()}-linux-gnu"]
    include = next((f for f in folders if (f / "NvInfer.h").is_file() and (f / "NvInferVersion.h").is_file()), None)
    if include is None:
        return f"no include/NvInfer.h in '{root}'"
    text = (include / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")
    major, minor = (_defined(text, f"NV_TENSORRT_{part}") for part in ("MAJOR", "MINOR"))
    for library in LIBRARIES:
        if major in library.majors:
            return Headers(library, include, f"{major}.{minor}")
    return f"the headers in '{include}' are of TensorRT {major}.{minor}, for which no plugin library is made"


def find_tools(headers: Sequence[Headers], environ: Mapping[str, str] = os.environ) -> Tools:
    """Return sources, cmake and nvcc.

    Raises:
        EnvironmentLackError: `plugin-sources`; `plugin-tools` with everything that is missing, headers included.
    """
    source = source_folder()
    if source is None:
        raise EnvironmentLackError(
            "the plugin's CUDA and C++ sources are not part of the installed package",
            code="plugin-sources",
            expected="a checkout of edgeprune, with its folder plugins/",
            hint="clone edgeprune's repository and run `python -m edgeprune plugins build` in it",
        )
    path = environ.get("PATH", "")
    cmake = shutil.which("cmake", path=path)
    nvcc = _find_nvcc(environ, path)
    recent = cmake is not None and _version_of(cmake) >= LEAST_CMAKE
    lacking = {
        "cmake {}.{} or newer".format(*LEAST_CMAKE): None if recent else "pip install cmake",
        "nvcc": None if nvcc else "install the CUDA toolkit (on a Jetson: apt install cuda-toolkit), or set CUDACXX",
        "TensorRT's headers": None
        if headers
        else "apt install libnvinfer-headers-dev (on a Jetson: libnvinfer-dev), or take the folder include/ of "
        f"{REPOSITORY}, branch release/10.0 or release/8.6, and give --tensorrt-root DIR",
    }
    advice = {name: what for name, what in lacking.items() if what}
    if cmake is None or nvcc is None or advice:
        raise EnvironmentLackError(
            f"building the plugin needs what is not found here: {', '.join(advice)}",
            code="plugin-tools",
            expected="cmake, nvcc and the headers of TensorRT",
            hint="; ".join(f"{name}: {what}" for name, what in advice.items()),
            details={"missing": list(advice)},
        )
    return Tools(source, cmake, nvcc)


def configure_command(request: BuildRequest, tools: Tools, headers: Sequence[Headers], work: Path) -> list[str]:
    """Return the command that configures a build in a folder; the headers are made reachable there."""
    command = [tools.cmake, "-S", str(tools.source), "-B", str(work / "build")]
    if request.preset is not None:
        command += ["--preset", request.preset]
    command += ["-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_CUDA_COMPILER={tools.nvcc}"]
    if request.archs:
        command.append(f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(request.archs)}")
    if request.self_register or {found.version for found in headers} == {"8.5"}:  # 8.5 cannot load libraries itself
        command.append("-DEDGEPRUNE_SELF_REGISTER=ON")
    nothing = work / "nothing"  # an empty root keeps a library out of the build
    nothing.mkdir(parents=True)
    roots = {found.library.abi: _root_of(found, work) for found in headers}
    return command + [f"-DTENSORRT{library.abi}_ROOT={roots.get(library.abi, nothing)}" for library in LIBRARIES]


def _root_of(headers: Headers, work: Path) -> Path:
    """Return a folder whose include/ is the headers; a system's folder of everything is replaced by links to them."""
    if headers.include.name == "include" and headers.include.parent not in SYSTEM_ROOTS[:1]:
        return headers.include.parent.absolute()
    root = work / f"tensorrt{headers.library.abi}"
    (root / "include").mkdir(parents=True)
    for file in headers.include.glob("Nv*.h"):
        (root / "include" / file.name).symlink_to(file)
    return root


def _wrong_root(name: str, reason: str) -> InputError:
    return InputError(
        f"{name}: {reason}",
        code="tensorrt-root",
        expected="a folder with include/NvInfer.h and include/NvInferVersion.h of TensorRT 8.5, 8.6, 10 or 11",
        hint=f"set {name} to the folder above include/",
    )


def _find_nvcc(environ: Mapping[str, str], path: str) -> str | None:
    named = environ.get("CUDACXX")
    homes = [Path(home) for home in (environ.get("CUDA_HOME"), environ.get("CUDA_PATH")) if home]
    folders = [str(home / "bin") for home in homes]
    after = [str(home / "bin") for home in CUDA_FOLDERS]
    search = os.pathsep.join([*folders, path, *after])
    return shutil.which(named, path=search) if named else shutil.which("nvcc", path=search)


def _version_of(cmake: str) -> tuple[int, ...]:
    """Return (3, 25) for CMake 3.25.1, (0, 0) when it does not say."""
    try:
        said = subprocess.run([cmake, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return (0, 0)
    match = re.search(r"version (\d+)\.(\d+)", said)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _defined(text: str, name: str) -> int:
    """Return the number a header defines, directly or by another name; 0 when it does not."""
    for _ in range(3):
        match = re.search(rf"^\s*#\s*define\s+{name}\s+(\w+)", text, re.MULTILINE)
        if match is None:
            return 0
        if match[1].isdigit():
            return int(match[1])
        name = match[1]
    return 0


@contextmanager
def _workplace(output: Path) -> Iterator[Path]:
    """Yield a temporary folder on the disk of the output, which it makes; it is gone afterwards, come what may.

    Raises:
        EnvironmentLackError: `plugin-output`.
    """
    existed = output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".build-", dir=output))
    except OSError as error:
        raise EnvironmentLackError(
            f"cannot write '{output}': {error.strerror}",
            code="plugin-output",
            expected="a directory one may write to",
            hint="give --output DIR, or set XDG_CACHE_HOME",
        ) from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):  # not when the libraries are there
            if not existed:
                output.rmdir()


def _run(step: str, command: Sequence[str], folder: Path, progress: Report, span: tuple[float, float]) -> None:
    """Run one tool to its end.

    Args:
        step: what it does.
        command: the tool with its arguments.
        folder: where.
        progress: called with (step, share) at least once a second.
        span: the shares of the whole work at which it begins and ends.

    Raises:
        BuildError: `plugin-build`.
    """
    _log.debug("%s", " ".join(command))
    output: deque[str] = deque(maxlen=400)
    environment = {name: value for name, value in os.environ.items() if name not in ROOT_VARIABLES} | {"LC_ALL": "C"}
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        reader = threading.Thread(target=_collect, args=(process, output), daemon=True)
        reader.start()
        try:
            _wait(step, process, output, progress, span)
        except BaseException:
            _stop(process)
            raise
        finally:
            reader.join()
    if process.returncode != 0:
        raise _build_failure(step, command, process.returncode, list(output))


def _collect(process: subprocess.Popen[str], output: deque[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        output.append(line.rstrip())
        _log.debug("%s", output[-1])


def _wait(
    step: str, process: subprocess.Popen[str], output: deque[str], progress: Report, span: tuple[float, float]
) -> None:
    """Report until the process has ended; every full minute is a step of its own, so that a log shows life."""
    started = time.monotonic()
    done = 0.0
    while True:
        minutes, seconds = divmod(int(time.monotonic() - started), 60)
        done = max(done, _share(output[-1]) if output else 0.0)
        name = f"{step} for {minutes} min" if minutes else step
        progress(f"{name}, {seconds} s" if minutes or seconds else name, span[0] + done * (span[1] - span[0]))
        try:
            process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            continue
        return


def _share(line: str) -> float:
    """Return the share done that a line of make or ninja tells, 0 for any other."""
    match = _PROGRESS.match(line)
    if match is None:
        return 0.0
    return int(match[1]) / 100 if match[1] else int(match[2]) / max(int(match[3]), 1)


def _stop(process: subprocess.Popen[str]) -> None:
    """End a tool and everything it has started."""
    for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=patience)


def _build_failure(step: str, command: Sequence[str], code: int, output: list[str]) -> BuildError:
    lines = [line for line in output if line.strip() and not line.startswith("See also")]  # files that are gone
    tail = "\n".join(f"    {line}" for line in lines[-TAIL:])
    ended = f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
    first = next((f"{line.strip()}\n  " for line in lines if _ERROR.search(line)), "")
    return BuildError(
        f"{step} the plugin failed: {first}{Path(command[0]).name} {ended}; its last lines:\n{tail or '    (none)'}",
        code="plugin-build",
        expected="a CUDA toolkit whose nvcc knows every architecture asked for, and a C++ compiler it takes",
        hint="-vv shows every line; --archs names fewer architectures",
        details={"step": step, "command": list(command), "returncode": code, "output": lines[-100:]},
    )


def _built(folders: Sequence[Path], library: Library) -> Path:
    """Return the finished library, from the first folder that has it.

    Raises:
        BuildError: `plugin-build` when the build made none.
    """
    paths = [path for folder in folders for path in sorted(folder.rglob(library.file))]
    good = next((path for path in paths if is_shared_library(path)), None)
    if good is None:
        raise BuildError(
            f"the build ended well, but {library.file} is {'not a shared library' if paths else 'not among its files'}",
            code="plugin-build",
            expected=f"{library.file} in the build",
            hint="run again with -vv",
            details={"step": "installing", "found": [str(path) for path in paths]},
        )
    return good.resolve()
