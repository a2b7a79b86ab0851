"""`vhs fetch`: the models a configuration names, from the hub into a folder, each file with its sha256, once. For machines that see a network, to be
carried to those that see none."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.config import Config, ConfigError

RECORD = "fetched.json"  # {"base": {"repo", "revision", "files": {name: sha256}}, ...}
_NETWORKS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
_STABLE_DIFFUSION = ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/*"]
_STABLE_DIFFUSION += [f"{folder}/{name}" for folder, weights in _NETWORKS.items() for name in ("config.json", f"{weights}.safetensors")]


@dataclass(frozen=True)
class Model:
    """One to fetch: `part` of the configuration, as DIR/<part>; `setting` is what then names the folder. `revision` None: the newest."""

    part: str
    setting: str
    repo: str
    revision: str | None
    files: list[str]


def models(config: Config) -> Iterator[Model]:
    """What `config` takes from the hub. Packaged models and folders need no fetching."""
    if config.base != "packaged" and "://" not in config.base and not Path(config.base).expanduser().is_dir():
        yield Model("base", "base", config.base, config.base_revision, _STABLE_DIFFUSION)
    if config.classifier.weights == "imagenet":
        import timm

        if (known := timm.models.get_pretrained_cfg(config.classifier.model)) and known.hf_hub_id:
            yield Model("classifier", "classifier.weights", known.hf_hub_id, None, ["config.json", "model.safetensors"])


def fetch(config: Config, to: Path) -> Iterator[tuple[Model, dict, bool]]:
    """Each model with its record, and whether it had to be downloaded. What is there whole is left alone, without a look at the network."""
    to.mkdir(parents=True, exist_ok=True)
    file = to / RECORD
    record = json.loads(file.read_text()) if file.is_file() else {}
    for model in models(config):
        known, folder = record.get(model.part), to / model.part
        if known and known["repo"] == model.repo and model.revision in (None, known["revision"]) and not _damaged(folder, known["files"]):
            yield model, known, False
            continue
        record[model.part] = _download(model, folder, known)
        file.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        yield model, record[model.part], True


def _damaged(folder: Path, files: dict[str, str]) -> list[str]:
    return [name for name, sha256 in files.items() if not (folder / name).is_file() or _sha256(folder / name) != sha256]


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _download(model: Model, folder: Path, known: dict | None) -> dict:
    """The model's files in `folder` and nothing else -> its record. ConfigError if the hub cannot be reached or has not all of them."""
    from huggingface_hub import HfApi, constants, snapshot_download

    if known and (known["repo"], known["revision"]) != (model.repo, model.revision or known["revision"]):
        shutil.rmtree(folder, ignore_errors=True)  # another model
    elif known:
        for name in _damaged(folder, known["files"]):
            (folder / name).unlink(missing_ok=True)
    try:
        commit = model.revision or (known or {}).get("revision") or HfApi().model_info(model.repo).sha
        snapshot_download(model.repo, revision=commit, local_dir=folder, allow_patterns=model.files)
        stored = {
            item.path: item.lfs.sha256 for item in HfApi().list_repo_tree(model.repo, recursive=True, revision=commit) if _large(item)
        }
    except Exception as error:  # the client lets through whatever its network, a proxy or the hub raised
        raise ConfigError(
            f"{model.repo} ({model.part}) cannot be had from {constants.ENDPOINT}: {str(error).strip().splitlines()[0]}. Run the same command where "
            f"there is a network, then bring its folder here and set {model.setting}=DIR/{model.part}"
        ) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's notes: times, which are not the model
    files = {path.relative_to(folder).as_posix(): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    if missing := [name for name in model.files if "*" not in name and name not in files]:
        raise ConfigError(f"{model.repo}@{commit} has no {', '.join(missing)}: it is no model that {model.setting} can be")
    if wrong := [name for name in files if stored.get(name, files[name]) != files[name]]:
        raise ConfigError(
            f"{model.repo}@{commit}: {', '.join(wrong)} came with other bytes than the hub says it has; run the same command again"
        )
    return {"repo": model.repo, "revision": commit, "files": files}


def _large(item) -> bool:
    return getattr(item, "lfs", None) is not None
