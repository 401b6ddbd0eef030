"""The lists of a model: blocks, stages, experts; and what stands before and after them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from msgspec import Struct

from ckptconv.names import collapse
from ckptconv.suggest.units import Side, Unit

_DIGITS = re.compile(r"\d+")


def skeleton(name: str) -> str:
    """A name without its numbers: what is equal here differs in numbers only."""
    return _DIGITS.sub("#", name)


class Family(Struct, frozen=True):
    """A list of parts alike: where it stands, and its members' tensors."""

    path: tuple[str, ...]
    members: Mapping[str, tuple[Unit, ...]]

    def __hash__(self) -> int:
        return hash(self.path)

    @property
    def text(self) -> str:
        return collapse([".".join((*self.path, member)) for member in self.members])[0].text

    def inside(self, unit: Unit) -> str:
        """What a tensor is called in its member."""
        return f"{'.'.join(unit.path[len(self.path) + 1 :])} {unit.role}"

    def kind(self, member: str) -> frozenset[str]:
        """The names in a member, without its own."""
        return frozenset(map(self.inside, self.members[member]))


def families(side: Side) -> list[Family]:
    """Lists of parts with parts of their own, and those of three and more members alike."""
    lists: dict[tuple[tuple[str, ...], str], dict[str, list[Unit]]] = {}
    for unit in side.units:
        for at, part in enumerate(unit.path):
            if _DIGITS.search(part):
                lists.setdefault((unit.path[:at], skeleton(part)), {}).setdefault(part, []).append(unit)
    found = []
    for (path, kind), members in lists.items():
        if len(members) < 2:
            continue
        family = Family(path, {part: tuple(units) for part, units in members.items()})
        deep = any(len(unit.path) > len(path) + 1 for units in members.values() for unit in units)
        if deep or (kind == "#" and max(Counter(map(family.kind, members)).values()) > 2):
            found.append(family)
    return found


def inside(lists: Iterable[Family]) -> set[str]:
    """The names of all tensors in these lists."""
    return {unit.name for family in lists for units in family.members.values() for unit in units}


def zones(side: Side, lists: Iterable[Family]) -> dict[tuple[str, ...], int]:
    """Of modules outside of the longest list: -1 before it, 1 after it. Empty where the order says nothing."""
    if not side.ordered:
        return {}
    deep = [family for family in lists if len(next(iter(family.members.values()))) > 3]
    if not deep:
        return {}
    within = inside(deep)
    places = [unit.at for unit in side.units if unit.name in within]
    first, last = min(places), max(places)
    return {unit.path: -1 if unit.at < first else 1 for unit in side.units if not first <= unit.at <= last}
