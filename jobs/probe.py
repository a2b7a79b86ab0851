"""What a node is like, as one line of JSON. It runs where vhs may be missing: the standard library only.

python probe.py '{"folder": …, "token": …, "see": […], "modules": […], "work_dir": …, "network": true}'
"""

import json
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec


def look(asked: dict) -> dict:
    """Answers to `asked`, each a plain value; an error is its text."""
    return {
        "host": socket.gethostname(),
        "now_s": time.time(),
        "python": platform.python_version(),
        "missing": [name for name in asked["modules"] if find_spec(name) is None],
        "versions": {name: _version(name) for name in ("vhs", "ray")},
        "folder": _shared(asked["folder"], asked["token"]),
        "unseen": [path for path in asked["see"] if not os.path.exists(path)],
        "scratch": _scratch(asked["work_dir"]),
        "network": _reaches() if asked["network"] else "not asked",
        "shm_mb": shutil.disk_usage("/dev/shm").free >> 20 if os.path.isdir("/dev/shm") else 0,
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": len([name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _shared(folder: str, token: str) -> str:
    """Whether what was written elsewhere is seen here, a link can be made, and the answer will be seen there."""
    try:
        with open(f"{folder}/{token}") as file:
            file.read()
        os.link(f"{folder}/{token}", f"{folder}/{token}.node")
        return "ok"
    except OSError as error:
        return str(error)


def _scratch(work_dir: str) -> str:
    chosen = os.path.expanduser(os.path.expandvars(work_dir))
    if "$" in chosen:
        return f"{chosen}: no such variable here"
    try:
        with tempfile.NamedTemporaryFile(dir=chosen or None) as file:
            file.write(b"0" * (8 << 20))
            file.flush()
        return "ok"
    except OSError as error:
        return str(error)


def _reaches() -> str:
    try:
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
        return "ok"
    except OSError as error:
        return str(error)


if __name__ == "__main__":
    print("probe " + json.dumps(look(json.loads(sys.argv[1]))), flush=True)
