"""The gate on real bundles: is a planted slowdown caught, is an unchanged rebuild left alone?

A bundle is exported twice; the second is the unchanged rebuild. The planted slowdown is a copy of it whose pruned
graph does extra work in front of its output: a chain of matrix products, long enough to take about `--slowdown` of a
run. What it really takes is measured beside the trial and stands in the result. Each attempt is one
`edgeprune compare` with its rerun.

    python benchmarks/gate_trial.py [--model deit_tiny_patch16_224] [--slowdown 0.08] [--tries 20] [--quick]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from _common import Goal, Workshop, add_output_options, exact, pinned, random_images, say, write_result

from edgeprune.bench.gate import Comparison, Gate
from edgeprune.bench.gate_measure import BLOCKS, QUICK_BLOCKS, PairPlan, compare_bundles
from edgeprune.bench.gate_rules import parse_rules
from edgeprune.bench.measure import MeasurePlan, measure
from edgeprune.bench.runners import session_runner
from edgeprune.bench.stats import Ratio, block_values, paired_ratio
from edgeprune.runtime.bundle import Bundle, hash_file, load_bundle
from edgeprune.runtime.manifest import MANIFEST_NAME

WIDTH = 96  # of the extra matrix products


def add_work(bundle: Bundle, out: Path, products: int) -> Bundle:
    """Return a copy of a bundle whose model multiplies `products` more matrices; its logits stay the same."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    shutil.copytree(bundle.path, out)
    name = bundle.manifest.graphs["model"].file
    model = onnx.load(str(out / name), load_external_data=False)
    graph, output = model.graph, model.graph.output[0].name
    for node in graph.node:
        node.output[:] = ["planted_logits" if o == output else o for o in node.output]
        node.input[:] = ["planted_logits" if i == output else i for i in node.input]
    matrix = np.eye(WIDTH, dtype=np.float32)[::-1].copy()
    graph.initializer.append(numpy_helper.from_array(matrix, "planted_matrix"))
    graph.initializer.append(helper.make_tensor("planted_zero", TensorProto.FLOAT, [], [0.0]))
    # The chain begins with the logits and ends as a zero that is added to them, so no optimiser can drop it.
    nodes = [
        helper.make_node("ReduceSum", ["planted_logits"], ["planted_sum"], keepdims=0),
        helper.make_node("Mul", ["planted_sum", "planted_zero"], ["planted_start"]),
        helper.make_node("Add", ["planted_start", "planted_matrix"], ["planted_0"]),
    ]
    nodes += [helper.make_node("MatMul", [f"planted_{i}", "planted_0"], [f"planted_{i + 1}"]) for i in range(products)]
    nodes += [
        helper.make_node("ReduceSum", [f"planted_{products}"], ["planted_end"], keepdims=0),
        helper.make_node("Mul", ["planted_end", "planted_zero"], ["planted_nothing"]),
        helper.make_node("Add", ["planted_logits", "planted_nothing"], [output]),
    ]
    graph.node.extend(nodes)
    onnx.save(model, str(out / name))
    manifest = bundle.manifest.model_copy(
        update={"files": {**bundle.manifest.files, name: hash_file(out / name)}}, deep=True
    )
    (out / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return load_bundle(out)


def true_ratio(base: Bundle, head: Bundle, rounds: int) -> Ratio:
    """Return processor time of head / base, paired, by a measurement of its own."""
    images = random_images(1, base.manifest.preprocessing.image_size)
    runners = {n: session_runner(b, "model", images, threads=1) for n, b in (("base", base), ("head", head))}
    measured = measure(runners, MeasurePlan(rounds=rounds))
    blocks = {n: block_values(s.cpu_ms, measured.calls_per_visit) for n, s in measured.samples.items()}
    return paired_ratio(blocks["head"], blocks["base"])


def plant(base: Bundle, folder: Path, slowdown: float, rounds: int) -> tuple[Bundle, int, Ratio]:
    """Return a bundle about `slowdown` slower, its extra products, and what was measured."""
    probe = 200
    per_product = (true_ratio(base, add_work(base, folder / "probe", probe), rounds).estimate - 1) / probe
    products = max(1, round(slowdown / max(per_product, 1e-7)))
    planted = add_work(base, folder / "planted", products)
    return planted, products, true_ratio(base, planted, 2 * rounds)


def attempt(base: Bundle, head: Bundle, plan: PairPlan) -> dict[str, Any]:
    """Return what one `edgeprune compare` says."""
    start = time.perf_counter()
    gate = Gate(parse_rules(["median:5%"]), paired=True)
    found: Comparison = compare_bundles(base, head, gate, plan)
    outcome = found.outcomes[0]
    row = {**asdict(outcome), "seconds": round(time.perf_counter() - start, 1)}
    ratio = float("nan") if outcome.evidence is None else outcome.evidence.ratio
    say(f"  {outcome.status}: ratio {ratio:.4f}, reruns {len(outcome.reruns)}, {row['seconds']} s")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="a name that `edgeprune models` lists")
    parser.add_argument("--slowdown", type=float, default=0.08, help="to plant, as a share (default: 0.08)")
    parser.add_argument("--tries", type=int, default=20, help="of the unchanged rebuild (default: 20)")
    parser.add_argument("--planted-tries", type=int, default=5, help="of the planted slowdown (default: 5)")
    parser.add_argument("--rounds", type=int, default=60, help="to measure the planted slowdown (default: 60)")
    add_output_options(parser)
    arguments = parser.parse_args()
    plan = PairPlan(QUICK_BLOCKS if arguments.quick else BLOCKS, dense=False, quick=arguments.quick)
    with tempfile.TemporaryDirectory(prefix="edgeprune-trial-") as directory, pinned(1):
        fields = {"model": arguments.model, "method": "evit", "keep_rate": 0.7}
        first = Path(directory)
        base = Workshop(first / "one").bundle(**fields)
        rebuilt = Workshop(first / "two").bundle(**fields)
        planted, products, slower = plant(base, first, arguments.slowdown, arguments.rounds)
        say(f"planted: {products} products, {100 * (slower.estimate - 1):+.1f} % measured")
        caught = [attempt(base, planted, plan) for _ in range(arguments.planted_tries)]
        say("unchanged rebuild")
        unchanged = [attempt(base, rebuilt, plan) for _ in range(arguments.tries)]
    hits = sum(row["status"] == "regressed" for row in caught)
    alarms = sum(row["status"] == "regressed" for row in unchanged)
    planted_words = f"{100 * (slower.estimate - 1):.1f} % planted, share caught of {len(caught)}"
    goals = [
        Goal(planted_words, exact(hits / len(caught)), 1.0, unit="%"),
        Goal(f"unchanged rebuild, share flagged of {len(unchanged)}", exact(alarms / len(unchanged)), 0.0, False, "%"),
    ]
    cases = [
        {"name": "planted", "products": products, "measured": asdict(slower), "attempts": caught},
        {"name": "unchanged", "attempts": unchanged},
    ]
    write_result("gate_trial", arguments, goals, cases)


if __name__ == "__main__":
    main()
