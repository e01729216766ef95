"""Every method on the digits task: accuracy against multiply-accumulates, several seeds, dense and random as the frame.

Trains what is not there yet (`--out`), evaluates every setting with the torch reference, prints a Markdown table and
writes `results/digits_methods.json`. Accuracy does not depend on the machine; nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch

from edgeprune.data import open_dataset
from edgeprune.models.checkpoint import load_checkpoint
from edgeprune.models.fit import load_into
from edgeprune.models.registry import get_model_config
from edgeprune.pruning import METHODS, get_method
from edgeprune.pruning.base import Where, parse_stages
from edgeprune.pruning.model import PrunedViT
from edgeprune.runtime.manifest import PreprocessInfo
from edgeprune.training.adapters import gmacs

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINTS = ROOT / "checkpoints"
DENSE = CHECKPOINTS / "vit_digits_dense.safetensors"
MODEL, BATCH = "vit_digits", 250
SEEDS = (0, 1, 2)
Options = dict[str, str]


@dataclass(frozen=True)
class Case:
    """One set of weights per seed, and the settings it is evaluated at.

    Attributes:
        name: of the files.
        train: keep rate and options of the training, None for the dense weights as they are.
        settings: (label, keep rate, options) to evaluate at.
        recipe: values of the recipe that are not the preset's.
        draws: random positions are drawn so many times for every set of weights.
    """

    name: str
    method: str
    train: tuple[float, Options] | None
    settings: tuple[tuple[str, float, Options], ...]
    stages: str | None = None
    recipe: Options = field(default_factory=dict)
    draws: int = 1

    @property
    def ships(self) -> bool:
        """Whether the weights of seed 0 are part of the repository."""
        return self.train is not None and self.name == self.method != "random"


def by_rate(*rates: float, **options: str) -> tuple[tuple[str, float, Options], ...]:
    """Return settings that differ in the keep rate."""
    return tuple((f"keep rate {rate:g}", rate, options) for rate in rates)


def by_option(name: str, *values: str, **others: str) -> tuple[tuple[str, float, Options], ...]:
    """Return settings that differ in one option."""
    return tuple((f"{name}={value}", 1.0, {**others, name: value}) for value in values)


RATES = (0.9, 0.7, 0.5, 0.3)
CASES = (
    Case("dense", "dense", None, (("every token", 1.0, {}),)),
    Case("random", "random", (0.5, {}), by_rate(*RATES), draws=3),
    Case("random_late", "random", (0.5, {}), by_rate(*RATES), stages="2,3,4", draws=3),
    Case("dynamicvit", "dynamicvit", (0.5, {}), by_rate(*RATES)),
    Case("evit", "evit", (0.5, {}), by_rate(*RATES), stages="0,2,3"),
    Case("ats_untrained", "ats", None, by_rate(1.0, 0.5)),
    Case("ats", "ats", (1.0, {}), by_rate(1.0, *RATES)),
    Case("ats_early", "ats", (1.0, {}), by_rate(1.0, *RATES), stages="0,1,2,3"),
    Case("asvit", "asvit", (1.0, {}), (("budget 0.6", 1.0, {}),), stages="1,3,4"),
    Case("asvit_low", "asvit", (1.0, {}), (("budget 0.4", 1.0, {}),), stages="1,3,4", recipe={"budget": "0.4"}),
    Case("sait", "sait", (1.0, {"mass": "0.8"}),
         (("no pruning", 1.0, {"mass": "1"}), *by_option("mass", "0.9", "0.8", "0.6", "0.4"),
          ("top-k, keep rate 0.3", 0.3, {"select": "topk"}))),
    Case("cropr", "cropr", (1.0, {"tokens_per_block": "12"}), by_option("tokens_per_block", "4", "8", "12", "14")),
    Case("tome_untrained", "tome", None, by_option("r", "4", "8", "12", "16")),
    Case("tome", "tome", (1.0, {"r": "12"}), by_option("r", "4", "8", "12", "16")),
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One row: shares in [0, 1], operations in units of 1e6, tokens behind the last stage.

    `attentions` is how many blocks' attention the sequence has passed when the first token goes: information that was
    already passed on is not lost with its token, so only rows with as many attentions compare what ranks the tokens.
    """

    case: str
    method: str
    setting: str
    seeds: int
    top1: float
    deviation: float | None
    mmacs: float
    kept: float
    trained: bool
    attentions: int


def command(case: Case, seed: int, out: Path) -> list[str]:
    """Return the training's command line."""
    assert case.train is not None
    rate, options = case.train
    words = ["finetune", "--model", MODEL, "--method", case.method, "--data", "digits"]
    words += ["--checkpoint", str(DENSE.relative_to(ROOT)), "--seed", str(seed), "--threads", "1"]
    words += ["--keep-rate", f"{rate:g}"] if rate < 1 else []
    words += ["--stages", case.stages] if case.stages else []
    for flag, values in (("--method-option", options), ("--recipe-option", case.recipe)):
        for key, value in values.items():
            words += [flag, f"{key}={value}"]
    return [*words, "--output", str(out.relative_to(ROOT) if out.is_relative_to(ROOT) else out)]


def weights_of(case: Case, seed: int, out: Path) -> Path:
    """Return the weights of a case and a seed, trained if they are not there."""
    if case.train is None:
        return DENSE
    name = f"vit_digits_{case.name}"
    shipped = seed == 0 and case.ships
    path = CHECKPOINTS / f"{name}.safetensors" if shipped else out / f"{name}.{seed}.safetensors"
    if not path.exists():
        words = command(case, seed, path)
        print(f"edgeprune {shlex.join(words)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "edgeprune", *words, "--log", "none", "-q"], check=True, cwd=ROOT)
    return path


@lru_cache(maxsize=1)
def held_out() -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the evaluation set in batches, images as the model takes them."""
    config = get_model_config(MODEL)
    info = PreprocessInfo(
        image_size=config.image_size, mean=config.mean, std=config.std, crop_pct=1.0, interpolation="bicubic"
    )
    return list(open_dataset("digits").batches(BATCH, info))


def evaluate(case: Case, setting: tuple[str, float, Options], weights: Path, draw: int) -> tuple[float, float, float]:
    """Return top-1, mean multiply-accumulates of an image in units of 1e6, mean tokens behind the last stage."""
    _, rate, given = setting
    config, method = get_model_config(MODEL), get_method(case.method)
    options = method.parse_options({**given, **({"seed": str(100 * draw)} if case.method == "random" else {})})
    stages = method.stages(config, parse_stages(case.stages, rate), options)
    model = PrunedViT(config, stages)
    prefixes = [p for m in METHODS.values() for pair in m.key_prefixes.items() for p in pair]
    load_into(model, load_checkpoint(weights), key_prefixes=method.key_prefixes, ignore_prefixes=prefixes)
    right, macs, kept, seen = 0, 0.0, 0.0, 0
    with torch.inference_mode():
        for images, labels in held_out():
            out = model.eval().run(torch.from_numpy(images))
            assert not out.overflow.any()
            left = [count + float(stage.counts.fused) for stage, count in zip(stages, out.counts, strict=True)]
            right += int((out.logits.argmax(1).numpy() == labels).sum())
            per_image = np.broadcast_to(np.asarray(gmacs(config, stages, left)), len(labels))
            macs += 1e3 * float(per_image.sum())
            kept += float(left[-1].sum()) if left else len(labels) * config.num_patches
            seen += len(labels)
    return right / seen, macs / seen, kept / seen


def points(cases: tuple[Case, ...], seeds: tuple[int, ...], out: Path) -> Iterator[Point]:
    """Yield every row."""
    for case in cases:
        files = [weights_of(case, seed, out) for seed in (seeds if case.train else seeds[:1])]
        for setting in case.settings:
            runs = [evaluate(case, setting, file, draw) for file in files for draw in range(case.draws)]
            by_file = [mean(r[0] for r in runs[i : i + case.draws]) for i in range(0, len(runs), case.draws)]
            spread = stdev(by_file) if len(by_file) > 1 else None
            numbers = (mean(r[1] for r in runs), mean(r[2] for r in runs))
            point = Point(case.name, case.method, setting[0], len(files), mean(by_file), spread, *numbers,
                          case.train is not None, attentions_before(case, setting))  # fmt: skip
            print(f"{point.case} {point.setting}: {100 * point.top1:.2f} %, {point.mmacs:.1f} M", file=sys.stderr)
            yield point


def attentions_before(case: Case, setting: tuple[str, float, Options]) -> int:
    """Return how many attentions the sequence has passed when the first token goes."""
    _, rate, options = setting
    config, method = get_model_config(MODEL), get_method(case.method)
    stages = method.stages(config, parse_stages(case.stages, rate), method.parse_options(options))
    return min((s.block + (s.where is Where.MID_BLOCK) for s in stages), default=config.depth)


def at_macs(curve: list[Point], mmacs: float) -> float | None:
    """Return the accuracy of a curve at so many operations, interpolated linearly; None outside of it."""
    known = sorted((p.mmacs, p.top1) for p in curve)
    if not known or not known[0][0] <= mmacs <= known[-1][0]:
        return None
    return float(np.interp(mmacs, [m for m, _ in known], [t for _, t in known]))


def table(rows: list[Point]) -> str:
    """Return the Markdown table."""
    dense = next((p for p in rows if p.case == "dense"), None)
    frames = {1: "random", 2: "random_late"}  # by attentions seen
    lines = [
        "| method | setting | attentions seen | MMACs | fewer | tokens left | top-1 (%) | against dense | "
        "random at the same MACs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for p in rows:
        name = p.method if p.trained or p.method == "dense" else f"{p.method}, not trained"
        spread = "" if p.deviation is None else f" ± {100 * p.deviation:.1f}"
        fewer = "" if dense is None or p is dense else f"{100 * (1 - p.mmacs / dense.mmacs):.0f} %"
        against = "" if dense is None or p is dense else f"{100 * (p.top1 - dense.top1):+.1f}"
        frame = [] if p.method in ("random", "dense") else [frames.get(p.attentions), "dense"]
        random = at_macs([q for q in rows if q.case in frame], p.mmacs)
        beside = "" if random is None else f"{100 * random:.1f}"
        accuracy = f"{100 * p.top1:.1f}{spread}"
        seen = str(p.attentions) if p is not dense else ""
        cells = [name, p.setting, seen, f"{p.mmacs:.1f}", fewer, f"{p.kept:.1f}", accuracy, against, beside]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "digits_methods", help="where trained weights lie")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--cases", nargs="+", choices=[c.name for c in CASES], help="instead of all")
    parser.add_argument("--train-only", action="store_true", help="train what is missing and stop")
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks" / "results" / "digits_methods.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = tuple(c for c in CASES if arguments.cases is None or c.name in arguments.cases)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.train_only:
        for seed in arguments.seeds:
            for case in cases:
                weights_of(case, seed, arguments.out)
        return
    rows = list(points(cases, tuple(arguments.seeds), arguments.out))
    print(table(rows))
    content = {
        "schema": "edgeprune-digits-methods/1",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seeds": arguments.seeds,
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "points": [asdict(row) for row in rows],
    }
    arguments.result.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
