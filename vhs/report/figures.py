"""The page's drawn figures, as SVG bytes that are the same every time for the same numbers.

Lines and words take the colour of the text around them and marks the page's accent (`currentColor`, `--accent`), so one figure serves
light, dark and paper. matplotlib has no such colours: stand-ins are drawn and replaced in the SVG.
"""

from __future__ import annotations

import io
import itertools

import numpy as np
import pandas as pd

from vhs.measure import CLASSES, View
from vhs.metrics import bland_altman

INK, ACCENT, SECOND, THIRD = "#010203", "#040506", "#070809", "#0a0b0c"
STAND_INS = {INK: "currentColor", ACCENT: "var(--accent, #0f6fb5)", SECOND: "var(--second, #b5530f)", THIRD: "var(--third, #2a8a57)"}


def forest(summary: dict) -> bytes:
    """Accuracy of every arm with its 95% interval (test filled, cross-validation hollow, validation a tick) and below it the paired
    differences, filled the one that the verdict rests on, where there is one -> SVG."""
    arms, differences = summary["arms"], summary["differences"]
    with _style():
        heights = [0.4 + 0.42 * len(arms), *([0.2 + 0.42 * len(differences)] if differences else [])]
        figure, axes = _canvas(6.6, sum(heights) + 0.5 * len(heights), heights)
        top = axes[0]
        for row, figures in enumerate(arms.values()):
            below, above = (0.14, 0.14) if figures["test"] and figures["cv"] else (0, 0)
            if figures["validation"]:
                top.plot(100 * figures["validation"]["accuracy"], row + below, color=INK, marker="|", markersize=12, alpha=0.6)
            if figures["test"]:
                _interval(top, row + below, figures["test"], "accuracy", filled=True)
            if figures["cv"]:
                _interval(top, row - above, figures["cv"], "accuracy", filled=False)
        top.set(yticks=range(len(arms)), yticklabels=list(arms), ylim=(len(arms) - 0.5, -0.5), xlabel="accuracy, % (95% interval)")
        top.grid(axis="x", alpha=0.2)
        if differences:
            below, names = axes[1], [" − ".join(found["arms"]) for found in differences]
            for row, found in enumerate(differences):
                _interval(below, row, found, "difference", filled=found == summary["paired"])
            reach = 115 * max(abs(bound) for found in differences for bound in [*found["ci95"], 0.01])
            below.axvline(0, color=INK, linewidth=1)
            below.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5), xlim=(-reach, reach), xlabel="paired difference, points")
        return _svg(figure, "forest")


def labeller_scatter(measured: pd.DataFrame, view: View) -> bytes:
    """True against measured index with the class edges, marks by true class, from columns index, measured, label -> SVG."""
    known = measured.dropna(subset=["index", "measured"])
    with _style():
        figure, (axis,) = _canvas(4.6, 4.4, [1])
        for label, (name, colour, marker) in enumerate(zip(CLASSES, (ACCENT, THIRD, SECOND), "osv")):
            of_class = known[known.label == label]
            axis.scatter(of_class["index"], of_class.measured, s=14, color=colour, marker=marker, alpha=0.75, linewidths=0, label=name)
        both = np.append(known[["index", "measured"]].to_numpy(), view.edges)
        ends = (both.min(), both.max())
        axis.plot(ends, ends, color=INK, linewidth=0.8)
        for edge in view.edges:
            axis.axvline(edge, color=INK, linewidth=0.8, linestyle=(0, (3, 3)), alpha=0.6)
            axis.axhline(edge, color=INK, linewidth=0.8, linestyle=(0, (3, 3)), alpha=0.6)
        axis.set(xlabel=f"true {view.index}", ylabel=f"measured {view.index}", aspect="equal")
        axis.legend(frameon=False, labelcolor=INK, loc="upper left")
        return _svg(figure, "labeller")


def agreement(measured: pd.DataFrame, view: View) -> bytes:
    """Bland & Altman's figure: difference against mean of measured and true index, with bias and limits of agreement, marks by true class,
    from columns index, measured, label -> SVG."""
    known = measured.dropna(subset=["index", "measured"])
    found = bland_altman(known.measured, known["index"])
    with _style():
        figure, (axis,) = _canvas(4.6, 4.4, [1])
        for label, (name, colour, marker) in enumerate(zip(CLASSES, (ACCENT, THIRD, SECOND), "osv")):
            of_class = known[known.label == label]
            mean, difference = (of_class.measured + of_class["index"]) / 2, of_class.measured - of_class["index"]
            axis.scatter(mean, difference, s=14, color=colour, marker=marker, alpha=0.75, linewidths=0, label=name)
        axis.axhline(found["bias"], color=INK, linewidth=0.8)
        for limit in found["limits"] or ():
            axis.axhline(limit, color=INK, linewidth=0.8, linestyle=(0, (3, 3)), alpha=0.6)
        axis.set(xlabel=f"mean of true and measured {view.index}", ylabel=f"measured minus true {view.index}")
        return _svg(figure, "agreement")


def index_bins(bins: pd.DataFrame, view: View) -> bytes:
    """Images produced (outline) and accepted (filled) in each bin of the measured index, the share accepted above, class edges dashed -> SVG.

    Columns low, high, produced, accepted: metrics.generated_by_index.
    """
    with _style():
        figure, (axis,) = _canvas(6.6, 2.8, [1])
        middle, width = (bins.low + bins.high) / 2, view.bin_width
        axis.bar(middle, bins.produced, width, color="none", edgecolor=INK, linewidth=0.8)
        axis.bar(middle, bins.accepted, width, color=ACCENT, edgecolor=INK, linewidth=0.8)
        for row in bins[bins.produced > 0].itertuples():
            share = f"{100 * row.accepted / row.produced:.0f}"
            axis.annotate(share, ((row.low + row.high) / 2, row.produced), (0, 3), textcoords="offset points", ha="center", fontsize=8)
        for edge in view.edges:
            axis.axvline(edge, color=INK, linewidth=0.8, linestyle=(0, (3, 3)))
        axis.set(xlabel=f"measured {view.index}", ylabel="images")
        axis.margins(y=0.12)
        return _svg(figure, "bins")


def curves(rows: pd.DataFrame) -> bytes:
    """Learning curves -> SVG: a panel for each model and kind of figure (loss, accuracy).

    Columns model, series (a colour), number (tells the lines of a series apart: the seed), step, figure, value.
    Figures are named "loss" or end in "_loss" or "_accuracy"; those that begin with "validation" are drawn dashed, as they are, and the
    others, which a batch made noisy, as running means over a twentieth of their rows.
    """
    several = rows.groupby("model").series.transform("nunique") > 1  # a model of one series has its figures told apart by colour
    rows = rows.assign(kind=rows.figure.str.rpartition("_")[2], series=rows.series.where(several, rows.figure.str.replace("_", " ")))
    panels = [(model, kind, panel) for (model, kind), panel in rows.groupby(["model", "kind"], sort=False) if kind in ("loss", "accuracy")]
    with _style():
        figure, axes = _canvas(6.6, 2.3 * len(panels), [1] * len(panels))
        for axis, (model, kind, panel) in zip(axes, panels):
            colours = dict(zip(panel.series.unique(), itertools.cycle((ACCENT, SECOND, THIRD, INK))))
            for (series, name, _), line in panel.groupby(["series", "figure", "number"], sort=False):
                validation, window = name.startswith("validation"), max(1, len(line) // 20)
                value = line.value if validation else line.value.rolling(window, min_periods=1).mean()
                style = (0, (4, 2)) if validation else "-"
                axis.plot(line.step, value, color=colours[series], linewidth=1.2, linestyle=style, alpha=0.8)
            for series, colour in colours.items():
                axis.plot([], [], color=colour, linewidth=1.6, label=series)
            axis.set(title=model, ylabel=kind)
            axis.title.set_fontsize(10)
            if len(colours) > 1:
                axis.legend(frameon=False, labelcolor=INK, fontsize=8, ncols=len(colours))
        axes[-1].set_xlabel("optimizer step")
        return _svg(figure, "curves")


def search(table: dict) -> bytes:
    """What a search's trials reached after each epoch, over the share of their own epochs, coloured by arm -> SVG. `table`: see jobs/search.py."""
    metric, arms = table["space"]["metric"], list(dict.fromkeys(trial["arm"] for trial in table["trials"]))
    colours = dict(zip(arms, itertools.cycle((ACCENT, SECOND, THIRD, INK))))
    with _style():
        figure, (axis,) = _canvas(6.6, 3.2, [1])
        for trial in table["trials"]:
            told = [(100 * row["share"], row[metric]) for row in trial["epochs"] if metric in row]
            if told:
                colour, mark = colours[trial["arm"]], "o" if trial["state"] == "whole" else "x"
                axis.plot(*zip(*told), color=colour, linewidth=1, alpha=0.7)
                axis.plot(*told[-1], color=colour, marker=mark, markersize=5)
        for arm, colour in colours.items():
            axis.plot([], [], color=colour, linewidth=1.6, label=arm)
        axis.set(xlabel="epochs of a trial's own, %", ylabel=metric.replace("_", " "))
        axis.legend(frameon=False, labelcolor=INK, fontsize=8, ncols=len(colours))
        return _svg(figure, "search")


def _interval(axis, y: float, figures: dict, name: str, filled: bool) -> None:
    low, high = (100 * bound for bound in figures["ci95"])
    axis.plot([low, high], [y, y], color=ACCENT, linewidth=2 if filled else 1.2, solid_capstyle="butt")
    mark = {"marker": "s", "markersize": 7} if filled else {"marker": "o", "markersize": 5, "markerfacecolor": "none"}
    axis.plot(100 * figures[name], y, color=ACCENT, **mark)


def _style():
    import matplotlib

    return matplotlib.rc_context({
        "svg.fonttype": "none", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK),
    })


def _canvas(width_in: float, height_in: float, heights: list[float]):
    """A figure of no global state, with an axes for each of the relative `heights`, one above the other."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]


def _svg(figure, name: str) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # hashes as ids: the same every time, and none shared by two figures of a page
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue().decode()
    for stand_in, colour in STAND_INS.items():
        text = text.replace(stand_in, colour)
    return text.encode()
