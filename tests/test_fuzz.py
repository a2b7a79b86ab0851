"""2,000 mutated inputs for everything that reads what others wrote (tests/fuzz.py), and that a decoder's death costs one file."""

from __future__ import annotations

import os
import signal

import pytest
from fuzz import CORPUS, TARGETS, fuzz
from PIL import Image
from scipy.io import savemat

from jobs.data import open_data
from vhs.contained import Contained, Died
from vhs.measure import VIEWS


@pytest.mark.parametrize("target", TARGETS)
def test_mutated_inputs_are_read_or_refused(target, figure):
    found = fuzz(target, 2000)
    figure(f"{found.tried} inputs, {found.accepted} read, {len(found.deaths)} deaths of a decoder contained")
    assert not found.wrong, found.wrong[:10]
    assert found.tried >= 2000


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_decoder_that_dies_takes_its_input_with_it_and_the_next_is_read(how):
    with Contained() as contained:
        with pytest.raises(Died, match=how.name):
            contained.call(signal.raise_signal, how)
        assert contained.call(len, b"abc") == 3


def test_who_is_killed_from_outside_is_no_verdict_on_the_input():
    with Contained() as contained, pytest.raises(RuntimeError, match="SIGKILL: out of memory, or stopped from outside"):
        contained.call(signal.raise_signal, signal.SIGKILL)


def test_a_decoder_without_end_or_without_measure_is_stopped():
    with Contained(memory=1 << 28, cpu_s=1) as contained:
        with pytest.raises(Died, match="more than 1 s of processor time"):
            contained.call(pow, 7, 1 << 26)
        with pytest.raises(MemoryError):
            contained.call(bytes, 1 << 30)


def test_a_label_that_kills_scipy_is_one_reject(tmp_path):
    """Of the corpus: files that bring down scipy's reader of .mat, as its version may be."""
    for number, killer in enumerate([None, *sorted((CORPUS / "mat").iterdir())[:2]]):
        for folder in ("Images", "Labels"):
            (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / "Images" / f"{number}.png")
        if killer:
            (tmp_path / "Labels" / f"{number}.mat").write_bytes(killer.read_bytes())
        else:
            savemat(tmp_path / "Labels" / "0.mat", {"six_points": [[n, n * n] for n in range(6)]})
    first, *others = open_data(str(tmp_path)).scan(VIEWS["canine_lateral"])
    assert others and not first.reject and all("damaged label" in source.reject for source in others), os.listdir(tmp_path)
