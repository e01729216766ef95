"""Measuring: interleaved runs, statistics that refuse what samples cannot carry, environment."""

from edgeprune.bench.bench import bench_bundle
from edgeprune.bench.report import report_notes, report_table, report_tables
from edgeprune.bench.result import BenchResult

__all__ = ["BenchResult", "bench_bundle", "report_notes", "report_table", "report_tables"]
