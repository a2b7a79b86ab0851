"""Where commands speak to a person: messages and progress on stderr, results on stdout."""

from __future__ import annotations

import json

from rich.console import Console

console = Console(stderr=True)


def drive(run, **options):
    """jobs.drive.drive with a progress display."""
    from jobs import drive as driving
    from jobs.display import Display

    with Display(console) as display:
        driving.drive(run, show=display, **options)
    if rejects := json.loads(run.storage.read("real/rejects.json")):
        console.print(f"{len(rejects)} files are not used, with reasons in {run.url}/real/rejects.json", soft_wrap=True, highlight=False)
