"""Files of several ranks read as one: what each rank holds a part of, and what all of them hold.

Which of the two it is, and along which axis, is told by the shapes that the target has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from msgspec.structs import replace

from ckptconv.suggest.units import Side, Unit

SEPARATOR = "::"


def gathered(source: Side, target: Side) -> Side:
    """The source with the tensors of all ranks put together; as it is, where its names tell of no ranks."""
    groups: dict[tuple[tuple[str, ...], str], list[Unit]] = {}
    for unit in source.units:
        rank, separator, first = unit.path[0].partition(SEPARATOR)
        if not separator or not rank.isdigit():
            return source
        groups.setdefault(((first, *unit.path[1:]), unit.role), []).append(unit)
    ranks = max(map(len, groups.values()), default=0)
    if ranks < 2 or any(len({unit.shape for unit in units}) > 1 for units in groups.values()):
        return source
    kinds: dict[tuple[tuple[str, ...], str], list[list[Unit]]] = {}
    for (path, role), units in groups.items():
        kinds.setdefault((_kind(path), role), []).append(units)
    axes = {key: _axis(group[0], target.forms) for key, group in kinds.items()}
    return source.holding(_whole(path, units, axes[_kind(path), role]) for (path, role), units in groups.items())


def _kind(path: tuple[str, ...]) -> tuple[str, ...]:
    return tuple("#" if part.isdigit() else part for part in path)


def _axis(units: Sequence[Unit], wanted: Counter[tuple[int, ...]]) -> int:
    """Along which axis the parts of ranks are joined; -1 where every rank has all of it."""
    first = units[0]
    if len(units) < 2 or len(first.shape) < 2:
        longer = replace(first, shape=tuple(size * len(units) for size in first.shape))
        return 0 if first.shape and wanted[longer.form] and not wanted[first.form] else -1
    for axis in range(len(first.shape)):
        if wanted[_joined(units, axis).form]:
            return axis
    return 0


def _joined(units: Sequence[Unit], axis: int) -> Unit:
    first = units[0]
    size = first.shape[axis]
    shape = (*first.shape[:axis], size * len(units), *first.shape[axis + 1 :])
    return replace(first, shape=shape, names=tuple(unit.name for unit in units), sizes=(size,) * len(units), axis=axis)


def _whole(path: tuple[str, ...], units: Sequence[Unit], axis: int) -> Unit:
    if len(units) == 1:
        return replace(units[0], path=path)
    if axis < 0:
        return replace(units[0], path=path, names=tuple(unit.name for unit in units), same=True)
    return replace(_joined(units, axis), path=path)
