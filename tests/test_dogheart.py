"""A tree as DogHeart comes, with everything planted that goes wrong in real copies: it is ingested, every fault named, the run finishes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import vhs
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian
from scipy.io import savemat

from jobs.config import load
from jobs.drive import drive
from jobs.plan import Run, reopen, start
from shards import manifest
from vhs.measure import CLASSES, VIEWS
from vhs.phantom import draw

DOG = VIEWS["canine_lateral"]


def dicom(image: np.ndarray, **tags) -> bytes:
    """An 8-bit radiograph as a 12-bit MONOCHROME1 file with a patient's name in it."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = DigitalXRayImageStorageForPresentation, "1.2.3"
    dataset = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.PatientName, dataset.PatientID, dataset.PixelSpacing = "Doe^Rex", "4711-secret", [0.139, 0.139]
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = *image.shape, 1
    dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME1", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
    dataset.PixelData = ((255 - image.astype(np.uint16)) * 16).tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(file := io.BytesIO(), enforce_file_format=True)
    return file.getvalue()


def picture(image: np.ndarray, kind: str) -> tuple[str, bytes]:
    """-> (suffix, bytes) of the image as one of the ways the field stores grey."""
    if kind == "dicom":
        return ".dcm", dicom(image)
    if kind == "tiff16":
        stored, suffix = Image.fromarray(image.astype(np.uint16) * 257), ".tif"
    elif kind == "png16":
        stored, suffix = Image.fromarray(image.astype(np.uint16) * 257), ".png"
    else:
        stored, suffix = Image.fromarray(image).convert(kind), ".png"
    stored.save(file := io.BytesIO(), "TIFF" if suffix == ".tif" else "PNG")
    return suffix, file.getvalue()


class Tree:
    """Data/{Train,Valid,Test}/{Images,Labels,Images_classes/<Class>}: drawn dogs, the test split unlabelled."""

    def __init__(self, data: Path, train: int, valid: int, test: int, size_px: int = 64):
        self.data, self.images, self.size_px, self.drawn = data, {"Train": [], "Valid": [], "Test": []}, size_px, 0
        for split, count in zip(self.images, (train, valid, test), strict=True):
            for number in range(count):
                kind = ("L", "RGB", "RGBA", "P", "png16", "tiff16", "dicom")[number % 7]
                self.add(split, kind, labelled=split != "Test", sorted_by_class=number % 3 == 0)

    def add(self, split: str, kind: str = "L", labelled: bool = True, sorted_by_class: bool = False, **label) -> Path:
        """One more dog; `label` overrides six_points or VHS of its .mat. -> its image."""
        dog, self.drawn = draw("canine_lateral", "clinic", 1000 + self.drawn, size_px=self.size_px), self.drawn + 1
        suffix, data = picture(dog.image, kind)
        name = f"{self.drawn}_{dog.index:.1f}_0" if split != "Test" else str(self.drawn)
        image = self.write(f"{split}/Images/{name}{suffix}", data)
        if labelled:
            self.write(f"{split}/Labels/{name}.mat", b"")
            savemat(
                self.data / split / "Labels" / f"{name}.mat", {"six_points": dog.points, "VHS": np.array([[dog.index]], np.float32)} | label
            )
        if sorted_by_class and split != "Test":
            self.write(f"{split}/Images_classes/{CLASSES[int(DOG.classify(dog.index))].title()}/{name}{suffix}", data)
        self.images[split].append(image)
        return image

    def write(self, name: str, data: bytes) -> Path:
        file = self.data / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return file

    def plant(self) -> dict[str, str]:
        """Every fault once -> file name: words of the reason it has to be rejected with."""
        faults = {}

        def planted(file: Path, reason: str) -> Path:
            faults[file.name] = reason
            return file

        torn = planted(self.add("Train"), "damaged")
        torn.write_bytes(torn.read_bytes()[:400])
        torn = planted(self.add("Train", "dicom"), "damaged")
        torn.write_bytes(torn.read_bytes()[:-2000])
        planted(self.add("Train"), "empty file").write_bytes(b"")
        planted(self.add("Train", labelled=False), "image without a label")
        planted(self.data / "Train/Labels" / f"{self.add('Train').stem}.mat", "label without an image")
        self.images["Train"].pop().unlink()
        planted(self.add("Train", VHS=np.array([[15.5]])), "by its key points, 15.5 by its label")
        planted(self.add("Valid", six_points=np.full((6, 2), np.nan)), "key point A, B, C, D, E, F is not a number")
        planted(self.add("Train", six_points=np.arange(12.0).reshape(6, 2) * 90), "outside the image")
        wrong = self.add("Train")
        stated = 9.4 if abs(float(wrong.stem.split("_")[1]) - 9.4) > 1 else 12.4
        name = f"14_{stated}_0"
        (self.data / f"Train/Labels/{wrong.stem}.mat").rename(self.data / f"Train/Labels/{name}.mat")
        planted(wrong.rename(wrong.with_name(f"{name}.png")), f"{stated:g} by its file name")
        copied = self.add("Train", sorted_by_class=True)
        classes = [file.parent.name.lower() for file in self.data.glob(f"Train/Images_classes/*/{copied.name}")]
        other = next(name for name in CLASSES if name not in classes)
        planted(copied, f"{other} by its folder or table")
        moved = self.data / f"Train/Images_classes/{other.title()}/{copied.name}"
        moved.parent.mkdir(parents=True, exist_ok=True)
        next(self.data.glob(f"Train/Images_classes/*/{copied.name}")).rename(moved)
        test = [file for file in self.images["Test"] if file.suffix == ".png"]
        same = planted(self.add("Train"), "(test), so the train copy is dropped")
        same.write_bytes(test[0].read_bytes())
        near = planted(self.add("Train"), f"near-duplicate of test/{test[1].name}")
        resaved = Image.open(test[1]).convert("L")
        resaved.resize((resaved.width * 3, resaved.height * 3)).save(near)
        savemat(self.data / f"Train/Labels/{near.stem}.mat", {"six_points": self._points(near) * 3 + 1})
        burned = planted(self.add("Valid", "dicom"), "BurnedInAnnotation is YES")
        burned.write_bytes(dicom(np.asarray(Image.open(self.images["Train"][0]).convert("L")), BurnedInAnnotation="YES"))
        return faults

    def _points(self, image: Path) -> np.ndarray:
        from scipy.io import loadmat

        return loadmat(self.data / f"Train/Labels/{image.stem}.mat")["six_points"]


def to_splits(data: Path, run: Path, *overrides: str) -> Run:
    """The run of debug/dogheart on `data` up to and with the stage split."""
    opened = start(load("debug/dogheart", [f"data={data}", *overrides]), str(run))
    drive(opened, only="split")
    return opened


def rejects(run: Path) -> dict[str, str]:
    listed = json.loads((run / "real" / "rejects.json").read_text())
    found = {item["file"].rpartition("/")[2]: item["reason"] for item in listed}
    assert len(found) == len(listed)
    return found


def check_faults(run: Path, faults: dict[str, str]):
    found = rejects(run)
    assert set(found) == set(faults), {name: found.get(name, "accepted") for name in set(found) ^ set(faults)}
    wrong = {name: found[name] for name, reason in faults.items() if reason not in found[name]}
    assert not wrong, wrong
    assert len(set(found.values())) == len(found), "each fault has a reason of its own"


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    data = tmp_path_factory.mktemp("faulty") / "zipped" / "Data"
    tree = Tree(data, 75, 15, 20)
    return tree, tree.plant()


def test_a_clean_tree_has_no_rejects(tmp_path):
    Tree(tmp_path / "Data", 40, 12, 10)
    run = tmp_path / "run"
    opened = to_splits(tmp_path, run)
    rows = manifest.load(opened.storage, paths=opened.committed("ingest")).to_pandas()
    assert len(rows) == 62 and rejects(run) == {}
    assert (rows.label[rows.split == "test"] == -1).all() and (rows.label[rows.split != "test"] >= 0).all()
    assert rows["index"].isna().eq(rows.split == "test").all()
    facts = opened.marker(opened.committed("split")[0]).facts
    assert facts["patients_known"] is False and facts["groups"] == 62


def test_every_planted_fault_is_rejected_with_its_reason(faulty, tmp_path):
    tree, faults = faulty
    run = tmp_path / "run"
    opened = to_splits(tree.data.parent, run)
    check_faults(run, faults)
    rows = manifest.load(opened.storage, paths=opened.committed("ingest")).to_pandas()
    dogs = rows[rows.origin.str.endswith(".dcm")]
    assert len(dogs) and np.allclose(dogs.pixel_spacing_mm, 0.139) and rows.pixel_spacing_mm.isna().sum() == len(rows) - len(dogs)
    stored = b"".join(file.read_bytes() for file in (run / "real").iterdir())
    assert b"4711-secret" not in stored and b"Doe^Rex" not in stored


@pytest.mark.slow
def test_the_run_finishes(faulty, tmp_path):
    tree, faults = faulty
    run = tmp_path / "run"
    dry = " ".join(vhs("run", "debug/dogheart", f"data={tree.data.parent}", "--out", run, "--dry-run").split())
    assert "data: a key-point tree" in dry and not run.exists()
    vhs("run", "debug/dogheart", f"data={tree.data.parent}", "--out", run)
    check_faults(run, faults)
    page = (run / "report" / "index.html").read_text().lower()
    assert "patients" in page and "unknown" in page
    check_evaluator_files(run, tree)


def check_evaluator_files(run: Path, tree: Tree):
    """One CSV an arm for the test images, byte for byte as the field's evaluators take them (shared formats: `1621.png,2`, `100.png,11.3614`)."""
    opened = reopen(str(run))
    units = [unit for unit in opened.units("evaluate") if unit.params["scope"] == "split"]
    tables = pd.concat([manifest.read(opened.storage, unit.marker).to_pandas() for unit in units])
    tables = tables[tables.origin.isin([file.name for file in tree.images["Test"]])]  # beside them: answers on the inner validation
    assert set(tables.arm) == set(opened.config.arms) and (tables.label == -1).all()
    for arm, rows in tables.groupby("arm"):
        if arm == "measure":
            answers = {row.origin: f"{row.measured:.4f}" for row in rows.itertuples()}
        else:
            folder_order = ("large", "normal", "small")
            answers = {row.origin: str(folder_order.index(CLASSES[row.predicted])) for row in rows.itertuples()}  # one seed
        assert sorted(answers) == sorted(file.name for file in tree.images["Test"])
        expected = "".join(f"{name},{answers[name]}\r\n" for name in sorted(answers)).encode()
        assert (run / "report" / "predictions" / f"{arm}.csv").read_bytes() == expected


def test_an_unlabelled_test_split_without_folds_is_refused_at_once(faulty, tmp_path):
    tree, _ = faulty
    for dry in ([], ["--dry-run"]):
        printed = " ".join(
            vhs("run", "debug/dogheart", f"data={tree.data}", "split.folds=0", "--out", tmp_path / "run", *dry, code=1).split()
        )
        assert all(words in printed for words in ("data: a key-point tree", "none of the 20 test images", "split.folds=5"))
        assert not (tmp_path / "run/plan.json").exists()


def test_images_of_one_name_in_two_folders_stay_apart(tmp_path):
    for number in range(40):
        image = tmp_path / "data" / ("Test" if number < 10 else "Train") / CLASSES[number % 3] / f"{number // 3 % 4}-{number % 10}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw("canine_lateral", "clinic", number, size_px=64).image).save(image)
    files = [file.relative_to(tmp_path / "data").as_posix() for file in (tmp_path / "data").rglob("*.png")]
    opened = to_splits(tmp_path / "data", tmp_path / "run", "split.folds=0", "label_by=prompt")
    rows = manifest.load(opened.storage, paths=opened.committed("ingest")).to_pandas()
    assert rows.origin.is_unique and len(rows) == len(files) and all(any(file.endswith(name) for file in files) for name in rows.origin)


def test_one_film_under_two_classes_is_used_under_neither(tmp_path):
    from jobs.stages import ingest

    for name, seeds in {"small": (0, 1), "normal": (2,), "large": (3, 0)}.items():  # film 0 is filed twice
        (tmp_path / name).mkdir()
        for seed in seeds:
            Image.fromarray(np.full((40, 40), 10 + seed, np.uint8)).save(tmp_path / name / f"{seed}-{name}.png")
    found = ingest.sources(load("debug/dogheart", [f"data={tmp_path}", "label_by=prompt"]))
    rejected = {source["origin"]: source["reject"] for source in found if source["reject"]}
    assert set(rejected) == {"0-small.png", "0-large.png"}
    assert all("contradiction" in reason and "0-small.png" in reason and "0-large.png" in reason for reason in rejected.values())


def test_an_unschooled_labeller_is_refused(tmp_path):
    from jobs.stages import ingest
    from vhs.sources import SourceError

    for name in CLASSES:
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((40, 40), len(name), np.uint8)).save(tmp_path / name / "film.png")
    with pytest.raises(SourceError, match="labeller.init=scratch: nothing would teach it"):
        ingest.sources(load("debug/dogheart", [f"data={tmp_path}", "label_by=prompt", "labeller.init=scratch"]))
    assert len(ingest.sources(load("debug/dogheart", [f"data={tmp_path}", "label_by=prompt"]))) == 3


def test_init_writes_a_config_that_runs(faulty, tmp_path):
    tree, _ = faulty
    config = tmp_path / "mine.yaml"
    printed = " ".join(vhs("init", tree.data, "--out", config).split())
    for words in ("key-point tree", "canine_lateral", "test 20 without a label", "patients unknown", "label without an image"):
        assert words in printed, printed
    assert "a new run" in vhs("run", config, "--out", tmp_path / "run", "--dry-run")
    assert "is there" in vhs("init", tree.data, "--out", config, code=1)


def test_init_says_why_nothing_can_be_used(tmp_path):
    (tmp_path / "data/Train/Labels").mkdir(parents=True)
    savemat(tmp_path / "data/Train/Labels/1.mat", {"six_points": draw("canine_lateral", "clinic", 0, size_px=64).points, "VHS": 9.0})
    said = " ".join(vhs("init", tmp_path / "data", "--out", tmp_path / "mine.yaml", code=1).split())
    assert "label without an image" in said and "--view" not in said
    assert "--view cat: legal are canine_lateral" in " ".join(
        vhs("init", tmp_path / "data", "--view", "cat", "--out", tmp_path / "mine.yaml", code=1).split()
    )


def test_init_asks_for_the_view_where_nothing_tells_it(tmp_path):
    for number in range(9):
        image = tmp_path / "data" / CLASSES[number % 3].upper() / f"{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw("canine_lateral", "clinic", number, size_px=64).image).save(image)
    config = tmp_path / "mine.yaml"
    assert "say --view canine_lateral or --view human_frontal" in " ".join(vhs("init", tmp_path / "data", "--out", config, code=1).split())
    printed = " ".join(vhs("init", tmp_path / "data", "--view", "canine_lateral", "--out", config).split())
    assert "class folders" in printed and "no key points" in printed and "only 3 images of class small" in printed
    assert load(str(config)).view == "canine_lateral" and load(str(config)).split.folds == 5


def numbered(data, layout: str):
    """Nine dogs whose classes are numbers: in `folders`, or in a `table`."""
    for number in range(9):
        image = data / (f"Train/{number % 3}/{number}.png" if layout == "folders" else f"{number}.png")
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw("canine_lateral", "clinic", number, size_px=64).image).save(image)
    if layout == "table":
        (data / "labels.csv").write_text("file,class\n" + "".join(f"{number}.png,{number % 3}\n" for number in range(9)))


@pytest.mark.parametrize("layout", ["folders", "table"])
def test_init_and_ingest_are_told_what_numbered_classes_mean(layout, tmp_path):
    from jobs.stages import ingest

    numbered(data := tmp_path / "data", layout)
    config, order = tmp_path / "mine.yaml", "ingest.class_order=[large,small,normal]"
    init = ("init", data, "--view", "canine_lateral", "--out", config)
    assert "Set ingest.class_order=[large,normal,small] (folder order) or" in " ".join(vhs(*init, code=1).split()) and not config.exists()
    assert "3 small, 3 normal, 3 large" in vhs(*init, order)
    settings = load(str(config))
    assert settings.ingest.class_order == ("large", "small", "normal")
    labels = {source["file"].rpartition("/")[2]: source["label"] for source in ingest.sources(settings)}
    assert [labels[f"{number}.png"] for number in range(3)] == ["large", "small", "normal"]
    read = ("ingest", data, "--view", "canine_lateral", "--resolution", 64, "--out", tmp_path / "only")
    assert "class_order" in vhs(*read, code=1) and not (tmp_path / "only").exists()
    assert "9 images: 3 large, 3 normal, 3 small" in vhs(*read, order)


def test_init_writes_what_this_machine_can_do_and_what_was_asked_for(tmp_path):
    from jobs import fits, forecast, plan

    numbered(data := tmp_path / "a name: with #signs", "folders")
    config = tmp_path / "mine.yaml"
    asked = ("ingest.class_order=[small,normal,large]", "classifier.epochs=3", "seeds=[0,1]", "label_by=hand")
    vhs("init", data, "--view", "canine_lateral", *asked, "--out", config)
    settings = load(str(config))
    assert (settings.classifier.epochs, settings.seeds, settings.label_by, settings.data) == (3, (0, 1), "hand", str(data))
    assert settings.classifier.model == "tf_efficientnet_lite0" and "its ImageNet weights: pip install" not in config.read_text(), "a remark is of init's own"
    made = forecast.forecast(settings, forecast.sizes(settings, plan.Run("nowhere", settings, read_only=True)))
    assert fits.remarks(made, memory_gb=8) == [] and made.hours < 8
    for wrong, says in (("classifer.epochs=3", "classifer: no such key"), ("arms=[real,mixed]", "real-matched is what"), ("data=x", "DATA, --view and --out")):
        assert says in " ".join(vhs("init", data, wrong, "--out", tmp_path / "other.yaml", code=1).split())
    assert not (tmp_path / "other.yaml").exists()


def test_an_annotation_burned_in_is_used_where_that_is_said(tmp_path):
    dogs = [draw("canine_lateral", "clinic", seed, size_px=64).image for seed in range(3)]
    for label, dog in zip(CLASSES, dogs, strict=True):
        (tmp_path / "data" / label).mkdir(parents=True)
        (tmp_path / "data" / label / "dog.dcm").write_bytes(dicom(dog, BurnedInAnnotation="YES"))
    kept = {}
    for chosen in ("reject", "keep"):
        settings = load("debug/dogheart", [f"data={tmp_path / 'data'}", f"ingest.burned_in_annotation={chosen}", "label_by=prompt"])
        opened = start(settings, str(tmp_path / chosen))
        drive(opened, only="ingest")
        kept[chosen] = manifest.load(opened.storage, "real").num_rows
    assert kept == {"reject": 0, "keep": 3}
    vhs("ingest", tmp_path / "data", "--view", "canine_lateral", "--out", tmp_path / "only")
    assert len(json.loads((tmp_path / "only" / "real" / "rejects.json").read_text())) == 3


@pytest.mark.slow
def test_the_whole_size(tmp_path, figure):
    """1,400 / 200 / 400, the study's: ingested and split with every fault found."""
    import time

    tree = Tree(tmp_path / "Dog_heart" / "Data", 1400, 200, 400)
    faults, run, began = tree.plant(), tmp_path / "run", time.monotonic()
    opened = to_splits(tmp_path, run)
    figure(f"2,000 images planned, ingested and split in {time.monotonic() - began:.0f} s")
    check_faults(run, faults)
    assert opened.marker(opened.committed("split")[0]).facts["groups"] == 2000, "two drawn dogs were taken for one"
