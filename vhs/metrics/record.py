"""What is kept of one scope of a run once its files are gone: each arm's word on every held-out image, as a text that a repository can hold.

The lines that begin with "# " say what was run: `# key: JSON`, one a line. Then a CSV, one row an image in the order of keys: key, patient, source, label and
a column `ARM/SEED` (`ARM` where nothing was trained) with cells like `l 3 12 85`: the class that was said by its first letter, and the probabilities of
small, normal and large in per cent. A bare letter is as good as `l 0 0 100`. So a figure that changes is a line that changes.

A patient is named where several of the images are his, by a digest: what the data calls him stays in the run.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from vhs.measure import CLASSES
from vhs.metrics.predictions import HELD_OUT, NO_SEED, UNLABELLED

IMAGE = ["key", "patient", "source", "label"]
LETTERS = {name[0]: number for number, name in enumerate(CLASSES)}
PROBABILITIES = [f"p_{name}" for name in CLASSES]
NEEDED = ("study", "run", "scope", "vary", "science", "models", "trained")


@dataclass(frozen=True)
class Record:
    """`about`: what was run (NEEDED at least); `trained`: by arm, how many images of each origin it trained on, and its optimizer steps.
    `predictions`: the held-out rows, as vhs/metrics/predictions.py has them, without `index`."""

    about: dict
    predictions: pd.DataFrame

    @property
    def name(self) -> str:
        return f"{self.about['run']}-{self.about['scope']}"


def encode(record: Record) -> bytes:
    """The record as text. Its predictions must answer each image once for each arm and seed (joined_once)."""
    rows, several = record.predictions, record.predictions.groupby("patient").key.nunique().gt(1)
    several = set(several.index[several])
    images = rows.drop_duplicates("key").set_index("key")[["patient", "source", "label"]].sort_index()
    patient = images.patient.map(lambda name: hashlib.sha256(str(name).encode()).hexdigest()[:8] if name in several else "")
    label = images.label.map(lambda number: "" if number == UNLABELLED else CLASSES[number])
    table = images.assign(patient=patient, label=label)
    for (arm, seed), answers in rows.groupby(["arm", "seed"], sort=False):
        table[arm if seed == NO_SEED else f"{arm}/{seed}"] = _cells(answers).reindex(table.index)
    head = "".join(f"# {key}: {json.dumps(value, sort_keys=True)}\n" for key, value in record.about.items())
    return (head + table.reset_index().to_csv(index=False, lineterminator="\n")).encode()


def about(data: bytes) -> dict:
    """What the head of a record says. ValueError where it is none."""
    head = [line[2:].partition(": ") for line in itertools.takewhile(lambda line: line.startswith("# "), io.StringIO(data.decode()))]
    said = {key: json.loads(value) for key, _, value in head}
    if missing := [key for key in NEEDED if key not in said]:
        raise ValueError(f"no record of a study: its head says nothing of {', '.join(missing)}")
    return said


def decode(data: bytes) -> Record:
    """The record that `encode` wrote. ValueError where it is none."""
    said = about(data)
    rows = data.decode().split("\n", len(said))[-1]  # after the head
    table = pd.read_csv(io.StringIO(rows), dtype=str, keep_default_na=False)
    if list(table.columns[: len(IMAGE)]) != IMAGE:
        raise ValueError(f"no record of a study: its columns begin {', '.join(table.columns[: len(IMAGE)])}, not {', '.join(IMAGE)}")
    images = table[IMAGE].assign(
        patient=table.patient.where(table.patient != "", None), label=[CLASSES.index(name) if name else UNLABELLED for name in table.label]
    )
    return Record(said, pd.concat(_answers(images, table, said["scope"]), ignore_index=True))


def _answers(images: pd.DataFrame, table: pd.DataFrame, scope: str) -> Iterable[pd.DataFrame]:
    for column in table.columns[len(IMAGE) :]:
        arm, _, seed = column.partition("/")
        if wrong := [cell for cell in table[column] if not re.fullmatch(rf"[{''.join(LETTERS)}]( \d+){{3}}|[{''.join(LETTERS)}]", cell)]:
            raise ValueError(f"no record of a study: column {column} says {wrong[0]!r}; want {', '.join(LETTERS)}, or one with three per cents: l 3 12 85")
        said = [cell.split() for cell in table[column]]
        predicted = np.array([LETTERS[words[0]] for words in said])
        given = [words[1:] or 100 * np.eye(len(CLASSES))[number] for words, number in zip(said, predicted)]
        probability = np.array(given, dtype=float).reshape(len(said), len(CLASSES)) / 100
        yield images.assign(
            arm=arm, seed=int(seed) if seed else NO_SEED, scope=scope, role=HELD_OUT, predicted=predicted,
            **{name: probability[:, number] for number, name in enumerate(PROBABILITIES)},
        )  # fmt: skip


def _cells(answers: pd.DataFrame) -> pd.Series:
    percent = (100 * answers[PROBABILITIES].to_numpy(dtype=float)).round().astype(int)
    letters = np.array(list(LETTERS))[answers.predicted.to_numpy()]
    certain = percent[np.arange(len(percent)), answers.predicted.to_numpy()] == 100
    cells = [letter if sure else f"{letter} {' '.join(map(str, row))}" for letter, row, sure in zip(letters, percent.tolist(), certain)]
    return pd.Series(cells, index=answers.key)
