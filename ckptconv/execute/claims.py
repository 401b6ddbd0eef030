"""Who does which task: a file each that only one can create, kept young while its owner lives.

A claim is a promise, not a lock. Where a network shows an old time, or an owner is slow and another takes over, a task is done twice;
that costs time, and the bytes are the same. Times are those of the filesystem, so that the clocks of machines need not agree.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from ckptconv.errors import OutputError, Problem, printable

LEASE_SECONDS = 120.0  #: network filesystems may show times that are up to a minute old
MAX_CLAIM = 4096  #: bytes
_BEATS = 4  #: in a lease


class Owner(Struct, frozen=True):
    """A process: where it runs, and as which of that place's."""

    host: str
    place: str  #: the machine's present boot, and whose process ids count there
    pid: int
    started: str  #: of two processes with one id, tells which

    @staticmethod
    def me() -> Owner:
        """This process."""
        return Owner(socket.gethostname(), _place(), os.getpid(), _started(os.getpid()))

    def is_dead(self) -> bool:
        """True where it certainly runs no more: only processes of the same place can be asked for."""
        return bool(self.place and self.started) and self.place == _place() and _started(self.pid) != self.started

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"


class Claimed(Struct, frozen=True):
    """A claim as it was found."""

    state: Literal["claimed", "stale"]
    owner: Owner | None  #: None where the file does not tell (yet)
    seconds: float  #: since it was last renewed
    inode: int
    about: Mapping[str, str]  #: what its owner works by: order, versions


class Claims:
    """The claims in a folder. ``about`` says what this process works by; a claim that says something else is refused by name."""

    def __init__(self, folder: Path, about: Mapping[str, str], lease: float = LEASE_SECONDS) -> None:
        self.folder, self.about, self.lease = folder, dict(about), lease
        self._token = f"{os.getpid()}-{secrets.token_hex(4)}"
        self.owner = Owner.me()
        self._clock: tuple[float, float] | None = None  # our own clock and the filesystem's, at one moment

    @contextmanager
    def take(self, name: str) -> Iterator[bool]:
        """Claims ``name`` until the block ends, renewed meanwhile. False where a living other has it.

        Raises :class:`~ckptconv.errors.OutputError` CK507 where the other works by another order or version.
        """
        descriptor = self._taken(name)
        if descriptor is None:
            yield False
            return
        stop = threading.Event()
        beat = threading.Thread(target=_renew, args=(descriptor, self.lease / _BEATS, stop), name="ckptconv-claim", daemon=True)
        try:
            beat.start()
            yield True
        finally:
            stop.set()
            if beat.ident is not None:
                beat.join()
            path = self.folder / name
            with suppress(OSError):
                if os.stat(path).st_ino == os.fstat(descriptor).st_ino:  # nobody took it over
                    os.unlink(path)
            os.close(descriptor)

    def look(self, name: str) -> Claimed | None:
        """The claim as it stands; None where there is none."""
        path = self.folder / name
        try:
            with path.open("rb") as stream:
                status, raw = os.fstat(stream.fileno()), stream.read(MAX_CLAIM)
        except FileNotFoundError:
            return None
        owner, about = _parsed(raw)
        seconds = self._now() - status.st_mtime
        stale = seconds > self.lease or (owner is not None and owner.is_dead())
        return Claimed("stale" if stale else "claimed", owner, seconds, status.st_ino, about)

    def _taken(self, name: str) -> int | None:
        path = self.folder / name
        for _ in range(3):  # what is looked at may be gone a moment later
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            except FileExistsError:
                found = self.look(name)
                if found is None:
                    continue
                self._refuse_others(name, found)
                return self._taken_over(path, found) if found.state == "stale" else None
            return self._signed(descriptor)
        return None

    def _taken_over(self, path: Path, found: Claimed) -> int | None:
        """A claim of our own in the place of a stale one. Two who do this at once both work: see above."""
        mine = path.with_name(f".{path.name}-{self._token}")
        descriptor = self._signed(os.open(mine, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666))
        try:
            if os.stat(path).st_ino == found.inode:
                os.rename(mine, path)
                if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
        except FileNotFoundError:  # done and gone meanwhile
            pass
        except BaseException:
            os.close(descriptor)
            raise
        with suppress(FileNotFoundError):
            os.unlink(mine)
        os.close(descriptor)
        return None

    def _signed(self, descriptor: int) -> int:
        try:
            owner = {"host": self.owner.host, "place": self.owner.place, "pid": self.owner.pid, "started": self.owner.started}
            os.pwrite(descriptor, json.dumps({"ckptconv_claim": 1, "owner": owner, "time": time.time(), "about": self.about}).encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _refuse_others(self, name: str, found: Claimed) -> None:
        for word, value in self.about.items():
            other = found.about.get(word)
            if other is not None and other != value:
                what = f"task {name.lstrip('0') or '0'} is claimed by {printable(found.owner)}, which works by another {word}"
                raise OutputError(
                    Problem("CK507", what, where=printable(self.folder.parent), found=f"{printable(other)}, here {printable(value)}",
                            try_="the same ckptconv, torch and plan for all workers")
                )  # fmt: skip

    def _now(self) -> float:
        """The filesystem's time: that of a file which was written a moment ago, and what passed since."""
        if self._clock is None or time.monotonic() - self._clock[0] > self.lease / _BEATS:
            path = self.folder / f".clock-{self._token}"
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                os.pwrite(descriptor, b".", 0)
                os.utime(descriptor)
                self._clock = time.monotonic(), os.fstat(descriptor).st_mtime
            finally:
                os.close(descriptor)
                with suppress(OSError):
                    os.unlink(path)
        return self._clock[1] + time.monotonic() - self._clock[0]


def _renew(descriptor: int, seconds: float, stop: threading.Event) -> None:
    while not stop.wait(seconds):
        with suppress(OSError):  # a network that is away for a moment; at worst the task is done twice
            os.utime(descriptor)


def _parsed(raw: bytes) -> tuple[Owner | None, Mapping[str, str]]:
    """Owner and order of a claim; a file that tells neither is no more than old or young."""
    try:
        data: Any = json.loads(raw)
        owner, about = data["owner"], data["about"]
        found = Owner(owner["host"], owner["place"], owner["pid"], owner["started"])
        texts = (found.host, found.place, found.started, *about, *about.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, {}
    if type(found.pid) is not int or not 0 < found.pid < 1 << 31 or not all(isinstance(text, str) for text in texts):
        return None, {}
    return found, about


def _place() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: only the lease tells
        return ""


def _started(pid: int) -> str:
    """When a process of this place was started, in the kernel's ticks; empty where there is none, or the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return fields[19] if len(fields) > 19 and fields[0] not in ("Z", "X") else ""
