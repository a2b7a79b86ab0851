"""Who saw whom: the rows a scope may train on, and the guard that refuses a generated image with a leak behind it.

A generated image carries the generator it came from and the labeller that measured it; both recorded the patients and the images they were trained on.
If one of those is held out in the scope that wants to train on the image, the image would carry the held-out patient into training.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from jobs.unit import Marker
from vhs import split
from vhs.duplicates import distances


class LeakError(Exception):
    """A generated image that may not be trained on: names the image, what it came through, and the patient."""


@dataclass(frozen=True)
class ScopeRows:
    """The real images of one scope. `held_out_patients` and `held_out_keys` are of every image that it may not learn from, the test part included."""

    training: pd.DataFrame
    inner: pd.DataFrame
    held_out: pd.DataFrame
    held_out_patients: frozenset[str]
    held_out_keys: frozenset[str]


def split_rows(inputs) -> ScopeRows:
    """The rows of the unit's `real` input by what its scope does with them, `patient` as the split knows it."""
    splits, scope = inputs.table("splits"), inputs.params["scope"]
    real = inputs.samples("real").drop(columns="patient").merge(splits[["key", "patient"]], on="key", validate="one_to_one")

    def rows(keys: list[str]) -> pd.DataFrame:
        return real[real.key.isin(keys)].sort_values("key").reset_index(drop=True)

    held_out = rows(split.held_out(splits, scope))
    forbidden = pd.concat([held_out, splits[splits.part == "test"]])
    patients, keys = frozenset(forbidden.patient), frozenset(forbidden.key)
    return ScopeRows(rows(split.training(splits, scope)), rows(split.inner(splits, scope)), held_out, patients, keys)


def own_class_images(given: pd.DataFrame, real: pd.DataFrame, held_out_patients: frozenset[str], bits: int) -> pd.DataFrame:
    """Those images of the data (key, patient) that the user's own class images are, or look like: an export in another format is the same film.

    `given`, `real`: key and phash of class images and of the data's; hashes at most `bits` apart are one film (Split.duplicate_bits). LeakError
    if one is of a held-out patient.
    """
    same, leaks = _same_film(given, real, held_out_patients, bits)
    if leaks.any():
        first, whose = (int(numbers[0]) for numbers in leaks.nonzero())
        raise LeakError(
            f"class image {given.key.iloc[first]} (and {leaks.any(1).sum() - 1} more) is an image of held-out patient {real.patient.iloc[whose]}: "
            "DreamBooth would train on it. Take it out of the concept's class_data_dir and start a new run"
        )
    return real.loc[same.any(0), ["key", "patient"]]


def _same_film(given: pd.DataFrame, real: pd.DataFrame, held_out_patients: frozenset[str], bits: int):
    """Which of N `given` images is, or looks like, which of M `real` ones, bool [N, M]; and the same of those that are held out."""
    same = distances(given.phash.tolist(), real.phash.tolist()) <= bits
    same |= given.key.to_numpy()[:, None] == real.key.to_numpy()
    return same, same & real.patient.isin(held_out_patients).to_numpy()


def with_patients(real: pd.DataFrame, splits: pd.DataFrame) -> pd.DataFrame:
    """The images that are in the splits, `patient` as these know it. A copy that the split dropped is in none, and the image it is a copy of is."""
    return real.drop(columns="patient").merge(splits[["key", "patient"]], on="key")


def declared(
    about: tuple[str, str], named: dict[str, str | None], images: pd.DataFrame, real: pd.DataFrame, held_out_patients: frozenset[str], bits: int
) -> dict[str, list[str]]:
    """`seen` of a generator outside of the run that says it was trained on the images `named`, {origin: patient}, and on what looks like them.

    `about`: (generator, scope), `images`: of the data, with origin, `real`: with_patients of them. LeakError if one is of a held-out patient.
    """
    (name, scope), listed = about, images[images.origin.isin(named)]
    same, leaks = _same_film(listed, real, held_out_patients, bits)
    leaked = [f"{row.origin} (key {row.key}, patient {real.patient.iloc[leak.argmax()]})" for row, leak in zip(listed.itertuples(), leaks) if leak.any()]
    unused = {origin: patient for origin, patient in named.items() if patient and origin not in set(images.origin)}
    leaked += [f"{origin} (patient {patient})" for origin, patient in unused.items() if patient in held_out_patients]
    if leaked:
        raise LeakError(
            f"generators: {name} was trained on {len(leaked)} images of patients whom {scope} holds out: {', '.join(leaked[:5])}{', …' * (len(leaked) > 5)}. "
            f"Teach it anew on what vhs export RUN --what real --scope {scope} calls train, or leave the arm {name} out"
        )
    record = seen(real[same.any(0)])
    return record | {"patients_seen": sorted({*record["patients_seen"], *unused.values()})}


def refuse_films(about: tuple[str, str], drawn: pd.DataFrame, real: pd.DataFrame, held_out_patients: frozenset[str], bits: int):
    """LeakError if among `drawn` (key of the file's bytes, phash, origin), what a generator outside of the run is said to have drawn, is a film of a held-out
    patient: then its set holds real images, or it was trained on more than it says. `about`: (generator, scope)."""
    (name, scope), (_, leaks) = about, _same_film(drawn, real, held_out_patients, bits)
    if leaks.any():
        first, whose = (int(numbers[0]) for numbers in leaks.nonzero())
        raise LeakError(
            f"generators: {drawn.origin.iloc[first]} (and {leaks.any(1).sum() - 1} more) of {name} is, or looks like, image {real.key.iloc[whose]} of patient "
            f"{real.patient.iloc[whose]}, whom {scope} holds out. Take real images out of the set; if there are none, it was taught more than trained_on says: "
            f"teach it anew, or leave the arm {name} out"
        )


def seen(rows: pd.DataFrame, *before: dict[str, list[str]]) -> dict[str, list[str]]:
    """What a model trained on `rows` records: those, and what the models that it began with or learnt from had seen `before` (models.seen)."""
    return {
        "keys_seen": sorted({*rows.key}.union(*(record.get("keys_seen", ()) for record in before))),
        "patients_seen": sorted({*rows.patient}.union(*(record["patients_seen"] for record in before))),
    }


def leaked(record: dict, scope) -> str:
    """What a model with this `record` saw of what `scope` holds out, by name, or "".

    By keys too: a patient's name in an earlier run may have been another one (a column that was added since, a group's first image), an image's key is
    that of its bytes. A record without keys is taken by its patients alone. `scope`: held_out_patients and held_out_keys.
    """
    saw = {
        "patient": scope.held_out_patients.intersection(record["patients_seen"]),
        "image": scope.held_out_keys.intersection(record.get("keys_seen", ())),
    }
    return " and ".join(f"held-out {what} {', '.join(sorted(names)[:3])} (and {max(0, len(names) - 3)} more)" for what, names in saw.items() if names)


def guard(generated: pd.DataFrame, records: dict[str, dict], scope) -> None:
    """LeakError unless every row of `generated` (key, generator, labeller: marker paths) has a lineage free of what `scope` holds out.

    `records`: marker path -> facts with `patients_seen`.
    """
    for role in ("generator", "labeller"):
        for maker, keys in generated.groupby(role, dropna=False).key:
            facts = records.get(maker, {}) if isinstance(maker, str) else {}
            if "patients_seen" not in facts:
                raise LeakError(
                    f"generated image {keys.iloc[0]} (and {len(keys) - 1} more) has no lineage: nothing is recorded of its {role} {maker!r}. "
                    f"Only images whose {role} declares the patients it was trained on can be used beside held-out images"
                )
            if what := leaked(facts, scope):
                raise LeakError(
                    f"generated image {keys.iloc[0]} (and {len(keys) - 1} more) leaks: its {role} {maker} was trained on {what}. "
                    f"Generate and label again with a {role} of this scope"
                )


def guard_labeller(labeller: Marker, scope) -> None:
    """LeakError if the labeller that is judged on the held-out images was trained on one of them or of their patients, here or in a run before."""
    if what := leaked(labeller.facts, scope):
        raise LeakError(
            f"the arm measure leaks: its labeller {labeller.path} was trained on {what}. "
            "Take a labeller.init that has not seen this scope's held-out patients"
        )


def guard_weights(weights: str, record: dict[str, list[str]], scope) -> None:
    """LeakError if the classifier that training begins with (classifier.weights, its `record` by models.seen) saw what `scope` holds out."""
    if what := leaked(record, scope):
        raise LeakError(
            f"classifier.weights = {weights!r} leaks: they were trained on {what}. Take weights that have not seen this scope's held-out patients"
        )
