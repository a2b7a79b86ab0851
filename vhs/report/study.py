"""A study's page and its Markdown: what vhs/metrics/study.py found, in tables and figures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from vhs.metrics.study import DOSE, Findings, words
from vhs.report.figures import ACCENT, INK, SECOND, THIRD, _canvas, _style, _svg
from vhs.report.page import Grid, _embedded, _environment, _word

COLOURS = (ACCENT, SECOND, THIRD, INK)


def render(found: dict, findings: Findings) -> tuple[str, dict[str, bytes]]:
    """`found`: study.json's content -> (the page as one HTML document, its figures by name as SVG)."""
    study = found["study"]
    figures = {name: PLOTS[name][0](rows) for name, rows in findings.plots.items() if rows}
    page = _environment().get_template("study.html.j2").render(
        study=study, found=found, opened=opened(found), figures=[(_embedded(name, svg), PLOTS[name][1]) for name, svg in figures.items()],
        grids=[(caption, grid(rows)) for caption, rows in findings.tables.items() if rows], plan=_plan(study), made=_made(found),
        unknown="" if found["patients_known"] else ". Patients unknown.",
    )  # fmt: skip
    return page, figures


def markdown(found: dict) -> str:
    """The study's sentences and tables as a README takes them."""
    parts = [*(f"- {sentence}" for sentence in found["sentences"]), "", opened(found), _made(found)]
    for caption, rows in found["tables"].items():
        if rows:
            table = grid(rows)
            rule = ["---" if number < table.keys else "---:" for number in range(len(table.head))]
            parts += ["", f"{caption}:", "", *(f"| {' | '.join(cells)} |" for cells in (table.head, rule, *table.rows))]
    return "\n".join(parts)


def shown(findings: Findings) -> list[list[list[str]]]:
    """Every cell of every table, as it is printed."""
    return [grid(rows).rows for rows in findings.tables.values() if rows]


def opened(found: dict) -> str:
    """How often the study was looked at, beside how often it was to be."""
    looks, planned = len(found["looks"]), found["study"]["looks"]
    times = f"Opened {looks} time{'s' if looks > 1 else ''} of {planned} planned{': more often, so its intervals promise too much' if looks > planned else ''}"
    early = f", {found['looks'][-1]['records']} of {found['of']} records at this one" if found["records"] < found["of"] else ""
    seeds = {True: " Sealed phantoms.", False: " Phantoms that settings are chosen on: no evidence.", None: ""}
    return f"{times}{early}.{seeds[found['sealed']]}"


def grid(rows: Sequence[dict]) -> Grid:
    """Rows of words, numbers and figures, ready to print; columns that are words in every row name it."""
    head = list(dict.fromkeys(key for row in rows for key in row))
    keys = sum(all(isinstance(row.get(name), str) for row in rows) for name in head)
    head.sort(key=lambda name: not all(isinstance(row.get(name), str) for row in rows))  # stable
    return Grid(head, [[_cell(row.get(name)) for name in head] for row in rows], keys)


def _cell(value) -> str:
    return words(value) if isinstance(value, dict) else value if isinstance(value, str) else _word(value)


def _plan(study: dict) -> dict[str, str]:
    told = {"question": study["question"], "configuration": study["config"], "reported": "; ".join(study["pairs"]), "looks": study["looks"]}
    told |= {f"set {key}": value for key, value in study["set"].items()} | {f"varied {key}": value for key, value in study["vary"].items()}
    return {what: ", ".join(map(str, said)) if isinstance(said, list) else str(said) for what, said in told.items()}


def _made(found: dict) -> str:
    hours = f"{found['core_seconds'] / 3600:.1f}"
    return f"Rebuilt by `vhs study {found['study']['name']} --records NEW`: {hours} core-hours. Made by {'; '.join(found['made_by'])}."


def by_run(rows: Sequence[dict]) -> bytes:
    """Each run's differences with their intervals, a panel a pair; hollow: the interval covers 0 -> SVG."""
    pairs = {pair: [row for row in rows if row["pair"] == pair] for pair in dict.fromkeys(row["pair"] for row in rows)}
    with _style():
        heights = [0.5 + 0.17 * len(of_pair) for of_pair in pairs.values()]
        figure, axes = _canvas(6.6, sum(heights) + 0.4 * len(heights), heights)
        for axis, (pair, of_pair) in zip(axes, pairs.items()):
            for place, row in enumerate(of_pair):
                _mark(axis, row["difference"], place, filled=not row["difference"]["ci95"][0] <= 0 <= row["difference"]["ci95"][1])
            axis.axvline(0, color=INK, linewidth=1)
            axis.set(yticks=range(len(of_pair)), yticklabels=[row["run"] for row in of_pair], ylim=(len(of_pair) - 0.5, -0.5), title=pair)
            axis.tick_params(axis="y", labelsize=7)
            axis.title.set_fontsize(10)
        ends = [end for axis in axes for end in axis.get_xlim()]
        for axis in axes:  # one scale, so that pairs can be compared
            axis.set_xlim(min(ends), max(ends))
        axes[-1].set_xlabel("difference, points (95% interval)")
        return _svg(figure, "by_run")


def forest(rows: Sequence[dict]) -> bytes:
    """Accuracy of every arm with its interval -> SVG."""
    with _style():
        figure, (axis,) = _canvas(6.6, 0.7 + 0.35 * len(rows), [1])
        for place, row in enumerate(rows):
            _mark(axis, row["accuracy"], place, filled=True)
        axis.set(yticks=range(len(rows)), yticklabels=[row["arm"] for row in rows], ylim=(len(rows) - 0.5, -0.5), xlabel="accuracy, % (95% interval)")
        axis.grid(axis="x", alpha=0.2)
        return _svg(figure, "forest")


def dose(rows: Sequence[dict]) -> bytes:
    """Each pair's difference over the dose -> SVG."""
    return _lines(rows, DOSE, "dose", "pair", "difference")


def along(rows: Sequence[dict]) -> bytes:
    """Accuracy of every arm over the dose -> SVG."""
    return _lines(rows, DOSE, "along")


def learning(rows: Sequence[dict]) -> bytes:
    """Accuracy of both arms over the number of real images -> SVG."""
    return _lines(rows, "real images", "learning")


def _lines(rows: Sequence[dict], column: str, name: str, group: str = "arm", figure_of: str = "accuracy") -> bytes:
    """Figures over `column`, one line for each value of `group`."""
    groups = list(dict.fromkeys(row[group] for row in rows))
    values = sorted({row[column] for row in rows})
    width = min((after - before for before, after in itertools.pairwise(values)), default=1) * 0.04
    with _style():
        figure, (axis,) = _canvas(6.6, 3.6, [1])
        for number, (one, colour) in enumerate(zip(groups, itertools.cycle(COLOURS))):
            mine = [row for row in rows if row[group] == one]
            x = [row[column] + width * (number - (len(groups) - 1) / 2) for row in mine]  # beside each other, so that intervals can be told apart
            y, low, high = ([100 * pick(row[figure_of]) for row in mine] for pick in (_value, _low, _high))
            style = "-" if number < len(COLOURS) else (0, (4, 2))
            axis.plot(x, y, color=colour, linewidth=1.4, linestyle=style, marker="o", markersize=4, label=one)
            axis.vlines(x, low, high, color=colour, linewidth=1.2)
        if figure_of == "difference":
            axis.axhline(0, color=INK, linewidth=0.8)
        axis.set(xlabel=column, ylabel=f"{figure_of}, {'points' if figure_of == 'difference' else '%'} (95% interval)", xticks=values)
        axis.legend(frameon=False, labelcolor=INK, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
        return _svg(figure, name)


def _value(figure: dict) -> float:
    return figure["value"]


def _low(figure: dict) -> float:
    return figure["ci95"][0]


def _high(figure: dict) -> float:
    return figure["ci95"][1]


def _mark(axis, figure: dict, place: float, filled: bool) -> None:
    colour = ACCENT if filled else INK
    axis.plot([100 * _low(figure), 100 * _high(figure)], [place, place], color=colour, linewidth=1.6, solid_capstyle="butt", alpha=1 if filled else 0.6)
    axis.plot(100 * _value(figure), place, color=colour, marker="s" if filled else "o", markersize=4, markerfacecolor=colour if filled else "none")


PLOTS = {
    "by_run": (by_run, "Every run's differences with their 95% intervals; a filled mark where the interval excludes 0."),
    "forest": (forest, "Accuracy of every arm, all held-out images and seeds pooled."),
    "dose": (dose, "What is added to real-matched, which trains as long on real images alone, with its 95% interval."),
    "along": (along, "Accuracy of every arm with its 95% interval."),
    "learning": (learning, "Learning curves: accuracy with its 95% interval over the number of real training images."),
}
