"""Which bytes of a file are there: all of them, unless the file is a placeholder for a remote one.

The one place where readers and placeholders meet. Readers of files ask here before they read; for a local file that is one look into an
empty table.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

Range = tuple[int, int]  #: offset and length, in bytes
LOOK = 64 << 10  #: bytes of a file's start and end, where headers are, that come at once


class Keeper(Protocol):
    """Who knows what of one placeholder has arrived, and fetches the rest."""

    #: tells one version of the remote file from another
    version: int

    def arriving(self, offset: int, nbytes: int) -> Iterator[Range]:
        """The range piece by piece; each is there, and stays, until the next is asked for."""
        ...

    def keep(self) -> None:
        """Everything is fetched and stays."""
        ...

    def changed(self) -> bool:
        """True when the remote file is not any more what it was."""
        ...

    def announce(self, ranges: Sequence[tuple[int, int, int]], *, once: bool) -> None:
        """Ranges that will be read, each as (rank, offset, length): those of low rank first. ``once``: headers, between other bytes."""
        ...


_keepers: dict[tuple[int, int], Keeper] = {}  # by device and inode of the placeholder


def watch(path: Path, keeper: Keeper) -> tuple[int, int]:
    """``path`` is a placeholder from now on. Gives what :func:`forget` takes."""
    status = os.stat(path)
    _keepers[status.st_dev, status.st_ino] = keeper
    return status.st_dev, status.st_ino


def forget(key: tuple[int, int]) -> None:
    """The placeholder is gone."""
    _keepers.pop(key, None)


def keeper_of(file: int | Path) -> Keeper | None:
    """Who keeps an open file, or the file of a path; None for one that is here as a whole, or not there at all."""
    if not _keepers:
        return None
    try:
        status = os.stat(file)
    except OSError:
        return None
    return _keepers.get((status.st_dev, status.st_ino))


def version_of(status: os.stat_result) -> int | None:
    """What a placeholder's version is told by, in place of the time when it was last written to."""
    keeper = _keepers.get((status.st_dev, status.st_ino)) if _keepers else None
    return None if keeper is None else keeper.version


def arriving(descriptor: int, offset: int, nbytes: int) -> Iterable[Range]:
    """The range of an open file in pieces that can be read, each until the next is asked for. Of a local file that is the range itself.

    Raises :class:`~ckptconv.errors.InputError` for what the store does not give.
    """
    keeper = keeper_of(descriptor)
    return ((offset, nbytes),) if keeper is None else keeper.arriving(offset, nbytes)


def bring(path: Path) -> Path:
    """The path of a file that somebody will read by himself: all of it is there from now on."""
    keeper = keeper_of(path)
    if keeper is not None:
        keeper.keep()
    return path


def announce(ranges: Iterable[tuple[int | Path, int, int]], *, once: bool = False) -> None:
    """What will be read soon, as (file, offset, length), in this order: many requests can then be in flight.

    ``once`` says that these are small pieces between bytes that are announced later, or never read.
    """
    if not _keepers:
        return
    keepers: dict[int | Path, Keeper | None] = {}
    by_keeper: dict[int, tuple[Keeper, list[tuple[int, int, int]]]] = {}
    for rank, (file, offset, nbytes) in enumerate(ranges):
        if file not in keepers:
            keepers[file] = keeper_of(file)
        keeper = keepers[file]
        if keeper is not None and nbytes:
            by_keeper.setdefault(id(keeper), (keeper, []))[1].append((rank, offset, nbytes))
    for keeper, found in by_keeper.values():
        keeper.announce(found, once=once)


def look_into(paths: Iterable[Path]) -> None:
    """Files whose headers will be read, one after the other: from a store they come many at a time."""
    if not _keepers:
        return
    ends = []
    for path in paths:
        ends.append((path, 0, LOOK))
        if path.suffix != ".safetensors":  # the directory of a zip stands at its end
            ends.append((path, max(0, path.stat().st_size - LOOK), LOOK))
    announce(ends, once=True)


def changed(paths: Iterable[Path]) -> Path | None:
    """The first of these whose remote file is not what it was."""
    if not _keepers:
        return None
    for path in paths:
        keeper = keeper_of(path)
        if keeper is not None and keeper.changed():
            return path
    return None
