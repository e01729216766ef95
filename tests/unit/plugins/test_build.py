"""Building with a cmake that compiles nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgeprune.errors import BuildError, EnvironmentLackError, InputError
from edgeprune.plugins import build
from edgeprune.plugins.build import BuildRequest, build_plugins, find_headers, read_headers
from edgeprune.plugins.contract import LIBRARIES
from edgeprune.version import __version__
from tests.helpers.tensorrt import empty_machine, install_tools, write_headers, write_tool

ROOT = Path(__file__).resolve().parents[3]
ORIN = BuildRequest("orin")
TRT8, TRT10 = (library.file for library in LIBRARIES)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder under which all places are, empty."""
    return empty_machine(tmp_path / "home", monkeypatch)


@pytest.fixture
def log(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a machine that can build for TensorRT 8.6 and 10.3, and return the log of cmake's arguments."""
    monkeypatch.setenv("TENSORRT8_ROOT", str(write_headers(home / "trt8", 8, 6)))
    monkeypatch.setenv("TENSORRT10_ROOT", str(write_headers(home / "trt10", 10, 3)))
    return install_tools(home, monkeypatch)


@pytest.fixture
def cache(home: Path) -> Path:
    return home / "cache/edgeprune/plugins" / __version__


def commands(log: Path) -> list[list[str]]:
    """Return the working directory and the arguments of every call of cmake."""
    return [json.loads(line) for line in log.read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("mode", ["ok", "install"])
def test_libraries_are_moved_into_the_cache_and_nothing_else(
    log: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("FAKE_CMAKE", mode)
    assert build_plugins(ORIN) == (cache / TRT8, cache / TRT10)
    assert names(cache) == sorted([TRT8, TRT10])


def test_cmake_is_asked_to_configure_build_and_install(log: Path, home: Path) -> None:
    build_plugins(BuildRequest("orin", jobs=3))
    configure, compile_all, install = commands(log)  # asking for its version is not noted
    source = str(home / "checkout/plugins")
    assert configure[0] == source
    assert configure[1:3] == ["-S", source]
    assert configure[5:] == [
        "--preset",
        "orin",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_CUDA_COMPILER={home / 'bin/nvcc'}",
        f"-DTENSORRT8_ROOT={home / 'trt8'}",
        f"-DTENSORRT10_ROOT={home / 'trt10'}",
    ]
    assert compile_all[1:3] == ["--build", configure[4]]
    assert compile_all[3:] == ["--parallel", "3"]
    assert install[1:3] == ["--install", configure[4]]


def test_architectures_replace_those_of_the_preset(log: Path) -> None:
    build_plugins(BuildRequest("desktop", ("86", "90a-real")))
    build_plugins(BuildRequest(archs=("87",)))
    with_preset, _, _, alone, _, _ = commands(log)
    assert "--preset" in with_preset
    assert "-DCMAKE_CUDA_ARCHITECTURES=86;90a-real" in with_preset
    assert "--preset" not in alone
    assert "-DCMAKE_CUDA_ARCHITECTURES=87" in alone


@pytest.mark.parametrize("request_", [BuildRequest(), BuildRequest("orin", ("sm_87",)), BuildRequest(archs=("8.7",))])
def test_architectures_that_are_missing_or_wrong(log: Path, request_: BuildRequest) -> None:
    with pytest.raises(InputError) as caught:
        build_plugins(request_)
    assert (caught.value.code, caught.value.exit_code) == ("plugin-archs", 2)
    assert not log.exists()


def test_only_what_there_are_headers_for_is_built(log: Path, home: Path, cache: Path) -> None:
    build_plugins(BuildRequest("orin", tensorrt_roots=(write_headers(home / "given", 11, 1),)))
    assert names(cache) == [TRT10]
    assert commands(log)[0][-1] == f"-DTENSORRT10_ROOT={home / 'given'}"


def test_new_library_replaces_the_old_one_and_others_stay(log: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / TRT8).write_text("old")
    (cache / "notes.txt").write_text("mine")
    build_plugins(ORIN)
    assert names(cache) == sorted([TRT8, TRT10, "notes.txt"])
    assert (cache / TRT8).read_bytes().startswith(b"\x7fELF")


def test_output_goes_elsewhere_on_request(log: Path, home: Path, cache: Path) -> None:
    build_plugins(BuildRequest("orin", output=home / "out"))
    assert names(home / "out") == sorted([TRT8, TRT10])
    assert not cache.exists()


def test_progress_goes_up_and_tells_the_steps(log: Path) -> None:
    told: list[tuple[str, float]] = []
    build_plugins(ORIN, lambda step, share: told.append((step.partition(",")[0], share)))
    shares = [share for _, share in told]
    assert shares == sorted(shares) and shares[-1] == 1.0
    steps = list(dict.fromkeys(step for step, _ in told))
    assert steps == ["looking for compilers and headers", "configuring", "compiling", "installing", "installed"]


@pytest.mark.parametrize(
    ("line", "share"),
    [("[ 50%] Building CUDA object", 0.5), ("[3/4] Linking", 0.75), ("[0/0] x", 0.0), ("-- Configuring done", 0.0)],
)
def test_share_done_is_read_from_make_and_ninja(line: str, share: float) -> None:
    assert build._share(line) == share


@pytest.mark.parametrize("step", ["configure", "compile", "install"])
def test_failure_shows_the_last_lines_and_leaves_nothing(
    log: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setenv("FAKE_CMAKE", f"fail-{step}")
    with pytest.raises(BuildError) as caught:
        build_plugins(ORIN)
    error = caught.value
    assert (error.code, error.exit_code) == ("plugin-build", 4)
    assert error.message.splitlines()[0].endswith("the plugin failed: nvcc fatal: Unsupported gpu 'sm_1'")
    assert error.message.endswith("    make: *** [all] Error 2")
    assert "cmake ended with 2" in error.message
    assert "line 49" in error.message and "line 30" not in error.message and "See also" not in error.message
    assert error.details["returncode"] == 2
    assert not cache.exists()


@pytest.mark.parametrize("mode", ["nothing", "text"])
def test_build_that_makes_no_library_has_failed(
    log: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("FAKE_CMAKE", mode)
    with pytest.raises(BuildError) as caught:
        build_plugins(ORIN)
    assert caught.value.code == "plugin-build"
    assert not cache.exists()


def test_every_minute_is_a_step_so_that_a_log_shows_life(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter((0.0, 0.5, 59.0, 61.0, 125.0, 126.0))
    monkeypatch.setattr(build, "time", SimpleNamespace(monotonic=lambda: next(seconds)))

    class Slow:
        waits = 0

        def wait(self, timeout: float) -> None:
            self.waits += 1
            if self.waits < 4:
                raise subprocess.TimeoutExpired("cmake", timeout)

    told: list[str] = []
    build._wait("compiling", Slow(), ["[ 50%] x"], lambda step, share: told.append(f"{step} {share:.2f}"), (0.0, 0.5))
    assert told == [
        "compiling 0.25",
        "compiling, 59 s 0.25",
        "compiling for 1 min, 1 s 0.25",
        "compiling for 2 min, 5 s 0.25",
    ]


def test_failure_keeps_the_libraries_of_an_earlier_build(
    log: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_plugins(ORIN)
    monkeypatch.setenv("FAKE_CMAKE", "fail-compile")
    with pytest.raises(BuildError):
        build_plugins(ORIN)
    assert names(cache) == sorted([TRT8, TRT10])


@pytest.mark.parametrize("step", ["configuring", "compiling", "installing"])
def test_interruption_leaves_nothing(log: Path, cache: Path, step: str) -> None:
    def interrupt(name: str, share: float) -> None:
        if name.startswith(step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plugins(ORIN, interrupt)
    assert not cache.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_the_compilers_and_leaves_nothing(
    log: Path, home: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    monkeypatch.setenv("FAKE_CMAKE", "hang")
    script = (
        "import signal, sys; from pathlib import Path; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from edgeprune.plugins import locate; locate.ROOT = Path(sys.argv.pop(1))\n"
        "from edgeprune.cli.main import main; main()"
    )
    command = [sys.executable, "-c", script, str(home / "checkout"), "plugins", "build", "--preset", "orin"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("compiling" in line for line in process.stderr)
        while not (log.parent / "pid").exists() or not (log.parent / "pid").read_text():
            assert process.poll() is None
        assert [name[:7] for name in names(cache)] == [".build-"]
        process.send_signal(number)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == code, rest
    assert "nothing was written" in rest
    assert not cache.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((log.parent / "pid").read_text()), 0)


def test_everything_that_is_missing_is_named_at_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_tools(home, monkeypatch)
    monkeypatch.setenv("PATH", str(home / "empty"))
    with pytest.raises(EnvironmentLackError) as caught:
        build_plugins(ORIN)
    error = caught.value
    assert (error.code, error.exit_code) == ("plugin-tools", 3)
    assert error.details["missing"] == ["cmake 3.21 or newer", "nvcc", "TensorRT's headers"]
    assert all(word in str(error) for word in ("pip install cmake", "CUDACXX", "--tensorrt-root"))


@pytest.mark.parametrize(("name", "called"), [("cmake", "cmake 3.21 or newer"), ("nvcc", "nvcc")])
def test_missing_tool(log: Path, home: Path, name: str, called: str) -> None:
    (home / "bin" / name).unlink()
    with pytest.raises(EnvironmentLackError) as caught:
        build_plugins(ORIN)
    assert (caught.value.code, caught.value.details["missing"]) == ("plugin-tools", [called])


@pytest.mark.parametrize("version", ["3.16.3", "unknown"])
def test_cmake_that_is_too_old(log: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setenv("FAKE_CMAKE_VERSION", version)
    with pytest.raises(EnvironmentLackError) as caught:
        build_plugins(ORIN)
    assert caught.value.details["missing"] == ["cmake 3.21 or newer"]


@pytest.mark.parametrize(("minor", "asked"), [(5, True), (6, False)])
def test_library_for_a_tensorrt_that_cannot_load_any_registers_itself(
    log: Path, home: Path, minor: int, asked: bool
) -> None:
    build_plugins(BuildRequest("orin", tensorrt_roots=(write_headers(home / "given", 8, minor),)))
    assert ("-DEDGEPRUNE_SELF_REGISTER=ON" in commands(log)[0]) is asked


def test_a_library_can_be_asked_to_register_itself(log: Path, home: Path) -> None:
    roots = (write_headers(home / "given", 10, 3),)
    build_plugins(BuildRequest("orin", tensorrt_roots=roots, self_register=True))
    assert "-DEDGEPRUNE_SELF_REGISTER=ON" in commands(log)[0]


def test_installed_package_says_where_the_sources_are(log: Path, home: Path) -> None:
    (home / "checkout/plugins/CMakeLists.txt").unlink()
    with pytest.raises(EnvironmentLackError, match="sources") as caught:
        build_plugins(ORIN)
    assert (caught.value.code, caught.value.exit_code) == ("plugin-sources", 3)
    assert "clone" in str(caught.value.hint)


def test_output_that_cannot_be_written(log: Path, home: Path) -> None:
    (home / "file").touch()
    with pytest.raises(EnvironmentLackError) as caught:
        build_plugins(BuildRequest("orin", output=home / "file/below"))
    assert (caught.value.code, caught.value.exit_code) == ("plugin-output", 3)


@pytest.mark.parametrize("variable", ["CUDACXX", "CUDA_HOME", "CUDA_PATH"])
def test_nvcc_of_the_environment_comes_first(
    log: Path, home: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    nvcc = write_tool(home / "cuda/bin", "nvcc", "exit 0")
    monkeypatch.setenv(variable, str(nvcc if variable == "CUDACXX" else home / "cuda"))
    build_plugins(ORIN)
    assert f"-DCMAKE_CUDA_COMPILER={nvcc}" in commands(log)[0]


def test_nvcc_where_the_toolkit_usually_is(log: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "bin/nvcc").unlink()
    nvcc = write_tool(home / "usual/bin", "nvcc", "exit 0")
    monkeypatch.setattr(build, "CUDA_FOLDERS", (home / "usual",))
    build_plugins(ORIN)
    assert f"-DCMAKE_CUDA_COMPILER={nvcc}" in commands(log)[0]


@pytest.mark.parametrize(("major", "minor"), [(8, 5), (8, 6), (10, 0), (10, 13), (11, 1)])
def test_version_is_read_from_the_headers(tmp_path: Path, major: int, minor: int) -> None:
    headers = read_headers(write_headers(tmp_path / "trt", major, minor))
    assert not isinstance(headers, str)
    assert headers.version == f"{major}.{minor}"
    assert major in headers.library.majors


def test_headers_of_other_versions_are_refused_by_name(tmp_path: Path) -> None:
    assert "TensorRT 9.3" in str(read_headers(write_headers(tmp_path / "trt", 9, 3)))
    assert "no include/NvInfer.h" in str(read_headers(tmp_path))


def test_headers_of_the_system_are_found_and_linked_alone(
    home: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = install_tools(home, monkeypatch)
    folder = f"include/{os.uname().machine}-linux-gnu"
    write_headers(home / "usr", 10, 3, folder)
    (home / "usr" / folder / "stdio.h").touch()
    (found,) = find_headers()
    assert found.include == home / "usr" / folder
    work = home / "work"
    build_root = build._root_of(found, work)
    assert names(build_root / "include") == ["NvInfer.h", "NvInferVersion.h"]
    build_plugins(ORIN)
    assert names(cache) == [TRT10]
    assert len(commands(log)) == 3


def test_environment_comes_before_the_system(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_headers(home / "usr", 10, 3)
    monkeypatch.setenv("TENSORRT_ROOT", str(write_headers(home / "mine", 11, 1)))
    assert [found.version for found in find_headers()] == ["11.1"]


@pytest.mark.parametrize("variable", ["TENSORRT_ROOT", "TENSORRT8_ROOT"])
def test_folder_of_the_environment_without_its_headers_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    root = home / "empty" if variable == "TENSORRT_ROOT" else write_headers(home / "trt10", 10, 3)
    monkeypatch.setenv(variable, str(root))
    with pytest.raises(InputError, match=variable) as caught:
        find_headers()
    assert (caught.value.code, caught.value.exit_code) == ("tensorrt-root", 2)


def test_given_folder_without_headers_is_refused(home: Path) -> None:
    with pytest.raises(InputError, match="--tensorrt-root") as caught:
        find_headers((home,))
    assert caught.value.code == "tensorrt-root"
