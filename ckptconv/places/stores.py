"""Remote stores through fsspec: what lies where, ranges of bytes, and a sentence for everything that goes wrong."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from msgspec import Struct, field

from ckptconv.errors import CkptconvError, InputError, OutputError, Problem, UsageError, named, printable
from ckptconv.places.urls import protocol_of, secrets_of

TRIES = 5
WAIT = 0.2  #: seconds before the second try; twice as long before each further one
#: What tells one version of an object from another, strongest first. Stores call them by these names, in any spelling.
_TAGS = (
    "etag",
    "md5hash",
    "contentmd5",
    "md5",
    "checksum",
    "generation",
    "versionid",
    "uid",
    "mtime",
    "lastmodified",
    "updated",
    "created",
)
_GONE, _FORBIDDEN = frozenset({404, 410}), frozenset({401, 403})
_PACKAGES: Mapping[str, str] = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
}
#: What clients call the failures of a network that are no OSError of Python's.
_PASSING = re.compile("Timeout|Connect|Payload|Incomplete|Reset|Throttl|SlowDown")
T = TypeVar("T")


class Entry(Struct, frozen=True):
    """One thing in a store."""

    name: str  #: its path in the store
    is_folder: bool
    nbytes: int | None
    tags: Mapping[str, str] = field(default_factory=dict)

    def is_version_of(self, other: Entry) -> bool:
        """False where the size or the strongest tag that both have says that something was written in between."""
        if self.nbytes != other.nbytes:
            return False
        tag = next((tag for tag in _TAGS if tag in self.tags and tag in other.tags), None)
        return tag is None or self.tags[tag] == other.tags[tag]


class Store:
    """One filesystem of fsspec, as the URL gives it. Its methods may be called from any thread."""

    def __init__(self, url: str) -> None:
        self.protocol = protocol_of(url) or ""
        self._secrets = secrets_of(url)
        try:
            import fsspec
        except ImportError:
            raise _missing(url, "fsspec", "pip install 'ckptconv[remote]'") from None
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            package = _PACKAGES.get(self.protocol)
            raise _missing(url, package or str(error), f"pip install {package}" if package else "") from None
        except ValueError as error:
            raise UsageError(Problem("CK107", "the URL is not understood", where=printable(url), found=printable(error))) from None
        except Exception as error:
            raise self.unanswered(error, url, "the store cannot be opened") from None

    def url_of(self, path: str) -> str:
        """The URL of a path of this store."""
        return str(self.fs.unstrip_protocol(path))

    def entry(self, path: str) -> Entry | None:
        """What is at ``path``; None where nothing is. Never from a cache."""
        try:
            return self.asked(lambda: self._entry(self._fresh(path)), self.url_of(path), "the store does not say what is there")
        except FileNotFoundError:
            return None

    def _fresh(self, path: str) -> Mapping[str, Any]:
        self.fs.invalidate_cache(self.fs._parent(path))
        self.fs.invalidate_cache(path)
        found: Mapping[str, Any] = self.fs.info(path)
        return found

    def listing(self, path: str) -> list[Entry]:
        """What lies in a folder, by name; nothing where there is none."""
        self.fs.invalidate_cache(path)
        try:
            found = self.asked(lambda: self.fs.ls(path, detail=True), self.url_of(path), "the store does not say what is in the folder")
        except FileNotFoundError:
            return []
        entries = sorted((self._entry(each) for each in found), key=lambda entry: entry.name)
        return [entry for entry in entries if entry.name.rstrip("/") != path.rstrip("/")]  # a folder may list itself

    @staticmethod
    def _entry(info: Mapping[str, Any]) -> Entry:
        tags = {key.lower().replace("-", "").replace("_", ""): str(value) for key, value in info.items() if value not in (None, "")}
        size = info.get("size")
        nbytes = size if isinstance(size, int) and size >= 0 else None
        return Entry(str(info["name"]), info.get("type") == "directory", nbytes, {tag: tags[tag] for tag in _TAGS if tag in tags})

    def read(self, path: str, begin: int, end: int) -> bytes:
        """The bytes of a range, all of them. Raises ``FileNotFoundError`` where the object is gone."""

        def ask() -> bytes:
            found: bytes = self.fs.cat_file(path, start=begin, end=end)
            if len(found) != end - begin:
                raise _Short(f"{len(found):,} of {end - begin:,} bytes came")
            return found

        return self.asked(ask, self.url_of(path), "the store did not give the bytes", f"bytes {begin:,} to {end:,}: ")

    def asked(self, request: Callable[[], T], url: str, what: str, found: str = "", *, output: bool = False) -> T:
        """The answer to a request, which is made again while there is hope.

        Raises ``FileNotFoundError`` for what is not there, ``FileExistsError`` for what should not be, and everything else as
        :class:`~ckptconv.errors.InputError` (CK310, CK313), or OutputError (CK503).
        """
        for tried in range(1, TRIES + 1):
            try:
                return request()
            except (FileNotFoundError, FileExistsError, CkptconvError):
                raise
            except Exception as error:
                status = status_of(error)
                if status in _GONE:
                    raise FileNotFoundError(url) from None
                if status == 412:
                    raise FileExistsError(url) from None
                if tried == TRIES or not is_passing(error, status):
                    raise self.unanswered(error, url, what, found, tried, output=output) from None
            time.sleep(WAIT * 2 ** (tried - 1) * (0.5 + random.random()))
        raise AssertionError("the last try returns or raises")

    def unanswered(self, error: Exception, url: str, what: str, found: str = "", tried: int = 1, *, output: bool = False) -> CkptconvError:
        """The sentence for an answer that was none."""
        status = status_of(error)
        said = printable(self._without_secrets(str(error)), 150)
        if not isinstance(error, (_Short, OSError)) or not said:
            said = f"{type(error).__name__}: {said}" if said else type(error).__name__
        reason = found + said + (f" (status {status})" if status else "")
        if _is_forbidden(error, status):
            what, code = f"{what}: access is denied", "CK310"
            hint = "look at the credentials that the store's client finds, and at what they may do"
        elif isinstance(error, NotImplementedError):
            what, code, hint = f"{what}: this kind of store cannot do it", "CK310", "copy the file to a disk first"
        else:
            what, code = what + (f", after {tried} tries" if tried > 1 else ""), "CK313"
            hint = "run again later; look at the network and at the store's endpoint"
        if output:
            return OutputError(Problem("CK503", what, where=printable(url), found=reason, try_=hint))
        return InputError(Problem(code, what, where=printable(url), found=reason, try_=hint))

    def _without_secrets(self, text: str) -> str:
        """What a client says, without what the URL gave it to log in: it may quote parts of the URL."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return named(text)


class _Short(Exception):  # noqa: N818
    """An answer with other bytes than were asked for."""


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status in an exception of some client, or in what it was made from."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, Mapping):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = getattr(error, "status", None) or getattr(error, "status_code", None) or getattr(response, "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def is_passing(error: BaseException, status: int | None) -> bool:
    """True where the same request may well be answered a moment later."""
    if status is not None:
        return status >= 500 or status in (408, 409, 425, 429)
    if isinstance(error, (PermissionError, IsADirectoryError, NotADirectoryError)) or _is_forbidden(error, status):
        return False
    return isinstance(error, (OSError, EOFError, TimeoutError, _Short)) or _PASSING.search(type(error).__name__) is not None


def _is_forbidden(error: BaseException, status: int | None) -> bool:
    return isinstance(error, PermissionError) or status in _FORBIDDEN or "Credential" in type(error).__name__


def _missing(url: str, package: str, hint: str) -> OutputError:
    return OutputError(Problem("CK505", f"{protocol_of(url)}:// needs the package {printable(package)}", where=printable(url), try_=hint))
