"""How much memory a plan needs, from its shapes alone."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from ckptconv.errors import OutputError, Problem, printable
from ckptconv.plan import Apply, Expr, Output, walk

BUFFERS_NBYTES = 2 << 20  #: of each worker that copies
PYTHON_NBYTES = 56 << 20  #: the process itself, with the metadata of an ordinary checkpoint
BESIDE_NBYTES = 64 << 20  #: that other islands may take beside the largest one
TORCH_NBYTES = 280 << 20  #: … once it has imported torch


def peak_nbytes(island: Sequence[Output]) -> int:
    """The most bytes of tensors that are alive at once while one island is computed, output by output, last use frees.

    Views count as copies, so this is an upper bound for the tensors themselves.
    """
    if all(not isinstance(output.expr, Apply) for output in island):
        return 0
    uses: dict[Expr, int] = {}
    nodes = list(walk(output.expr for output in island))
    for node in nodes:
        for argument in node.arguments:
            uses[argument] = uses.get(argument, 0) + 1
    for output in island:
        uses[output.expr] = uses.get(output.expr, 0) + 1
    live = peak = 0
    seen: set[Expr] = set()

    def release(node: Expr) -> None:
        nonlocal live
        uses[node] -= 1
        live -= node.spec.nbytes if not uses[node] else 0

    for output in island:
        for node in walk([output.expr]):
            if node in seen:
                continue
            seen.add(node)
            live += node.spec.nbytes
            peak = max(peak, live)
            for argument in node.arguments:
                release(argument)
        release(output.expr)
    return peak


def memory_explained(error: MemoryError | RuntimeError, output: Output, needed: int) -> Exception:
    """What to raise in the place of ``error``: where it says that memory ran out, how many bytes computing ``output`` needs."""
    if isinstance(error, RuntimeError) and "allocate memory" not in str(error):  # torch has no class of its own for it
        return error
    return OutputError(
        Problem("CK503", f"{printable(output.name)}: there is not enough memory", str(output.origin), f"{needed:,} bytes needed at once",
                "--threads 1, or a machine with more memory")
    )  # fmt: skip


def fixed_nbytes(threads: int, *, computes: bool) -> int:
    """What a run needs beside the tensors: the interpreter, torch where something is computed, and the workers' buffers."""
    return (TORCH_NBYTES if computes else PYTHON_NBYTES) + threads * BUFFERS_NBYTES


def plan_peak(computed: Iterable[Sequence[Output]], threads: int) -> int:
    """The most bytes that a run with ``threads`` workers needs: the islands that run side by side, and what is always needed.

    ``computed`` are the islands of what is more than ranges of the source's bytes: the rest is copied through the buffers.
    """
    peaks = heapq.nlargest(threads, (peak_nbytes(island) for island in computed))
    return min(sum(peaks), max(peaks, default=0) + BESIDE_NBYTES) + fixed_nbytes(threads, computes=any(peaks))


def budget_nbytes(groups: Sequence[Sequence[Output]], peaks: Sequence[int], threads: int, max_memory: int | None) -> int:
    """What tensors may take: of ``max_memory``; where nothing is said, the largest island beside some small ones.

    Raises :class:`~ckptconv.errors.OutputError` CK503 where one island alone needs more than is allowed.
    """
    if max_memory is None:
        return max(peaks, default=0) + BESIDE_NBYTES
    fixed = fixed_nbytes(threads, computes=any(peaks))
    peak, at = max(((peak, -at) for at, peak in enumerate(peaks)), default=(0, 0))
    if fixed + peak > max_memory:
        whose = f"{printable(groups[-at][0].name)} and its like need {peak:,} bytes at once, and " if peak else ""
        raise OutputError(
            Problem("CK503", f"{whose}the process {fixed:,} bytes: --max-memory allows {max_memory:,}",
                    where=str(groups[-at][0].origin) if peak else "", try_=f"--max-memory {(fixed + peak) // 10**6 + 1}MB")
        )  # fmt: skip
    return max_memory - fixed
