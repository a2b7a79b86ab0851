"""Do generated images repeat training images: planted copies of either side are seen, and images of their own are not called copies."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from vhs import metrics

CLASS_GAP = 20.0  # classes lie far apart, so that whose class is missing on a side is nearest on none


def images(rng, labels, held_out: bool, source="here", images_per_patient: int = 1) -> pd.DataFrame:
    """Real images as points of a plane: columns as metrics.nearest takes them, and `at` [2]. A patient's images lie close together."""
    labels = np.asarray(labels)
    person = np.arange(len(labels)) // images_per_patient
    at = rng.normal(size=(person.max() + 1, 2))[person] + rng.normal(0, 0.01, (len(labels), 2)) + CLASS_GAP * labels[:, None]
    side = "held" if held_out else "train"
    about = {"key": [f"{side}{n:04d}" for n in range(len(labels))], "patient": [f"{side}-{n}" for n in person], "label": labels, "source": source}
    return pd.DataFrame(about | {"held_out": held_out, "at": list(at)})


def drawn(rng, labels) -> np.ndarray:
    labels = np.asarray(labels)
    return rng.normal(size=(len(labels), 2)) + CLASS_GAP * labels[:, None]


def to_nearest(generated: np.ndarray, training: pd.DataFrame, held_out: pd.DataFrame, size: int = 50):
    real = pd.concat([training, held_out], ignore_index=True)
    away = np.linalg.norm(generated[:, None] - np.stack(real["at"])[None], axis=-1)
    return metrics.nearest((away[start : start + size] for start in range(0, len(away), size)), real)


@pytest.mark.parametrize("counts", [(40, 40), (40, 400), (400, 40)])
@pytest.mark.parametrize("seed", range(4))
def test_copies_of_either_side_are_seen_and_images_of_their_own_are_not(seed, counts):
    """However many images there are on a side: of ten times as many one is nearer nine times in ten."""
    rng = np.random.default_rng(seed)
    training, held_out = (images(rng, rng.integers(0, 3, n), held) for n, held in zip(counts, (False, True)))
    table, clean = to_nearest(own := drawn(rng, rng.integers(0, 3, 150)), training, held_out)
    low, high = clean["chance"]
    assert 0.3 < clean["share"] < 0.7 and low < 0.5 < high and clean["images"] == (table.to_training < table.to_held_out).sum()
    if counts[0] != counts[1]:
        assert not 0.2 < clean["images"] / 150 < 0.8, "this is what their number makes it"
    for side, real, seen in (("training", training, 1.0), ("held_out", held_out, 0.0)):
        copies = np.stack(real["at"])[rng.integers(0, len(real), 150)] + rng.normal(0, 1e-4, (150, 2))
        found = to_nearest(copies, training, held_out)[1]
        assert abs(found["share"] - seen) < 0.05 and not found["chance"][0] < found["share"] < found["chance"][1], side
        some = to_nearest(np.concatenate([own[:100], copies[:50]]), training, held_out)[1]
        assert (some["share"] > clean["share"]) == (side == "training"), "a third of them copies"


def test_a_share_that_chance_alone_gives_is_inside_its_limits_about_19_times_in_20():
    inside = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        training, held_out = (images(rng, rng.integers(0, 3, n), held, images_per_patient=3) for n, held in ((45, False), (90, True)))
        found = to_nearest(drawn(rng, rng.integers(0, 3, 60)), training, held_out)[1]
        inside += found["chance"][0] <= found["share"] <= found["chance"][1]
    assert inside >= 88, f"{inside} of 100"


def test_a_class_that_one_side_has_more_of_is_no_memory():
    """Training is mostly large, the held-out part mostly small, as given splits may be."""
    rng = np.random.default_rng(0)
    training, held_out = images(rng, [0] * 10 + [2] * 60, False), images(rng, [0] * 60 + [2] * 10, True)
    table, found = to_nearest(drawn(rng, [2] * 150), training, held_out)
    assert found["chance"][0] <= found["share"] <= found["chance"][1] and abs(found["share"] - 0.5) < 0.15
    assert (table.to_training < table.to_held_out).mean() > 0.75, "what is not to be told"


def test_sides_without_a_source_in_common_are_not_compared():
    rng = np.random.default_rng(0)
    training, held_out = images(rng, [0, 1, 2] * 9, False), images(rng, [0, 1, 2] * 9, True, source="elsewhere")
    table, found = to_nearest(drawn(rng, [0, 1, 2]), training, held_out)
    assert found is None and table.notna().all().all()
    unlabelled = images(rng, [0, 1, 2] * 9, True).assign(label=-1)
    assert to_nearest(drawn(rng, [0, 1, 2] * 20), training, unlabelled)[1]["images"] > 10, "then sources alone count"


def test_a_class_that_nobody_is_held_out_of_is_compared_with_nothing():
    """Copies of its training images would all lie nearer to training: no held-out image could have been nearer."""
    rng = np.random.default_rng(0)
    small, held_out = images(rng, [0] * 20, False), images(rng, [0] * 20, True)
    large = images(rng, [0] * 20, False).assign(label=2, key=lambda rows: "large" + rows.key)  # that look like small ones
    copies = np.stack(large["at"])
    alone, beside = (to_nearest(copies, training, held_out)[1] for training in (small, pd.concat([small, large], ignore_index=True)))
    assert beside["images"] == alone["images"] < 20 and beside["share"] == alone["share"]


def test_what_is_nearest_is_named_with_its_distance_whatever_the_blocks():
    rng = np.random.default_rng(0)
    training, held_out, own = images(rng, [0, 1, 2] * 4, False), images(rng, [0, 1, 2] * 5, True), drawn(rng, [0, 1, 2] * 20)
    table, found = to_nearest(own, training, held_out)
    again = to_nearest(own, training, held_out, size=7)
    pd.testing.assert_frame_equal(table, again[0])
    assert again[1] == found and to_nearest(own[:0], training, held_out)[1] is None
    for side, real in (("training", training), ("held_out", held_out)):
        away = np.linalg.norm(own[:, None] - np.stack(real["at"])[None], axis=-1)
        assert table[side].tolist() == real.key.to_numpy()[away.argmin(1)].tolist() and np.allclose(table[f"to_{side}"], away.min(1))


def test_distances_by_class_by_hand():
    generated = pd.DataFrame({"label": [0, 0, 0, 2], "to_training": [0.1, 0.2, 0.6, 0.4], "to_held_out": [0.5, 0.7, 0.9, 0.8]})
    held_out = pd.DataFrame({"label": [0, 2, -1], "to_training": [0.3, 0.5, 0.9]})
    found = metrics.distances_by_class(generated, held_out).set_index("class")
    assert list(found.index) == ["small", "normal", "large", "all"]
    assert found.loc["small"].tolist() == [3, 0.2, 0.7, 1, 0.3] and found.loc["all"].tolist() == pytest.approx([4, 0.3, 0.75, 3, 0.5])
    assert found.loc["normal", ["generated images", "held-out images"]].tolist() == [0, 0] and np.isnan(found.loc["normal", "to training"])
