"""What a laid-out conversion costs on paper, on so many workers, at a kind of place."""

from __future__ import annotations

from typing import Any

from ckptconv.costs import PLACES, cost, loads_of
from ckptconv.errors import Problem, UsageError, printable
from ckptconv.stage.producing import Conversion
from ckptconv.tasks import Tasks


def figures(made: Conversion, tasks: Tasks, workers: int, place: str) -> dict[str, Any]:
    """The cost of ``tasks`` on ``workers`` machines, source and destination at the same kind of ``place`` (a key of :data:`~ckptconv.costs.PLACES`).

    Bytes, requests and seconds, as the report has them. Raises :class:`~ckptconv.errors.UsageError` CK107 for a place without figures.
    """
    if place not in PLACES:
        raise UsageError(Problem("CK107", f"there are no figures for the place {printable(place)!r}", try_=", ".join(PLACES)))
    where, source = PLACES[place], made.prepared.source
    loads = loads_of(made.prepared.plan, made.layout, source.placed, tasks, where, where, made.kept)
    found = cost(
        loads, workers, where, where, tensors=len(source.placed), source_files=len(source.files), output_files=len(made.layout.files),
        beside_nbytes=made.untouched_nbytes, verified=made.options.level is not None,
    )  # fmt: skip
    return {
        "store": place, "workers": workers, "read_nbytes": found.read_nbytes, "written_nbytes": found.written_nbytes,
        "proved_nbytes": found.proved_nbytes, "reads": found.reads, "writes": found.writes, "tasks_seconds": round(found.tasks_s, 1),
        "alone_seconds": round(found.alone_s, 1),
    }  # fmt: skip
