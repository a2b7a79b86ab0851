"""What is brought is not trusted: one test for each way in that the README's section on trust closes."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import socketserver
import stat
import struct
import tarfile
import threading
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from conftest import ROOT, vhs
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian
from scipy.io import savemat
from test_data import ingested, png, shard, table
from test_radiograph import dicom

from jobs import failures
from jobs.config import ConfigError, load
from jobs.data import open_data
from jobs.unit import Unit
from shards import credentials
from shards.storage import open_storage
from vhs import checkpoint
from vhs.contained import Contained
from vhs.measure import VIEWS
from vhs.radiograph import Unreadable, film
from vhs.sources import annotation

DOG = VIEWS["canine_lateral"]
KEY = "AKIAXXNOTAREALKEYXX"
SECRET = "wJalrXUtnFEMInotarealsecretbPxRfiCYEXAMPLE"


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


# --- tars ------------------------------------------------------------------------------------------------------------------------------
def _member(name: str, **about) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    for what, value in about.items():
        setattr(member, what, value)
    return member


HOSTILE = {
    "/etc/absolute.png": ({"size": 3}, "leads out of its folder"),
    "../../up.png": ({"size": 3}, "leads out of its folder"),
    "symbolic.png": ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "a link"),
    "hard.png": ({"type": tarfile.LNKTYPE, "linkname": "0.png"}, "a link"),
    "device.png": ({"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}, "a device"),
    "fifo.png": ({"type": tarfile.FIFOTYPE}, "a device"),
    "link": ({"type": tarfile.SYMTYPE, "linkname": "/etc"}, "a link"),
}


def test_members_that_lead_out_are_rejected_and_nothing_is_unpacked(tmp_path):
    data, points = png(0)
    shard(tmp_path / "data" / "0.tar", {"0.png": data, "0.json": json.dumps({"six_points": points.tolist()}).encode()})
    with tarfile.open(tmp_path / "data" / "0.tar", "a") as tar:
        for name, (about, _) in HOSTILE.items():
            tar.addfile(_member(name, **about), io.BytesIO(b"abc") if about.get("size") else None)
    before = set(tmp_path.rglob("*"))
    found = {source.file.removeprefix("0.tar/"): source.reject for source in open_data(str(tmp_path / "data")).scan(DOG)}
    assert found.pop("0.png") is None
    for name, (_, reason) in HOSTILE.items():
        reject = next(reject for file, reject in found.items() if name.startswith(file))
        assert reason in reject, (name, reject)
    assert len(found) == len(HOSTILE) and set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("declared", [1 << 40, 1 << 62])
def test_a_member_of_gigantic_declared_size_takes_no_memory(declared, tmp_path):
    header = _member("0.png", size=declared).tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "0.tar").write_bytes(header + bytes(10240))
    _is_refused(tmp_path, "declares|unexpected end")


def test_a_long_name_of_gigantic_declared_size_takes_no_memory(tmp_path):
    header = _member("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=1 << 35).tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "0.tar").write_bytes(header + bytes(10240))
    _is_refused(tmp_path, "declares a name of")


def test_a_compressed_tar_is_not_inflated(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w:gz") as tar:
        tar.addfile(_member("0.png", size=50 << 20), io.BytesIO(bytes(50 << 20)))
    _is_refused(tmp_path, "no plain tar")


def _is_refused(folder: Path, reason: str):
    with Contained(memory=1 << 28) as contained, pytest.raises(Exception, match=reason):
        contained.call(scan, str(folder))


def scan(folder: str) -> int:
    return len(open_data(folder).scan(DOG))


def test_a_pickle_in_a_sample_is_never_decoded(tmp_path):
    trap, (data, points) = Trap(tmp_path / "sprung"), png(0)
    label = json.dumps({"six_points": points.tolist()}).encode()
    hostile = {f"0.{kind}": pickle.dumps(trap) for kind in ("pyd", "pkl", "pickle", "pth", "npy", "ten")}
    shard(tmp_path / "data" / "0.tar", {"0.png": data, "0.json": label, **hostile})
    ingested(tmp_path / "data", tmp_path / "run")
    assert list((tmp_path / "run" / "real").glob("*.tar")) and not trap.file.exists()


# --- decompression bombs ---------------------------------------------------------------------------------------------------------------
def _png_of(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")


def _tiff_of(width: int, height: int) -> bytes:
    Image.new("L", (8, 8)).save(file := io.BytesIO(), "TIFF", compression="tiff_deflate")
    data = bytearray(file.getvalue())
    for tag, value in ((256, width), (257, height), (278, height)):
        at = data.index(struct.pack("<HH", tag, 4 if struct.pack("<HH", tag, 4) in data else 3))
        data[at : at + 12] = struct.pack("<HHII", tag, 4, 1, value)
    return bytes(data)


def _deflated() -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(dicom(np.zeros((2000, 2000)))))
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(file := io.BytesIO(), enforce_file_format=True)
    return file.getvalue()


BOMBS = {
    "wide.png": (_png_of(50_000, 50_000), "50000 x 50000|2500000000"),
    "wide.tif": (_tiff_of(50_000, 50_000), "50000 x 50000|2500000000"),
    "wide.dcm": (dicom(np.arange(4096).reshape(64, 64), Rows=50_000, Columns=50_000), "50000 x 50000"),
    "colours.dcm": (dicom(np.arange(4096).reshape(64, 64), Rows=9_000, Columns=9_000, SamplesPerPixel=60_000), "9000 x 540000000"),
    "frames.dcm": (dicom(np.arange(4096).reshape(64, 64), NumberOfFrames=1_000_000), "64 x 64000000"),
    "deflated.dcm": (_deflated(), "deflated as a whole"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_it_goes_off(name):
    data, reason = BOMBS[name]
    with Contained(memory=1 << 27) as contained, pytest.raises(Unreadable, match=f"{name}: .*({reason})"):
        contained.call(film, data, name)


def test_a_label_that_inflates_is_a_reject_and_takes_bounded_memory():
    savemat(file := io.BytesIO(), {"six_points": np.zeros((6, 20_000_000))}, do_compression=True)
    with Contained(memory=1 << 28) as contained:
        assert len(file.getvalue()) < 1 << 20, "else its length alone would do"
        assert "MemoryError" in annotation.read(file.getvalue(), "1.mat", DOG, contained)["reject"]


# --- what is executed or followed ------------------------------------------------------------------------------------------------------
def test_weights_and_checkpoints_are_never_unpickled(tmp_path):
    trap = Trap(tmp_path / "sprung")
    torch.save({"step": trap}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError):
        checkpoint.load(tmp_path / "checkpoint.pt")
    loads = {}
    for file in (file for room in ("vhs", "jobs", "shards") for file in (ROOT / room).rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) == "torch.load":
                loads[f"{file.name}:{call.lineno}"] = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in call.keywords)
    assert loads and all(loads.values()) and not trap.file.exists()


@pytest.mark.parametrize(
    "text", ["name: !!python/object/apply:os.system ['touch sprung']\n", "name: !!python/name:os.system\n", "a: &a [x, x]\nb: &b [*a, *a]\nname: [*b, *b]\n"]
)
def test_yaml_makes_values_only(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load("c.yaml")
    assert not Path("sprung").exists()


def test_a_configuration_takes_nothing_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    (tmp_path / "c.yaml").write_text("name: ${oc.env:AWS_SECRET_ACCESS_KEY}\nview: canine_lateral\n")
    assert SECRET not in json.dumps(load(str(tmp_path / "c.yaml")).science)


def test_a_url_or_a_place_outside_that_data_names_is_not_followed(tmp_path):
    asked = []

    class Listener(socketserver.BaseRequestHandler):
        def handle(self):
            asked.append(self.request)

    outside = tmp_path / "outside.png"
    outside.write_bytes(png(0)[0])
    with socketserver.TCPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"127.0.0.1:{server.server_address[1]}/x.png"
        lines = [f"http://{where}?X-Amz-Signature={SECRET}", f"s3://{KEY}:{SECRET}@{where}", f"file://{outside}"]
        lines += [str(outside), "../outside.png", "a/../../outside.png"]
        table(tmp_path / "data")
        (tmp_path / "data" / "labels.csv").write_text("file,class\n0.png,small\n" + "".join(f"{line},large\n" for line in lines))
        printed = ingested(tmp_path / "data", tmp_path / "run")
        server.shutdown()
    rejects = json.loads((tmp_path / "run" / "real" / "rejects.json").read_text())
    told = [reject["reason"] for reject in rejects if "without a label" not in reject["reason"]]
    assert len(told) == len(lines) and sum("URL" in reason for reason in told) == 3 and sum("outside of the data" in reason for reason in told) == 3
    assert not asked and SECRET not in printed + json.dumps(rejects) and KEY not in printed + json.dumps(rejects)


# --- what is kept and said -------------------------------------------------------------------------------------------------------------
def test_keys_are_neither_written_nor_said(tmp_path, s3):
    """A key in a URL is refused without repeating it; one in the environment is in nothing that a failing run leaves or prints."""
    signed = f"s3://{KEY}:{SECRET}@bucket/data"
    for arguments in (("data=" + signed, "--out", tmp_path / "run"), ("--out", signed), ("--out", f"s3://bucket/run?X-Amz-Signature={SECRET}")):
        printed = vhs("run", "debug/demo", *arguments, code=1)
        assert "no place in a URL" in " ".join(printed.split()) and SECRET not in printed and KEY not in printed
    keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "VHS_TRACEBACK": "1"}
    printed = vhs("ingest", "s3://bucket/data", "--view", "canine_lateral", "--out", tmp_path / "run", environment=keys, code=None)
    assert "the store refuses" in " ".join(printed.split()) and SECRET not in printed and KEY not in printed
    left = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert SECRET.encode() not in left and KEY.encode() not in left


def test_a_failure_that_quotes_a_key_is_told_without_it(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    try:
        raise OSError(f"PUT https://{KEY}:{SECRET}@host/x?X-Amz-Signature=abc: refused, key {SECRET}")
    except OSError as error:
        failures.record(storage := open_storage(tmp_path), Unit("ingest", "real/00000", "parquet", {}, {}, {}), error)
    (name,) = storage.list(failures.FOLDER)
    told = json.loads(storage.read(name))
    assert SECRET not in str(told) and KEY not in str(told) and "X-Amz" not in str(told) and "refused, key [AWS_SECRET_ACCESS_KEY]" in told["reason"]


@pytest.mark.parametrize("url", ["s3://bucket/a folder/b", "/data/films", "gs://bucket"])
def test_a_url_without_a_key_is_let_be(url):
    credentials.refuse_in(url)
    assert credentials.without_keys(url) == url


def test_nobody_else_may_write_into_a_run(tmp_path):
    before = os.umask(0)
    try:
        ingested(table(tmp_path / "data"), tmp_path / "run")
        storage = open_storage(tmp_path / "by hand")
        storage.commit("a/b", b"")
        storage.put("c/d", b"")
    finally:
        os.umask(before)
    made = [path for run in ("run", "by hand") for path in (tmp_path / run, *(tmp_path / run).rglob("*"))]
    open_to_all = [str(path) for path in made if stat.S_IMODE(path.lstat().st_mode) & stat.S_IWOTH]
    assert len(made) > 10 and not open_to_all, open_to_all


def test_of_a_dicom_no_identity_is_kept_whether_it_is_read_or_not(tmp_path):
    """Name and number are in the header, in a value that cannot be read, and in what pydicom says of it."""
    (tmp_path / "data" / "small").mkdir(parents=True)
    pixels = np.arange(4096).reshape(64, 64)
    identity = {"PatientName": "Doe^Rex", "PatientID": "4711-secret", "InstitutionName": "Clinic of Doe"}
    whole = dicom(pixels, PixelSpacing=[0.1, 0.1], **identity)
    torn = {"number": whole.replace(b"0.1\\0.1 ", b"Doe^Rex "), "short": whole[:-4000], "syntax": whole.replace(b"MONOCHROME2 ", b"Doe^Rex     ")}
    for name, data in {"whole": whole, **torn}.items():
        (tmp_path / "data" / "small" / f"{name}.dcm").write_bytes(data)
    printed = ingested(tmp_path / "data", tmp_path / "run")
    kept = b"".join(file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file())
    for word in ("Doe", "4711-secret"):
        assert word not in printed and word.encode() not in kept
    assert "number.dcm" in printed and "short.dcm" in printed, "none was damaged"


def test_rays_of_ours_are_closed_to_others():
    """ray.sbatch and the launcher's files start a head with a token, and a dashboard on loopback; a Ray inside a command listens on loopback. That the
    token holds is tests/test_slurm_scripts.py's."""
    for file in ("slurm/ray.sbatch", "configs/ray/local.yaml", "configs/ray/aws.yaml"):
        text = (ROOT / file).read_text()
        assert "RAY_AUTH_MODE=token" in text and "--dashboard-host=127.0.0.1" in text and "0.0.0.0" not in text
    for file in (ROOT / "jobs").rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call) and ast.unparse(node.func) == "ray.init"):
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert "address" in given and given["address"] != "'local'" or given.get("_node_ip_address") == "'127.0.0.1'", f"{file}:{call.lineno}"
