"""One self-contained HTML page: the verdict first, then what it rests on. Nothing is fetched, so it opens from a mail or a bucket."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from importlib.resources import files
from numbers import Number

import jinja2
import pandas as pd
from markupsafe import Markup

from vhs import tuning
from vhs.arms import ARMS, meanings, reported
from vhs.measure import CLASSES
from vhs.metrics import EVALUATOR_ORDER, detectable, verdict
from vhs.report.figures import search

BY_ARM = ("by_class", "by_source", "near_boundary", "by_seed")
COUNTS = ("composition", "generators", "rejections", "agreement", "prompts", "measurement", "likeness", "probes", "nearest", "nearer")
TABLES = (*BY_ARM, *COUNTS, "corrections", "confusion")
FIGURES = (
    "forest", "labeller", "agreement", "bins", "curves",  # drawn
    "real", "generated", "true", "measured", "rejected", "pairs", "pairs_held_out",  # contact sheets
)  # fmt: skip
JUDGED = {"test": "test images", "cv": "out-of-fold images, for the test part lacks labels"}


@dataclass(frozen=True)
class Grid:
    """A table ready to print: `head` and `rows` of words, the first `keys` columns naming a row."""

    head: list[str]
    rows: list[list[str]]
    keys: int = 1


def render(summary: dict, tables: dict[str, pd.DataFrame], figures: dict[str, bytes], notes: dict) -> str:
    """The report as one HTML document. Whatever is left out of `tables` and `figures` leaves its section out.

    summary  as metrics.summary returns it
    tables   of TABLES: those of metrics.tables and metrics.generated_tables; "measurement" from measurement_by, "likeness" from frechet_by_class,
             "nearest" from distances_by_class, "probes" and "nearer", a row for each generator, from jobs/likeness.py; "prompts" from ranked_prompts,
             "corrections" from gain_by_corrections; "composition", Table 1: words in its first columns, then counts; "generators", a row for each
             outside of the run
    figures  of FIGURES, each an SVG or PNG: those drawn by figures.py and contact sheets: "real" and "generated" images as they are, their
             "true" and "measured" axes, "rejected" ones by reason, "pairs" of generated images and the nearest training image, "pairs_held_out"
    notes    "title": str, "index": the view's, "judged": "test" | "cv", "plan": {what: value} (primary endpoint, arms, seeds as frozen),
             "versions": {what: value}, "limits": [sentence]
    Raises ValueError for a table or figure that no section shows.
    """
    for what, given, known in (("table", tables, TABLES), ("figure", figures, FIGURES)):
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"the page shows no {what} called {', '.join(unknown)}; it knows {', '.join(known)}")
    template = _environment().get_template("page.html.j2")
    shown = {name: table for name, table in tables.items() if len(table)}
    grids = {name: _by_arm(shown[name]) for name in BY_ARM if name in shown} | {name: _grid(shown[name]) for name in COUNTS if name in shown}
    grids |= {"corrections": _gains(shown["corrections"])} if "corrections" in shown else {}
    return template.render(
        title=notes.get("title", "Did generation help?"), verdict=verdict(summary).replace(", ", ",\N{NO-BREAK SPACE}"), summary=summary,
        parts=[part for part in ("test", "cv") if any(arm[part] for arm in summary["arms"].values())], meanings=meanings(summary["arms"]), classes=CLASSES,
        worth={" − ".join(arms): what for arms, what in reported([*ARMS, *summary["arms"]]).items()},
        once=max((len(arm["seeds"]) for arm in summary["arms"].values()), default=0) == 1,
        evaluator_order=EVALUATOR_ORDER, index=notes.get("index", "index"), judged=JUDGED[notes.get("judged", "test")],
        unknown="" if summary["patients_known"] else " Patients unknown.", grids=grids,
        near_copies=int(shown["rejections"].get("near-copy", pd.Series(dtype=int)).sum()) if "rejections" in shown else None,
        matrices=_matrices(shown["confusion"]) if "confusion" in shown else {},
        figures={name: _embedded(name, data) for name, data in figures.items()},
        plan=notes.get("plan", {}), versions=notes.get("versions", {}), limits=notes.get("limits", []),
    )  # fmt: skip


def with_search(page: str, name: str, table: dict, best: dict[str, str]) -> str:
    """A rendered page with a section on a finished search: its `table` (jobs/search.py) and, by arm, the best settings in words."""
    rows, states = pd.DataFrame(tuning.rows(table)), [trial["state"] for trial in table["trials"]]
    section = _environment().get_template("search.html.j2").render(
        name=name, trials=len(states), stopped=states.count("stopped"), diverged=states.count("diverged"), best=best, table=_grid(rows),
        arms=" and ".join(rows.arm.unique()), metric=_word(table["space"]["metric"]),
        figure=_embedded(name, search(table)),
    )  # fmt: skip
    before, end, after = page.rpartition("</main>")
    return f"{before}{section}\n{end}{after}"


def _environment() -> jinja2.Environment:
    loader = jinja2.FunctionLoader(lambda name: files("vhs.report").joinpath(name).read_text(encoding="utf-8"))
    made = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters.update(percent=_percent, interval=_interval, number=_word, detectable=detectable)
    return made


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}%"


def _interval(bounds: tuple[float, float]) -> str:
    return f"[{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"


def _word(value) -> str:
    """A table's cell: words as they are, counts whole, other numbers to three figures, nothing as a dash."""
    if value is None or value != value:
        return "–"
    if not isinstance(value, Number) or isinstance(value, bool):
        return str(value).replace("_", " ")
    return f"{value:.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.3g}"


def _grid(table: pd.DataFrame) -> Grid:
    keys = sum(not pd.api.types.is_numeric_dtype(dtype) for dtype in table.dtypes)
    rows = [[_word(value) for value in row] for row in table.astype(object).to_numpy().tolist()]
    return Grid([_word(name) for name in table.columns], rows, keys)


def _by_arm(table: pd.DataFrame) -> Grid:
    """Rows: the values of the table's second column; columns: images, then an accuracy with its interval for each arm."""
    column, arms = table.columns[1], list(table.arm.unique())
    figures = (f"{_percent(row.accuracy)} {_interval((row.low, row.high))}" for row in table.itertuples())
    cells = dict(zip(zip(table.arm, table[column]), figures))
    images = table.groupby(column, sort=False, observed=True).images.max()
    rows = [[_word(value), str(n), *(cells.get((arm, value), "–") for arm in arms)] for value, n in images.items()]
    return Grid([_word(column), "images", *arms], rows)


def _gains(table: pd.DataFrame) -> Grid:
    """metrics.gain_by_corrections, a row for each import."""

    def points(row, sign: str, value: str, low: str, high: str) -> str:
        return "–" if pd.isna(row[value]) else f"{row[value]:{sign}.1f} [{row[low]:.1f}, {row[high]:.1f}]"

    rows = [
        [
            row["arm"], row["part"], f"import {row['after']}" if row["after"] else "before any", str(row["corrected"]),
            points(row, "", "accuracy", "low", "high"), points(row, "+", "gain", "from", "to"), points(row, "+", "all_gain", "all_from", "all_to"),
        ]
        for row in table.to_dict("records")
    ]  # fmt: skip
    return Grid(["arm", "judged on", "after", "images corrected", "accuracy", "since the row above", "since the first row"], rows, keys=3)


def _matrices(table: pd.DataFrame) -> dict[str, list[tuple[str, list[tuple[str, float]]]]]:
    """{arm: [(true class, [(count, share of the row)])]}."""
    matrices = {}
    for arm, rows in table.groupby("arm", sort=False):
        counts = rows[list(CLASSES)].to_numpy(dtype=float)
        matrices[arm] = [(name, [(_word(float(n)), n / max(row.sum(), 1e-9)) for n in row]) for name, row in zip(rows["class"], counts)]
    return matrices


def _embedded(name: str, data: bytes) -> Markup:
    """An SVG as an element of the page (so that it takes the page's colours), a PNG as a data URI."""
    if data.startswith(b"\x89PNG"):
        return Markup('<img alt="contact sheet: {} images" src="data:image/png;base64,{}">').format(name, base64.b64encode(data).decode())
    if (start := data.find(b"<svg")) < 0:
        raise ValueError(f"figure {name} is neither an SVG nor a PNG: it begins with {data[:12]!r}")
    svg = re.sub(r"<metadata>.*?</metadata>", "", data[start:].decode(), flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")  # HTML knows the namespaces: the page holds no address
    return Markup(re.sub(r'<g id="[^"]*"', "<g", svg))  # matplotlib's group names repeat from figure to figure
