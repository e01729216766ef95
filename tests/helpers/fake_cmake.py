"""A cmake that compiles nothing. FAKE_CMAKE says how it behaves, FAKE_CMAKE_LOG where it notes its arguments."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main(arguments: list[str]) -> int:
    mode, log = os.environ.get("FAKE_CMAKE", "ok"), Path(os.environ["FAKE_CMAKE_LOG"])
    with log.open("a") as file:
        file.write(json.dumps([str(Path.cwd()), *arguments]) + "\n")
    step = {"--build": "compile", "--install": "install"}.get(arguments[0], "configure")
    if mode == f"fail-{step}":
        sys.stderr.write("".join(f"line {number}\n" for number in range(50)) + "nvcc fatal: Unsupported gpu 'sm_1'\n")
        return 2
    if step == "configure":
        folder = Path(arguments[arguments.index("-B") + 1])
        folder.mkdir(parents=True)
        roots = [word for word in arguments if "_ROOT=" in word and not word.endswith("=")]
        assert all((Path(word.partition("=")[2]) / "include/NvInfer.h").is_file() for word in roots)
        (folder / "made").write_text(" ".join(word[len("-DTENSORRT") :].partition("_")[0] for word in roots))
    elif step == "compile":
        print("[ 50%] Building CUDA object", flush=True)
        if mode == "hang":
            (log.parent / "pid").write_text(str(os.getpid()))
            time.sleep(600)
    elif mode != "nothing":
        stage = Path(arguments[arguments.index("--prefix") + 1]) / "lib"
        stage.mkdir(parents=True)
        for abi in (Path(arguments[1]) / "made").read_text().split():
            head = b"\x7fELF" + bytes(14) + (62).to_bytes(2, "little")
            (stage / f"libedgeprune_trt{abi}.so").write_bytes(b"text" if mode == "text" else head + bytes(44))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
