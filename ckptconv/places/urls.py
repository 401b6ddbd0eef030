"""Words that name a place which is no path."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
HUB = "hf"
_HERE = ("file", "local")
_NAME = 200


def protocol_of(word: str | Path) -> str | None:
    """``s3`` of ``s3://bucket/key``; None for a path, also for one that is written as ``file://``.

    >>> protocol_of("s3://bucket/model/"), protocol_of("model/in.pth"), protocol_of("file:///in.pth")
    ('s3', None, None)
    """
    match = _URL.match(word) if isinstance(word, str) else None
    return match[1].lower() if match and match[1].lower() not in _HERE else None


def path_of(word: str | Path) -> Path:
    """The path that a local word means.

    >>> path_of("file:///models/in.pth").as_posix()
    '/models/in.pth'
    """
    if isinstance(word, str) and (match := _URL.match(word)) and match[1].lower() in _HERE:
        return Path(word[match.end() :])
    return Path(word)


def name_of(url: str) -> str:
    """What a local file for ``url`` is called: the last part of it that is a plain name.

    >>> name_of("https://host/model.safetensors?X-Amz-Signature=0123"), name_of("s3://bucket/out/")
    ('model.safetensors', 'out')
    """
    path = url.partition("://")[2].partition("?")[0]
    if url.startswith("http"):
        path = unquote(path.partition("#")[0])
    name = path.rstrip("/").rpartition("/")[2]
    return name if is_plain(name) and len(name.encode()) <= _NAME else "remote"


def is_plain(name: str) -> bool:
    """True for a file's name and nothing else."""
    return name not in ("", ".", "..") and name.isprintable() and "/" not in name and "\\" not in name and "\0" not in name


def secrets_of(url: str) -> tuple[str, ...]:
    """What somebody could log in with: the user part of a URL, and the values of its query.

    >>> secrets_of("https://me:pass@host/in.pth?sig=0123")
    ('me:pass', 'pass', '0123')
    """
    rest = url.partition("://")[2]
    user, at, _ = rest.partition("/")[0].rpartition("@")
    found = [user, user.partition(":")[2]] if at and protocol_of(url) != HUB else []
    found += [value for pair in rest.partition("?")[2].split("&") if (value := pair.partition("=")[2])]
    return tuple(dict.fromkeys(each for secret in found for each in (secret, unquote(secret)) if each))
