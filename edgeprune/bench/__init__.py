"""Measuring: interleaved runs, statistics that refuse what samples cannot carry, environment."""

from edgeprune.bench.bench import bench_bundle
from edgeprune.bench.result import BenchResult, report_notes, report_table

__all__ = ["BenchResult", "bench_bundle", "report_notes", "report_table"]
