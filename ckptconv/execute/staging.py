"""Outputs are made beside their place and renamed into it when they are whole: either all of it stands there, or what was there before."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import shlex
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import xxhash

from ckptconv.errors import CkptconvError, OutputError, Problem, UsageError, printable
from ckptconv.execute.renaming import exchange, rename_new

PUBLISHING, WAY_ON = "publishing", "way-on"  #: files of a work folder
_MARK = ".ckptconv-"
_SUFFIX = ".partial"
_ASIDE = ".old"
_LONGEST = 180  #: bytes of a destination's name that a staging's name can repeat; filesystems end at 255
_REASONS = {errno.ENOSPC: "no space left on the disk"}
_HINTS = {
    errno.ENOSPC: "free some space, or write elsewhere", errno.EDQUOT: "your quota is used up: free some of it, or write elsewhere",
    errno.EFBIG: "a file may not grow that large here: see ulimit -f, or write elsewhere", errno.EACCES: "write where you may",
    errno.EPERM: "write where you may", errno.EROFS: "write elsewhere: the filesystem is read-only",
    errno.EIO: "the disk or the network behind it failed: write elsewhere", errno.EBUSY: "a mount point cannot be replaced: another name",
    errno.EMFILE: "ulimit -n 1024", errno.ENAMETOOLONG: "a shorter name",
}  # fmt: skip


def refuse_overlap(destination: Path, sources: Sequence[Path]) -> None:
    """Raises :class:`~ckptconv.errors.UsageError` CK502 where writing ``destination`` would touch a source: the same file by any name, a
    place inside a source folder, or a folder around the source."""
    for source in sources:
        where = printable(destination)
        with suppress(OSError):
            if os.path.exists(destination) and os.path.samefile(destination, source):
                raise UsageError(
                    Problem("CK502", "the output is the source", where=where, try_="another name; sources are never overwritten")
                )
        real, real_source = Path(os.path.realpath(destination)), Path(os.path.realpath(source))
        if source.is_dir() and real_source in real.parents:
            raise UsageError(Problem("CK502", "the output lies inside the source folder", where=where, try_="a place outside of it"))
        if real in real_source.parents and os.path.exists(destination):
            raise UsageError(Problem("CK502", "the source lies inside the output folder", where=where, try_="another folder"))


class Place:
    """Where an output is made, and the way from there to its destination. ``path`` is the file or folder that will be renamed."""

    def __init__(self, destination: Path, path: Path, *, is_folder: bool, force: bool) -> None:
        self.destination, self.path, self.is_folder, self.force = Path(os.path.abspath(destination)), path, is_folder, force
        self._in_place = False

    @property
    def folder(self) -> Path:
        """Where the staged files are."""
        return self.path if self.is_folder else self.path.parent

    def path_of(self, name: str) -> Path:
        """Where the file that will be called ``name`` is staged."""
        return self.path / name if self.is_folder else self.path

    @property
    def shown(self) -> str:
        """The destination, for messages."""
        return printable(self.destination)

    def refuse_what_is_there(self) -> None:
        """Raises :class:`~ckptconv.errors.OutputError` where something stands at the destination that may not be replaced."""
        if self.destination.is_symlink():
            raise OutputError(
                Problem(
                    "CK503", "the output is a symbolic link, and links are not followed", where=self.shown, try_="name the link's target"
                )
            )
        if not self.destination.exists():
            return
        if not self.force:
            raise OutputError(
                Problem(
                    "CK501",
                    "the output exists already, and nothing is ever overwritten unasked",
                    where=self.shown,
                    try_="--force, or another name",
                )
            )
        is_file = self.destination.is_file()
        if self.destination.is_dir() != self.is_folder or not (is_file or self.is_folder):
            what = "file" if is_file else "folder" if self.destination.is_dir() else "device or pipe"
            raise OutputError(Problem("CK503", f"a {what} stands where the output goes", where=self.shown, try_="another name"))

    def clear(self) -> None:
        """Refuses where a living run makes the same output; removes what a dead one left, and puts back what it had moved aside."""
        pattern = f"{glob.escape(_stem(self.destination.name))}[0-9]*-????????{_SUFFIX}"
        stagings = {path: _state(path) for path in sorted(self.destination.parent.glob(pattern))}
        for path, state in stagings.items():
            if state == "held":
                raise OutputError(
                    Problem("CK506", "another run is writing this output", where=self.shown, found=printable(path.name),
                            try_="wait until it is done, or another name")
                )  # fmt: skip
        for aside in sorted(self.destination.parent.glob(pattern + _ASIDE)):
            if os.path.lexists(self.destination):
                _delete(aside)
            else:
                rename_new(aside, self.destination)
        for path, state in stagings.items():
            if state == "free":
                _delete(path)

    def refuse_too_much(self, nbytes: int) -> None:
        """Raises :class:`~ckptconv.errors.OutputError` where the disk has no room for so many bytes more."""
        room = os.statvfs(self.destination.parent)
        free = room.f_frsize * (room.f_bfree if os.geteuid() == 0 else room.f_bavail)
        if room.f_blocks and nbytes > free:  # a filesystem of no blocks is one that does not tell
            raise OutputError(
                Problem("CK503", f"the output cannot be written: {_REASONS[errno.ENOSPC]}", where=self.shown,
                        found=f"{nbytes:,} bytes to write, {free:,} free", try_=_HINTS[errno.ENOSPC])
            )  # fmt: skip

    def publish(self, *, sync: bool = True) -> None:
        """Makes the output durable (``sync``) and renames it into place."""
        with self.explained():
            self._keep_modes()
            if sync:
                for path in [*self.path.rglob("*"), self.path] if self.is_folder else [self.path]:
                    fsync(path)
            self._rename()
            self._in_place = True
            if sync:
                fsync(self.destination.parent)

    def _rename(self) -> None:
        if not self.force or not self.destination.exists():
            rename_new(self.path, self.destination)
        elif not self.is_folder:
            os.replace(self.path, self.destination)
        elif not exchange(self.path, self.destination):
            # Two steps where the filesystem has no exchange. Who is killed between them leaves both: the next run puts the old one back.
            aside = temporary_beside(self.destination, _ASIDE)
            try:
                os.rename(self.destination, aside)
                os.rename(self.path, self.destination)
            finally:
                if os.path.lexists(aside):
                    os.rename(aside, self.path if os.path.lexists(self.destination) else self.destination)

    def _keep_modes(self) -> None:
        """What existed keeps its mode under --force; new files follow the umask, as they were created."""
        if not self.force or not self.destination.exists():
            return
        for path in [*self.path.rglob("*"), self.path] if self.is_folder else [self.path]:
            old = self.destination / path.relative_to(self.path)
            if old.exists():
                os.chmod(path, stat.S_IMODE(old.stat().st_mode))

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Errors of the system inside the block come as :class:`~ckptconv.errors.OutputError`."""
        try:
            yield
        except OSError as error:
            raise self.problem(error) from error

    def problem(self, error: OSError) -> OutputError:
        """What an error of the system means for the output."""
        if error.errno == errno.EEXIST:
            return OutputError(
                Problem("CK501", "the output appeared while it was being made", where=self.shown, try_="--force, or another name")
            )
        reason = _REASONS.get(error.errno or 0) or error.strerror or str(error)
        what = "the output is in place, but the disk did not confirm it" if self._in_place else "the output cannot be written"
        return OutputError(Problem("CK503", f"{what}: {reason}", where=self.shown, try_=_HINTS.get(error.errno or 0, "write elsewhere")))


class Staging(Place):
    """A hidden file or folder beside the destination, for the time of one conversion. Leaving it removes what was not published.

    Of two runs to one destination the second is refused. ``nbytes`` is what will be written: a disk without that much room is refused
    before anything is. What a killed run left behind is cleaned up, and what it had moved aside is put back.
    """

    def __init__(self, destination: Path, *, is_folder: bool, force: bool, nbytes: int = 0) -> None:
        super().__init__(destination, temporary_beside(Path(os.path.abspath(destination))), is_folder=is_folder, force=force)
        self.nbytes = nbytes
        self._lock = -1

    def __enter__(self) -> Staging:
        parent = self.destination.parent
        if not parent.is_dir():
            raise OutputError(
                Problem("CK503", f"the folder {printable(parent)} does not exist", where=self.shown, try_=f"mkdir -p {printable(parent)}")
            )
        try:
            with self.explained(), turn(parent):
                self.clear()
                self._refuse_work()
                self.refuse_what_is_there()
                self.refuse_too_much(self.nbytes)
                # What replaces something private is private from its first byte on.
                if self.is_folder:
                    self.path.mkdir(0o700 if self.destination.exists() else 0o777)
                else:
                    mode = 0o600 if self.destination.exists() else 0o666
                    os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))
                # Held until the end: a staging that nobody holds is a dead run's, and the next one may take it away.
                self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                with suppress(OSError):  # a filesystem without locks
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:  # Ctrl-C between two of these lines, say: nobody would call __exit__
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._remove()
        if isinstance(error, OSError) and not isinstance(error, CkptconvError):
            raise self.problem(error) from error
        if error is None and os.path.lexists(self.path):
            what = "the output is in place, but what it replaced cannot be removed"
            raise OutputError(
                Problem("CK503", what, where=self.shown, found=printable(self.path), try_=f"rm -r {printable(self.path.name)}")
            )

    def _remove(self) -> None:
        """The staged files, or, once they were exchanged for them, those that stood at the destination."""
        try:
            _delete(self.path)
        except BaseException:  # a second Ctrl-C must not keep the first from cleaning up
            _delete(self.path)
            raise
        finally:
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    def _refuse_work(self) -> None:
        """Raises :class:`~ckptconv.errors.OutputError` CK506 where this output is being made in tasks; whoever works on it may be away."""
        work = work_beside(self.destination)
        if not os.path.lexists(work):
            return
        if is_published(work):  # who published it was killed before it could clean up
            remove_work(work)
            return
        raise OutputError(
            Problem("CK506", "this output is being made in tasks", where=self.shown, found=printable(work.name),
                    try_=f"{_way_on(work)}, or rm -r {shlex.quote(printable(work))}")
        )  # fmt: skip


def temporary_beside(destination: Path, end: str = "") -> Path:
    """A name beside ``destination`` that nobody has: the next run to it takes away what it finds there, if nobody holds it."""
    return destination.parent / f"{_stem(destination.name)}{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}{end}"


def work_beside(destination: Path) -> Path:
    """The folder in which a conversion in tasks is made: it outlives whoever works in it."""
    return destination.parent / f"{_stem(destination.name)}work"


def is_published(work: Path) -> bool:
    """True for a work folder whose output was renamed into place already: what lies there now, if anything, was replaced by it."""
    try:
        inode, name = (work / PUBLISHING).read_text(encoding="utf-8").split("\n")[:2]
    except (OSError, ValueError):
        return False
    try:
        return os.lstat(work / name).st_ino != int(inode)
    except (OSError, ValueError):
        return not os.path.lexists(work / name)


def remove_work(work: Path) -> None:
    """Takes a work folder away. Its name is free at once; what is left where this is killed, the next run to the destination removes."""
    trash = work.with_name(f"{work.name.removesuffix('work')}{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}")
    try:
        os.rename(work, trash)
    except FileNotFoundError:  # someone else did
        return
    _delete(trash)


def _way_on(work: Path) -> str:
    """The command that goes on with the work, as whoever began it noted."""
    try:
        with (work / WAY_ON).open(encoding="utf-8") as stream:
            return printable(stream.readline(4096).strip(), 400)
    except (OSError, ValueError):
        return "ckptconv run --resume"


def _stem(name: str) -> str:
    """How the names of a destination's stagings begin."""
    encoded = os.fsencode(name)
    return f".{name if len(encoded) <= _LONGEST else xxhash.xxh3_64_hexdigest(encoded)}{_MARK}"


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def fsync(path: Path) -> None:
    """Waits until the disk has a file or folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """One run at a time looks for others and makes its own staging: between the two, nobody comes in. Held for milliseconds."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # a folder to write into but not to list
        yield
        return
    try:
        with suppress(OSError):  # a filesystem without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _state(path: Path) -> str:
    """Of a staging that was found: ``held`` by a living run, ``free``, or ``unknown`` where locks cannot tell; that one is left alone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return "unknown"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    except OSError:  # a filesystem without locks
        return "unknown"
    finally:
        os.close(descriptor)
    return "free"
