"""The report: one HTML page that opens anywhere, from figures and tables. Knows no paths and no stages of a run."""

from vhs.report.figures import forest, labeller_scatter
from vhs.report.overlay import contact_sheet, overlay
from vhs.report.page import render

__all__ = ["contact_sheet", "forest", "labeller_scatter", "overlay", "render"]
