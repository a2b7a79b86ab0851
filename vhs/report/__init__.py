"""The report: one HTML page that opens anywhere, from figures and tables. Knows no paths and no stages of a run."""

from vhs.report.figures import agreement, curves, forest, index_bins, labeller_scatter
from vhs.report.overlay import captioned, contact_sheet, fitted, overlay
from vhs.report.page import render, with_search

__all__ = ["agreement", "captioned", "contact_sheet", "curves", "fitted", "forest", "index_bins", "labeller_scatter", "overlay", "render", "with_search"]
