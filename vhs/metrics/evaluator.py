"""The files that DogHeart's official evaluators read: one row a test image, no header, `1621.png,2` or `100.png,11.3614`."""

from __future__ import annotations

from pathlib import PurePath

import pandas as pd

from vhs.measure import CLASSES

EVALUATOR_ORDER = ("large", "normal", "small")  # class numbers in these files alone: the alphabetical order of the class folders


def evaluator_csv(predictions: pd.DataFrame) -> bytes:
    """One arm's predictions of the test part, labelled or not, as an evaluator's CSV: sorted by file name, CRLF, no header.

    An arm gives the class number, from the mean of its seeds' probabilities; the arm measure gives the index, 4 decimals, 0 where points coincide.
    `origin` is the file an image came from; a name that occurs in two folders is given with its folder.
    """
    by_file = predictions.groupby("origin")
    if (predictions.arm == "measure").all():
        answers = by_file.measured.first().fillna(0.0).map("{:.4f}".format)
    else:
        most = by_file[[f"p_{name}" for name in CLASSES]].mean().to_numpy().argmax(axis=1)
        answers = pd.Series([str(EVALUATOR_ORDER.index(CLASSES[label])) for label in most], index=sorted(by_file.groups))
    names = {origin: PurePath(origin).name for origin in answers.index}
    if len(set(names.values())) < len(names):
        names = {origin: PurePath(origin).as_posix() for origin in names}
    return "".join(f"{name},{answer}\r\n" for name, answer in sorted((names[origin], answer) for origin, answer in answers.items())).encode()
