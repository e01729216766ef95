#!/usr/bin/env bash
# Runs every RUN step of the CPU image in fresh Debian roots, then `edgeprune doctor` and a bundle in the result.
# As root with debootstrap (installed if apt-get can); else in a temporary directory, as far as that goes.
#   docker/test_run_steps.sh [PYTHON]   PYTHON has edgeprune with its dev packages; by default .venv's
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

roots=--no-root
if [ "$(id -u)" = 0 ]; then
  command -v debootstrap >/dev/null || { apt-get update && apt-get install -y --no-install-recommends debootstrap; } >"$work/apt.log" 2>&1 || true
  if command -v debootstrap >/dev/null && unshare --mount chroot / true 2>/dev/null; then roots=; fi
fi

"$python" -m edgeprune export -m vit_digits --method evit --keep-rate 0.7 --random-weights --no-verify -o "$work/bundle" -q
"$python" -c "from PIL import Image; Image.new('RGB', (90, 70), (200, 30, 60)).save('$work/photo.png')"
"$python" docker/run_steps.py docker/Dockerfile.cpu $roots --carry "$work/bundle" --carry "$work/photo.png" \
  --then "test \$(id -u) != 0 || test -n '$roots'" \
  --then "edgeprune doctor" \
  --then "edgeprune run bundle photo.png"
