"""Small files of text: reports, plans, rules. Written as everything is written, and never over what a command is given."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ckptconv.errors import Problem, UsageError, printable
from ckptconv.execute.staging import Staging
from ckptconv.places.visiting import is_remote


def refuse_to_overwrite(path: Path, others: Iterable[str | Path]) -> None:
    """Raises :class:`~ckptconv.errors.UsageError` CK502 where ``path`` is one of the other files that a command is given, by any name,
    or a file that is there in one of the folders."""
    for other in (Path(other) for other in others if not is_remote(other)):
        there = os.path.exists(path) and os.path.exists(other)
        same = os.path.samefile(path, other) if there else os.path.abspath(path) == os.path.abspath(other)
        inside = there and os.path.isdir(other) and Path(os.path.realpath(other)) in Path(os.path.realpath(path)).parents
        if same or inside:
            raise UsageError(
                Problem("CK502", f"this would overwrite {'a file of ' if inside else ''}{printable(other)}, which the command is given",
                        where=printable(path), try_="another name")
            )  # fmt: skip


def write_text(path: Path, text: str, *, force: bool) -> None:
    """Writes a small file as everything is written: beside its place first, then renamed."""
    with Staging(path, is_folder=False, force=force) as staging:
        staging.path_of(path.name).write_text(text, encoding="utf-8", newline="")
        staging.publish(sync=False)
