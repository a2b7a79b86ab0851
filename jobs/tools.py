"""Commands beside a run: read and measure files, draw data, train what ships. `vhs run` needs none of them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from jobs import elsewhere, outputs, world
from jobs.console import console, drive
from vhs.measure import VIEWS

app = typer.Typer()

Overrides = Annotated[
    Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, dotted: classifier.epochs=20")
]


@app.command()
def predict(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help=f"{' or '.join(VIEWS)} (the labeller that comes with vhs), a labeller's folder, or a run; here or at s3://…."),
    ],
    files: Annotated[list[str], typer.Argument(metavar="FILES...", help="PNG, JPEG, TIFF or DICOM, or folders of them; files also at s3://bucket/name.")],
    out: Annotated[Path, typer.Option(callback=outputs.file_option, help="The table to write.")] = Path("predictions.csv"),
    overlay: Annotated[Optional[Path], typer.Option(callback=outputs.folder_option, help="A folder for pictures of the measurements.")] = None,
):
    """Measure radiographs: key points, VHS or CTR, class, spread. Research use, not for diagnosis.

    Example: vhs predict canine_lateral films/*.png --overlay measured
    """
    world.set_environment(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    from jobs import predict as prediction

    wanted = prediction.listed(files)
    labeller, found = prediction.open_labeller(model), []
    for item in prediction.predict(labeller, wanted, overlays=overlay):
        found.append(item)
        console.print(f"{item.file}: {prediction.caption(item, labeller.view)}", soft_wrap=True, markup=False)
    outputs.write(out, prediction.as_csv(found, labeller.view))
    console.print(f"{out}" + (f", pictures in {overlay}" if overlay else ""), markup=False)
    raise typer.Exit(0 if any(item.points is not None for item in found) else 1)


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write.")],
    view: Annotated[str, typer.Option(help=f"{' or '.join(VIEWS)}.")] = "canine_lateral",
    style: Annotated[str, typer.Option(help="textbook or clinic.")] = "clinic",
    count: Annotated[int, typer.Option(min=1, help="Images to draw.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of the first image; the same seed draws the same image.")] = 0,
    size_px: Annotated[int, typer.Option("--size", min=64, help="Pixels a side.")] = 256,
):
    """Draw radiographs with exact key points into DIR/images and DIR/labels.csv; `vhs run ... data=DIR` takes them.

    Example: vhs phantom dogs --count 200 --style textbook
    """
    from jobs import phantoms
    from jobs.config import ConfigError

    if view not in VIEWS or style not in ("textbook", "clinic"):
        raise ConfigError(f"--view {view} --style {style}: views are {', '.join(VIEWS)}; styles are textbook, clinic")
    counts = phantoms.write(out, view, style, count, seed, size_px, (1 / 3, 1 / 3, 1 / 3))
    console.print(f"{count} phantoms in {out}: " + ", ".join(f"{n} {name}" for name, n in counts.items()))


@app.command()
def ingest(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A folder, a CSV, or WebDataset shards; here or at s3://bucket/folder.")],
    out: Annotated[str, typer.Option(help="The run's folder.")],
    view: Annotated[str, typer.Option(help=f"{' or '.join(VIEWS)}.")],
    overrides: Overrides = None,
    resolution: Annotated[int, typer.Option(help="Pixels a side of the stored images.")] = 512,
):
    """Only read a data folder into shards: what is used, what is rejected and why. A full run does this by itself.

    Example: vhs ingest my/radiographs --view canine_lateral --out runs/read

    Where classes are numbers: vhs ingest my/radiographs ingest.class_order=[small,normal,large] --view canine_lateral --out runs/read
    """
    from jobs import plan
    from jobs.config import Config, merged, validated
    from jobs.data import open_data

    unasked = {"split": {"folds": 2}, "label_by": "hand"}  # nothing is judged or labelled here: what lacks labels or points will do
    asked = {"name": "ingest", "view": view, "data": data, "resolution": resolution, **unasked}
    opened = plan.start(validated(merged(asked, overrides or []), Config), out)
    console.print(f"reading {open_data(data).layout()}", markup=False)
    drive(opened, only="ingest")
    for marker in (opened.marker(path) for path in opened.committed("ingest")):
        console.print(f"{marker.facts['images']} images: " + ", ".join(f"{n} {name}" for name, n in marker.facts["classes"].items()))
        for reject in marker.facts["rejects"]:
            console.print(f"[yellow]rejected[/] {escape(reject['file'])}: {escape(reject['reason'])}", soft_wrap=True)


@app.command()
def init(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A data folder, a CSV, or shards; here or at s3://bucket/folder.")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(callback=outputs.file_option, help="The configuration to write.")] = Path("config.yaml"),
    view: Annotated[Optional[str], typer.Option(help="canine_lateral or human_frontal, where the key points do not tell.")] = None,
):
    """Look a data folder over, say what is in it, and write a configuration for it; `vhs run config.yaml` takes it.

    Example: vhs init my/radiographs --out mine.yaml

    Where classes are numbers: vhs init my/radiographs ingest.class_order=[small,normal,large] --out mine.yaml
    """
    from jobs import init as beginning
    from jobs.config import ConfigError

    if out.exists():
        raise ConfigError(f"{out} is there already: name another with --out, or remove it")
    found = beginning.survey(data, view, overrides or [])
    text = beginning.config(found, out.stem, overrides or [])
    for line in beginning.describe(found):
        console.print(escape(line), soft_wrap=True, highlight=False)
    outputs.write(out, text)
    console.print(f"{out}: vhs run {out} --dry-run says what it would take", markup=False, soft_wrap=True)


@app.command()
def fetch(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="paper, one_gpu, or a YAML file: whose models are wanted.")],
    to: Annotated[Path, typer.Option(callback=outputs.folder_option, help="The folder to keep them in.")],
    overrides: Overrides = None,
):
    """Download the models a config names, once, with sha256, where there is a network; says what to set to use them.

    Example: vhs fetch paper --to models
    """
    from jobs import config as configuration
    from jobs import fetch as fetching

    said = []
    for model, record, fresh in fetching.fetch(configuration.load(config, overrides or []), to):
        state = "downloaded" if fresh else "there already, every sha256 as recorded"
        console.print(f"{model.part}: {record['repo']} at {record['revision']}, {len(record['files'])} files, {state}", soft_wrap=True)
        said.append(f"{model.setting}={to / model.part}")
    console.print(
        f"vhs run {config} {' '.join(said)}" if said else "nothing to fetch: what this config names is here", soft_wrap=True, markup=False
    )


@app.command("cluster-env")
def cluster_env(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A site: a file of configs/clusters without .yaml, or the path of one.")],
    stage: Annotated[str, typer.Option(help="Whose resources: a stage, or driver, the small job that drives a run.")] = "driver",
    ranks: Annotated[int, typer.Option(help="Ranks of one of its units; each task on a node does such units.")] = 1,
):
    """A site's file as shell exports: SBATCH_*, and VHS_* for what sbatch has no variable for. slurm/env.sh sources it.

    Example: eval "$(vhs cluster-env example --stage train --ranks 4)"
    """
    from jobs import site

    print("\n".join(site.cluster_env(name, stage, ranks)))


@app.command()
def pretrain(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="base, which comes with vhs, or a YAML file like it.")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(callback=outputs.folder_option, help="The diffusers folder to write.")] = Path("runs/base"),
    init: Annotated[Optional[str], typer.Option(help="packaged, or a diffusers folder or hub id (org/name) to continue from.")] = None,
):
    """Train the small embedded base model on drawn radiographs (hours; the same command resumes).

    Example: vhs pretrain base --init packaged --out runs/base
    """
    world.set_environment(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    from jobs import pretrain as pretraining

    pretraining.pretrain(config, out, init, overrides or [])
    console.print(f"base model in {out}")


@app.command()
def tune(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run that has labelled its generated images.")],
    overrides: Annotated[
        Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...", help="What to search otherwise: epochs=[10,20] learning_rate.high=1e-2")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Of each arm. More of them go on from fewer.")] = 12,
    arms: Annotated[str, typer.Option(help="Arms that the run trains; each is given the same trials.")] = "real,mixed",
    on: Annotated[str, typer.Option(help="local; or ray (RAY_ADDRESS says which), for example beside the head that ray.sbatch starts.")] = "local",
    space: Annotated[str, typer.Option(help="What is searched: search, which comes with vhs, or a YAML file like it.")] = "search",
    name: Annotated[str, typer.Option(help="Of the table, RUN/tune/NAME.json.")] = "search",
):
    """Search the classifier's settings by Ray Tune's ASHA: the same trials for every arm, judged on the inner validation. The same command resumes.

    Example: vhs tune runs/mine --trials 24 --arms real,real-matched,mixed
    """
    from jobs import config as configuration
    from jobs import drive as driving
    from jobs import plan, search
    from jobs.display import Display
    from vhs.tuning import Search

    if on not in ("local", "ray"):
        raise configuration.ConfigError(f"--on {on}: local or ray. Inside SLURM: sbatch ray.sbatch vhs tune {run} --on ray (README, on a cluster)")
    if not re.fullmatch(r"[\w-]+", name):
        raise configuration.ConfigError(f"--name {name}: letters, digits, _ and -")
    opened = plan.reopen(run)
    opened.config.refuse_sealed()
    world.set_environment(opened.config.threads)
    wanted = configuration.read(space, overrides or [], Search)
    with Display(console) as display:
        table = search.search(opened, wanted, [arm.strip() for arm in arms.split(",")], trials, name, on, display)
    _show_search(opened, table, name)
    opened.refresh()
    driving.publish(opened)


def _show_search(opened, table: dict, name: str):
    from jobs import search
    from vhs import tuning

    rows = tuning.rows(table)
    grid = Grid(*rows[0], title=f"tune/{name}: figures of the inner validation", box=SIMPLE, padding=0)
    for row in rows:
        grid.add_row(*("–" if value != value else f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(grid)
    for arm, best in table["best"].items():
        Console().print(f"{arm}, trial {best['number']}: {search.overrides(opened.config, best['settings'])}", soft_wrap=True, highlight=False)
    if unmixed := {one["arm"] for one in table["trials"] if one["arm"] in ("mixed", "pretrain") and one["generated"] == 0}:
        console.print(f"[yellow]{', '.join(sorted(unmixed))}: no generated image could be mixed in, for a class has none accepted[/]", soft_wrap=True)
    Console().print(
        "Chosen on the inner validation, whose figures flatter whatever is chosen on them; no test image was opened. The arm real has no generated "
        "images to vary. A run gives all its arms the same settings: vhs run CONFIG KEY=VALUE … --out NEW --reuse RUN",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


@app.command()
def study(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A study that comes with vhs (configs/studies), or a YAML file like one.")],
    overrides: Annotated[
        Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...", help="Of every run: data=FOLDER, execution.workers=4. Science is in the study's file.")
    ] = None,
    out: Annotated[Optional[str], typer.Option(help="For its page, and for the runs while they are made; default runs/study-NAME.")] = None,
    records: Annotated[
        Optional[str], typer.Option(help="Where its records are kept; default: vhs/evidence/NAME for a study that comes with vhs, else OUT/records.")
    ] = None,
    only: Annotated[
        Optional[list[str]], typer.Option(metavar="PATTERN", help="Make only the records called so, and table nothing: `seed-100[0-4]*`, `*-fold-0`.")
    ] = None,
    early: Annotated[bool, typer.Option("--early", help="Make nothing, and table what is recorded: a look, and counted as one.")] = False,
    keep_runs: Annotated[bool, typer.Option("--keep-runs", help="Keep the files of recorded runs.")] = False,
    on: elsewhere.On = "local",
    cluster: elsewhere.Cluster = None,
):
    """Make a family of runs of one configuration, and say what they say together. The same command makes what has no record yet.

    Example: vhs study calibration
    """
    from jobs import preflight
    from jobs import study as studying
    from jobs.evidence import KEPT, Evidence

    asked, packaged = studying.read(name)
    members = studying.members(asked, overrides or [])
    studying.chosen(members, only or [])  # before anything is frozen
    cluster, out = elsewhere.site(on, cluster), out or f"runs/study-{asked.name}"
    world.set_environment(members[0].config.threads)
    kept = Evidence(records or (KEPT / asked.name if packaged else f"{out}/records"))

    def work(run, reuse):
        elsewhere.remember(run, on, cluster)
        if on == "slurm":
            elsewhere.on_slurm(run, cluster, detach=False, reuse=reuse)
        else:
            drive(run, on=on, reuse=reuse)

    def say(line):
        console.print(line, style="bold", markup=False, highlight=False, soft_wrap=True)

    making = studying.Making(asked, members, out, kept, work, say, keep_runs)
    if not early:
        making.refuse(preflight.Place(on, cluster), only or [])  # what cannot be made freezes nothing
    kept.freeze(studying.protocol(asked, members))
    if not early:
        making.make(only or [])
    if only:
        return console.print(f"{len(making.missing())} runs of study {asked.name} have records to make; it is tabled when all are there", soft_wrap=True)
    from vhs.report.study import markdown

    print(markdown(studying.table(making, early)))
    console.print(f"page: {out}/index.html; records: {kept.folder}", soft_wrap=True, markup=False, highlight=False)


@app.command()
def labels(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run.")],
    action: Annotated[Literal["export", "import"], typer.Argument(help="export or import.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .csv or .mat file.")],
    images: Annotated[Optional[Path], typer.Option(help="With export: a folder for the pictures, KEY.png.")] = None,
    most_uncertain: Annotated[
        Optional[int], typer.Option(min=1, metavar="N", help="With export: the N whose class the measurement leaves most open, and nobody has looked at.")
    ] = None,
    generator: Annotated[
        Optional[str], typer.Option(metavar="NAME", help="With export: images of one generator; --most-uncertain takes dreambooth's unless told.")
    ] = None,
):
    """Take the labels of generated images out, or a person's corrections in; the next `vhs run` redoes what they touch.

    Example: vhs labels runs/mine export labels.csv --images pictures

    A row has `key`, and any of: `accepted` (yes or no), `label` (small, normal, large), all key points (A_x, A_y ... in the image's pixels), which
    decide index and class. What is left empty or unchanged stays the machine's. A .mat file holds a struct `labels` with the same fields, `key` a
    cell array and `points` an array [images, points, 2]. A faulty row is named, and then nothing is imported.

    A row whose `looked_at` says yes counts as looked at even where nothing in it was changed, and --most-uncertain does not ask about it again; nothing
    is trained again for it. --most-uncertain writes yes into every row: leave out the rows that you did not look at, or empty it there. An export of
    everything has yes only where somebody looked before, so importing it whole claims nothing.

    The report says what every import gained, and all of them together. Only arms that train on a corrected image (`generator` says whose it is) are
    trained again, and, where mixed has other numbers of images by it, those that draw by its numbers.
    """
    from jobs import labels as corrections
    from jobs import plan
    from jobs.config import ConfigError

    if action == "import" and (images or most_uncertain or generator):
        raise ConfigError("--images, --most-uncertain and --generator go with export: an import takes what FILE says")
    opened = plan.reopen(run, read_only=action == "export")
    if action == "export":
        console.print(f"{corrections.export(opened, file, images, most_uncertain, generator)} labels in {file}", markup=False)
        return
    console.print(_taken(corrections.take(opened, file)), markup=False)


def _taken(done) -> str:
    """What an import did (jobs/labels.py), in words."""
    corrected = f"{done.corrected} label{'s' if done.corrected != 1 else ''} corrected"
    if not done.corrected and not done.confirmed:
        return "nothing in it differs from what the run has, and none of its rows was looked at for the first time"
    confirmed = f"{done.confirmed} looked at and confirmed, " if done.confirmed else ""
    return f"{confirmed}{corrected}{': run the same command again' if done.corrected else ': there is nothing to run again'}"
