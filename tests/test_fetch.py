"""vhs fetch against a hub that speaks what huggingface_hub asks, on this machine, with a real if tiny Stable Diffusion in it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
import torch
from conftest import vhs

from jobs import config, models
from vhs import diffusion, pretraining
from vhs.settings import Pretraining

TINY = Pretraining(resolution_px=32, codec_channels=(8, 8, 16), unet_channels=(8, 16), text_width=32, text_layers=1)
REPO, COMMIT = "someone/tiny-diffusion", "c0ffee" + "0" * 34


class Hub(BaseHTTPRequestHandler):
    """One repository at one commit: its info, its tree, its files. `server.asked` counts what was read of each file."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, folder = unquote(urlsplit(self.path).path), self.server.folder
        if path in (f"/api/models/{REPO}", f"/api/models/{REPO}/revision/main", f"/api/models/{REPO}/revision/{COMMIT}"):
            return self._answer(json.dumps({"id": REPO, "sha": COMMIT, "siblings": []}).encode())
        if path == f"/api/models/{REPO}/tree/{COMMIT}":
            return self._answer(json.dumps([self._entry(file) for file in sorted(folder.rglob("*")) if file.is_file()]).encode())
        file = folder / path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
        if not path.startswith(f"/{REPO}/resolve/{COMMIT}/") or not file.is_file():
            return self._answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        name, data = file.relative_to(folder).as_posix(), file.read_bytes()
        if self.command == "GET":
            self.server.asked.append(name)
        self._answer(data, headers={"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'})

    def _entry(self, file):
        entry = {"type": "file", "path": file.relative_to(self.server.folder).as_posix(), "size": file.stat().st_size, "oid": "0" * 40}
        if file.suffix == ".safetensors":
            claimed = "0" * 64 if self.server.lies else hashlib.sha256(file.read_bytes()).hexdigest()
            entry["lfs"] = {"oid": claimed, "size": file.stat().st_size, "pointerSize": 100}
        return entry

    def _answer(self, data, status=200, headers=None):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "hub"
    diffusion.save(pretraining.build(TINY), folder)
    for extra in ("README.md", "v1-5-pruned.ckpt", "unet/diffusion_pytorch_model.fp16.safetensors", "safety_checker/config.json"):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_text("not wanted")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.asked, server.lies = folder, [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetched(hub, to, *overrides, **options):
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(to.parent / "home"), "HF_HUB_DISABLE_XET": "1"}
    return " ".join(vhs("fetch", "debug/demo", f"base={REPO}", *overrides, "--to", to, environment=environment, **options).split())


def test_a_base_is_downloaded_once_pinned_and_usable(hub, tmp_path):
    to = tmp_path / "models"
    said = fetched(hub, to)
    assert f"base: {REPO} at {COMMIT}" in said and "downloaded" in said and f"vhs run debug/demo base={to}/base" in said
    record = json.loads((to / "fetched.json").read_text())["base"]
    assert (record["repo"], record["revision"]) == (REPO, COMMIT)
    there = {
        file.relative_to(to / "base").as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in (to / "base").rglob("*")
        if file.is_file()
    }
    assert record["files"] == there and set(hub.asked) == set(there), "what the record lists, and nothing beside it"
    assert not {"README.md", "v1-5-pruned.ckpt", "unet/diffusion_pytorch_model.fp16.safetensors", "safety_checker/config.json"} & set(there)
    again, original = diffusion.load(to / "base").unet.state_dict(), diffusion.load(hub.folder).unet.state_dict()
    assert all(torch.equal(again[name], original[name]) for name in original)

    hub.asked.clear()
    (to / "base" / "unet" / "config.json").write_text("{}")
    assert "downloaded" in fetched(hub, to) and hub.asked == ["unet/config.json"], "only what is damaged"
    hub.shutdown()
    assert "every sha256 as recorded" in fetched(hub, to), "whole, so no network is needed"


def test_a_pinned_commit_is_the_one_asked_for(hub, tmp_path):
    said = fetched(hub, tmp_path / "models", f"base_revision={'a' * 40}", code=1)
    assert f"{REPO} (base) cannot be had from http://127.0.0.1" in said
    assert COMMIT in fetched(hub, tmp_path / "models", f"base_revision={COMMIT}")


def test_bytes_the_hub_does_not_vouch_for_are_refused(hub, tmp_path):
    hub.lies = True
    assert "came with other bytes than the hub says" in fetched(hub, tmp_path / "models", code=1)
    assert not (tmp_path / "models" / "fetched.json").exists()


def test_a_repository_that_is_no_stable_diffusion_is_named(hub, tmp_path):
    shutil.rmtree(hub.folder / "vae")
    assert "has no vae/config.json, vae/diffusion_pytorch_model.safetensors" in fetched(hub, tmp_path / "models", code=1)


def test_a_hub_id_of_another_kind_of_model_is_refused_before_its_weights_are_downloaded(hub, tmp_path):
    file = hub.folder / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "in_channels": 9}))
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    opening = [sys.executable, "-c", f"from vhs import diffusion; diffusion.load('{REPO}@{COMMIT}')"]
    ended = subprocess.run(opening, env=environment, capture_output=True, text=True)
    assert "cannot be used: its UNet takes 9 channels for 4 of latents; legal is" in ended.stderr, ended.stderr
    assert "unet/config.json" in hub.asked and not [name for name in hub.asked if name.endswith("safetensors")]


def test_without_a_network_it_says_what_to_do(hub, tmp_path):
    hub.shutdown()
    hub.server_close()
    said = fetched(hub, tmp_path / "models", code=1)
    assert "cannot be had from http://127.0.0.1" in said and "bring its folder here and set base=DIR/base" in said


def test_a_hub_id_without_its_commit_is_no_plan():
    with pytest.raises(config.ConfigError, match="needs base_revision.*vhs fetch"):
        models.fingerprints(config.load("debug/demo", [f"base={REPO}"]))
    pinned = config.load("debug/demo", [f"base={REPO}", f"base_revision={COMMIT}"])
    assert models.fingerprints(pinned)["base"] == f"{REPO}@{COMMIT}"


def test_what_is_packaged_needs_no_fetching(tmp_path):
    assert "nothing to fetch" in vhs("fetch", "debug/demo", "--to", tmp_path / "models")
