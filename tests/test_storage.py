"""The commit: whole or absent, one winner of many, nothing visible after a kill."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shards import cache, crash, objects
from shards.storage import open_storage

ROOT = Path(__file__).resolve().parents[1]

RACER = """
import json, sys
from shards.storage import open_storage
url, name, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
storage = open_storage(url)
print("ready", flush=True)
sys.stdin.readline()
print(json.dumps([storage.commit(f"race/{n}", f"{name} {n} ".encode() * 20_000) for n in range(rounds)]))
"""

CRASHER = """
import sys
from shards.storage import open_storage
storage = open_storage(sys.argv[1])
storage.commit("a/first", b"1", crash_window="sidecar-written-not-linked")
storage.commit("a/second", b"2" * 100_000, crash_window="sidecar-written-not-linked")
"""


@pytest.fixture(params=["disk", "s3"])
def place(request, tmp_path) -> str:
    """Where a storage may be made: a folder, or a place on a real S3 server."""
    return str(tmp_path / "run") if request.param == "disk" else request.getfixturevalue("bucket")


def python(script: str, *arguments: object, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], cwd=ROOT, env={**os.environ, **environment}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


def test_commit_creates_once_and_never_changes(place):
    storage = open_storage(place)
    assert storage.commit("a/b.bin", b"first")
    assert not storage.commit("a/b.bin", b"second, and longer")
    assert storage.read("a/b.bin") == b"first"
    assert storage.size("a/b.bin") == 5


def test_commit_copies_a_file_and_leaves_it(place, tmp_path):
    storage, source = open_storage(place), tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 10_000)
    assert storage.commit("big", source)
    assert storage.read("big") == source.read_bytes()
    source.write_bytes(b"changed later")
    assert storage.size("big") == 2_560_000


def test_racing_processes_have_one_winner_and_its_bytes_whole(place, tmp_path):
    rounds, names = 25, ["ant", "bee", "cat", "dog"]
    racers = {name: python(RACER, place, name, rounds) for name in names}
    for racer in racers.values():
        assert racer.stdout.readline() == "ready\n"
    for racer in racers.values():
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = {name: json.loads(racer.communicate(timeout=60)[0]) for name, racer in racers.items()}
    storage = open_storage(place)
    for n in range(rounds):
        winners = [name for name in names if won[name][n]]
        assert len(winners) == 1, f"round {n}"
        assert storage.read(f"race/{n}") == f"{winners[0]} {n} ".encode() * 20_000
    assert not [*tmp_path.glob("run/.tmp/*")]


def test_a_writer_killed_before_its_name_leaves_nothing_visible(place, tmp_path):
    storage = open_storage(place)
    killed = python(CRASHER, place, VHS_CRASH_AT="sidecar-written-not-linked:2")
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert storage.list() == ["a/first"] and not storage.exists("a/second")
    left = len([*tmp_path.glob("run/.tmp/*")])
    assert left == ("://" not in place), "on a disk its bytes lie aside, an object store has none"

    assert storage.sweep(older_than_s=3600) == 0
    assert storage.sweep(older_than_s=0) == left
    assert not [*tmp_path.glob("run/.tmp/*")]
    python(CRASHER, place).communicate(timeout=60)
    assert storage.read("a/second") == b"2" * 100_000 and storage.list() == ["a/first", "a/second"]


def test_a_link_repeated_by_nfs_is_still_our_win(tmp_path, monkeypatch):
    link = os.link

    def reply_lost(source, target):
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", reply_lost)
    storage = open_storage(tmp_path)
    assert storage.commit("a", b"mine") and storage.read("a") == b"mine"


def test_a_file_system_without_hard_links_is_refused_with_the_reason(tmp_path, monkeypatch):
    def no_links(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(OSError, match="no hard links"):
        open_storage(tmp_path).commit("a", b"x")
    assert open_storage(tmp_path).list() == []


def test_a_write_that_fails_leaves_neither_name_nor_temporary(tmp_path):
    storage = open_storage(tmp_path / "run")
    with pytest.raises(FileNotFoundError):
        storage.commit("a", tmp_path / "no such source")
    assert storage.list() == [] and not any((tmp_path / "run" / ".tmp").iterdir())


def test_put_overwrites_whole(place):
    storage = open_storage(place)
    storage.put("state/x.json", b"a long first value")
    storage.put("state/x.json", b"short")
    assert storage.read("state/x.json") == b"short" and storage.list() == ["state/x.json"]


def test_read_ranges(place):
    storage = open_storage(place)
    storage.put("x", b"0123456789")
    assert storage.read("x", 3, 4) == b"3456"
    assert storage.read("x", 8) == storage.read("x", 8, 9) == b"89" and storage.read("x", 20, 1) == b""
    with pytest.raises(FileNotFoundError):
        storage.read("absent")


def test_list_is_recursive_sorted_and_goes_by_prefix(place):
    storage = open_storage(place)
    for name in ("b/2", "a/x/1", "a/y", "ab", "b/.tmp/deep"):
        storage.put(name, b"")
    assert storage.list() == ["a/x/1", "a/y", "ab", "b/.tmp/deep", "b/2"]
    assert storage.list("a/") == ["a/x/1", "a/y"]
    assert storage.list("a") == ["a/x/1", "a/y", "ab"]
    assert storage.list("a/x/") == ["a/x/1"]
    assert storage.list("none/") == []
    assert open_storage(f"{place}-not-made-yet").list() == []


def test_delete_and_exists(place):
    storage = open_storage(place)
    storage.put("a/b", b"")
    assert storage.exists("a/b") and not storage.exists("a")
    storage.delete("a/b")
    storage.delete("a/b")
    assert not storage.exists("a/b")


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", "./a", "a/.", ".tmp/x", "a\0b"])
def test_names_outside_the_storage_are_refused(place, tmp_path, path):
    storage = open_storage(place)
    reads = (storage.read, storage.exists, storage.delete, storage.local, storage.size)
    for use in (*reads, lambda path: storage.put(path, b"x"), lambda path: storage.commit(path, b"x")):
        with pytest.raises(ValueError, match="is no name in"):
            use(path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("prefix", ["../", "/etc/", "a/../b", ".tmp/"])
def test_listing_outside_the_storage_is_refused(place, prefix):
    with pytest.raises(ValueError, match="is no name in"):
        open_storage(place).list(prefix)


def test_other_urls_are_errors():
    for url in ("http://host/run", "file://otherhost/run", "s3:///no-bucket"):
        with pytest.raises(ValueError, match="no storage of this kind"):
            open_storage(url)
    for url in ("s3://bucket/run#2", "s3://bucket//run", "s3://bucket/a//run"):
        with pytest.raises(ValueError, match="no '#' and no empty part"):
            open_storage(url)


def test_path_text_and_file_url_open_the_same_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open_storage("a run").put("x", b"1")
    for place in (tmp_path / "a run", str(tmp_path / "a run"), (tmp_path / "a run").as_uri(), open_storage("a run").url):
        assert open_storage(place).read("x") == b"1"
    assert pickle.loads(pickle.dumps(open_storage("a run"))).read("x") == b"1"


def test_an_answer_that_was_lost_is_still_our_win(bucket, monkeypatch):
    """The client repeats a PUT whose answer did not come, and the repetition meets what the first made."""
    import obstore

    put = obstore.put

    def answer_lost(*arguments, **options):
        put(*arguments, **options)
        return put(*arguments, **options)

    monkeypatch.setattr(obstore, "put", answer_lost)
    storage = open_storage(bucket)
    assert storage.commit("a", b"mine") and storage.read("a") == b"mine" and not storage.commit("a", b"other")


def test_a_name_that_goes_while_the_store_is_asked_whose_it_is_can_be_had(bucket, monkeypatch):
    """A claim, whose worker is done and drops it between our refused PUT and our question."""
    import obstore

    storage, other, put, refused = open_storage(bucket), open_storage(bucket), obstore.put, []

    def raced(store, path, *arguments, **options):
        monkeypatch.setattr(obstore, "put", put)
        assert other.commit(path, b"theirs")
        try:
            return put(store, path, *arguments, **options)
        except obstore.exceptions.AlreadyExistsError:
            refused.append(path)
            other.delete(path)
            raise

    monkeypatch.setattr(obstore, "put", raced)
    assert storage.commit("state/claims/x-0000.json", b"ours") and storage.read("state/claims/x-0000.json") == b"ours"
    assert refused == ["state/claims/x-0000.json"]


def test_objects_are_fetched_once_and_the_oldest_make_room(bucket, tmp_path, monkeypatch):
    """Of what is ours: the folder was there before, with somebody's files in it."""
    monkeypatch.setenv("VHS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("VHS_CACHE_GB", "0.0002")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.tex").write_bytes(b"x" * 190_000)
    os.utime(tmp_path / "cache" / "thesis.tex", (0, 0))
    storage = open_storage(bucket)
    for name in "abc":
        storage.commit(f"model/{name}", name.encode() * 90_000)
    first = storage.local("model/a")
    assert first.read_bytes() == b"a" * 90_000 and storage.local("model/a") == first
    storage.local("model/b")
    storage.local("model/c")
    assert not first.exists() and sum(file.stat().st_size for file in first.parent.iterdir() if file.is_file()) == pytest.approx(180_000, abs=50)
    assert sorted(file.name for file in storage.local("model").iterdir()) == ["a", "b", "c"]
    storage.put("model/a", b"anew")
    assert storage.local("model/a").read_bytes() == b"anew" == (storage.local("model") / "a").read_bytes()
    with pytest.raises(FileNotFoundError):
        storage.local("absent")
    assert (tmp_path / "cache" / "thesis.tex").stat().st_size == 190_000


def test_what_killed_fetches_left_makes_room_and_is_not_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("VHS_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("VHS_CACHE_GB", "0.001")
    ours = cache.folder()
    (ours / f"abc.tar.900000{cache.PART}").write_bytes(b"x" * 500_000)
    (ours / f"model{cache.HALF}").mkdir()
    with open(ours / f"on-its-way.tar.700000{cache.PART}", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in "abcd":
            cache.kept(name, 100_000, lambda file: file.write_bytes(b"x" * 100_000))
        assert {file.name for file in ours.iterdir()} == {"held", "c", "d", Path(lock.name).name}, "700,000 of 900,000 are on their way"
    assert (ours / "held").read_text() == "900000"


def test_ranks_that_want_one_model_fetch_it_once(flaky, bucket):
    storage = open_storage(bucket)
    for name in "abc":
        storage.commit(f"model/{name}", name.encode() * 10_000)
    flaky.asked.clear()
    with ThreadPoolExecutor(8) as ranks:
        (folder,) = set(ranks.map(lambda _: open_storage(bucket).local("model"), range(8)))
    assert sorted(file.name for file in folder.iterdir()) == ["a", "b", "c"]
    assert sorted(name for method, name in flaky.asked if method == "GET" and name in "abc" and name) == ["a", "b", "c"]


def test_a_file_too_large_for_a_request_goes_in_parts(bucket, tmp_path, monkeypatch, peak):
    monkeypatch.setattr(objects, "LARGEST", 1 << 20)
    monkeypatch.setattr(objects, "PARTS", {"chunk_size": 5 << 20, "max_concurrency": 2})
    file, storage = tmp_path / "model", open_storage(bucket)
    storage.commit("small", b"x")
    with open(file, "wb") as out:
        for n in range(64):
            out.write(bytes([n]) * (1 << 20))
    most = peak()
    assert storage.commit("model", file) and most() < 40 << 20, "not the file"
    assert not storage.commit("model", file)
    assert hashlib.sha256(storage.read("model")).digest() == hashlib.sha256(file.read_bytes()).digest() and storage.list() == ["model", "small"]


def test_what_consoles_make_of_folders_is_no_file(bucket, monkeypatch):
    """An object of no bytes at the name of a folder, which obstore lists without its slash."""
    import obstore

    storage, listed = open_storage(bucket), obstore.list
    storage.commit("films/a.png", b"a")
    storage.commit("films/empty", b"")
    (about,) = storage._below("films")[:1]
    marker = about | {"path": about["path"].rpartition("/")[0], "size": 0}
    monkeypatch.setattr(obstore, "list", lambda *arguments, **options: [[marker], *listed(*arguments, **options)])
    assert storage.list() == ["films/a.png", "films/empty"]


def test_a_folder_that_may_not_be_read_is_an_error_and_no_empty_folder():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        for name in ("open", "shut"):
            os.mkdir(f"{folder}/{name}", 0o700 if name == "shut" else 0o755)
            Path(folder, name, "film.png").write_bytes(b"x")
        script = "import os, sys\nfrom shards.storage import open_storage\nplace = open_storage(sys.argv[1])\nos.geteuid() or os.seteuid(65534)\n"
        if os.geteuid():
            os.chmod(f"{folder}/shut", 0)
        for asked in ("place.list()", "place.list('shut/')", "place.exists('shut/film.png')", "place.exists('open/film.png/below') or place.exists('shut/x')"):
            _, said = python(f"{script}{asked}", folder).communicate(timeout=60)
            assert "PermissionError" in said.splitlines()[-1] and "shut" in said, (asked, said)
        assert python(f"{script}assert place.exists('open/film.png') and not place.exists('open/film.png/below')", folder).communicate(timeout=60)[1] == ""
        os.chmod(f"{folder}/shut", 0o700)


def test_folders_behind_links_are_listed_and_links_that_turn_back_are_not(tmp_path):
    (tmp_path / "elsewhere" / "Large").mkdir(parents=True)
    (tmp_path / "elsewhere" / "Large" / "1.png").write_bytes(b"1")
    (tmp_path / "data" / "Small").mkdir(parents=True)
    (tmp_path / "data" / "Small" / "2.png").write_bytes(b"2")
    (tmp_path / "data" / "Large").symlink_to(tmp_path / "elsewhere" / "Large")
    (tmp_path / "data" / "Small" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere" / "Large" / "here").symlink_to(".")
    assert open_storage(tmp_path / "data").list() == ["Large/1.png", "Small/2.png"]
    assert open_storage(tmp_path / "data").list("Large/") == ["Large/1.png"]
    assert open_storage(tmp_path / "absent").list() == open_storage(tmp_path / "data" / "Small" / "2.png").list() == []


def test_what_may_not_be_done_is_named(bucket, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(PermissionError, match="s3://.*refuses s3:ListBucket to AWS_ACCESS_KEY_ID key"):
        open_storage(bucket).list()
    with pytest.raises(PermissionError, match="refuses s3:PutObject"):
        open_storage(bucket).put("a", b"x")


def test_a_store_that_overwrites_is_refused_and_another_is_not(bucket, monkeypatch):
    import obstore

    storage, put = open_storage(bucket), obstore.put
    storage.prove()
    assert storage.list() == []
    monkeypatch.setattr(obstore, "put", lambda *arguments, mode=None, **options: put(*arguments, **options))
    with pytest.raises(OSError, match="overwrites where it is asked to create"):
        storage.prove()
    assert storage.list() == []


def test_a_cache_that_others_may_write_to_is_refused(bucket, tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    monkeypatch.setenv("VHS_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(PermissionError, match="VHS_CACHE_DIR"):
        open_storage(bucket)


def test_crash_windows_are_named(monkeypatch):
    with pytest.raises(ValueError, match="tar-half-written"):
        crash.window("nowhere")
    for wrong in ("nowhere", "claim:0", "claim:x", "claim:-1", ":2", "claim=boo", "claim:1,nowhere", "claim,"):
        monkeypatch.setenv("VHS_CRASH_AT", wrong)
        with pytest.raises(ValueError, match="training-step"):
            crash.window("claim")
    monkeypatch.setenv("VHS_CRASH_AT", "claim")
    crash.window("training-step")


def test_a_window_does_what_is_asked_at_the_passage_it_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(crash, "_passages", Counter())
    monkeypatch.setenv("VHS_CRASH_AT", "claim:2=enospc,name-made:1=eio")
    monkeypatch.setenv("VHS_CRASH_LOG", str(tmp_path / "log"))
    crash.window("claim")
    for window, number in (("claim", errno.ENOSPC), ("name-made", errno.EIO)):
        with pytest.raises(OSError) as raised:
            crash.window(window)
        assert raised.value.errno == number
    crash.window("claim")
    assert (tmp_path / "log").read_text() == f"claim enospc {os.getpid()}\nname-made eio {os.getpid()}\n"
