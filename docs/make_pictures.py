"""Remakes the pictures of docs/images/ from a real report: export, evaluate, bench, report, and a headless Chromium.

    python docs/make_pictures.py

Takes a few minutes, from the root of a checkout with the `dev` extra and Chromium. What is measured is this machine,
so the pictures name it. Everything else it writes goes to out/tour/.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
OUT, IMAGES = Path("out/tour"), Path("docs/images")
CHECKPOINT = "checkpoints/vit_digits_evit.safetensors"
EXPORT = f"export -m vit_digits --method evit --stages 0,2,3 --keep-rate 1.0,0.7,0.5,0.3 --checkpoint {CHECKPOINT}"
COMMANDS = (
    f"{EXPORT} --token-outputs --overwrite -o {OUT}/bundle",
    f"evaluate {OUT}/bundle --data digits --json",
    f"bench {OUT}/bundle --layers --duration 30 -o {OUT}/bench.json",
    f"report {OUT}/bench.json {OUT}/evaluate.json {OUT}/bundle --data digits --count 3 -o {OUT}/report.html",
)
LARGEST = 150 * 1024  # bytes of a picture

# file -> colours, width in CSS pixels, script run first, selectors whose boxes bound the picture
DESKTOP, PHONE = 920, 390
SLIDE = "const s = document.querySelector('[data-density-slider]'); s.value = 2; s.dispatchEvent(new Event('input'))"
PICTURES = {
    "report-summary.png": ("light", DESKTOP, "0", ("header.top", ".summary .sentences")),
    "report-frontier.png": ("light", DESKTOP, "0", ("#frontier",)),
    "report-kept.png": ("dark", DESKTOP, SLIDE, ("#kept",)),
    "report-phone.png": ("light", PHONE, "0", ("header.top", ".summary .hero")),
}
BOX = """(() => {
  const boxes = %s.map((s) => document.querySelector(s).getBoundingClientRect());
  const top = Math.min(...boxes.map((b) => b.top)), bottom = Math.max(...boxes.map((b) => b.bottom));
  return [0, top + scrollY, innerWidth, bottom + scrollY + 12];
})()"""


def measure() -> None:
    """Run the commands; what `evaluate --json` prints becomes a file."""
    for command in COMMANDS:
        print("edgeprune", command, flush=True)
        words = [sys.executable, "-m", "edgeprune", *command.split()]
        done = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        if "--json" in words:
            (ROOT / OUT / "evaluate.json").write_text(done.stdout, encoding="utf-8")


def draw() -> None:
    """Write the pictures, as few colours as keep them small."""
    sys.path.insert(0, str(ROOT))
    from tests.helpers.browser import find_chromium, open_browser

    program = find_chromium()
    if program is None:
        raise SystemExit("no Chromium is installed")
    (ROOT / IMAGES).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, open_browser(program, Path(folder) / "profile") as page:
        for name, (scheme, width, script, around) in PICTURES.items():
            page.resize(width, 900, phone=width == PHONE)
            page.prefer(scheme)
            page.open(ROOT / OUT / "report.html")
            page.run(script)
            box = page.run(BOX % list(around))
            page.screenshot(Path(folder) / name)
            with Image.open(Path(folder) / name) as whole:
                part = whole.convert("RGB").crop([round(edge) for edge in box]).quantize(256, dither=Image.Dither.NONE)
            part.save(ROOT / IMAGES / name, optimize=True)
            size = (ROOT / IMAGES / name).stat().st_size
            print(f"{IMAGES / name}: {part.width} x {part.height}, {size / 1024:.0f} KiB")
            if size > LARGEST:
                raise SystemExit(f"{name} is larger than {LARGEST // 1024} KiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw-only", action="store_true", help="from the report that out/tour/ has already")
    if not parser.parse_args().draw_only:
        measure()
    draw()
