"""The commands of `vhs bench`. A module of this package each."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer
from rich.console import Console
from rich.table import Table as Grid

from jobs import outputs, world

JsonFile = Annotated[
    Optional[Path], typer.Option("--json", metavar="FILE", callback=outputs.file_option, help="Write the figures there too.")
]

app = typer.Typer(no_args_is_help=True, help="This project's hot paths beside the libraries it could have used: ratios from one run. Minutes.")


@app.command("write")
def write(
    images: Annotated[int, typer.Option(min=1)] = 96,
    repeats: Annotated[int, typer.Option(min=1, help="Medians are taken over these.")] = 5,
    size_px: Annotated[int, typer.Option("--size", min=64, help="Pixels a side.")] = 512,
    json_file: JsonFile = None,
):
    """Images into shards: our PNG encoder and tar writer beside webdataset's.

    Example: vhs bench write --json write.json
    """
    world.set_environment(1)
    from jobs.bench import write as writing

    _show(writing.write(images, repeats, size_px), json_file)


@app.command("generate")
def generate(
    model: Annotated[str, typer.Option(help="packaged, or a diffusers folder.")] = "packaged",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU where there is one.")] = "auto",
    images: Annotated[int, typer.Option(min=1)] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Medians are taken over these.")] = 3,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Of DPM-Solver++; PNDM takes the study's 50.")] = 20,
    size_px: Annotated[int, typer.Option("--size", min=32, help="Pixels a side.")] = 128,
    json_file: JsonFile = None,
):
    """Drawing images: our sampler beside diffusers' pipeline and beside the bare networks.

    Example: vhs bench generate --model models/base --device cuda --size 512
    """
    world.set_environment(1)
    world.set_numerics(1)
    from jobs.bench import generate as generating

    _show(generating.generate(images, repeats, batch, steps, size_px, model, device), json_file)


@app.command("stream")
def stream(
    url: Annotated[str, typer.Option("--url", metavar="S3URL", help="A place in an object store, s3://bucket/prefix; what is written there goes again.")],
    images: Annotated[int, typer.Option(min=1)] = 2048,
    repeats: Annotated[int, typer.Option(min=1, help="Medians are taken over these.")] = 5,
    size_px: Annotated[int, typer.Option("--size", min=32, help="Pixels a side.")] = 224,
    json_file: JsonFile = None,
):
    """Images out of shards, from this disk and from an object store: our reader beside webdataset's and mosaicml-streaming's. On this machine's first core.

    Example: vhs bench stream --url s3://bucket/scratch --json stream.json
    """
    world.set_environment(1)
    from jobs.bench import stream as streaming

    _show(streaming.stream(url, images, repeats, size_px), json_file)


@app.command("dispatch")
def dispatch(
    units: Annotated[int, typer.Option(min=1, help="That have nothing to do.")] = 1000,
    repeats: Annotated[int, typer.Option(min=1, help="Medians are taken over these.")] = 3,
    shards: Annotated[int, typer.Option(min=10, help="Of the run whose restart is timed.")] = 10_000,
    scratch: Annotated[Optional[str], typer.Option(metavar="DIR", help="On the file system to be measured.")] = None,
    json_file: JsonFile = None,
):
    """Handing out work: our claims beside bare submitit and bare Ray; a restart's decision; an array's submission, where SLURM is.

    Example: vhs bench dispatch --scratch /shared/runs --json dispatch.json
    """
    world.set_environment(1)
    from jobs.bench import dispatch as dispatching

    found = dispatching.dispatch(units, repeats, shards, scratch)
    _show(found.bookkeeping, None)
    for timing in found.timings:
        took = "not measured" if timing.seconds is None else f"{timing.seconds:.2f} s"
        Console().print(f"{timing.what}: {took}, {timing.note}", soft_wrap=True, highlight=False)
    if json_file:
        outputs.write(json_file, json.dumps(found.as_dict(), indent=1) + "\n")


@app.command("scaling")
def scaling(
    on: Annotated[Literal["slurm", "ray"], typer.Option("--on", help="slurm: job arrays. ray: actors of the Ray cluster that RAY_ADDRESS names.")],
    folder: Annotated[str, typer.Option("--out", metavar="DIR", help="A new folder that every node sees.")],
    workers: Annotated[str, typer.Option(help="Numbers of workers, the first is the measure of the others.")] = "1,8",
    seconds: Annotated[float, typer.Option(min=0.1, help="A unit sleeps.")] = 30.0,
    cluster: Annotated[Optional[str], typer.Option("--cluster", metavar="NAME", help="The site, with --on slurm. Default: $VHS_CLUSTER.")] = None,
    json_file: JsonFile = None,
):
    """Units that sleep, on one worker and on more: what handing out work loses as workers are added. Start-up is shown apart.

    Example: vhs bench scaling --on slurm --cluster testcluster --out /shared/scaling
    """
    from jobs import config as configuration
    from jobs import elsewhere

    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", workers):
        raise configuration.ConfigError(f"--workers {workers}: numbers with commas between, such as 1,8")
    site = elsewhere.site(on, cluster)
    world.set_environment(1)
    from jobs.bench import scaling as timing

    rows = []
    for row in timing.scaling(on, [int(word) for word in workers.split(",")], seconds, Path(folder).resolve(), site):
        rows.append(asdict(row))
        Console().print(
            f"{row.workers} workers on {row.backend}: {timing.EACH * row.workers} units of {row.seconds:g} s in {row.wall_s:.1f} s, {row.efficiency:.1%} of "
            f"the first row's pace a worker; after {row.start_s:.1f} s all were there", soft_wrap=True, highlight=False,
        )  # fmt: skip
    if json_file:
        outputs.write(json_file, json.dumps(rows, indent=1) + "\n")


def _show(result, json_file: Path | None):
    grid = Grid(
        "what", result.unit, "ratio", *(["bytes an image"] if result.what == "write" else []), title=f"{result.device}, medians of {result.repeats}"
    )
    for row in result.rows:
        figures = [row.note or "", ""] if row.rate is None else [f"{row.rate:.2f}", f"{row.ratio:.2f}"]
        grid.add_row(row.name, *figures, *([str(row.bytes_per_image or "")] if result.what == "write" else []))
    Console().print(grid)
    if json_file:
        outputs.write(json_file, json.dumps(result.as_dict(), indent=1) + "\n")
