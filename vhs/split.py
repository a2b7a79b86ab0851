"""Who trains and who is held out, drawn once.

Every image belongs to a patient (a dog, a person), and a patient never straddles a split. Where nobody said whose an image is, images
that look the same (vhs/duplicates.py) are taken for one patient's, called `group-<first key>`. Images that look the same stay together in
a drawn split whoever they are said to be of; where the data come with a split that tears them apart, the copy in training goes
(`drop_copies`). Shares are kept within strata of class x source, so that no part of the data is easier or comes from another scanner than the rest. A patient
counts wholly towards its most frequent stratum.

A scope is one train-and-judge experiment: "split" trains on everything that is not test and is judged on test; "fold-k" trains on
everything that is neither test nor in fold k and is judged on fold k. Within each scope a share of the training patients is the inner
validation: it serves learning-rate schedulers and verdict thresholds, is never trained on and gives no reported figure.

An image of a given test part may have no label (UNKNOWN): it is predicted, and figures come from those that have one.

The table of splits has one row an image, ordered by key: key, patient, source, label, part ("train" | "test"), fold (-1: in no fold) and
one boolean column `inner_<scope>` for each scope; with split.training_fraction also `unused`: those that teach nobody, and are held out as ever.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from vhs.duplicates import alike, clusters, distances
from vhs.measure import CLASSES, UNKNOWN
from vhs.settings import Split

COLUMNS = ("key", "patient", "source", "label")
GIVEN = ("train", "valid", "test")


def make_split(table: pd.DataFrame, settings: Split) -> pd.DataFrame:
    """Splits of the images in `table`: key, patient (or missing), source, label (position in CLASSES), optionally split and phash.

    The result depends on the rows' content and the seed, not on their order. With one image a patient, a stratum's count in every part is
    its share rounded up or down, so two folds differ by at most one. A given `split` (train | valid | test) is kept: its test images
    are the test part, its valid images the inner validation of scope "split". Where a source names no patients, groups of near-duplicates
    stand for them: see `patients_known`.
    Raises ValueError for duplicate keys, partly named patients, patients that a given split tears apart, and classes too small to be shared
    out.
    """
    images = _grouped(_checked(table, settings), settings)
    patients = _patients(images)
    if settings.test_sources:
        images["part"] = _part_of_sources(images, settings.test_sources)
    else:
        images["part"] = _given_part(images) if "split" in images else _draw_part(images, patients, settings)
    images["fold"] = -1
    if settings.folds:
        pool = _of(patients, images[images.part == "train"])
        _enough(pool, settings.folds, f"{settings.folds} folds")
        shares = np.full(settings.folds, 1 / settings.folds)
        fold = pd.Series(_deal(pool, shares, np.random.default_rng((settings.seed, 1))), pool.index)
        images["fold"] = images.group.map(fold).fillna(-1).astype(np.int64)
    if settings.training_fraction < 1:
        pool = _of(patients, images[images.part == "train"])
        taught = _some(pool, settings.training_fraction, np.random.default_rng((settings.seed, 3)))
        images["unused"] = (images.part == "train") & ~images.group.isin(taught)
    for number, scope in enumerate(scopes(settings)):
        rng = np.random.default_rng((settings.seed, 2, number))
        images[f"inner_{scope}"] = _draw_inner(images, patients, scope, rng, settings.inner_fraction)
        _every_class(images, scope)
    return images.drop(columns=["split", "phash", "group"], errors="ignore")


def check(table: pd.DataFrame, settings: Split) -> None:
    """ValueError where no split of the images in `table` (as make_split's) can be made, told before any is looked at.

    Images that turn out to be damaged, or copies, leave fewer patients still: whom `make_split` takes, this takes too.
    """
    images = _grouped(_checked(table, settings), settings)
    owners = images.drop_duplicates(["group", "label"])  # a patient is counted in one class: no class has more
    if settings.test_sources:
        owners = owners[_part_of_sources(images, settings.test_sources)[owners.index] == "train"]
    elif "split" in images:
        owners = images[images["split"] != "test"].drop_duplicates(["group", "label"])
    else:
        _enough(owners, 2, "a training and a test part")
        if images.group.is_unique:  # a test part takes its share of every stratum, rounded up or down
            stratum = owners.groupby(["label", "source"]).key
            owners = owners[stratum.cumcount() >= np.floor(settings.test_fraction * stratum.transform("size") + 1e-9)]  # as _deal rounds
    if settings.folds:
        _enough(owners, settings.folds, f"{settings.folds} folds")


def drop_copies(table: pd.DataFrame, settings: Split) -> tuple[pd.DataFrame, list[dict[str, str]]]:
    """`table` without the images that a given split shows twice, and what was dropped: [{file, reason}].

    Of images that look the same only those in one part stay: test before valid before train. With a film that goes, its named patient's other films in that
    part go: that patient may be the other one under a second name.
    """
    if "split" not in table or table["split"].isna().all() or "phash" not in table:
        return table, []
    images = table.sort_values("key", ignore_index=True)
    cluster = clusters(alike(images.phash.tolist(), settings.duplicate_bits))
    rank = images["split"].map({name: number for number, name in enumerate(reversed(GIVEN))}).fillna(len(GIVEN)).to_numpy()
    best = pd.Series(rank).groupby(cluster).transform("min").to_numpy()
    rejects = []
    for i in np.flatnonzero(rank > best):
        kept = np.flatnonzero((cluster == cluster[i]) & (rank == best[i]))
        apart = distances([images.phash[i]], images.phash[kept].tolist())[0]
        what = f"near-duplicate of {_name(images, kept[apart.argmin()])} ({apart.min()} of 256 bits differ)"
        rejects.append({"file": _name(images, i), "reason": f"{what}, so the {images['split'][i]} copy is dropped"})
    gone = pd.Series(rank > best)
    person = images.patient.where(images.patient.notna(), images.key) + "\0" + images["split"].astype(str)
    others = person.isin(person[gone]) & ~gone
    for i in np.flatnonzero(others):
        what = f"of patient {images.patient[i]}, another of whose {images['split'][i]} films is a near-duplicate of one in another part"
        rejects.append({"file": _name(images, i), "reason": f"{what}: they may be one patient under two names"})
    return images[~gone & ~others].reset_index(drop=True), rejects


def _name(images: pd.DataFrame, i: int) -> str:
    origin = images.origin[i] if "origin" in images else images.key[i]
    return origin if "/" in origin else f"{images['split'][i]}/{origin}"


def scopes(settings: Split) -> list[str]:
    """["split", "fold-0", "fold-1", ...]: every experiment these settings ask for."""
    return ["split", *(f"fold-{k}" for k in range(settings.folds))]


def held_out(splits: pd.DataFrame, scope: str) -> list[str]:
    """Keys the scope is judged on: the test part, or fold k."""
    return splits.key[_held_out(splits, scope)].tolist()


def training(splits: pd.DataFrame, scope: str) -> list[str]:
    """Keys the scope fits on: neither test, nor held out, nor inner validation."""
    return splits.key[_pool(splits, scope) & ~splits[f"inner_{scope}"]].tolist()


def inner(splits: pd.DataFrame, scope: str) -> list[str]:
    """Keys of the scope's inner validation, a part of its training patients."""
    return splits.key[_pool(splits, scope) & splits[f"inner_{scope}"]].tolist()


def patients_known(splits: pd.DataFrame) -> bool:
    """Whether every image names its patient. If not, the independence of parts is the data's word, and a report has to say so."""
    return not splits.patient.isin("group-" + splits.key).any()


def counts(splits: pd.DataFrame, scope: str) -> pd.DataFrame:
    """Images of each source and class by what the scope does with them: source, class, training, inner, held_out."""
    roles = {"training": training(splits, scope), "inner": inner(splits, scope), "held_out": held_out(splits, scope)}
    role = splits.key.map({key: name for name, keys in roles.items() for key in keys}).rename("role")
    table = splits.assign(role=role).pivot_table(index=["source", "label"], columns="role", values="key", aggfunc="count", fill_value=0)
    table = table.reindex(columns=list(roles), fill_value=0).reset_index().rename(columns={"label": "class"}).rename_axis(columns=None)
    return table.assign(**{"class": table["class"].map(lambda label: "unknown" if label == UNKNOWN else CLASSES[label])})


def _held_out(splits: pd.DataFrame, scope: str) -> pd.Series:
    mask = splits.part == "test" if scope == "split" else "fold-" + splits.fold.astype(str) == scope
    if not mask.any():
        known = ", ".join(["split", *(f"fold-{k}" for k in range(splits.fold.max() + 1))])
        raise ValueError(f"these splits hold nothing out for scope {scope!r}; theirs are {known}")
    return mask


def _pool(splits: pd.DataFrame, scope: str) -> pd.Series:
    pool = (splits.part == "train") & ~_held_out(splits, scope)
    return pool & ~splits.unused if "unused" in splits else pool


def _checked(table: pd.DataFrame, settings: Split) -> pd.DataFrame:
    if missing := [name for name in COLUMNS if name not in table]:
        raise ValueError(f"a table to split needs the columns {', '.join(COLUMNS)}; {', '.join(missing)} is missing")
    if settings.folds == 1:
        raise ValueError("split.folds is 1, which would hold nothing out: give 0 (test split only) or 2 and more")
    given = ["split"] if "split" in table and table["split"].notna().any() else []
    hashed = ["phash"] if "phash" in table else []
    images = table[[*COLUMNS, *given, *hashed]].sort_values("key", ignore_index=True)
    if (repeated := images.key[images.key.duplicated()].unique()).size:
        raise ValueError(f"{repeated.size} keys occur more than once, {repeated[0]} first: one row an image, remove the copies")
    if (nowhere := images.key[images.source.isna()]).size:
        raise ValueError(f"{nowhere.size} images have no source, {nowhere.iloc[0]} first: name one, the same for all will do")
    unlabelled_test = (images.label == UNKNOWN) & (images["split"] == "test" if given else False)
    if (wrong := images[~images.label.isin(range(len(CLASSES))) & ~unlabelled_test]).size:
        legal = f"0, 1 or 2 for {', '.join(CLASSES)}, or {UNKNOWN} in a given test part"
        raise ValueError(f"image {wrong.key.iloc[0]} has the label {wrong.label.iloc[0]!r}; a label is {legal}")
    images["label"] = images.label.astype(np.int64)
    named = images.patient.notna()
    for source, of_source in named.groupby(images.source):
        if 0 < of_source.sum() < of_source.size:
            raise ValueError(
                f"source {source!r} names the patient of {of_source.sum()} of its {of_source.size} images (not of "
                f"{images.key[of_source.idxmin()]}): name every patient, or none of the source's and each image counts as its own"
            )
    return images


def _grouped(images: pd.DataFrame, settings: Split) -> pd.DataFrame:
    """`images` with a patient for everyone, and `group`: what must stay together, patients and near-duplicates of any patient."""
    from scipy.sparse import csr_array, eye_array

    n = len(images)
    near = alike(images.phash.tolist(), settings.duplicate_bits) if "phash" in images else eye_array(n, dtype=bool, format="csr")
    named, cluster = images.patient.notna(), clusters(near)
    owner = images.patient.groupby(cluster).transform("first")  # an image without a name may be a copy of one that has a name
    nameless = "group-" + images.key.groupby(cluster).transform("first")
    patient = images.patient.where(named, owner).where(named | owner.notna(), nameless).astype(str)
    first = pd.Series(np.arange(n)).groupby(pd.factorize(patient)[0]).transform("first")  # an image and the first of its patient
    together = clusters(near + csr_array((np.ones(n, bool), (np.arange(n), first)), shape=(n, n)))
    return images.assign(patient=patient, group=patient.groupby(together).transform("min"))


def _patients(images: pd.DataFrame) -> pd.DataFrame:
    """One row a group (a patient, as a rule): size in images, label and stratum of its most frequent class x source (a draw: the first)."""
    sizes = images.groupby(["group", "source", "label"]).size().rename("images").reset_index()
    first = sizes.sort_values(["group", "images"], ascending=[True, False], kind="stable").drop_duplicates("group").set_index("group")
    stratum = first.label.astype(str) + " " + first.source.astype(str)
    return pd.DataFrame({"size": images.groupby("group").size(), "label": first.label, "stratum": stratum})


def _of(patients: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    return patients.loc[patients.index.isin(images.group)]


def _deal(patients: pd.DataFrame, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Part number of each patient, so that part p gets shares[p] of every stratum.

    Large patients go first. A patient goes to a part whose share of the stratum it fits into, else to one whose share is not yet full,
    else to any; among equals, where its class and then the whole is filled least (Sainte-Laguë's divisors), which keeps many small
    strata from all falling to one part.
    """
    size, n = patients["size"].to_numpy(), len(patients)
    order = rng.permutation(n)
    order = order[np.argsort(-size[order], kind="stable")]
    stratum, label = pd.factorize(patients.stratum)[0], pd.factorize(patients.label)[0]
    target, class_target = (np.outer(np.bincount(codes, weights=size), shares) for codes in (stratum, label))
    count, class_count, total = np.zeros_like(target), np.zeros_like(class_target), np.zeros_like(shares)
    parts = np.zeros(n, dtype=np.int64)
    for i in order:
        s, c, half = stratum[i], label[i], size[i] / 2
        level = np.where(count[s] + size[i] <= target[s] + 1e-9, 0, np.where(count[s] < target[s] - 1e-9, 1, 2))
        class_fill = ((class_count[c] + half) / class_target[c]).round(9)
        parts[i] = part = np.lexsort(((total + half) / shares, class_fill, level))[0]
        count[s, part] += size[i]
        class_count[c, part] += size[i]
        total[part] += size[i]
    return parts


def _some(patients: pd.DataFrame, fraction: float, rng: np.random.Generator) -> pd.Index:
    """That fraction of every stratum, rounded up; a larger fraction's hold a smaller one's."""
    shuffled = patients.iloc[rng.permutation(len(patients))].groupby("stratum", sort=False)
    rank, size = shuffled.cumcount(), shuffled["size"].transform("count")
    return rank.index[rank < np.ceil(fraction * size - 1e-9)]


def _part_of_sources(images: pd.DataFrame, sources: tuple[str, ...]) -> pd.Series:
    there = sorted(images.source.unique())
    if unknown := sorted(set(sources) - set(there)):
        raise ValueError(f"split.test_sources names {', '.join(unknown)}; the data's sources are {', '.join(there)}")
    if set(there) <= set(sources):
        raise ValueError(f"split.test_sources names all of {', '.join(there)}: leave at least one to train on")
    part = images.source.isin(sources).map({True: "test", False: "train"})
    torn = part.groupby(images.group).nunique().loc[lambda parts: parts > 1]
    if torn.size:
        what = f"{torn.size} patients have images, or near-duplicates, in sources on both sides, {torn.index[0]!r} first"
        raise ValueError(f"{what}: take them out, or let the test part be drawn (test_sources=[])")
    return part


def _draw_part(images: pd.DataFrame, patients: pd.DataFrame, settings: Split) -> pd.Series:
    _enough(patients, 2, "a training and a test part")
    parts = _deal(patients, np.array([settings.test_fraction, 1 - settings.test_fraction]), np.random.default_rng((settings.seed, 0)))
    return images.group.map(pd.Series(np.where(parts == 0, "test", "train"), patients.index))


def _given_part(images: pd.DataFrame) -> pd.Series:
    if (wrong := images[~images["split"].isin(GIVEN)]).size:
        what = f"image {wrong.key.iloc[0]} has the split {wrong['split'].iloc[0]!r}"
        raise ValueError(f"{what}; a given split says {', '.join(GIVEN)} for every image, or is left out to have one drawn")
    if not (images["split"] == "test").any():
        what = "the given split names no test image, so nothing would be reported"
        raise ValueError(f"{what}: mark some (folder or column), or leave it out to have one drawn")
    torn = images.groupby("patient")["split"].nunique().loc[lambda parts: parts > 1]
    if torn.size:
        what = f"the given split tears {torn.size} patients apart, {torn.index[0]!r} first"
        raise ValueError(f"{what}: give each patient one split, or leave it out to have one drawn")
    return images["split"].replace("valid", "train")


def _draw_inner(images: pd.DataFrame, patients: pd.DataFrame, scope: str, rng: np.random.Generator, fraction: float) -> pd.Series:
    if scope == "split" and "split" in images and (images["split"] == "valid").any():
        return images["split"] == "valid"
    pool = _of(patients, images[_pool(images, scope)])
    chosen = pool.index[_deal(pool, np.array([fraction, 1 - fraction]), rng) == 0]
    if not chosen.size:
        what = f"scope {scope} has {len(pool)} training patients, too few for an inner validation of {fraction:g}"
        raise ValueError(f"{what}: raise split.inner_fraction or add patients")
    return images.group.isin(chosen)


def _enough(patients: pd.DataFrame, parts: int, what: str) -> None:
    for label, name in enumerate(CLASSES):
        if (found := int((patients.label == label).sum())) < parts:
            need = f"it needs at least {parts}: add images of {name} hearts or lower split.folds"
            raise ValueError(f"class {name} has {found} patients to share among {what}, {need}")


def _every_class(images: pd.DataFrame, scope: str) -> None:
    test = images.label[images.key.isin(held_out(images, scope))]
    if scope == "split" and (test == UNKNOWN).all() and not (images.fold >= 0).any():
        raise ValueError("no test image has a label and split.folds is 0: set split.folds=5 and report from these, or add the labels")
    for what, keys in (("held out", held_out(images, scope)), ("training", training(images, scope))):
        present = images.label[images.key.isin(keys)].unique()
        if set(present) == {UNKNOWN}:
            continue
        if absent := [name for label, name in enumerate(CLASSES) if label not in present]:
            raise ValueError(
                f"scope {scope} has no {what} image of class {', '.join(absent)}: give more patients of that class, "
                "a larger split.test_fraction, fewer folds, or a `split` column of your own"
            )
