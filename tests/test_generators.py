"""Generators outside of the run: sets that others drew come in, are measured, mixed in and compared, and none with a leak behind it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import command, committed, vhs
from test_data import shard

from jobs import generators, lineage, outside, plan
from jobs.attempt import Inputs, attempt
from jobs.batches import load_images
from jobs.config import Config, ConfigError, load
from jobs.plan import PlanError
from shards import manifest
from shards.storage import open_storage
from vhs.measure import CLASSES
from vhs.phantom import draw
from vhs.radiograph import decode_png, encode_png
from vhs.sources import SourceError

QUICK = ("classifier.epochs=1", "labeller.steps=3", "generation.unit_images=8")
FIRST_SEED = 5_000_000  # far from those of the run's own phantoms
DAMAGED = range(8, 16)  # a whole unit
LOST = -9


def dog(seed: int, name: str) -> bytes:
    return encode_png(draw("canine_lateral", "clinic", seed, size_px=128, prior=[float(name == one) for one in CLASSES]).image)


def gan(file: Path, count: int = 54, seed: int = FIRST_SEED) -> dict[str, str]:
    """A shard whose every image is called by the next class -> their real ones, by name. Some are damaged, one comes twice."""
    samples, real = {}, {}
    for number in range(count):
        name = CLASSES[number % 3]
        samples[f"{number:03d}.cls"] = CLASSES[(number + 1) % 3].encode()
        samples[f"{number:03d}.png"] = b"\x89PNG and nothing else %d" % number if number in DAMAGED else dog(seed + number, name)
        real[f"{number:03d}.png"] = name
    samples |= {"900.png": samples["000.png"], "901.txt": b"a caption and no image"}
    shard(file, samples)
    return real


def spoken(out, *overrides: str) -> tuple:
    return ("run", "debug/demo", *QUICK, *overrides, "--out", out)


def of_set(data, trained_on, name: str = "gan", **more) -> tuple[str, str]:
    said = ", ".join(f"{key}: {value}" for key, value in more.items())
    return f"arms=[real-matched,{name}]", f"generators=[{{name: {name}, data: '{data}', trained_on: '{trained_on}'{', ' + said if said else ''}}}]"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """gan.tar, labelled and wrongly so; vae/, five images and not a word; train.txt and test.txt, what the split and fold-0 of a run on phantoms hold."""
    folder, run = tmp_path_factory.mktemp("sets"), tmp_path_factory.mktemp("split") / "run"
    gan(folder / "gan.tar")
    (folder / "vae").mkdir()
    for number in range(5):
        (folder / "vae" / f"{number}.png").write_bytes(dog(FIRST_SEED + 1000 + number, CLASSES[number % 3]))
    opened = plan.start(load("debug/demo", ["arms=[real-matched,null]", *QUICK, "split.folds=2"]), str(run))
    for stage in ("ingest", "split"):
        for unit in opened.units(stage):
            attempt(opened.url, opened.config, unit)
        opened.refresh()
    table = manifest.load(opened.storage, paths=opened.committed("ingest")).to_pandas()[["key", "origin"]]
    splits = manifest.read(opened.storage, opened.committed("split")[0]).to_pandas()[["key", "part", "fold"]].merge(table, on="key")
    inner = splits.key.isin(manifest.read(opened.storage, opened.committed("split")[0]).to_pandas().query("inner_split").key)
    names = {"train": splits[(splits.part == "train") & ~inner], "test": splits[splits.part == "test"]}
    names |= {f"fold-{k}": splits[(splits.part == "train") & (splits.fold != k)] for k in (0, 1)} | {"split": names["train"]}
    for word, rows in names.items():
        (folder / f"{word}.txt").write_text("\n".join(rows.origin) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("outside") / "run"
    vhs(*spoken(out, *both(data)))
    return out


def both(data) -> tuple[str, str]:
    first = f"{{name: gan, data: '{data}/gan.tar', trained_on: '{data}/train.txt', dose: 4}}"
    return "arms=[real-matched,gan,vae]", f"generators=[{first}, {{name: vae, data: '{data}/vae', trained_on: nothing}}]"


def images(run, name: str, scope: str = "split") -> pd.DataFrame:
    opened = plan.reopen(str(run))
    rows = manifest.load(opened.storage, paths=generators.committed(opened, "generate", name, scope)).to_pandas()
    labels = [manifest.read(opened.storage, path).to_pandas() for path in generators.committed(opened, "label", name, scope)]
    return rows.merge(pd.concat(labels), on="key", validate="one_to_one")


def facts(run) -> dict[str, dict]:
    return {fact["arm"]: fact for fact in (json.loads(file.read_text())["facts"] for file in run.glob("classifier/*/split/*.json"))}


def test_images_from_outside_are_measured_and_not_believed(run, data):
    """Number i is the i-th of the sorted set, its picture what the set holds, its class what measures, whatever it is called."""
    found, real = images(run, "gan"), gan(data / "again.tar")
    assert found.number.tolist() == [number for number in range(24) if number not in DAMAGED] and len(found) == 16
    assert found.origin.tolist() == [f"{number:03d}.png" for number in found.number]
    stored = load_images(plan.reopen(str(run)).storage, found)
    assert all(np.array_equal(image, decode_png(dog(FIRST_SEED + n, real[f"{n:03d}.png"]))) for n, image in zip(found.number, stored))
    true = found.origin.map(real).map(CLASSES.index)
    assert (found.label == true).mean() > 0.6 and (found.prompted.map(CLASSES.index) == found.label).mean() < 0.3
    assert set(found.label_source) == {"machine"} and found.seed.isna().all() and images(run, "vae").prompted.isna().all()
    assert "the same bytes" in vhs("regenerate", run, found.key[3])


def test_what_cannot_be_used_is_listed_with_its_reason(run):
    rejects = {reject["file"]: reject["reason"] for reject in json.loads((run / "generated" / "gan" / "split" / "rejects.json").read_text())}
    assert set(rejects) == {f"gan.tar/{number:03d}.png" for number in DAMAGED} and all(rejects.values())
    listed = {one["file"]: one["reject"] for one in json.loads((run / "outside" / "gan" / "split.json").read_text())["images"] if one["reject"]}
    assert listed["gan.tar/900.png"] == "the same bytes as gan.tar/000.png" and "no part of it is an image" in listed["gan.tar/901"]


def test_each_is_an_arm_that_is_trained_and_compared(run, data):
    found, summary = facts(run), json.loads((run / "report" / "summary.json").read_text())
    assert found["gan"]["generated_by_class"] == [4, 4, 4], "its dose, not the quota"
    assert len({(fact["steps"], fact["real"]) for fact in found.values()}) == 1, "whatever the dose: real-matched's steps"
    assert list(summary["arms"]) == ["real-matched", "gan", "vae"]
    pairs = [" - ".join(pair["arms"]) for pair in summary["differences"]]
    assert "gan - real-matched" in pairs
    assert json.loads((run / "plan.json").read_text())["analysis"]["differences"] == ["gan - real-matched", "vae - real-matched"]
    names = (data / "train.txt").read_text().split()
    assert summary["generators"]["gan"] == {"asked": 12, "produced": 16, "accepted": int(images(run, "gan").accepted.sum()), "trained_on": len(names)} | {
        "agreement": summary["generators"]["gan"]["agreement"]
    }
    others = summary["likeness"]["others"]
    assert {name: found["images"] for name, found in others.items()} == {name: summary["generators"][name]["accepted"] for name in ("gan", "vae")}
    assert 0 < others["gan"]["probe"]["auroc"] < 1 and 0 <= others["gan"]["nearer to training"]["share"] <= 1 and summary["likeness"]["nearest"] == {}
    assert summary["generators"]["gan"]["agreement"] < 0.3 and summary["generators"]["vae"]["agreement"] is None
    (marker,) = (run / "generator" / "gan").glob("split-*.json")
    said = json.loads(marker.read_text())["facts"]
    assert len(said["keys_seen"]) == len(names) and said["patients_seen"] == sorted(f"patient-{name[8:]}" for name in names)
    assert "0 errors" in vhs("verify", run, "--full")


def test_a_set_that_is_too_small_is_said(run):
    """Five images where twelve of each class are wanted: all are taken, no second round is asked for, and everyone is told."""
    assert len(list((run / "rounds" / "vae" / "split").iterdir())) == 1 and len(images(run, "vae")) == 5
    status, page = vhs("status", run), (run / "report" / "index.html").read_text()
    assert "generated for vae/split" in status and "of 12 small" in status and "of the 5 that its set has" in status
    assert "of its 5 images fewer were accepted than the 12 wanted of each class" in page and "That vae was trained on none of this data is its owner" in page
    head = re.search(r"Generators outside of this run.*?<thead>(.*?)</thead>", page, re.DOTALL)
    assert re.findall(r">([^<>]+)</th>", head[1]) == ["generator", "asked", "produced", "accepted", "agreement", "small", "normal", "large", "trained on"]
    assert all(f"{name}: " in head[0] for name in ("Asked", "produced", "accepted", "agreement", "trained on")), "a column that the caption leaves out"
    assert "as mixed, with gan&#39;s images instead of generated ones" in page and "drawn by gan, outside of this run" in page


def test_a_generator_that_saw_a_held_out_patient_is_refused_by_name(run, data, tmp_path):
    """Planted: one test image among those it was trained on. The list without it, which the run has, was taken in silence."""
    leaked = (data / "test.txt").read_text().split()[2]
    (tmp_path / "leaky.txt").write_text((data / "train.txt").read_text() + leaked + "\n")
    printed = " ".join(vhs(*spoken(tmp_path / "run", *of_set(data / "gan.tar", tmp_path / "leaky.txt")), "--reuse", run, code=1).split())
    assert "gan was trained on 1 images of patients whom split holds out" in printed and f"{leaked} (key " in printed and "vhs export RUN" in printed
    assert not (tmp_path / "run" / "generated").exists()
    opened = plan.reopen(str(run))
    unit = next(unit for unit in opened.units("train") if unit.params["arm"] == "gan")
    inputs = Inputs(opened.storage, unit)
    scope, (maker,) = lineage.split_rows(inputs), inputs.markers("generator")
    rows = images(run, "gan")
    records = {marker.path: marker.facts for role in ("generator", "labeller") for marker in inputs.markers(role)}
    lineage.guard(rows, records, scope)
    with pytest.raises(lineage.LeakError, match="no lineage"):
        lineage.guard(rows, {path: facts for path, facts in records.items() if path != maker.path}, scope)
    with pytest.raises(lineage.LeakError, match="its generator generator/gan/split.* was trained on held-out patient"):
        lineage.guard(rows, records, replace(scope, held_out_patients=frozenset(maker.facts["patients_seen"][:1])))


def test_a_set_that_holds_films_of_the_test_part_is_refused(run, data, tmp_path):
    """Said to have seen nothing, and shows a test image, as another file. A set of the same size without it is taken."""
    settings = load("debug/demo", [*QUICK, *of_set(data / "gan.tar", "nothing")])
    drawn, number = settings.phantoms, int((data / "test.txt").read_text().split()[0][8:])
    film = draw(settings.view, drawn.style, drawn.seed * 1_000_000 + number, size_px=drawn.size_px, prior=drawn.class_prior).image
    (tmp_path / "set").mkdir()
    for n in range(3):
        (tmp_path / "set" / f"{n}.png").write_bytes(dog(FIRST_SEED + n, "normal"))

    def first_unit(out: str):
        opened = plan.start(load("debug/demo", [*QUICK, *of_set(tmp_path / "set", "nothing")]), str(tmp_path / out))
        plan.adopt_all(opened, str(run))
        for unit in opened.units("dreambooth"):
            attempt(opened.url, opened.config, unit)
        opened.refresh()
        (unit,) = opened.units("generate")
        return attempt(opened.url, opened.config, unit)

    assert first_unit("clean") == "done"
    (tmp_path / "set" / "2.png").write_bytes(encode_png(np.clip(film.astype(int) + 1, 0, 255).astype(np.uint8)))
    with pytest.raises(lineage.LeakError, match=r"generators: 2.png \(and 0 more\) of gan is, or looks like, image .* whom split holds out"):
        first_unit("leaky")


def test_in_folds_a_generator_is_taught_anew_for_each(run, data, tmp_path):
    """{scope} in both places. One fold's list that names an image which the fold holds out is refused, the others' pass."""
    for number, scope in enumerate(("split", "fold-0", "fold-1")):
        gan(tmp_path / scope / "a.tar", 6, FIRST_SEED + 100 * number)
        (tmp_path / scope / "seen.txt").write_text((data / f"{scope}.txt").read_text())
    folds = (*of_set(tmp_path / "{scope}" / "a.tar", tmp_path / "{scope}" / "seen.txt"), "split.folds=2", "labeller.steps=0", "generation.max_rounds=1")
    out = tmp_path / "clean"
    vhs(*spoken(out, *folds, "execution.tries=1"), environment={"VHS_CRASH_AT": "claim:1"}, code=LOST)  # the plan alone
    vhs("stage", "label", out)
    seen = {scope: images(out, "gan", scope) for scope in ("split", "fold-0", "fold-1")}
    assert [len(rows) for rows in seen.values()] == [6, 6, 6] and len({key for rows in seen.values() for key in rows.sha256}) == 18
    (tmp_path / "fold-1" / "seen.txt").write_text((data / "fold-0.txt").read_text())
    settings = load("debug/demo", [*QUICK, *folds])
    with pytest.raises(PlanError, match=r"gan says now that it was trained on other images \(fold-1\)"):
        plan.start(settings, str(out))
    leaky = plan.start(settings, str(tmp_path / "leaky"))
    plan.adopt_all(leaky, str(out))
    (unit,) = [unit for unit in leaky.units("dreambooth") if not leaky.done(unit)]
    with pytest.raises(lineage.LeakError, match=r"gan was trained on \d+ images of patients whom fold-1 holds out: phantom-\d+ \(key [0-9a-f]{16}, patient"):
        attempt(leaky.url, leaky.config, unit)


def test_a_set_may_move_but_not_change(data, tmp_path):
    for folder in ("here", "there", "other"):
        gan(tmp_path / folder / "a.tar", 6, FIRST_SEED + (folder == "other"))

    def start(folder: str):
        return plan.start(load("debug/demo", [*QUICK, *of_set(tmp_path / folder / "a.tar", "nothing")]), str(tmp_path / "run"))

    began = start("here")
    assert start("there").outside("gan", "split") == began.outside("gan", "split") == start("here").outside("gan", "split")
    assert plan.reopen(began.url).config.generators[0].data == str(tmp_path / "here" / "a.tar")
    with pytest.raises(PlanError, match="gan has other images, or was trained on others .*--reuse"):
        start("other")
    with pytest.raises(PlanError, match="planned with other science: generators differ"):
        plan.start(load("debug/demo", [*QUICK, *of_set(tmp_path / "here" / "a.tar", "nothing", dose=3)]), str(tmp_path / "run"))
    source = began.outside("gan", "split")["images"][0]
    shard(tmp_path / "here" / "a.tar", {"000.png": dog(1, "large"), "001.png": dog(2, "large")})
    with pytest.raises(ValueError, match="changed since the run began"):
        outside.open_data(str(tmp_path / "here" / "a.tar")).read(source)


def test_a_set_in_a_bucket_is_the_same_set(data, bucket, tmp_path):
    """Images and declaration are looked for there, and an image is read from there."""
    for name in ("gan.tar", "train.txt"):
        open_storage(f"{bucket}/sets").put(name, (data / name).read_bytes())
    here, there = (plan.start(load("debug/demo", [*QUICK, *of_set(f"{place}/gan.tar", f"{place}/train.txt")]), str(tmp_path / "run"))
                   for place in (data, f"{bucket}/sets"))  # fmt: skip
    sources = there.outside("gan", "split")["images"]
    assert here.outside("gan", "split") == there.outside("gan", "split") and there.config.generators[0].data.startswith("s3://")
    assert outside.open_data(f"{bucket}/sets/gan.tar").read(sources[0]) == dog(FIRST_SEED, "small")


def test_a_damaged_shard_goes_only_where_its_set_is_there_to_make_it_again(run, tmp_path):
    from jobs.audit import repair

    shutil.copytree(run, tmp_path / "run")
    tar = sorted((tmp_path / "run" / "generated" / "gan" / "split" / "any").glob("00000-*.tar"))[0]
    tar.write_bytes(tar.read_bytes()[:-100])
    assert [name for name in repair(str(tmp_path / "run"), full=False, dry_run=True).gone if name.endswith(tar.name)]
    started = tmp_path / "run" / "state" / "execution.json"
    started.write_text(started.read_text().replace("gan.tar", "away.tar"))
    away = repair(str(tmp_path / "run"), full=False, dry_run=True)
    assert not [name for name in away.gone if "gan" in name] and any("away.tar" in finding.to_do for finding in away.left)


def test_killed_among_images_from_outside_and_resumed(run, data, tmp_path, figure):
    out = tmp_path / "run"
    process = command(*spoken(out, *both(data)), environment={"VHS_CRASH_AT": "tar-before-sidecar:4"})
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == LOST, printed
    made = ("generated/gan", "generated/vae", "labels/", "rounds/", "generator/")
    theirs = {name: sha256 for name, sha256 in committed(run).items() if name.startswith(made) and not name.endswith(("shards.txt", "rejects.json"))}
    before = {name for name in committed(out) if name.startswith(made)}
    assert any(name.endswith(".tar") for name in before) and len(before) < len(theirs), "nothing was left to do"
    vhs("stage", "label", out)
    ours = committed(out)
    assert sum(name.endswith(".tar") for name in theirs) == 4 and {name: ours.get(name) for name in theirs} == theirs
    figure(f"killed with {len(before)} of {len(theirs)} files of images from outside: all equal in the end")


GAN = "generators=[{name: gan, data: x, trained_on: nothing}]"
UNDECLARED = "generators=[{name: gan, data: x}]"


@pytest.mark.parametrize(("overrides", "says"), [
    ([UNDECLARED, "arms=[real-matched,gan]"], ["gan does not say what it was trained on", "the test part", "trained_on: FILE", "trained_on: nothing"]),
    ([UNDECLARED, "arms=[real-matched,gan]", "split.folds=3"], ["gan does not say", "3 folds", "anew for each fold", "{scope}"]),
    ([GAN.replace("nothing", "y"), "arms=[real-matched,gan]", "split.folds=3"], ["gan was trained on", "{scope} into data and trained_on"]),
    ([GAN], ["gan is in no arm", "arms=[real,real-matched,mixed,measure,gan]"]), ([GAN, "arms=[gan]"], ["real-matched is what", "gan"]),
    (["arms=[real-matched,gan]"], ["no arm gan", "oracle", "generators"]), ([GAN.replace("gan", "oracle")], ["oracle is taken"]),
    ([GAN.replace("gan", "fold-1")], ["fold-1 is taken"]), ([GAN.replace("gan", "confirmed")], ["confirmed is taken"]),
    ([GAN.replace("gan", "normal")], ["normal is taken", "small, normal, large"]),
    ([GAN.replace("gan", "'a b'")], ["generators.0.name", "a b"]),
    ([GAN.replace("data: x", "dta: x")], ["generators.0.dta: no such key", "dose", "trained_on"]), ([GAN.replace("data: x", "data: phantoms")], ["oracle"]),
    ([GAN.replace("nothing", "nothing, dose: 0")], ["generators.0.dose", "at least 1"]),
    ([GAN, "arms=[real-matched,gan]", "label_by=prompt"], ["no prompt", "label_by=measure"]),
    (["generators=[{name: a, data: x, trained_on: nothing}, {name: a, data: y, trained_on: nothing}]"], ["a name twice"]),
    ([GAN.replace("data: x", "data: 's3://a:b@c/d'")], ["key"]),
])  # fmt: skip
def test_generators_that_cannot_be(overrides, says):
    with pytest.raises(ConfigError) as error:
        load("debug/demo", overrides)
    assert not [word for word in says if word not in str(error.value)], str(error.value)


@pytest.mark.parametrize(("trained_on", "says"), [
    ("phantom-00001\nphantom-77777\n../etc/passwd\n", "names 2 images that the data do not have, phantom-77777, ../etc/passwd"), ("\n \n", "names no image"),
    ("\udcff", "no text in UTF-8"), (None, "does not exist: give a text file, or nothing"),
])  # fmt: skip
def test_a_list_that_cannot_be_meant(trained_on, says, data, tmp_path):
    if trained_on is not None:
        (tmp_path / "seen.txt").write_bytes(trained_on.encode(errors="surrogateescape"))
    with pytest.raises(SourceError, match=f"generators: gan.*{says}"):
        plan.start(load("debug/demo", of_set(data / "vae", tmp_path / "seen.txt")), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "plan.json").exists()


def test_names_in_a_list_are_keys_or_files_and_a_copy_is_what_it_is_a_copy_of(tmp_path):
    real = [
        {"file": "Train/a.png", "origin": "a.png", "sha256": "a" * 64, "reject": None, "patient": "ann"},
        {"file": "Test/b.png", "origin": "b.png", "sha256": "a" * 64, "reject": "the same bytes as Train/a.png", "patient": "bob"},
        {"file": "Test/c.png", "origin": "c.png", "sha256": "c" * 64, "reject": "no label", "patient": "cem"},
    ]
    for said, meant in (("a" * 16, {"a.png": "ann"}), ("Test/b.png", {"a.png": "ann"}), ("c.png\r\na.png\n", {"a.png": "ann", "c.png": "cem"})):
        (tmp_path / "seen.txt").write_text(said)
        assert outside.declared(str(tmp_path / "seen.txt"), real) == meant
    images = pd.DataFrame({"key": ["a" * 16], "origin": ["a.png"], "phash": ["0" * 64]})
    with pytest.raises(lineage.LeakError, match=r"c.png \(patient cem\)"):  # it is in no shard, and its patient is held out
        lineage.declared(("gan", "split"), meant, images, images.assign(patient="ann"), frozenset({"cem"}), 24)
    assert lineage.declared(("gan", "split"), meant, images, images.assign(patient="ann"), frozenset(), 24)["patients_seen"] == ["ann", "cem"]


def test_where_a_set_lies_is_no_science():
    settings = load("debug/demo", ["arms=[real-matched,gan]", "generators=[{name: gan, data: 'a/{scope}', trained_on: 'b/{scope}.txt', dose: 7}]"])
    assert settings.science["generators"] == [{"name": "gan", "data": "files/{scope}", "trained_on": "files/{scope}", "dose": 7}]
    assert Config.of(settings.science, settings.free) == settings and Config.of(settings.science, {"data": "phantoms"}).generators[0].dose == 7


def test_the_planner_counts_them(tmp_path):
    dry = ("run", "demo", "--dry-run", "--out", tmp_path / "run")
    alone, beside = ([GAN, f"arms=[real-matched,{arms}gan]"] for arms in ("", "mixed,"))
    rows = [{line.split()[1]: int(line.split()[3]) for line in vhs(*dry, *words).splitlines() if line.startswith("│ ")}
            for words in (alone, beside)]  # fmt: skip
    assert "priors" not in rows[0] and rows[0]["dreambooth"] == 1 and rows[1]["dreambooth"] == 2 and rows[1]["generate"] == 2 * rows[0]["generate"]
