"""Measuring: interleaved runs, statistics that refuse what samples cannot carry, environment."""

from edgeprune.bench.bench import bench_bundle
from edgeprune.bench.report import report_notes, report_table, report_tables, sweep_notes, sweep_table
from edgeprune.bench.result import BenchResult, SweepResult, read_results
from edgeprune.bench.sweep import parse_sweep, sweep_bundles

__all__ = [
    "BenchResult",
    "SweepResult",
    "bench_bundle",
    "parse_sweep",
    "read_results",
    "report_notes",
    "report_table",
    "report_tables",
    "sweep_bundles",
    "sweep_notes",
    "sweep_table",
]
