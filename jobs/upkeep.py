"""Commands that look after what a run made: is it whole, would it be made again."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

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
    for finding in findings:
        said = escape(f"{finding.path}: {finding.what}. To do: {finding.to_do}")
        console.print(f"[{'red' if finding.error else 'yellow'}]{said}[/]", soft_wrap=True)
    console.print(
        f"{shards} shards, {samples} samples, {sum(f.error for f in findings)} errors, {sum(not f.error for f in findings)} remarks"
    )
    raise typer.Exit(1 if any(finding.error for finding in findings) else 0)


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
