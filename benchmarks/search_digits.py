"""Searched schedules against uniform keep rates at the same latency, on the digits with the shipped checkpoints.

For every method: search the whole frontier on training images, then, for each uniform schedule, take what the search
would choose for exactly that schedule's latency, and compare both on test images, which had no part in the choice.
The uniform schedules are part of what is searched. Finalists are exported and measured; how far the prediction is off
stands beside the goal of 5 %. Writes `results/search_digits.<cpu>.json`, anew after every method.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _common import Goal, exact, markdown_table, pinned, say, write_result

from edgeprune.export import ExportRequest
from edgeprune.search import SearchRequest, SearchResult, search_schedules
from edgeprune.search.run import Row

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
METHODS: dict[str, dict[str, Any]] = {
    "evit": {"stages": "0,2,3"},
    "dynamicvit": {},
    "sait": {"method_options": {"select": "topk"}},
    "ats": {},
    "cropr": {},
    "tome": {},
}
ERROR_GOAL = 0.05


def search(method: str, arguments: argparse.Namespace) -> SearchResult:
    """Return the frontier of a method."""
    export = ExportRequest(
        model="vit_digits",
        method=method,
        checkpoint=str(CHECKPOINTS / f"vit_digits_{method}.safetensors"),
        **METHODS[method],
    )
    numbers = {"images": 256, "subset": 128, "evaluations": 40, "finalists": 4} if arguments.quick else {
        "images": 2000, "subset": 500, "evaluations": 200, "finalists": 8}  # fmt: skip
    request = SearchRequest(export, "digits", max_drop=1.0, seed=arguments.seed, quick=arguments.quick, **numbers)
    return search_schedules(request, progress=lambda step, share: None)


def compare(result: SearchResult) -> list[dict[str, Any]]:
    """Return for every uniform schedule what the search chooses for its latency, and both accuracies."""
    both = zip(result.uniform, result.instead, strict=True)
    return [{"uniform": asdict(uniform), "searched": asdict(searched)} for uniform, searched in both]


def rows(pairs: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the comparison as a table."""
    made = []
    for pair in pairs:
        uniform, searched = Row(**pair["uniform"]), Row(**pair["searched"])
        made.append(
            {
                "uniform": str(uniform.label),
                "ms": f"{uniform.predicted_ms:.3f}",
                "test top-1 (%)": f"{100 * (uniform.test_top1 or 0):.2f}",
                "searched": searched.label or f"{searched.stages or ''} {searched.options or ''}",
                "its ms": f"{searched.predicted_ms:.3f}",
                "its test top-1 (%)": f"{100 * (searched.test_top1 or 0):.2f}",
            }
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few networks, schedules and images")
    parser.add_argument("--out", type=Path, help="the result file")
    arguments = parser.parse_args()
    cases: list[dict[str, Any]] = []
    goals: list[Goal] = []
    with pinned(1):
        for method in arguments.methods:
            say(f"searching {method}")
            result = search(method, arguments)
            pairs = compare(result)
            print(f"\n### {method}\n")
            print(markdown_table(rows(pairs)))
            worst = min(pair["searched"]["test_top1"] - pair["uniform"]["test_top1"] for pair in pairs)
            off = max(abs(row.error or 0.0) for row in result.finalists)
            print(f"\nleast gain {100 * worst:+.2f} points, prediction off by at most {100 * off:.1f} %", flush=True)
            goals += [
                Goal(
                    f"{method}: searched - uniform at the same latency, test top-1, the least",
                    exact(worst),
                    0.0,
                    True,
                    "%",
                ),
                Goal(
                    f"{method}: prediction against measurement, the worst finalist", exact(off), ERROR_GOAL, False, "%"
                ),
            ]
            cases.append({"method": method, "pairs": pairs, "result": result.to_dict()})
            write_result("search_digits", arguments, goals, cases, random_weights=False)  # so far


if __name__ == "__main__":
    main()
