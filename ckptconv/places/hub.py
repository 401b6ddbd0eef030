"""``hf://owner/repo@revision/path``: what the Hugging Face cache holds, and with ``--online`` what the hub has."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from msgspec import Struct

from ckptconv.errors import InputError, OutputError, Problem, UsageError, printable
from ckptconv.places.settings import Settings
from ckptconv.places.urls import is_plain

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REPO = re.compile(rf"({_PART}/{_PART})(?:@([^/@]+))?(?:/(.+?))?/?|({_PART})(?:@([^/@]+))?/?")
#: Kinds of model files, in the order in which one is looked for; beside it come the small files that belong to a model.
_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt")
_SMALL = ("*.json", "*.txt", "*.model")


class Cached(Struct, frozen=True):
    """What a ``hf://`` word means on this disk."""

    path: Path
    home: Path  #: the snapshot
    place: str  #: the snapshot as a URL, with its commit


def parse(url: str) -> tuple[str, str | None, str]:
    """Repository, revision, and the path in it.

    >>> parse("hf://owner/repo@main/model.safetensors"), parse("hf://owner/repo@refs%2Fpr%2F1"), parse("hf://gpt2")
    (('owner/repo', 'main', 'model.safetensors'), ('owner/repo', 'refs/pr/1', ''), ('gpt2', None, ''))
    """
    match = _REPO.fullmatch(url.partition("://")[2])
    path = match[3] or "" if match else ""
    if match is None or not all(is_plain(part) for part in path.split("/") if path):
        raise UsageError(Problem("CK107", "want hf://owner/repo, with @revision and /path where they matter", where=printable(url)))
    revision = match[2] or match[5]
    return match[1] or match[4], unquote(revision) if revision else None, path


def cached(url: str, settings: Settings) -> Cached:
    """The snapshot, or the file in it, that the cache holds; with ``online`` it is fetched first.

    Raises :class:`~ckptconv.errors.InputError` CK310 where the cache does not hold it, :class:`~ckptconv.errors.OutputError` CK505 where
    huggingface_hub is not installed.
    """
    repo, revision, path = parse(url)
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError:
        raise OutputError(
            Problem("CK505", "hf:// needs the package huggingface_hub", where=printable(url), try_="pip install 'ckptconv[hub]'")
        ) from None
    if settings.online and constants.HF_HUB_OFFLINE:
        raise UsageError(
            Problem("CK107", "--online was given, and HF_HUB_OFFLINE is set", where=printable(url), try_="unset HF_HUB_OFFLINE")
        )
    try:
        if settings.online:
            snapshot = _fetched(repo, revision, path)
        else:
            snapshot = Path(huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True))
    except Exception as error:
        raise _not_there(url, settings, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from None
    found = snapshot / path if path else snapshot
    if not found.exists():
        raise _not_there(url, settings, f"the cache holds the revision {snapshot.name[:12]}, without this file")
    return Cached(found, snapshot, f"hf://{repo}@{snapshot.name}")


def _fetched(repo: str, revision: str | None, path: str) -> Path:
    """The snapshot with what ``path`` names, or with the first kind of weights that the repository has."""
    import huggingface_hub

    if path:
        wanted = [path, f"{path}/*", *_SMALL]
    else:
        names = huggingface_hub.HfApi().list_repo_files(repo, revision=revision)
        kind = next((each for each in _WEIGHTS if any(name.endswith(each[1:]) and "/" not in name for name in names)), _WEIGHTS[0])
        wanted = [kind, *_SMALL]
    return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=wanted))


def _not_there(url: str, settings: Settings, found: str) -> InputError:
    if settings.online:
        return InputError(
            Problem(
                "CK310",
                "the hub did not give the model",
                where=printable(url),
                found=printable(found),
                try_="look at the name, and at `hf auth whoami`",
            )
        )
    return InputError(
        Problem("CK310", "the Hugging Face cache does not hold it, and the network is used only when it is asked for", where=printable(url),
                found=printable(found), try_="--online, or first: hf download OWNER/REPO")
    )  # fmt: skip
