"""`vhs run CONFIG --dry-run`, as it is said: what is there, what would be done, what that takes, on how many GPUs, and what its test could show."""

from __future__ import annotations

from rich.console import Console

from jobs import fits, forecast, plan
from jobs.config import ConfigError
from jobs.console import console
from jobs.display import plan_table, scaling_table
from jobs.drive import frontier


def dry_run(opened: plan.Run, calibrate: str | None, gpus: str | None):
    """Say what `opened`, read only, would do. `calibrate`: a run to take rates from; `gpus`: numbers of them, with commas between."""
    settings, out, counts = opened.config, opened.url, _counts(gpus) if gpus is not None else []
    if counts and settings.execution.device == "auto":  # asked on a login node, meant for where GPUs are
        settings = settings.model_copy(update={"execution": settings.execution.model_copy(update={"device": "cuda"})})
    console.print(
        f"{settings.name}: {settings.view} at {settings.resolution} px, arms {', '.join(settings.arms)}, seeds {', '.join(map(str, settings.seeds))}, "
        f"{settings.split.folds or 'no'} folds -> {out}"
    )
    begun = "plan.json" in opened.names
    if begun:
        plan.check(settings, out)
        left = frontier(opened)
        console.print(f"would go on with {left[0]}: {len(left[1])} units" if left else "complete: nothing would be done")
    else:
        console.print("a new run: would begin with ingest")
    own = opened if begun and forecast.ran_on(opened) is forecast.device(settings) else None
    measured = plan.reopen(calibrate, read_only=True) if calibrate else own
    planned = forecast.forecast(settings, sizes := forecast.sizes(settings, opened), measured)
    said = [*forecast.notes(planned), *forecast.detectable(sizes, settings.split.folds)]
    Console().print(plan_table(planned))
    if counts:
        Console().print(scaling_table(planned, counts))
        said = [*forecast.scaled(planned, counts), *said]
    else:
        said += fits.remarks(planned)
    for line in said:
        Console().print(line, soft_wrap=True, highlight=False)


def _counts(gpus: str) -> list[int]:
    """The numbers in `gpus`. ConfigError for what is none."""
    words = [word.strip() for word in gpus.split(",")]
    wrong = ", ".join(repr(word) for word in words if not word.isdecimal() or not int(word))
    if wrong:
        raise ConfigError(f"--gpus {gpus}: {wrong} is no number of GPUs; write whole numbers from 1 on, with commas: --gpus 8,64,512")
    return sorted({int(word) for word in words})
