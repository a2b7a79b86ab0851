"""Predictions as DogHeart's official evaluators read them, to the byte."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from vhs import metrics


def answers(files: dict[str, tuple[float, float, float]], seed: int = 0) -> pd.DataFrame:
    """One trained arm's answers: file -> p_small, p_normal, p_large."""
    p_small, p_normal, p_large = zip(*files.values())
    return pd.DataFrame({"arm": "real", "origin": list(files), "seed": seed, "p_small": p_small, "p_normal": p_normal, "p_large": p_large})


def test_class_files_are_those_of_the_field(real_data):
    files = {"Test/93.png": (0.1, 0.8, 0.1), "Test/1621.png": (0.6, 0.3, 0.1), "Test/1622.png": (0, 0.2, 0.8)}
    assert metrics.evaluator_csv(answers(files)) == (real_data / "formats" / "predictions_class.csv").read_bytes()


def test_vhs_files_are_those_of_the_field(real_data):
    measured = pd.DataFrame({"arm": "measure", "origin": ["101.png", "100.png"], "seed": metrics.NO_SEED, "measured": [9.80212, 11.36138]})
    assert metrics.evaluator_csv(measured) == (real_data / "formats" / "predictions_vhs.csv").read_bytes()


def test_seeds_answer_by_their_mean_probability():
    # two of three seeds say small, but the third is so sure of large that the mean is
    seeds = [answers({"a.png": p}, seed) for seed, p in enumerate([(0.5, 0.1, 0.4), (0.5, 0.1, 0.4), (0.0, 0.0, 1.0)])]
    assert metrics.evaluator_csv(pd.concat(seeds)) == b"a.png,0\r\n"


def test_names_that_two_folders_share_keep_their_folder():
    files = {"b/1.png": (1, 0, 0), "a/1.png": (0, 1, 0), "a/2.png": (0, 0, 1)}
    assert metrics.evaluator_csv(answers(files)) == b"a/1.png,1\r\na/2.png,0\r\nb/1.png,2\r\n"


def test_an_arm_that_trains_nothing_and_measures_nothing_gives_classes():
    """Beside the arm measure, whose column its rows have too, with nothing in it."""
    said = answers({"a.png": (0.1, 0.3, 0.6), "b.png": (0.5, 0.4, 0.1)}, metrics.NO_SEED).assign(arm="source", measured=np.nan)
    assert metrics.evaluator_csv(said) == b"a.png,0\r\nb.png,2\r\n"


@pytest.mark.parametrize("value", [0.0, 8.19995, 10.0, 123.45678])
def test_an_index_has_four_decimals(value):
    row = pd.DataFrame({"arm": "measure", "origin": ["x.dcm"], "seed": metrics.NO_SEED, "measured": [np.float64(value)]})
    name, _, said = metrics.evaluator_csv(row).decode().removesuffix("\r\n").partition(",")
    assert name == "x.dcm" and len(said.partition(".")[2]) == 4 and float(said) == pytest.approx(value, abs=5.1e-5)
