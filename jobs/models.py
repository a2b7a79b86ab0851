"""Where the models come from that a run starts with: what travels with the program, a folder here or in object storage, or a hub."""

from __future__ import annotations

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path

from jobs.config import Config, ConfigError
from shards.storage import open_storage
from vhs.settings import Classifier
from vhs.supported import LEGAL, unsupported

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[0-9a-f]{40})?")
WEIGHTS = Path(__file__).resolve().parents[1] / "vhs" / "weights"


@lru_cache
def here(place: str) -> str:
    """`place` for who opens files: what lies at a URL is fetched into this machine's cache (shards/cache.py), once; all else is itself. ConfigError where
    nothing lies there."""
    if "://" not in place:
        return str(Path(place).expanduser()) if place.startswith("~") else place
    root, _, name = place.rstrip("/").rpartition("/")
    try:
        return str(open_storage(root).local(name))
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"{place}: no model lies there ({error})") from None


def check_diffusers(what: str, model: str) -> None:
    """ConfigError, in the name of `what`, unless `model` is a diffusers folder here that can be used, or may be one's id on a hub: other names are not asked
    for there, and what an id means shows when it is opened."""
    folder = Path(model)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ConfigError(f"{what} = {model!r} is no diffusers folder: it has no model_index.json beside unet/, vae/, tokenizer/")
    if not folder.is_dir() and not HUB_ID.fullmatch(model):
        raise ConfigError(f"{what} = {model!r} is no folder here: give packaged, a diffusers folder, or a hub id, which is written org/name")
    if folder.is_dir() and (why := _unusable(folder)):
        raise ConfigError(f"{what} = {model!r} cannot be used: {why}")


@lru_cache
def _unusable(folder: Path) -> str:
    """What its configurations say against a diffusers folder."""
    read = {}
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        try:
            read[name] = json.loads((folder / name).read_bytes())
        except FileNotFoundError:
            return f"it has no {name}; {LEGAL}"
        except ValueError as error:
            return f"its {name} is no JSON ({error})"
    return unsupported(*read.values())


def base(config: Config) -> str:
    """The diffusers folder that `config.base` means, or id@commit for the hub. ConfigError for a hub id that may change under its name."""
    if config.base == "packaged":
        return str(WEIGHTS / "base")
    place = here(config.base)
    check_diffusers("base", place)
    if Path(place).is_dir():
        return place
    if not config.base_revision:
        raise ConfigError(
            f"base = {config.base!r} is no folder here, and as a hub id it needs base_revision, the commit. `vhs fetch CONFIG --to DIR`, where "
            "there is a network, downloads it once and says what to set"
        )
    return f"{config.base}@{config.base_revision}"


def labeller(config: Config) -> str:
    """The labeller folder that `config.labeller.init` means, or the word scratch. ConfigError where none is packaged for the view."""
    if config.labeller.init != "packaged":
        return here(config.labeller.init)
    folder = WEIGHTS / "labeller" / config.view
    if not folder.is_dir():
        known = ", ".join(sorted(path.name for path in folder.parent.iterdir() if path.is_dir()))
        raise ConfigError(
            f"labeller.init = 'packaged': vhs ships labellers for {known}, none for {config.view}. Set labeller.init=scratch (it learns from the "
            "data's key points), or to a labeller's folder"
        )
    return str(folder)


def check_labeller(config: Config) -> None:
    """ConfigError where `labeller.init` is no labeller, or one that measures otherwise than the run does."""
    settings = config.labeller
    if settings.init == "scratch":
        return
    storage = open_storage(labeller(config) if settings.init == "packaged" else settings.init)
    if not storage.exists("config.json"):
        raise ConfigError(
            f"labeller.init = {settings.init!r} is no labeller's folder, it has no config.json: give packaged, scratch, or a folder that a run or "
            "vhs pretrain wrote, RUN/labeller/split-…"
        )
    said = json.loads(storage.read("config.json"))
    if (said["view"], said["size_px"]) != (config.view, settings.size_px):
        raise ConfigError(
            f"labeller.init = {settings.init!r} measures {said['view']} at {said['size_px']} px, the run wants {config.view} at "
            f"{settings.size_px} px: set labeller.size_px to {said['size_px']}, or take another labeller or init=scratch"
        )


def check_classifier(config: Config) -> None:
    """ConfigError where `classifier.weights` are none."""
    weights = config.classifier.weights
    if weights not in ("imagenet", "scratch") and not open_storage(weights).exists("model.safetensors"):
        raise ConfigError(f"classifier.weights = {weights!r} is neither imagenet nor scratch nor a folder with a model.safetensors")


def fingerprints(config: Config) -> dict[str, str]:
    """Fingerprints of the models a run starts with: part of its plan, for other weights under the same name are another science."""
    return {"base": fingerprint(base(config)), "labeller": fingerprint(labeller(config)), **classifier(config)}


def classifier(config: Config) -> dict[str, str]:
    """{"weights": fingerprint} of the folder that `classifier.weights` names; nothing for imagenet and scratch, which name themselves."""
    weights = begun_from(config.classifier).weights
    return {} if weights in ("imagenet", "scratch") else {"weights": fingerprint(weights)}


def begun_from(settings: Classifier) -> Classifier:
    """The classifier's settings, with weights that this machine can open."""
    return settings.model_copy(update={"weights": here(settings.weights)})


def seen(model: str) -> dict[str, list[str]]:
    """Keys and patients of this project's data that a model folder declares to have been trained on, in the lineage.json a run writes into it.

    What travels with the program has seen drawn images only. A folder or hub id that declares nothing (a published Stable Diffusion) is taken to have
    seen none of the run's own images.
    """
    file = Path(model) / "lineage.json"
    return json.loads(file.read_text()) if file.is_file() else {"keys_seen": [], "patients_seen": []}


@lru_cache
def fingerprint(model: str) -> str:
    """Digest of a model folder's files, or of a file; a hub id with its commit, or a word, stands for itself."""
    folder = Path(model)
    if folder.is_file():
        return hashlib.sha256(folder.read_bytes()).hexdigest()[:16]
    if not folder.is_dir():
        return model
    whole = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix != ".md":
            whole.update(f"{file.relative_to(folder).as_posix()}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()[:16]
