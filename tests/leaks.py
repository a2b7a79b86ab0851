"""What two leaks would have brought that vhs refuses, on phantoms: the figures of the README's "What a leak is worth".

    python tests/leaks.py [--leak patient|generator] [--seeds 5] [--config demo] [--out FOLDER] [KEY=VALUE …]

patient     each dog is filmed five times; three films teach and two judge, as where films are shared out one by one
generator   DreamBooth is taught with test images as well; what it draws is mixed in, and judged on those images

No setting does either: this script replaces the functions that stand in the way, in its own process. Each leak is crossed over: there are two halves of the
dogs, P and Q, and two models, one that saw P's images and one that saw as many of Q's. On P the first one leaks and the second is honest, on Q the other way
round, so both figures are of the same images and the same amount of teaching, and nothing but the leak is between them.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # python tests/leaks.py

from jobs import config, lineage, plan, world  # noqa: E402
from jobs.attempt import Inputs, attempt  # noqa: E402
from jobs.drive import frontier  # noqa: E402
from jobs.stages import evaluate, train  # noqa: E402
from shards import manifest  # noqa: E402
from vhs import metrics, phantom, split  # noqa: E402
from vhs.measure import VIEWS  # noqa: E402
from vhs.metrics.study import over_runs, words  # noqa: E402
from vhs.radiograph import encode_png  # noqa: E402

TAUGHT, FILMS = 3, 5  # films of a dog: the first three teach, the others judge
HALVES = ("P", "Q")
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
    """A data folder: the films of 2 x `dogs` dogs, and a table for each half in which its dogs teach and all judge."""
    (folder / "images").mkdir(parents=True)
    head = ["file", "patient", "split", *(f"{name}_{axis}" for name in VIEWS[VIEW].points for axis in "xy")]
    tables = {half: [head] for half in HALVES}
    for number in range(2 * dogs):
        dog, mine = seed * 100_000 + number, HALVES[number % 2]
        for turn in range(FILMS):
            drawn, name = film(dog, turn), f"images/{dog}-{turn}.png"
            (folder / name).write_bytes(encode_png(drawn.image))
            row = [name, f"dog {dog}", "train" if turn < TAUGHT else "test", *drawn.points.ravel().round(3)]
            for half in HALVES:
                tables[half] += [row] if half == mine or turn >= TAUGHT else []
    for half, rows in tables.items():
        with (folder / f"{half}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)


def do(run: plan.Run, units: list):
    for unit in units:
        if not run.done(unit):
            attempt(run.url, run.config, unit)
    run.refresh()


def answers(run: plan.Run, arm: str) -> pd.Series:
    """Of each test image, the share of seeds whose classifier is right; `arm` is the only one that is trained."""
    run = plan.Run(run.url, run.config.model_copy(update={"arms": (arm,)}))
    for stage in (train, evaluate):
        do(run, stage.units(run))
    found = pd.concat([manifest.read(run.storage, path).to_pandas() for path in run.committed("evaluate", arm=arm)], ignore_index=True)
    found = found[found.role == metrics.HELD_OUT]
    return (found.predicted == found.label).groupby(found.key).mean()


def crossed(right: dict[str, pd.Series], half: pd.Series) -> tuple[float, float]:
    """(honest, leaking) accuracy over all images: `right` by the model that saw P or Q, `half` that an image is of."""
    own = {leaks: [right[seen][half[right[seen].index] == (seen if leaks else other)] for seen, other in (HALVES, HALVES[::-1])] for leaks in (False, True)}
    honest, leaking = (pd.concat(own[leaks]) for leaks in (False, True))
    assert honest.index.sort_values().equals(leaking.index.sort_values()) and honest.index.is_unique, "both figures are of the same images"
    return float(honest.mean()), float(leaking.mean())


def one_by_one(images: pd.DataFrame, settings) -> pd.DataFrame:
    """Every film its own patient."""
    return images.assign(patient=images.key, group=images.key)


def patient_leak(seed: int, name: str, overrides: list[str], out: Path) -> tuple[float, float]:
    """Accuracy of the arm real on films of dogs that it was not taught with, and on other films of dogs that it was."""
    kennel(out / "dogs", seed, dogs=60)
    right = {}
    for half in HALVES:
        settings = config.load(name, [f"data={out / 'dogs' / half}.csv", "phantoms.test_count=0", "arms=[real]", f"split.seed={seed}", *overrides])
        run = plan.start(settings, str(out / half))
        do(run, run.units("ingest"))
        with patch.object(split, "_grouped", one_by_one), patch.object(split, "drop_copies", lambda images, _: (images, [])):
            do(run, run.units("split"))
        splits = manifest.read(run.storage, run.committed("split")[0]).to_pandas()
        dogs = manifest.load(run.storage, paths=run.committed("ingest")).to_pandas().set_index("key").patient
        taught, judged = (set(dogs[splits.key[splits.part == part]]) for part in ("train", "test"))
        assert len(taught) == 60 and len(judged) == 120 and taught < judged, "the leak is not what it is meant to be"
        half_of = dogs.map(lambda dog, taught=taught, half=half: half if dog in taught else HALVES[half == "P"])
        right[half] = answers(run, "real")
    return crossed(right, half_of)


def generator_leak(seed: int, name: str, overrides: list[str], out: Path) -> tuple[float, float]:
    """Accuracy of the arm mixed on test images that its generator was not taught with, and on those that it was."""
    settings = config.load(name, [f"phantoms.seed={seed}", "phantoms.test_count=400", "arms=[real-matched,mixed]", *overrides])
    runs = {half: plan.start(settings, str(out / half)) for half in HALVES}
    first, second = runs.values()
    for stage in ("ingest", "split", "labeller", "priors"):
        do(first, first.units(stage))
        assert plan.adopt(second, second.units(stage), first.url)
        second.refresh()
    honest = lineage.split_rows
    test = honest(Inputs(first.storage, first.units("dreambooth")[0])).held_out
    half_of = pd.Series([HALVES[number % 2] for number in range(len(test))], index=sorted(test.key))
    for half, run in runs.items():

        def with_test_images(inputs, half=half):
            scope = honest(inputs)
            also = scope.held_out[(half_of[scope.held_out.key] == half).to_numpy()]
            training = pd.concat([scope.training, also]).sort_values("key", ignore_index=True)
            return lineage.ScopeRows(training, scope.inner, scope.held_out, frozenset(), frozenset())

        with patch.object(lineage, "split_rows", with_test_images):
            do(run, run.units("dreambooth"))
        seen = set(run.marker(run.committed("dreambooth")[0]).facts["patients_seen"])
        own = test.key.map(half_of) == half
        assert set(test.patient[own]) <= seen and not set(test.patient[~own]) & seen, "the leak is not what it is meant to be"
    with patch.object(lineage, "guard", lambda *_: None):
        for run in runs.values():
            draw(run)
        return crossed({half: answers(run, "mixed") for half, run in runs.items()}, half_of)


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
    if chosen.seeds < 2:
        parser.error(f"--seeds {chosen.seeds}: an interval takes two or more")
    world.set_environment(1)
    print(f"| leak | honest, % | leaking, % | inflation, points (95%, {chosen.seeds} seeds) |\n| --- | --- | --- | --- |", flush=True)
    for leak in chosen.leak or LEAKS:
        pairs = []
        for seed in range(chosen.seeds):
            with tempfile.TemporaryDirectory(dir=chosen.out) as folder:
                pairs.append(LEAKS[leak](seed, chosen.config, chosen.overrides, Path(folder)))
            print(f"{leak}, seed {seed}: {100 * pairs[-1][0]:.1f} -> {100 * pairs[-1][1]:.1f}", file=sys.stderr, flush=True)
        honest, leaking = np.array(pairs).T
        more = over_runs([{"difference": {"value": one}} for one in leaking - honest])
        print(f"| {leak} | {100 * honest.mean():.1f} | {100 * leaking.mean():.1f} | {words(more)} |", flush=True)


if __name__ == "__main__":
    main()
