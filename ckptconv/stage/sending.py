"""Where an output is made: at its destination, or, for a URL, on this disk first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from msgspec.structs import replace

from ckptconv.errors import Problem, UsageError, printable
from ckptconv.layout import not_written_here
from ckptconv.places.urls import path_of
from ckptconv.places.visiting import current, is_remote
from ckptconv.stage.preparing import Options, Prepared
from ckptconv.stage.producing import Produced, Progress, produce


def out_path(destination: str | Path) -> Path:
    """The path at which an output is made."""
    if not is_remote(destination):
        return path_of(destination)
    from ckptconv.places.leaving import path_for

    return path_for(str(destination), current())


def also_words(options: Options) -> list[str]:
    """The places of ``--also NAME=PLACE``, as they were written."""
    also = options.also
    return [str(word) for word in also.values()] if isinstance(also, Mapping) else [str(word).partition("=")[2] for word in also]


def refuse_elsewhere(words: Iterable[str | Path], *, ray: bool, resume: bool) -> None:
    """Raises :class:`~ckptconv.errors.UsageError` CK107 where work that outlives a process, or goes to other machines, is asked for at a URL."""
    url = next((word for word in words if is_remote(word)), None)
    if url is not None and (ray or resume):
        what = f"{'--engine ray' if ray else '--resume'} needs source and destination on a disk: what comes from a URL is gone when a command ends"
        raise UsageError(Problem("CK107", what, where=printable(url), try_="copy it to a disk that all workers see"))


def produce_at(
    prepared: Prepared, destination: str | Path, source: str | Path, options: Options, progress: Progress | None = None
) -> Produced:
    """As :func:`~ckptconv.stage.producing.produce`, for destinations that may be URLs: the output is made and verified here, and sent then."""
    if not is_remote(destination):
        return produce(prepared, path_of(destination), options, progress)
    from ckptconv.places.leaving import Leaving

    leaving = Leaving(str(destination), current(), force=options.force, refuse=not_written_here)
    leaving.refuse_overlap([source, *also_words(options)])
    leaving.refuse_what_is_there()
    produced = produce(prepared, leaving.path, replace(options, sync=False), progress)  # what is sent need not be on a disk
    total = sum(file.stat().st_size for file in (leaving.path.iterdir() if leaving.path.is_dir() else (leaving.path,)))
    sent = 0

    def step(nbytes: int) -> None:
        nonlocal sent
        sent += nbytes
        if progress is not None:
            progress("sending", min(sent, total), total)

    leaving.send(step)
    return produced
