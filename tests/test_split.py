from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from vhs.measure import CLASSES
from vhs.settings import Split
from vhs.split import check, counts, drop_copies, held_out, inner, make_split, patients_known, scopes, training


def table(n: int, seed: int = 0, images_per_patient: int = 1, sources: int = 2, patients: bool = True) -> pd.DataFrame:
    """n images, at least 12 patients a class."""
    rng = np.random.default_rng(seed)
    owner = np.arange(n) // images_per_patient
    label = np.where(owner < 36, owner % 3, rng.choice(3, size=owner.max() + 1, p=(0.15, 0.41, 0.44))[owner])
    return pd.DataFrame({
        "key": [f"{i:016x}" for i in rng.permutation(n)], "patient": [f"dog {p}" for p in owner] if patients else None,
        "source": [f"clinic {s}" for s in rng.integers(0, sources, size=owner.max() + 1)[owner]], "label": label,
    })


tables = st.builds(table, st.integers(120, 260), st.integers(0, 10**6), images_per_patient=st.integers(1, 3), sources=st.integers(1, 4))
few = hypothesis_settings(max_examples=25, deadline=None)


@few
@given(tables, st.sampled_from([0, 2, 3, 5]), st.integers(0, 99))
def test_every_key_once_and_no_patient_straddles(images, folds, seed):
    chosen = Split(seed=seed, folds=folds)
    splits = make_split(images, chosen)
    assert sorted(splits.key) == sorted(images.key) and splits.key.is_unique
    patient = splits.set_index("key").patient
    for scope in scopes(chosen):
        roles = [set(part(splits, scope)) for part in (training, inner, held_out)]
        assert all(roles) and sum(map(len, roles)) == len(set.union(*roles))
        owners = [set(patient[list(keys)]) for keys in roles]
        assert sum(map(len, owners)) == len(set.union(*owners))
        outside = set(images.key) - set.union(*roles)
        assert outside == (set() if scope == "split" else set(held_out(splits, "split")))
    if folds:
        tested = sorted(key for k in range(folds) for key in held_out(splits, f"fold-{k}"))
        assert tested == sorted(set(images.key) - set(held_out(splits, "split")))


@few
@given(st.integers(120, 300), st.integers(0, 10**6), st.sampled_from([2, 3, 5]))
def test_one_image_a_patient_keeps_every_stratum_within_one(n, seed, folds):
    splits = make_split(table(n, seed, sources=3), Split(seed=seed, folds=folds))
    stratum = [splits.label, splits.source]
    assert ((splits.part == "test").groupby(stratum).sum() - 0.25 * splits.groupby(["label", "source"]).size()).abs().max() < 1
    train = splits[splits.part == "train"]
    by_fold = train.pivot_table(index=["label", "source"], columns="fold", values="key", aggfunc="count", fill_value=0)
    assert (by_fold.max(axis=1) - by_fold.min(axis=1)).max() <= 1
    by_class = train.pivot_table(index="label", columns="fold", values="key", aggfunc="count", fill_value=0)
    assert (by_class.max(axis=1) - by_class.min(axis=1)).max() <= 3  # three sources, each off by at most one


def test_a_source_a_patient_does_not_empty_the_test_part():
    images = table(120).assign(source=[f"clinic {i}" for i in range(120)])  # every stratum holds one image
    test = make_split(images, Split()).query("part == 'test'")
    want = 0.25 * images.label.value_counts().sort_index()
    assert (test.label.value_counts().sort_index() - want).abs().max() <= 1


@few
@given(tables, st.integers(0, 10**6))
def test_row_order_does_not_matter_and_the_seed_does(images, seed):
    chosen = Split(folds=3)
    splits = make_split(images, chosen)
    pd.testing.assert_frame_equal(splits, make_split(images.sample(frac=1, random_state=seed), chosen))
    assert not splits.equals(make_split(images, Split(folds=3, seed=chosen.seed + 1)))


def test_inner_share_is_of_the_training_patients():
    splits = make_split(table(400, images_per_patient=2), Split(folds=4, inner_fraction=0.2))
    for scope in scopes(Split(folds=4)):
        owner = splits.set_index("key").patient
        chosen, rest = owner[inner(splits, scope)].nunique(), owner[training(splits, scope)].nunique()
        assert chosen / (chosen + rest) == pytest.approx(0.2, abs=0.03)


def test_a_patient_of_several_classes_stays_whole():
    label = [(0, 0, 1, 2)[i % 4] if i < 40 else (i // 4) % 3 for i in range(120)]
    images = table(120).assign(patient=[f"dog {i // 4}" for i in range(120)], label=label)
    splits = make_split(images, Split())
    assert splits.groupby("patient").part.nunique().max() == 1


def test_a_given_split_is_kept():
    images = table(150).assign(split=["train"] * 90 + ["valid"] * 30 + ["test"] * 30)
    splits = make_split(images, Split(folds=2))
    for name, keys in (("train", training(splits, "split")), ("valid", inner(splits, "split")), ("test", held_out(splits, "split"))):
        assert sorted(keys) == sorted(images.key[images.split == name])
    assert set(held_out(splits, "fold-0")) | set(held_out(splits, "fold-1")) == set(images.key[images.split != "test"])
    assert "split" not in splits


def test_unknown_patients_are_their_own():
    splits = make_split(table(120, patients=False), Split())
    assert splits.patient.equals("group-" + splits.key) and not patients_known(splits)
    assert patients_known(make_split(table(120), Split()))
    nameless = table(60, 1, patients=False).assign(source="nameless", key=[f"n{i}" for i in range(60)])
    mixed = pd.concat([table(120).assign(source="named"), nameless])
    assert not patients_known(make_split(mixed, Split()))


def hashes(n: int, seed: int = 0) -> list[str]:
    """Perceptual hashes about 128 bits apart, as those of different images are."""
    return [row.tobytes().hex() for row in np.random.default_rng(seed).integers(0, 256, (n, 32), dtype=np.uint8)]


def near(text: str, bits: int = 3) -> str:
    return f"{int(text, 16) ^ ((1 << bits) - 1):064x}"


def test_images_that_look_the_same_are_one_patients_where_nobody_named_it():
    images = table(120, patients=False).assign(phash=hashes(120)).sort_values("key", ignore_index=True)
    for i in range(0, 60, 2):
        images.loc[i + 1, ["phash", "label"]] = near(images.phash[i]), images.label[i]
    splits = make_split(images, Split(folds=3))
    pairs = splits.iloc[:60].reset_index(drop=True)
    assert splits.patient.nunique() == 90 and not patients_known(splits)
    assert pairs.patient.tolist() == [f"group-{images.key[i - i % 2]}" for i in range(60)]
    for place in ("part", "fold", "inner_split", "inner_fold-1"):
        assert pairs.groupby("patient")[place].nunique().max() == 1
    alone = make_split(images, Split(folds=3, duplicate_bits=2))
    assert alone.patient.nunique() == 120


def test_named_patients_keep_their_names_and_their_copies_stay_together():
    images = table(120).assign(phash=hashes(120)).sort_values("key", ignore_index=True)
    for i in range(0, 60, 2):
        images.loc[i + 1, ["phash", "label"]] = near(images.phash[i]), images.label[i]
    splits = make_split(images, Split(folds=3))
    assert patients_known(splits) and splits.set_index("key").patient.equals(images.set_index("key").patient.astype(splits.patient.dtype))
    pairs = splits.iloc[:60].assign(pair=np.arange(60) // 2)
    assert pairs.groupby("pair")[["part", "fold", "inner_split"]].nunique().max().max() == 1


@pytest.mark.parametrize("patients", [True, False])
def test_the_copy_in_training_goes_and_is_listed(patients):
    parts = ["train"] * 90 + ["valid"] * 30 + ["test"] * 30
    images = table(150, patients=patients).sort_values("key", ignore_index=True).assign(split=parts, phash=hashes(150))
    images["origin"] = [f"{i}.png" for i in range(150)]
    for copy, original in ((0, 120), (1, 90), (91, 121), (2, 120), (3, 4)):  # train-test, train-valid, valid-test, train-test, within train
        images.loc[copy, "phash"] = near(images.phash[original])
    kept, rejects = drop_copies(images, Split())
    assert sorted(set(images.key) - set(kept.key)) == sorted(images.key[[0, 1, 91, 2]])
    said = {reject["file"]: reject["reason"] for reject in rejects}
    assert said["train/0.png"] == "near-duplicate of test/120.png (3 of 256 bits differ), so the train copy is dropped"
    assert set(said) == {"train/0.png", "train/1.png", "valid/91.png", "train/2.png"} and "valid/90.png" in said["train/1.png"]
    splits = make_split(kept, Split())
    assert not set(images.key[[0, 1, 91, 2]]) & set(splits.key) and len(held_out(splits, "split")) == 30


@pytest.mark.parametrize("named", [True, False])
def test_with_a_copy_its_patients_other_films_go(named):
    """A dog that is one patient in the training part and another in the test part: a drawn split keeps both together, a given one cannot."""
    images = table(150, images_per_patient=3).sort_values("patient", ignore_index=True).assign(phash=hashes(150))
    images["split"] = np.where(np.arange(150) < 105, "train", "test")
    images["origin"] = [f"{i}.png" for i in range(150)]
    images.loc[0, "phash"] = near(images.phash[149])
    kept, rejects = drop_copies(images if named else images.assign(patient=None), Split())
    assert sorted(set(images.key) - set(kept.key)) == sorted(images.key[:3] if named else images.key[:1])
    if named:
        assert [reject["file"] for reject in rejects] == ["train/0.png", "train/1.png", "train/2.png"] and images.patient[0] in rejects[1]["reason"]


def test_a_clean_split_drops_nothing_and_a_drawn_one_neither():
    images = table(150).assign(phash=hashes(150)).sort_values("key", ignore_index=True)
    for clean in (images.assign(split=["train"] * 100 + ["test"] * 50), images.assign(phash=near(images.phash[0]))):
        kept, rejects = drop_copies(clean, Split())
        assert rejects == [] and kept.equals(clean)


def test_a_test_part_without_labels_is_legal_with_folds_and_refused_without():
    images = table(150).assign(split=["train"] * 110 + ["test"] * 40)
    blind = images.assign(label=images.label.where(images.split == "train", -1))
    splits = make_split(blind, Split(folds=3))
    assert (splits.label[splits.part == "test"] == -1).all() and (splits.label[splits.part == "train"] >= 0).all()
    tally = counts(splits, "split")
    assert tally.held_out[tally["class"] == "unknown"].sum() == 40 and tally.held_out[tally["class"] != "unknown"].sum() == 0
    with pytest.raises(ValueError, match="no test image has a label and split.folds is 0"):
        make_split(blind, Split())
    half = images.assign(label=images.label.where((images.split == "train") | (images.index % 3 > 0), -1))
    assert len(held_out(make_split(half, Split()), "split")) == 40
    with pytest.raises(ValueError, match="or -1 in a given test part"):
        make_split(images.assign(label=-1), Split(folds=3))


def test_counts_add_up():
    images = table(200)
    splits = make_split(images, Split())
    tally = counts(splits, "split")
    assert list(tally.columns) == ["source", "class", "training", "inner", "held_out"] and set(tally["class"]) == set(CLASSES)
    assert tally[["training", "inner", "held_out"]].to_numpy().sum() == 200 and tally.held_out.sum() == len(held_out(splits, "split"))


def test_survives_parquet(tmp_path):
    splits = make_split(table(120), Split(folds=2))
    splits.to_parquet(tmp_path / "splits.parquet")
    assert held_out(pd.read_parquet(tmp_path / "splits.parquet"), "fold-1") == held_out(splits, "fold-1")


def torn(images):
    return images.assign(patient=["dog 1"] * 2 + list(images.patient[2:]), split=["train", "test"] + ["train"] * (len(images) - 2))


@pytest.mark.parametrize(("change", "chosen", "message"), [
    (lambda t: t.drop(columns="source"), {}, "source is missing"),
    (lambda t: pd.concat([t, t[:1]]), {}, "1 keys occur more than once"),
    (lambda t: t.assign(label=[3, *t.label[1:]]), {}, "a label is 0, 1 or 2 for small, normal, large"),
    (lambda t: t.assign(source=[None, *t.source[1:]]), {}, "1 images have no source"),
    (lambda t: t.assign(patient=[None, *t.patient[1:]], source="here"), {}, "names the patient of 119 of its 120 images"),
    (torn, {}, "tears 1 patients apart, 'dog 1' first"),
    (lambda t: t.assign(split="training"), {}, "has the split 'training'; a given split says train, valid, test"),
    (lambda t: t.assign(split="train"), {}, "names no test image"),
    (lambda t: t.assign(split=["test" if label == 1 else "train" for label in t.label]), {}, "no held out image of class small, large"),
    (lambda t: t[(t.label > 0) | ((t.label == 0).cumsum() < 2)], {}, "class small has 1 patients to share among a training and a"),
    (lambda t: t[(t.label > 0) | ((t.label == 0).cumsum() < 6)], {"folds": 5}, "class small has [34] patients to share among 5 folds"),
    (lambda t: t, {"folds": 1}, "split.folds is 1"),
    (lambda t: t.groupby("label").head(3), {}, "too few for an inner validation of 0.1"),
])
def test_errors_say_what_and_what_to_do(change, chosen, message):
    with pytest.raises(ValueError, match=message):
        make_split(change(table(120)), Split(**chosen))


def test_an_unknown_scope_is_named():
    with pytest.raises(ValueError, match="scope 'fold-7'; theirs are split, fold-0, fold-1"):
        training(make_split(table(120), Split(folds=2)), "fold-7")


@hypothesis_settings(max_examples=10, deadline=None)
@given(tables, st.sampled_from([0, 3]), st.integers(0, 99), st.floats(0.3, 0.6), st.floats(0.6, 1))
def test_fewer_training_patients_are_among_more_and_all_are_still_judged(images, folds, seed, less, more):
    try:
        whole, *thinned = (make_split(images, Split(seed=seed, folds=folds, training_fraction=fraction)) for fraction in (1.0, more, less))
    except ValueError as error:  # too few to teach every scope every class, and said
        assert any(said in str(error) for said in ("has no training image of class", "too few for an inner validation")), error
        assume(False)
    for scope in scopes(Split(folds=folds)):
        taught = [set(training(splits, scope)) | set(inner(splits, scope)) for splits in (whole, *thinned)]
        assert taught[2] <= taught[1] <= taught[0] and all(held_out(splits, scope) == held_out(whole, scope) for splits in thinned)
        assert {CLASSES[n] for n in thinned[1].label[thinned[1].key.isin(taught[2])]} == set(CLASSES)
    pool, unused = thinned[1][thinned[1].part == "train"], thinned[1].unused
    assert not unused[thinned[1].part == "test"].any()
    patients = pool.groupby("patient").unused.agg(["all", "any"])
    assert (patients["all"] == patients["any"]).all(), "a patient is taught with wholly or not at all"
    assert 0 <= (~patients["all"]).mean() - less < 12 / len(patients)  # each stratum is rounded up


def test_learnt_at_one_clinic_judged_at_another():
    images = table(200, sources=3)
    splits = make_split(images, Split(test_sources=("clinic 1",)))
    assert set(splits.source[splits.key.isin(held_out(splits, "split"))]) == {"clinic 1"}
    assert set(splits.source[splits.key.isin(training(splits, "split") + inner(splits, "split"))]) == {"clinic 0", "clinic 2"}
    every = ("clinic 0", "clinic 1", "clinic 2")
    for sources, said in ((("elsewhere",), f"elsewhere; the data's sources are {', '.join(every)}"), (every, "leave at least one")):
        with pytest.raises(ValueError, match=said):
            make_split(images, Split(test_sources=sources))
    straddling = images.assign(patient=["dog"] * 2 + [f"dog {n}" for n in range(198)], source=["clinic 0", "clinic 1"] * 100)
    with pytest.raises(ValueError, match="on both sides, 'dog' first"):
        make_split(straddling, Split(test_sources=("clinic 1",)))


@few
@given(st.integers(12, 80), st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([0, 2, 5, 9]), st.booleans())
def test_who_is_split_was_not_refused_before(n, seed, images_per_patient, folds, given_split):
    """`check` sees no pixels and draws nothing, and is never stricter than the draw, whatever images turn out to be copies."""
    rng = np.random.default_rng(seed)
    images = table(n, seed, images_per_patient, sources=1)
    if given_split:
        images["split"] = np.where(rng.random(n) < 0.3, "test", "train")
        images["patient"] = None
    hashes = [f"{word:064x}" for word in rng.integers(0, 2**62, size=n)]
    copied = rng.integers(0, n, size=n // 8)
    hashed = images.assign(phash=[hashes[k] for k in np.where(np.isin(np.arange(n), copied), 0, np.arange(n))])
    chosen = Split(seed=seed, folds=folds, duplicate_bits=0)
    try:
        make_split(drop_copies(hashed, chosen)[0], chosen)
    except ValueError:
        return
    check(images, chosen)


def test_folds_that_no_draw_can_fill_are_refused_without_a_look():
    images = table(60, patients=False, sources=1).assign(label=[0] * 8 + [1] * 26 + [2] * 26)
    check(images, Split(folds=6))  # a quarter of 8 is 2: 6 are left for the folds
    for many in (check, make_split):
        with pytest.raises(ValueError, match="class small has 6 patients to share among 7 folds"):
            many(images, Split(folds=7))
