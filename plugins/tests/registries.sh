#!/usr/bin/env bash
# Installs the TensorRT registries that tests/unit/plugins loads the plugin libraries into. Neither needs a GPU.
#   build/registries/trt8    TensorRT 8.6.0, for CPython 3.10 alone
#   build/registries/trt11   TensorRT 11.4, lean run time
# Usage:  plugins/tests/registries.sh [trt8] [trt11]      (both when none is named; about 800 MB to download)
# TensorRT is NVIDIA's, under its own licence: it is downloaded from PyPI and never committed or passed on.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)/build/registries
pip_install=(-m pip install --quiet --disable-pip-version-check)

python310() {
  local candidate
  for candidate in "${EDGEPRUNE_PYTHON310:-}" "$(command -v python3.10 || true)" \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.10.*/bin/python3.10; do
    if [ -n "$candidate" ] && "$candidate" -c 'import venv' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "registries: TensorRT 8.6.0 needs CPython 3.10; name one in EDGEPRUNE_PYTHON310" >&2
  return 1
}

install_trt8() {
  local python venv=$root/trt8 packages scratch=$root/scratch
  python=$(python310)
  rm -rf "$venv" "$scratch"
  mkdir -p "$scratch"
  "$python" -m venv "$venv"
  "$venv/bin/python" "${pip_install[@]}" 'numpy<2'
  "$venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    -d "$scratch" tensorrt==8.6.0
  packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  # The builder's kernels, most of the wheel, are read by nothing that a registry does.
  "$venv/bin/python" - "$scratch" "$packages" <<'PY'
import sys, zipfile
from pathlib import Path
wanted = {"__init__.py", "tensorrt.so", "libnvinfer.so.8", "libnvonnxparser.so.8", "libnvparsers.so.8"}
(wheel,) = Path(sys.argv[1]).glob("tensorrt-8.6.0-*.whl")
with zipfile.ZipFile(wheel) as archive:
    for name in archive.namelist():
        if name.startswith("tensorrt/") and Path(name).name in wanted:
            archive.extract(name, sys.argv[2])
PY
  # TensorRT's own plugin library drags in cuBLAS and cuDNN; the bindings want one symbol of it.
  printf 'int initLibNvInferPlugins(void *logger, const char *space) { return logger && space; }\n' \
    | "${CC:-cc}" -xc -shared -fPIC -Wl,-soname,libnvinfer_plugin.so.8 -o "$packages/tensorrt/libnvinfer_plugin.so.8" -
  rm -rf "$scratch"
}

install_trt11() {
  local venv=$root/trt11
  rm -rf "$venv"
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/python" "${pip_install[@]}" numpy
  "$venv/bin/python" "${pip_install[@]}" --no-deps \
    'tensorrt-lean-cu13-libs==11.4.*' 'tensorrt-lean-cu13-bindings==11.4.*'
}

mkdir -p "$root"
[ $# -gt 0 ] || set -- trt8 trt11
for name in "$@"; do
  case $name in
    trt8 | trt11) "install_$name" ;;
    *) echo "registries: no registry $name, only trt8 and trt11" >&2 && exit 2 ;;
  esac
  touch "$root/$name/ready"
done
