"""Which share of the tasks a process does, as the launcher that started it says."""

from __future__ import annotations

from collections.abc import Mapping

from ckptconv.errors import Problem, UsageError, printable


def share_of(environment: Mapping[str, str], of: int | None = None) -> tuple[int, int] | None:
    """(index, of how many), the index from 0; None where no launcher tells.

    A Slurm array (``SLURM_ARRAY_TASK_ID`` with its count, smallest id and step), a Kubernetes indexed Job (``JOB_COMPLETION_INDEX``; how many
    there are it does not tell: ``of``, or ``JOB_COMPLETIONS``), and torchrun or its like (``RANK``, ``WORLD_SIZE``), in this order.

    >>> share_of({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "2"})
    (3, 4)
    >>> share_of({"JOB_COMPLETION_INDEX": "2"}, of=3), share_of({"RANK": "0", "WORLD_SIZE": "2"}), share_of({})
    ((2, 3), (0, 2), None)

    Raises :class:`~ckptconv.errors.UsageError` CK107 for numbers that make no share.
    """
    if "SLURM_ARRAY_TASK_ID" in environment:
        step = _number(environment, "SLURM_ARRAY_TASK_STEP", 1)
        index = _number(environment, "SLURM_ARRAY_TASK_ID") - _number(environment, "SLURM_ARRAY_TASK_MIN", 0)
        if step < 1 or index % step:
            raise _bad("SLURM_ARRAY_TASK_STEP", environment)
        return checked(index // step, of if of is not None else _number(environment, "SLURM_ARRAY_TASK_COUNT"), "SLURM_ARRAY_TASK_ID")
    if "JOB_COMPLETION_INDEX" in environment:
        index = _number(environment, "JOB_COMPLETION_INDEX")
        if of is None and "JOB_COMPLETIONS" not in environment:
            raise UsageError(
                Problem("CK107", "a Kubernetes Job tells its index, but not of how many", where=f"JOB_COMPLETION_INDEX={index}",
                        try_="--of N, or JOB_COMPLETIONS in the container's environment; or --claim")
            )  # fmt: skip
        return checked(index, of if of is not None else _number(environment, "JOB_COMPLETIONS"), "JOB_COMPLETION_INDEX")
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return checked(_number(environment, "RANK"), of if of is not None else _number(environment, "WORLD_SIZE"), "RANK")
    return None


def checked(index: int, of: int, where: str) -> tuple[int, int]:
    """The two as they are. Raises :class:`~ckptconv.errors.UsageError` CK107 where there is no such share."""
    if not 0 <= index < of:
        raise UsageError(Problem("CK107", f"there is no share {index} of {of}: the first is 0, the last {of - 1}", where=where))
    return index, of


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise _bad(name, environment)
    return int(text)


def _bad(name: str, environment: Mapping[str, str]) -> UsageError:
    return UsageError(
        Problem("CK107", "the launcher's environment says no share of the work", where=name, found=printable(environment.get(name, "not set")),
                try_="--index I --of N, or --claim")
    )  # fmt: skip
