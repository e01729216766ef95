"""The report of benches as one HTML file: no network, light and dark, readable on a phone."""

from edgeprune.bench.html.inputs import Accuracies, GraphAccuracy, ReportInput, read_inputs
from edgeprune.bench.html.overlays import Overlays, draw_overlays
from edgeprune.bench.html.page import render

__all__ = [
    "Accuracies",
    "GraphAccuracy",
    "Overlays",
    "ReportInput",
    "draw_overlays",
    "read_inputs",
    "render",
]
