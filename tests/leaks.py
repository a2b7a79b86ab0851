"""What two leaks would have brought that vhs refuses, on phantoms: the figures of the README's "What a leak is worth".

    python tests/leaks.py [--leak patient|generator] [--seeds 5] [--config demo] [--out FOLDER] [KEY=VALUE …]

patient     each dog is filmed four times; films are shared out one by one, as KFold over images does, so the test part shows dogs of the training part
generator   DreamBooth is taught with the test images as well; what it draws is mixed in, and judged on those images

No setting does either: this script replaces the functions that stand in the way, in its own process, and makes every run beside one that is as it should be.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # python tests/leaks.py

from jobs import config, lineage, plan, world  # noqa: E402
from jobs.attempt import Inputs, attempt  # noqa: E402
from jobs.drive import frontier  # noqa: E402
from jobs.stages import evaluate, train  # noqa: E402
from shards import manifest  # noqa: E402
from vhs import metrics, phantom, split  # noqa: E402
from vhs.measure import VIEWS  # noqa: E402
from vhs.radiograph import encode_png  # noqa: E402

FILMS = 4  # of a dog
VIEW, STYLE, SIDE_PX = "canine_lateral", "clinic", 192


def film(dog: int, number: int) -> phantom.Phantom:
    """A dog's `number`th film: the same anatomy and heart, another exposure, noise and collimation. As vhs.phantom.draw, with two seeds instead of one."""
    place = (list(VIEWS).index(VIEW), phantom.STYLES.index(STYLE))
    index, anatomy = (np.random.default_rng([dog, *place, k]) for k in (0, 1))
    exposure, noise = (np.random.default_rng([dog * FILMS + number, *place, k]) for k in (2, 3))
    canvas = phantom.Canvas(SIDE_PX)
    attenuation, inside, points = phantom.ANATOMY[VIEW](canvas, anatomy, phantom._draw_index(VIEW, index, (0.2, 0.4, 0.4)), STYLE)
    grey = phantom.develop(canvas, attenuation, inside, phantom.random_film(exposure, STYLE), noise)
    grey = phantom.surround(canvas, grey, (*points.min(0), *points.max(0)), STYLE, exposure)
    pixels = canvas.pixels(points)
    return phantom.Phantom(np.round(np.clip(grey, 0, 1) * 255).astype(np.uint8), pixels, float(VIEWS[VIEW].measure(pixels.astype(np.float64))))


def kennel(folder: Path, seed: int, dogs: int):
    """A data folder: the films of `dogs` dogs, and labels.csv with whose they are."""
    (folder / "images").mkdir(parents=True)
    names = VIEWS[VIEW].points
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "patient", *(f"{name}_{axis}" for name in names for axis in "xy")])
        for dog in range(seed * 100_000, seed * 100_000 + dogs):
            for number in range(FILMS):
                drawn = film(dog, number)
                (folder / "images" / f"{dog}-{number}.png").write_bytes(encode_png(drawn.image))
                writer.writerow([f"{dog}-{number}.png", f"dog {dog}", *drawn.points.ravel().round(3)])


def do(run: plan.Run, units: list):
    for unit in units:
        if not run.done(unit):
            attempt(run.url, run.config, unit)
    run.refresh()


def judged(run: plan.Run, arm: str) -> float:
    """Accuracy on the test part of `arm`, the only one that is trained."""
    run = plan.Run(run.url, run.config.model_copy(update={"arms": (arm,)}))
    for stage in (train, evaluate):
        do(run, stage.units(run))
    found = pd.concat([manifest.read(run.storage, path).to_pandas() for path in run.committed("evaluate", arm=arm)], ignore_index=True)
    return metrics.accuracy(found[found.role == metrics.HELD_OUT])["accuracy"]


def one_by_one(images: pd.DataFrame, settings) -> pd.DataFrame:
    """Every film its own patient."""
    return images.assign(patient=images.key, group=images.key)


def patient_leak(seed: int, name: str, overrides: list[str], out: Path) -> tuple[float, float]:
    """Accuracy of the arm real where no dog is on both sides, and where films are shared out one by one."""
    kennel(out / "dogs", seed, dogs=60)
    settings = config.load(name, [f"data={out / 'dogs'}", "phantoms.test_count=0", "arms=[real]", "split.test_fraction=0.4", f"split.seed={seed}", *overrides])
    found = []
    for leaky in (False, True):
        run = plan.start(settings, str(out / ("leaky" if leaky else "clean")))
        do(run, run.units("ingest"))
        with patch.object(split, "_grouped", one_by_one) if leaky else nullcontext():
            do(run, run.units("split"))
        splits = manifest.read(run.storage, run.committed("split")[0]).to_pandas()
        dogs = manifest.load(run.storage, paths=run.committed("ingest")).to_pandas().set_index("key").patient
        both = {part: set(dogs[splits.key[splits.part == part]]) for part in ("train", "test")}
        assert bool(both["train"] & both["test"]) == leaky, "the leak is not what it is meant to be"
        found.append(judged(run, "real"))
    return found[0], found[1]


def generator_leak(seed: int, name: str, overrides: list[str], out: Path) -> tuple[float, float]:
    """Accuracy of the arm mixed with a generator that has not seen the test images, and with one that has."""
    settings = config.load(name, [f"phantoms.seed={seed}", "phantoms.test_count=200", "arms=[real-matched,mixed]", *overrides])
    clean, leaky = (plan.start(settings, str(out / word)) for word in ("clean", "leaky"))
    draw(clean)
    for stage in ("ingest", "split", "labeller", "priors"):
        assert plan.adopt(leaky, leaky.units(stage), clean.url)
        leaky.refresh()
    honest = lineage.split_rows

    def with_test_images(inputs):
        scope = honest(inputs)
        training = pd.concat([scope.training, scope.held_out]).sort_values("key", ignore_index=True)
        return lineage.ScopeRows(training, scope.inner, scope.held_out, frozenset(), frozenset())

    with patch.object(lineage, "split_rows", with_test_images):
        do(leaky, leaky.units("dreambooth"))
    (generator,) = leaky.committed("dreambooth")
    held_out = honest(Inputs(clean.storage, clean.units("train")[0])).held_out_patients
    assert held_out <= set(leaky.marker(generator).facts["patients_seen"]), "the leak is not what it is meant to be"
    with patch.object(lineage, "guard", lambda *_: None):
        draw(leaky)
        return judged(clean, "mixed"), judged(leaky, "mixed")


def draw(run: plan.Run):
    """Up to the labels of the generated images."""
    while (work := frontier(run)) and work[0] != train.NAME:
        do(run, work[1])


LEAKS = {"patient": patient_leak, "generator": generator_leak}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leak", choices=LEAKS, action="append")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--config", default="demo")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    chosen = parser.parse_args()
    world.set_environment(1)
    print(f"| leak | without, % | with, % | inflation, points (95%, {chosen.seeds} seeds) |\n| --- | --- | --- | --- |", flush=True)
    for leak in chosen.leak or LEAKS:
        pairs = []
        for seed in range(chosen.seeds):
            with tempfile.TemporaryDirectory(dir=chosen.out) as folder:
                pairs.append(LEAKS[leak](seed, chosen.config, chosen.overrides, Path(folder)))
            print(f"{leak}, seed {seed}: {100 * pairs[-1][0]:.1f} -> {100 * pairs[-1][1]:.1f}", file=sys.stderr, flush=True)
        without, with_leak = 100 * np.array(pairs).T
        more, half = with_leak - without, np.nan
        if len(more) > 1:
            half = stats.t.ppf(0.975, len(more) - 1) * more.std(ddof=1) / np.sqrt(len(more))
        interval = f"{more.mean():+.1f} [{more.mean() - half:.1f}, {more.mean() + half:.1f}]"
        print(f"| {leak} | {without.mean():.1f} | {with_leak.mean():.1f} | {interval} |", flush=True)


if __name__ == "__main__":
    main()
