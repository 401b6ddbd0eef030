"""What a batch's words mean: which checkpoints, and where each one's output goes."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from ckptconv.errors import CkptconvError, OutputError, Problem, UsageError, printable
from ckptconv.formats import dcp, deepspeed, ranks
from ckptconv.formats.base import INDEX_SUFFIX
from ckptconv.layout import FORMAT_OF_SUFFIX
from ckptconv.stage.batch_lock import NAME, text_of

_SUFFIX = {"torch": ".pth", "safetensors": ".safetensors", "dcp": ""}


class Job(Struct, frozen=True):
    """One checkpoint of a batch."""

    source: Path
    output: Path
    name: str  #: of the output in the lock: relative to the batch's folder, with slashes


def jobs_of(words: Sequence[str], destination: Path, format: str | None = None) -> list[Job]:  # noqa: A002  (the field's own word)
    """Every checkpoint that the words name, once, with its output below ``destination``.

    A word is a file, a pattern (``**`` for folders at any depth), or a folder: a folder that is a checkpoint is one, any other stands for all
    checkpoints below it. Below a folder and below the fixed part of a pattern, an output's path repeats that of its source.

    Raises :class:`~ckptconv.errors.UsageError`: CK107 for a word that means nothing and for two sources with one output, CK502 where
    sources and outputs would mix.
    """
    found: dict[str, Job] = {}
    problems: list[Problem] = []
    for word in words:
        try:
            below, base, walks = _meant(word)
            if walks or os.path.realpath(base) == os.path.realpath(destination):
                _refuse_mixing(destination, base)
        except OSError as error:
            problems.append(Problem("CK310", f"the folder cannot be listed: {error.strerror}", where=printable(error.filename or word)))
            continue
        except CkptconvError as error:
            problems += error.problems
            continue
        if not below:
            hint = f"checkpoints end in {', '.join(FORMAT_OF_SUFFIX)}"
            problems.append(Problem("CK107", "there is no checkpoint of this name", where=printable(word), try_=hint))
        for path in below:
            job = _job(path, base, destination, format)
            other = found.setdefault(job.name, job)
            if os.path.abspath(other.source) != os.path.abspath(path):
                problems.append(
                    Problem("CK107", f"two checkpoints would be written to {printable(job.output)}", where=printable(other.source),
                            found=printable(path), try_="quote the pattern, so that folders are kept; or two batches into two folders")
                )  # fmt: skip
    problems += _nested(found)
    if problems:
        raise UsageError(problems)
    return [found[name] for name in sorted(found)]


def _meant(word: str) -> tuple[list[Path], Path, bool]:
    """The checkpoints that a word names, the folder that their outputs' paths start from, and whether it goes down into folders."""
    path = Path(word)
    if os.path.isdir(path):
        return ([path], path.parent, False) if is_checkpoint(path) else (list(_below(path)), path, True)
    if os.path.lexists(path):
        whole = _whole(path)
        return [whole], whole.parent, False
    if not glob.has_magic(word):
        raise UsageError(Problem("CK107", "there is no such file or folder", where=printable(word)))
    fixed = _fixed_part(path)
    matches = (Path(each) for each in sorted(glob.glob(word, recursive=True)))
    wholes = (_whole(each) for each in matches if is_checkpoint(each) or (each.suffix in FORMAT_OF_SUFFIX and not each.is_dir()))
    return list(dict.fromkeys(wholes)), fixed, "**" in path.parts


def _fixed_part(pattern: Path) -> Path:
    parts = pattern.parts
    return Path(*parts[: next(at for at, part in enumerate(parts) if glob.has_magic(part))])


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is one checkpoint: it has an index of shards, or is one of torch.distributed, DeepSpeed or tensor-parallel ranks."""
    if not os.path.isdir(path):
        return False
    return (
        any(name.endswith(INDEX_SUFFIX) for name in os.listdir(path))
        or (path / dcp.METADATA).is_file()
        or deepspeed.folder_of(path) is not None
        or bool(ranks.found(path))
    )


def _below(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if is_checkpoint(path):
                yield path
            else:
                yield from _below(path)
        elif path.suffix in FORMAT_OF_SUFFIX:
            yield path


def _whole(path: Path) -> Path:
    """The folder, where the file is a part of a checkpoint in several files: a shard stands for the whole."""
    parent = path.parent
    return parent if not path.is_dir() and is_checkpoint(parent) else path


def _job(path: Path, base: Path, destination: Path, format: str | None) -> Job:  # noqa: A002
    try:
        relative = path.relative_to(base)
    except ValueError:  # the whole that a match is a part of may be the pattern's own folder
        relative = Path(path.name)
    if str(relative) == ".":
        relative = Path(Path(os.path.abspath(path)).name)
    if format in _SUFFIX and not path.is_dir():
        suffix = _SUFFIX[format]
        relative = relative.with_suffix(suffix) if relative.suffix in FORMAT_OF_SUFFIX else relative.with_name(relative.name + suffix)
    return Job(path, destination / relative, text_of(relative.as_posix()))


def _refuse_mixing(destination: Path, base: Path) -> None:
    inner, outer = (Path(os.path.realpath(path)) for path in (destination, base))
    if outer in (inner, *inner.parents):
        raise UsageError(
            Problem("CK502", f"the outputs' folder lies in {printable(base)}, where the sources are looked for", where=printable(destination),
                    try_="a folder beside it")
        )  # fmt: skip


def _nested(found: dict[str, Job]) -> Iterable[Problem]:
    """Outputs that would lie in one another, and one that would be the lock."""
    for name, job in found.items():
        above = next((found[str(parent)] for parent in Path(name).parents if str(parent) in found), None)
        if above is not None:
            yield Problem("CK107", f"an output would lie in another one, {printable(above.output)}", where=printable(job.output),
                          found=printable(job.source), try_="two batches into two folders")  # fmt: skip
        if name == NAME:
            yield Problem("CK107", "an output would take the place of the batch's lock", where=printable(job.output), try_="another name")


def make_folder(folder: Path) -> None:
    """The folder of an output, with what is missing above it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"the folder cannot be made: {error.strerror}"
        raise OutputError(
            Problem("CK503", what, where=printable(folder), try_="write where you may, and where no file has its name")
        ) from None
