"""The token selection kernel against torch.topk and gather, a copy of the same bytes, and an empty kernel.

Needs a CUDA device; ends with exit code 3 and the reason where there is none, or no library can be built. A sample is
the time between two CUDA events around a replayed graph of many calls, which go round enough buffers that the
second-level cache holds none of them for long. Torch takes part when it has CUDA; it reuses its output memory.

    python benchmarks/kernels.py [--library libedgeprune_kernels.so] [--batch 1 8 64] [--rounds 40] [--quick]
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _common import Goal, add_output_options, exact, markdown_table, say, write_result
from _cuda import CudaError, Device
from _kernels import KernelError, Kernels, TopkGatherParams, build_library

from edgeprune.bench import stats

NO_DEVICE = 3  # exit code
WIDTHS = {"ViT-T": 192, "ViT-S": 384, "ViT-B": 768, "ViT-L": 1024}
KEEP_RATES = (0.9, 0.7, 0.5, 0.3)
LONG = (256, 257, 576, 1024, 1369, 4096)  # tokens, ViT-B, half of them kept
ELEMENT_BYTES = 2  # float16 tokens
PREFIX = 1
CALLS = 32  # per graph, at least
MAX_SETS = 64
COPY_BYTES = 1 << 28
MEMORY_BOUND_US = 10.0  # a floor from here up is called memory-bound
GOAL_FLOOR, GOAL_TORCH = 1.5, 3.0
OURS, TORCH, COPY, EMPTY = "edgeprune", "torch.topk + gather", "copy of the same bytes", "empty kernel"
Replay = Callable[[], None]


@dataclass(frozen=True)
class Workload:
    """A selection: k of N tokens of D float16 each, behind one prefix row."""

    model: str
    batch: int
    tokens: int
    kept: int
    width: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.width * ELEMENT_BYTES

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Bytes of scores, tokens, kept, indices and count."""
        rows, kept_rows = self.tokens + PREFIX, self.kept + PREFIX
        per_image = (4 * self.tokens, rows * self.row_bytes, kept_rows * self.row_bytes, 4 * self.kept, 4)
        return tuple(self.batch * size for size in per_image)

    @property
    def moved_bytes(self) -> int:
        """Bytes that must be read and written: scores, kept rows twice, indices, count."""
        scores, _, kept, indices, count = self.sizes
        return scores + 2 * kept + indices + count

    def params(self) -> TopkGatherParams:
        """Return the sizes as the C interface takes them: float32 scores, by rank, top-k."""
        return TopkGatherParams(self.batch, self.tokens, self.kept, PREFIX, self.row_bytes, 0, 0, 0, 0.0)

    def __str__(self) -> str:
        return f"{self.model} {self.tokens}->{self.kept}, batch {self.batch}"


def main() -> None:
    """Measure every workload and write the result file."""
    arguments = parse_arguments()
    try:
        device = Device()
        with tempfile.TemporaryDirectory(prefix="edgeprune-kernels-") as directory:
            library = arguments.library or build_library(Path(directory), device.architecture)
            kernels = Kernels(library)
    except (CudaError, KernelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(NO_DEVICE)
    torch = torch_with_cuda()
    with device.stream() as stream:
        rate = copy_rate(device, stream)
        say(f"{device.name}: copies move {rate / 1e9:.0f} GB/s")
        cases = []
        for workload in workloads(arguments):
            say(str(workload))
            cases.append(measure_workload(device, kernels, torch, stream, workload, rate, arguments.rounds))
    print(markdown_table([row(case) for case in cases]))
    slug = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    gpu = {
        **{"name": device.name, "architecture": device.architecture, "driver": device.driver_version},
        **{"multiprocessors": device.multiprocessors, "l2_bytes": device.l2_bytes, "copy_bytes_per_s": rate},
    }
    write_result("kernels", arguments, goals(cases), cases, machine=slug, extra={"gpu": gpu})


def parse_arguments() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, help="libedgeprune_kernels.so (default: built from this checkout)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="batch sizes (default: 1 8 64)")
    parser.add_argument("--rounds", type=int, default=40, help="samples per runner; two make a block (default: 40)")
    add_output_options(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds = 2 * stats.MIN_BLOCKS
    if arguments.rounds < 2 or arguments.rounds % 2:
        parser.error("--rounds must be even and at least 2")
    return arguments


def workloads(arguments: argparse.Namespace) -> Iterator[Workload]:
    """Return what is measured; a quick run takes one model and one keep rate."""
    for model, width in WIDTHS.items():
        for batch in arguments.batch:
            for rate in KEEP_RATES:
                if not arguments.quick or (model, rate) == ("ViT-S", 0.7):
                    yield Workload(model, batch, 196, round(196 * rate), width)
    for tokens in LONG[-1:] if arguments.quick else LONG:
        for batch in arguments.batch:
            yield Workload("ViT-B", batch, tokens, tokens // 2, WIDTHS["ViT-B"])


def torch_with_cuda() -> Any:
    """Return torch, or None when it is not installed or was built without CUDA."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def copy_rate(device: Device, stream: int) -> float:
    """Return bytes read and written per second by a large copy, the median of ten."""
    with device.memory(COPY_BYTES) as a, device.memory(COPY_BYTES) as b, device.stopwatch(stream) as measure:
        times = [measure(lambda: device.copy(b, a, COPY_BYTES, stream)) for _ in range(13)]
    return 2 * COPY_BYTES / (stats.median(times[3:]) / 1e3)


def measure_workload(
    device: Device, kernels: Kernels, torch: Any, stream: int, workload: Workload, rate: float, rounds: int
) -> dict[str, Any]:
    """Return samples in microseconds per call of every runner, in turns, and what follows from them."""
    sets = max(1, min(MAX_SETS, -(-4 * device.l2_bytes // workload.moved_bytes)))
    calls = sets * -(-CALLS // sets)
    with ExitStack() as stack:
        buffers = [allocate(stack, device, workload, seed) for seed in range(sets)]
        params, kept_bytes = workload.params(), workload.sizes[2]
        empty = device.empty_kernel(stream)

        def ours(i: int) -> None:
            kernels.topk_gather(params, *buffers[i % sets], stream=stream)

        def copy(i: int) -> None:
            device.copy(buffers[i % sets][2], buffers[i % sets][1], kept_bytes, stream)

        with device.graph(stream, lambda: ours(0)) as single:
            launches = single.nodes
        replays: dict[str, Replay] = {}
        for name, call in ((OURS, ours), (COPY, copy), (EMPTY, lambda i: empty())):
            call(0)  # a kernel must be loaded before it is captured
            device.synchronize()
            graph = stack.enter_context(device.graph(stream, lambda call=call: [call(i) for i in range(calls)]))
            replays[name] = graph.launch
        if torch is not None:
            replays[TORCH] = stack.enter_context(torch_graph(torch, stream, workload, sets, calls))
        measure = stack.enter_context(device.stopwatch(stream))
        samples = take_samples(replays, measure, rounds, calls)
        direct = [measure(lambda: [ours(i) for i in range(calls)]) * 1e3 / calls for _ in range(rounds)]
    return summarise(workload, samples, direct, launches, sets, rate)


def allocate(stack: ExitStack, device: Device, workload: Workload, seed: int) -> list[int]:
    """Return addresses of scores, tokens, kept, indices and count, the inputs filled."""
    addresses = [stack.enter_context(device.memory(size)) for size in workload.sizes]
    scores = np.random.default_rng(seed).standard_normal((workload.batch, workload.tokens), dtype=np.float32)
    device.upload(addresses[0], scores)
    device.fill(addresses[1], 1, workload.sizes[1])
    return addresses


@contextmanager
def torch_graph(torch: Any, stream: int, workload: Workload, sets: int, calls: int) -> Iterator[Replay]:
    """Return the replay of a graph of `torch.topk`, `gather` and `cat`, over as many buffers."""
    shape = (workload.batch, workload.tokens)
    scores = [torch.randn(shape, device="cuda") for _ in range(sets)]
    tokens = [
        torch.ones(workload.batch, workload.tokens + PREFIX, workload.width, device="cuda", dtype=torch.float16)
        for _ in range(sets)
    ]

    def select(i: int) -> Any:
        indices = scores[i % sets].topk(workload.kept, dim=1).indices
        rows = indices.unsqueeze(-1).expand(-1, -1, workload.width)
        return torch.cat([tokens[i % sets][:, :PREFIX], tokens[i % sets][:, PREFIX:].gather(1, rows)], 1)

    side = torch.cuda.ExternalStream(stream)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(3):
            select(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for i in range(calls):
            select(i)

    def replay() -> None:
        with torch.cuda.stream(side):
            graph.replay()

    yield replay
    torch.cuda.synchronize()


def take_samples(
    replays: Mapping[str, Replay], measure: Callable[[Replay], float], rounds: int, calls: int
) -> dict[str, list[float]]:
    """Return microseconds per call of each runner; every second round goes backwards, the first three are dropped."""
    samples: dict[str, list[float]] = {name: [] for name in replays}
    for index in range(-3, rounds):
        for name in list(replays)[:: -1 if index % 2 else 1]:
            time_us = measure(replays[name]) * 1e3 / calls
            if index >= 0:
                samples[name].append(time_us)
    return samples


def summarise(
    workload: Workload,
    samples: Mapping[str, list[float]],
    direct: list[float],
    launches: int,
    sets: int,
    rate: float,
) -> dict[str, Any]:
    """Return a case of the result file."""
    blocks = {name: stats.block_values(times, 1) for name, times in samples.items()}
    floor_us = workload.moved_bytes / rate * 1e6
    ratios = {name: stats.paired_ratio(blocks[name], blocks[OURS]) for name in samples if name != OURS}
    return {
        **asdict(workload),
        "moved_bytes": workload.moved_bytes,
        "floor_us": floor_us,
        "launches": launches,
        "buffer_sets": sets,
        "median_us": {name: stats.median(times) for name, times in samples.items()},
        "median_us_without_graph": stats.median(direct),
        "times_slower_than_edgeprune": {name: asdict(ratio) for name, ratio in ratios.items()},
        "unstable": [r for name in samples for r in stats.unstable_reasons(blocks[name], what=f"time of {name}")],
        "samples_us": {name: [round(t, 4) for t in times] for name, times in samples.items()},
    }


def goals(cases: list[dict[str, Any]]) -> list[Goal]:
    """Return the goals that the cases can judge, each by its worst case."""
    found = []
    small = [case["launches"] for case in cases if case["tokens"] <= 256]
    if small:
        found.append(Goal("launches up to 256 tokens", exact(max(small)), 1, at_least=False, unit="launches"))
    bound = [c["median_us"][OURS] / c["floor_us"] for c in cases if c["floor_us"] >= MEMORY_BOUND_US]
    if bound:
        found.append(Goal("time over bytes-moved floor, memory-bound", exact(max(bound)), GOAL_FLOOR, at_least=False))
    single = [
        c["times_slower_than_edgeprune"][TORCH]["estimate"]
        for c in cases
        if c["batch"] == 1 and TORCH in c["times_slower_than_edgeprune"]
    ]
    if single:
        found.append(Goal("faster than torch.topk + gather, batch 1", exact(min(single)), GOAL_TORCH))
    return found


def row(case: Mapping[str, Any]) -> dict[str, str]:
    """Return a case as a row of the table."""
    medians = case["median_us"]

    def cell(name: str) -> str:
        return f"{medians[name]:.2f}" if name in medians else "n/a"

    return {
        "case": f"{case['model']} {case['tokens']}->{case['kept']}, batch {case['batch']}",
        "edgeprune (us)": cell(OURS),
        "without a graph (us)": f"{case['median_us_without_graph']:.2f}",
        "torch (us)": cell(TORCH),
        "copy (us)": cell(COPY),
        "empty kernel (us)": cell(EMPTY),
        "floor (us)": f"{case['floor_us']:.2f}",
        "over floor": f"{medians[OURS] / case['floor_us']:.2f}",
        "launches": str(case["launches"]),
        "unstable": str(len(case["unstable"])),
    }


if __name__ == "__main__":
    main()
