"""Mutated inputs for everything that reads what others wrote, in processes that may die. `make fuzz` runs 100,000 of each; CI 2,000.

    python tests/fuzz.py [--count N] [--seed N] [TARGET …]

A worker makes input number i from (target, seed, i) alone, so a death names its input, and whoever watches makes it again and keeps it in
tests/corpus/TARGET/, from where it is tried first ever after. Legal is a value, or the exception that the module documents. A worker has 1 GiB beyond
what it starts with and 5 s of processor time an input; an audit hook ends it when it writes outside of its folder, starts a program, or connects.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import mmap
import multiprocessing
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # python tests/fuzz.py

from jobs import config  # noqa: E402
from jobs.data import open_data  # noqa: E402
from shards import manifest, writer  # noqa: E402
from shards.reader import DamagedShard, ShardReader  # noqa: E402
from shards.sample import Sample, sample_key  # noqa: E402
from shards.storage import open_storage  # noqa: E402
from shards.verify import verify  # noqa: E402
from vhs import contained, radiograph  # noqa: E402
from vhs.measure import VIEWS  # noqa: E402
from vhs.sources import SourceError, annotation  # noqa: E402

CORPUS = Path(__file__).with_name("corpus")
MEMORY, CPU_S, STUCK_S = 1 << 30, 5.0, 120.0
VIOLATION, ILLEGAL = 77, 78  # exit codes of a worker
KEPT, KEPT_BYTES = 8, 64 << 10  # inputs of a run that are kept for each target, and the longest
VIEW = VIEWS["canine_lateral"]
POINTS = (np.arange(12.0).reshape(6, 2) ** 1.5).tolist()


@dataclass(frozen=True)
class Target:
    """`seeds`: files that are whole. `run(data, folder)` may raise one of `legal`. `mend` makes a mutated input pass the first check. `contained`: in
    vhs it runs in vhs.contained, so that a death is a rejected input."""

    seeds: Callable[[], list[bytes]]
    run: Callable[[bytes, Path], object]
    legal: tuple[type[Exception], ...]
    mend: Callable[[bytes], bytes] = bytes
    contained: bool = False


@dataclass
class Found:
    tried: int = 0
    accepted: int = 0
    deaths: list[str] = field(default_factory=list)  # contained ones
    wrong: list[str] = field(default_factory=list)


# --- what is mutated -------------------------------------------------------------------------------------------------------------------
def _grey() -> np.ndarray:
    return (np.add.outer(np.arange(24), np.arange(20)) * 5).astype(np.uint8)


def _pictures() -> list[bytes]:
    from PIL import Image

    found, image = [], Image.fromarray(_grey())
    deep = Image.fromarray(_grey().astype(np.uint16) * 256)
    for kind, picture, options in (
        ("PNG", image, {}), ("PNG", image.convert("RGBA"), {}), ("PNG", image.convert("P"), {}), ("PNG", deep, {}), ("JPEG", image, {}),
        ("JPEG", image.convert("RGB"), {"progressive": True}), ("TIFF", image, {}), ("TIFF", deep, {}), ("TIFF", image, {"compression": "tiff_lzw"}),
        ("TIFF", image, {"compression": "tiff_deflate"}), ("TIFF", image.convert("RGB"), {"compression": "jpeg"}), ("TIFF", image, {"compression": "packbits"}),
    ):  # fmt: skip
        picture.save(file := io.BytesIO(), kind, **options)
        found.append(file.getvalue())
    return found


def _dicoms() -> list[bytes]:
    import pydicom
    from PIL import Image
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEG2000, JPEGBaseline8Bit, RLELossless
    from test_radiograph import dicom

    ramp = np.arange(480).reshape(24, 20) * 8
    palette = {f"{colour}PaletteColorLookupTableDescriptor": [256, 0, 16] for colour in ("Red", "Green", "Blue")}
    palette |= {f"{colour}PaletteColorLookupTableData": bytes(512) for colour in ("Red", "Green", "Blue")}
    found = [
        dicom(ramp), dicom(ramp, WindowCenter=1000, WindowWidth=200, RescaleSlope=1, RescaleIntercept=-1000, PixelSpacing=[0.1, 0.1]),
        dicom(ramp % 256, PhotometricInterpretation="PALETTE COLOR", **palette), dicom(ramp, PhotometricInterpretation="MONOCHROME1", PatientName="Doe^Rex"),
    ]  # fmt: skip
    for syntax, kind in ((JPEGBaseline8Bit, "JPEG"), (JPEG2000, "JPEG2000"), (RLELossless, None)):
        data = pydicom.dcmread(io.BytesIO(dicom(ramp)))
        if kind:
            Image.fromarray(_grey()).save(frame := io.BytesIO(), kind)
            data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelData = 8, 8, 7, encapsulate([frame.getvalue()])
            data.file_meta.TransferSyntaxUID = syntax
            data["PixelData"].VR = "OB"
        else:
            data.compress(syntax)
        data.save_as(file := io.BytesIO(), enforce_file_format=True)
        found.append(file.getvalue())
    return found


def _mats() -> list[bytes]:
    from scipy.io import savemat

    found = []
    for compressed in (False, True):
        for content in ({"six_points": np.array(POINTS), "VHS": 9.5}, {"six_points": np.array(POINTS, np.float32), "VHS": "9.5", "more": {"a": [1, "b"]}}):
            savemat(file := io.BytesIO(), content, do_compression=compressed)
            found.append(file.getvalue())
    return found


def _jsons() -> list[bytes]:
    named = {f"P{name}": pair for name, pair in zip("ABCDEF", POINTS, strict=True)}
    return [json.dumps(value).encode() for value in ({"six_points": POINTS, "VHS": 9.5}, {"six_points": named}, {"VHS": [[8.0]]})]


def _tables() -> list[bytes]:
    columns = ",".join(f"{name}_{axis}" for name in VIEW.points for axis in "xy")
    return [
        f"\ufefffile,patient,split,{columns}\r\na.png,ann,train,{','.join(map(str, np.ravel(POINTS)))}\r\n".encode(),
        b"100.png,2\n101.png,0\n102.png,1\n", b'file,class,source\n"a.png",small,"s ""x"""\nimages/b.png,Large,\n', b"ImageName,VHS\n100.png,11.36\n101,7\n",
    ]  # fmt: skip


def _configs() -> list[bytes]:
    return [
        b"name: a\nview: canine_lateral\nresolution: 128\ndata: phantoms\nseeds: [0, 1]\narms: [real, measure]\n",
        b"name: a\nview: human_frontal\nsplit: {folds: 5, test_fraction: 0.2}\nclassifier: {epochs: 3, batch: 8}\nedges: [0.4, 0.5]\nbase: x\n",
    ]


def _shard(folder: Path) -> tuple[Path, Path]:
    """-> (tar, sidecar) of a whole shard of ours."""
    import pyarrow as pa

    samples = [Sample(sample_key(bytes([n])), {"png": bytes([n]) * 300, "json": b"{}"}) for n in range(4)]
    columns = pa.table({"label": [0, 1, 2, 0], "origin": list("abcd")})
    writer.commit_shard(open_storage(folder), "real", 0, "0123456789ab", samples, columns, {"facts": "{}"}, folder / "scratch")
    return next(folder.glob("real/*.tar")), next(folder.glob("real/*.parquet"))


def _of_shard(suffix: str) -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return [next(file for file in _shard(Path(folder)) if file.suffix == suffix).read_bytes()]


def _tars() -> list[bytes]:
    import tarfile

    found = []
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(fileobj=(file := io.BytesIO()), mode="w", format=kind) as tar:
            samples = {"a/1.png": b"\x89PNG", "a/1.json": _jsons()[0], "2.jpg": b"2", "2.cls": b"0", "é" * 20 + ".png": b"3", "4.txt": b"large"}
            for name, data in samples.items():
                member = tarfile.TarInfo(name)
                member.size, member.mtime = len(data), 1.5
                tar.addfile(member, io.BytesIO(data))
            link = tarfile.TarInfo("5.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
        found.append(file.getvalue())
    return found


# --- what is done with it --------------------------------------------------------------------------------------------------------------
def _read_shard(data: bytes, folder: Path, suffix: str):
    tar, sidecar = _whole(folder)
    changed = tar if suffix == ".tar" else sidecar
    kept = changed.read_bytes()
    try:
        changed.write_bytes(data)
        storage = open_storage(folder)
        verify(storage, "real", full=True)
        reader = ShardReader(storage, manifest.load(storage, "real"))
        return [reader.read(i, check=True) for i in range(len(reader))]
    finally:
        changed.write_bytes(kept)


def _whole(folder: Path) -> tuple[Path, Path]:
    there = sorted(folder.glob("real/0*"))
    return (there[1], there[0]) if there else _shard(folder)


def _scan(data: bytes, folder: Path, name: str):
    (folder / name).write_bytes(data)
    for image in ("a.png", "b.png", "100.png", "101.png", "102.png"):
        (folder / image).touch()
    return open_data(str(folder / name)).scan(VIEW, ("small", "normal", "large"))


def _config(data: bytes, folder: Path):
    (folder / "c.yaml").write_bytes(data)
    return config.load(str(folder / "c.yaml"))


def _json_label(data: bytes, folder: Path):
    return annotation.read(data, "1.json", VIEW, contained.Contained())


def _png_sums(data: bytes) -> bytes:
    """Chunks of a PNG with sums that fit, else nothing behind the first change would be read."""
    if not data.startswith(b"\x89PNG"):
        return data
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        end = at + 8 + int.from_bytes(out[at : at + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = struct.pack(">I", zlib.crc32(out[at + 4 : end]))
        at = end + 4
    return bytes(out)


def _tar_sums(data: bytes) -> bytes:
    out = bytearray(data)
    for at in range(0, len(out) - 511, 512):
        if out[at + 257 : at + 262] == b"ustar":
            out[at + 148 : at + 156] = b" " * 8
            out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out)


TARGETS = {
    "tar": Target(lambda: _of_shard(".tar"), lambda data, folder: _read_shard(data, folder, ".tar"), (DamagedShard,), _tar_sums),
    "manifest": Target(lambda: _of_shard(".parquet"), lambda data, folder: _read_shard(data, folder, ".parquet"), (DamagedShard, ValueError)),
    "shards": Target(_tars, lambda data, folder: _scan(data, folder, "0.tar"), (SourceError,), _tar_sums),
    "picture": Target(_pictures, lambda data, folder: radiograph.film(data, "1.png"), (radiograph.Unreadable,), _png_sums, contained=True),
    "dicom": Target(_dicoms, lambda data, folder: radiograph.film(data, "1.dcm"), (radiograph.Unreadable,), contained=True),
    "mat": Target(_mats, lambda data, folder: annotation.mat(data), (ValueError, NotImplementedError), contained=True),
    "json": Target(_jsons, _json_label, ()),
    "table": Target(_tables, lambda data, folder: _scan(data, folder, "t.csv"), (SourceError,)),
    "config": Target(_configs, _config, (config.ConfigError,)),
}


# --- mutating --------------------------------------------------------------------------------------------------------------------------
_NUMBERS = [0, 1, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF]
_WORDS = [b"-1", b"nan", b"1e999", b"9" * 30, b"{", b"[" * 50, b"null", b"\0", b"../", b"/etc/passwd", b"http://127.0.0.1:9/x.png"]
_WORDS += [b"${oc.env:HOME}", b"&a *a", b"!!python/name:os.system "]


def mutated(name: str, seeds: list[bytes], seed: int, number: int) -> bytes:
    """Input `number` of a target: one of its whole files with one to eight changes."""
    draw = random.Random(f"{name} {seed} {number}")
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << draw.randrange(8)
            case 1 if data:
                data[at % len(data)] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
            case 2:
                width = draw.choice((2, 4, 8))
                data[at : at + width] = (draw.choice(_NUMBERS) & ((1 << 8 * width) - 1)).to_bytes(width, draw.choice(("little", "big")))
            case 3:
                del data[at : at + draw.choice((1, 4, 64, 512, 1 << 30))]
            case 4:
                data[at:at] = data[at : at + draw.choice((1, 8, 64, 512))] * draw.choice((1, 1, 40))
            case 5:
                other = draw.choice(seeds)
                start = draw.randrange(len(other) + 1)
                data[at : at + 64] = other[start : start + draw.choice((8, 64, 1024))]
            case _:
                data[at : at + draw.choice((0, 0, 2))] = draw.choice(_WORDS)
    return TARGETS[name].mend(bytes(data)) if draw.random() < 0.7 else bytes(data)


# --- watching --------------------------------------------------------------------------------------------------------------------------
def fuzz(name: str, count: int, seed: int = 0) -> Found:
    """The corpus, then `count` mutated inputs."""
    kept = [file.read_bytes() for file in sorted((CORPUS / name).glob("*"))]
    seeds, found = TARGETS[name].seeds(), Found()
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="vhs-fuzz-") as folder, mmap.mmap(-1, 16) as progress:
        next_one, total = 0, len(kept) + count
        while next_one < total:
            progress[:8] = struct.pack("q", next_one)
            worker = fork.Process(target=_work, args=(name, kept, seeds, seed, next_one, total, Path(folder), progress))
            worker.start()
            at = next_one
            while worker.is_alive():
                worker.join(STUCK_S)
                before, (at,) = at, struct.unpack("q", progress[:8])
                if worker.is_alive() and at == before:
                    worker.kill()
            (at,) = struct.unpack("q", progress[:8])
            next_one = total if worker.exitcode == 0 else at + 1
            if worker.exitcode != 0:
                data = kept[at] if at < len(kept) else mutated(name, seeds, seed, at - len(kept))
                _judge(found, name, at, data, worker.exitcode)
        found.tried, found.accepted = total, struct.unpack("q", progress[8:])[0]
    return found


def _judge(found: Found, name: str, number: int, data: bytes, code: int):
    if len(data) <= KEPT_BYTES and len(found.deaths) + len(found.wrong) < KEPT:
        (CORPUS / name).mkdir(parents=True, exist_ok=True)
        (CORPUS / name / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    how = f"{name} {number}: {signal.Signals(-code).name if code < 0 else f'exit {code}'}, {len(data)} bytes"
    by_decoder = code < 0 and -code in contained.BY_INPUT - {signal.SIGPROF}  # 5 s of processor time are a hang of ours, wherever
    (found.deaths if by_decoder and TARGETS[name].contained else found.wrong).append(how)


def _work(name: str, kept: list[bytes], seeds: list[bytes], seed: int, first: int, last: int, folder: Path, progress: mmap.mmap):
    target, accepted = TARGETS[name], struct.unpack("q", progress[8:])[0]
    os.chdir(folder)
    import faulthandler
    import logging
    import warnings

    faulthandler.disable()  # pytest's, which would tell of every death
    warnings.simplefilter("ignore")
    logging.disable()
    for whole in seeds:  # what they import is not an input's memory
        with suppress(*target.legal):
            target.run(whole, folder)
    with open("/proc/self/statm") as sizes:
        most = int(sizes.read().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_guard(str(folder)))
    for number in range(first, last):
        progress[:8] = struct.pack("q", number)
        data = kept[number] if number < len(kept) else mutated(name, seeds, seed, number - len(kept))
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        try:
            target.run(data, folder)
            accepted += 1
        except target.legal:
            pass
        except BaseException as error:
            signal.setitimer(signal.ITIMER_PROF, 0)
            print(f"{name} {number}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
            if os.environ.get("VHS_TRACEBACK"):
                import traceback

                traceback.print_exc()
            os._exit(ILLEGAL)
        progress[8:] = struct.pack("q", accepted)
    signal.setitimer(signal.ITIMER_PROF, 0)
    os._exit(0)


def _guard(folder: str) -> Callable:
    """An audit hook: whatever would leave the folder ends the process."""

    def hook(event: str, arguments: tuple):
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            inside = str(arguments[0]).startswith(folder) or isinstance(arguments[0], int)
        else:
            inside = event not in ("os.symlink", "os.link", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pickle.find_class")
            inside = inside and (event not in ("os.mkdir", "os.rename") or str(arguments[0]).startswith(folder))
        if not inside:
            print(f"{event} {arguments}", file=sys.stderr, flush=True)
            os._exit(VIOLATION)

    return hook


if __name__ == "__main__":
    said = argparse.ArgumentParser()
    said.add_argument("targets", nargs="*", default=list(TARGETS), metavar="TARGET")
    said.add_argument("--count", type=int, default=100_000)
    said.add_argument("--seed", type=int, default=1)
    asked = said.parse_args()
    wrong = []
    for each in asked.targets:
        result = fuzz(each, asked.count, asked.seed)
        print(f"{each}: {result.tried} inputs, {result.accepted} read, {len(result.deaths)} deaths contained, {len(result.wrong)} wrong", flush=True)
        wrong += result.wrong
        for line in (result.deaths + result.wrong)[:20]:
            print(f"  {line}", flush=True)
    sys.exit(bool(wrong))
