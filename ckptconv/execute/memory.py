"""How much memory a plan needs, from its shapes alone."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from ckptconv.plan import Apply, Expr, Output, Plan, walk

BUFFER_NBYTES = 1 << 20  #: of each worker that copies


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


def plan_peak(plan: Plan, threads: int) -> int:
    """The most bytes that ``threads`` workers need together: the largest islands side by side, and a copying buffer each."""
    islands = heapq.nlargest(threads, (peak_nbytes(island) for island in plan.islands()))
    return sum(islands) + threads * BUFFER_NBYTES
