"""How often does the gate cry wolf, and how often does it sleep? Simulated with recorded noise.

The noise is that of the raw samples in results/*.json: of every pair of runners that were measured in turns, the
blocks, each side without its own median and the pair without its median ratio (so that nothing has changed), are drawn
again in stretches of four neighbouring blocks. A stretch keeps what the machine did to both sides and how long it
lasted. HEAD is then made slower by the true change, and the gate of `edgeprune compare` decides, with its rerun.

Stored samples are simulated too: BASE and HEAD are stretches of different times, so what the machine did to one it did
not do to the other. Steps between days and processes are in neither.

    python benchmarks/gate_simulation.py [--trials 4000] [--seed 0] [--quick]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from _common import RESULTS, Goal, add_output_options, markdown_table, say, write_result
from numpy.typing import NDArray

from edgeprune.bench import stats
from edgeprune.bench.gate import Gate, Side
from edgeprune.bench.gate_measure import BLOCKS, QUICK_BLOCKS
from edgeprune.bench.gate_rules import parse_rules
from edgeprune.bench.stats import Ratio

STRETCH = 4
MIN_RECORDED = 8  # blocks of a group that is drawn from
CHANGES = (0.0, 0.02, 0.05, 0.08, 0.12)
FALSE_ALARMS, CAUGHT = 0.01, 0.95
Array = NDArray[np.float64]
Noise = list[tuple[Array, Array]]


def recorded_noise(folder: Path = RESULTS) -> Noise:
    """Return pairs of centred log block values [blocks], [blocks] of runners that took turns."""
    pairs: Noise = []
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith("gate_"):
            continue
        for case in json.loads(path.read_text(encoding="utf-8")).get("cases", []):
            if not isinstance(case.get("runners"), dict):
                continue
            times = [runner.get(f"{case['clock']}_ms", []) for runner in case["runners"].values()]
            blocks = [np.log(stats.block_values(t, case["calls_per_visit"])) for t in times if t]
            blocks = [block - np.median(block) for block in blocks if len(block) >= MIN_RECORDED]
            pairs += [(a, b - np.median(b - a)) for i, a in enumerate(blocks) for b in blocks[:i]]
    if not pairs:
        raise SystemExit(f"no recorded samples in {folder.name}")
    return pairs


def draw(pair: tuple[Array, Array], blocks: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return so many blocks of both sides, in stretches of neighbours."""
    recorded = len(pair[0])
    starts = rng.integers(recorded, size=-(-blocks // STRETCH))
    index = ((starts[:, None] + np.arange(STRETCH)) % recorded).ravel()[:blocks]
    return pair[0][index], pair[1][index]


def side(name: str, logs: Array, change: float = 0.0) -> Side:
    """Return a side of one pruned graph of 10 ms."""
    return Side(name, [{"pruned": np.repeat(10 * np.exp(logs) * (1 + change), 2).reshape(-1, 2, 1)}])


def one_trial(noise: Noise, gate: Gate, change: float, blocks: int, rng: np.random.Generator) -> str:
    """Return the status the gate gives a true change."""
    pair = noise[rng.integers(len(noise))]

    def run() -> tuple[Side, Side]:
        base, head = draw(pair, blocks, rng)
        if not gate.paired:
            head = draw(pair, blocks, rng)[1]
        return side("base", base), side("head", head, change)

    first = run()
    reruns = [run()] if gate.paired and gate.suspects(*first) else []
    return gate.judge(*first, reruns)[0].status


def share(hits: int, trials: int) -> Ratio:
    """Return a share with its 95 % Wilson interval."""
    p, z = hits / trials, 1.96
    middle, half = p + z * z / (2 * trials), z * np.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2))
    scale = 1 + z * z / trials
    return Ratio(p, float(max(0, middle - half) / scale), float((middle + half) / scale), 0.95, trials)


def simulate(
    noise: Noise, *, changes: Sequence[float], trials: int, blocks: int, paired: bool, seed: int
) -> list[dict[str, Any]]:
    """Return a row per true change: how often each status came out."""
    gate, rows = Gate(parse_rules(["median:5%"]), paired=paired), []
    for change in changes:
        rng = np.random.default_rng(seed)
        found = [one_trial(noise, gate, change, blocks, rng) for _ in range(trials)]
        rows.append(
            {
                "change": change,
                "trials": trials,
                "statuses": {status: found.count(status) for status in sorted(set(found))},
                "regressed": asdict(share(found.count("regressed"), trials)),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4000, help="per true change (default: 4000)")
    parser.add_argument("--seed", type=int, default=0)
    add_output_options(parser)
    arguments = parser.parse_args()
    trials = 200 if arguments.quick else arguments.trials
    noise = recorded_noise()
    say(f"{len(noise)} pairs of recorded runners")
    cases, goals = [], []
    for name, blocks, paired in (
        ("head to head", BLOCKS, True),
        ("head to head, --quick", QUICK_BLOCKS, True),
        ("stored samples", BLOCKS, False),
    ):
        say(f"{name}, {blocks} blocks")
        rows = simulate(noise, changes=CHANGES, trials=trials, blocks=blocks, paired=paired, seed=arguments.seed)
        cases.append({"name": name, "blocks": blocks, "paired": paired, "rule": "median:5%", "rows": rows})
        print(f"\n### {name}, {blocks} blocks a run, median:5%\n")
        print(markdown_table([_shown(row) for row in rows]))
        if name == "head to head":
            by_change = {row["change"]: Ratio(**row["regressed"]) for row in rows}
            goals = [
                Goal("false alarms without a change", by_change[0.0], FALSE_ALARMS, at_least=False, unit="%"),
                Goal("caught at +8 %", by_change[0.08], CAUGHT, unit="%"),
            ]
    spread = [float((b - a).std(ddof=1)) for a, b in noise]
    extra = {"noise": {"pairs": len(noise), "median_ratio_sd": float(np.median(spread)), "stretch": STRETCH}}
    write_result("gate_simulation", arguments, goals, cases, extra=extra)


def _shown(row: dict[str, Any]) -> dict[str, str]:
    found = Ratio(**row["regressed"])
    assert found.low is not None and found.high is not None
    return {
        "true change": f"{100 * row['change']:+.0f} %",
        "regressed [95 % CI]": f"{100 * found.estimate:.2f} % [{100 * found.low:.2f}, {100 * found.high:.2f}]",
        "others": ", ".join(f"{status} {n}" for status, n in row["statuses"].items() if status != "regressed"),
        "trials": str(row["trials"]),
    }


if __name__ == "__main__":
    main()
