"""The assignment of least cost (Kuhn's Hungarian method, with potentials)."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf


def assigned(costs: Sequence[Sequence[float]]) -> list[int]:
    """For every row its column, -1 where there are fewer columns than rows; the sum of costs is the least that there is.

    >>> assigned([[4, 1, 3], [2, 0, 5], [3, 2, 2]])
    [1, 0, 2]
    """
    rows, columns = len(costs), len(costs[0]) if costs else 0
    if rows > columns:
        flipped = assigned([list(column) for column in zip(*costs, strict=True)])
        found = [-1] * rows
        for column, row in enumerate(flipped):
            found[row] = column
        return found
    row_price, column_price = [0.0] * (rows + 1), [0.0] * (columns + 1)
    owner = [0] * (columns + 1)  # of a column: its row, counted from 1
    for row in range(1, rows + 1):
        owner[0] = row
        at = 0
        least, before, seen = [inf] * (columns + 1), [0] * (columns + 1), [False] * (columns + 1)
        while owner[at]:
            seen[at] = True
            here, step, to = owner[at], inf, 0
            for column in range(1, columns + 1):
                if not seen[column]:
                    cost = costs[here - 1][column - 1] - row_price[here] - column_price[column]
                    if cost < least[column]:
                        least[column], before[column] = cost, at
                    if least[column] < step:
                        step, to = least[column], column
            for column in range(columns + 1):
                if seen[column]:
                    row_price[owner[column]] += step
                    column_price[column] -= step
                else:
                    least[column] -= step
            at = to
        while at:
            owner[at] = owner[before[at]]
            at = before[at]
    found = [-1] * rows
    for column in range(1, columns + 1):
        if owner[column]:
            found[owner[column] - 1] = column - 1
    return found
