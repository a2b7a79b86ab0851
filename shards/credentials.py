"""Keys of an object store: they belong into the environment, and into nothing that is written or said."""

from __future__ import annotations

import os
import re

VARIABLES = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_CLIENT_SECRET", "AZURE_STORAGE_SAS_TOKEN",
    "GOOGLE_SERVICE_ACCOUNT_KEY", "HF_TOKEN",
)  # fmt: skip
LEAST = 8  # characters: what is shorter is a word that a text may hold anyway
_USER = re.compile(r"(\w+://)[^/@\s]+@")  # user:password@
_QUERY = re.compile(r"(\w+://[^\s?#'\"]*)\?[^\s'\":,]*")  # a signed URL's is its key


def refuse_in(url: str) -> None:
    """ValueError, which does not repeat it, where a URL may hold a key."""
    if _USER.search(url) or _QUERY.search(url):
        raise ValueError(
            f"{without_keys(url)}: a key, or anything else before @ or behind ?, has no place in a URL: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


def without_keys(text: str) -> str:
    """`text` without the keys in this process's environment and in URLs."""
    text = _QUERY.sub(r"\1", _USER.sub(r"\1", text))
    for name in VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= LEAST:
            text = text.replace(value, f"[{name}]")
    return text
