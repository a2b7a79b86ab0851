"""Commands that look after what a run made: is it whole, would it be made again."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from jobs import world
from jobs.console import console
from jobs.elsewhere import RunArgument

app = typer.Typer()


@app.command()
def verify(
    url: Annotated[str, typer.Argument(metavar="RUN|DATASET", help="A run, or any folder of shards.")],
    full: Annotated[bool, typer.Option("--full", help="Read every byte and compare every sha256.")] = False,
):
    """Is everything that was committed still there, once, and whole?

    Example: vhs verify runs/mine --full
    """
    from jobs.audit import verify_all

    shards, samples, findings = verify_all(url, full)
    out = Console()
    _show(findings, out)
    out.print(
        f"{shards} shards, {samples} samples, {sum(f.error for f in findings)} errors, {sum(not f.error for f in findings)} remarks", soft_wrap=True
    )
    raise typer.Exit(1 if any(finding.error for finding in findings) else 0)


def _show(findings, out: Console):
    for finding in findings:
        said = escape(f"{finding.path}: {finding.what}. To do: {finding.to_do}")
        out.print(f"[{'red' if finding.error else 'yellow'}]{said}[/]", soft_wrap=True)


@app.command()
def repair(
    url: Annotated[str, typer.Argument(metavar="RUN|DATASET", help="A run at which nobody is at work, or any folder of shards.")],
    full: Annotated[bool, typer.Option("--full", help="Look for what only a full verify finds.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
):
    """Delete what is damaged and can be made again, and what nobody can see; the same `vhs run` then makes it anew. Says what cannot be mended.

    Example: vhs repair runs/mine --full --dry-run
    """
    from jobs.audit import repair as mend

    found, out = mend(url, full, dry_run), Console()
    for name in found.gone:
        out.print(f"{'would delete' if dry_run else 'deleted'} {name}", soft_wrap=True, markup=False, highlight=False)
    for name in found.rewritten:
        out.print(f"{'would write' if dry_run else 'wrote'} {name} again", soft_wrap=True, markup=False, highlight=False)
    _show(found.left, out)
    made_again = len({finding.path for finding in found.again})
    deleted = f"{len(found.gone)} files {'would be ' if dry_run else ''}deleted"
    out.print(f"{deleted}, {made_again} things that the same command makes anew, {len(found.left)} that could not be mended", soft_wrap=True)
    raise typer.Exit(1 if found.left else 0)


@app.command()
def export(
    run: RunArgument,
    out: Annotated[str, typer.Option(help="A new folder, or s3://bucket/prefix; the same command again goes on where it stopped.")],
    format: Annotated[str, typer.Option(help="webdataset; imagefolder (torchvision, Hugging Face); parquet (Hugging Face datasets).")] = "webdataset",
    what: Annotated[str, typer.Option(help="real; accepted: and the generated images that mixed trains on; all: and the rejected ones.")] = "accepted",
    scope: Annotated[str, typer.Option(help="Whose training, validation and held-out images they are: split, fold-0 …")] = "split",
):
    """Write a run's images, with their split and all that is known of them, in a layout that other programs read.

    Example: vhs export runs/mine --format parquet --out my/dataset
    """
    from jobs.config import ConfigError
    from jobs.export import WHAT, export_run
    from shards.export import LAYOUTS

    for name, value, legal in (("format", format, LAYOUTS), ("what", what, WHAT)):
        if value not in legal:
            raise ConfigError(f"--{name} {value}: legal are {', '.join(legal)}")
    counts, written = export_run(run, format, out, what, scope)
    images = ", ".join(f"{counts[split]} {split}" for split in ("train", "valid", "test") if split in counts)
    console.print(f"{out}: {images} images, {written} files written now", soft_wrap=True, markup=False, highlight=False)


@app.command()
def regenerate(run: RunArgument, key: Annotated[str, typer.Argument(help="Key of a generated image (16 hex digits; see the sidecars).")]):
    """Draw one generated image again, its whole batch with it, and compare with what is stored.

    Example: vhs regenerate runs/mine 0123456789abcdef
    """
    from jobs.audit import regenerate as again
    from jobs.plan import reopen

    world.set_environment(reopen(run).config.threads)
    found = again(run, key)
    console.print(f"{key} is image {found['number']} of {found['shard']}")
    if found["equal"]:
        console.print("[green]the same bytes[/]")
    elif not found["difference"]:
        console.print("[green]the same pixels[/], packed into other bytes by another version of the PNG encoder")
    else:
        differs = ", ".join(f"{name} {then} -> {now}" for name, (then, now) in found["numerics"].items()) or "nothing that is recorded"
        console.print(f"[yellow]other bytes[/], mean difference {found['difference']:.3f} grey levels; numerics that differ: {differs}")
    raise typer.Exit(0 if not found["difference"] or (found["numerics"] and found["difference"] <= 1) else 1)


@app.command()
def chaos(
    out: Annotated[str, typer.Option(help="A new folder, or s3://bucket/prefix, for the runs; on the storage to be proved.")],
    faults: Annotated[int, typer.Option(min=1, help="Run after run, until so many have fired.")] = 100,
    least: Annotated[int, typer.Option(min=0, help="Times that each window is met.")] = 5,
    a_run: Annotated[int, typer.Option(min=1, help="Faults a run, at most; an object store's troubles come on top.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Of the first run's schedule.")] = 0,
    pipeline: Annotated[bool, typer.Option("--pipeline", help="The real stages of debug/demo; else small ones that leave the same kinds of files.")] = False,
):
    """Kill, stop and starve the workers of runs, trouble their object store, and compare with a run that nothing disturbed. Minutes.

    Example: vhs chaos --out /shared/chaos --faults 500

    Nothing may be lost, committed twice, torn where a reader looks, or other than it would have been. The trouble of an object store is made by a proxy
    on this machine; the store itself is not touched. What was made stays in OUT, to be looked at and deleted.
    """
    world.set_environment(1)
    from jobs.chaos import storm

    schedule_of, fired, wrong = storm.schedules(seed), Counter(), []
    reference = storm.undisturbed(f"{out}/undisturbed", pipeline)
    console.print(f"undisturbed: {len(reference)} files")
    for number, schedule in enumerate(schedule_of):
        if sum(fired.values()) >= faults and min(schedule.met[window] for window in storm.WINDOWS) >= least:
            break
        found = storm.storm(f"{out}/{seed + number}", schedule, a_run, reference, pipeline=pipeline)
        fired, wrong = fired + found.fired, wrong + found.wrong
        console.print(
            f"seed {seed + number}: {sum(found.fired.values())} faults, {found.workers} workers, {found.compared} files compared, a reader looked "
            f"{found.looks} times: {f'{len(found.wrong)} wrong' if found.wrong else 'nothing lost, twice, torn or other'}", soft_wrap=True,
        )  # fmt: skip
    _show_fired(fired)
    for line in wrong:
        console.print(f"[red]{escape(line)}[/]", soft_wrap=True)
    raise typer.Exit(1 if wrong else 0)


def _show_fired(fired: Counter):
    harms = list(dict.fromkeys(harm for _, harm in sorted(fired)))
    grid = Grid("where", *harms, "all", title=f"{sum(fired.values())} faults that fired")
    for where in dict.fromkeys(where for where, _ in sorted(fired)):
        grid.add_row(where, *(str(fired[where, harm] or "") for harm in harms), str(sum(fired[where, harm] for harm in harms)))
    Console().print(grid)
