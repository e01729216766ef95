"""A cmake that compiles nothing. FAKE_CMAKE says how it behaves, FAKE_CMAKE_LOG where it notes its arguments."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main(arguments: list[str]) -> int:
    mode, log = os.environ.get("FAKE_CMAKE", "ok"), Path(os.environ["FAKE_CMAKE_LOG"])
    if arguments == ["--version"]:
        print(f"cmake version {os.environ.get('FAKE_CMAKE_VERSION', '3.25.1')}")
        return 0
    read = {"TENSORRT_ROOT", "TENSORRT8_ROOT", "TENSORRT10_ROOT"} & os.environ.keys()
    assert not read, "cmake would look there, too"
    with log.open("a") as file:
        file.write(json.dumps([str(Path.cwd()), *arguments]) + "\n")
    step = {"--build": "compile", "--install": "install"}.get(arguments[0], "configure")
    if mode == f"fail-{step}":
        sys.stderr.write("nvcc fatal: Unsupported gpu 'sm_1'\n" + "".join(f"line {number}\n" for number in range(50)))
        sys.stderr.write("See also somewhere\nmake: *** [all] Error 2\n")
        return 2
    {"configure": configure, "compile": build, "install": install}[step](arguments, mode, log)
    return 0


def configure(arguments: list[str], mode: str, log: Path) -> None:
    folder = Path(arguments[arguments.index("-B") + 1])
    folder.mkdir(parents=True)
    roots = [word.removeprefix("-DTENSORRT").partition("_ROOT=") for word in arguments if "_ROOT=" in word]
    made = [abi for abi, _, root in roots if (Path(root) / "include/NvInfer.h").is_file()]
    (folder / "made").write_text(" ".join(made))


def build(arguments: list[str], mode: str, log: Path) -> None:
    print("[ 50%] Building CUDA object", flush=True)
    if mode == "hang":
        (log.parent / "pid").write_text(str(os.getpid()))
        time.sleep(600)
    folder = Path(arguments[1])
    head = b"text" if mode == "text" else b"\x7fELF" + bytes(14) + (62).to_bytes(2, "little")
    for abi in (folder / "made").read_text().split() if mode != "nothing" else ():
        (folder / f"libedgeprune_trt{abi}.so").write_bytes(head + bytes(44))


def install(arguments: list[str], mode: str, log: Path) -> None:
    if mode == "install":
        stage = Path(arguments[arguments.index("--prefix") + 1]) / "lib"
        stage.mkdir(parents=True)
        for path in Path(arguments[1]).glob("*.so"):
            path.rename(stage / path.name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
