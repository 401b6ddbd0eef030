"""A remote checkpoint as a folder of placeholders."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from ckptconv.errors import InputError, Problem, UsageError, printable
from ckptconv.places.fetching import IN_FLIGHT, Arrivals, Placeholder
from ckptconv.places.stores import Entry, Store
from ckptconv.places.urls import is_plain, name_of

MAX_FILES = 100_000  #: of a folder (docs/limits.md)
_MAX_INDEX = 50_000_000
_INDEX = ".index.json"


class Mirror:
    """The placeholders of one URL, in ``folder``. ``path`` is what the URL became: a file or a folder."""

    def __init__(self, url: str, folder: Path, arrivals: Arrivals) -> None:
        self.url, self.folder, self._arrivals = url, folder, arrivals
        self.placeholders: dict[Path, Placeholder] = {}
        self._looked_for: set[str] = set()
        self._store = store = Store(url)
        web = store.protocol in ("http", "https")
        root = store.root.rstrip("/") if not web else store.root
        entry = store.entry(root) if not (web and root.endswith("/")) else None
        if web and entry is None and root.endswith("/"):
            raise UsageError(
                Problem("CK107", "web servers do not list folders", where=printable(url), try_="name the file, or the index of the shards")
            )
        if entry is None:
            raise InputError(Problem("CK310", "the source cannot be opened: nothing is there", where=printable(url)))
        if entry.is_folder:
            self.path, self.home, self.home_url = folder, root, url.rstrip("/")
            self._mirror_folder(root, folder, deep=True)
            return
        self.path = folder / name_of(url)
        self.home, self.home_url = root.partition("?")[0].rpartition("/")[0], _parent(url)
        if self.path.name.endswith(_INDEX) and not web:
            self._mirror_folder(self.home, folder, deep=False)
        if self.path not in self.placeholders:
            self._place(self.path, entry, url)
        if self.path.name.endswith(_INDEX) and web:
            self.beside(self._shards())

    def beside(self, names: Iterable[str]) -> None:
        """Placeholders for files in the folder of a single file, where there are such files."""
        wanted = [name for name in dict.fromkeys(names) if name not in self._looked_for and self.folder / name not in self.placeholders]
        self._looked_for.update(wanted)
        if self.path == self.folder or not wanted:
            return
        with ThreadPoolExecutor(min(len(wanted), IN_FLIGHT)) as pool:
            for name, entry in zip(wanted, pool.map(lambda name: self._store.entry(f"{self.home}/{name}"), wanted), strict=True):
                if entry is not None and not entry.is_folder:
                    self._place(self.folder / name, entry, f"{self.home_url}/{name}")

    def _shards(self) -> Sequence[str]:
        """The files that an index names, as far as they are plain names; its reader says what is wrong with the others."""
        placeholder = self.placeholders[self.path]
        if placeholder.nbytes > _MAX_INDEX:
            return ()
        placeholder.keep()
        try:
            names = json.loads(self.path.read_bytes())["weight_map"].values()
            found = list(dict.fromkeys(name for name in names if isinstance(name, str) and is_plain(name)))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return ()
        return found[:MAX_FILES]

    def _mirror_folder(self, root: str, folder: Path, *, deep: bool) -> None:
        """What lies in the folder, and where it is ``deep`` in the folders of it: no checkpoint lies deeper."""
        for entry in self._store.listing(root):
            name = entry.name.rstrip("/").rpartition("/")[2]
            if not is_plain(name) or entry.name.rstrip("/") != f"{root}/{name}":
                continue  # no name of a file here: nothing can ask for it
            if entry.is_folder:
                if deep:
                    (folder / name).mkdir()
                    self._mirror_folder(f"{root}/{name}", folder / name, deep=False)
            else:
                self._place(folder / name, entry, f"{self.home_url}/{(folder / name).relative_to(self.folder).as_posix()}")

    def _place(self, path: Path, entry: Entry, url: str) -> None:
        if entry.nbytes is None:
            raise InputError(
                Problem("CK313", "the store does not say how long the file is", where=printable(url), try_="copy the file to a disk first")
            )
        if len(self.placeholders) == MAX_FILES:
            raise InputError(
                Problem("CK308", f"the folder has more than {MAX_FILES:,} files", where=printable(self.url), try_="name the index")
            )
        try:
            self.placeholders[path] = Placeholder(
                path, url, entry.nbytes, self._arrivals, partial(self._read, entry, url), partial(self._is_same, entry)
            )
        except OSError as error:
            if error.errno == errno.EEXIST:
                return  # a filesystem that takes both names for one: the first stays
            what = f"the scratch folder cannot hold a file of {entry.nbytes:,} bytes: {error.strerror}"
            raise InputError(Problem("CK310", what, where=printable(url), try_="--scratch DIR")) from None

    def _read(self, entry: Entry, url: str, begin: int, end: int) -> bytes:
        """The bytes of a range, if the object is what it was when it was first looked at."""
        try:
            return self._store.read(entry.name, begin, end)
        except FileNotFoundError:
            raise _changed(url, "it is not there any more") from None
        except InputError:
            if not self._is_same(entry):
                raise _changed(url) from None
            raise

    def _is_same(self, entry: Entry) -> bool:
        now = self._store.entry(entry.name)
        return now is not None and now.is_version_of(entry)


def changed(mirrors: Iterable[Mirror]) -> str | None:
    """The URL of the first file that is not what it was, of those of which something was read."""
    read = [each for mirror in mirrors for each in mirror.placeholders.values() if each.was_read]
    if not read:
        return None
    with ThreadPoolExecutor(min(len(read), IN_FLIGHT)) as pool:
        return next((each.url for each, is_changed in zip(read, pool.map(Placeholder.changed, read), strict=True) if is_changed), None)


def _changed(url: str, found: str = "") -> InputError:
    return InputError(
        Problem("CK311", "the file changed while it was read", where=printable(url), found=found, try_="run again once nobody writes to it")
    )


def _parent(url: str) -> str:
    return url.partition("?")[0].rstrip("/").rpartition("/")[0]


def free_nbytes(folder: Path) -> int:
    """What the disk of a folder can take."""
    room = os.statvfs(folder)
    return room.f_frsize * room.f_bavail
