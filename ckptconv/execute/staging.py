"""Outputs are made beside their place and renamed into it when they are whole: either all of it stands there, or what was there before."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from ckptconv.errors import CkptconvError, OutputError, Problem, UsageError, printable

_MARK = ".ckptconv-"
_SUFFIX = ".partial"


def refuse_overlap(destination: Path, sources: Sequence[Path]) -> None:
    """Raises :class:`~ckptconv.errors.UsageError` CK502 where writing ``destination`` would touch a source: the same file by any name, a
    place inside a source folder, or a folder around the source."""
    for source in sources:
        where = printable(destination)
        with suppress(OSError):
            if destination.exists() and os.path.samefile(destination, source):
                raise UsageError(
                    Problem("CK502", "the output is the source", where=where, try_="another name; sources are never overwritten")
                )
        real, real_source = Path(os.path.realpath(destination)), Path(os.path.realpath(source))
        if source.is_dir() and real_source in real.parents:
            raise UsageError(Problem("CK502", "the output lies inside the source folder", where=where, try_="a place outside of it"))
        if real in real_source.parents and destination.exists():
            raise UsageError(Problem("CK502", "the source lies inside the output folder", where=where, try_="another folder"))


class Staging:
    """A hidden file or folder beside the destination, for the time of one conversion. Leaving it without :meth:`publish` removes it."""

    def __init__(self, destination: Path, *, is_folder: bool, force: bool) -> None:
        self.destination, self.is_folder, self.force = Path(os.path.abspath(destination)), is_folder, force
        self._name = f".{self.destination.name}{_MARK}{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"
        self.path = self.destination.parent / self._name
        self._lock = -1
        self._published = False

    @property
    def folder(self) -> Path:
        """Where the staged files are."""
        return self.path if self.is_folder else self.path.parent

    def path_of(self, name: str) -> Path:
        """Where the file that will be called ``name`` is staged."""
        return self.path / name if self.is_folder else self.path

    def __enter__(self) -> Staging:
        self._refuse_what_is_there()
        parent = self.destination.parent
        if not parent.is_dir():
            raise OutputError(
                Problem("CK503", f"the folder {printable(parent)} does not exist", where=self._shown, try_=f"mkdir -p {printable(parent)}")
            )
        try:
            with self._explained():
                _remove_stale(parent, self.destination.name)
                if self.is_folder:
                    self.path.mkdir()
                else:
                    os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
                # Held until the end: a staging that nobody holds is a dead run's, and the next one may take it away.
                self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:  # Ctrl-C between two of these lines, say: nobody would call __exit__
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._remove()
        if isinstance(error, OSError) and not isinstance(error, CkptconvError):
            raise self._problem(error) from error

    def _remove(self) -> None:
        try:
            if not self._published:
                if self.is_folder:
                    shutil.rmtree(self.path, ignore_errors=True)
                else:
                    self.path.unlink(missing_ok=True)
        finally:
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    @property
    def _shown(self) -> str:
        return printable(self.destination)

    def _refuse_what_is_there(self) -> None:
        if self.destination.is_symlink():
            raise OutputError(
                Problem(
                    "CK503", "the output is a symbolic link, and links are not followed", where=self._shown, try_="name the link's target"
                )
            )
        if not self.destination.exists():
            return
        if not self.force:
            raise OutputError(
                Problem(
                    "CK501",
                    "the output exists already, and nothing is ever overwritten unasked",
                    where=self._shown,
                    try_="--force, or another name",
                )
            )
        if self.destination.is_dir() != self.is_folder:
            what = "folder" if self.destination.is_dir() else "file"
            raise OutputError(Problem("CK503", f"a {what} stands where the output goes", where=self._shown, try_="another name"))

    def publish(self, *, sync: bool = True) -> None:
        """Makes the output durable (``sync``) and renames it into place."""
        with self._explained():
            self._set_modes()
            if sync:
                for path in [*self.path.rglob("*"), self.path] if self.is_folder else [self.path]:
                    _fsync(path)
            self._rename()
            self._published = True
            if sync:
                _fsync(self.destination.parent)

    def _rename(self) -> None:
        if self.is_folder:
            self._rename_folder()
        elif self.force:
            os.replace(self.path, self.destination)
        else:
            # A link fails where a name exists: nothing that appeared meanwhile is overwritten.
            try:
                os.link(self.path, self.destination)
            except FileExistsError:
                raise
            except OSError:  # a filesystem without links
                if self.destination.exists():
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.destination)) from None
                os.rename(self.path, self.destination)
            else:
                self.path.unlink()

    def _rename_folder(self) -> None:
        if not self.destination.exists():
            os.rename(self.path, self.destination)
            return
        aside = self.destination.parent / f"{self._name}.old"
        os.rename(self.destination, aside)
        try:
            os.rename(self.path, self.destination)
        except OSError:
            os.rename(aside, self.destination)
            raise
        shutil.rmtree(aside, ignore_errors=True)

    def _set_modes(self) -> None:
        """An existing file's mode survives --force; new ones follow the umask, as they were created."""
        if not self.is_folder and self.force and self.destination.exists():
            os.chmod(self.path, stat.S_IMODE(self.destination.stat().st_mode))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._problem(error) from error

    def _problem(self, error: OSError) -> OutputError:
        if error.errno == errno.EEXIST:
            return OutputError(
                Problem("CK501", "the output appeared while it was being made", where=self._shown, try_="--force, or another name")
            )
        hint = {
            errno.ENOSPC: "free some space, or write elsewhere", errno.EDQUOT: "your quota is used up", errno.EFBIG: "a file may not grow that large here",
            errno.EACCES: "write where you may", errno.EROFS: "write elsewhere: the filesystem is read-only",
        }.get(error.errno or 0, "")  # fmt: skip
        reason = "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror or str(error)
        return OutputError(Problem("CK503", f"the output cannot be written: {reason}", where=self._shown, try_=hint))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale(parent: Path, name: str) -> None:
    """What a run that was killed left beside the same destination, unless its owner still holds it."""
    for path in parent.glob(f".{glob_escape(name)}{_MARK}*{_SUFFIX}"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def glob_escape(text: str) -> str:
    """``text`` with what a glob would read as a wildcard taken literally."""
    import glob

    return glob.escape(text)
