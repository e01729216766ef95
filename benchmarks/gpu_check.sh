#!/usr/bin/env bash
# Everything that needs a GPU, in one command and ten minutes; what is missing here is skipped and said.
#
#   benchmarks/gpu_check.sh                    on the GPU host; exports too where torch is installed
#   benchmarks/gpu_check.sh --prepare DIR      on a machine with torch: the bundles, to be copied to the GPU host
#   benchmarks/gpu_check.sh --bundles DIR      on a GPU host without torch
#
# PYTHON names the interpreter (default: python3). Other options: benchmarks/gpu_check.sh --help.
# Exit code: 0 nothing failed, 1 something failed, 3 there is no GPU, 2 wrong usage.
set -euo pipefail
exec "${PYTHON:-python3}" "$(cd "$(dirname "$0")" && pwd)/gpu_check.py" "$@"
