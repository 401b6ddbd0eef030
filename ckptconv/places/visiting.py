"""One command's way to its places: words become paths, and what was needed on the way is cleaned up when the command ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptconv.errors import PLACES, CkptconvError, InputError, OutputError, Problem, UsageError, named, printable
from ckptconv.places.settings import settings
from ckptconv.places.urls import HUB, path_of, protocol_of

if TYPE_CHECKING:
    from ckptconv.places.fetching import Arrivals
    from ckptconv.places.mirror import Mirror

DEFAULT_SCRATCH = 16 << 30


class Visit:
    """The mirrors of one command, by URL. Nothing is made before the first URL is named."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._arrivals: Arrivals | None = None
        self.mirrors: dict[str, Mirror] = {}
        self.sources: dict[str, str] = {}  #: path of a remote source -> the URL that it is recorded by
        self._shown: list[str] = []
        self._made = 0

    @property
    def folder(self) -> Path:
        """Private, and removed at the end."""
        if self._folder is None:
            import tempfile

            wanted = settings().scratch
            try:
                self._folder = Path(tempfile.mkdtemp(prefix="ckptconv-", dir=wanted)).resolve()
            except OSError as error:
                what = f"the scratch folder cannot be made: {error.strerror}"
                raise OutputError(Problem("CK503", what, where=printable(wanted or tempfile.gettempdir()), try_="--scratch DIR")) from None
        return self._folder

    def place(self) -> Path:
        """A new folder of its own."""
        self._made += 1
        made = self.folder / f"{self._made:06}"
        made.mkdir()
        return made

    def show(self, path: Path, url: str) -> None:
        """What people read says ``url`` where it means ``path``."""
        PLACES[str(path)] = named(url)
        self._shown.append(str(path))

    def near(self, url: str) -> Path:
        """The path that stands for a URL."""
        if protocol_of(url) == HUB:
            from ckptconv.places.hub import cached

            found = cached(url, settings())
            self.show(found.home, found.place)
            self.sources[str(found.path)] = named(found.path)
            return found.path
        if url not in self.mirrors:
            from ckptconv.places.mirror import Mirror

            made = self.place()
            mirror = self.mirrors[url] = Mirror(url, made, self.arrivals)
            self.show(mirror.path, url.rstrip("/"))
            if mirror.path != made:
                self.show(made, mirror.home_url)
            self.sources[str(mirror.path)] = named(url)
        return self.mirrors[url].path

    @property
    def arrivals(self) -> Arrivals:
        """Shared by all mirrors."""
        if self._arrivals is None:
            from ckptconv.places.fetching import Arrivals
            from ckptconv.places.mirror import free_nbytes

            limit = settings().scratch_size
            self._arrivals = Arrivals(min(DEFAULT_SCRATCH, free_nbytes(self.folder) // 2) if limit is None else limit)
        return self._arrivals

    def close(self) -> None:
        """Removes everything that was needed on the way."""
        if self._arrivals is not None:
            self._arrivals.close()
        for path in self._shown:
            PLACES.pop(path, None)
        if self._folder is not None:
            import shutil

            shutil.rmtree(self._folder, ignore_errors=True)


_visit: ContextVar[Visit | None] = ContextVar("ckptconv_visit", default=None)


@contextmanager
def visit() -> Iterator[Visit]:
    """The visit that goes on, or a new one for the time of the block. Problems that leave it name places, not the paths that stood for them."""
    going_on = _visit.get()
    if going_on is not None:
        yield going_on
        return
    made = Visit()
    token = _visit.set(made)
    try:
        yield made
    except CkptconvError as error:
        _say_places(error, made)
        raise
    finally:
        _visit.reset(token)
        try:
            made.close()
        except BaseException:  # a second Ctrl-C must not keep the first from cleaning up
            made.close()
            raise


def near(word: str | Path) -> Path:
    """The path for a word of a command: itself, or the placeholder, mirror or cached snapshot that stands for a URL.

    Raises a :class:`~ckptconv.errors.CkptconvError` where nothing is there, where the store cannot be asked, or a package is missing.
    """
    if protocol_of(word) is None:
        return path_of(word)
    return current().near(str(word))


def is_remote(word: str | Path) -> bool:
    """True for a word that names a place which is no path."""
    return protocol_of(word) is not None


def recorded_place(path: Path) -> str | None:
    """The URL of a source that is not local, as an output records it: without credentials, of a hub's snapshot with its commit."""
    going_on = _visit.get()
    return going_on.sources.get(str(path)) if going_on is not None else None


def look_beside(path: Path, names: Iterable[str]) -> None:
    """Mirrors files that may lie beside a single remote file."""
    going_on = _visit.get()
    for mirror in going_on.mirrors.values() if going_on is not None else ():
        if mirror.path == path:
            mirror.beside(names)


def _say_places(error: CkptconvError, visit: Visit) -> None:
    """Problems in words of places; and where a file changed, that is the problem, whatever it led to."""
    if error.exit_code in (3, 4) and visit.mirrors and not any(problem.code in ("CK310", "CK311", "CK313") for problem in error.problems):
        from ckptconv.places.mirror import changed

        url = None
        with suppress(CkptconvError):
            url = changed(visit.mirrors.values())
        if url is not None:
            found = error.problems[0].what if error.problems else ""
            what = "the file changed while it was read"
            raise InputError(
                Problem("CK311", what, where=printable(url), found=found, try_="run again once nobody writes to it")
            ) from error
    error.problems = tuple(
        Problem(each.code, *(named(text) for text in (each.what, each.where, each.found, each.try_))) for each in error.problems
    )
    error.args = ("\n".join(map(str, error.problems)),)
    if error.verification is not None:
        error.verification = _said(error.verification)


def _said(value: Any) -> Any:
    if isinstance(value, str):
        return named(value)
    if isinstance(value, Mapping):
        return {key: _said(each) for key, each in value.items()}
    return [_said(each) for each in value] if isinstance(value, (list, tuple)) else value


def current() -> Visit:
    """The visit that goes on. Raises :class:`~ckptconv.errors.UsageError` CK107 in a command that is none, and takes no URLs."""
    going_on = _visit.get()
    if going_on is None:
        raise UsageError(Problem("CK107", "this command takes paths, and no URLs", try_="ckptconv run RULES URL DST"))
    return going_on
